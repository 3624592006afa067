"""Ctrl-C and SIGTERM during training: asked to stop, the loop stops after its step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Interrupted(Exception):
    """A signal ended the run; what it had reached is saved."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}; saved")
        self.number, self.step = number, step


@contextmanager
def noticing_signals(notice: Callable[[int], None]) -> Iterator[None]:
    """Within: `notice(number)` at Ctrl-C or SIGTERM; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets only the main thread handle signals
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def handle(number: int, _: object) -> None:
        notice(number)
        for n in numbers:
            signal.signal(n, before[n])

    for number in numbers:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, before[number])
