"""Plain lines in a pipe, a live bar on a terminal."""

import io
import json
import math
import re

from tinygrad_llm.train.log import LiveLog, PlainLog, _clock, as_json, open_log


class Terminal(io.StringIO):
    def isatty(self):
        return True


def train(log):
    log.start(0, 4)
    log.record({"step": 0, "val_loss": 5.0})
    log.record({"step": 1, "loss": 4.0, "tokens_per_second": 1000.0})
    log.record({"step": 2, "loss": 4.0, "tokens_per_second": 1000.0, "val_loss": 4.5})
    log.record({"step": 3, "loss": 4.0, "tokens_per_second": 1000.0})
    log.record({"step": 4, "loss": 4.0, "tokens_per_second": 1000.0, "val_loss": 3.5})
    log.say("a [path] stays/as/it/is")
    log.stop()


def test_a_pipe_gets_plain_lines():
    out = io.StringIO()
    log = open_log(out)
    assert isinstance(log, PlainLog)
    train(log)
    lines = out.getvalue().splitlines()
    assert lines[0] == "step 0/4 · val loss 5.000"
    assert lines[1] == "step 2/4 · loss 4.000 · val loss 4.500 · 1,000 tokens/s · 0:00 left"
    assert lines[2] == "step 4/4 · loss 4.000 · val loss 3.500 · 1,000 tokens/s"
    assert lines[3:] == ["a [path] stays/as/it/is"]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out.getvalue())


def test_a_speed_is_told_in_what_the_task_counts():
    out = io.StringIO()
    log = PlainLog(out, seconds=0)
    log.start(0, 2)
    log.record({"step": 1, "loss": 2.0, "hidden_words_per_second": 1234.0})
    assert out.getvalue().startswith("step 1/2 · loss 2.000 · 1,234 hidden words/s")


def test_what_a_model_wrote_cannot_steer_the_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for out in (io.StringIO(), Terminal()):
        open_log(out).say("sample: \x1b[2J\r\x07 and\nmore")
        assert out.getvalue() == "sample: \ufffd[2J\ufffd and\nmore\n"


def test_between_validations_a_line_comes_every_few_seconds():
    out = io.StringIO()
    log = PlainLog(out, seconds=0)
    log.start(10, 30)
    log.record({"step": 11, "loss": 2.0, "tokens_per_second": 10.0})
    log.record({"step": 12, "loss": 1.0, "tokens_per_second": 10.0})
    log.stop()
    first, second = out.getvalue().splitlines()
    assert first.startswith("step 11/30 · loss 2.000 · 10 tokens/s")
    assert second.startswith("step 12/30 · loss 1.900")  # smoothed


def test_a_terminal_gets_a_bar_that_moves(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    out = Terminal()
    log = open_log(out)
    assert isinstance(log, LiveLog)
    train(log)
    text = out.getvalue()
    assert "\x1b[" in text
    assert "step 4/4" in text
    assert "loss 4.000 · val loss 3.500 · 1,000 tokens/s" in text
    assert "a [path] stays/as/it/is" in text


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_log(Terminal()), PlainLog)


def test_clock():
    assert [_clock(s) for s in (0, 65, 3599.7, 3700)] == ["0:00", "1:05", "1:00:00", "1:01:40"]


def test_the_average_of_the_weights_is_told_beside_the_validation():
    out = io.StringIO()
    log = PlainLog(out)
    log.start(0, 4)
    log.record({"step": 0, "val_loss": 5.0, "val_loss_ema": 4.5})
    assert out.getvalue() == "step 0/4 · val loss 5.000 · averaged 4.500\n"


def test_quiet_says_nothing_on_a_terminal_and_in_a_pipe():
    for out in (io.StringIO(), Terminal()):
        for as_objects in (False, True):
            train(open_log(out, quiet=True, json=as_objects))
        assert out.getvalue() == ""


def test_json_is_an_object_a_line_also_on_a_terminal():
    for out in (io.StringIO(), Terminal()):
        log = open_log(out, json=True)
        train(log)
        log.record({"step": 5, "loss": math.nan})
        lines = out.getvalue().splitlines()
        objects = [json.loads(line) for line in lines]
        assert [o["step"] for o in objects if "step" in o] == [0, 1, 2, 3, 4, 5]
        assert objects[1] == {"step": 1, "loss": 4.0, "tokens_per_second": 1000.0}
        assert objects[-2] == {"message": "a [path] stays/as/it/is"}
        assert objects[-1] == {"step": 5, "loss": None}
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\uffff]", out.getvalue())


def test_json_has_no_numbers_that_are_none():
    value = {"a": [1, math.inf, (math.nan, 2.5)], "b": {"c": -math.inf}, "d": "狐\x1b", "e": True}
    text = as_json(value)
    assert text.isascii()
    assert text.isprintable()
    assert json.loads(text) == {
        "a": [1, None, [None, 2.5]],
        "b": {"c": None},
        "d": "狐\x1b",
        "e": True,
    }
