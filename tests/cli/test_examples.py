"""Every example in a `--help` is run, plain and as JSON: status 0, no control characters.

They run in a folder with small stand-ins for the files they name, and with further flags that make
them short; of a flag given twice, the last one counts.
"""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tinygrad_llm.cli import COMMANDS, OVERVIEW, main
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.models.bert import BertConfig, BertModel
from tinygrad_llm.models.t5 import T5, T5Config

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
EXAMPLE = re.compile(r"^  ((?:cat \S+ \| )?tinygrad-llm .*)$", re.MULTILINE)
_NETWORK = "--n-layer 2 --n-head 2 --n-embd 8 --context 32 --vocab-size 300"
_LENGTH = "--steps 2 --warmup 1 --batch-size 2 --accumulate 1 --max-new-tokens 2"
_OFTEN = "--eval-every 1 --eval-batches 1 --checkpoint-every 1"
SMALL = f"{_NETWORK} {_LENGTH} {_OFTEN}".split()
FINETUNE = ["--preset", "tiny", "--epochs", "1", "--max-length", "32", "--quiet"]


def helps():
    """The help texts of all commands, by the words that print them."""
    texts = {"": OVERVIEW}
    for name in COMMANDS:
        module = import_module(f"tinygrad_llm.cli.{name}")
        for constant, text in vars(module).items():
            if isinstance(text, str) and (constant.endswith("HELP") or constant == "OVERVIEW"):
                texts[f"{name}.{constant}"] = text
    return texts


# The scripts' own installation lines begin with the name of a shell, not with the program.
EXAMPLES = sorted({line for text in helps().values() for line in EXAMPLE.findall(text)})
WITH_JSON = (
    "pretrain",
    "finetune",
    "generate",
    "evaluate",
    "runs",
    "tokenizer",
    "gradcheck",
    "doctor",
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """book.txt and what the examples make of it, under the names that they use."""
    folder = tmp_path_factory.mktemp("examples")
    text = "".join(f"Once upon a time {i} and One more made {i + 1}.\n" for i in range(200))
    for name in ("book.txt", "other.txt", "input.txt"):
        (folder / name).write_text(text)
    (folder / "web").mkdir()
    lines = [json.dumps({"body": line, "text": line}) for line in text.splitlines()]
    (folder / "notes").mkdir()
    (folder / "notes/one.md").write_text(text)
    (folder / "posts.csv").write_text("title,body\n" + "one,One more time\n" * 40)
    for name in ("web.jsonl", "web/a.jsonl", "web/b.jsonl"):
        (folder / name).write_text("\n".join(lines))
    for run in ("runs/book", "runs/book-2"):
        where = ["--data", str(folder / "book.txt"), "--run", str(folder / run)]
        assert main(["pretrain", "gpt", "--preset", "tiny", *where, *SMALL]) == 0
    step = folder / "runs/book/checkpoints"
    shutil.copytree(step / "step-000002", step / "step-000500")
    prepare_labelled(folder)
    tokens = ["--data", str(folder / "book.txt"), "--kind", "byte"]
    assert main(["tokenizer", "train", *tokens, "--out", str(folder / "book-tokens")]) == 0
    return folder


def prepare_labelled(folder):
    """Labelled files, a BERT and a run for the examples of finetune and predict."""
    rows = [(f"a {'fine' if i % 2 else 'dull'} film {i}", i % 2) for i in range(40)]
    tables = {
        "reviews.csv": ("review,stars", "{0},{1}"),
        "pairs.csv": ("text1,text2,label", "{0},{0},{1}"),
        "pairs2.tsv": ("source\ttarget", "{0}\t{0}"),
        "questions.csv": ("question,context,answer", "what is no {1}?,{0},film"),
        "eng-fra.txt": ("", "{0}\tun film {1}\tby N. N."),
        "train.tsv": ("", "{0}\t{1}"),
        "dev.tsv": ("", "{0}!\t{1}"),
    }
    for name, (head, line) in tables.items():
        lines = ([head] if head else []) + [line.format(*row) for row in rows]
        (folder / name).write_text("\n".join(lines) + "\n")
    questions = [
        {"id": str(i), "question": "what is dull?", "answers": [{"text": "film"}]} for i in range(8)
    ]
    squad = {"data": [{"paragraphs": [{"context": "a dull film", "qas": questions}]}]}
    for name in ("train-v2.0.json", "dev-v2.0.json"):
        (folder / name).write_text(json.dumps(squad))
    for name in ("train.conll", "dev.conll"):
        (folder / name).write_text("Ada B-PER\nwent O\n. O\n\n" * 12)
    names = '[names]\ntask = "tag"\ndata = "train.conll"\n'
    labelled = 'text_column = "review"\nlabel_column = "stars"\n'
    reviews = f'[reviews]\ntask = "classify"\ndata = "reviews.csv"\n{labelled}'
    (folder / "tasks.toml").write_text(names + reviews)
    tokenizer = Tokenizer.wordpiece("a fine dull film Ada went " * 3, 60)
    config = BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=8,
    )
    BertModel(config).save_pretrained(folder / "my-bert")
    tokenizer.save(folder / "my-bert")
    bpe = Tokenizer.bpe("translate English to French: a fine dull film " * 3, 320)
    t5 = T5Config(
        bpe.vocab_size,
        d_model=8,
        d_kv=4,
        d_ff=8,
        num_layers=1,
        num_heads=2,
        eos_token_id=bpe.eos_id,
    )
    T5(t5).save_pretrained(folder / "my-t5")
    bpe.save(folder / "my-t5")
    where = ["--data", str(folder / "reviews.csv"), "--text-column", "review", *FINETUNE]
    where += ["--label-column", "stars", "--run", str(folder / "runs/reviews")]
    assert main(["finetune", "classify", *where]) == 0
    where = ["--data", str(folder / "tasks.toml"), "--run", str(folder / "runs/several")]
    assert main(["finetune", "multi", *where, *FINETUNE]) == 0


