"""Ops that pick elements out and put them back: indexing is the transpose of scattering.

The gradient of picking is zero everywhere else. It is handed on as a `Part`, so that the zeros are
never written twice.
"""

from __future__ import annotations

from types import EllipsisType, NoneType
from typing import Any

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.autograd import Function, Part
from tinygrad_llm.backend import Array, namespace
from tinygrad_llm.ops.convert import as_array, as_tensor, astype, widened
from tinygrad_llm.ops.shape import sum_to
from tinygrad_llm.tensor import Tensor


def as_index(index: Any) -> Any:
    """The index with Tensors as arrays and lists as integer or boolean arrays."""
    if isinstance(index, tuple):
        return tuple([_as_index(i) for i in index])
    return _as_index(index)


def _as_index(index: Any) -> Any:
    if isinstance(index, Tensor):
        index = index.data
    elif isinstance(index, list):
        index = np.asarray(index) if index else np.zeros(0, dtype=np.int64)
    if hasattr(index, "dtype") and index.dtype.kind not in "iub":
        raise TypeError(f"an index is of integers or booleans, got {index.dtype}")
    return index


def _is_basic(index: Any) -> bool:
    """True when the index gives a view: integers, slices, ..., None."""
    items = index if isinstance(index, tuple) else (index,)
    return all(i is None or i is Ellipsis or (isinstance(i, int | slice | np.integer)
               and not isinstance(i, bool)) for i in items)  # fmt: skip


def _add_at(index: Any, unique: bool) -> Any:
    """A function that does whole[index] += g, also where the index names an element twice."""

    def add_at(whole: Array, g: Array) -> None:
        if unique:
            whole[index] += g
            return
        wide = widened(whole)
        namespace(whole).add.at(wide, index, g)
        if wide is not whole:
            whole[...] = wide

    return add_at


class GetItem(Function):
    """y = x[index]        dx = zeros with dx[index] += g"""

    def forward(self, x: Array, index: Any) -> Array:
        self.shape, self.index = x.shape, index
        self.save(*_arrays_in(index))
        return x[index]

    def backward(self, g: Any, *_: Array) -> Any:
        if isinstance(g, Tensor):
            return PutAt.apply(g, shape=self.shape, index=self.index)
        return Part(g, self.shape, _add_at(self.index, _names_once(self.index)))


def _arrays_in(index: Any) -> list[Array]:
    """The arrays of an index: saved, so that a backward after they were overwritten raises."""
    items = index if type(index) is tuple else (index,)
    return [i for i in items if type(i) not in _NO_ARRAYS and backend.is_array(i)]


_NO_ARRAYS = frozenset({int, bool, slice, EllipsisType, NoneType})


def _names_once(index: Any) -> bool:
    # A basic index, or one boolean mask, cannot name an element twice.
    return _is_basic(index) or getattr(index, "dtype", None) == backend.bool_


class PutAt(Function):
    """y = zeros with y[index] += x        dx = g[index]"""

    def forward(self, x: Array, shape: tuple[int, ...], index: Any) -> Array:
        self.index = index
        self.save(*_arrays_in(index))
        y = namespace(x).zeros(shape, dtype=x.dtype)
        _add_at(index, _names_once(index))(y, x)
        return y

    def backward(self, g: Any, *_: Array) -> Any:
        return g[self.index]


class SetItem(Function):
    """y = x with y[index] = v        dx = g with zeros at index, dv = g[index]

    Where the index names an element twice, the last value counts, and only it has a gradient.
    """

    def forward(self, x: Array, v: Array, index: Any) -> Array:
        self.index, self.v_shape = index, v.shape
        y = x.copy()
        y[index] = v
        if not _names_once(index):
            # Whose value stayed? Write running numbers in the same way and read them back.
            place = namespace(x).zeros(x.shape, dtype=np.int64)
            running = namespace(x).arange(place[index].size).reshape(place[index].shape)
            place[index] = running
            self.save(place[index] == running, *_arrays_in(index))
        else:
            self.save(None, *_arrays_in(index))
        return y

    def backward(self, g: Any, stayed: Array | None, *_: Array) -> Any:
        dv = g[self.index]
        if stayed is not None:
            dv = dv * stayed
        leading = len(self.v_shape) - dv.ndim  # axes of size 1, which NumPy drops
        return self._without(g), sum_to(dv.reshape((1,) * leading + dv.shape), self.v_shape)

    def _without(self, g: Any) -> Any:
        array = g.data if isinstance(g, Tensor) else g
        outside = namespace(array).ones(array.shape, dtype=bool)
        outside[self.index] = False
        return namespace(g).where(outside, g, 0.0)


