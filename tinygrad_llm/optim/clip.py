"""Gradient clipping: by the norm of all gradients together, or number by number."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from tinygrad_llm import dispatch
from tinygrad_llm.autograd import mark_written
from tinygrad_llm.backend import Array, float32, float64, namespace
from tinygrad_llm.tensor import Tensor


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> float:
    """g ← g · min(1, max_norm / (‖g‖ + 10⁻⁶)), with g all gradients as one long vector.

    The direction stays, the length is at most `max_norm`: one bad batch cannot throw the weights
    far. Call it between `backward()` and `step()`. Pascanu et al., "On the difficulty of training
    recurrent neural networks", ICML 2013; the 10⁻⁶ is PyTorch's.

    In NumPy the squares of one array are summed in its own dtype (float16 and bfloat16 in float32),
    and the arrays in float64. Where the squares leave the range of the dtype, as those of a float32
    array of norm 10²⁰ or 10⁻²⁰ do, the array is divided by its largest number first: the norm is
    inf only when a gradient is. On a GPU a kernel adds up all squares in float64 (`dispatch`). The
    host then waits for the number; `Optimizer.step_clipped` clips without that.

    Args:
        parameters: one Tensor or several; those whose grad is None are left out.
        max_norm: the largest norm allowed, ≥ 0.
        norm_type: 2, or inf for the largest absolute value.
        error_if_nonfinite: raise when the norm is NaN or infinite.

    Returns:
        ‖g‖ before clipping, a Python float. When it is NaN or infinite the gradients are left as
        they are, so that the caller can skip the step.

    Raises:
        ValueError: max_norm < 0, or another norm_type.
        RuntimeError: with `error_if_nonfinite`, saying how many gradients are at fault.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be at least 0, got {max_norm}")
    if norm_type not in (2, math.inf):
        raise ValueError(f"norm_type must be 2 or inf, got {norm_type}")
    reached = _with_gradient(parameters)
    total = _total([p.grad.data for p in reached], norm_type)
    if not math.isfinite(total):
        if error_if_nonfinite:
            raise RuntimeError(
                f"the norm of the gradients is {total}: {_bad_gradients(reached)}; lower the "
                "learning rate, or find the op with detect_anomaly()"
            )
        return total
    share = float(max_norm) / (total + 1e-6)
    if share < 1.0:
        _rewrite(reached, "clip_grad_norm_", lambda xp, g, out: xp.multiply(g, share, out=out))
    return total


def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
    """g ← min(max(g, −clip_value), clip_value), number by number; NaN stays NaN.

    Args:
        parameters: one Tensor or several; those whose grad is None are left out.
        clip_value: the largest absolute value allowed, ≥ 0.

    Raises:
        ValueError: clip_value < 0.
    """
    if not clip_value >= 0:
        raise ValueError(f"clip_value must be at least 0, got {clip_value}")
    limit = float(clip_value)
    reached = _with_gradient(parameters)
    _rewrite(reached, "clip_grad_value_", lambda xp, g, out: xp.clip(g, -limit, limit, out=out))


def _total(gradients: Sequence[Array], norm_type: float) -> float:
    """The norm of all gradients as one long vector."""
    if norm_type == 2:
        kernel = _kernel(gradients)
        if kernel is not None:
            return float(kernel.gradient_norm(gradients)[0])
        return math.hypot(*norms(gradients))
    return max(norms(gradients, norm_type), default=0.0, key=_nan_is_largest)


def _kernel(gradients: Sequence[Array]) -> Any:
    """The kernel file that adds up the squares; None for `norms`."""
    if not gradients or (type(gradients[0]) is np.ndarray and not dispatch.forced):
        return None
    return dispatch.select("gradient_norm", gradients, {}).module


def _with_gradient(parameters: Tensor | Iterable[Tensor]) -> list[Any]:
    given = [parameters] if isinstance(parameters, Tensor) else parameters
    return [p for p in given if p.grad is not None]


def norms(gradients: Sequence[Array], norm_type: float = 2.0) -> list[float]:
    """‖g‖ of each array, as `clip_grad_norm_` finds it.

    Those on a GPU are all launched before the first is waited for.
    """
    if norm_type == math.inf:
        return [float(x) for x in [_largest(g) for g in gradients]]
    squares = [_square(g) for g in gradients]
    return [_root(float(square), g) for square, g in zip(squares, gradients, strict=True)]


def _square(g: Array) -> Any:
    wide = _at_least_float32(g)
    return namespace(wide).vdot(wide, wide)


def _root(square: float, g: Array) -> float:
    """√square; computed anew where ‖g‖² does not fit into the dtype it was summed in."""
    limits = np.finfo(float64 if g.dtype == float64 else float32)
    if limits.tiny / limits.eps < square < math.inf:
        return math.sqrt(square)
    scale = float(_largest(g))
    if scale == 0.0 or not math.isfinite(scale):
        return scale
    return scale * math.sqrt(float(_square(_at_least_float32(g) / scale)))


def _at_least_float32(g: Array) -> Array:
    return g.astype(float32) if g.dtype.itemsize < 4 else g


def _largest(g: Array) -> Any:
    """max |gᵢ|, NaN if any is; no array of absolute values is made."""
    g = _at_least_float32(g)  # ml_dtypes warns of a NaN in bfloat16
    return namespace(g).maximum(g.max(), -g.min()) if g.size else 0.0


def _nan_is_largest(norm: float) -> float:
    return math.inf if math.isnan(norm) else norm


def _bad_gradients(reached: list[Any]) -> str:
    found = norms([p.grad.data for p in reached])
    bad = [p.shape for p, norm in zip(reached, found, strict=True) if not math.isfinite(norm)]
    if not bad:
        return "each is finite, all together leave the range of float32"
    return f"{len(bad)} of {len(found)} gradients hold NaN or infinity, the first of shape {bad[0]}"


def _rewrite(reached: list[Any], by: str, write: Callable[[Any, Array, Array], Any]) -> None:
    """write(xp, g, out) for every gradient g; out is g where its memory is its own, else new.

    After `backward(create_graph=True)` gradients may share memory, with each other or with the
    graph; writing in place would then clip one of them twice.
    """
    users = Counter(_owner(p.grad.data) for p in reached)
    for p in reached:
        g = p.grad.data
        if p.grad.node is None and g.base is None and users[_owner(g)] == 1:
            write(namespace(g), g, g)
            mark_written(g, by)
        else:
            p.grad = Tensor(namespace(g).empty_like(g))
            write(namespace(g), g, p.grad.data)


def _owner(array: Array) -> int:
    return id(array if array.base is None else array.base)
