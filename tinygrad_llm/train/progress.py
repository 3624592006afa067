"""What reading and tokenising a large text shows before the training begins."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from tinygrad_llm.train.log import LiveLog, Log, printable

if TYPE_CHECKING:
    from rich.progress import Progress

_SECONDS = 10.0  # from one plain line to the next; what is done sooner has none


class LogReport:
    """Tells a `Log` how far the data part is: a bar on a terminal, a line now and then elsewhere.

    A context manager: at its end the bar is gone, also after an error.
    """

    def __init__(self, log: Log) -> None:
        self.log = log
        self._what = ""
        self._last = time.monotonic()
        self._bar: Progress | None = None
        self._task: Any = None

    def say(self, text: str) -> None:
        """A sentence for people."""
        self.log.say(text)

    def progress(self, what: str, done: int, total: int) -> None:
        """`what` is done up to `done` of `total`."""
        if what != self._what:
            self.close()
            self._what, self._last = what, time.monotonic()
        if isinstance(self.log, LiveLog):
            self._draw(self.log, done, total)
        elif time.monotonic() - self._last >= _SECONDS:
            self._last = time.monotonic()
            self.log.say(f"{what}: {done / total:.0%}")
        if done >= total:
            self.close()

    def _draw(self, log: LiveLog, done: int, total: int) -> None:
        if self._bar is None:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:.0f}%"),
                TimeRemainingColumn(compact=True),
                console=log.console,
                expand=True,
                transient=True,
            )
            self._task = self._bar.add_task(printable(self._what), total=total)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total)

    def close(self) -> None:
        """Take the bar away; the next progress is another one."""
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._what = None, ""

    def __enter__(self) -> LogReport:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
