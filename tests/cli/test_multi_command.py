"""`finetune multi` and `predict --task`: several tasks from one TOML file, and one head of them."""

import io
import json
import re
import sys
from pathlib import Path

import pytest

from tinygrad_llm.cli import main

SMALL = ["--preset", "tiny", "--epochs", "1", "--processes", "1"]
TASKS = """
[reviews]
task = "classify"
data = "data/reviews.csv"
label_column = "stars"

[names]
task = "tag"
data = "data/train.conll"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """tasks.toml, the files that it names, and a run of them."""
    folder = tmp_path_factory.mktemp("multi")
    (folder / "data").mkdir()
    rows = [f"a {'fine' if i % 2 else 'dull'} film {i},{i % 2}" for i in range(24)]
    (folder / "data/reviews.csv").write_text("\n".join(["text,stars", *rows]) + "\n")
    (folder / "data/train.conll").write_text("Ada B-PER\nwent O\n. O\n\n" * 20)
    (folder / "tasks.toml").write_text(TASKS)
    where = ["--data", str(folder / "tasks.toml"), "--run", str(folder / "run"), "--quiet"]
    assert main(["finetune", "multi", *SMALL, *where]) == 0
    return folder


def test_a_run_prints_every_task_and_how_to_go_on(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # paths are relative to tasks.toml, not to here
    where = ["--data", str(folder / "tasks.toml"), "--run", "my run"]
    assert main(["finetune", "multi", *SMALL, *where]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert re.search(r"reviews +accuracy +[01]\.\d{4} +[01]\.\d{4}\n", out)
    assert re.search(r"names +entity F1 +[01]\.\d{4} +[01]\.\d{4}\n", out)
    assert "--- names ---" in out
    assert "predict --model 'my run' --task NAME --data FILE" in out
    assert "(header = false if not)" in out  # of a section, no flag
    found = json.loads(Path("my run/metrics.json").read_text())
    assert set(found["tasks"]) == {"reviews", "names"}
    assert main(["finetune", "--resume", "my run", "--epochs", "2", "--quiet"]) == 0
    assert re.fullmatch(r"my run: mean [01]\.\d{4} after \d+ steps\n", capsys.readouterr().out)


def test_predict_asks_for_the_head_and_takes_the_one_named(folder, monkeypatch, capsys):
    run = str(folder / "run")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Ada went .\n")))
    assert main(["predict", "--model", run, "--task", "names", "--data", "-"]) == 0
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert row["words"] == ["Ada", "went", "."]
    data = ["--data", str(folder / "data/reviews.csv")]
    assert main(["predict", "--model", run, "--task", "reviews", *data, "--quiet"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 24
    assert {row["label"] for row in rows} <= {"0", "1"}
    for words, why in [
        ([], "this model has several heads: say which with --task, of reviews (classify), names"),
        (["--task", "nmaes"], "no head 'nmaes'; did you mean 'names'?"),
    ]:
        assert main(["predict", "--model", run, *words, *data]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert why in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "flags", "why"),
    [
        (("stars", "star"), [], "tasks.toml: [reviews]: "),
        (('"tag"', '"tga"'), [], "[names]: task must be one of classify, pair, tag, qa, got 'tga'"),
        (("label_c", "lable_c"), [], "[reviews]: unknown key 'lable_column'; did you mean"),
        (("", ""), ["--label-column", "stars"], "--label-column is of one task"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(change, flags, why, folder, tmp_path, capsys):
    file = folder / f"{tmp_path.name}-tasks.toml"
    file.write_text(TASKS.replace(*change))
    where = ["--data", str(file), "--run", str(tmp_path / "run")]
    assert main(["finetune", "multi", *SMALL, *where, *flags]) == 2
    err = capsys.readouterr().err
    assert why in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_help_shows_it_in_one_command(capsys):
    for command, line in (
        ("finetune", "finetune multi --data builtin"),
        ("predict", "--task NAME"),
    ):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert line in capsys.readouterr().out
