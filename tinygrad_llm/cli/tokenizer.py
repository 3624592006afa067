"""`tinygrad-llm tokenizer train|show`: text into tokens, learnt from a text or looked at."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from tinygrad_llm.cli.arguments import parse, program
from tinygrad_llm.cli.errors import UsageError, user_input
from tinygrad_llm.cli.output import Json, Quiet, show_json

if TYPE_CHECKING:
    from tinygrad_llm.data.corpora import Corpus
    from tinygrad_llm.data.tokenizers import Tokenizer

OVERVIEW = """\
usage: tinygrad-llm tokenizer train|show [OPTIONS]

Train a tokenizer on a text, or show how one cuts a text into tokens.

examples:
  tinygrad-llm tokenizer train --data book.txt --kind bpe --vocab-size 1000 --out book-tokens
  tinygrad-llm tokenizer show --model book-tokens --text "Once upon a time"

`tinygrad-llm tokenizer train --help` lists the options, as does `tokenizer show --help`.
"""

TRAIN_HELP = """\
Train a tokenizer on a text and save it in a new folder, as tokenizer.json.

The text (--data) is one of these:
  python-docs, python-code   a built-in corpus
  book.txt                   a text file
  books                      a folder: every .txt and .md file in it and below
  'books/**/*.tex'           a pattern, in quotes: every file it matches
  web.jsonl                  an object per line, the text in its field "text"
  web.jsonl:body             the same, the text in the field "body"
  -                          standard input

examples:
  tinygrad-llm tokenizer train --data book.txt --kind bpe --vocab-size 1000 --out book-tokens
  tinygrad-llm tokenizer train --data 'web/*.jsonl:body' --kind unigram --out web-tokens
  cat book.txt | tinygrad-llm tokenizer train --data - --kind wordpiece --cased --out words
"""

SHOW_HELP = """\
Show the pieces and ids that a tokenizer cuts a text into, and the characters per token.

A piece that is part of a character is shown as its bytes, such as '\\xe4\\xb8'.

examples:
  tinygrad-llm tokenizer show --model book-tokens --text "Once upon a time"
  tinygrad-llm tokenizer show --model runs/book --text "中文 🎉"
