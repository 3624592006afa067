"""Ops that summarise along axes: their gradients spread back over what was summarised.

`axis` is an integer, a tuple or None (all axes); `keepdims` keeps the reduced axes with size 1.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.autograd import Function
from tinygrad_llm.backend import Array, namespace
from tinygrad_llm.ops.convert import as_float, as_tensor, narrowed, widened
from tinygrad_llm.tensor import Axis, Tensor

Shape = tuple[int, ...]


class Reduction(Function):
    """An op that reduces axes of x; helps its backward to put them back."""

    shape: Shape
    axis: Axis

    def spread(self, g: Any) -> Any:
        """g, of the output's shape, read as if it had x's shape: what each element receives."""
        return namespace(g).broadcast_to(self.keepdims(g), self.shape)

    def keepdims(self, y: Any) -> Any:
        """y with the reduced axes back, of size 1."""
        return y.reshape(kept_shape(self.shape, self.axis))

    @property
    def count(self) -> int:
        """How many elements went into each element of the output."""
        kept = kept_shape(self.shape, self.axis)
        return math.prod([n for n, m in zip(self.shape, kept, strict=True) if n != m])

    def degrees_of_freedom(self, ddof: int) -> int:
        """n − ddof, for a variance"""
        if self.count <= ddof:
            raise ValueError(f"var() and std() of {self.count} elements need ddof below that")
        return self.count - ddof


def kept_shape(shape: Shape, axis: Axis) -> Shape:
    """(2, 3, 4) with axis 1 -> (2, 1, 4)"""
    if axis is None:
        return (1,) * len(shape)
    axes = [a % len(shape) for a in (axis if isinstance(axis, tuple) else (axis,))]
    return tuple([1 if i in axes else n for i, n in enumerate(shape)])


class Sum(Reduction):
    """y = Σ x        dx = g for every element"""

    def forward(self, x: Array, axis: Axis, keepdims: bool) -> Array:
        self.shape, self.axis = x.shape, axis
        return sum_of(x, axis, keepdims)

    def backward(self, g: Any) -> Any:
        return self.spread(g)


def sum_of(x: Any, axis: Axis, keepdims: bool) -> Any:
    """Σ of an array or Tensor; half precisions are accumulated in float32."""
    if isinstance(x, Tensor):
        return x.sum(axis=axis, keepdims=keepdims)
    y = x.sum(axis=axis, keepdims=keepdims, dtype=_accumulator(x.dtype))
    return narrowed(y, x) if backend.is_float(x.dtype) else y


def _accumulator(dtype: np.dtype) -> np.dtype | None:
    """In what to add up: float32 for half precision, int64 for integers, else the dtype itself."""
    if not backend.is_float(dtype):
        return backend.int64
    return backend.float32 if dtype.itemsize == 2 else None


class Mean(Reduction):
    """y = Σ x / n        dx = g / n for every element"""

    def forward(self, x: Array, axis: Axis, keepdims: bool) -> Array:
        self.shape, self.axis = x.shape, axis
        n = self.count
        if n == 0:
            raise ValueError(f"mean() of no elements: shape {x.shape}, axis {axis}")
        total = x.sum(axis=axis, keepdims=keepdims, dtype=_accumulator(x.dtype))
        return narrowed(total * total.dtype.type(1.0 / n), x)

    def backward(self, g: Any) -> Any:
        return self.spread(g * (1.0 / self.count))


class Var(Reduction):
    """y = Σ (x − μ)² / (n − ddof)        dx = 2 g (x − μ) / (n − ddof)"""

    def forward(self, x: Array, axis: Axis, ddof: int, keepdims: bool) -> Array:
        self.shape, self.axis = x.shape, axis
        self.dof = self.degrees_of_freedom(ddof)
        self.save(x)
        return narrowed(widened(x).var(axis=axis, ddof=ddof, keepdims=keepdims), x)

    def backward(self, g: Any, x: Any) -> Any:
        wide = widened(x)
        centred = wide - wide.mean(axis=self.axis, keepdims=True)
        return narrowed(self.keepdims(g) * (2.0 / self.dof) * centred, x)


class Std(Reduction):
    """y = √var(x)        dx = g (x − μ) / ((n − ddof) y)  (0 where y = 0)"""

    def forward(self, x: Array, axis: Axis, ddof: int, keepdims: bool) -> Array:
        self.shape, self.axis = x.shape, axis
        self.dof = self.degrees_of_freedom(ddof)
        y = narrowed(widened(x).std(axis=axis, ddof=ddof, keepdims=keepdims), x)
        self.save(x, y)
        return y

    def backward(self, g: Any, x: Any, y: Any) -> Any:
        g, y, wide = self.keepdims(g), self.keepdims(y), widened(x)
        centred = wide - wide.mean(axis=self.axis, keepdims=True)
        return narrowed(g * centred / (self.dof * namespace(g).where(y == 0, 1.0, y)), x)


class Amax(Reduction):
    """y = max x (or min x)        dx = g where x = y, shared equally among ties"""

    def forward(self, x: Array, axis: Axis, keepdims: bool, largest: bool) -> Array:
        self.shape, self.axis = x.shape, axis
        if self.count == 0:
            raise ValueError(f"the largest of no elements: shape {x.shape}, axis {axis}")
        y = x.max(axis=axis, keepdims=keepdims) if largest else x.min(axis=axis, keepdims=keepdims)
        if self.needs(0):
            self.save(x == self.keepdims(y))
        return y

    def backward(self, g: Any, chosen: Array) -> Any:
        ties = chosen.sum(axis=self.axis, keepdims=True)
        xp = namespace(g)
        return xp.where(chosen, self.keepdims(g) * (1.0 / ties).astype(g.dtype), 0.0)


class Prod(Reduction):
    """y = Π x        dxᵢ = g Π_{j≠i} xⱼ"""

    def forward(self, x: Array, axis: Axis, keepdims: bool) -> Array:
        self.shape, self.axis = x.shape, axis
        dtype = None if backend.is_float(x.dtype) else backend.int64
        y = x.prod(axis=axis, keepdims=keepdims, dtype=dtype)
        self.save(x, y)
        return y

    def backward(self, g: Any, x: Any, y: Any) -> Any:
        g = self.keepdims(g)
        if bool((x != 0).all()):
            return g * self.keepdims(y) / x
        return g * self._others(x)

    def _others(self, x: Any) -> Any:
        """Π_{j≠i} xⱼ without dividing, so that zeros are no trouble."""
        xp = namespace(x)
        axes = range(x.ndim) if self.axis is None else self.axis
        axes = [a % x.ndim for a in (axes if isinstance(axes, tuple | range) else (axes,))]
        order = [i for i in range(x.ndim) if i not in axes] + axes
        moved = x.transpose(*order)
        flat = moved.reshape((*moved.shape[: x.ndim - len(axes)], -1))
        back = [order.index(i) for i in range(x.ndim)]
        return _others_along_last(flat, xp).reshape(moved.shape).transpose(*back)


def _others_along_last(x: Any, xp: Any) -> Any:
    # Halve: the others of an element are its others in its own half times all of the other half.
    n = x.shape[-1]
    if n <= 1:
        return xp.ones_like(x)
    left, right = x[..., : n // 2], x[..., n // 2 :]
    return xp.concatenate(
        (
            _others_along_last(left, xp) * right.prod(axis=-1, keepdims=True),
            _others_along_last(right, xp) * left.prod(axis=-1, keepdims=True),
        ),
        axis=-1,
    )


class Cumsum(Function):
    """yᵢ = Σ_{j≤i} xⱼ        dxᵢ = Σ_{j≥i} gⱼ"""

    def forward(self, x: Array, axis: int) -> Array:
        self.axis = axis
        y = x.cumsum(axis=axis, dtype=_accumulator(x.dtype))
        return narrowed(y, x) if backend.is_float(x.dtype) else y

    def backward(self, g: Any) -> Any:
        xp, wide = namespace(g), widened(g)
        return narrowed(xp.flip(xp.cumsum(xp.flip(wide, self.axis), self.axis), self.axis), g)


class Norm(Reduction):
    """y = √Σ x²        dx = g x / y  (0 where y = 0)"""

    def forward(self, x: Array, axis: Axis, keepdims: bool) -> Array:
        self.shape, self.axis = x.shape, axis
        wide = widened(x)
        y = narrowed(namespace(x).sqrt(sum_of(wide * wide, axis, keepdims)), x)
        self.save(x, y)
        return y

    def backward(self, g: Any, x: Any, y: Any) -> Any:
        y = self.keepdims(y)
        return self.keepdims(g) / namespace(g).where(y == 0, 1.0, y) * x


def sum(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """y = Σ x; integers and booleans add up as int64"""
    return Sum.apply(_checked(x, axis), axis=axis, keepdims=keepdims)


def mean(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """y = Σ x / n"""
    return Mean.apply(as_float(_checked(x, axis)), axis=axis, keepdims=keepdims)


def var(x: Any, axis: Axis = None, ddof: int = 0, keepdims: bool = False) -> Tensor:
    """y = Σ (x − μ)² / (n − ddof). NumPy's default ddof = 0; PyTorch's is 1."""
    return Var.apply(as_float(_checked(x, axis)), axis=axis, ddof=ddof, keepdims=keepdims)


def std(x: Any, axis: Axis = None, ddof: int = 0, keepdims: bool = False) -> Tensor:
    """y = √(Σ (x − μ)² / (n − ddof)). NumPy's default ddof = 0; PyTorch's is 1."""
    return Std.apply(as_float(_checked(x, axis)), axis=axis, ddof=ddof, keepdims=keepdims)


def max(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """y = the largest element (the values only; see argmax)"""
    return Amax.apply(_checked(x, axis), axis=axis, keepdims=keepdims, largest=True)


def min(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """y = the smallest element (the values only; see argmin)"""
    return Amax.apply(_checked(x, axis), axis=axis, keepdims=keepdims, largest=False)


def argmax(x: Any, axis: int | None = None, keepdims: bool = False) -> Tensor:
    """k = the index of the largest element, the first of equals; int64, no gradient"""
    x = _checked(x, axis)
    return Tensor(namespace(x.data).argmax(x.data, axis=axis, keepdims=keepdims))


def argmin(x: Any, axis: int | None = None, keepdims: bool = False) -> Tensor:
    """k = the index of the smallest element, the first of equals; int64, no gradient"""
    x = _checked(x, axis)
    return Tensor(namespace(x.data).argmin(x.data, axis=axis, keepdims=keepdims))


def argsort(x: Any, axis: int = -1) -> Tensor:
    """k = the indices that would sort x, stably; int64, no gradient"""
    x = _checked(x, axis)
    return Tensor(namespace(x.data).argsort(x.data, axis=axis, kind="stable"))


def prod(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """y = Π x"""
    return Prod.apply(_checked(x, axis), axis=axis, keepdims=keepdims)


def cumsum(x: Any, axis: int = -1) -> Tensor:
    """yᵢ = x₀ + … + xᵢ along an axis"""
    return Cumsum.apply(_checked(x, axis), axis=axis)


def norm(x: Any, ord: float = 2, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """y = (Σ |x|ᵖ)^(1/p) for p = `ord`: 1, 2, any p > 0, or infinity (the largest |x|).

    Always of vectors: over all elements, or along the given axes.
    """
    x = as_float(_checked(x, axis))
    if ord == 2:
        return Norm.apply(x, axis=axis, keepdims=keepdims)
    magnitude = abs(x)
    if ord == 1:
        return sum(magnitude, axis, keepdims)
    if ord == math.inf:
        return max(magnitude, axis, keepdims)
    if not ord > 0:
        raise ValueError(f"norm() takes ord > 0, got {ord}")
    return sum(magnitude**ord, axis, keepdims) ** (1.0 / ord)


def _checked(x: Any, axis: Axis) -> Tensor:
    """x as a Tensor which has the axes."""
    x = as_tensor(x)
    if axis is not None:
        axes = axis if isinstance(axis, tuple) else (axis,)
        for a in axes:
            if not -x.ndim <= a < x.ndim:
                raise ValueError(f"axis {a} is out of range for a tensor of shape {x.shape}")
        if len({a % x.ndim for a in axes}) < len(axes):
            raise ValueError(f"axis {axis} names an axis twice, for a tensor of shape {x.shape}")
    return x
