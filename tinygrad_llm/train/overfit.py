"""Overfit one batch: the first test of a model and a loop.

A model that cannot learn one batch by heart has a fault, and no data will mend it: a wrong sign, a
mask that lets nothing through, labels that are off by one. One without goes to nearly 0 loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygrad_llm.tensor import Tensor

if TYPE_CHECKING:
    from tinygrad_llm.train.trainer import Task


class OneBatch:
    """`task` with its first batch for training and for validation, over and over."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.batch = task.next_batch()

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
