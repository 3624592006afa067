"""One step of the weights against their gradient, and the ways to make it.

    loss, norm = step(step.parts(batches))        θ ← θ − update(∂L/∂θ)

    PlainStep      on a CPU: the gradient, its norm, the update
    TeamStep       the same by several processes, each with a part of the batches
    FusedStep      on a GPU, or with weights in half precision: the update clips and unscales on its
                   way, and decides for itself whether the gradient is finite, so nobody waits
    CapturedStep   that as a CUDA graph, launched at once

`norm` is that of ∂L/∂θ before it was clipped. Where it or the loss is not finite the weights stay
as they are. Both are floats; on a GPU arrays of one number, for which nobody has waited.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.optim import Adam, Optimizer, clip_grad_norm_
from tinygrad_llm.tensor import Tensor
from tinygrad_llm.train.gradient import Gradient
from tinygrad_llm.train.graph import GraphedStep
from tinygrad_llm.train.parallel import Part, Team, cut, weighed
from tinygrad_llm.train.task import Summed
from tinygrad_llm.train.transfer import UploadedTask


class PlainStep:
    """The gradient, its norm, a step of the optimiser against it.

    Args:
        gradient: forward and backward.
        parameters, optimizer: what is stepped, and how.
        max_norm: a longer gradient is made so long; infinity: none is.
    """

    def __init__(
        self,
        gradient: Gradient,
        parameters: Iterable[Tensor],
        optimizer: Optimizer,
        max_norm: float,
    ) -> None:
        self.gradient, self.parameters = gradient, list(parameters)
        self.optimizer, self.max_norm = optimizer, max_norm
        task = gradient.task
        self.sizes = task.sizes if isinstance(task, Summed) else None

    def parts(self, batches: Sequence[Any]) -> list[Part]:
        """What is worked on at once: a batch, weighted by its targets."""
        return weighed(batches, self.gradient.task.size, self.sizes)

    def __call__(self, parts: Sequence[Part]) -> tuple[Any, Any]:
        """The step: the loss of the parts, and the norm of its gradient."""
        self.optimizer.zero_grad()  # forget the gradients of the last step
        loss = self.gradient(parts)  # which way is each weight wrong?
        norm = clip_grad_norm_(self.parameters, self.max_norm)
        if math.isfinite(loss + norm):  # before the weights are spoilt
            self.optimizer.step()  # a step against the gradient
        return loss, norm


class TeamStep(PlainStep):
    """The step of several processes: each works out the gradient of a piece of every batch."""

    def __init__(self, team: Team, *plain: Any) -> None:
        super().__init__(*plain)
        self.team = team

    def parts(self, batches: Sequence[Any]) -> list[Part]:
        """Each batch in as many pieces as there are processes."""
        size = self.gradient.task.size
        return cut(batches, self.team.count, size, backend.random, self.sizes)

    def __call__(self, parts: Sequence[Part]) -> tuple[float, float]:
        """The step: the loss of the parts, and the norm of its gradient."""
        loss, norm = self.team.gradient(parts, self.max_norm)
        if math.isfinite(loss + norm):
            self.team.step()
        return loss, norm


class FusedStep(PlainStep):
    """The gradient, then one pass over the weights that unscales, clips and updates.

    `settle` is called in between, while the GPU still works on the gradient: before the weights are
    others than those of the last step.
    """

    def __init__(self, settle: Callable[[], None], *plain: Any) -> None:
        super().__init__(*plain)
        self.settle = settle

    def __call__(self, parts: Sequence[Part]) -> tuple[Any, Any]:
        """The step: the loss of the parts, and the norm of its gradient."""
        scaler = self.gradient.scaler
        self.optimizer.zero_grad()
        loss = self.gradient(parts)
        self.settle()
        on_gpu = backend.is_array(loss)
        norm = self.optimizer.step_clipped(
            self.max_norm,
            1.0 if scaler is None else 1.0 / scaler.scale,
            loss if on_gpu else np.asarray(loss, dtype=np.float32),
            wait=scaler is not None or not on_gpu,
        )
        return loss, norm


class CapturedStep(PlainStep):
    """A fused step as a CUDA graph, for --cuda-graph; `pools` is where its memory is counted."""

    def __init__(self, settle: Callable[[], None], pools: list[Any], *plain: Any) -> None:
        super().__init__(*plain)
        optimizer, task = self.optimizer, self.gradient.task
        assert isinstance(optimizer, Adam)
        assert isinstance(task, UploadedTask)
        self.graph = GraphedStep(self._compute, optimizer, task, settle, pools)

    def __call__(self, parts: Sequence[Part]) -> tuple[Any, Any]:
        """The step: the loss of the parts, and the norm of its gradient."""
        return self.graph(parts)

    def _compute(self, parts: Sequence[Part]) -> tuple[Any, Any]:
        """What the graph is of."""
        self.optimizer.zero_grad()
        loss = self.gradient(parts)
        norm = self.optimizer.step_clipped(self.max_norm, 1.0, loss)
        self.optimizer.zero_grad()  # their memory is used again within the step
        return loss, norm
