"""Ops that move elements without computing: their gradients move them back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinygrad_llm.autograd import Function
from tinygrad_llm.backend import Array, namespace, promote
from tinygrad_llm.ops.convert import as_tensor, astype
from tinygrad_llm.ops.reduce import sum_of
from tinygrad_llm.tensor import Axis, Tensor

Shape = tuple[int, ...]


def sum_to(g: Any, shape: Shape) -> Any:
    """The gradient of broadcasting: g summed over the axes along which `shape` was repeated.

    (2, 3, 4) to (3, 1): sum over axis 0, then over the last with keepdims. On arrays and Tensors.
    """
    if g.shape == shape:
        return g
    extra = g.ndim - len(shape)
    if extra:
        g = sum_of(g, tuple(range(extra)), False)
    repeated = tuple([i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1])
    return sum_of(g, repeated, True) if repeated else g


class Reshape(Function):
    """y = the same elements in order, in another shape        dx = g in x's shape"""

    def forward(self, x: Array, shape: Shape) -> Array:
        self.shape = x.shape
        return x.reshape(shape)

    def backward(self, g: Any) -> Any:
        return g.reshape(self.shape)


def reshape(x: Any, shape: int | Sequence[int]) -> Tensor:
    """y = x in the given shape; one size may be −1. A view where NumPy can give one."""
    return Reshape.apply(as_tensor(x), shape=_sizes(shape))


def _sizes(shape: int | Sequence[int]) -> Shape:
    return (int(shape),) if isinstance(shape, int | np.integer) else tuple(shape)


def flatten(x: Any, start: int = 0, end: int = -1) -> Tensor:
    """y = x with the axes `start` to `end` (inclusive) merged into one."""
    x = as_tensor(x)
    if x.ndim == 0:
        return reshape(x, (1,))
    first, last = _axis(start, x.ndim), _axis(end, x.ndim)
    if first > last:
        raise ValueError(f"flatten() needs start ≤ end, got start={start}, end={end} of {x.shape}")
    merged = math.prod(x.shape[first : last + 1])
    return reshape(x, (*x.shape[:first], merged, *x.shape[last + 1 :]))


class Transpose(Function):
    """y[i_axes[0], i_axes[1], …] = x[i₀, i₁, …]        dx = g with the axes put back"""

    def forward(self, x: Array, axes: Shape) -> Array:
        self.axes = axes
        return x.transpose(axes)

    def backward(self, g: Any) -> Any:
        return g.transpose(*_inverse(self.axes))


def _inverse(axes: Shape) -> Shape:
    inverse = [0] * len(axes)
    for i, axis in enumerate(axes):
        inverse[axis] = i
    return tuple(inverse)


def transpose(x: Any, axes: Sequence[int] | None = None) -> Tensor:
    """y = x with its axes in a new order (all reversed by default), as a view."""
    x = as_tensor(x)
    n = x.ndim
    if axes is None:
        axes = range(n)[::-1]
    order = tuple([axis + n if axis < 0 else axis for axis in axes])
    if sorted(order) != list(range(n)):
        raise ValueError(
            f"transpose() takes all {n} axes of {x.shape} in their new order, got {tuple(axes)}; "
            "to exchange two axes use swapaxes(a, b)"
        )
    return Transpose.apply(x, axes=order)


permute = transpose


def swapaxes(x: Any, axis1: int, axis2: int) -> Tensor:
    """y = x with two axes exchanged, as a view."""
    x = as_tensor(x)
    a, b = _axis(axis1, x.ndim), _axis(axis2, x.ndim)
    axes = list(range(x.ndim))
    axes[a], axes[b] = b, a
    return Transpose.apply(x, axes=tuple(axes))


def moveaxis(x: Any, source: int, destination: int) -> Tensor:
    """y = x with one axis moved to another place, the others keeping their order."""
    x = as_tensor(x)
    a, b = _axis(source, x.ndim), _axis(destination, x.ndim)
    axes = [i for i in range(x.ndim) if i != a]
    axes.insert(b, a)
    return Transpose.apply(x, axes=tuple(axes))


def _axis(axis: int, ndim: int) -> int:
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis {axis} is out of range for {ndim} dimensions")
    return axis % ndim


class BroadcastTo(Function):
    """y = x repeated along new axes and axes of size 1        dx = g summed over them"""

    def forward(self, x: Array, shape: Shape) -> Array:
        self.shape = x.shape
        return namespace(x).broadcast_to(x, shape)

    def backward(self, g: Any) -> Any:
        return sum_to(g, self.shape)


