"""Rotary position embedding: pairs of elements, turned by angles that grow with the position.

    (y₁, y₂) = (x₁ cos θ − x₂ sin θ, x₂ cos θ + x₁ sin θ)        θᵢ(t) = t · base^(−2i/D)

x₁ and x₂ are the halves of the last axis, i counts through one of them (Hugging Face's convention
for Llama: element i is paired with element i + D/2); interleaved, they are its even and its odd
elements. The product of a query at t and a key at s then depends on t − s only. A rotation's
inverse is that by −θ, and its transpose, too: the gradient of x is g turned back.

The angles come as tables of cos and sin, which every layer, head and step shares: sines of large
angles are slow, and in float32 wrong, for the angle itself has no digits left behind its point.
`ops.rotary_tables` computes them in float64. Other angles (stretched to long contexts, or of
positions that skip) are other tables.

Bytes: 2·|x| and what of the tables is not in a cache; FLOPs: 3 an element.

Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from tinygrad_llm.backend import Array, namespace
from tinygrad_llm.kernels.compile import Specimen
from tinygrad_llm.kernels.language import INTERPRETED, tl, triton
from tinygrad_llm.kernels.launch import cdiv, launch, next_power_of_2
from tinygrad_llm.kernels.layout import as_rows, check_floats, needs_int64
from tinygrad_llm.kernels.tiles import columns_of, row_offset, rows_of
from tinygrad_llm.kernels.tune import Config, choose


def forward(
    x: Array,
    cos: Array,
    sin: Array,
    *,
    offset: int = 0,
    interleaved: bool = False,
    config: Config | None = None,
) -> tuple[Array, tuple[Array, Array]]:
    """y: row t of x, turned by the angles in row offset + t of the tables.

    Args:
        x: (…, T, D) float32, float16 or bfloat16, any strides; D is even. Queries and keys as
            (B, H, T, D), or views of (B, T, H, D) with their axes swapped.
        cos, sin: (…, P, D/2) with P ≥ offset + T, in any of these dtypes; leading axes broadcast to
            those of x.
        offset: the position of x's first row: how many tokens are in the cache already.
        interleaved: pair neighbours, 2i with 2i + 1, instead of i with i + D/2.
        config: {'ROWS', 'BLOCK', 'num_warps'} instead of the tuned one. BLOCK columns of a half
            are turned at a time.

    Returns:
        (y, saved): y is contiguous, of x's dtype and shape; saved are the tables.
    """
    return _rotated(x, cos, sin, offset, 1.0, interleaved, config), (cos, sin)


def backward(
    g: Array,
    cos: Array,
    sin: Array,
    *,
    offset: int = 0,
    interleaved: bool = False,
    config: Config | None = None,
) -> Array:
    """dx: g turned by −θ.

    Args:
        g: the gradient of y, (…, T, D), any strides.
        cos, sin: what `forward` saved; the options are those of the forward.
    """
    return _rotated(g, cos, sin, offset, -1.0, interleaved, config)


def _rotated(
    x: Array,
    cos: Array,
    sin: Array,
    offset: int,
    sign: float,
    interleaved: bool,
    config: Config | None,
) -> Array:
    cos, sin = _check(x, cos, sin, offset)
    y = namespace(x).empty(x.shape, dtype=x.dtype)
    if x.size == 0:
        return y
    half = x.shape[-1] // 2
    rows = x.size // x.shape[-1]
    pairs = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    arrays, sizes, steps = as_rows(*pairs, cos, sin)
    wide = needs_int64(x, cos, sin)

    def run(config: Config) -> None:
        launch(
            _rotate,
            (cdiv(rows, config["ROWS"]), cdiv(half, config["BLOCK"])),
            *(*arrays, y, rows, half, sign, *sizes),
            *steps[0],  # x₂ has the strides of x₁
            *(*steps[2], *steps[3]),
            *((2, 1) if interleaved else (1, half)),
            WIDE=wide,
            **config,
        )

    run(config or choose(_rotate, _candidates(rows, half), x, (rows, half), run))
    return y


def _check(x: Array, cos: Array, sin: Array, offset: int) -> tuple[Array, Array]:
    """The rows of the tables that x needs, with x's leading axes."""
    check_floats("rotary", x, cos, sin)
    if x.ndim < 2 or x.shape[-1] % 2:
        raise ValueError(f"rotary needs an array (…, T, D) with an even D, got {x.shape}")
    if cos.shape != sin.shape or cos.ndim < 2 or cos.shape[-1] != x.shape[-1] // 2:
        raise ValueError(
            f"rotary needs tables of cos and sin (…, P, {x.shape[-1] // 2}) for heads of "
            f"{x.shape[-1]}, got {cos.shape} and {sin.shape}"
        )
    stop = offset + x.shape[-2]
    if offset < 0 or stop > cos.shape[-2]:
        raise ValueError(
            f"rotary needs positions {offset} to {stop - 1}, but the tables hold 0 to "
            f"{cos.shape[-2] - 1}: make longer ones"
        )
    shape = (*x.shape[:-1], x.shape[-1] // 2)
    try:
        cos, sin = (namespace(x).broadcast_to(t[..., offset:stop, :], shape) for t in (cos, sin))
    except ValueError:
        raise ValueError(
            f"rotary needs tables whose leading axes broadcast to those of x, {x.shape[:-2]}, got "
            f"{cos.shape[:-2]}"
        ) from None
    return cos, sin


@functools.lru_cache(1024)
def _candidates(rows: int, half: int) -> tuple[Config, ...]:
    """Tiles of both halves; a thread turns 4 to 16 pairs."""
    whole = next_power_of_2(half)
    if INTERPRETED:  # a program costs about the same whatever its size: few large ones
        block = min(whole, 4096)
        rows = min(next_power_of_2(rows), max(1, 65536 // block))
        return ({"ROWS": rows, "BLOCK": block, "num_warps": 4},)
    block = min(whole, 1024)
    return tuple(
        [
            {"ROWS": max(1, tile // block), "BLOCK": block, "num_warps": warps}
            for tile, warps in ((1024, 4), (2048, 8), (1024, 2), (2048, 4), (512, 4))
        ]
    )


@triton.jit
def _rotate(
    x1, x2, cos, sin, y, rows, half, sign, n1, n2,
    x_0, x_1, x_2, x_3, c0, c1, c2, c3, s0, s1, s2, s3, y_3, apart,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of pairs: ROWS rows, BLOCK columns of both halves; x₁ and x₂ have the same strides.

    In y pairs are y_3 elements from each other, and the two of a pair `apart`.
    """
    row, row_inside = rows_of(tl.program_id(0), rows, ROWS)
    column, column_inside = columns_of(tl.program_id(1) * BLOCK, half, BLOCK, WIDE)
    inside = row_inside & column_inside
    place = row_offset(row, n1, n2, x_0, x_1, x_2) + column * x_3
    a = tl.load(x1 + place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x2 + place, mask=inside, other=0.0).to(tl.float32)
    c = cos + row_offset(row, n1, n2, c0, c1, c2) + column * c3
    s = sin + row_offset(row, n1, n2, s0, s1, s2) + column * s3
    c = tl.load(c, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(s, mask=inside, other=0.0).to(tl.float32) * sign
    out = y + row * (2 * half) + column * y_3
    tl.store(out, (a * c - b * s).to(y.dtype.element_ty), mask=inside)
    tl.store(out + apart, (b * c + a * s).to(y.dtype.element_ty), mask=inside)


def specimens(dtype: str) -> Iterator[Specimen]:
    """Llama's heads of 128, as a (B, T, H, D) view with its axes swapped, and with 64-bit steps."""
    size, x = (4 if dtype == "fp32" else 2), f"*{dtype}"
    arrays = {"x1": x, "x2": x, "cos": "*fp32", "sin": "*fp32", "y": x, "sign": 1.0}
    shape = {"rows": 4 * 32 * 2048, "half": 64, "n1": 32, "n2": 2048}
    steps = {"x_0": 2048 * 4096, "x_1": 128, "x_2": 4096}
    table = {f"{name}{i}": (0, 0, 64, 1)[i] for name in "cs" for i in range(4)}
    halves, neighbours = {"x_3": 1, "y_3": 1, "apart": 64}, {"x_3": 2, "y_3": 2, "apart": 1}
    for name, pairs, wide in (
        ("heads of 128", halves, False),
        ("heads of 128, 64 bits", halves, True),
        ("heads of 128, interleaved", neighbours, False),
    ):
        yield Specimen(
            name,
            _rotate,
            arrays | shape | steps | table | pairs | {"WIDE": wide, "ROWS": 16, "BLOCK": 64},
            bytes=16 * 64 * (4 * size + 2 * 4),
            flops=16 * 64 * 6,
        )
