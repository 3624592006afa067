"""`tinygrad-llm runs`: the table, plain and on a terminal; several runs side by side."""

import importlib.util
import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from tinygrad_llm.cli import main
from tinygrad_llm.cli.output import show_table

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs, `runs/a` and `runs/b`, the second better."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "book.txt").write_text("One and one make two, and two and two make four.\n" * 80)
    for name, lr in (("a", "1e-4"), ("b", "1e-2")):
        size = ["--preset", "tiny", "--steps", "6", "--eval-every", "3", "--max-new-tokens", "0"]
        where = ["--data", str(folder / "book.txt"), "--run", str(folder / "runs" / name)]
        assert main(["pretrain", "gpt", *size, *where, "--lr", lr, "--min-lr", "0"]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch, capsys):
    """Runs the command in a folder with copies of both, and a damaged one."""
    shutil.copytree(trained / "runs", tmp_path / "runs", symlinks=True)
    monkeypatch.chdir(tmp_path)
    rows = [f"{word} {i} times,{word}" for i in range(20) for word in ("good", "bad")]
    Path("texts.csv").write_text("text,label\n" + "\n".join(rows) + "\n")

    def run(*arguments, code=0):
        capsys.readouterr()
        assert main(["runs", *arguments]) == code
        out, err = capsys.readouterr()
        assert not CONTROL.search(out + err)
        return out, err

    return run


def damage():
    shutil.copytree("runs/a", "runs/broken [red]", symlinks=True)
    Path("runs/broken [red]/config.toml").write_text("[train]\nstpes = 3\n")


_ROW = r" finished +6/6 +val loss \d\.\d{4} +\d +\d\.\d{4} +[\d,]+ tokens/s +\d+ s ago$"


def test_the_table(run):
    out, err = run()
    head, *rows = out.splitlines()
    assert re.split(r" {2,}", head) == [
        *("run", "state", "step", "best", "at step", "loss", "speed", "changed")
    ]
    assert {row.split()[0] for row in rows} == {"a", "b"}
    assert all(re.search(_ROW, row)
               for row in rows)  # fmt: skip
    assert len({len(row) for row in rows}) == 1
    assert err == ""


@pytest.mark.parametrize(("order", "names"), [("name", ["a", "b"]), ("best", ["b", "a"])])
def test_orders(order, names, run):
    out, _ = run("--sort", order)
    assert [row.split()[0] for row in out.splitlines()[1:]] == names


def test_what_changed_last_comes_first(run):
    import os

    os.utime("runs/a/metrics.jsonl", (2e9, 2e9))
    os.utime("runs/b/metrics.jsonl", (1e9, 1e9))
    out, _ = run()
    assert [row.split()[0] for row in out.splitlines()[1:]] == ["a", "b"]
    assert re.search(r" \d+ d ago$", out.splitlines()[2])


def test_json(run):
    damage()
    out, err = run("--json", "--sort", "name")
    assert err == ""
    found = json.loads(out)
    assert found["folder"] == "runs"
    a, b, broken = found["runs"]
    assert (a["run"], a["state"], a["step"], a["steps"]) == ("runs/a", "finished", 6, 6)
    assert b["best_val_loss"] < a["best_val_loss"]
    assert broken["state"] == "damaged"
    assert "stpes" in broken["why"]


def test_a_damaged_run_is_shown_and_said_why(run):
    damage()
    out, err = run()
    assert re.search(r"^broken \[red\] +damaged$", out, re.MULTILINE)
    assert err.startswith("runs/broken [red] is damaged: ")
    assert err.count("\n") == 1


def test_one_run_an_empty_folder_and_none(run):
    out, _ = run("runs/a")
    assert out.splitlines()[1].startswith("runs/a  finished")
    Path("empty").mkdir()
    assert "no runs in empty" in run("empty")[0]
    assert run("empty", "--quiet")[0] == ""
    assert json.loads(run("empty", "--json")[0])["runs"] == []
    assert run("nothing", code=2)[1] == "tinygrad-llm: there is no folder nothing\n"


