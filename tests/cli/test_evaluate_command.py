"""`tinygrad-llm evaluate` on a small run: what it prints, writes and refuses."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tinygrad_llm.cli import main
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.models.gpt import GPT
from tinygrad_llm.tasks.evaluate import Reading, evaluate_ids

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
TEXT = "".join(f"{i} and {i} make {2 * i}: Füchse, 狐狸.\n" for i in range(300))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    book = folder / "book.txt"
    book.write_text(TEXT, encoding="utf-8")
    size = ["--preset", "tiny", "--steps", "4", "--eval-batches", "0", "--max-new-tokens", "0"]
    where = ["--data", str(book), "--run", str(folder / "runs/book"), "--quiet"]
    assert main(["pretrain", "gpt", *size, *where]) == 0
    return folder


@pytest.fixture
def run(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)

    def run(*arguments, code=0):
        capsys.readouterr()
        assert main(["evaluate", "--model", "runs/book", *arguments]) == code
        out, err = capsys.readouterr()
        if code:
            assert err.startswith("tinygrad-llm: ")
            assert err.count("\n") == 1
            return err
        assert err == ""
        assert not CONTROL.search(out)
        return out

    return run


def test_without_a_text_it_is_the_validation_of_the_run(run):
    last = json.loads(Path("runs/book/metrics.jsonl").read_text().splitlines()[-1])
    found = json.loads(run("--json"))
    assert found["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    assert found["split"] == "val"
    assert found["data"].endswith("book.txt")
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2))  # bytes are tokens
    assert found["tokens"] == found["bytes"] == int(0.1 * len(TEXT.encode())) - 1
    assert (found["context"], found["stride"]) == (16, 16)
    again = json.loads(run("--json", "--model", "runs/book/checkpoints/latest"))
    assert again["loss"] == found["loss"]


@pytest.mark.parametrize(
    "how",
    [
        ["--documents", "separate"],
        ["--val-by", "document", "--val-fraction", "0.3"],
        ["--val-by", "document", "--val-fraction", "0.3", "--documents", "separate"],
        ["--val-data", "other.txt"],
    ],
)
def test_it_is_the_validation_however_the_run_divides_its_text(how, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    documents = [f"{i} and {i} make {2 * i}.\n" * (i % 3 + 1) for i in range(90)]
    Path("book.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    Path("other.txt").write_text("Four and four make eight.\n" * 20)
    size = ["--preset", "tiny", "--steps", "2", "--eval-batches", "0", "--max-new-tokens", "0"]
    assert main(["pretrain", "gpt", *size, "--data", "book.jsonl", *how, "--run", "run"]) == 0
    last = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    capsys.readouterr()
    assert main(["evaluate", "--model", "run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    assert found["data"].endswith("other.txt" if "--val-data" in how else "book.jsonl")


def test_a_file_with_a_stride_is_scored_as_by_the_library(run):
    checkpoint = "runs/book/checkpoints/best"
    model, tokenizer = GPT.from_pretrained(checkpoint), Tokenizer.from_file(checkpoint)
    ids = tokenizer.encode(f"<|endoftext|>{TEXT}")
    expected = evaluate_ids(model, tokenizer, ids, Reading(12, 5))
    found = json.loads(run("--data", "book.txt", "--context", "12", "--stride", "5", "--json"))
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert found["tokens"] == found["bytes"] == len(TEXT.encode())
    assert (found["split"], found["context"], found["stride"]) == ("all", 12, 5)
    other = json.loads(run("--data", "book.txt", "--context", "12", "--json", "--batch-size", "3"))
    assert other["loss"] != found["loss"]


def test_what_people_see(run):
    out = run("--data", "book.txt")
    found = json.loads(run("--data", "book.txt", "--json"))
    assert f"loss:          {found['loss']:.4f} nats per token" in out
    assert f"bits per byte: {found['bits_per_byte']:.4f}\n" in out
    assert f"scored:        {found['tokens']:,} tokens, {found['bytes']:,} bytes" in out
    quiet = run("--data", "book.txt", "--quiet")
    assert [line.split(":")[0] for line in quiet.splitlines()] == [
        *("loss", "perplexity", "bits per byte", "scored")
    ]
    assert set(quiet.splitlines()) < set(out.splitlines())


def test_nothing_is_written_unless_out_names_a_file(run):
    before = sorted(Path().rglob("*"))
    run("--data", "book.txt")
    assert sorted(Path().rglob("*")) == before
    found = json.loads(run("--data", "book.txt", "--json", "--out", "metrics.json"))
    try:
        written = json.loads(Path("metrics.json").read_text())
        del found["tokens_per_second"], written["tokens_per_second"]
        assert written == found
        again = run("--data", "book.txt", "--out", "metrics.json", code=2)
        assert "metrics.json is there already" in again
    finally:
        Path("metrics.json").unlink()


def test_a_long_evaluation_tells_how_far_it_is(run, monkeypatch):
    from tinygrad_llm.train import progress

    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    for arguments in (["--data", "book.txt"], [], ["--data", "book.txt", "--split", "val"]):
        out = run(*arguments)
        told = [int(percent) for percent in re.findall(r"^scoring: (\d+)%$", out, re.MULTILINE)]
        assert len(told) > 1
        assert told == sorted(told)
        assert "scoring" not in run(*arguments, "--quiet")


def test_standard_input(trained):
    command = ["evaluate", "--model", str(trained / "runs/book"), "--data", "-", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "tinygrad_llm", *command],
        input=b"One and one make two.",
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["bytes"] == 21


def test_a_perplexity_beyond_all_numbers_is_said_in_words(run, monkeypatch):
    from tinygrad_llm.tasks.evaluate import Score
    from tinygrad_llm.train import evaluate

    monkeypatch.setattr(evaluate, "evaluate", lambda *_: Score(8e3, 10, None, 1.0))
    assert "inf (more than a float can hold)" in run("--data", "book.txt")
    assert "bits per byte: unknown" in run("--data", "book.txt")
    found = json.loads(run("--data", "book.txt", "--json"))
    assert (found["loss"], found["perplexity"], found["bits_per_byte"]) == (800.0, None, None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "none.txt"], ["no file 'none.txt'", "built-in corpus"]),
        (["--data", "runs/book/config.toml", "--stride", "17"], ["stride must be from 1 to 16"]),
        (["--context", "17"], ["context must be from 1 to 16, what the model sees, got 17"]),
        (["--stride", "-1"], ["stride must be"]),
        (["--batch-size", "0"], ["batch_size must be at least 1"]),
        (["--split", "train"], ["--split", "'train'"]),
        (["--model", "runs"], ["runs holds no checkpoint"]),
        (["--device", "gpu"], ["got 'gpu'"]),
        (["--out", "no/such/folder/x.json"], ["there is no folder no/such/folder"]),
    ],
)
def test_refusals_are_one_sentence(arguments, words, run):
    sentence = run(*arguments, code=2)
    assert all(word in sentence for word in words), sentence


def test_a_model_folder_of_its_own_needs_a_text(run, trained, tmp_path):
    lone = tmp_path / "lone"
    lone.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        data = (trained / "runs/book/checkpoints/best" / name).read_bytes()
        (lone / name).write_bytes(data)
    assert "lies in no run" in run("--model", str(lone), code=2)
    assert "--data" in run("--model", str(lone), code=2)
    assert "--split all" in run(
        "--model", str(lone), "--data", "book.txt", "--split", "val", code=2
    )
    whole = json.loads(run("--model", str(lone), "--data", "book.txt", "--json"))
    assert whole["loss"] == json.loads(run("--data", "book.txt", "--json"))["loss"]


def test_weights_that_are_no_numbers_are_said_so(run, trained, tmp_path):
    model = GPT.from_pretrained(trained / "runs/book/checkpoints/best")
    for p in model.parameters():
        p.data[:] = np.nan
    model.save_pretrained(tmp_path)
    Tokenizer.from_file(trained / "runs/book/checkpoints/best").save(tmp_path)
    sentence = run("--model", str(tmp_path), "--data", "book.txt", code=2)
    assert "is nan: its weights hold NaN or infinity" in sentence