def broadcast_to(x: Any, shape: int | Sequence[int]) -> Tensor:
    """y = x read as if it had `shape`, by NumPy's rules; no memory is copied."""
    return BroadcastTo.apply(as_tensor(x), shape=_sizes(shape))


def expand(x: Any, shape: Sequence[int]) -> Tensor:
    """As `broadcast_to`; −1 keeps the size of an axis (PyTorch's name)."""
    x = as_tensor(x)
    offset = len(shape) - x.ndim
    sizes = [x.shape[i - offset] if n == -1 and i >= offset else n for i, n in enumerate(shape)]
    return broadcast_to(x, sizes)


def expand_dims(x: Any, axis: int) -> Tensor:
    """y = x with a new axis of size 1 at `axis`."""
    x = as_tensor(x)
    at = _axis(axis, x.ndim + 1)
    return reshape(x, (*x.shape[:at], 1, *x.shape[at:]))


unsqueeze = expand_dims


def squeeze(x: Any, axis: Axis = None) -> Tensor:
    """y = x without its axes of size 1, or without the given ones."""
    x = as_tensor(x)
    if axis is None:
        return reshape(x, [n for n in x.shape if n != 1])
    axes = [_axis(a, x.ndim) for a in ((axis,) if isinstance(axis, int) else axis)]
    for a in axes:
        if x.shape[a] != 1:
            raise ValueError(f"squeeze() removes axes of size 1; axis {a} of {x.shape} has more")
    return reshape(x, [n for i, n in enumerate(x.shape) if i not in axes])


class Concatenate(Function):
    """y = [x₁, x₂, …] along an axis        dxₖ = the slice of g where xₖ stands"""

    def forward(self, *xs: Array, axis: int) -> Array:
        self.axis = axis
        self.sizes = [x.shape[axis] for x in xs]
        return namespace(xs[0]).concatenate(xs, axis=axis)

    def backward(self, g: Any) -> Any:
        pieces, start = [], 0
        for i, size in enumerate(self.sizes):
            index = (slice(None),) * self.axis + (slice(start, start + size),)
            pieces.append(g[index] if self.needs(i) else None)
            start += size
        return tuple(pieces)


def concatenate(xs: Sequence[Any], axis: int = 0) -> Tensor:
    """y = the tensors joined along an existing axis; their other sizes must agree."""
    tensors = _same_dtype(xs, "concatenate")
    first = tensors[0]
    if first.ndim == 0:
        raise ValueError("concatenate() needs at least one dimension; use stack() for scalars")
    at = _axis(axis, first.ndim)
    for i, x in enumerate(tensors):
        if x.shape[:at] + x.shape[at + 1 :] != first.shape[:at] + first.shape[at + 1 :]:
            raise ValueError(
                f"concatenate() along axis {at}: tensor 0 has shape {first.shape}, but tensor {i} "
                f"has {x.shape}; all other sizes must agree"
            )
    return Concatenate.apply(*tensors, axis=at)


def stack(xs: Sequence[Any], axis: int = 0) -> Tensor:
    """y = tensors of one shape joined along a new axis."""
    tensors = _same_dtype(xs, "stack")
    if len({x.shape for x in tensors}) > 1:
        raise ValueError(f"stack() needs equal shapes, got {[x.shape for x in tensors]}")
    return concatenate([expand_dims(x, axis) for x in tensors], _axis(axis, tensors[0].ndim + 1))


def _same_dtype(xs: Sequence[Any], name: str) -> list[Tensor]:
    tensors = [as_tensor(x) for x in xs]
    if not tensors:
        raise ValueError(f"{name}() needs at least one tensor")
    dtype = tensors[0].dtype
    for x in tensors:
        dtype = promote(dtype, x.dtype)
    return [astype(x, dtype) for x in tensors]


