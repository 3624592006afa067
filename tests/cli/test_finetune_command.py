"""`finetune`: which task, which flags, what is printed, what is refused in one sentence."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tinygrad_llm.cli import finetune as command
from tinygrad_llm.cli import main
from tinygrad_llm.cli.errors import UsageError
from tinygrad_llm.data import builtin
from tinygrad_llm.finetune import config as finetune_config
from tinygrad_llm.train.trainer import Trainer

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
SMALL = ["--preset", "tiny", "--epochs", "1", "--processes", "1"]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Labelled texts in the present folder, which is a fresh one."""
    monkeypatch.chdir(tmp_path)
    rows = [f'"a {"fine" if i % 2 else "dull, slow"} film {i}",{i % 2}' for i in range(40)]
    Path("bare.csv").write_text("\n".join(rows) + "\n")
    Path("reviews.csv").write_text("\n".join(["text,stars", *rows]) + "\n")
    Path("train.conll").write_text("Ada B-PER\nwent O\n. O\n\n" * 20)


def finetune(task, *arguments):
    return ["finetune", task, *SMALL, *arguments]


def test_the_table_stands_at_the_end_and_the_commands_can_be_pasted(files, capsys):
    where = ["--data", "reviews.csv", "--label-column", "stars", "--run", "my run"]
    assert main(finetune("classify", *where)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert not CONTROL.search(out)
    assert "precision    recall        F1" in out
    assert re.search(r"accuracy +0\.\d+ +0\.\d+", out[out.index("what is had for nothing") :])
    assert "always '" in out
    assert "4 texts" in out or "held out" in out
    assert {p.name for p in Path("my run").iterdir()} >= {
        *("config.toml", "metrics.jsonl", "metrics.json", "loss.png", "metrics.png"),
    }
    line = next(line for line in out.splitlines() if line.startswith("resume: "))
    words = shlex.split(line.removeprefix("resume: "))
    assert main(words[words.index("finetune") :]) == 0
    assert finetune_config.load("my run/config.toml").train.epochs == 2
    assert main(["runs", "."]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"my run +finished", out)
    assert err == ""


def test_json_is_an_object_a_line_and_quiet_one_line(files, capsys):
    where = ["--data", "reviews.csv", "--label-column", "stars", "--run"]
    assert main(finetune("classify", *where, "a", "--json")) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1]["run"] == "a"
    assert 0 <= lines[-1]["accuracy"] <= 1
    assert "val_accuracy" in lines[-1]["best"]
    assert main(finetune("classify", *where, "b", "--quiet")) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"b: accuracy [01]\.\d{4} after 5 steps\n", out)
    assert err == ""


