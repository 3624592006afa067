"""`predict`: a line of JSON for each row, from files and standard input."""

import io
import json
import sys
from pathlib import Path

import pytest

from tinygrad_llm.cli import main
from tinygrad_llm.models.gpt import GPT, GPTConfig

SMALL = ["--preset", "tiny", "--epochs", "1", "--processes", "1", "--quiet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of the three tasks, and what they were trained on."""
    folder = tmp_path_factory.mktemp("predict")
    texts = [f"a {'fine' if i % 2 else 'dull'} film {i}" for i in range(24)]
    rows = [f"{text},{i % 2}" for i, text in enumerate(texts)]
    (folder / "reviews.csv").write_text("\n".join(["review,stars", *rows]) + "\n")
    pairs = [f"{text}\t{text}\t{i % 2}" for i, text in enumerate(texts)]
    (folder / "pairs.tsv").write_text("\n".join(["text1\ttext2\tlabel", *pairs]) + "\n")
    (folder / "train.conll").write_text("Ada B-PER\nwent O\n. O\n\n" * 20)
    for task, file, columns in (
        ("classify", "reviews.csv", ["--text-column", "review", "--label-column", "stars"]),
        ("pair", "pairs.tsv", []),
        ("tag", "train.conll", []),
    ):
        where = ["--data", str(folder / file), "--run", str(folder / task), *columns]
        assert main(["finetune", task, *where, *SMALL]) == 0
    return folder


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return folder


def predict(folder, task, *arguments):
    return ["predict", "--model", str(folder / task), *arguments]


def rows_of(text):
    return [json.loads(line) for line in text.splitlines()]


def test_the_column_of_the_training_is_the_column(here, capsys):
    assert main(predict(here, "classify", "--data", str(here / "reviews.csv"))) == 0
    rows = rows_of(capsys.readouterr().out)
    assert [row["line"] for row in rows] == list(range(2, 26))
    assert rows[0]["text"] == "a dull film 0"
    assert set(rows[0]["probabilities"]) == {"0", "1"}


def test_another_column_and_an_output_file(here, capsys):
    Path("new.jsonl").write_text('{"id": 7, "body": "fine 狐"}\n{"id": 8, "body": ""}\n')
    where = ["--data", "new.jsonl", "--text-column", "body", "--output", "out.jsonl"]
    assert main(predict(here, "classify", *where)) == 0
    out, err = capsys.readouterr()
    assert out == "2 lines written to out.jsonl\n"
    assert "zero length" in err
    rows = rows_of(Path("out.jsonl").read_text())
    assert [row["text"] for row in rows] == ["fine 狐", ""]
    assert main(predict(here, "classify", *where, "--quiet")) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("task", "text", "keys"),
    [
        ("classify", "fine film\n\ndull film\n", {"text", "label"}),
        ("pair", "fine\tdull\n", {"text1", "text2", "label"}),
        ("tag", "Ada went .\n", {"words", "tags", "spans"}),
    ],
)
def test_lines_of_standard_input(task, text, keys, here, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert main(predict(here, task, "--data", "-")) == 0
    rows = rows_of(capsys.readouterr().out)
    assert len(rows) == sum(bool(line) for line in text.split("\n"))
    assert keys <= set(rows[0])


def test_files_of_pairs_and_of_words(here, capsys):
    assert main(predict(here, "pair", "--data", str(here / "pairs.tsv"), "--quiet")) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows[3]["text2"] == "a fine film 3"
    Path("words.txt").write_text("Ada\nwent\n\nBob\n")
    assert main(predict(here, "tag", "--data", "words.txt")) == 0
    rows = rows_of(capsys.readouterr().out)
    assert [row["words"] for row in rows] == [["Ada", "went"], ["Bob"]]
    assert [row["line"] for row in rows] == [1, 4]


def test_plain_text_is_a_text_a_line(here, capsys):
    Path("lines.txt").write_text("label\na fine film, really\n")
    assert main(predict(here, "classify", "--data", "lines.txt")) == 0
    texts = [row["text"] for row in rows_of(capsys.readouterr().out)]
    assert texts == ["label", "a fine film, really"]


def test_what_cannot_be_is_said_in_one_sentence(here, capsys):
    sizes = GPTConfig(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    GPT(sizes).save_pretrained("gpt")
    Path("two.csv").write_text("a,b\nx,y\n")
    Path("latin.txt").write_bytes(b"caf\xe9\n")
    data = str(here / "reviews.csv")
    for words, why in [
        (["--model", "none", "--data", data], "there is no folder 'none'"),
        (["--model", "gpt", "--data", data], "holds a GPT, which labels nothing"),
        (["--model", str(here / "classify"), "--data", "none.csv"], "no file 'none.csv'"),
        (["--model", str(here / "classify"), "--data", "two.csv", "--header"], "--text-column"),
        (["--model", str(here / "classify"), "--data", "latin.txt"], "UTF-8"),
        (["--model", str(here / "pair"), "--data", data], "--text-column"),
        (["--data", data], "--model is missing"),
    ]:
        assert main(["predict", *words]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert why in err
        assert err.count("\n") == 1


def test_a_damaged_checkpoint_is_not_used(here, tmp_path, capsys):
    import shutil

    shutil.copytree(here / "classify", "copy", symlinks=True)
    best = Path("copy/checkpoints/best").resolve()
    (best / "task.json").write_text("{}")
    assert main(["predict", "--model", "copy", "--data", str(here / "reviews.csv")]) == 2
    assert "task.json" in capsys.readouterr().err
