"""What a training run shows: a live bar on a terminal, plain lines everywhere else.

    open_log()               the bar, or a line per validation and every few seconds
    open_log(quiet=True)     nothing
    open_log(json=True)      a JSON object a line, for programs: every record, every sentence

All answer to `Log`. Plain lines hold no control character, so that a log file reads well.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping
from json import dumps
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from tinygrad_llm.train.memory import readable
from tinygrad_llm.train.run import Record, accuracies, speed

if TYPE_CHECKING:
    from rich.console import Console


class Log(Protocol):
    """Where the trainer tells how it goes."""

    def start(self, step: int, steps: int) -> None:
        """Training begins (or goes on) at `step` of `steps`."""
        ...

    def record(self, record: Record) -> None:
        """A step is done: `record` is its line in metrics.jsonl."""
        ...

    def say(self, text: str) -> None:
        """A sentence for people, on a line of its own."""
        ...

    def stop(self) -> None:
        """Training ends, whatever the reason."""
        ...


def open_log(out: TextIO | None = None, *, quiet: bool = False, json: bool = False) -> Log:
    """The log that suits `out` (standard output unless told otherwise), or the one asked for.

    quiet beats json: a program that wants only the result of a run gets no records of it.
    """
    stream = sys.stdout if out is None else out
    if quiet:
        return QuietLog()
    if json:
        return JsonLog(stream)
    live = stream.isatty() and os.environ.get("TERM") != "dumb"
    return LiveLog(stream) if live else PlainLog(stream)


class QuietLog:
    """Nothing: what went wrong is an exception, and the result is not told by the log."""

    def start(self, step: int, steps: int) -> None:
        pass

    def record(self, record: Record) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def stop(self) -> None:
        pass


class JsonLog(QuietLog):
    """Each record as in metrics.jsonl, each sentence as {"message": …}: an object a line."""

    def __init__(self, out: TextIO) -> None:
        self.out = out

    def record(self, record: Record) -> None:
        print(as_json(record), file=self.out, flush=True)

    def say(self, text: str) -> None:
        print(as_json({"message": text}), file=self.out, flush=True)


# A model trained on bytes may write any of them, also those that move a terminal's cursor, and a
# file may have them in its name.
_CONTROL = {c: "\ufffd" for c in (*range(0x20), *range(0x7F, 0xA0)) if chr(c) not in "\n\t"}
_CONTROL[ord("\r")] = ""


def printable(text: str) -> str:
    """The text with its control characters, other than newline and tab, as U+FFFD."""
    return text.translate(_CONTROL)


def as_json(value: Any) -> str:
    """`value` on one line of JSON in ASCII; null for a number that JSON has not: NaN, infinity."""
    return dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


class PlainLog:
    """A line per validation and every few seconds."""

    def __init__(self, out: TextIO, seconds: float = 10.0) -> None:
        self.out, self.seconds = out, seconds
        self._progress = _Progress()
        self._last_line = 0.0

    def start(self, step: int, steps: int) -> None:
        self._progress.start(step, steps)
        self._last_line = time.monotonic()

    def record(self, record: Record) -> None:
        self._progress.record(record)
        now = time.monotonic()
        if "val_loss" in record or now - self._last_line >= self.seconds:
            self._last_line = now
            self.say(self._progress.line(record))

    def say(self, text: str) -> None:
        print(printable(text), file=self.out, flush=True)

    def stop(self) -> None:
        pass


class LiveLog:
    """One bar that moves, with loss, speed and time left; a line above it per validation."""

    def __init__(self, out: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = _Progress()
        self._bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=Console(file=out, highlight=False),
            expand=True,
        )
        self._task: Any = None

    def start(self, step: int, steps: int) -> None:
        self._progress.start(step, steps)
        self._task = self._bar.add_task("", total=steps, completed=step, numbers="")
        self._bar.start()

    def record(self, record: Record) -> None:
        self._progress.record(record)
        if "val_loss" in record:
            self.say(self._progress.line(record))
        numbers = self._progress.numbers()
        self._bar.update(self._task, completed=record["step"], numbers=numbers)

    def say(self, text: str) -> None:
        self.console.print(printable(text), markup=False, soft_wrap=True)

    @property
    def console(self) -> Console:
        """Where other bars, before this one, may be drawn."""
        return self._bar.console

    def stop(self) -> None:
        self._bar.stop()


class _Progress:
    """The numbers of the run so far, as words."""

    def start(self, step: int, steps: int) -> None:
        self.step, self.steps, self.first = step, steps, step
        self.loss: float | None = None  # smoothed: one batch says little
        self.val_loss: float | None = None
        self.val_loss_ema: float | None = None
        self.speed, self.unit = 0.0, ""
        self.mfu: float | None = None
        self.memory = 0  # bytes at the peak so far, on a GPU
        self.began = time.monotonic()

    def record(self, record: Record) -> None:
        self.step = record["step"]
        self.val_loss = record.get("val_loss", self.val_loss)
        self.val_loss_ema = record.get("val_loss_ema", self.val_loss_ema)
        if "loss" in record:
            self.loss = _blend(self.loss, record["loss"])
            if found := speed(record):
                self.speed, self.unit = _blend(self.speed or None, found[0]), found[1]
            if "mfu" in record:
                self.mfu = _blend(self.mfu, record["mfu"])
            self.memory = record.get("memory", 0)

    def numbers(self, with_validation: bool = True) -> str:
        """loss 2.345 · val loss 2.456 · 12,345 tokens/s · MFU 34% · 3.1 GB"""
        parts = []
        if self.loss is not None:
            parts.append(f"loss {self.loss:.3f}")
        if self.val_loss is not None and with_validation:
            parts.append(f"val loss {self.val_loss:.3f}")
        if self.val_loss_ema is not None and with_validation:
            parts.append(f"averaged {self.val_loss_ema:.3f}")
        if self.speed:
            parts.append(f"{self.speed:,.0f} {self.unit}/s")
        if self.mfu is not None:
            parts.append(f"MFU {self.mfu:.0%}")
        if self.memory:
            parts.append(readable(self.memory))
        return " · ".join(parts)

    def line(self, record: Record) -> str:
        """step  500/1000 · loss 2.345 · val loss 2.456 · 12,345 tokens/s · 1:05 left"""
        numbers = self.numbers(with_validation="val_loss" in record)
        for key, (name, _) in accuracies([record]).items():
            numbers += f" · {name} {record[key]:.1%}"
        line = f"step {self.step:>{len(str(self.steps))}}/{self.steps} · {numbers}"
        done, to_do = self.step - self.first, self.steps - self.step
        if not done or not to_do:
            return line
        return f"{line} · {_clock((time.monotonic() - self.began) / done * to_do)} left"


def _blend(old: float | None, new: float) -> float:
    return new if old is None else 0.9 * old + 0.1 * new


def _clock(seconds: float) -> str:
    """65 -> '1:05', 3700 -> '1:01:40'"""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
