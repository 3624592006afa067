"""How what takes long tells how far it is, without knowing who listens."""

from __future__ import annotations

from typing import Protocol


class Report(Protocol):
    """Who listens: a terminal, a log file, nobody."""

    def say(self, text: str) -> None:
        """A sentence for people."""
        ...

    def progress(self, what: str, done: int, total: int) -> None:
        """`what`, such as 'tokenising book.txt', is done up to `done` of `total`."""
        ...


class Silent:
    """Nobody listens."""

    def say(self, text: str) -> None:
        pass

    def progress(self, what: str, done: int, total: int) -> None:
        pass


SILENT = Silent()