def test_questions_of_the_standard_library_are_answered(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builtin, "_MOST", {"train": 200, "validation": 50})
    where = ["--data", "builtin", "--run", "qa"]
    assert main(finetune("qa", *where)) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert re.search(r"this model +\d+\.\d\d +\d+\.\d\d +50\n", out)
    assert "always 'None'" in out
    assert "the usual answer in the context" in out
    assert {p.name for p in Path("qa").iterdir()} >= {"metrics.json", "metrics.png"}
    Path("new.csv").write_text('question,context\nWhat is the default of b?,"f(a, b=None)"\n')
    assert main(["predict", "--model", "qa", "--data", "new.csv"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answer"] in found["context"]
    assert main(["predict", "--model", "qa", "--data", "new.csv", "--context-column", "x"]) == 2
    assert "has no column 'x'" in capsys.readouterr().err


def test_answers_about_the_file_are_flags_with_and_without_a_word():
    def data(*flags):
        return command.read_options(["classify", *flags]).settings.data

    assert (data().header, data().quoted) == ("auto", "auto")
    assert data("--header").header == data("--header", "yes").header == "yes"
    assert data("--no-header", "--seed", "3").header == data("--header", "no").header == "no"
    assert (data("--header", "--quoted").header, data("--no-quoted").quoted) == ("yes", "no")


def test_a_task_has_its_own_numbers_below_preset_file_and_flags(tmp_path):
    options = command.read_options(["tag"]).settings
    assert (options.task, options.model.n_embd, options.model.dropout) == ("tag", 200, 0.5)
    assert command.read_options(["tag", "--preset", "tiny"]).settings.model.n_embd == 16
    path = tmp_path / "c.toml"
    path.write_text("[model]\nn_embd = 32\nfreeze = 'embeddings'\n[train]\nepochs = 7\n")
    options = command.read_options(["pair", "--config", str(path), "--epochs", "5"]).settings
    assert (options.task, options.model.n_embd, options.train.epochs) == ("pair", 32, 5)
    frozen = ["pair", "--config", str(path), "--freeze", "pooler", "layer.[01]"]
    assert command.read_options(frozen).settings.model.freeze == "pooler layer.[01]"
    path.write_text("[train]\nepoch = 7\n")
    with pytest.raises(ValueError, match=r"did you mean 'train\.epochs'"):
        command.read_options(["pair", "--config", str(path)])


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], f"finetune what? Expected {', '.join(finetune_config.TASKS)}, got nothing"),
        (["clasify"], "did you mean 'classify'"),
        (["classify", "--lrr", "1"], "did you mean --lr"),
        (["classify", "--epochs", "0"], "train.epochs must be at least 1, got 0"),
        (["classify", "--layer-decay", "2"], "train.layer_decay must be in [0, 1], got 2"),
        (["classify", "--preset", "tinny"], "did you mean 'tiny'"),
        (["classify", "--data", "none.csv"], "no file 'none.csv'"),
        (["classify", "--data", "reviews.csv"], "which column is the label"),
        (["classify", "--data", "reviews.csv", "--label-column", "star"], "did you mean 'stars'"),
        (
            ["classify", "--data", "reviews.csv", "--text-column", "3", "--label-column", "2"],
            "has no column 3",
        ),
        (["classify", "--data", "builtin", "--val-data", "reviews.csv"], "leave out --val-data"),
        (["pair", "--data", "bare.csv", "--no-header"], "--label-column"),
        (["classify", "--model", "none", "--data", "bare.csv"], "'none'"),
        (["pair", "--data", "reviews.csv", "--answer-column", "stars"], "finetune qa"),
        (["qa", "--data", "reviews.csv"], "which column is the question"),
        (["qa", "--data", "bad.json"], "is not JSON"),
        (["qa", "--data", "absent.jsonl"], "absent.jsonl': the answer 'Oslo' does not stand in"),
        (["classify", "--prefix", "x"], "--prefix is for translations"),
        (["translate", "--label-smoothing", "1"], "train.label_smoothing must be in [0, 1)"),
        (["translate", "--layer-decay", "0.9"], "--layer-decay is for a stack of layers"),
        (["tag", "--data", "broken.conll"], "line 3"),
        (["tag", "--data", "untagged.conll"], "has one column, expected a word and its tag"),
        (["classify", "--data", "empty.csv"], "is empty"),
        (["--resume", "none"], "none is not a run folder"),
        (["--resume", "x", "--preset", "tiny"], "leave out --preset"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(words, why, files, capsys):
    Path("broken.conll").write_text("Ada B-PER\nwent O\nhome\n. O\n")
    Path("untagged.conll").write_text("Ada\nwent\n")
    Path("empty.csv").write_text("")
    Path("bad.json").write_text("{")
    absent = {"question": "who?", "context": "Ada in Rome", "answer": "Oslo"}
    Path("absent.jsonl").write_text(json.dumps(absent))
    assert main(["finetune", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" or "data:" in out
    assert why in err
    assert err.count("\n") == 1
    assert not Path("runs").exists()


def test_a_run_of_one_task_is_not_resumed_as_another(files, capsys):
    where = ["--data", "bare.csv", "--no-header", "--run", "r", "--quiet"]
    assert main(finetune("classify", *where)) == 0
    with pytest.raises(UsageError, match="r is a run of classify, not of tag"):
        command.read_options(["tag", "--resume", "r"])
    assert main(["finetune", "--resume", "r"]) == 2
    assert "give a larger --epochs" in capsys.readouterr().err


def test_ctrl_c_prints_the_command_that_goes_on(files, capsys, monkeypatch):
    step = Trainer.train_step

    def stopping(self):
        record = step(self)
        if self.step == 2:
            self._signal = 2
        return record

    monkeypatch.setattr(Trainer, "train_step", stopping)
    where = ["--data", "train.conll", "--batch-size", "4", "--run", "my run"]
    assert main(finetune("tag", *where)) == 130
    out = capsys.readouterr().out
    line = out[out.index("Go on with:\n") :].splitlines()[1]
    monkeypatch.setattr(Trainer, "train_step", step)
    words = shlex.split(line)
    assert main([*words[words.index("finetune") :], "--quiet"]) == 0
    assert re.fullmatch(r"my run: f1 [01]\.\d{4} after 5 steps\n", capsys.readouterr().out)
