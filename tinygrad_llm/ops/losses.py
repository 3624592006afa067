"""Losses on real-valued predictions and on distributions, built from other ops."""

from __future__ import annotations

from typing import Any

from tinygrad_llm.ops.convert import as_float, as_tensor
from tinygrad_llm.ops.elementwise import exp, log, where
from tinygrad_llm.ops.softmax import reduce_loss
from tinygrad_llm.tensor import Tensor


def mse_loss(x: Any, target: Any, reduction: str = "mean") -> Tensor:
    """y = (x − t)²"""
    x, t = _equal_shapes(x, target, "mse_loss")
    return reduce_loss((x - t) ** 2, reduction)


def l1_loss(x: Any, target: Any, reduction: str = "mean") -> Tensor:
    """y = |x − t|"""
    x, t = _equal_shapes(x, target, "l1_loss")
    return reduce_loss(abs(x - t), reduction)


def smooth_l1_loss(x: Any, target: Any, beta: float = 1.0, reduction: str = "mean") -> Tensor:
    """y = ½ d² / β where d = |x − t| < β, else d − ½ β"""
    if not beta > 0:
        raise ValueError(f"smooth_l1_loss() needs beta > 0, got {beta}; use l1_loss for 0")
    x, t = _equal_shapes(x, target, "smooth_l1_loss")
    d = abs(x - t)
    return reduce_loss(where(d < beta, d * d * (0.5 / beta), d - 0.5 * beta), reduction)


def kl_div(
    log_q: Any, target: Any, reduction: str = "batchmean", log_target: bool = False
) -> Tensor:
    """y = p (ln p − ln q), summed: the divergence of q from the target p (0 ln 0 = 0)

    Args:
        log_q: ln q, the model's log-probabilities (`log_softmax`)
        target: p, or ln p with `log_target`
        reduction: 'batchmean' (the sum divided by the size of the first axis: the mathematical
            mean), 'mean' (over all elements), 'sum' or 'none'
    """
    log_q, t = _equal_shapes(log_q, target, "kl_div")
    if log_target:
        losses = exp(t) * (t - log_q)
    else:
        losses = t * (log(where(t == 0, 1.0, t)) - log_q)
    if reduction == "batchmean":
        return losses.sum() * (1.0 / max(losses.shape[0] if losses.ndim else 1, 1))
    return reduce_loss(losses, reduction)


def _equal_shapes(x: Any, target: Any, name: str) -> tuple[Tensor, Tensor]:
    x = as_float(x)
    t = as_tensor(target, x).astype(x.dtype)
    if t.shape != x.shape:
        raise ValueError(
            f"{name}() needs equal shapes, got {x.shape} and {t.shape}; reshape one of them"
        )
    return x, t
