"""The last layer and the loss as one op: the logits, a model's largest array, never exist whole."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_llm import dispatch
from tinygrad_llm.backend import Array, as_dtype, namespace
from tinygrad_llm.ops import bounds
from tinygrad_llm.ops.convert import as_tensor, float_pair, narrowed, widened
from tinygrad_llm.ops.linalg import column_sum
from tinygrad_llm.ops.softmax import (
    RowLosses,
    class_weights,
    counted_targets,
    mean_share,
    softmax,
)
from tinygrad_llm.tensor import Tensor

# Logits of a chunk: dW is read and written once for each, which many rows must be worth.
_LOGITS = 2**24


class LinearCrossEntropy(RowLosses):
    """y = s Σᵢ crossentropy(zᵢ, tᵢ), z = x Wᵀ + b, s = 1, or 1 / Σ w_t for the mean

    dz = s (softmax(z) Σ q − q);  dx = g dz W,  dW = g dzᵀ x,  db = g Σ dz

    q is that of `CrossEntropy`. The logits z are made some rows at a time and turned into dz while
    they are there, in the forward: to make them again in the backward would be a fourth product of
    their size. What is kept instead, dx and dW, the backward has to allocate anyway.
    """

    kernel = "linear_cross_entropy"

    def forward(self, x: Array, w: Array, b: Array | None = None, **options: Any) -> Array:
        chunk = self._remember(x, w, b, **options) or max(64, _LOGITS // max(1, len(w)))
        share = self._share(widened(w).dtype)
        weight, bias = widened(w), None if b is None else widened(b)
        self.keep(self._zeros(x, weight))
        total = namespace(x).zeros((), dtype=weight.dtype)
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            z = widened(x[rows]) @ weight.T
            if bias is not None:
                z += bias
            losses = self.losses(z, self.target[rows])
            total += namespace(x).where(self.counted[rows], losses, 0).sum()
            self._add_gradients(rows, share, z, x, weight)
        return namespace(x).asarray(total * share).astype(self.dtype)

    def backward(self, g: Any, x: Any, w: Any, b: Any) -> Any:
        if isinstance(g, Tensor):
            found = self._recorded_gradients(g, x, w, b)
        else:
            like = (x, w, b)
            found = [d if d is None else narrowed(g * d, like[i]) for i, d in enumerate(self.kept)]
        return tuple(found[:2]) if b is None else tuple(found)

    def forward_kernel(
        self, kernel: Any, x: Array, w: Array, b: Array | None = None, **options: Any
    ) -> tuple[Array, Any]:
        chunk = self._remember(x, w, b, **options)
        y, saved = kernel.linear_forward(
            *(x, w, self.target, self.counted, b, self.class_weight),
            smoothing=self.smoothing,
            reduction=self.reduction,
            chunk=chunk,
            product=_product,
            gradients=bool(self.parents),
        )
        return y.astype(self.dtype, copy=False), saved

    def backward_kernel(self, kernel: Any, g: Array, *saved: Any) -> Any:
        dx, dw, db = kernel.linear_backward(g.reshape(1), *saved)
        return (dx, dw) if db is None else (dx, dw, db)

    def _remember(
        self,
        x: Array,
        w: Array,
        b: Array | None,
        *,
        target: Array,
        counted: Array,
        class_weight: Array | None,
        smoothing: float,
        reduction: str,
        chunk: int | None,
        dtype: np.dtype,
    ) -> int | None:
        self.target, self.counted, self.reduction = target, counted, reduction
        self.class_weight, self.smoothing, self.dtype = class_weight, smoothing, dtype
        self.save(x, w, b)
        return chunk

    def _share(self, dtype: Any) -> Any:
        if self.reduction == "sum":
            return dtype.type(1.0)
        share = mean_share(self.target, self.counted, self.class_weight, dtype)
        return dtype.type(share) if isinstance(share, float) else share

    def _zeros(self, x: Array, w: Array) -> list[Array | None]:
        """Where dx, dW and db go, those that are needed."""
        shapes = (x.shape, w.shape, w.shape[:1])[: max(2, len(self.parents))]
        zeros = namespace(x).zeros
        return [zeros(s, dtype=w.dtype) if self.needs(i) else None for i, s in enumerate(shapes)]

    def _add_gradients(self, rows: slice, share: Any, z: Array, x: Array, w: Array) -> None:
        dx, dw, *db = self.kept
        if not any(self.needs(i) for i in range(len(self.parents))):
            return
        counts = self.counted[rows] * share
        dz = self.gradient(counts, z, self.target[rows])
        if dx is not None:
            dx[rows] = dz @ w
        if dw is not None:
            dw += dz.T @ widened(x[rows])
        if db and db[0] is not None:
            db[0] += column_sum(dz)

    def _recorded_gradients(self, g: Tensor, x: Tensor, w: Tensor, b: Tensor | None) -> list[Any]:
        """The same with all logits at once, in ops on Tensors, for the second order."""
        z = x @ w.T if b is None else x @ w.T + b
        q = self.soft_target(z.data, self.target)
        counts = self.counted[:, None] * self._share(z.dtype)
        dz = g * counts * (softmax(z, axis=1) * q.sum(axis=1, keepdims=True) - q)
        return [dz @ w, dz.T @ x, column_sum(dz)]


def _product(a: Array, b: Array, *, dtype: Any = None) -> Array:
    """a b on what multiplies matrices here: kernels/matmul.py, or cuBLAS."""
    module = dispatch.select("matmul", (a, b), {}).module
    if module is not None:
        return module.matmul(a, b, dtype=dtype)
    y = a @ b
    return y if dtype is None else y.astype(dtype, copy=False)


def linear_cross_entropy(
    x: Any,
    linear_weight: Any,
    target: Any,
    linear_bias: Any = None,
    weight: Any = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    chunk: int | None = None,
    dtype: Any = None,
) -> Tensor:
    """y = cross_entropy(linear(x, W, b), target), with `chunk` rows of logits at a time

    For many classes: the logits of a language model, with their gradient, outweigh the rest of it.
    On a CPU it is no faster than the two ops, and takes less memory.

    Args:
        x: (…, D) hidden states.
        linear_weight, linear_bias: (C, D) and (C,) of the last layer; without a bias, None.
        target: (…) integer classes in 0 … C − 1.
        weight: (C,) a weight per class, a constant.
        ignore_index: rows with this target count for nothing.
        reduction: 'mean' (by the weights of the counted targets; 0 where none counts) or 'sum'.
        label_smoothing: ε in [0, 1): the target becomes (1 − ε) onehot(t) + ε/C.
        chunk: rows of logits at a time; left out, as many as 2²⁴ logits hold (on a GPU 2²⁶).
        dtype: of the loss, by default that of x; see `cross_entropy`.

    Raises:
        ValueError: shapes that do not fit, or a class out of range.

    Hsu et al., "Liger Kernel: efficient Triton kernels for LLM training", 2024, section 3.2.
    """
    x, w = float_pair(x, linear_weight)
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"reduction is 'mean' or 'sum' for linear_cross_entropy(), got {reduction!r}; "
            "cross_entropy(linear(…)) also gives a loss for each row"
        )
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"a chunk has at least one row, got {chunk}")
    if x.ndim == 0 or w.ndim != 2 or x.shape[-1] != w.shape[1]:
        raise ValueError(
            f"linear_cross_entropy() takes x (…, D) and a weight (C, D), got {x.shape} and "
            f"{w.shape}"
        )
    labels = target if isinstance(target, Tensor) else Tensor(bounds.as_ids(target, x.data))
    classes = w.shape[0]
    if labels.dtype.kind not in "iu" or labels.shape != x.shape[:-1]:
        raise ValueError(
            f"linear_cross_entropy() takes integer targets {x.shape[:-1]}, got {labels.dtype}"
            f"{labels.shape}"
        )
    inputs = [x.reshape((labels.size, x.shape[-1])), w]
    if linear_bias is not None:
        bias = as_tensor(linear_bias).astype(x.dtype)
        if bias.shape != (classes,):
            raise ValueError(
                f"linear_cross_entropy() needs a bias of shape ({classes},), got {bias.shape}"
            )
        inputs.append(bias)
    safe, counted = counted_targets(labels.data.reshape(-1), classes, ignore_index)
    return LinearCrossEntropy.apply(
        *inputs,
        target=safe,
        counted=counted,
        class_weight=class_weights(weight, classes, x),
        smoothing=float(label_smoothing),
        reduction=reduction,
        chunk=chunk,
        dtype=x.dtype if dtype is None else as_dtype(dtype),
    )
