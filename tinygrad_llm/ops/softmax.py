"""softmax, its logarithm, and the losses that stand on it."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from tinygrad_llm.autograd import Function
from tinygrad_llm.backend import Array, as_dtype, float32, is_float, namespace, over_rows, promote
from tinygrad_llm.ops import bounds
from tinygrad_llm.ops.activations import softplus
from tinygrad_llm.ops.convert import as_array, as_float, as_tensor, narrowed, widened
from tinygrad_llm.ops.reduce import Reduction, kept_shape, sum_of
from tinygrad_llm.tensor import Axis, Tensor


class Softmax(Function):
    """y = eˣ / Σ eˣ        dx = y ⊙ (g − Σ g ⊙ y)

    The largest x is subtracted first, which changes nothing and lets no exponential overflow. A
    row of −∞ everywhere gives zeros.
    """

    kernel = "softmax"

    def forward(self, x: Array, axis: int) -> Array:
        self.axis = axis
        y = softmax_of(x, axis)
        self.save(y)
        return y

    def backward(self, g: Any, y: Any) -> Any:
        if isinstance(g, Tensor):
            return y * (g - (g * y).sum(axis=self.axis, keepdims=True))
        wide = widened(y)
        dx = g * wide
        dx -= wide * sum_of(dx, self.axis, True)
        return narrowed(dx, y)

    def forward_kernel(self, kernel: Any, x: Array, axis: int) -> tuple[Array, Any]:
        self.axis = axis
        y, _ = kernel.forward(_axis_last(x, axis))
        y = _axis_back(y, axis)
        self.save(y)
        return y, (y,)

    def backward_kernel(self, kernel: Any, g: Array, y: Array) -> Array:
        dx = kernel.backward(_axis_last(g, self.axis), _axis_last(y, self.axis))
        return _axis_back(dx, self.axis)


def _axis_last(x: Array, axis: int) -> Array:
    """A view with `axis` where the kernels have theirs; x itself when it is there."""
    return x if axis in (-1, x.ndim - 1) else namespace(x).moveaxis(x, axis, -1)


def _axis_back(x: Array, axis: int) -> Array:
    return x if axis in (-1, x.ndim - 1) else namespace(x).moveaxis(x, -1, axis)


def softmax_of(x: Array, axis: int, out: Array | None = None) -> Array:
    """eˣ / Σ eˣ of an array; `out` may be x itself."""
    if x.size == 0:
        return x.copy() if out is None else out
    xp = namespace(x)
    if x.dtype.itemsize == 2:  # the sum may be more than float16 holds
        y = narrowed(softmax_of(widened(x), axis), x)
        if out is None:
            return y
        out[...] = y
        return out
    y = xp.subtract(x, finite_max(x, axis), out=out)
    xp.exp(y, out=y)
    total = sum_of(y, axis, True)
    y /= xp.where(total == 0, 1, total).astype(y.dtype, copy=False)
    return y


def finite_max(x: Array, axis: Axis) -> Array:
    """max x, but 0 where it is −∞ (nothing to subtract: −∞ − −∞ would be NaN)."""
    if x.size == 0:
        return namespace(x).zeros(kept_shape(x.shape, axis), dtype=x.dtype)
    m = x.max(axis=axis, keepdims=True)
    return namespace(x).where(m == -np.inf, x.dtype.type(0), m)


class LogSoftmax(Function):
    """y = x − ln Σ eˣ        dx = g − e^y Σ g"""

    kernel = "log_softmax"

    def forward(self, x: Array, axis: int) -> Array:
        self.axis = axis
        xp, wide = namespace(x), widened(x)
        y = wide - finite_max(wide, axis)
        total = xp.exp(y).sum(axis=axis, keepdims=True)
        y -= xp.log(xp.where(total == 0, y.dtype.type(1), total))
        y = narrowed(y, x)
        self.save(y)
        return y

    def backward(self, g: Any, y: Any) -> Any:
        return narrowed(g - namespace(g).exp(widened(y)) * sum_of(g, self.axis, True), y)

    def forward_kernel(self, kernel: Any, x: Array, axis: int) -> tuple[Array, Any]:
        self.axis = axis
        y, _ = kernel.forward(_axis_last(x, axis), log=True)
        y = _axis_back(y, axis)
        self.save(y)
        return y, (y,)

    def backward_kernel(self, kernel: Any, g: Array, y: Array) -> Array:
        dx = kernel.backward(_axis_last(g, self.axis), _axis_last(y, self.axis), log=True)
        return _axis_back(dx, self.axis)


class LogSumExp(Reduction):
    """y = ln Σ eˣ        dx = g e^(x − y)  (0 where every x is −∞)"""

    def forward(self, x: Array, axis: Axis, keepdims: bool) -> Array:
        self.shape, self.axis = x.shape, axis
        y = narrowed(_logsumexp(widened(x), axis), x)
        if not keepdims:
            y = y.squeeze(axis) if axis is not None else y.reshape(())
        self.save(x, y)
        return y

    def backward(self, g: Any, x: Any, y: Any) -> Any:
        xp, y = namespace(g), widened(self.keepdims(y))
        shifted = widened(x) - xp.where(y == -np.inf, 0.0, y)
        return narrowed(self.keepdims(g) * xp.exp(shifted), g)


def _logsumexp(x: Array, axis: Axis) -> Array:
    """ln Σ eˣ of an array, with the axes kept."""
    xp = namespace(x)
    m = finite_max(x, axis)
    with np.errstate(divide="ignore"):  # ln 0 = −∞ is the answer for rows of −∞
        return m + xp.log(xp.exp(x - m).sum(axis=axis, keepdims=True))


def softmax(x: Any, axis: int = -1) -> Tensor:
    """y = eˣ / Σ eˣ along `axis`: positive, summing to 1; zeros where every x is −∞."""
    return Softmax.apply(as_float(x), axis=axis)


def log_softmax(x: Any, axis: int = -1) -> Tensor:
    """y = x − ln Σ eˣ along `axis`: ln softmax(x) without its underflow; −∞ where x is."""
    return LogSoftmax.apply(as_float(x), axis=axis)


def logsumexp(x: Any, axis: Axis = -1, keepdims: bool = False) -> Tensor:
    """y = ln Σ eˣ, a smooth maximum, without overflow; −∞ where every x is −∞."""
    return LogSumExp.apply(as_float(x), axis=axis, keepdims=keepdims)


# --- cross-entropy --------------------------------------------------------------------------------


class RowLosses(Function):
    """What cross-entropy alone and with the last layer share: the formulas on rows of logits."""

    class_weight: Array | None
    smoothing: float

    def losses(self, x: Array, target: Array) -> Array:
        """yᵢ of the rows x (N, C)."""
        xp = namespace(x)
        shifted = x - finite_max(x, 1)
        log_total = xp.log(xp.exp(shifted).sum(axis=1))
        y = (log_total - shifted[xp.arange(len(x)), target]) * self._target_weight(x, target)
        if self.smoothing:
            y *= 1.0 - self.smoothing
            y -= ((shifted - log_total[:, None]) * self._spread_weight(x)).sum(axis=1)
        return y

    def gradient(self, g: Array, x: Array, target: Array) -> Array:
        """dxᵢ, for g (N,)."""
        p = x - finite_max(x, 1)
        namespace(x).exp(p, out=p)
        total = p.sum(axis=1)  # p / total is softmax(x); the division joins the next product
        if self.smoothing:
            q = self.soft_target(x, target)
            return (p * (q.sum(axis=1) / total)[:, None] - q) * g[:, None]
        g = g * self._target_weight(x, target)
        p *= (g / total)[:, None]
        p[namespace(x).arange(len(x)), target] -= g
        return p

    def _target_weight(self, x: Array, target: Array) -> Any:
        """w_t for each row; 1 without class weights."""
        return x.dtype.type(1) if self.class_weight is None else self.class_weight[target]

    def _spread_weight(self, x: Array) -> Any:
        """ε/C, or ε/C · w_c: what label smoothing gives to every class."""
        share = x.dtype.type(self.smoothing / x.shape[1])
        return share if self.class_weight is None else share * self.class_weight

    def soft_target(self, x: Array, target: Array) -> Array:
        """q: the weights of the log-probabilities in the loss, a row per example."""
        xp = namespace(x)
        q = xp.zeros(x.shape, dtype=x.dtype) + self._spread_weight(x)
        q[xp.arange(len(x)), target] += (1.0 - self.smoothing) * self._target_weight(x, target)
        return q


class CrossEntropy(RowLosses):
    """yᵢ = wᵢ (ln Σ_c e^(x_ic) − x_i,tᵢ)        dxᵢ = gᵢ wᵢ (softmax(xᵢ) − onehot(tᵢ))

    One row per example. With label smoothing ε the target is no longer one class but
    q = (1 − ε) onehot(t) + ε/C, and onehot(t) above becomes q; with class weights q is multiplied
    by them, and the 1 before softmax becomes Σ q.
    """

    kernel = "cross_entropy"

    def forward(
        self,
        x: Array,
        target: Array,
        counted: Array,
        class_weight: Array | None,
        smoothing: float,
        dtype: np.dtype,
    ) -> Array:
        self.target, self.counted = target, counted
        self.class_weight, self.smoothing = class_weight, smoothing
        self.save(x)
        y = namespace(x).empty(len(x), dtype=dtype)

        def compute(rows: slice) -> None:
            y[rows] = self.losses(widened(x[rows]), target[rows])

        over_rows(compute, x)
        return namespace(x).where(counted, y, dtype.type(0))

    def backward(self, g: Any, x: Any) -> Any:
        g = g * self.counted
        if isinstance(g, Tensor):
            q = self.soft_target(x.data, self.target)
            return g.reshape(-1, 1) * (softmax(x, axis=1) * q.sum(axis=1, keepdims=True) - q)
        dx = namespace(x).empty(x.shape, dtype=x.dtype)

        def compute(rows: slice) -> None:
            dx[rows] = self.gradient(g[rows], widened(x[rows]), self.target[rows])

        over_rows(compute, x)
        return dx

    def forward_kernel(
        self,
        kernel: Any,
        x: Array,
        target: Array,
        counted: Array,
        class_weight: Array | None,
        smoothing: float,
        dtype: np.dtype,
    ) -> tuple[Array, Any]:
        self.target, self.counted = target, counted
        self.class_weight, self.smoothing = class_weight, smoothing
        self.save(x)
        return kernel.forward(x, target, counted, class_weight, smoothing=smoothing, dtype=dtype)

    def backward_kernel(self, kernel: Any, g: Array, *saved: Any) -> Array:
        return kernel.backward(g, *saved, smoothing=self.smoothing)


def cross_entropy(
    logits: Any,
    target: Any,
    weight: Any = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    dtype: Any = None,
) -> Tensor:
    """y = −Σ_c q_c ln softmax(logits)_c, with q the target class or distribution.

    Args:
        logits: (…, C): unnormalised scores, the classes on the last axis (for PyTorch's
            (N, C, T) layout use `logits.swapaxes(1, 2)`).
        target: (…) integer classes in 0 … C−1, or (…, C) floats: a distribution per example.
        weight: (C,) a weight per class.
        ignore_index: examples with this target count for nothing (integer targets only).
        reduction: 'mean' (by the weights of the counted targets), 'sum' or 'none' (shape (…)).
            The mean over no counted example is 0.
        label_smoothing: ε in [0, 1): the target becomes (1 − ε) q + ε/C.
        dtype: of the losses, by default that of the logits. Inside all is float32 at least; with
            logits in half precision a loss in float32 keeps its digits, and room for its scale. A
            mean and a sum are rounded once, at the end, so that only a sum can be too large.

    Raises:
        ValueError: shapes that do not fit, or a class out of range (the first one is named).
    """
    logits = as_float(logits)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is 'mean', 'sum' or 'none', got {reduction!r}")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    classes = logits.shape[-1] if logits.ndim else 0
    class_weight = class_weights(weight, classes, logits)
    labels = target if isinstance(target, Tensor) else Tensor(bounds.as_ids(target, logits.data))
    if is_float(labels.dtype):
        if dtype is not None:
            logits = logits.astype(dtype)
        return _soft_cross_entropy(logits, labels, class_weight, reduction, label_smoothing)
    if labels.shape != logits.shape[:-1] or logits.ndim == 0:
        raise ValueError(
            f"cross_entropy() takes logits (…, C) and integer targets (…): got {logits.shape} and "
            f"{labels.shape}"
        )
    safe, counted = counted_targets(labels.data.reshape(-1), classes, ignore_index)
    wanted = logits.dtype if dtype is None else as_dtype(dtype)
    losses = CrossEntropy.apply(
        logits.reshape((safe.size, classes)),
        target=safe,
        counted=counted,
        class_weight=class_weight,
        smoothing=label_smoothing,
        dtype=wanted if reduction == "none" else promote(wanted, float32),
    )
    if reduction == "none":
        return losses.reshape(labels.shape)
    y = losses.sum()
    if reduction == "mean":
        y = y * mean_share(safe, counted, class_weight, losses.dtype)
    return y if y.dtype == wanted else y.astype(wanted)


def class_weights(weight: Any, classes: int, x: Tensor) -> Array | None:
    """The weights (C,) in x's dtype: a copy, for what is written into them later comes too late."""
    if weight is None:
        return None
    found = as_array(weight, x.data).astype(x.dtype, copy=True)
    if found.shape != (classes,):
        raise ValueError(f"cross_entropy() needs weight ({classes},), got {found.shape}")
    return found


