"""Dropout: random zeros that come from the counter-based stream, so they can be drawn again."""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.autograd import Function
from tinygrad_llm.backend import Array, namespace
from tinygrad_llm.ops.convert import as_float, narrowed
from tinygrad_llm.tensor import Tensor


class Dropout(Function):
    """y = x ⊙ m / (1 − p)        dx = g ⊙ m / (1 − p),  m ~ Bernoulli(1 − p)"""

    kernel = "dropout"

    def forward(self, x: Array, p: float, seed: int, offset: int) -> Array:
        self._remember(p, seed, offset)
        keep = keep_mask(x.shape, p, seed, offset, namespace(x))
        self.save(keep)
        return narrowed(x * keep * self.scale, x)

    def backward(self, g: Any, keep: Array | None = None) -> Any:
        if keep is None:  # of the second order after a kernel, which saves no mask
            keep = keep_mask(g.shape, self.p, *self.draw, namespace(g.data))
        return g * keep * self.scale

    def forward_kernel(
        self, kernel: Any, x: Array, p: float, seed: int, offset: int
    ) -> tuple[Array, Any]:
        self._remember(p, seed, offset)
        return kernel.forward(x, p=p, seed=seed, offset=offset)

    def backward_kernel(self, kernel: Any, g: Array) -> Array:
        seed, offset = self.draw
        return kernel.backward(g, p=self.p, seed=seed, offset=offset)

    def _remember(self, p: float, seed: int, offset: int) -> None:
        self.draw, self.p, self.scale = (seed, offset), p, 1.0 / (1.0 - p)


def keep_mask(shape: tuple[int, ...], p: float, seed: int, offset: int, xp: Any) -> Array:
    """mᵢ = (wordᵢ ≥ p · 2³²): element i, in C order, is kept by random word i of the stream.

    A pure function of its arguments: a kernel that draws the same words keeps the same elements.
    """
    count = int(np.prod(shape, dtype=np.int64))
    words = backend.philox(seed, offset, count, xp)
    return (words >= np.uint32(min(round(p * 2**32), 2**32 - 1))).reshape(shape)


def dropout(
    x: Any, p: float = 0.5, training: bool = True, stream: backend.RandomStream | None = None
) -> Tensor:
    """y = x with each element zeroed with probability p, the others scaled by 1 / (1 − p).

    Out of training, or with p = 0, y is x. Draws from `backend.random` unless given a stream.
    Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", 2014.
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout() needs 0 ≤ p < 1, got {p}")
    x = as_float(x)
    if not training or p == 0.0:
        return x
    seed, offset = (stream or backend.random).reserve(x.size)
    return Dropout.apply(x, p=float(p), seed=seed, offset=offset)
