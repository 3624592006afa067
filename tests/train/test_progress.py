"""What the data part shows while it works."""

import io

import pytest
from rich.console import Console

from tinygrad_llm.train import progress
from tinygrad_llm.train.log import JsonLog, LiveLog, PlainLog, QuietLog
from tinygrad_llm.train.progress import LogReport


def work(log) -> None:
    with LogReport(log) as report:
        report.say("before")
        for done in range(0, 101, 10):
            report.progress("tokenising big.txt", done, 100)
        report.progress("checking", 100, 100)
        report.say("after")


def test_plain_lines_come_now_and_then(monkeypatch: pytest.MonkeyPatch):
    out, now = io.StringIO(), [0.0]
    monkeypatch.setattr(
        progress.time, "monotonic", lambda: now.__setitem__(0, now[0] + 4) or now[0]
    )
    work(PlainLog(out))
    lines = out.getvalue().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert 2 <= len(lines) - 2 <= 5
    assert all(line.startswith("tokenising big.txt: ") for line in lines[1:-1])
    assert not set(out.getvalue()) & {"\r", "\x1b", "\x08"}


def test_what_is_soon_done_has_no_line():
    out = io.StringIO()
    work(PlainLog(out))
    assert out.getvalue() == "before\nafter\n"


def test_programs_hear_sentences_and_quiet_ones_nothing(capsys):
    out = io.StringIO()
    work(JsonLog(out))
    assert out.getvalue() == '{"message": "before"}\n{"message": "after"}\n'
    work(QuietLog())
    assert capsys.readouterr().out == ""


def test_a_terminal_has_a_bar_that_goes_when_it_is_done(monkeypatch: pytest.MonkeyPatch):
    out = io.StringIO()
    log = LiveLog(out)
    log._bar.live.console = Console(file=out, force_terminal=True, width=80)
    with LogReport(log) as report:
        report.progress("tokenising big[red].txt", 40, 100)
        assert report._bar is not None
        report.say("meanwhile")
        assert report._bar.live.is_started
        bar = report._bar
        report.progress("tokenising big[red].txt", 100, 100)
        assert report._bar is None
        assert not bar.live.is_started
    assert "tokenising big[red].txt" in out.getvalue()
    assert "meanwhile" in out.getvalue()


def test_the_bar_goes_after_an_error_too():
    with LogReport(LiveLog(io.StringIO())) as report:
        report.progress("reading", 1, 100)
        bar = report._bar
        report.__exit__(RuntimeError, RuntimeError(), None)
        assert bar is not None
        assert not bar.live.is_started