def counted_targets(labels: Array, classes: int, ignore_index: int) -> tuple[Array, Array]:
    """(the class of each row, 0 where it counts for nothing; whether it counts)"""
    bounds.check(labels, classes, partial(_no_class, classes), ignoring=ignore_index)
    counted = labels != ignore_index
    return namespace(labels).where(counted, labels, 0), counted


def _no_class(classes: int, target: int) -> ValueError:
    return ValueError(
        f"cross_entropy(): a target is {target}, but the logits have classes 0 to {classes - 1}"
    )


def mean_share(target: Array, counted: Array, class_weight: Array | None, dtype: Any) -> Any:
    """1 / Σ w_t over the rows that count; 0 where none does.

    A float; on a GPU an array of no dimensions in dtype, for the host does not wait for the sum.
    """
    total = counted.sum() if class_weight is None else (class_weight[target] * counted).sum()
    if type(counted) is np.ndarray:
        return 1.0 / float(total) if total else 0.0
    total = total.astype(np.float64)
    return (total != 0).astype(dtype) * (1.0 / (total + (total == 0))).astype(dtype)


def _soft_cross_entropy(
    logits: Tensor, target: Tensor, weight: Array | None, reduction: str, smoothing: float
) -> Tensor:
    target = target.astype(logits.dtype)
    if target.shape != logits.shape:
        raise ValueError(
            f"cross_entropy() with a distribution as target needs equal shapes, got logits "
            f"{logits.shape} and target {target.shape}"
        )
    if smoothing:
        target = target * (1.0 - smoothing) + smoothing / logits.shape[-1]
    if weight is not None:
        target = target * weight
    losses = -(target * log_softmax(logits)).sum(axis=-1)
    if reduction == "none":
        return losses
    wide = losses.astype(promote(losses.dtype, float32))
    y = wide.sum() if reduction == "sum" else wide.sum() * (1.0 / max(losses.size, 1))
    return y if y.dtype == losses.dtype else y.astype(losses.dtype)


