"""Linear maps."""

from __future__ import annotations

import math
from typing import Any

from tinygrad_llm import ops
from tinygrad_llm.nn import init
from tinygrad_llm.nn.module import Module, Parameter
from tinygrad_llm.tensor import Tensor


class Linear(Module):
    """y = x Wᵀ + b

    Weight (out_features, in_features) and bias (out_features,) begin uniform in ±1/√in_features,
    as in PyTorch.

    Shapes: x (…, in_features) -> (…, out_features)
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = Parameter.empty(out_features, in_features)
        self.bias = Parameter.empty(out_features) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias anew."""
        bound = 1.0 / math.sqrt(max(1, self.in_features))
        init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Any) -> Tensor:
        return ops.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )


class Identity(Module):
    """y = x"""

    def forward(self, x: Any) -> Any:
        return x
