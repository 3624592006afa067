"""Token ids → batches (x, y) for a causal language model: y[b, t] is what follows x[b, t].

Shapes: N ids in a split, B windows in a batch, T tokens of context in a window.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tinygrad_llm.backend import RandomStream, philox

if TYPE_CHECKING:
    from tinygrad_llm.data.tokens import Tokens

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
        self._pages = _Pages(self.ids)

    def __iter__(self) -> RandomBatches:
        return self

    def __next__(self) -> Batch:
        starts = self.stream.integers(0, len(self.ids) - self.context, self.batch_size)
        windows = np.empty((self.batch_size, self.context + 1), np.int64)
        step = _AT_ONCE if self._pages.mapped else self.batch_size
        for i in range(0, self.batch_size, step):
            windows[i : i + step] = self.ids[starts[i : i + step, None] + self._offsets]
            self._pages.touched(places=step)
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
        self._pages = _Pages(self.ids)

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
            self._pages.touched((stop - start) * self.ids.itemsize, places=1)
            yield x, y

    def _windows(self, ids: np.ndarray, fill: int) -> np.ndarray:
        rows = -(-len(ids) // self.context)
        filled = np.full(rows * self.context, fill, np.int64)
        filled[: len(ids)] = ids
        return filled.reshape(rows, self.context)


def read_through(ids: np.ndarray, size: int = 1 << 20) -> Iterator[np.ndarray]:
    """The ids from the first to the last, `size` at a time; a memory map stays on the disk."""
    pages = _Pages(ids)
    for start in range(0, len(ids), size):
        yield ids[start : start + size]
        pages.touched(size * ids.itemsize, places=1)


# --- windows that are numbered --------------------------------------------------------------------


class Windows(Protocol):
    """Windows 0 … len − 1, each with at least one target, that together have every target once."""

    def __len__(self) -> int: ...

    def take(self, numbers: np.ndarray) -> Batch:
        """(x, y) of the windows with these numbers, int64 of shape (len(numbers), T)."""
        ...


class PackedWindows:
    """x = ids[iT : iT + T], y = ids[iT + 1 : iT + T + 1]: across the ends of documents.

    The last window is filled up with x = 0 and y = `IGNORE_INDEX`. N − 1 targets in ⌈(N − 1) / T⌉
    windows.
    """

    def __init__(self, ids: Any, context: int) -> None:
        self.ids, self.context = _one_dimensional(ids), context
        _check_positive(context=context)
        if len(self.ids) < 2:
            raise ValueError(f"expected at least 2 tokens to predict one, got {len(self.ids)}")
        self._pages = _Pages(self.ids)

    def __len__(self) -> int:
        return -(-(len(self.ids) - 1) // self.context)

    def take(self, numbers: np.ndarray) -> Batch:
        """The windows with these numbers."""
        x, y = _empty(len(numbers), self.context)
        for row, start in enumerate(numbers * self.context):
            _fill(x, y, row, self.ids[start : start + self.context + 1])
            self._pages.touched(places=1)
        return x, y


class DocumentWindows:
    """Windows of one document each: what is in x is of the document of y.

    A document is read from the mark before it, which tells that one begins (as GPT-2 starts a text
    from `<|endoftext|>`), to the mark behind it, which is its last target; the first document has
    no mark before it. Its windows stand side by side, the last one filled up with x = 0 and
    y = `IGNORE_INDEX`. With marks every id but the first is a target once; without them the first
    id of every document is none.

    Of the ends, which may be many millions in a file, only a thousandth is kept in memory.
    """

    def __init__(self, tokens: Tokens, context: int) -> None:
        _check_positive(context=context)
        self.tokens, self.context = tokens, context
        counts = [int(self._counts(i).sum()) for i in range(0, len(tokens.ends), _STRIDE)]
        self._before = np.cumsum([0, *counts])  # windows before each stretch of documents
        if not len(self):
            raise ValueError(
                f"expected documents of at least 2 tokens to predict one, got {len(tokens)} tokens "
                f"in {len(tokens.ends)} documents"
            )
        self._pages = _Pages(tokens.ids, tokens.ends)

    def __len__(self) -> int:
        return int(self._before[-1])

    def take(self, numbers: np.ndarray) -> Batch:
        """The windows with these numbers."""
        x, y = _empty(len(numbers), self.context)
        stretches = np.searchsorted(self._before, numbers, side="right") - 1
        for stretch in np.unique(stretches):
            firsts, lasts = self._spans(stretch * _STRIDE)
            before = np.cumsum([0, *self._counts(stretch * _STRIDE)])
            for row in np.flatnonzero(stretches == stretch):
                number = numbers[row] - self._before[stretch]
                document = np.searchsorted(before, number, side="right") - 1
                start = firsts[document] + (number - before[document]) * self.context
                stop = min(start + self.context, lasts[document])
                _fill(x, y, int(row), self.tokens.ids[start : stop + 1])
                self._pages.touched(places=2)  # of the ids and of the ends
        return x, y

    def _counts(self, begin: int) -> np.ndarray:
        """The number of windows of each document of a stretch."""
        firsts, lasts = self._spans(begin)
        return -(-np.maximum(lasts - firsts, 0) // self.context)

    def _spans(self, begin: int) -> tuple[np.ndarray, np.ndarray]:
        """(first id of x, last id of y) of each document of the stretch that begins there."""
        tokens = self.tokens
        stop = min(begin + _STRIDE, len(tokens.ends))
        ends = tokens.ends_of(begin, stop)
        first = tokens.ends_of(begin - 1, begin) if begin else [0]
        firsts = np.concatenate([first, ends[:-1]])
        return firsts, (np.minimum(ends, len(tokens) - 1) if tokens.marked else ends - 1)


_STRIDE = 1024  # documents


class RandomWindows:
    """Windows drawn with replacement: an endless iterator of (x, y), int64 of shape (B, T)."""

    def __init__(self, windows: Windows, batch_size: int, stream: RandomStream) -> None:
        _check_positive(batch_size=batch_size)
        self.windows, self.batch_size, self.stream = windows, batch_size, stream

    def __iter__(self) -> RandomWindows:
        return self

    def __next__(self) -> Batch:
        return self.windows.take(self.stream.integers(0, len(self.windows), self.batch_size))

    def state(self) -> dict[str, int]:
        """Where the next batch comes from: the stream's state."""
        return self.stream.state()

    def load_state(self, state: dict[str, int]) -> None:
        """Go on from `state()`."""
        self.stream.load_state(state)


