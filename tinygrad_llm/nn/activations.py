"""Activation functions as modules, for Sequential and for choosing one by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tinygrad_llm import ops
from tinygrad_llm.nn.module import Module
from tinygrad_llm.tensor import Tensor


class ReLU(Module):
    """y = max(x, 0)"""

    def forward(self, x: Any) -> Tensor:
        return ops.relu(x)


class GELU(Module):
    """y = x Φ(x) exactly, or with approximate="tanh" the form that GPT-2 uses

    Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
    """

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        if approximate not in ("none", "tanh"):
            raise ValueError(f"GELU: approximate is 'none' or 'tanh', got {approximate!r}")
        self.approximate = approximate

    def forward(self, x: Any) -> Tensor:
        return ops.gelu(x, self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class SiLU(Module):
    """y = x σ(x), also called swish"""

    def forward(self, x: Any) -> Tensor:
        return ops.silu(x)


class Tanh(Module):
    """y = tanh x"""

    def forward(self, x: Any) -> Tensor:
        return ops.tanh(x)


class Sigmoid(Module):
    """y = 1 / (1 + e⁻ˣ)"""

    def forward(self, x: Any) -> Tensor:
        return ops.sigmoid(x)


class Softplus(Module):
    """y = ln(1 + e^(βx)) / β, a smooth max(x, 0)"""

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        if not beta > 0:
            raise ValueError(f"Softplus needs beta > 0, got {beta}")
        self.beta = beta

    def forward(self, x: Any) -> Tensor:
        if self.beta == 1.0:
            return ops.softplus(x)
        return ops.softplus(ops.multiply(x, self.beta)) * (1.0 / self.beta)

    def extra_repr(self) -> str:
        return f"beta={self.beta}"


class Softmax(Module):
    """y = eˣ / Σ eˣ along the axis `dim`"""

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Any) -> Tensor:
        return ops.softmax(x, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class LogSoftmax(Module):
    """y = x − ln Σ eˣ along the axis `dim`"""

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Any) -> Tensor:
        return ops.log_softmax(x, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


def _gelu_tanh() -> Module:
    return GELU("tanh")


# Under the names that Hugging Face's config.json files use.
ACTIVATIONS: dict[str, Callable[[], Module]] = {
    "relu": ReLU,
    "gelu": GELU,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "silu": SiLU,
    "swish": SiLU,
    "tanh": Tanh,
    "sigmoid": Sigmoid,
}


def activation(name: str) -> Module:
    """The activation module of that name; ValueError names those there are."""
    if name not in ACTIVATIONS:
        raise ValueError(f"an activation is one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]()
