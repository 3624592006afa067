"""The run folder."""

import os
from datetime import datetime
from pathlib import Path

import pytest

from tinygrad_llm.storage import Damaged, check_sums
from tinygrad_llm.train.run import Run, _unused, find_checkpoint


@pytest.fixture
def run(tmp_path):
    run = Run.new(tmp_path / "run")
    run.begin("# a configuration\n")
    return run


def write_model(folder):
    (folder / "config.json").write_text("{}")


def test_a_new_run_makes_its_folder_only_when_it_begins(tmp_path):
    run = Run.new(tmp_path / "a" / "b")
    assert not run.folder.exists()
    run.begin("x = 1\n")
    assert run.config_file.read_text() == "x = 1\n"
    assert Run.open(run.folder).folder == run.folder


def test_runs_without_a_name_are_named_by_the_time(tmp_path):
    now = datetime(2025, 1, 31, 14, 25, 30)
    first = _unused(tmp_path, now)
    assert first.name == "20250131-142530"
    first.mkdir()
    assert _unused(tmp_path, now).name == "20250131-142530-2"


def test_nothing_is_written_over(run, tmp_path):
    with pytest.raises(FileExistsError, match="holds a run already: go on with --resume"):
        Run.new(run.folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("…")
    with pytest.raises(FileExistsError, match="holds no run"):
        Run.new(tmp_path / "other")
    (tmp_path / "file").write_text("…")
    with pytest.raises(FileExistsError, match="holds no run"):
        Run.new(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    Run.new(tmp_path / "empty")
    (tmp_path / "empty" / "lock").touch()  # what a kill in the middle of `begin` leaves
    (tmp_path / "empty" / ".unfinished-config.toml").touch()
    Run.new(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        Run.open(tmp_path / "empty")


def test_metrics_are_there_at_once_and_can_be_taken_back(run):
    assert run.metrics() == []
    for step in range(4):
        run.append({"step": step, "loss": 1 / (step + 3)})
    assert [r["loss"] for r in run.metrics()] == [1 / 3, 1 / 4, 1 / 5, 1 / 6]  # to the last bit
    run.forget_after(1)
    run.append({"step": 2})
    run.close()
    assert [r["step"] for r in run.metrics()] == [0, 1, 2]


def test_a_line_cut_short_by_a_kill_is_no_record(run):
    run.append({"step": 1})
    run.close()
    with run.metrics_file.open("a") as file:
        file.write('{"step": 2, "lo')
    assert run.metrics() == [{"step": 1}]
    run.forget_after(5)
    run.append({"step": 2})
    run.close()
    assert [r["step"] for r in run.metrics()] == [1, 2]


@pytest.mark.parametrize(
    "line",
    [
        *(b"nonsense", b"", b"\0\0\0", b"\xff\xfe", b"[" * 10**5, b"5", b"null", b"[]", b'"step"'),
        *(
            b"{}",
            b'{"loss": 1}',
            b'{"step": "2"}',
            b'{"step": 2.5}',
            b'{"step": true}',
            b"9" * 5000,
        ),
    ],
    ids=lambda line: repr(line[:12]),
)
def test_damaged_metrics_are_refused_in_one_sentence(run, line):
    damaged = b'{"step": 1}\n' + line + b'\n{"step": 3}\n'
    run.metrics_file.write_bytes(damaged)
    for use in (run.metrics, lambda: run.forget_after(3)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged: line 2 is no") as caught:
            use()
        assert "\n" not in str(caught.value)
    assert run.metrics_file.read_bytes() == damaged


def test_what_a_power_cut_leaves_behind_the_checkpoint_is_no_trouble(run):
    run.metrics_file.write_bytes(b'{"step": 1}\n{"step": 2}\n\0\xff\0\n{"step": 3}\n')
    run.forget_after(2)
    assert [r["step"] for r in run.metrics()] == [1, 2]
    run.metrics_file.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged"):
        run.forget_after(2)


def test_checkpoints_latest_and_best(run):
    assert run.checkpoint() is None
    assert run.checkpoint("best") is None
    one = run.save_checkpoint(100, write_model)
    run.mark_best(one)
    two = run.save_checkpoint(1_000_000, write_model)
    assert [p.name for p in (one, two)] == ["step-000100", "step-1000000"]
    assert run.checkpoint() == two
    assert run.checkpoint("best") == one.resolve()
    assert (run.checkpoints_folder / "latest").resolve() == two.resolve()


def test_a_checkpoint_has_the_checksums_of_its_files(run):
    def write(folder):
        write_model(folder)
        (folder / "ema").mkdir()
        write_model(folder / "ema")

    folder = run.save_checkpoint(1, write)
    for inside in (folder, folder / "ema"):
        check_sums(inside)
        assert sorted(os.listdir(inside))[0] == "SHA256SUMS"
        (inside / "config.json").write_text("{ }")
        with pytest.raises(Damaged, match=r"config\.json is not as it was saved"):
            check_sums(inside)


def test_metrics_are_on_the_disk_before_the_checkpoint(run, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    run.append({"step": 1})
    run.save_checkpoint(1, write_model)
    run.close()
    assert run.metrics_file.stat().st_ino in events[: events.index("rename")]


def test_a_save_that_fails_leaves_the_last_one(run, monkeypatch):
    one = run.save_checkpoint(1, write_model)

    def fails(folder):
        write_model(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run.save_checkpoint(2, fails)
    assert run.checkpoint() == one
    assert sorted(os.listdir(run.checkpoints_folder)) == ["latest", "step-000001"]


def test_a_kill_between_the_rename_and_the_link_loses_nothing(run, monkeypatch):
    run.save_checkpoint(1, write_model)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tinygrad_llm.train.files.point", killed)
    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint(2, write_model)
    assert run.checkpoint() == run.step_folder(2)


def test_find_checkpoint_knows_runs_checkpoints_and_links(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        find_checkpoint(run.folder)
    one = run.save_checkpoint(1, write_model)
    two = run.save_checkpoint(2, write_model)
    assert find_checkpoint(run.folder) == two
    run.mark_best(one)
    assert find_checkpoint(run.folder) == one.resolve()
    assert find_checkpoint(two) == two
    latest = run.checkpoints_folder / "latest"
    assert find_checkpoint(latest).resolve() == two.resolve()
    latest.unlink()
    latest.write_text("step-000001\n")  # a file system without symbolic links
    assert find_checkpoint(latest) == one.resolve()
    with pytest.raises(FileNotFoundError, match="there is no run or checkpoint"):
        find_checkpoint(tmp_path / "nowhere")
    for content in (b"", b"\xff\0", b"a book " * 10**4, b"../../run", b"step-000009"):
        latest.write_bytes(content)
        with pytest.raises(FileNotFoundError, match="latest holds no checkpoint"):
            find_checkpoint(latest)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        find_checkpoint(Path(tmp_path))
