"""Texts that the model writes while it is trained: samples.jsonl, and a line in the log.

    {"step": 500, "text": "The king shall …"}

They draw from a random stream of their own, so training is the same with them and without.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from tinygrad_llm.train import files


class Samples:
    """Writes a text every so many steps into `folder`/samples.jsonl.

    Args:
        folder: the run's.
        every: steps from one text to the next; 0: none.
        write: gives the text that the model writes as it is now.
    """

    def __init__(self, folder: Path, every: int, write: Callable[[], str]) -> None:
        self.path = folder / "samples.jsonl"
        self.every, self.write = every, write

    def due(self, step: int) -> bool:
        """Whether a text belongs after this step."""
        return self.every > 0 and step % self.every == 0

    def take(self, step: int) -> str:
        """Let the model write; the text is in the file, for good, before this returns."""
        text = self.write()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "text": text}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return text

    def forget_after(self, step: int) -> None:
        """Drop the texts later than `step`: a resumed run writes them again."""
        if self.path.exists():
            kept = [line for at, line in self._lines() if at <= step]
            files.write_text(self.path, "".join(kept))

    def _lines(self) -> Iterator[tuple[int, str]]:
        """(step, line), up to the first line that a kill or a power cut has spoilt."""
        with self.path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            for line in file:
                try:
                    step = int(json.loads(line)["step"])
                except (ValueError, KeyError, TypeError):
                    return
                if line.endswith("\n"):
                    yield step, line
