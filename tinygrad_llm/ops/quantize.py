"""Weights of 8 or 4 bits: a quarter or an eighth of float32's memory, for layers that are frozen.

    Ŵ[n, k] = (q[n, k] − z[n, ⌊k/G⌋]) · s[n, ⌊k/G⌋]

q are whole numbers, and the scale s and the zero point z belong to G neighbours of a row, or to the
row. Of 8 bits q goes from −127 to 127, with z = 0 and s = max |w| / 127. Of 4 bits q goes from 0 to
15, and two share a byte, that of the even k in its low half; symmetric means z = 8 and
s = max |w| / 7, otherwise 0 and 15 reach to the group's smallest and largest weight, or to 0. A
weight is off by at most s / 2.

Dettmers et al., "LLM.int8()", 2022; "QLoRA: efficient finetuning of quantized LLMs", 2023.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from tinygrad_llm.autograd import Function
from tinygrad_llm.backend import Array, float32, int8, is_float, namespace, over_rows, uint8
from tinygrad_llm.ops.convert import as_array, as_float, as_tensor, narrowed, widened
from tinygrad_llm.ops.linalg import column_sum
from tinygrad_llm.tensor import Tensor

_BLOCK = 2**20  # elements of Ŵ at a time


class Quantized(NamedTuple):
    """What `quantize` makes of a matrix (N, K)."""

    packed: Tensor  # (N, K) int8, or (N, ⌈K/2⌉) uint8: 4 bits
    scales: Tensor  # (N, number of groups)
    zeros: Tensor | None  # as scales, uint8; None where symmetric


class QuantizedLinear(Function):
    """y = x Ŵᵀ + b        dx = g Ŵ, db = Σ g over rows

    Ŵ is rounded to x's dtype and exists a block of its rows at a time. Nothing of x is saved.
    """

    kernel = "quantized_linear"

    def forward(self, x: Array, b: Array | None = None, **weights: Any) -> Array:
        self._remember(x, b, **weights)
        wide = widened(x)
        y = namespace(x).empty((len(x), len(self.packed)), dtype=x.dtype)
        for rows in self._blocks():
            y[:, rows] = wide @ widened(self._weights(rows, x.dtype)).T
        if b is not None:
            y += b
        return y

    def backward(self, g: Any) -> Any:
        if isinstance(g, Tensor):
            dx = g @ Tensor(self._weights(slice(None), g.dtype))
        else:
            dx = self._gradient(g) if self.needs(0) else None
        return (dx, column_sum(g) if self.needs(1) else None) if self.has_bias else dx

    def _gradient(self, g: Array) -> Array:
        wide = widened(g)
        dx = namespace(g).zeros((len(g), self.columns), dtype=wide.dtype)
        for rows in self._blocks():
            dx += wide[:, rows] @ widened(self._weights(rows, g.dtype))
        return narrowed(dx, g)

    def forward_kernel(
        self, kernel: Any, x: Array, b: Array | None = None, **weights: Any
    ) -> tuple[Array, Any]:
        self._remember(x, b, **weights)
        arrays = (self.packed, self.scales, self.zeros)
        return kernel.forward(x, *arrays, b, group_size=self.group_size)

    def backward_kernel(self, kernel: Any, g: Array, *saved: Any) -> Any:
        dx = kernel.backward(g, *saved, group_size=self.group_size) if self.needs(0) else None
        if not self.has_bias:
            return dx
        return dx, g.sum(axis=0, dtype=float32).astype(g.dtype) if self.needs(1) else None

    def _remember(
        self,
        x: Array,
        b: Array | None,
        packed: Array,
        scales: Array,
        zeros: Array | None,
        group_size: int,
    ) -> None:
        self.packed, self.scales, self.zeros = packed, scales, zeros
        self.group_size, self.columns, self.has_bias = group_size, x.shape[1], b is not None

    def _blocks(self) -> Iterator[slice]:
        """Of the rows of Ŵ: large enough for BLAS, small enough for the cache."""
        n = len(self.packed)
        step = max(64, _BLOCK // max(1, self.columns))
        if type(self.packed) is not np.ndarray:  # on a GPU, blocks would only cost launches
            step = max(1, n)
        return (slice(start, start + step) for start in range(0, n, step))

    def _weights(self, rows: slice, dtype: Any) -> Array:
        """Rows of Ŵ, rounded to the dtype that they are multiplied in."""
        zeros = None if self.zeros is None else self.zeros[rows]
        arrays = (self.packed[rows], self.scales[rows], zeros)
        return _dequantized(*arrays, self.columns, self.group_size).astype(dtype, copy=False)


def _dequantized(
    packed: Array, scales: Array, zeros: Array | None, columns: int, group_size: int
) -> Array:
    """Ŵ in float32."""
    xp = namespace(packed)
    if packed.dtype == int8:
        w = packed.astype(float32)
    else:
        w = xp.empty((*packed.shape, 2), dtype=float32)
        w[..., 0], w[..., 1] = packed & 15, packed >> 4
        w = w.reshape(len(packed), -1)[:, :columns]
        w -= 8.0 if zeros is None else _for_each(zeros, columns, group_size)
    w *= _for_each(scales, columns, group_size)
    return w


def _for_each(values: Array, columns: int, group_size: int) -> Array:
    """The value of its group for each column, in float32; a single one is left to broadcasting."""
    values = values.astype(float32)
    if group_size == 0:
        return values
    return namespace(values).repeat(values, group_size, axis=1)[:, :columns]


def quantized_linear(
    x: Any,
    packed: Any,
    scales: Any,
    zeros: Any = None,
    bias: Any = None,
    group_size: int | None = None,
) -> Tensor:
    """y = x Ŵᵀ + b: `linear` with weights of `quantize`, which are constants

        packed, scales, zeros = quantize(w, bits=4, group_size=64)
        y = quantized_linear(x, packed, scales, zeros, group_size=64)

    Args:
        x: (…, K)
        packed, scales, zeros: of `quantize`; packed int8 is 8 bits, uint8 is 4.
        bias: (N,) or None
        group_size: the one of `quantize`; None: the whole row.

    Raises:
        ValueError: shapes that do not fit.
    """
    x = as_float(x)
    packed, scales = (as_array(a, x.data) for a in (packed, scales))
    zeros = None if zeros is None else as_array(zeros, x.data)
    columns = x.shape[-1] if x.ndim else -1
    size = _check_weights(packed, scales, zeros, columns, group_size)
    inputs = [x.reshape((math.prod(x.shape[:-1]), columns))]
    if bias is not None:
        bias = as_tensor(bias).astype(x.dtype)
        if bias.shape != packed.shape[:1]:
            raise ValueError(
                f"quantized_linear() needs a bias of shape {packed.shape[:1]}, got {bias.shape}"
            )
        inputs.append(bias)
    y = QuantizedLinear.apply(*inputs, packed=packed, scales=scales, zeros=zeros, group_size=size)
    return y.reshape((*x.shape[:-1], len(packed)))


def dequantize(
    packed: Any,
    scales: Any,
    zeros: Any = None,
    columns: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    """Ŵ = (q − z) s, (N, K) in float32: what `quantize` stored

    Args:
        packed, scales, zeros, group_size: as in `quantized_linear`.
        columns: K, where it is odd and two share a byte; left out, all that is there.
    """
    packed = as_tensor(packed).data
    scales = as_array(scales, packed)
    zeros = None if zeros is None else as_array(zeros, packed)
    if columns is None:
        columns = int(packed.shape[-1]) * (2 if packed.dtype == uint8 else 1)
    size = _check_weights(packed, scales, zeros, columns, group_size)
    return Tensor(_dequantized(packed, scales, zeros, columns, size))


def _check_weights(
    packed: Array, scales: Array, zeros: Array | None, columns: int, group_size: int | None
) -> int:
    """The group size, 0 for the row; ValueError for what does not fit."""
    if packed.dtype not in (int8, uint8) or packed.ndim != 2:
        raise ValueError(
            f"packed weights are (N, K) of int8, or (N, ⌈K/2⌉) of uint8 for 4 bits, got "
            f"{packed.dtype}{packed.shape}"
        )
    width = columns if packed.dtype == int8 else (columns + 1) // 2
    if packed.shape[1] != width:
        raise ValueError(
            f"{columns} columns are {width} bytes a row as {packed.dtype}, got packed weights "
            f"{packed.shape}"
        )
    size = _check_group(group_size)
    shape = (len(packed), -(-columns // size) if size else 1)
    if scales.shape != shape or not is_float(scales.dtype):
        raise ValueError(f"scales must be {shape} floats, got {scales.dtype}{scales.shape}")
    if zeros is not None and (packed.dtype == int8 or zeros.dtype != uint8 or zeros.shape != shape):
        raise ValueError(
            f"zero points go with 4 bits, as uint8{shape}; got {zeros.dtype}{zeros.shape} with "
            f"{packed.dtype} weights"
        )
    return size


def _check_group(group_size: int | None) -> int:
    size = group_size or 0
    if group_size == 0 or size < 0 or (size and (size < 16 or size & (size - 1))):
        raise ValueError(
            f"group_size is a power of two of at least 16, or None for the whole row, got "
            f"{group_size}"
        )
    return size


# --- from numbers to integers ---------------------------------------------------------------------


def quantize(
    weight: Any, bits: int = 8, group_size: int | None = None, symmetric: bool = True
) -> Quantized:
    """(packed, scales, zeros) such that (q − z) s is nearly the weight: each is rounded by itself

    Args:
        weight: (N, K) floats, the rows being those of a Linear.
        bits: 8 or 4.
        group_size: G, how many neighbours of a row share a scale: a power of two of at least 16
            (32, 64 and 128 are usual); None: the whole row. The last group may be shorter.
        symmetric: without zero points. With 4 bits they spread the sixteen numbers better where
            a group is not centred; with 8 bits there are none.

    Returns:
        Tensors outside the graph. Scales are float32, or of the weight's dtype where that is
        of half precision.

    Raises:
        ValueError: bits other than 8 and 4, another shape, or weights that are not finite.
    """
    w = as_tensor(weight).data
    if bits not in (8, 4):
        raise ValueError(f"quantize() knows 8 and 4 bits, got {bits}")
    if bits == 8 and not symmetric:
        raise ValueError("quantize() has zero points with 4 bits only: leave symmetric=True")
    if w.ndim != 2 or not is_float(w.dtype):
        raise ValueError(f"quantize() takes a matrix of floats, got {w.dtype}{w.shape}")
    (n, k), xp, size = w.shape, namespace(w), _check_group(group_size)
    shape = (n, -(-k // size) if size else 1)
    packed = xp.empty(
        (n, k) if bits == 8 else (n, (k + 1) // 2), dtype=int8 if bits == 8 else uint8
    )
    scales = xp.empty(shape, dtype=w.dtype if w.dtype.itemsize == 2 else float32)
    zeros = None if symmetric else xp.empty(shape, dtype=uint8)

    def compute(rows: slice) -> None:
        block = w[rows].astype(float32)
        if not bool(xp.isfinite(block).all()):
            raise ValueError("quantize() needs finite weights, got NaN or infinity")
        grouped = _grouped(block, size or max(k, 1))  # (rows, groups, G)
        if symmetric:
            most = 127 if bits == 8 else 7
            scales[rows] = _scales(xp.abs(grouped).max(axis=2) / most, scales.dtype)
            z: Any = 0 if bits == 8 else 8
            low = 8 - most if bits == 4 else -most
        else:
            lowest = xp.minimum(grouped.min(axis=2), 0)
            highest = xp.maximum(grouped.max(axis=2), 0)
            assert zeros is not None
            scales[rows] = _scales((highest - lowest) / 15, scales.dtype)
            z = xp.clip(xp.rint(-lowest / scales[rows].astype(float32)), 0, 15)
            zeros[rows], z, low = z.astype(uint8), z[..., None], 0
        q = xp.rint(grouped / scales[rows].astype(float32)[..., None]) + z
        q = xp.clip(q, low, 127 if bits == 8 else 15).reshape(len(block), -1)[:, :k]
        packed[rows] = q.astype(int8) if bits == 8 else _two_a_byte(q)

    over_rows(compute, w)
    return Quantized(Tensor(packed), Tensor(scales), None if zeros is None else Tensor(zeros))


def _grouped(w: Array, size: int) -> Array:
    """(rows, groups, G), the last group filled up with zeros."""
    missing = -w.shape[1] % size
    if missing or not w.shape[1]:
        w = namespace(w).pad(w, ((0, 0), (0, missing or size)))
    return w.reshape(len(w), -1, size)


def _scales(values: Array, dtype: Any) -> Array:
    """In their dtype, as they will be multiplied with; 1 for a group of zeros."""
    values = values.astype(dtype)
    return namespace(values).where(values == 0, dtype.type(1), values)


def _two_a_byte(q: Array) -> Array:
    """q (rows, K) -> (rows, ⌈K/2⌉): an odd last one has an 8 beside it."""
    q = q.astype(uint8)
    if q.shape[1] % 2:
        q = namespace(q).pad(q, ((0, 0), (0, 1)), constant_values=8)
    return q[:, ::2] | (q[:, 1::2] << 4)
