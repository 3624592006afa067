"""Token ids → batches (x, y) for a causal language model: y[b, t] is what follows x[b, t].

Shapes: N ids in a split, B windows in a batch, T tokens of context in a window.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tinygrad_llm.backend import RandomStream

IGNORE_INDEX = -100  # the target that `ops.cross_entropy` leaves out of its mean

Batch = tuple[np.ndarray, np.ndarray]


def compact(ids: Any, vocab_size: int) -> np.ndarray:
    """The ids as uint16 where the vocabulary fits (up to 65,536), else as uint32.

    A quarter or half of int64's memory. Raises ValueError for an id outside 0 … vocab_size − 1.
    """
    array = _one_dimensional(ids)
    if array.size and (array.min() < 0 or array.max() >= vocab_size):
        raise ValueError(
            f"token ids must be from 0 to {vocab_size - 1} (vocab_size {vocab_size}), got "
            f"{array.min()} to {array.max()}"
        )
    return array.astype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def split(ids: Any, val_fraction: float, context: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids[: N − n], ids[N − n :]) with n = ⌊val_fraction · N⌋: the tail is held out.

    Views, not copies. The training part must hold one window (context + 1 ids) and the validation
    part, unless `val_fraction` is 0, one prediction (2 ids); else ValueError.
    """
    array = _one_dimensional(ids)
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be at least 0 and below 1, got {val_fraction}")
    held_out = int(val_fraction * len(array))
    train, val = array[: len(array) - held_out], array[len(array) - held_out :]
    _check_window(train, context, "the training part of the text")
    if val_fraction > 0 and held_out < 2:
        raise ValueError(
            f"val_fraction {val_fraction} of {len(array)} tokens leaves {held_out} for validation, "
            "which needs 2: give a longer text, or a larger fraction, or 0 for no validation"
        )
    return train, val


class RandomBatches:
    """x[b] = ids[s_b : s_b + T], y[b] = ids[s_b + 1 : s_b + T + 1], s_b uniform over 0 … N − T − 1.

    An endless iterator of (x, y), int64 of shape (B, T). Windows are drawn with replacement and may
    overlap, so the position in the data is the state of the random stream and nothing else.
    """

    def __init__(self, ids: Any, batch_size: int, context: int, stream: RandomStream) -> None:
        self.ids = _one_dimensional(ids)
        _check_positive(batch_size=batch_size)
        _check_window(self.ids, context, "the text")
        self.batch_size, self.context, self.stream = batch_size, context, stream
        self._offsets = np.arange(context + 1)

    def __iter__(self) -> RandomBatches:
        return self

    def __next__(self) -> Batch:
        starts = self.stream.integers(0, len(self.ids) - self.context, self.batch_size)
        windows = self.ids[starts[:, None] + self._offsets]  # (B, T + 1)
        x, y = windows[:, :-1], windows[:, 1:]
        return np.ascontiguousarray(x, np.int64), np.ascontiguousarray(y, np.int64)

    def state(self) -> dict[str, int]:
        """Where the next batch comes from: the stream's state."""
        return self.stream.state()

    def load_state(self, state: dict[str, int]) -> None:
        """Go on from `state()`: the next batches are those that would have come then."""
        self.stream.load_state(state)


class SequentialBatches:
    """Windows side by side: x = ids[iT : iT + T], y = ids[iT + 1 : iT + T + 1], i = 0, 1, 2 …

    Every id but the first is a target exactly once, `predictions` = N − 1 in all. The last batch
    holds the windows that are left; the last window is filled up with x = 0 and y = `IGNORE_INDEX`.
    The mean over the split is exact when each batch counts by its targets:

        Σ loss(x, y) · n / Σ n        with n = (y != IGNORE_INDEX).sum()

    Iterating again starts anew; (x, y) are int64 of shape (B, T), fewer rows in the last batch.
    """

    def __init__(self, ids: Any, batch_size: int, context: int) -> None:
        self.ids = _one_dimensional(ids)
        _check_positive(batch_size=batch_size, context=context)
        if len(self.ids) < 2:
            raise ValueError(f"expected at least 2 tokens to predict one, got {len(self.ids)}")
        self.batch_size, self.context = batch_size, context

    @property
    def predictions(self) -> int:
        """How many targets there are in all: N − 1."""
        return len(self.ids) - 1

    def __len__(self) -> int:
        """⌈(N − 1) / (B · T)⌉ batches."""
        return -(-self.predictions // (self.batch_size * self.context))

    def __iter__(self) -> Iterator[Batch]:
        step = self.batch_size * self.context
        for start in range(0, self.predictions, step):
            stop = min(start + step, self.predictions)
            x = self._windows(self.ids[start:stop], fill=0)
            y = self._windows(self.ids[start + 1 : stop + 1], fill=IGNORE_INDEX)
            yield x, y

    def _windows(self, ids: np.ndarray, fill: int) -> np.ndarray:
        rows = -(-len(ids) // self.context)
        filled = np.full(rows * self.context, fill, np.int64)
        filled[: len(ids)] = ids
        return filled.reshape(rows, self.context)


def _one_dimensional(ids: Any) -> np.ndarray:
    array = np.asanyarray(ids)  # a memory map stays one
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(
            f"expected token ids in one dimension, integers, got {array.dtype} of shape "
            f"{array.shape}"
        )
    return array


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _check_window(ids: np.ndarray, context: int, what: str) -> None:
    _check_positive(context=context)
    if len(ids) < context + 1:
        raise ValueError(
            f"{what} has {len(ids)} tokens, but a context of {context} needs {context + 1}: give a "
            "longer text or a shorter context"
        )
