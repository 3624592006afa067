"""PyTorch's DataLoader over examples of one's own: batches in order or shuffled.

    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    for inputs, targets in loader: …                    an epoch; the next one in another order

For a training loop of one's own. The tasks of `tinygrad_llm.tasks` have batches that a run can be
resumed from; here nothing is kept but the random stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.backend import RandomStream
from tinygrad_llm.ops import stack
from tinygrad_llm.tensor import Tensor


class Dataset(Protocol):
    """Examples by number: a list is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class TensorDataset:
    """dataset[i] = (tensors[0][i], tensors[1][i], …), for Tensors or arrays of one length

    Raises ValueError where they are not of one length, or none is given.
    """

    def __init__(self, *tensors: Any) -> None:
        self.tensors = tuple([t if isinstance(t, Tensor) else Tensor(t) for t in tensors])
        lengths = [len(t) if t.ndim else 0 for t in self.tensors]
        if not lengths or len(set(lengths)) > 1:
            raise ValueError(f"TensorDataset needs tensors of one length, got {lengths}")

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
        return tuple([t[index] for t in self.tensors])


class DataLoader:
    """Iterating gives the batches of one epoch, `collate_fn` of `batch_size` examples each.

    Args:
        dataset: examples by number, such as a list or a `TensorDataset`.
        batch_size: how many examples in a batch; the last one has those that are left.
        shuffle: another order in every epoch, from `generator`.
        num_workers: only 0: examples are fetched in this process.
        collate_fn: a list of examples → a batch; None: `default_collate`.
        drop_last: leave out a last batch that is smaller.
        generator: the random stream of the order; None: the default one, see `manual_seed`.

    Arguments are PyTorch's, their other ones are not here.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int = 1,
        shuffle: bool = False,
        *,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        drop_last: bool = False,
        generator: RandomStream | None = None,
    ) -> None:
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
        if num_workers:
            raise ValueError(f"num_workers must be 0, there are no others here, got {num_workers}")
        self.dataset, self.batch_size, self.shuffle = dataset, batch_size, shuffle
        self.num_workers, self.drop_last, self.generator = 0, drop_last, generator
        self.collate_fn = collate_fn or default_collate

    def __len__(self) -> int:
        """Batches in an epoch."""
        n = len(self.dataset)
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        order = np.arange(len(self.dataset))
        if self.shuffle:
            stream = backend.random if self.generator is None else self.generator
            order = stream.permutation(len(order))
        for i in range(len(self)):
            numbers = order[i * self.batch_size : (i + 1) * self.batch_size].tolist()
            if isinstance(self.dataset, TensorDataset) and self.collate_fn is default_collate:
                yield list(self.dataset[np.array(numbers)])  # all at once, to the same result
            else:
                yield self.collate_fn([self.dataset[number] for number in numbers])


def default_collate(examples: Sequence[Any]) -> Any:
    """Examples → a batch of the same form, with Tensors that have one more axis at the front.

        [(x₀, 3), (x₁, 5)]     ->  [stack(x₀, x₁), Tensor([3, 5])]
        [{"x": 1}, {"x": 2}]   ->  {"x": Tensor([1, 2])}

    Texts stay a list. Raises ValueError for arrays of several shapes, which must be filled up
    first, and TypeError for what is none of these.
    """
    first = examples[0]
    if isinstance(first, Tensor | np.ndarray):
        shapes = sorted({tuple(example.shape) for example in examples})
        if len(shapes) > 1:
            raise ValueError(
                f"examples of one batch must be of one shape, got {shapes[0]} and {shapes[-1]}: "
                "fill them up, or give a collate_fn that does"
            )
        return stack([e if isinstance(e, Tensor) else Tensor(e) for e in examples])
    if isinstance(first, bool | int | float | np.number | np.bool_):
        return Tensor(np.array(examples, np.float32 if isinstance(first, float) else None))
    if isinstance(first, str | bytes):
        return list(examples)
    if isinstance(first, Mapping):
        return {key: default_collate([example[key] for example in examples]) for key in first}
    if isinstance(first, tuple | list):
        if len({len(example) for example in examples}) > 1:
            raise ValueError(
                "examples of one batch must have as many parts: give a collate_fn for lists of "
                "several lengths"
            )
        parts = [default_collate(list(part)) for part in zip(*examples, strict=True)]
        return first._make(parts) if hasattr(first, "_make") else parts  # pyright: ignore[reportAttributeAccessIssue]
    raise TypeError(
        f"examples are Tensors, arrays, numbers, texts, or lists and dicts of them, got a "
        f"{type(first).__name__}: give a collate_fn"
    )