class EpochBatches:
    """All windows once, then all of them again: an endless iterator of (x, y), int64 (B, T).

    Every batch has B windows; where an epoch does not divide by B, one holds the end of an epoch
    and the beginning of the next. The position is one number, so going on from it is exact.

    Args:
        windows: W of them.
        batch_size: B.
        shuffle: None: in their order; else the seed of another order for every epoch.
    """

    def __init__(self, windows: Windows, batch_size: int, shuffle: int | None = None) -> None:
        _check_positive(batch_size=batch_size)
        self.windows, self.batch_size, self.shuffle = windows, batch_size, shuffle
        self.position = 0  # windows given so far, over all epochs

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self.position // len(self.windows)

    def __iter__(self) -> EpochBatches:
        return self

    def __next__(self) -> Batch:
        epochs, numbers = np.divmod(
            np.arange(self.position, self.position + self.batch_size), len(self.windows)
        )
        if self.shuffle is not None:
            for epoch in np.unique(epochs):
                now = epochs == epoch
                numbers[now] = shuffled(numbers[now], len(self.windows), self.shuffle, int(epoch))
        self.position += self.batch_size
        return self.windows.take(numbers)

    def state(self) -> dict[str, int]:
        """Where the next batch comes from."""
        return {"position": self.position}

    def load_state(self, state: dict[str, int]) -> None:
        """Go on from `state()`."""
        self.position = int(state["position"])


class OnePass:
    """All windows once, in their order; the last batch holds those that are left."""

    def __init__(self, windows: Windows, batch_size: int) -> None:
        _check_positive(batch_size=batch_size)
        self.windows, self.batch_size = windows, batch_size

    def __len__(self) -> int:
        return -(-len(self.windows) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.windows), self.batch_size):
            yield self.windows.take(
                np.arange(start, min(start + self.batch_size, len(self.windows)))
            )


def shuffled(numbers: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """π(number) for a permutation π of 0 … n − 1 that (n, seed, epoch) decide; int64.

    A Feistel network: halves (l, r) ← (r, l ⊕ f(r, key)), six times, permutes 0 … 2²ʰ − 1 whatever
    f is; a result from n on is put in again until it is below (cycle walking), which permutes
    0 … n − 1. So no list of n numbers is ever made. The keys are Philox words of (seed, epoch).
    Black & Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002.
    """
    half = np.uint64(max(2, -(-(n - 1).bit_length() // 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    words = philox(seed, epoch * (_ROUNDS // 2), 2 * _ROUNDS).astype(np.uint64)
    keys = (words[0::2] << np.uint64(32)) | words[1::2]
    found = np.array(numbers, np.uint64)
    walking = np.ones(found.shape, bool)
    while walking.any():
        left, right = found[walking] >> half, found[walking] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right + key) & mask)
        found[walking] = (left << half) | right
        walking = found >= np.uint64(n)
    return found.astype(np.int64)


_ROUNDS = 6


def _mixed(words: np.ndarray) -> np.ndarray:
    """SplitMix64's last steps: every bit of the result depends on every bit that comes in."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _empty(rows: int, context: int) -> Batch:
    return np.zeros((rows, context), np.int64), np.full((rows, context), IGNORE_INDEX, np.int64)


def _fill(x: np.ndarray, y: np.ndarray, row: int, ids: np.ndarray) -> None:
    """The ids less the last into x, less the first into y."""
    x[row, : len(ids) - 1] = ids[:-1]
    y[row, : len(ids) - 1] = ids[1:]


# --- memory and checks ----------------------------------------------------------------------------


class _Pages:
    """Gives the pages of memory maps back to the system now and then.

    A page that was read counts as memory of this process until the system wants it; a long run
    reads all of a token file. What is given back stays in the system's own cache, so reading it
    again costs little.
    """

    def __init__(self, *arrays: np.ndarray) -> None:
        maps = (getattr(array, "_mmap", None) for array in arrays)
        self._maps = [m for m in maps if m is not None and hasattr(m, "madvise")]
        self._bytes = 0

    @property
    def mapped(self) -> bool:
        """Whether there is anything to give back."""
        return bool(self._maps)

    def touched(self, size: int = 0, *, places: int) -> None:
        """`size` bytes were read, at so many places: the system maps what is around each, too."""
        self._bytes += size + places * _AROUND
        if self._bytes >= _KEPT:
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)
            self._bytes = 0


_AROUND = 2 << 20  # bytes that a fault may map: Linux 6.18 has up to 2 MiB, older ones 64 KiB
_AT_ONCE = 8  # places read before pages are given back
_KEPT = _AT_ONCE * _AROUND


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
