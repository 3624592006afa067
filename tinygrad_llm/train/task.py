"""What the training loop asks of whatever it trains: a `Task` and a `Model`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tinygrad_llm.tensor import Tensor


class Task(Protocol):
    """What is learnt: where batches come from and how wrong a model is on one.

    Where targets are not tokens, an attribute `unit` says what they are, in the plural: texts,
    words. Speeds are told in it, and the records call them `texts_per_second`.
    """

    def next_batch(self) -> Any: ...

    def loss(self, model: Any, batch: Any) -> Tensor:
        """The mean loss over the targets of the batch: a scalar."""
        ...

    def validation(self) -> Iterable[Any]:
        """The same batches every time."""
        ...

    def size(self, batch: Any) -> int:
        """How many targets the batch has: its weight among others. A step needs at least one."""
        ...

    def save(self, folder: Path) -> None:
        """Write what belongs beside the weights, such as the tokenizer."""
        ...

    def state(self) -> dict[str, Any]:
        """The position in the data, as JSON."""
        ...

    def load_state(self, state: dict[str, Any]) -> None: ...


def unit_of(task: Any) -> str:
    """What `size` counts: the task's `unit`, else tokens."""
    return getattr(task, "unit", "tokens")


@runtime_checkable
class Summed(Protocol):
    """What a task has besides, where its loss is a sum of means over different things.

    Such as hidden words and pairs of texts. In the parts of a step each mean weighs by what it is a
    mean of, so that the parts make the loss of the one large batch. What it validates by is its own
    matter: such a task is `Measured`, too.
    """

    def losses(self, model: Any, batch: Any) -> Sequence[Tensor]:
        """The means, scalars whose sum is `loss`; 0 for a mean of nothing."""
        ...

    def sizes(self, batch: Any) -> Sequence[int]:
        """How many things each is a mean of."""
        ...


@runtime_checkable
class Measured(Protocol):
    """What a task has besides, where its mean loss does not tell how good a model is.

    `score` names the number by which a checkpoint is the best: one that ends in 'loss' is the
    better the lower, another the higher.
    """

    score: str

    def evaluate(self, model: Any) -> dict[str, float]:
        """What is recorded of a validation: 'val_loss', `score`, whatever else by its name."""
        ...

    def remark(self, found: dict[str, float]) -> str | None:
        """A sentence for people on these numbers, where there is one."""
        ...


class Model(Protocol):
    """What is trained: every class in `models/` has this."""

    def parameters(self) -> Iterable[Tensor]: ...

    def train(self) -> Any: ...

    def eval(self) -> Any: ...

    def save_pretrained(self, folder: Path) -> Any: ...

    @classmethod
    def from_pretrained(cls, folder: Path) -> Any: ...