# --- compare --------------------------------------------------------------------------------------


def test_side_by_side(run):
    out, err = run("compare", "runs/a", "runs/b")
    assert err == ""
    head, *rows, blank, last = out.splitlines()
    assert head.split() == ["runs/a", "runs/b"]
    cells = {re.split(r" {2,}", row)[0]: re.split(r" {2,}", row)[1:] for row in rows}
    assert cells["train.lr"] == ["0.0001", "0.01"]
    assert cells["step"] == ["6/6", "6/6"]
    assert float(cells["best val loss"][0]) > float(cells["best val loss"][1])
    assert "train.steps" not in cells
    assert (blank, last) == ("", "picture: compare.png")
    assert Path("compare.png").read_bytes().startswith(b"\x89PNG")


def test_fine_tuned_runs_side_by_side_show_their_own_settings_and_score(run):
    for name, lr, epochs in (("c", "0.01", "1"), ("d", "0.001", "2")):
        flags = ["--preset", "tiny", "--lr", lr, "--epochs", epochs, "--run", f"runs/{name}"]
        assert main(["finetune", "classify", "--data", "texts.csv", *flags, "--quiet"]) == 0
    out, err = run("compare", "runs/c", "runs/d")
    assert err == ""
    cells = {re.split(r" {2,}", row)[0]: re.split(r" {2,}", row)[1:] for row in out.splitlines()}
    assert cells["train.lr"] == ["0.01", "0.001"]
    assert cells["train.epochs"] == ["1", "2"]
    assert all(re.fullmatch(r"val accuracy \d\.\d{4}", best) for best in cells["best"])
    assert "task" not in cells
    out, _ = run("compare", "runs/a", "runs/c")
    assert re.search(r"^task +classify$", out, re.MULTILINE)
    out, _ = run("--sort", "best")
    assert [row.split()[0] for row in out.splitlines()[1:3]] == ["b", "a"]
    assert re.search(r"^c .* val accuracy \d\.\d{4} .* [\d,]+ texts/s ", out, re.MULTILINE)


def test_side_by_side_as_json(run):
    out, err = run("compare", "runs/a", "runs/b", "--json", "--out", "both.png")
    found = json.loads(out)
    assert err == ""
    assert found["differences"] == {"train.lr": [0.0001, 0.01]}
    assert [r["run"] for r in found["runs"]] == ["runs/a", "runs/b"]
    assert found["picture"] == "both.png"
    assert Path("both.png").is_file()


def test_without_matplotlib_the_table_is_there_and_a_sentence(run, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    out, err = run("compare", "runs/a", "runs/b")
    assert "train.lr" in out
    assert "picture" not in out
    assert err.startswith("compare.png was not drawn because matplotlib is not installed: pip ")
    out, err = run("compare", "runs/a", "runs/b", "--json")
    assert json.loads(out)["picture"] is None
    assert not Path("compare.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "two run folders or more, got 0"),
        (["runs/a"], "two run folders or more, got 1"),
        (["runs/a", "runs/a"], "expected each run once"),
        (["runs/a", "none"], "none is not a run folder"),
        (["runs/a", "runs/b", "--out", "x.gif"], "--out is a picture and ends in .png"),
        (["runs/a", "runs/b", "--out", "no/x.png"], "No such file or directory"),
        (["runs/a", "runs/broken [red]"], "is damaged: "),
    ],
)
def test_refusals_are_one_sentence(arguments, words, run):
    damage()
    out, err = run("compare", *arguments, code=2)
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


def test_a_terminal_gets_rich_and_names_are_no_markup(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    show_table(["run", "loss"], [["[red]\x1b[2J", "1.5"], ["b\nc", "10.25"]], right=(1,))
    text = out.getvalue()
    assert "\x1b[1m" in text
    assert "[red]\ufffd[2J" in text
    assert "b c" in text
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    show_table(["run", "loss"], [["a", "1.5"], ["狐", "10.25"]], right=(1,))
    assert out.getvalue() == "run   loss\na      1.5\n狐   10.25\n"
