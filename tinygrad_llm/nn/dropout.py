"""Random zeros while training."""

from __future__ import annotations

from typing import Any

from tinygrad_llm import ops
from tinygrad_llm.nn.module import Module
from tinygrad_llm.tensor import Tensor


class Dropout(Module):
    """y = x with each element zeroed with probability p and the others divided by 1 − p

    After `eval()`, or with p = 0, y is x. Draws from `backend.random`. Srivastava et al., "Dropout:
    a simple way to prevent neural networks from overfitting", 2014.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = check_probability(p)

    def forward(self, x: Any) -> Tensor:
        return ops.dropout(x, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def check_probability(p: float, name: str = "dropout") -> float:
    """p itself; ValueError unless 0 ≤ p < 1."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{name} must be at least 0 and below 1, got {p}")
    return p