# --- binary cross-entropy -------------------------------------------------------------------------


class BinaryCrossEntropy(Function):
    """y = −z ln p − (1 − z) ln(1 − p)        dp = g (p − z) / (p (1 − p))

    Logarithms are held above −100 and p (1 − p) above 1e-12, as in PyTorch, so that p = 0 and 1
    give finite numbers.
    """

    def forward(self, p: Array, z: Array) -> Array:
        xp, wide = namespace(p), widened(p)
        self.save(p, z)
        with np.errstate(divide="ignore"):
            log_p, log_q = xp.log(wide), xp.log1p(-wide)
        y = -(z * xp.maximum(log_p, -100.0) + (1.0 - z) * xp.maximum(log_q, -100.0))
        return narrowed(y, p)

    def backward(self, g: Any, p: Any, z: Any) -> Any:
        xp, p = namespace(g), widened(p)
        dp = narrowed(g * (p - z) / xp.maximum(p * (1.0 - p), 1e-12), g)
        if not self.needs(1):
            return dp, None
        return dp, narrowed(g * xp.log(xp.maximum(1.0 - p, 1e-43) / xp.maximum(p, 1e-43)), g)


def binary_cross_entropy(
    probabilities: Any, target: Any, weight: Any = None, reduction: str = "mean"
) -> Tensor:
    """y = −z ln p − (1 − z) ln(1 − p), for p in [0, 1] and targets z of the same shape.

    Prefer `binary_cross_entropy_with_logits`, which loses no precision near 0 and 1.
    """
    p, z = _same_shape(probabilities, target, "binary_cross_entropy")
    if p.size and not bool(((p.data >= 0) & (p.data <= 1)).all()):
        raise ValueError("binary_cross_entropy() needs probabilities between 0 and 1")
    return reduce_loss(BinaryCrossEntropy.apply(p, z), reduction, weight)