@pytest.fixture
def here(prepared, tmp_path, monkeypatch):
    """A copy of it as the present folder."""
    folder = tmp_path / "here"
    shutil.copytree(prepared, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def words_of(example, monkeypatch):
    """The arguments of the example, what makes it short added; standard input is what it pipes."""
    before, _, command = example.rpartition(" | ")
    _, *words = shlex.split(command)
    if before:
        data = Path(shlex.split(before)[1]).read_bytes()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    if words[0] == "pretrain" and "--resume" in words:
        shutil.rmtree("runs/book/checkpoints/step-000500")
        words += ["--steps", "3", "--max-new-tokens", "2"]
    elif words[0] == "finetune" and "--resume" not in words:
        short = FINETUNE[2:] if "--preset" in words else FINETUNE
        words += [*short, "--run", "new-run"]
        files = {
            "classify": "train.tsv",
            "pair": "pairs.csv",
            "tag": "train.conll",
            "translate": "pairs2.tsv",
            "multi": "tasks.toml",
            "qa": "questions.csv",
            "lm": "other.txt",
        }
        if "builtin" in words:  # it takes its time
            words[words.index("builtin")] = files[words[1]]
    elif words[0] == "pretrain":
        words += [*SMALL, "--run", "new-run"]
        if "--data" not in words:  # a built-in corpus takes its time
            words += ["--data", "book.txt"]
    elif words[0] == "generate":
        words += ["--max-new-tokens", "3"]
    elif words[0] == "tokenizer" and words[1] == "train":
        words += ["--vocab-size", "300", "--out", "new-tokens"]
    elif (words[0] == "gradcheck" and not words[1:]) or words[1:] == ["--quiet"]:
        words += ["Tanh", "Add"]
    return words


def run(words, capsys):
    """(standard output, standard error) of a command that must succeed."""
    capsys.readouterr()
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert not CONTROL.search(out + err)
    return out, err


def objects(text):
    """The JSON object on each line; NaN and Infinity are no JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    found = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert all(isinstance(value, dict) for value in found)
    return found


def test_every_command_has_examples():
    for name, text in helps().items():
        assert EXAMPLE.search(text), f"{name} has no example"
    assert {shlex.split(e.rpartition(" | ")[2])[1] for e in EXAMPLES} == set(COMMANDS)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_run(example, here, capsys, monkeypatch):
    words = words_of(example, monkeypatch)
    out, _ = run(words, capsys)
    assert out.endswith("\n")


@pytest.mark.parametrize(
    "example", [e for e in EXAMPLES if shlex.split(e.rpartition(" | ")[2])[1] in WITH_JSON]
)
def test_the_examples_run_as_json(example, here, capsys, monkeypatch):
    words = words_of(example, monkeypatch)
    out, err = run([*words, "--json"], capsys)
    assert objects(out)
    assert err == ""


@pytest.mark.parametrize("flags", [["--quiet"], ["--json"], ["--quiet", "--json"]])
@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["pretrain", "gpt", "--preset", "tiny", "--data", "book.txt", *SMALL], 1),
        (["generate", "--model", "runs/book", "--max-new-tokens", "3"], None),
        (["evaluate", "--model", "runs/book"], 4),
        (["runs"], 5),
        (["runs", "compare", "runs/book", "runs/book-2"], None),
        (["tokenizer", "train", "--data", "book.txt", "--kind", "char", "--out", "new"], 2),
        (["gradcheck", "Tanh"], 1),
    ],
)
def test_quiet_leaves_the_result(words, lines, flags, here, capsys):
    out, err = run([*words, *flags], capsys)
    assert err == ""
    if "--json" in flags:
        found = objects(out)
        assert len(found) == 1 or "--quiet" not in flags
    else:
        assert out.strip()
        assert lines is None or out.count("\n") == lines


def test_errors_leave_standard_output_to_json(here, capsys):
    for words in (
        ["evaluate", "--model", "runs/book", "--data", "none\x1b[2J.txt"],
        ["generate", "--model", "none\x1b[2J\r"],
        ["runs", "no\nthing"],
        ["tokenizer", "train", "--data", "none", "--out", "new"],
        ["pretrain", "gpt", "--data", "none"],
        ["gradcheck", "Tahn"],
    ):
        assert main([*words, "--json"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("tinygrad-llm: ")
        assert not CONTROL.search(err)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_knows_few_characters_gets_their_numbers(encoding, here):
    """As under LANG=C, or with PYTHONIOENCODING: never a traceback."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "LC_ALL": "C"}

    def call(*words):
        command = [sys.executable, "-m", "tinygrad_llm", *words]
        return subprocess.run(command, capture_output=True, env=environment)

    Path("names.txt").write_text("狐狸 🎉\n" * 300, encoding="utf-8")
    data = ["--data", "names.txt", "--prompt", "", "--max-new-tokens", "20", "--tokenizer", "char"]
    trained = call("pretrain", "gpt", "--preset", "tiny", *data, "--run", "new-run")
    assert (trained.returncode, trained.stderr) == (0, b"")
    written = call("generate", "--model", "new-run", "--max-new-tokens", "30")
    assert (written.returncode, written.stderr) == (0, b"")
    assert re.search(rb"\\u72d0|\\u72f8|\\U0001f389", written.stdout)
    helped = call("pretrain", "gpt", "--help")
    assert (helped.returncode, helped.stderr) == (0, b"")
    missing = call("runs", "狐")
    assert missing.returncode == 2
    assert b"Traceback" not in missing.stderr
