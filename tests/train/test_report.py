"""What run folders say of themselves: state, scores, damage; and where they differ."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from tinygrad_llm.finetune.config import FinetuneConfig, dumps
from tinygrad_llm.train import config as configuration
from tinygrad_llm.train.config import PretrainConfig, TrainConfig
from tinygrad_llm.train.report import ago, differing, find_runs, look
from tinygrad_llm.train.run import Run


def make(folder, steps=10, done=4, val=(5.0, 4.0), lock="", **train):
    """A run folder as a training leaves it after `done` steps, with validations at the end."""
    run = Run.new(folder)
    run.begin(configuration.dumps(PretrainConfig(train=TrainConfig(steps=steps, **train))))
    run.append({"step": 0, "val_loss": 6.0})
    for step in range(1, done + 1):
        record = {"step": step, "loss": 6.0 - step / 10, "tokens_per_second": 100.0 * step}
        if step > done - len(val):
            record["val_loss"] = val[step - done + len(val) - 1]
        run.append(record)
    run.close()
    (folder / "lock").write_text(lock)
    return run


def checkpoint(run, step, **state):
    """The latest checkpoint, as far as a report looks at it."""
    limits = {"best": 4.0, "waited": state.pop("waited", 0)}
    state = {"step": step, "tokens": 0, "elapsed": 0.0, "best": None, "limits": limits, **state}
    (run.step_folder(step)).mkdir()
    (run.step_folder(step) / "trainer.json").write_text(json.dumps(state))


def dead_process():
    command = [sys.executable, "-c", "import os; print(os.getpid())"]
    return subprocess.run(command, capture_output=True, text=True).stdout


def test_the_numbers(tmp_path):
    make(tmp_path / "run", done=5, val=(4.0, 3.5, 3.75))
    report = look(tmp_path / "run")
    assert (report.step, report.steps) == (5, 10)
    assert (report.best_val_loss, report.best_step) == (3.5, 4)
    assert report.loss == 5.5
    assert (report.speed, report.unit) == (300.0, "tokens")
    assert (report.score, report.best) == ("val_loss", 3.5)
    assert report.changed == pytest.approx((tmp_path / "run/metrics.jsonl").stat().st_mtime)
    assert (report.state, report.why, report.curves) == ("stopped", "", [])
    curves = look(tmp_path / "run", curves=True).curves
    assert curves[0] == {"step": 0, "val_loss": 6.0}
    assert curves[3] == {"step": 3, "loss": 5.7, "val_loss": 4.0}
    json.dumps(report.as_dict())


def finetuned(folder, source, f1, lr=0.0):
    """A fine-tuning run, as far as a report looks at it."""
    data = dataclasses.replace(FinetuneConfig().data, source=source)
    train = dataclasses.replace(FinetuneConfig().train, steps=3, lr=lr)
    run = Run.new(folder)
    run.begin(dumps(FinetuneConfig(task="tag", data=data, train=train)))
    for step, value in enumerate(f1):
        speed = {"words_per_second": 500.0} if step else {}
        run.append({"step": step, "val_loss": 1.0 + step, "val_f1": value, **speed})
    run.close()
    checkpoint(run, 1, best={"step": 1, "val_loss": 2.0, "val_f1": f1[1]})
    return run.folder


def test_a_fine_tuned_run_has_its_own_score_unit_and_configuration(tmp_path):
    a = finetuned(tmp_path / "a", "a.conll", (0.1, 0.75, 0.5))
    b = finetuned(tmp_path / "b", "b.conll", (0.1, 0.8, 0.5, 0.5), lr=0.5)
    make(tmp_path / "text")
    one, other, plain = map(look, (a, b, tmp_path / "text"))
    assert (one.score, one.best, one.best_step) == ("val_f1", 0.75, 1)
    assert (one.best_val_loss, one.speed, one.unit) == (1.0, 500.0, "words")
    assert (one.state, one.steps, other.state) == ("stopped", 3, "finished")
    assert differing([one, other]) == {
        "data.source": ["a.conll", "b.conll"],
        "train.lr": [0.0, 0.5],
    }
    assert differing([one, plain])["task"] == ["tag", None]
    json.dumps(one.as_dict())


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path):
    make(tmp_path / "run", val=(float("nan"), 5.5))
    assert look(tmp_path / "run").best_val_loss == 5.5


def test_states(tmp_path):
    make(tmp_path / "stopped")
    make(tmp_path / "finished", done=10)
    make(tmp_path / "crashed", lock=dead_process())
    make(tmp_path / "reused", lock=str(os.getpid()))  # another process has the id by now
    make(tmp_path / "finished and killed", done=10, lock=dead_process())
    held = make(tmp_path / "running")
    held.hold()
    assert {folder.name: look(folder).state for folder in find_runs(tmp_path)} == {
        "stopped": "stopped",
        "finished": "finished",
        "crashed": "crashed",
        "reused": "crashed",
        "finished and killed": "finished",
        "running": "running",
    }
    held.close()
    assert look(tmp_path / "running").state == "stopped"


@pytest.mark.parametrize(
    ("limit", "state"),
    [
        ({"max_tokens": 50}, {"tokens": 50}),
        ({"max_seconds": 3.0}, {"elapsed": 3.5}),
        ({"patience": 2}, {"waited": 2}),
    ],
)
def test_a_limit_other_than_the_steps_finishes_a_run(limit, state, tmp_path):
    run = make(tmp_path / "run", **limit)
    checkpoint(run, 2)
    assert look(run.folder).state == "stopped"
    checkpoint(run, 4, **state)
    assert look(run.folder).state == "finished"


def test_looking_writes_nothing_and_disturbs_nobody(tmp_path):
    make(tmp_path / "crashed", lock=dead_process())
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "crashed").rglob("*")}
    for _ in range(2):
        assert look(tmp_path / "crashed").state == "crashed"
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "crashed").rglob("*")} == before
    Run.open(tmp_path / "crashed").hold()


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("config.toml", "[train]\nstpes = 3", "unknown key 'train.stpes'"),
        ("config.toml", "\x00", "not valid TOML"),
        ("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n', "line 2 of "),
        ("metrics.jsonl", "[]\n", "line 1 of "),
        ("metrics.jsonl", '{"step": 1, "loss": "low", "val_loss": "x"}\n', "line 1 of "),
        ("metrics.jsonl", b"\xff\n", "metrics.jsonl"),
    ],
)
def test_damage_is_a_state_with_a_reason(name, content, why, tmp_path):
    make(tmp_path / "run")
    path = tmp_path / "run" / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    report = look(tmp_path / "run")
    assert report.state == "damaged"
    assert why in report.why
    assert "\n" not in report.why


def test_a_damaged_checkpoint_leaves_the_numbers(tmp_path):
    run = make(tmp_path / "run", max_tokens=5)
    checkpoint(run, 2)
    (run.step_folder(2) / "trainer.json").write_text('{"limits": 3}')
    report = look(tmp_path / "run")
    assert (report.state, report.step, report.best_val_loss) == ("damaged", 4, 4.0)
    assert "trainer.json is damaged" in report.why


def test_a_line_that_is_being_written_is_not_read(tmp_path):
    make(tmp_path / "run")
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert look(tmp_path / "run").step == 4


def test_runs_are_found_at_every_level_and_other_folders_passed_over(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "three/seed-1")
    make(tmp_path / "deep/deeper/c")
    make(tmp_path / ".hidden/d")
    (tmp_path / "project").mkdir()
    (tmp_path / "project/config.toml").write_text("[tool]\n")  # somebody's
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    found = [str(folder.relative_to(tmp_path)) for folder in find_runs(tmp_path)]
    assert found == ["a", "deep/deeper/c", "three/seed-1"]
    assert find_runs(tmp_path / "a") == [tmp_path / "a"]
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        find_runs(tmp_path / "none")


def test_differences_of_several(tmp_path):
    for i, lr in enumerate((0.5, 0.5, 0.25)):
        make(tmp_path / str(i), lr=lr)
    reports = [look(tmp_path / str(i)) for i in range(3)]
    assert differing(reports) == {"train.lr": [0.5, 0.5, 0.25]}
    assert differing(reports[:2]) == {}
    damaged = dataclasses.replace(reports[0], config=None)
    assert differing([reports[0], damaged])["train.lr"] == [0.5, None]


def test_ago():
    ages = (-5, 0, 99, 100, 3600, 100 * 60, 71 * 3600, 72 * 3600, 86400 * 400)
    assert [ago(0.0, now) for now in ages] == [
        *("0 s", "0 s", "99 s", "2 min", "60 min", "2 h", "71 h", "3 d", "400 d")
    ]
