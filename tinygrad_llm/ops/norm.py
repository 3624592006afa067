"""Normalisation over the last axes: layer norm and its cheaper sibling."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

from tinygrad_llm.autograd import Function
from tinygrad_llm.backend import Array, namespace, over_rows
from tinygrad_llm.ops.convert import as_float, as_tensor, narrowed, widened
from tinygrad_llm.ops.linalg import column_sum, row_dot, row_mean
from tinygrad_llm.ops.shape import copy
from tinygrad_llm.tensor import Tensor


class LayerNorm(Function):
    """y = x̂ ⊙ w + b, x̂ = (x − μ) r, r = 1 / √(var(x) + ε)

    dx = r (ĝ − mean(ĝ) − x̂ mean(ĝ ⊙ x̂)) with ĝ = g ⊙ w;  dw = Σ g ⊙ x̂, db = Σ g over rows

    On rows: x (N, C), w and b (C,) or absent. x̂ is not kept, nor even computed: what varies by
    row and by column comes as a thin product, r wᵀ, from BLAS, and x̂ ⊙ w = x ⊙ r wᵀ − (μ r) wᵀ.
    """

    kernel = "layer_norm"

    def forward(
        self, x: Array, w: Array | None = None, b: Array | None = None, *, eps: float
    ) -> Array:
        self.eps, self.has = eps, (w is not None, b is not None)
        self.save(x, w)
        y = namespace(x).empty(x.shape, dtype=x.dtype)

        def compute(rows: slice) -> None:
            y[rows] = _layer_norm(widened(x[rows]), w, b, eps)

        over_rows(compute, x)
        return y

    def backward(self, g: Any, x: Any, w: Any = None) -> Any:
        gradient = _recorded_gradient if isinstance(g, Tensor) else _layer_norm_gradient
        dx, dw, db = _in_blocks(gradient, g, x, w, self.eps)
        has_w, has_b = self.has
        return (dx, *(dw,) * has_w, *(db,) * has_b)

    def forward_kernel(
        self, kernel: Any, x: Array, w: Array | None = None, b: Array | None = None, *, eps: float
    ) -> tuple[Array, Any]:
        self.eps, self.has = eps, (w is not None, b is not None)
        self.save(x, w)
        return kernel.forward(x, w, b, eps=eps)

    def backward_kernel(self, kernel: Any, g: Array, *saved: Any) -> Any:
        dx, dw, db = kernel.backward(g, *saved, eps=self.eps)
        has_w, has_b = self.has
        return (dx, *(dw,) * has_w, *(db,) * has_b)


def _layer_norm(x: Array, w: Array | None, b: Array | None, eps: float) -> Array:
    x, mean, rstd = _statistics(x, eps)
    xp = namespace(x)
    by_row = xp.concatenate((rstd, -mean * rstd, xp.ones_like(rstd)), axis=1)  # (N, 3)
    by_column = xp.zeros((2, 3, x.shape[1]), dtype=x.dtype)  # r wᵀ is by_row @ by_column[0] …
    by_column[0, 0] = by_column[1, 1] = 1.0 if w is None else w
    if b is not None:
        by_column[1, 2] = b
    y = by_row @ by_column[0]
    y *= x
    y += by_row @ by_column[1]  # … and −μ r wᵀ + b is by_row @ by_column[1]
    return y


def _layer_norm_gradient(g: Any, x: Any, w: Any, eps: float) -> tuple[Any, Any, Any]:
    """With t = g ⊙ x:  Σ ĝ = g w and Σ ĝ ⊙ x̂ = r (t w − μ g w) by row, Σ g ⊙ x̂ by column."""
    g = widened(g)
    x, mean, rstd = _statistics(widened(x), eps)
    xp, n = namespace(x), x.shape[1]
    w = xp.ones(n, dtype=x.dtype) if w is None else widened(w)
    t = g * x
    along_g, along_t = (g @ w)[:, None], (t @ w)[:, None]
    share = rstd * (along_t - mean * along_g) * (1.0 / n)  # mean(ĝ ⊙ x̂)
    outer = xp.concatenate((rstd, xp.zeros_like(rstd)), axis=1)
    dx = outer @ xp.stack((w, xp.zeros_like(w)))  # r wᵀ; with one column NumPy would not ask BLAS
    dx *= g
    dx += x * (-rstd * rstd * share)
    dx += rstd * (rstd * share * mean - along_g * (1.0 / n))
    dw, db = xp.concatenate((-mean * rstd, xp.ones_like(rstd)), axis=1).T @ g
    dw += rstd[:, 0] @ t
    return dx, dw, db


def _statistics(x: Array, eps: float) -> tuple[Array, Array, Array]:
    """x, its mean by row, and 1 / √(var + ε): var = mean(x²) − μ², in one pass each.

    Where the mean is large that difference would lose digits: then x comes back less its mean.
    """
    xp, n = namespace(x), x.shape[1]
    mean = row_mean(x)
    variance = row_dot(x, x) * (1.0 / n) - mean * mean
    if not bool((mean * mean <= 16.0 * variance).all()):
        x = x - mean
        x -= row_mean(x)  # the mean itself was rounded
        mean = xp.zeros_like(mean)
        variance = row_dot(x, x) * (1.0 / n)
    return x, mean, 1.0 / xp.sqrt(variance + eps)


def _recorded_gradient(g: Any, x: Any, w: Any, eps: float) -> tuple[Any, Any, Any]:
    """The same in plain ops on Tensors, for the second order."""
    centred = x - row_mean(x)
    variance = row_dot(centred, centred) * (1.0 / x.shape[1])
    rstd = 1.0 / namespace(x).sqrt(variance + eps)
    xhat, gw = centred * rstd, g if w is None else g * w
    dx = (gw - row_mean(gw) - xhat * (row_dot(gw, xhat) * (1.0 / x.shape[1]))) * rstd
    return dx, column_sum(g * xhat), column_sum(g)


class RMSNorm(Function):
    """y = x̂ ⊙ w, x̂ = x / r, r = √(mean(x²) + ε)

    dx = (ĝ − x̂ mean(ĝ ⊙ x̂)) / r with ĝ = g ⊙ w;  dw = Σ g ⊙ x̂ over rows
    """

    kernel = "rms_norm"

    def forward(self, x: Array, w: Array | None = None, *, eps: float) -> Array:
        self.eps = eps
        self.save(x, w)
        y = namespace(x).empty(x.shape, dtype=x.dtype)

        def compute(rows: slice) -> None:
            xhat, _ = _scale_by_rms(x[rows], eps)
            y[rows] = xhat if w is None else xhat * w

        over_rows(compute, x)
        return y

    def backward(self, g: Any, x: Any, w: Any = None) -> Any:
        dx, dw = _in_blocks(_rms_norm_gradient, g, x, w, self.eps)
        return dx if w is None else (dx, dw)

    def forward_kernel(
        self, kernel: Any, x: Array, w: Array | None = None, *, eps: float
    ) -> tuple[Array, Any]:
        self.eps = eps
        self.save(x, w)
        return kernel.forward(x, w, eps=eps, rms=True)

    def backward_kernel(self, kernel: Any, g: Array, *saved: Any) -> Any:
        dx, dw, _ = kernel.backward(g, *saved, eps=self.eps, rms=True)
        return dx if dw is None else (dx, dw)


def _rms_norm_gradient(g: Any, x: Any, w: Any, eps: float) -> tuple[Any, Any]:
    g, (xhat, inverse) = widened(g), _scale_by_rms(x, eps)
    gw = g if w is None else g * w
    dx = (gw - xhat * (row_dot(gw, xhat) * (1.0 / x.shape[1]))) * inverse
    return dx, column_sum(g * xhat)


def _scale_by_rms(x: Any, eps: float) -> Any:
    x = widened(x)
    inverse = 1.0 / namespace(x).sqrt(row_dot(x, x) * (1.0 / x.shape[1]) + eps)
    return x * inverse, inverse


def _in_blocks(
    gradient: Callable[..., tuple[Any, ...]], g: Any, x: Any, w: Any, eps: float
) -> tuple[Any, ...]:
    """gradient(g, x, w, eps): dx, and sums over rows. Of arrays, a block of rows at a time."""
    if isinstance(g, Tensor):
        return gradient(g, x, w, eps)
    dx = namespace(x).empty(x.shape, dtype=x.dtype)

    def compute(rows: slice) -> list[Array]:
        dx[rows], *sums = gradient(g[rows], x[rows], w, eps)
        return sums

    sums = [
        functools.reduce(operator.add, parts) for parts in zip(*over_rows(compute, x), strict=True)
    ]
    return (dx, *[narrowed(total, x) for total in sums])


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
