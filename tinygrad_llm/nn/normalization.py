"""Normalisation: each example is brought to one scale, by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tinygrad_llm import ops
from tinygrad_llm.nn import init
from tinygrad_llm.nn.module import Module, Parameter
from tinygrad_llm.tensor import Tensor


class _Norm(Module):
    """What the norms share: over which last axes, and a gain that begins as ones."""

    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float, elementwise_affine: bool
    ) -> None:
        super().__init__()
        sizes = (normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape
        self.normalized_shape = tuple(sizes)
        if not self.normalized_shape:
            raise ValueError("normalized_shape needs at least one size, got ()")
        self.eps, self.elementwise_affine = eps, elementwise_affine
        self.weight = Parameter.empty(*self.normalized_shape) if elementwise_affine else None

    def _as_one_axis(self, x: Tensor) -> Tensor:
        """(…, *normalized_shape) -> (…, their product): for the ops when there is no gain."""
        n = len(self.normalized_shape)
        if x.shape[-n:] != self.normalized_shape:
            wanted = ", ".join(map(str, self.normalized_shape))
            raise ValueError(
                f"{type(self).__name__} needs an input of shape (…, {wanted}), got {x.shape}"
            )
        return x if n == 1 else x.reshape(*x.shape[:-n], math.prod(self.normalized_shape))

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"
        )


class LayerNorm(_Norm):
    """y = (x − μ) / √(var + ε) ⊙ w + b over the last axes, which are `normalized_shape`

    w begins as ones, b as zeros; neither is there with `elementwise_affine=False`, and no b with
    `bias=False`. Ba, Kiros, Hinton, "Layer Normalization", 2016.

    Shapes: x (…, *normalized_shape) -> the same
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine)
        has_bias = elementwise_affine and bias
        self.bias = Parameter.empty(*self.normalized_shape) if has_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """w ← 1, b ← 0"""
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, x: Any) -> Tensor:
        if self.weight is None:
            x = ops.as_tensor(x)
            return ops.layer_norm(self._as_one_axis(x), eps=self.eps).reshape(x.shape)
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(_Norm):
    """y = x / √(mean(x²) + ε) ⊙ w over the last axes, which are `normalized_shape`

    w begins as ones and is not there with `elementwise_affine=False`. Zhang and Sennrich, "Root
    Mean Square Layer Normalization", 2019.

    Shapes: x (…, *normalized_shape) -> the same
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-6,
        elementwise_affine: bool = True,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """w ← 1"""
        if self.weight is not None:
            init.ones_(self.weight)

    def forward(self, x: Any) -> Tensor:
        if self.weight is None:
            x = ops.as_tensor(x)
            return ops.rms_norm(self._as_one_axis(x), eps=self.eps).reshape(x.shape)
        return ops.rms_norm(x, self.weight, self.eps)