def binary_cross_entropy_with_logits(
    logits: Any, target: Any, weight: Any = None, pos_weight: Any = None, reduction: str = "mean"
) -> Tensor:
    """y = −w⁺ z ln σ(x) − (1 − z) ln(1 − σ(x)) = (1 − z) x + (1 + (w⁺ − 1) z) ln(1 + e⁻ˣ)

    Args:
        logits: x, any shape
        target: z in [0, 1], of the same shape
        weight: a factor per element, broadcastable
        pos_weight: w⁺, how much positive examples count more, broadcastable
        reduction: 'mean', 'sum' or 'none'
    """
    x, z = _same_shape(logits, target, "binary_cross_entropy_with_logits")
    positive = 1.0 if pos_weight is None else 1.0 + (_factor(pos_weight, x, "pos_weight") - 1.0) * z
    return reduce_loss((1.0 - z) * x + positive * softplus(-x), reduction, weight)


def _same_shape(x: Any, target: Any, name: str) -> tuple[Tensor, Tensor]:
    x = as_float(x)
    z = as_tensor(target, x).astype(x.dtype)
    if z.shape != x.shape:
        raise ValueError(f"{name}() needs a target of shape {x.shape}, got {z.shape}")
    return x, z


def reduce_loss(losses: Tensor, reduction: str, weight: Any = None) -> Tensor:
    """The mean, the sum or all of the elementwise losses, weighted."""
    if weight is not None:
        losses = losses * _factor(weight, losses, "weight")
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        return losses.mean()
    raise ValueError(f"reduction is 'mean', 'sum' or 'none', got {reduction!r}")


def _factor(weight: Any, losses: Tensor, name: str) -> Tensor:
    """A weight in the dtype of the losses, checked to broadcast to their shape."""
    weight = as_tensor(weight, losses).astype(losses.dtype)
    fits = [n in (1, m) for n, m in zip(weight.shape[::-1], losses.shape[::-1], strict=False)]
    if weight.ndim > losses.ndim or not all(fits):
        raise ValueError(f"{name} {weight.shape} does not broadcast to the losses {losses.shape}")
    return weight
