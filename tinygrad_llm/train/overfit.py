"""Overfit one batch: the first test of a model and a loop.

A model that cannot learn one batch by heart has a fault, and no data will mend it: a wrong sign, a
mask that lets nothing through, labels that are off by one. One without goes to nearly 0 loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinygrad_llm.tensor import Tensor
from tinygrad_llm.train.task import Summed, Task, unit_of


def one_batch(task: Task) -> OneBatch:
    """The task with its first batch only."""
    return (OneSum if isinstance(task, Summed) else OneBatch)(task)


class OneBatch:
    """`task` with its first batch for training and for validation, over and over."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.batch, self.unit = task.next_batch(), unit_of(task)

    def next_batch(self) -> Any:
        """The one batch."""
        return self.batch

    def validation(self) -> list[Any]:
        """The one batch, once."""
        return [self.batch]

    def loss(self, model: Any, batch: Any) -> Tensor:
        """The task's."""
        return self.task.loss(model, batch)

    def size(self, batch: Any) -> int:
        """The task's."""
        return self.task.size(batch)

    def save(self, folder: Path) -> None:
        """The task's."""
        self.task.save(folder)

    def state(self) -> dict[str, Any]:
        """The task's, after the one batch."""
        return self.task.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Check that it is the same data, whose first batch is then the same."""
        self.task.load_state(state)


class OneSum(OneBatch):
    """A `OneBatch` of a task whose loss is a sum of means."""

    def __init__(self, task: Any) -> None:
        super().__init__(task)
        self._of: Summed = task

    def losses(self, model: Any, batch: Any) -> Sequence[Tensor]:
        """The task's."""
        return self._of.losses(model, batch)

    def sizes(self, batch: Any) -> Sequence[int]:
        """The task's."""
        return self._of.sizes(batch)