def split(x: Any, sections: int | Sequence[int], axis: int = 0) -> list[Tensor]:
    """x cut along an axis: into `sections` equal parts, or at the given indices (NumPy's rule)."""
    x = as_tensor(x)
    at = _axis(axis, x.ndim)
    size = x.shape[at]
    if isinstance(sections, int):
        if sections < 1 or size % sections:
            raise ValueError(
                f"split() into {sections} equal parts: axis {at} has size {size}; give the "
                "indices to cut at, or use chunk() for parts of nearly equal size"
            )
        sections = range(size // sections, size, size // sections) if size else [0] * (sections - 1)
    edges = [0, *sections, size]
    before = (slice(None),) * at
    return [x[(*before, slice(a, b))] for a, b in itertools.pairwise(edges)]


def chunk(x: Any, chunks: int, axis: int = 0) -> list[Tensor]:
    """x cut into at most `chunks` parts of equal size, the last smaller (PyTorch's rule)."""
    x = as_tensor(x)
    if chunks < 1:
        raise ValueError(f"chunk() needs at least one part, got {chunks}")
    size = x.shape[_axis(axis, x.ndim)]
    step = max(1, -(-size // chunks))
    return split(x, range(step, size, step), axis)


class Pad(Function):
    """y = x with a border of a constant        dx = g inside the border"""

    def forward(self, x: Array, widths: tuple[tuple[int, int], ...], value: float) -> Array:
        self.inside = tuple(
            [slice(before, before + n) for n, (before, _) in zip(x.shape, widths, strict=True)]
        )
        return namespace(x).pad(x, widths, constant_values=value)

    def backward(self, g: Any) -> Any:
        return g[self.inside]


def pad(x: Any, pad_width: Any, value: float = 0.0) -> Tensor:
    """y = x with `value` around it; pad_width as in np.pad: one (before, after) pair per axis.

    A single pair, or a single number, serves for all axes.
    """
    x = as_tensor(x)
    widths = np.broadcast_to(np.asarray(pad_width, dtype=np.int64), (x.ndim, 2)).tolist()
    if any(w < 0 for both in widths for w in both):
        raise ValueError(f"pad() takes widths ≥ 0, got {pad_width}; slice to make x smaller")
    if x.ndim == 0:
        return copy(x)  # a scalar has no border
    return Pad.apply(x, widths=tuple([(a, b) for a, b in widths]), value=value)


class Flip(Function):
    """y = x reversed along axes        dx = g reversed along them"""

    def forward(self, x: Array, axis: Axis) -> Array:
        self.axis = axis
        return namespace(x).flip(x, axis)

    def backward(self, g: Any) -> Any:
        return namespace(g).flip(g, self.axis)


def flip(x: Any, axis: Axis = None) -> Tensor:
    """y = x in reverse order along `axis` (all axes by default)."""
    return Flip.apply(as_tensor(x), axis=axis)


class Roll(Function):
    """y = x shifted around        dx = g shifted back"""

    def forward(self, x: Array, shift: Any, axis: Axis) -> Array:
        self.shift, self.axis = shift, axis
        return namespace(x).roll(x, shift, axis)

    def backward(self, g: Any) -> Any:
        back = tuple([-s for s in self.shift]) if isinstance(self.shift, tuple) else -self.shift
        return namespace(g).roll(g, back, self.axis)


def roll(x: Any, shift: int | Sequence[int], axis: Axis = None) -> Tensor:
    """y = x with elements moved `shift` places; those that fall off come in at the other end."""
    shift = tuple(shift) if isinstance(shift, list) else shift
    return Roll.apply(as_tensor(x), shift=shift, axis=axis)


class Triangle(Function):
    """y = the lower (or upper) triangle of x, zero elsewhere        dx = the same triangle of g"""

    def forward(self, x: Array, k: int, lower: bool) -> Array:
        self.k, self.lower = k, lower
        xp = namespace(x)
        return xp.tril(x, k) if lower else xp.triu(x, k)

    def backward(self, g: Any) -> Any:
        xp = namespace(g)
        return xp.tril(g, self.k) if self.lower else xp.triu(g, self.k)


def tril(x: Any, k: int = 0) -> Tensor:
    """y = x on and below the k-th diagonal of its last two axes, zero above."""
    return _triangle(x, k, lower=True)


def triu(x: Any, k: int = 0) -> Tensor:
    """y = x on and above the k-th diagonal of its last two axes, zero below."""
    return _triangle(x, k, lower=False)


def _triangle(x: Any, k: int, lower: bool) -> Tensor:
    x = as_tensor(x)
    if x.ndim < 2:
        raise ValueError(f"a triangle needs at least two dimensions, got shape {x.shape}")
    return Triangle.apply(x, k=k, lower=lower)


class Copy(Function):
    """y = x in new memory        dx = g"""

    def forward(self, x: Array) -> Array:
        return x.copy()

    def backward(self, g: Any) -> Any:
        return g


def copy(x: Any) -> Tensor:
    """y = x in memory of its own."""
    return Copy.apply(as_tensor(x))