"""


def run(arguments: Sequence[str]) -> int:
    """Train or show, as the first word says."""
    name, *rest = arguments or ["nothing"]
    if name in ("-h", "--help"):
        print(OVERVIEW, end="")
        return 0
    commands = {"train": _train, "show": _show}
    if name not in commands:
        close = difflib.get_close_matches(name, commands, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        got = repr(name) if arguments else name
        raise UsageError(f"tokenizer what? Expected train or show, got {got}{hint}")
    return commands[name](rest)


# --- train ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainOptions:
    """Which tokenizer, from which text."""

    data: Annotated[str, arg(metavar="SOURCE")]
    """The text to learn from, in one of the forms above."""
    out: Annotated[str, arg(metavar="FOLDER")]
    """The new folder."""
    kind: Literal["byte", "char", "bpe", "wordpiece", "unigram"] = "bpe"
    """byte, char: one each; bpe: GPT-2's; wordpiece: BERT's; unigram: the likeliest pieces."""
    vocab_size: int = 8192
    """How many tokens there may be (byte and char have as many as they need)."""
    cased: bool = False
    """wordpiece: keep capital letters and accents."""
    quiet: Quiet = False
    json: Json = False


def _train(arguments: Sequence[str]) -> int:
    options = parse(TrainOptions, arguments, "tokenizer train", TRAIN_HELP)

    from tinygrad_llm.data import corpora
    from tinygrad_llm.train.files import write_folder

    out = Path(options.out).expanduser()
    with user_input():
        _refuse(options, out)
        corpus = corpora.load_text(options.data, once=True)
        if not (options.quiet or options.json):
            print(
                f"text: {corpus.name}, {len(corpus.text):,} characters, documents: "
                f"{len(corpus.documents):,}, sha256 {corpus.sha256[:12]}",
                flush=True,
            )
        tokenizer = _made(options, corpus)
        write_folder(out, tokenizer.save)
    _tell(options, corpus, tokenizer, out)
    return 0


def _tell(options: TrainOptions, corpus: Corpus, tokenizer: Tokenizer, out: Path) -> None:
    if options.json:
        found = {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "out": str(out)}
        text = {"data": corpus.name, "characters": len(corpus.text), "sha256": corpus.sha256}
        show_json(found | text | {"documents": len(corpus.documents)})
        return
    asked = ""
    if options.kind not in ("byte", "char") and tokenizer.vocab_size < options.vocab_size:
        asked = f" ({options.vocab_size:,} asked for: the text gives no more)"
    print(f"tokenizer: {tokenizer.kind}, vocabulary {tokenizer.vocab_size:,}{asked}")
    print(f"saved: {out}")
    if not options.quiet:
        model = shlex.quote(str(out))
        print(f"show:  {program()} tokenizer show --model {model} --text 'Once upon a time'")


def _refuse(options: TrainOptions, out: Path) -> None:
    """What can be known to be wrong before the text is read."""
    if options.cased and options.kind != "wordpiece":
        raise UsageError(
            f"--cased is for --kind wordpiece; {options.kind} keeps capital letters anyway"
        )
    if out.exists():
        raise UsageError(f"{out} is there already: delete it, or name another --out")


def _made(options: TrainOptions, corpus: Corpus) -> Tokenizer:
    from tinygrad_llm.data.tokenizers import Tokenizer

    if options.kind == "byte":
        return Tokenizer.byte()
    if options.kind == "char":
        return Tokenizer.char(corpus.text)
    if options.kind == "wordpiece":
        return Tokenizer.wordpiece(corpus.documents, options.vocab_size, cased=options.cased)
    make = Tokenizer.bpe if options.kind == "bpe" else Tokenizer.unigram
    return make(corpus.documents, options.vocab_size)


# --- show -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShowOptions:
    """Which tokenizer, and what it is to cut."""

    model: Annotated[str, arg(metavar="FOLDER")]
    """A folder with a tokenizer.json or BERT's vocab.txt, a run folder, or a checkpoint."""
    text: str
    """What to cut into tokens."""
    json: Json = False


def _show(arguments: Sequence[str]) -> int:
    options = parse(ShowOptions, arguments, "tokenizer show", SHOW_HELP)
    with user_input():
        tokenizer = _found(options.model)
        ids = tokenizer.encode(options.text).tolist()
    if options.json:
        pieces = [_as_text(tokenizer.piece(token_id)) for token_id in ids]
        found = {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size}
        show_json(found | {"text": options.text, "ids": ids, "pieces": pieces})
        return 0
    print(f"tokenizer: {tokenizer.kind}, vocabulary {tokenizer.vocab_size:,}\n")
    print(f"{'id':>8}  piece")
    for token_id in ids:
        piece = tokenizer.piece(token_id)
        print(f"{token_id:>8}  {repr(piece).removeprefix('b')}")  # repr: no control characters
    characters, per_token = len(options.text), len(options.text) / max(1, len(ids))
    print(
        f"\ntokens: {len(ids):,}, characters: {characters:,}, characters per token: {per_token:.2f}"
    )
    return 0


def _as_text(piece: str | bytes) -> str:
    """A part of a character, which JSON cannot hold, as '\\xe4\\xb8'."""
    return piece if isinstance(piece, str) else piece.decode(errors="backslashreplace")


def _found(model: str) -> Tokenizer:
    """The tokenizer in the folder, or in the checkpoint that a run folder means."""
    from tinygrad_llm.data.tokenizers import Tokenizer
    from tinygrad_llm.train.run import find_checkpoint

    folder = Path(model).expanduser()
    is_run = (folder / "checkpoints").is_dir()
    return Tokenizer.from_file(find_checkpoint(folder) if is_run else folder)
