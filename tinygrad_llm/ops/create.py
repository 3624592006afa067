"""New tensors: constants, ranges and random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.ops.convert import as_tensor
from tinygrad_llm.tensor import Tensor, flat_shape

Shape = int | Sequence[int]


def zeros(
    shape: Shape, dtype: Any = None, requires_grad: bool = False, device: str = "cpu"
) -> Tensor:
    """y = 0 everywhere, of the default float dtype unless told otherwise."""
    return full(shape, 0, dtype or backend.default_dtype(), requires_grad, device)


def ones(
    shape: Shape, dtype: Any = None, requires_grad: bool = False, device: str = "cpu"
) -> Tensor:
    """y = 1 everywhere, of the default float dtype unless told otherwise."""
    return full(shape, 1, dtype or backend.default_dtype(), requires_grad, device)


def full(
    shape: Shape, value: float, dtype: Any = None, requires_grad: bool = False, device: str = "cpu"
) -> Tensor:
    """y = value everywhere; the dtype is that of `Tensor(value)` unless told otherwise."""
    dtype = Tensor(value).dtype if dtype is None else backend.as_dtype(dtype)
    array = backend.device_namespace(device).full(shape, value, dtype=dtype)
    return Tensor(array, requires_grad=requires_grad, device=device)


def zeros_like(x: Any) -> Tensor:
    """y = 0 in x's shape, dtype and device"""
    data = as_tensor(x).data
    return Tensor(backend.namespace(data).zeros_like(data))


def ones_like(x: Any) -> Tensor:
    """y = 1 in x's shape, dtype and device"""
    data = as_tensor(x).data
    return Tensor(backend.namespace(data).ones_like(data))


def arange(
    start: float, stop: float | None = None, step: float = 1, dtype: Any = None, device: str = "cpu"
) -> Tensor:
    """y = start, start + step, … below stop; `arange(n)` counts 0 … n − 1."""
    if stop is None:
        start, stop = 0, start
    if dtype is None:
        whole = all(isinstance(n, int | np.integer) for n in (start, stop, step))
        dtype = backend.int64 if whole else backend.default_dtype()
    xp = backend.device_namespace(device)
    return Tensor(xp.arange(start, stop, step, dtype=backend.as_dtype(dtype)), device=device)


def eye(n: int, m: int | None = None, dtype: Any = None, device: str = "cpu") -> Tensor:
    """y = 1 on the diagonal of an n × m matrix, 0 elsewhere"""
    dtype = backend.as_dtype(dtype or backend.default_dtype())
    return Tensor(backend.device_namespace(device).eye(n, m, dtype=dtype), device=device)


def randn(
    *shape: Shape, dtype: Any = None, requires_grad: bool = False, device: str = "cpu"
) -> Tensor:
    """y ~ N(0, 1), from the default random stream (`manual_seed`): `randn(2, 3)`"""
    array = backend.random.normal(flat_shape(shape), dtype, backend.device_namespace(device))
    return Tensor(array, requires_grad=requires_grad, device=device)


def rand(
    *shape: Shape, dtype: Any = None, requires_grad: bool = False, device: str = "cpu"
) -> Tensor:
    """y ~ uniform on [0, 1), from the default random stream (`manual_seed`): `rand(2, 3)`"""
    array = backend.random.uniform(flat_shape(shape), dtype, backend.device_namespace(device))
    return Tensor(array, requires_grad=requires_grad, device=device)


def randint(low: int, high: int, shape: Shape = (), device: str = "cpu") -> Tensor:
    """k uniform on {low, …, high − 1}, int64, from the default random stream"""
    size = (shape,) if isinstance(shape, int) else tuple(shape)
    array = backend.random.integers(low, high, size, backend.device_namespace(device))
    return Tensor(array, device=device)
