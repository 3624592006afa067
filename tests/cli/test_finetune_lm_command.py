"""`finetune lm`: on built-in data, what is printed, and the commands that go on with it."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tinygrad_llm.cli import main
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.models.gpt import GPT, GPTConfig

SMALL = ["--preset", "tiny", "--epochs", "1", "--processes", "1"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("the sea is far and blue, and the mat is red. " * 20)
    Path("other.txt").write_text("and the sea is red. " * 5)
    tokenizer = Tokenizer.byte()
    GPT(GPTConfig(tokenizer.vocab_size, 16, n_embd=8, n_layer=1, n_head=2)).save_pretrained("model")
    tokenizer.save("model")


def finetune(*arguments):
    return main(["finetune", "lm", *SMALL, *arguments])


def test_the_scores_stand_side_by_side_and_the_commands_can_be_pasted(here, capsys):
    where = ["--data", "book.txt", "--val-data", "other.txt", "--model", "model"]
    assert finetune(*where, "--run", "my run") == 0
    out, err = capsys.readouterr()
    assert err == ""
    for row in ("this model", "before, as it came", "how often tokens come"):
        assert re.search(rf"^{row} +\d+\.\d{{4}} +[\d.,]+ +\d+\.\d{{4}} +\d+\.\d{{4}}$", out, re.M)
    assert "before, from 'and the sea" in out
    files = {path.name for path in Path("my run").iterdir()}
    assert files >= {"config.toml", "metrics.jsonl", "metrics.json", "checkpoints"}
    assert not re.search("^predict:", out, re.M)
    for command in ("generate", "evaluate", "resume"):
        line = next(line for line in out.splitlines() if line.startswith(f"{command}: "))
        words = shlex.split(line.partition(":")[2].replace("FILE", "other.txt").replace("…", "a"))
        assert main(words[words.index("finetune" if command == "resume" else command) :]) == 0
    assert main(["predict", "--model", "my run", "--data", "other.txt"]) == 2
    assert "tinygrad-llm generate --model RUN" in capsys.readouterr().err
    assert main(["runs", "."]) == 0
    assert re.search(r"my run +finished", capsys.readouterr().out)


def test_built_in_data_need_no_file(here, capsys):
    assert finetune("--data", "builtin", "--model", "model", "--max-seconds", "1", "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1]["baselines"]["before"]["loss"] > 0
    assert lines[-1]["bits_per_byte"] > 0


def test_what_is_for_labels_is_refused(here, capsys):
    assert finetune("--data", "book.txt", "--class-weights", "balanced") == 2
    assert "--class-weights is for other tasks" in capsys.readouterr().err
    assert finetune("--data", "book.txt", "--model", "model", "--max-length", "32") == 2
    assert "give --max-length 16" in capsys.readouterr().err