def getitem(x: Any, index: Any) -> Tensor:
    """y = x[index], for every kind of NumPy index; basic ones give a view.

    Integers, slices, `...`, None, boolean masks, integer arrays and Tensors, mixed as in NumPy.
    """
    x = as_tensor(x)
    try:
        return GetItem.apply(x, index=as_index(index))
    except IndexError as error:
        raise IndexError(f"{error} (the tensor has shape {x.shape})") from None


def setitem(x: Any, index: Any, value: Any) -> Tensor:
    """y = a copy of x with y[index] = value; what a recorded `x[index] = value` becomes."""
    x = as_tensor(x)
    return SetItem.apply(x, astype(as_tensor(value, x), x.dtype), index=as_index(index))


def take_along_axis(x: Any, indices: Any, axis: int) -> Tensor:
    """y[i, j, k] = x[i, indices[i, j, k], k] for axis 1, and so on (NumPy's function)."""
    x = as_tensor(x)
    return getitem(x, _along_axis(x, indices, axis, "take_along_axis", broadcast=True))


def gather(x: Any, axis: int, index: Any) -> Tensor:
    """y[i, j, k] = x[i, index[i, j, k], k] for axis 1, and so on (PyTorch's function).

    On the other axes `index` may be smaller than x: it then reads the first places.
    """
    x = as_tensor(x)
    return getitem(x, _along_axis(x, index, axis, "gather", broadcast=False))


def scatter_add(x: Any, axis: int, index: Any, source: Any) -> Tensor:
    """y = x with y[i, index[i, j, k], k] += source[i, j, k] for axis 1, and so on."""
    x = as_tensor(x)
    source = astype(as_tensor(source, x), x.dtype)
    places = _along_axis(x, index, axis, "scatter_add", broadcast=False)
    shape = as_array(index, x.data).shape
    if source.ndim != x.ndim or any(n < m for n, m in zip(source.shape, shape, strict=True)):
        raise ValueError(f"scatter_add() needs a source of at least {shape}, got {source.shape}")
    used = source[tuple([slice(n) for n in shape])]
    return x + PutAt.apply(used, shape=x.shape, index=places)


def index_select(x: Any, axis: int, index: Any) -> Tensor:
    """y = the slices of x along `axis` that the 1-D integer `index` names, in its order."""
    x = as_tensor(x)
    places = as_array(index, x.data)
    if places.ndim != 1 or not -x.ndim <= axis < x.ndim:
        raise ValueError(
            f"index_select() takes a 1-D index and an axis of x, got an index of shape "
            f"{places.shape} and axis {axis} for shape {x.shape}"
        )
    if places.dtype.kind not in "iu" and places.size:
        raise TypeError(f"index_select() needs an index of integers, got {places.dtype}")
    return getitem(x, (*(slice(None),) * (axis % x.ndim), places.astype(np.int64, copy=False)))


def _along_axis(x: Tensor, index: Any, axis: int, name: str, broadcast: bool) -> tuple[Any, ...]:
    """The index tuple that reads `index` along one axis and its own place along the others."""
    xp = namespace(x.data)
    along = as_array(index, x.data)
    if along.ndim != x.ndim or not -x.ndim <= axis < x.ndim:
        raise ValueError(
            f"{name}() needs an index with as many axes as x and an axis of x, got an index of "
            f"shape {along.shape} and axis {axis} for shape {x.shape}"
        )
    if along.dtype.kind not in "iu":
        raise TypeError(f"{name}() needs an index of integers, got {along.dtype}")
    axis %= x.ndim
    places: list[Any] = []
    for i in range(x.ndim):
        length = x.shape[i] if broadcast else along.shape[i]
        if i != axis and not broadcast and length > x.shape[i]:
            raise ValueError(f"{name}(): index {along.shape} exceeds {x.shape} on axis {i}")
        at = xp.arange(length).reshape([-1 if i == j else 1 for j in range(x.ndim)])
        places.append(along if i == axis else at)
    return tuple(places)
