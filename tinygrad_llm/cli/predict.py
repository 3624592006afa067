"""`tinygrad-llm predict`: label new texts with a fine-tuned model."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

from tyro.conf import arg

from tinygrad_llm.cli.arguments import parse
from tinygrad_llm.cli.errors import user_input
from tinygrad_llm.cli.finetune import with_answers
from tinygrad_llm.cli.output import Quiet
from tinygrad_llm.train.log import as_json, printable

if TYPE_CHECKING:
    from tinygrad_llm.finetune.predict import Predictor

HELP = """\
Label new texts with a fine-tuned model: JSONL, an object for each row of the data.

  classify   line, text, label, probability, and the probabilities of all labels
  pair       the same with text1 and text2
  translate  line, text, translation
  tag        line, words, tags, and spans: the type of each, its first word and the one behind it
  qa         line, question, context, answer, its first character and the one behind it, probability

The data is a file as for `finetune` (labels in it are not looked at), or '-': a text a line from
standard input, a pair with a tab between, words with blanks between; for qa a question, a tab and
its context. Questions may also be in SQuAD's JSON, where each has an id in place of a line.

examples:
  tinygrad-llm predict --model runs/reviews --data reviews.csv
  tinygrad-llm predict --model runs/reviews --data reviews.csv --text-column review --output \
labels.jsonl
  cat book.txt | tinygrad-llm predict --model runs/reviews --data -
  tinygrad-llm predict --model runs/several --task names --data dev.conll
"""


@dataclass(frozen=True)
class Options:
    """What to label, and with which model."""

    model: Annotated[str, arg(metavar="RUN|FOLDER")]
    """A run folder of `finetune` (its best checkpoint is taken), or a checkpoint."""
    data: Annotated[str, arg(metavar="FILE|-")]
    """CSV, TSV or JSONL; for tag CoNLL columns, for qa also SQuAD's JSON; -: standard input."""
    task: Annotated[str, arg(metavar="NAME", help_behavior_hint="")] = ""
    """Which head, of a run of multi: the name of its task."""
    text_column: Annotated[str, arg(metavar="COLUMN", help_behavior_hint="")] = ""
    """The column of the text (of words, for tag): its name, or its number from 1."""
    second_column: Annotated[str, arg(metavar="COLUMN", help_behavior_hint="")] = ""
    """The column of the second text, for pair."""
    question_column: Annotated[str, arg(metavar="COLUMN", help_behavior_hint="")] = ""
    """The column of the question, for qa."""
    context_column: Annotated[str, arg(metavar="COLUMN", help_behavior_hint="")] = ""
    """The column of the context, for qa."""
    header: Literal["auto", "yes", "no"] = "auto"
    """Whether the first line names the columns: --header, --no-header, or what it looks like."""
    quoted: Literal["auto", "yes", "no"] = "auto"
    """Whether fields are in quotes: --quoted, --no-quoted, or what it looks like."""
    output: Annotated[str, arg(metavar="FILE", help_behavior_hint="")] = ""
    """Where the lines go; otherwise to standard output."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: the GPU where CuPy sees one."""
    quiet: Annotated[Quiet, arg(help="No notes on how the data was read.")] = False


def run(arguments: Sequence[str]) -> int:
    """Write a line of JSON for each row of the data."""
    options = parse(Options, with_answers(arguments), "predict", HELP)

    from tinygrad_llm.finetune.predict import Predictor
    from tinygrad_llm.train.machine import choose_device

    with user_input():
        device, _ = choose_device(options.device)
        found, notes = _found(Predictor.open(options.model, device, options.task), options)
    for note in [] if options.quiet else notes:
        print(printable(f"note: {note}"), file=sys.stderr)
    with user_input(), _out(options.output) as out:
        count = 0
        for value in found:
            print(as_json(value), file=out)
            count += 1
    if options.output and not options.quiet:
        print(f"{count:,} lines written to {options.output}")
    return 0


def _found(predictor: Predictor, options: Options) -> tuple[Iterator[dict[str, Any]], list[str]]:
    from tinygrad_llm.finetune.predict import Columns

    if options.data == "-":
        return predictor.of_lines(_standard_input())
    answers = {"auto": None, "yes": True, "no": False}
    columns = Columns(
        options.text_column,
        options.second_column,
        answers[options.header],
        answers[options.quoted],
        options.question_column,
        options.context_column,
    )
    return predictor.of_file(options.data, columns)


def _standard_input() -> list[str]:
    """Its lines; ValueError where it is not UTF-8."""
    from tinygrad_llm.data import files
    from tinygrad_llm.data.tables import lines_of

    if sys.stdin is None:  # closed by the shell
        raise ValueError("standard input is closed: name a file with --data")
    return lines_of(files.decode(sys.stdin.buffer.read(), "standard input"))


@contextmanager
def _out(path: str) -> Iterator[TextIO]:
    if not path:
        yield sys.stdout
        return
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        yield file
