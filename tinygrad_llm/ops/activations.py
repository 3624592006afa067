"""Activations: the bends between linear layers, without which many would be one.

Formulas of several steps are computed a block at a time, in the cache (`backend.blockwise`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tinygrad_llm.autograd import Function
from tinygrad_llm.backend import Array, blockwise, namespace
from tinygrad_llm.ops.convert import as_float, as_tensor, float_pair, narrowed, widened
from tinygrad_llm.ops.elementwise import sigmoid_of
from tinygrad_llm.ops.erf import erf_of
from tinygrad_llm.tensor import Tensor


class _Activation(Function):
    """What those with a kernel share: its file knows them by the name of their row."""

    def forward_kernel(self, kernel: Any, x: Array) -> tuple[Array, Any]:
        self.save(x)
        return kernel.forward(x, kind=self.kernel)

    def backward_kernel(self, kernel: Any, g: Array, *saved: Any) -> Array:
        return kernel.backward(g, *saved, kind=self.kernel)


class Relu(_Activation):
    """y = max(x, 0)        dx = g where y > 0, else 0"""

    kernel = "relu"

    def forward(self, x: Array) -> Array:
        y = namespace(x).maximum(x, x.dtype.type(0))
        self.save(y)
        return y

    def backward(self, g: Any, y: Any) -> Any:
        return g * (y > 0)

    def forward_kernel(self, kernel: Any, x: Array) -> tuple[Array, Any]:
        y, _ = kernel.forward(x, kind="relu")
        self.save(y)
        return y, (y,)  # which is positive where x is, so that x need not stay


class Gelu(_Activation):
    """y = x Φ(x), Φ(x) = ½ (1 + erf(x/√2))        dx = g (Φ + x φ), φ = Φ′ = e^(−x²/2) / √2π"""

    kernel = "gelu"

    def forward(self, x: Array) -> Array:
        self.save(x)
        return blockwise(_gelu, x)

    def backward(self, g: Any, x: Any) -> Any:
        return _each(_gelu_gradient, g, x)


def _gelu(x: Array) -> Array:
    return narrowed(x * _normal_cdf(x), x)


def _gelu_gradient(g: Any, x: Any) -> Any:
    x = widened(x)
    density = namespace(x).exp(-0.5 * (x * x)) * (1.0 / math.sqrt(2.0 * math.pi))
    return narrowed(g * (_normal_cdf(x) + x * density), g)


def _each(gradient: Callable[..., Any], g: Any, x: Any) -> Any:
    """gradient(g, x), in blocks where they are arrays."""
    return gradient(g, x) if isinstance(g, Tensor) else blockwise(gradient, g, x)


def _normal_cdf(x: Any) -> Any:
    erf = namespace(x).erf if isinstance(x, Tensor) else erf_of
    return 0.5 * (1.0 + erf(x * math.sqrt(0.5)))


_C0, _C1 = math.sqrt(2.0 / math.pi), 0.044715


class GeluTanh(_Activation):
    """y = x s, s = ½ (1 + tanh u), u = √(2/π) (x + 0.044715 x³)

    dx = g (s + 2 x s (1 − s) u′), u′ = √(2/π) (1 + 0.134145 x²)
    """

    kernel = "gelu_tanh"

    def forward(self, x: Array) -> Array:
        self.save(x)
        return blockwise(_gelu_tanh, x)

    def backward(self, g: Any, x: Any) -> Any:
        return _each(_gelu_tanh_gradient, g, x)


def _gelu_tanh(x: Array) -> Array:
    y = _gelu_gate(widened(x))
    y *= x
    return narrowed(y, x)


def _gelu_tanh_gradient(g: Any, x: Any) -> Any:
    x = widened(x)
    s = _gelu_gate(x)
    if isinstance(g, Tensor):
        return g * (s + 2.0 * x * (_C0 + (3.0 * _C0 * _C1) * (x * x)) * (s - s * s))
    slope = x * x
    slope *= 6.0 * _C0 * _C1
    slope += 2.0 * _C0
    slope *= x
    rest = 1.0 - s
    rest *= slope
    rest += 1.0
    rest *= s  # s + 2 x u′ (s − s²) = s (1 + 2 x u′ (1 − s))
    return narrowed(g * rest, g)


def _gelu_gate(x: Any) -> Any:
    u = x * x
    if isinstance(x, Tensor):
        return 0.5 + 0.5 * (x * (_C0 + (_C0 * _C1) * u)).tanh()
    u *= _C0 * _C1
    u += _C0
    u *= x
    namespace(x).tanh(u, out=u)
    u *= 0.5
    u += 0.5
    return u


class Silu(_Activation):
    """y = x σ(x)        dx = g (σ + x σ (1 − σ))"""

    kernel = "silu"

    def forward(self, x: Array) -> Array:
        self.save(x)
        return blockwise(_silu, x)

    def backward(self, g: Any, x: Any) -> Any:
        return _each(_silu_gradient, g, x)


def _silu(x: Array) -> Array:
    return narrowed(x * sigmoid_of(x), x)


def _silu_gradient(g: Any, x: Any) -> Any:
    s = sigmoid_of(x)
    return narrowed(g * (s + x * (s - s * s)), g)


class SwiGLU(Function):
    """y = a(x) ⊙ u, a(x) = x σ(x)        dx = g ⊙ u ⊙ (σ + x σ (1 − σ)), du = g ⊙ a(x)"""

    kernel = "swiglu"

    def forward(self, x: Array, u: Array) -> Array:
        self.save(x, u)
        return blockwise(_swiglu, x, u)

    def backward(self, g: Any, x: Any, u: Any) -> Any:
        if isinstance(g, Tensor):
            return _silu_gradient(g * u, x), g * silu(x)
        return blockwise(_gate_gradient, g, x, u), blockwise(_swiglu, x, g)

    def forward_kernel(self, kernel: Any, x: Array, u: Array) -> tuple[Array, Any]:
        self.save(x, u)
        return kernel.forward(x, u, kind="silu")

    def backward_kernel(self, kernel: Any, g: Array, *saved: Any) -> Any:
        return kernel.backward(g, *saved, kind="silu")


def _swiglu(x: Array, u: Array) -> Array:
    y = widened(x) * sigmoid_of(x)
    y *= u
    return narrowed(y, x)


def _gate_gradient(g: Array, x: Array, u: Array) -> Array:
    return narrowed(_silu_gradient(widened(g) * u, widened(x)), g)


class Softplus(Function):
    """y = ln(1 + eˣ) = max(x, 0) + ln(1 + e^(−|x|))        dx = g σ(x)"""

    def forward(self, x: Array) -> Array:
        xp = namespace(x)
        self.save(x)
        return xp.maximum(x, x.dtype.type(0)) + xp.log1p(xp.exp(-xp.abs(x)))

    def backward(self, g: Any, x: Any) -> Any:
        return narrowed(g * sigmoid_of(x), g)


def relu(x: Any) -> Tensor:
    """y = max(x, 0); the gradient at 0 is 0"""
    return Relu.apply(as_tensor(x))


def gelu(x: Any, approximate: str = "none") -> Tensor:
    """y = x Φ(x) exactly, or with approximate="tanh" the form that GPT-2 uses.

    Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu(): approximate is 'none' or 'tanh', got {approximate!r}")
    return (GeluTanh if approximate == "tanh" else Gelu).apply(as_float(x))


def silu(x: Any) -> Tensor:
    """y = x σ(x), also called swish"""
    return Silu.apply(as_float(x))


def swiglu(gate: Any, up: Any) -> Tensor:
    """y = silu(gate) ⊙ up: the gated unit in the MLP of Llama, as one op.

    Both have one shape; where one product makes them side by side, `swiglu(*ops.chunk(x, 2, -1))`.
    Shazeer, "GLU variants improve Transformer", 2020.
    """
    gate, up = float_pair(gate, up)
    if gate.shape != up.shape:
        raise ValueError(f"swiglu() needs two tensors of one shape, got {gate.shape}, {up.shape}")
    return SwiGLU.apply(gate, up)


def softplus(x: Any) -> Tensor:
    """y = ln(1 + eˣ), a smooth max(x, 0)"""
    return Softplus.apply(as_float(x))
