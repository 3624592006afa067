"""Ops on each element by itself: arithmetic, comparisons, exponentials, choices.

Two operands are broadcast by NumPy's rules; the gradient of an operand that was repeated is summed
over the repetitions (`sum_to`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.autograd import Function
from tinygrad_llm.backend import Array, namespace
from tinygrad_llm.ops.convert import (
    as_array,
    as_float,
    as_tensor,
    float_pair,
    narrowed,
    pair,
    widened,
)
from tinygrad_llm.ops.erf import erf_of
from tinygrad_llm.ops.shape import copy, sum_to
from tinygrad_llm.tensor import Tensor

# --- arithmetic -----------------------------------------------------------------------------------


class Binary(Function):
    """An op of two operands that are broadcast against each other."""

    shapes: tuple[tuple[int, ...], tuple[int, ...]]

    def fit(self, g: Any, i: int) -> Any:
        """g summed to the shape of operand i; None when nobody asks for it."""
        if self.parents[i] is None:
            return None
        shape = self.shapes[i]
        return g if g.shape == shape else sum_to(g, shape)


class Add(Binary):
    """y = a + b        da = g, db = g"""

    def forward(self, a: Array, b: Array) -> Array:
        self.shapes = a.shape, b.shape
        return a + b

    def backward(self, g: Any) -> Any:
        return self.fit(g, 0), self.fit(g, 1)


class Subtract(Binary):
    """y = a − b        da = g, db = −g"""

    def forward(self, a: Array, b: Array) -> Array:
        self.shapes = a.shape, b.shape
        return a - b

    def backward(self, g: Any) -> Any:
        return self.fit(g, 0), self.fit(-g, 1) if self.needs(1) else None


class Multiply(Binary):
    """y = a ⊙ b        da = g ⊙ b, db = g ⊙ a"""

    def forward(self, a: Array, b: Array) -> Array:
        self.shapes = a.shape, b.shape
        self.save(a if self.needs(1) else None, b if self.needs(0) else None)
        return a * b

    def backward(self, g: Any, a: Any, b: Any) -> Any:
        da = None if b is None else self.fit(g * b, 0)
        db = None if a is None else self.fit(g * a, 1)
        return da, db


class Divide(Binary):
    """y = a / b        da = g / b, db = −g ⊙ a / b²"""

    def forward(self, a: Array, b: Array) -> Array:
        self.shapes = a.shape, b.shape
        self.save(a if self.needs(1) else None, b)
        return a / b

    def backward(self, g: Any, a: Any, b: Any) -> Any:
        da = g / b
        return self.fit(da, 0), None if a is None else self.fit(-da * (a / b), 1)


class Negative(Function):
    """y = −x        dx = −g"""

    def forward(self, x: Array) -> Array:
        return -x

    def backward(self, g: Any) -> Any:
        return -g


class Power(Binary):
    """y = aᵇ        da = g b aᵇ⁻¹, db = g y ln a  (0 where a = 0: 0ᵇ does not move with b > 0)"""

    def forward(self, a: Array, b: Array) -> Array:
        self.shapes = a.shape, b.shape
        self.save(a, b)
        return a**b

    def backward(self, g: Any, a: Any, b: Any) -> Any:
        xp = namespace(g)
        da = self.fit(g * b * a ** (b - 1.0), 0) if self.needs(0) else None
        if not self.needs(1):
            return da, None
        zero = a == 0
        return da, self.fit(g * xp.where(zero, 0.0, a**b * xp.log(xp.where(zero, 1.0, a))), 1)


class PowerScalar(Function):
    """y = xⁿ        dx = g n xⁿ⁻¹"""

    def forward(self, x: Array, n: float) -> Array:
        self.n = n
        self.save(x)
        return narrowed(_power(x, n), x)

    def backward(self, g: Any, x: Any) -> Any:
        return g * self.n * _power(x, self.n - 1) if self.n else g * 0.0


def _power(x: Any, n: float) -> Any:
    # NumPy's general pow takes 60 ns an element; the powers that models use are products.
    if n == 1:
        return x
    if n == 2:
        return x * x
    return x * x * x if n == 3 else x**n


def add(a: Any, b: Any) -> Tensor:
    """y = a + b"""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.data.dtype is b.data.dtype):
        a, b = pair(a, b)
    return Add.apply(a, b)


def subtract(a: Any, b: Any) -> Tensor:
    """y = a − b"""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.data.dtype is b.data.dtype):
        a, b = pair(a, b)
    return Subtract.apply(a, b)


def multiply(a: Any, b: Any) -> Tensor:
    """y = a ⊙ b, element by element"""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.data.dtype is b.data.dtype):
        a, b = pair(a, b)
    return Multiply.apply(a, b)


def divide(a: Any, b: Any) -> Tensor:
    """y = a / b; integers become the default float dtype"""
    return Divide.apply(*float_pair(a, b))


def negative(x: Any) -> Tensor:
    """y = −x"""
    return Negative.apply(as_tensor(x))


def power(a: Any, b: Any) -> Tensor:
    """y = aᵇ, element by element."""
    if isinstance(b, np.integer | np.floating):
        b = b.item()  # weak, as every scalar
    if isinstance(b, int | float) and isinstance(a, Tensor):
        a = as_float(a) if isinstance(b, float) or b < 0 else pair(a, b)[0]
        if b == 1:
            return copy(a)
        return PowerScalar.apply(a, n=b)
    return Power.apply(*pair(a, b))


def square(x: Any) -> Tensor:
    """y = x²"""
    return power(as_tensor(x), 2)


# --- comparisons and logic (no gradient) ----------------------------------------------------------


def equal(a: Any, b: Any) -> Tensor:
    """y = (a = b), boolean"""
    return _compare(a, b, "equal")


def not_equal(a: Any, b: Any) -> Tensor:
    """y = (a ≠ b), boolean"""
    return _compare(a, b, "not_equal")


def less(a: Any, b: Any) -> Tensor:
    """y = (a < b), boolean"""
    return _compare(a, b, "less")


def less_equal(a: Any, b: Any) -> Tensor:
    """y = (a ≤ b), boolean"""
    return _compare(a, b, "less_equal")


def greater(a: Any, b: Any) -> Tensor:
    """y = (a > b), boolean"""
    return _compare(a, b, "greater")


def greater_equal(a: Any, b: Any) -> Tensor:
    """y = (a ≥ b), boolean"""
    return _compare(a, b, "greater_equal")


def logical_and(a: Any, b: Any) -> Tensor:
    """y = a ∧ b, boolean"""
    return _compare(a, b, "logical_and")


def logical_or(a: Any, b: Any) -> Tensor:
    """y = a ∨ b, boolean"""
    return _compare(a, b, "logical_or")


def bitwise_and(a: Any, b: Any) -> Tensor:
    """y = a & b, for booleans and integers"""
    return _compare(a, b, "bitwise_and")


def bitwise_or(a: Any, b: Any) -> Tensor:
    """y = a | b, for booleans and integers"""
    return _compare(a, b, "bitwise_or")


def _compare(a: Any, b: Any, name: str) -> Tensor:
    a, b = pair(a, b)
    return Tensor(getattr(namespace(a.data), name)(a.data, b.data))


def logical_not(x: Any) -> Tensor:
    """y = ¬x, boolean"""
    x = as_tensor(x)
    return Tensor(namespace(x.data).logical_not(x.data))


def isnan(x: Any) -> Tensor:
    """y = x is NaN, boolean"""
    x = as_tensor(x)
    return Tensor(namespace(x.data).isnan(x.data))


def isfinite(x: Any) -> Tensor:
    """y = x is neither NaN nor infinite, boolean"""
    x = as_tensor(x)
    return Tensor(namespace(x.data).isfinite(x.data))


def sign(x: Any) -> Tensor:
    """y = −1, 0 or 1; its gradient is zero wherever it exists, so none is recorded"""
    x = as_tensor(x)
    return Tensor(namespace(x.data).sign(x.data))


# --- exponentials and roots -----------------------------------------------------------------------


class Exp(Function):
    """y = eˣ        dx = g ⊙ y"""

    def forward(self, x: Array) -> Array:
        y = namespace(x).exp(x)
        self.save(y)
        return y

    def backward(self, g: Any, y: Any) -> Any:
        return g * y


class Log(Function):
    """y = ln x        dx = g / x"""

    def forward(self, x: Array) -> Array:
        self.save(x)
        return namespace(x).log(x)

    def backward(self, g: Any, x: Any) -> Any:
        return g / x


class Log1p(Function):
    """y = ln(1 + x), exact for small x        dx = g / (1 + x)"""

    def forward(self, x: Array) -> Array:
        self.save(x)
        return namespace(x).log1p(x)

    def backward(self, g: Any, x: Any) -> Any:
        return g / (1.0 + x)


class Sqrt(Function):
    """y = √x        dx = g / 2y"""

    def forward(self, x: Array) -> Array:
        y = namespace(x).sqrt(x)
        self.save(y)
        return y

    def backward(self, g: Any, y: Any) -> Any:
        return g * 0.5 / y


class Rsqrt(Function):
    """y = 1 / √x        dx = −½ g y³"""

    def forward(self, x: Array) -> Array:
        xp = namespace(x)
        y = xp.reciprocal(xp.sqrt(x))
        self.save(y)
        return y

    def backward(self, g: Any, y: Any) -> Any:
        return g * -0.5 * (y * y * y)


class Tanh(Function):
    """y = tanh x        dx = g ⊙ (1 − y²)"""

    def forward(self, x: Array) -> Array:
        y = namespace(x).tanh(x)
        self.save(y)
        return y

    def backward(self, g: Any, y: Any) -> Any:
        return g * (1.0 - y * y)


class Sigmoid(Function):
    """y = σ(x) = 1 / (1 + e⁻ˣ)        dx = g ⊙ y (1 − y)"""

    def forward(self, x: Array) -> Array:
        y = narrowed(sigmoid_of(x), x)
        self.save(y)
        return y

    def backward(self, g: Any, y: Any) -> Any:
        return g * (y * (1.0 - y))


def sigmoid_of(x: Any) -> Any:
    """σ(x) of arrays and Tensors; of half precision in float32."""
    if isinstance(x, Tensor):
        return sigmoid(x)
    with np.errstate(over="ignore"):  # e⁻ˣ = ∞ gives 0, which is right
        return 1.0 / (1.0 + namespace(x).exp(-widened(x)))


class Sin(Function):
    """y = sin x        dx = g cos x"""

    def forward(self, x: Array) -> Array:
        self.save(x)
        return namespace(x).sin(x)

    def backward(self, g: Any, x: Any) -> Any:
        return g * namespace(x).cos(x)


class Cos(Function):
    """y = cos x        dx = −g sin x"""

    def forward(self, x: Array) -> Array:
        self.save(x)
        return namespace(x).cos(x)

    def backward(self, g: Any, x: Any) -> Any:
        return -g * namespace(x).sin(x)


class Erf(Function):
    """y = erf x = 2/√π ∫₀ˣ e^(−t²) dt        dx = g 2/√π e^(−x²)"""

    def forward(self, x: Array) -> Array:
        self.save(x)
        return erf_of(x)

    def backward(self, g: Any, x: Any) -> Any:
        return g * (2.0 / math.sqrt(math.pi)) * namespace(x).exp(-(x * x))


def exp(x: Any) -> Tensor:
    """y = eˣ"""
    return Exp.apply(as_float(x))


def log(x: Any) -> Tensor:
    """y = ln x"""
    return Log.apply(as_float(x))


def log1p(x: Any) -> Tensor:
    """y = ln(1 + x)"""
    return Log1p.apply(as_float(x))


def sqrt(x: Any) -> Tensor:
    """y = √x"""
    return Sqrt.apply(as_float(x))


def rsqrt(x: Any) -> Tensor:
    """y = 1 / √x"""
    return Rsqrt.apply(as_float(x))


def tanh(x: Any) -> Tensor:
    """y = tanh x"""
    return Tanh.apply(as_float(x))


def sigmoid(x: Any) -> Tensor:
    """y = 1 / (1 + e⁻ˣ)"""
    return Sigmoid.apply(as_float(x))


def sin(x: Any) -> Tensor:
    """y = sin x"""
    return Sin.apply(as_float(x))


def cos(x: Any) -> Tensor:
    """y = cos x"""
    return Cos.apply(as_float(x))


def erf(x: Any) -> Tensor:
    """y = erf x, the error function: within 4 ulp in float64, 8 in float32"""
    return Erf.apply(as_float(x))


# --- piecewise ------------------------------------------------------------------------------------


class Abs(Function):
    """y = |x|        dx = g sign x  (0 at 0)"""

    def forward(self, x: Array) -> Array:
        self.save(x)
        return namespace(x).abs(x)

    def backward(self, g: Any, x: Any) -> Any:
        return g * namespace(x).sign(x)


class Extremum(Binary):
    """y = max(a, b) or min(a, b)        g goes to the one chosen; half to each where equal"""

    def forward(self, a: Array, b: Array, largest: bool) -> Array:
        xp = namespace(a)
        self.shapes = a.shape, b.shape
        self.save(a > b if largest else a < b, a == b)
        return xp.maximum(a, b) if largest else xp.minimum(a, b)

    def backward(self, g: Any, first: Array, tie: Array) -> Any:
        xp = namespace(g)
        half = g * 0.5
        da = xp.where(first, g, xp.where(tie, half, 0.0))
        return self.fit(da, 0), self.fit(g - da, 1)


class Clip(Function):
    """y = min(max(x, low), high)        dx = g where low ≤ x ≤ high, else 0"""

    def forward(self, x: Array, low: float | None, high: float | None) -> Array:
        inside = namespace(x).ones(x.shape, dtype=bool)
        if low is not None:
            inside &= x >= low
        if high is not None:
            inside &= x <= high
        self.save(inside)
        return narrowed(namespace(x).clip(x, low, high), x)

    def backward(self, g: Any, inside: Array) -> Any:
        return namespace(g).where(inside, g, 0.0)


class Where(Binary):
    """y = a where the condition holds, else b        da = g there, db = g elsewhere"""

    def forward(self, a: Array, b: Array, condition: Array) -> Array:
        self.shapes = a.shape, b.shape
        self.save(condition)
        return namespace(a).where(condition, a, b)

    def backward(self, g: Any, condition: Array) -> Any:
        xp = namespace(g)
        da = self.fit(xp.where(condition, g, 0.0), 0) if self.needs(0) else None
        return da, self.fit(xp.where(condition, 0.0, g), 1) if self.needs(1) else None


class MaskedFill(Function):
    """y = value where the mask is True, else x        dx = g where it is False"""

    def forward(self, x: Array, mask: Array, value: float) -> Array:
        self.save(mask)
        y = x.copy()
        namespace(x).copyto(y, x.dtype.type(value), where=mask)
        return y

    def backward(self, g: Any, mask: Array) -> Any:
        return namespace(g).where(mask, 0.0, g)


def abs(x: Any) -> Tensor:
    """y = |x|"""
    return Abs.apply(as_tensor(x))


absolute = abs  # what NumPy's ufunc is called


def maximum(a: Any, b: Any) -> Tensor:
    """y = the larger of a and b, element by element; NaN wins"""
    return Extremum.apply(*pair(a, b), largest=True)


def minimum(a: Any, b: Any) -> Tensor:
    """y = the smaller of a and b, element by element; NaN wins"""
    return Extremum.apply(*pair(a, b), largest=False)


def clip(x: Any, min: float | None = None, max: float | None = None) -> Tensor:
    """y = x held between `min` and `max`, numbers or None."""
    if min is not None and max is not None and min > max:
        raise ValueError(f"clip() needs min ≤ max, got min={min}, max={max}")
    low, high = [b.item() if isinstance(b, np.generic) else b for b in (min, max)]  # weak
    fractions = isinstance(low, float) or isinstance(high, float)
    return Clip.apply(as_float(x) if fractions else as_tensor(x), low=low, high=high)


def where(condition: Any, a: Any, b: Any) -> Tensor:
    """y = a where `condition` is True, else b; all three are broadcast."""
    a, b = pair(a, b)
    mask = as_array(condition, a.data)
    if mask.dtype != backend.bool_:
        raise TypeError(f"where() needs a boolean condition, got {mask.dtype}; compare first")
    return Where.apply(a, b, condition=mask)


def masked_fill(x: Any, mask: Any, value: float) -> Tensor:
    """y = `value` where `mask` is True, else x. The mask is boolean, broadcastable to x."""
    x = as_tensor(x)
    hidden = as_array(mask, x.data)
    if hidden.dtype != backend.bool_:
        raise TypeError(f"masked_fill() needs a boolean mask, got {hidden.dtype}; compare first")
    return MaskedFill.apply(x, mask=hidden, value=value)
