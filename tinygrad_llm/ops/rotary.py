"""Rotary position embedding: queries and keys, turned by angles that grow with the position.

After it the product of a query at t and a key at s depends on t − s only. Llama, Mistral, Qwen and
GPT-NeoX know their positions by it. Angles come as tables of cos and sin that all layers, heads and
steps share (`rotary_tables`).

Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.autograd import Function
from tinygrad_llm.backend import Array, float64, namespace
from tinygrad_llm.ops.convert import as_array, as_float, widened
from tinygrad_llm.tensor import Tensor


class Rotary(Function):
    """(y₁, y₂) = (x₁ cos θ − x₂ sin θ, x₂ cos θ + x₁ sin θ)        dx = g turned by −θ

    x₁ and x₂ are the halves of the last axis, or interleaved: its even and odd elements. A turn is
    linear, and so its gradient is the op itself, of any order.
    """

    kernel = "rotary"

    def forward(self, x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
        self.cos, self.sin, self.interleaved = cos, sin, interleaved
        return _turned(x, cos, sin, interleaved)

    def backward(self, g: Any) -> Any:
        back = {"cos": self.cos, "sin": -self.sin, "interleaved": self.interleaved}
        return Rotary.apply(g, **back) if isinstance(g, Tensor) else _turned(g, **back)

    def forward_kernel(
        self, kernel: Any, x: Array, cos: Array, sin: Array, interleaved: bool
    ) -> tuple[Array, Any]:
        self.cos, self.sin, self.interleaved = cos, sin, interleaved
        return kernel.forward(x, cos, sin, interleaved=interleaved)

    def backward_kernel(self, kernel: Any, g: Array, *saved: Any) -> Array:
        return kernel.backward(g, *saved, interleaved=self.interleaved)


def _turned(x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    y = namespace(x).empty(x.shape, dtype=x.dtype)
    (a, b), (into_a, into_b) = (_halves(z, interleaved) for z in (x, y))
    a, b = widened(a), widened(b)
    into_a[...] = a * cos - b * sin
    into_b[...] = b * cos + a * sin
    return y


def _halves(x: Array, interleaved: bool) -> tuple[Array, Array]:
    """Views of x₁ and x₂."""
    half = x.shape[-1] // 2
    return (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])


def rotary_embedding(
    x: Any, cos: Any, sin: Any, offset: int = 0, interleaved: bool = False
) -> Tensor:
    """y = x, row t turned by the angles in row offset + t of the tables.

        cos, sin = rotary_tables(2048, 64, base=500000.0)
        q, k = (rotary_embedding(x, cos, sin, offset=cache.length) for x in (q, k))

    Args:
        x: (…, T, D) with an even D: queries or keys, (B, H, T, D).
        cos, sin: (…, P, D/2) with P ≥ offset + T: of `rotary_tables`, or of one's own. Leading axes
            broadcast to x's: cos[positions][:, None] of positions (B, T) gives each text its own.
            They are constants: no gradient goes to them.
        offset: the position of x's first row: how many are in the cache already.
        interleaved: pair element 2i with 2i + 1, as do the paper, GPT-J and Meta's own weights of
            Llama; otherwise i with i + D/2, as Hugging Face's Llama and GPT-NeoX.

    Raises:
        ValueError: shapes that do not fit, or positions beyond the end of the tables.
    """
    x = as_float(x)
    if x.ndim < 2 or x.shape[-1] % 2:
        raise ValueError(f"rotary_embedding() takes x (…, T, D) with an even D, got {x.shape}")
    dtype = float64 if x.dtype == float64 else backend.float32
    cos, sin = (as_array(table, x.data).astype(dtype, copy=False) for table in (cos, sin))
    _check_tables(x.shape, cos.shape, sin.shape, offset)
    rows = slice(offset, offset + x.shape[-2])
    return Rotary.apply(
        x, cos=cos[..., rows, :], sin=sin[..., rows, :], interleaved=bool(interleaved)
    )


def _check_tables(
    x: tuple[int, ...], cos: tuple[int, ...], sin: tuple[int, ...], offset: int
) -> None:
    half, stop = x[-1] // 2, offset + x[-2]
    if cos != sin or len(cos) < 2 or cos[-1] != half:
        raise ValueError(
            f"rotary_embedding() of heads of {x[-1]} needs cos and sin (…, P, {half}), got {cos} "
            f"and {sin}"
        )
    if offset < 0 or stop > cos[-2]:
        raise ValueError(
            f"rotary_embedding() needs positions {offset} to {stop - 1}, but the tables hold 0 to "
            f"{cos[-2] - 1}: make longer ones"
        )
    lead = x[:-2]
    fits = [n in (1, m) for n, m in zip(cos[-3::-1], lead[::-1], strict=False)]
    if len(cos) > len(x) or not all(fits):
        raise ValueError(
            f"rotary_embedding() needs tables whose leading axes broadcast to x's, {lead}, got "
            f"{cos[:-2]}"
        )


# --- tables ---------------------------------------------------------------------------------------


def rotary_tables(
    positions: int,
    size: int,
    base: float | None = None,
    scaling: Mapping[str, Any] | None = None,
    dtype: Any = None,
) -> tuple[Tensor, Tensor]:
    """(cos θ, sin θ), each (positions, size/2): θᵢ(t) = t · base^(−2i/size), for t = 0, 1, …

    Computed in float64: the float32 angle of a late position has no digits left behind its point.

    Args:
        positions: P, how many.
        size: of a head, D, an even number.
        base: Hugging Face's rope_theta; the slowest pair turns once in nearly 2π · base positions.
            Left out, it is the "rope_theta" in `scaling`, or 10000.
        scaling: how the angles are stretched to contexts longer than those of training, as in the
            `rope_scaling` of a Hugging Face config: a "rope_type" with its numbers.

            - "default": not at all
            - "linear": factor; every angle is divided by it (Chen et al., 2023)
            - "dynamic": factor, original_max_position_embeddings; a larger base, once `positions`
              goes beyond the original number
            - "yarn": factor, original_max_position_embeddings; slow pairs as in "linear", fast ones
              not at all; and cos and sin grow a little (Peng et al., 2023)
            - "llama3": factor, low_freq_factor, high_freq_factor,
              original_max_position_embeddings; the same idea, of Llama 3.1
        dtype: of the tables; float32 if left out.

    Raises:
        ValueError: an odd size, or a scaling that is unknown, lacks a number or has one too many.
    """
    if positions < 0 or size < 0 or size % 2:
        raise ValueError(f"rotary tables need an even head size, got {size} ({positions=})")
    scaling = dict(scaling or {})
    theta = scaling.pop("rope_theta", 10000.0)
    base = float(theta if base is None else base)
    frequencies, amplitude = _frequencies(positions, size, base, scaling)
    angles = np.arange(positions, dtype=np.float64)[:, None] * frequencies
    dtype = backend.as_dtype(backend.float32 if dtype is None else dtype)
    cos, sin = (Tensor((amplitude * f(angles)).astype(dtype)) for f in (np.cos, np.sin))
    return cos, sin


def _frequencies(
    positions: int, size: int, base: float, scaling: dict[str, Any]
) -> tuple[np.ndarray, float]:
    """(θᵢ(1), what cos and sin are multiplied by)"""
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    if kind not in _NUMBERS:
        raise ValueError(f"rotary scaling is one of {', '.join(_NUMBERS)}, got {kind!r}")
    missing = [name for name in _NUMBERS[kind] if name not in scaling]
    if missing:
        raise ValueError(f"rotary scaling of the type {kind!r} needs {', '.join(missing)}")
    unknown = set(scaling) - {*_NUMBERS[kind], *_OPTIONAL[kind == "yarn"]}
    if unknown:
        raise ValueError(f"rotary scaling of the type {kind!r} has no {', '.join(sorted(unknown))}")
    if kind == "default":
        return _powers(size, base), 1.0
    factor, *others = (float(scaling[name]) for name in _NUMBERS[kind])
    if kind == "dynamic":
        stretch = factor * max(positions, others[0]) / others[0] - (factor - 1)
        return _powers(size, base * stretch ** (size / (size - 2))), 1.0
    frequencies = _powers(size, base)
    if kind == "yarn":
        return _yarn(frequencies, base, factor, others[0], scaling)
    if kind == "llama3":
        return _llama3(frequencies, factor, *others), 1.0
    return frequencies / factor, 1.0


_ORIGINAL = "original_max_position_embeddings"
_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", _ORIGINAL),
    "yarn": ("factor", _ORIGINAL),
    "llama3": ("factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"),
}
_OPTIONAL = ((), ("beta_fast", "beta_slow", "attention_factor"))


def _powers(size: int, base: float) -> np.ndarray:
    return base ** (-np.arange(0, size, 2, dtype=np.float64) / max(size, 1))


def _llama3(
    frequencies: np.ndarray, factor: float, original: float, low: float, high: float
) -> np.ndarray:
    """A pair that turns `low` times or less in the original context is slowed by the factor, one
    that turns `high` times or more is left alone."""
    turns = original * frequencies / (2 * math.pi)
    alone = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (alone + (1.0 - alone) / factor)


def _yarn(
    frequencies: np.ndarray,
    base: float,
    factor: float,
    original: float,
    scaling: dict[str, Any],
) -> tuple[np.ndarray, float]:
    """As llama3, but the ramp is straight in the number of the pair, between whole numbers."""
    half = len(frequencies)

    def pair(turns: float) -> float:  # the one that turns so often in the original context
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(base)

    first = max(math.floor(pair(float(scaling.get("beta_fast") or 32.0))), 0)
    last = min(math.ceil(pair(float(scaling.get("beta_slow") or 1.0))), 2 * half - 1)
    slowed = np.clip((np.arange(half) - first) / max(last - first, 0.001), 0.0, 1.0)
    amplitude = scaling.get("attention_factor")
    if amplitude is None:
        amplitude = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return frequencies * (1.0 - slowed + slowed / factor), float(amplitude)
