"""Normalisation over the last axes: layer norm and its cheaper sibling."""

from __future__ import annotations

from typing import Any

from tinygrad_llm.autograd import Function
from tinygrad_llm.backend import Array, namespace
from tinygrad_llm.ops.convert import as_float, as_tensor, narrowed, widened
from tinygrad_llm.ops.linalg import column_sum
from tinygrad_llm.ops.shape import copy
from tinygrad_llm.tensor import Tensor


class LayerNorm(Function):
    """y = x̂ ⊙ w + b, x̂ = (x − μ) / σ, σ = √(var(x) + ε)

    dx = (ĝ − mean(ĝ) − x̂ mean(ĝ ⊙ x̂)) / σ with ĝ = g ⊙ w;  dw = Σ g ⊙ x̂, db = Σ g over rows

    On rows: x (N, C), w and b (C,) or absent.
    """

    def forward(
        self, x: Array, w: Array | None = None, b: Array | None = None, *, eps: float
    ) -> Array:
        self.eps, self.has = eps, (w is not None, b is not None)
        xhat, rstd = _standardise(x, eps)
        self.save(x, w)
        self.keep((xhat, rstd))
        y = xhat if w is None else xhat * w
        return narrowed(y if b is None else y + b, x)

    def backward(self, g: Any, x: Any, w: Any = None) -> Any:
        xhat, rstd = self.kept or _standardise(x, self.eps)
        gw = g if w is None else g * w
        dx = None
        if self.needs(0):
            mean_g = gw.mean(axis=1, keepdims=True)
            mean_gx = (gw * xhat).mean(axis=1, keepdims=True)
            dx = (gw - mean_g - xhat * mean_gx) * rstd
        has_w, has_b = self.has
        dw = (column_sum(g * xhat) if self.needs(1) else None,) if has_w else ()
        db = (column_sum(g) if self.needs(1 + has_w) else None,) if has_b else ()
        return (dx, *dw, *db)


def _standardise(x: Any, eps: float) -> Any:
    """x̂ and 1/σ of rows; of Tensors it is recorded, for the second order."""
    x = widened(x)
    xhat = x - x.mean(axis=1, keepdims=True)
    variance = (xhat * xhat).mean(axis=1, keepdims=True)
    rstd = 1.0 / namespace(x).sqrt(variance + eps)
    return xhat * rstd, rstd


class RMSNorm(Function):
    """y = x̂ ⊙ w, x̂ = x / r, r = √(mean(x²) + ε)

    dx = (ĝ − x̂ mean(ĝ ⊙ x̂)) / r with ĝ = g ⊙ w;  dw = Σ g ⊙ x̂ over rows
    """

    def forward(self, x: Array, w: Array | None = None, *, eps: float) -> Array:
        self.eps = eps
        xhat, inverse = _scale_by_rms(x, eps)
        self.save(x, w)
        self.keep((xhat, inverse))
        return narrowed(xhat if w is None else xhat * w, x)

    def backward(self, g: Any, x: Any, w: Any = None) -> Any:
        xhat, inverse = self.kept or _scale_by_rms(x, self.eps)
        gw = g if w is None else g * w
        dx = (gw - xhat * (gw * xhat).mean(axis=1, keepdims=True)) * inverse
        return dx if w is None else (dx, column_sum(g * xhat))


def _scale_by_rms(x: Any, eps: float) -> Any:
    x = widened(x)
    inverse = 1.0 / namespace(x).sqrt((x * x).mean(axis=1, keepdims=True) + eps)
    return x * inverse, inverse


def layer_norm(x: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    """y = (x − μ) / √(var + ε) ⊙ w + b over the last axes: as many as `weight` has, or one.

    Args:
        x: (…, C)
        weight, bias: (C,), or None for 1 and 0

    Ba, Kiros, Hinton, "Layer Normalization", 2016.
    """
    x = as_float(x)
    parameters = _parameters(x, weight, bias)
    shape = parameters[0].shape if parameters else x.shape[-1:]
    width = _width(x, shape, "layer_norm")
    if parameters and parameters[-1].shape != shape:
        raise ValueError(
            f"layer_norm() needs one shape of weight and bias, got {shape} and "
            f"{parameters[-1].shape}"
        )
    if width == 0:
        return copy(x)
    rows = x.reshape((x.size // width, width))
    flat = [p.reshape((width,)) for p in parameters]
    if weight is None and bias is not None:
        return LayerNorm.apply(rows, eps=float(eps)).reshape(x.shape) + parameters[0]
    return LayerNorm.apply(rows, *flat, eps=float(eps)).reshape(x.shape)


def rms_norm(x: Any, weight: Any = None, eps: float = 1e-6) -> Tensor:
    """y = x / √(mean(x²) + ε) ⊙ w over the last axes: as many as `weight` has, or one.

    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    x = as_float(x)
    parameters = _parameters(x, weight)
    shape = parameters[0].shape if parameters else x.shape[-1:]
    width = _width(x, shape, "rms_norm")
    if width == 0:
        return copy(x)
    rows = x.reshape((x.size // width, width))
    flat = [p.reshape((width,)) for p in parameters]
    return RMSNorm.apply(rows, *flat, eps=float(eps)).reshape(x.shape)


def _parameters(x: Tensor, *values: Any) -> list[Tensor]:
    return [as_tensor(v, x).astype(x.dtype) for v in values if v is not None]


def _width(x: Tensor, shape: tuple[int, ...], name: str) -> int:
    """How many elements are normalised together."""
    if x.ndim == 0 or not shape or x.shape[-len(shape) :] != shape:
        raise ValueError(f"{name}() needs x whose last axes are {shape}, got {x.shape}")
    width = 1
    for n in shape:
        width *= n
    return width
