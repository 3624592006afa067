"""Forward and backward: which way each weight is wrong, over the parts of a step's batches.

    L = Σᵢ (nᵢ / n) Lᵢ    ∂L/∂θ = Σᵢ (nᵢ / n) ∂Lᵢ/∂θ    over the parts i, nᵢ targets each

So L is the loss of the one large batch that the parts make together; yet only one of them is in
memory at a time. Where a loss is a sum of means, this holds of each of them with its own n.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tinygrad_llm import backend
from tinygrad_llm.autograd import no_grad
from tinygrad_llm.tensor import Tensor
from tinygrad_llm.train.parallel import Part
from tinygrad_llm.train.precision import HalfWeights, LossScaler
from tinygrad_llm.train.task import Model, Summed, Task


class Gradient:
    """The loss of a model on parts of batches, and its gradient.

    Args:
        model, task: what is wrong on which batches.
        half: where the model computes in half precision.
        scaler: whose scale the gradients get, in float16.
    """

    def __init__(
        self,
        model: Model,
        task: Task,
        half: HalfWeights | None = None,
        scaler: LossScaler | None = None,
    ) -> None:
        self.model, self.task, self.half, self.scaler = model, task, half, scaler

    def __call__(self, parts: Sequence[Part]) -> Any:
        """θ.grad += ∂L/∂θ for every θ, times the loss scale of float16; L, the loss of the parts.

        L is a float; on a GPU an array, which nobody waits for.
        """
        self.model.train()  # dropout on
        total: Any = 0.0
        for part in parts:
            if part.random is not None:
                backend.random.load_state(part.random)
            loss = self._loss(part)  # forward: how wrong is the model?
            scaled = loss if self.scaler is None else loss * self.scaler.scale
            scaled.backward()  # backward: ∂loss/∂θ, added to θ.grad
            if self.half is not None and len(parts) > 1:
                self.half.widen_gradients()
            total = total + (loss.item() if loss.device == "cpu" else loss.data)
        return total

    def _loss(self, part: Part) -> Tensor:
        """The part's share of L, in float32 at least."""
        if part.weights:
            assert isinstance(self.task, Summed)
            losses, weights = self.task.losses(self.model, part.batch), part.weights
        else:
            losses, weights = [self.task.loss(self.model, part.batch)], [part.weight]
        if self.half is not None:
            losses = [loss.astype("float32") for loss in losses]
        first, *others = (loss * w for loss, w in zip(losses, weights, strict=True))
        return sum(others, first)

    def loss(self, batch: Any) -> float:
        """How wrong the model is on a batch; dropout off, nothing recorded."""
        self.model.eval()
        with no_grad():
            return self.task.loss(self.model, batch).item()
