"""Do integers fit the table that they index? Asked where the answer costs nothing.

An id outside of a table would be another row, or memory of somebody else, so `embedding` and
`cross_entropy` look at their smallest and their largest id first. On the CPU that is cheap. A GPU
would have to finish all its work and answer, while the host launches nothing. So what the host saw
before it uploaded an array is remembered beside the copy:

    on_gpu = cupy.asarray(batch)
    bounds.remember(on_gpu, batch)      min and max by NumPy
    embedding(on_gpu, w)                asks no GPU, and names an id that is too large

It holds for views of the memory, until `mark_written` says that it was overwritten. About an array
that nobody looked at the GPU is asked, and waited for, at once. While a CUDA graph is captured
nobody can be asked; there the kernels answer, with NaN for an id that is in no table.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from tinygrad_llm import autograd
from tinygrad_llm.backend import Array, is_capturing, must_not_wait, namespace
from tinygrad_llm.ops.convert import as_array
from tinygrad_llm.tensor import Tensor
from tinygrad_llm.watch import clock

IGNORED = -100  # what `cross_entropy` leaves out, unless told otherwise


class Bounds:
    """The smallest and the largest of an array's integers, those that are −100 left out.

    `asked` lists what tables were indexed with it, each as (size, the error to raise): whoever
    writes other integers into the same memory, as for a CUDA graph, calls `check_again`.
    """

    def __init__(self, values: np.ndarray) -> None:
        self.asked: list[tuple[int, int | None, Callable[[int], Exception]]] = []
        self.look_at(values)

    def look_at(self, values: np.ndarray) -> None:
        """These are the values now."""
        counted = values[values != IGNORED] if values.dtype.kind == "i" else values
        self.ignored = counted.size < values.size
        # Of no value at all: bounds that fit everything.
        self.low, self.high = (int(counted.min()), int(counted.max())) if counted.size else (0, -1)

    def check(self, size: int, error: Callable[[int], Exception], ignoring: int | None) -> None:
        low = min(self.low, IGNORED) if self.ignored and ignoring != IGNORED else self.low
        if low < 0 or self.high >= size:
            raise error(low if low < 0 else self.high)

    def check_again(self) -> None:
        """All that was asked when a graph was captured, of the values that it is to run on now."""
        for size, ignoring, error in self.asked:
            self.check(size, error, ignoring)


_known: dict[int, tuple[weakref.ref[Any], int, Bounds]] = {}  # id of the memory's owner -> what


def remember(array: Array, values: np.ndarray) -> Bounds | None:
    """The bounds of `values`, which are copied into `array`; None where they are no integers."""
    if values.dtype.kind not in "iu":
        return None
    bounds = Bounds(values)
    owner = autograd._owner(array)
    key = id(owner)
    reference = weakref.ref(owner, lambda _: _known.pop(key, None))
    _known[key] = (reference, next(clock), bounds)
    return bounds


def ids_on(ids: np.ndarray, device: str) -> Tensor:
    """`Tensor(ids, device=device)`, looked at on the way there."""
    tensor = Tensor(ids, device=device)
    if type(ids) is np.ndarray and type(tensor.data) is not np.ndarray:
        remember(tensor.data, ids)
    return tensor


def as_ids(x: Any, like: Array) -> Array:
    """`as_array(x, like)`; what goes from the host to a GPU is looked at on the way."""
    values = x.data if isinstance(x, Tensor) else x
    array = as_array(values, like)
    if array is not values and type(array) is not np.ndarray:
        remember(array, np.asarray(values))
    return array


def check(
    ids: Array, size: int, error: Callable[[int], Exception], ignoring: int | None = None
) -> None:
    """Raise error(id) for an id that is not in 0 … size − 1 (nor `ignoring`), without waiting."""
    if not ids.size:
        return
    if type(ids) is np.ndarray:
        _refuse_first(ids, size, error, ignoring)
        return
    bounds = _bounds_of(ids)
    if bounds is not None and (ignoring in (None, IGNORED)):
        if is_capturing():
            bounds.asked.append((size, ignoring, error))
        bounds.check(size, error, ignoring)
    elif not must_not_wait():
        _refuse_first(ids, size, error, ignoring)


def _bounds_of(ids: Array) -> Bounds | None:
    known = _known.get(id(autograd._owner(ids)))
    if known is None or autograd.overwritten_by(ids, since=known[1]):
        return None
    return known[2]


def _refuse_first(
    ids: Array, size: int, error: Callable[[int], Exception], ignoring: int | None
) -> None:
    if type(ids) is np.ndarray and int(ids.min()) >= 0 and int(ids.max()) < size:
        return
    wrong = (ids < 0) | (ids >= size)
    if ignoring is not None:
        wrong &= ids != ignoring
    if bool(namespace(ids).any(wrong)):
        raise error(int(ids[wrong][0]))
