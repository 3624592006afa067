"""Losses as modules: the functions of `ops` with their options kept.

Unlike PyTorch's, cross-entropy has its classes on the last axis: logits (…, C).
"""

from __future__ import annotations

from typing import Any

from tinygrad_llm import dispatch, ops
from tinygrad_llm.backend import float32, promote
from tinygrad_llm.nn.linear import Linear
from tinygrad_llm.nn.module import Module
from tinygrad_llm.tensor import Tensor


class _Loss(Module):
    reductions = ("mean", "sum", "none")

    def __init__(self, reduction: str) -> None:
        super().__init__()
        if reduction not in self.reductions:
            *others, last = map(repr, self.reductions)
            raise ValueError(f"reduction is {', '.join(others)} or {last}, got {reduction!r}")
        self.reduction = reduction

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


def _constant(value: Any) -> Tensor | None:
    """A weight as a buffer: whatever it was given as, outside the graph."""
    return None if value is None else Tensor(value)


class CrossEntropyLoss(_Loss):
    """y = −Σ_c q_c ln softmax(logits)_c, with q the target class or distribution

    Args:
        weight: (C,) a weight per class
        ignore_index: targets with this value count for nothing
        reduction: 'mean' over the counted targets, 'sum' or 'none'
        label_smoothing: ε, the part of the target that is spread over all classes

    Shapes: logits (…, C) and target (…) integers, or (…, C) a distribution
    """

    def __init__(
        self,
        weight: Any = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(reduction)
        self.weight: Tensor | None
        self.register_buffer("weight", _constant(weight))
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing

    def forward(self, logits: Any, target: Any) -> Tensor:
        return ops.cross_entropy(
            logits, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing
        )


class BCELoss(_Loss):
    """y = −z ln p − (1 − z) ln(1 − p), for probabilities p and targets z of one shape

    Prefer BCEWithLogitsLoss, which loses no precision near 0 and 1.
    """

    def __init__(self, weight: Any = None, reduction: str = "mean") -> None:
        super().__init__(reduction)
        self.weight: Tensor | None
        self.register_buffer("weight", _constant(weight))

    def forward(self, probabilities: Any, target: Any) -> Tensor:
        return ops.binary_cross_entropy(probabilities, target, self.weight, self.reduction)


class BCEWithLogitsLoss(_Loss):
    """y = −w⁺ z ln σ(x) − (1 − z) ln(1 − σ(x)), for logits x and targets z of one shape

    Args:
        weight: a factor per element, broadcastable
        reduction: 'mean', 'sum' or 'none'
        pos_weight: w⁺, how much positive examples count more, broadcastable
    """

    def __init__(self, weight: Any = None, reduction: str = "mean", pos_weight: Any = None) -> None:
        super().__init__(reduction)
        self.weight: Tensor | None
        self.pos_weight: Tensor | None
        self.register_buffer("weight", _constant(weight))
        self.register_buffer("pos_weight", _constant(pos_weight))

    def forward(self, logits: Any, target: Any) -> Tensor:
        return ops.binary_cross_entropy_with_logits(
            logits, target, self.weight, self.pos_weight, self.reduction
        )


class MSELoss(_Loss):
    """y = (x − t)²"""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__(reduction)

    def forward(self, x: Any, target: Any) -> Tensor:
        return ops.mse_loss(x, target, self.reduction)


class L1Loss(_Loss):
    """y = |x − t|"""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__(reduction)

    def forward(self, x: Any, target: Any) -> Tensor:
        return ops.l1_loss(x, target, self.reduction)


class SmoothL1Loss(_Loss):
    """y = ½ d² / β where d = |x − t| < β, else d − ½ β"""

    def __init__(self, reduction: str = "mean", beta: float = 1.0) -> None:
        super().__init__(reduction)
        if not beta > 0:
            raise ValueError(f"SmoothL1Loss needs beta > 0, got {beta}; use L1Loss for 0")
        self.beta = beta

    def forward(self, x: Any, target: Any) -> Tensor:
        return ops.smooth_l1_loss(x, target, self.beta, self.reduction)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, beta={self.beta}"


class KLDivLoss(_Loss):
    """y = p (ln p − ln q), for log-probabilities ln q and a target p, or ln p with `log_target`

    reduction: 'batchmean' is the divergence, averaged over the first axis. PyTorch's default is
    'mean', over all elements, which is not.
    """

    reductions = ("batchmean", "mean", "sum", "none")

    def __init__(self, reduction: str = "batchmean", log_target: bool = False) -> None:
        super().__init__(reduction)
        self.log_target = log_target

    def forward(self, log_q: Any, target: Any) -> Tensor:
        return ops.kl_div(log_q, target, self.reduction, self.log_target)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, log_target={self.log_target}"


# --- of a language model --------------------------------------------------------------------------


def head_cross_entropy(
    head: Module,
    x: Tensor,
    targets: Any,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """y = cross_entropy(head(x), targets): the loss of hidden states x (…, D) under the last layer

    Where a kernel runs it and the head is a plain Linear, all logits never exist at a time
    (`ops.linear_cross_entropy`). On a CPU that gains nothing: there the logits are made of those
    rows whose targets count, and of no others. The loss is in float32 at least.
    """
    labels, dtype = ops.as_tensor(targets), promote(x.dtype, float32)
    if type(head) is Linear and not head._hooks:
        arrays = [x.data, head.weight.data]
        if dispatch.select("linear_cross_entropy", arrays, {}).module is not None:
            return ops.linear_cross_entropy(
                *(x, head.weight, labels, head.bias),
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                dtype=dtype,
            )
    rows, classes = x.reshape(-1, x.shape[-1]), labels.data.reshape(-1)
    counted = classes != ignore_index
    if not counted.all():
        rows, classes = rows[counted], classes[counted]
    return ops.cross_entropy(head(rows), classes, label_smoothing=label_smoothing, dtype=dtype)
