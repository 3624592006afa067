"""softmax and log-softmax over the last axis, with scale and masks: one walk over memory.

    z = scale · x + mask, −∞ where a causal mask hides       m = max z       s = Σ e^(z − m)

    softmax       y = e^(z − m) / s        dx = scale · y ⊙ (g − Σ g ⊙ y)
    log-softmax   y = z − m − ln s         dx = scale · (g − e^y Σ g)

A row that is −∞ everywhere gives zeros (−∞ as a logarithm). +∞ or NaN in a row makes all of it NaN.
All arithmetic is float32, whatever the arrays hold.

Where a tile holds whole rows they are read once, kept in registers and written once: forward moves
2·|x| bytes, backward 3·|x|, and nothing can be faster than that. A longer row is walked through in
blocks, twice: forward 3·|x|, backward 5·|x|. Its first walk keeps m and s "online": when a block
raises m, the s of before is multiplied by e^(m_old − m_new). Milakov and Gimelshein, "Online
normalizer calculation for softmax", 2018.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from tinygrad_llm.backend import Array, namespace
from tinygrad_llm.kernels.compile import Specimen
from tinygrad_llm.kernels.language import INTERPRETED, tl, triton
from tinygrad_llm.kernels.launch import cdiv, launch, next_power_of_2
from tinygrad_llm.kernels.layout import as_rows, broadcast, check_floats, needs_int64
from tinygrad_llm.kernels.tiles import columns_of, row_offset, rows_of
from tinygrad_llm.kernels.tune import Config, choose


def forward(
    x: Array,
    mask: Array | None = None,
    *,
    scale: float = 1.0,
    causal: bool = False,
    log: bool = False,
    config: Config | None = None,
) -> tuple[Array, tuple[Array]]:
    """y = softmax(scale · x + mask) over the last axis, or its logarithm.

    Args:
        x: (…, C) float32, float16 or bfloat16, any strides.
        mask: added to the scores, of a shape that broadcasts to x's; −∞ hides.
        scale: a factor on x.
        causal: of T rows on axis −2, row t sees columns up to C − T + t: the last one sees all.
        log: log-softmax instead.
        config: {'ROWS', 'BLOCK', 'num_warps'} instead of the tuned one. One walk where BLOCK ≥ C.

    Returns:
        (y, saved): y is contiguous, of x's dtype and shape; `backward` takes what was saved.
    """
    check_floats("softmax", x, *([] if mask is None else [mask]))
    if x.ndim == 0 or (causal and x.ndim < 2):
        raise ValueError(f"softmax needs an array (…, C){', (…, T, C) if causal' * causal}")
    y = namespace(x).empty(x.shape, dtype=x.dtype)
    if x.size == 0:
        return y, (y,)
    mask = mask if mask is None else broadcast("softmax", mask, x.shape, "a mask")
    columns, queries = x.shape[-1], x.shape[-2] if causal else 1
    rows = x.size // columns
    (x, mask), sizes, (x_steps, mask_steps) = as_rows(x, mask)
    wide = needs_int64(x, *([] if mask is None else [mask]))

    def run(config: Config) -> None:
        kernel = _forward_whole_rows if config["BLOCK"] >= columns else _forward_online
        launch(
            kernel,
            cdiv(rows, config["ROWS"]),
            *(x, mask, y, rows, columns),
            *(*sizes, *x_steps, *mask_steps),
            *(queries, float(scale)),
            CAUSAL=causal,
            LOG=log,
            WIDE=wide,
            **config,
        )

    run(config or choose(_forward_online, _candidates(rows, columns), x, (rows, columns), run))
    return y, (y,)


def backward(
    g: Array,
    y: Array,
    *,
    scale: float = 1.0,
    causal: bool = False,
    log: bool = False,
    config: Config | None = None,
) -> Array:
    """dx = scale · y ⊙ (g − Σ g ⊙ y), for the logarithm scale · (g − e^y Σ g).

    Args:
        g: the gradient of y, of y's shape, any strides.
        y: what `forward` saved; the options are those of the forward.

    Returns:
        dx, contiguous, of y's dtype. What a causal mask hides gets 0.
    """
    check_floats("softmax", g, y)
    if g.shape != y.shape:
        raise ValueError(f"softmax needs a gradient of the shape {y.shape}, got {g.shape}")
    dx = namespace(y).empty(y.shape, dtype=y.dtype)
    if y.size == 0:
        return dx
    columns, queries = y.shape[-1], y.shape[-2] if causal else 1
    rows = y.size // columns
    (g, y), sizes, (g_steps, y_steps) = as_rows(g, y)
    wide = needs_int64(g, y)

    def run(config: Config) -> None:
        kernel = _backward_whole_rows if config["BLOCK"] >= columns else _backward_blocks
        launch(
            kernel,
            cdiv(rows, config["ROWS"]),
            *(g, y, dx, rows, columns),
            *(*sizes, *g_steps, *y_steps),
            *(queries, float(scale)),
            CAUSAL=causal,
            LOG=log,
            WIDE=wide,
            **config,
        )

    candidates = _candidates(rows, columns, longest=16384)  # more would not fit into registers
    run(config or choose(_backward_blocks, candidates, g, (rows, columns), run))
    return dx


@functools.lru_cache(1024)
def _candidates(rows: int, columns: int, longest: int = 32768) -> tuple[Config, ...]:
    """What may be fastest, the likeliest first: whole rows up to `longest`, or else blocks.

    A thread should hold 4 to 32 numbers: less gives it no loads to overlap, more no registers.
    """
    whole = next_power_of_2(columns)
    if INTERPRETED:  # a program costs about the same whatever its size: few large ones
        block = min(whole, 4096)
        return (_config(min(next_power_of_2(rows), max(1, 65536 // block)), block, 4),)
    found = []
    if whole <= longest:
        for tile in (2048, 4096, 8192, 1024):
            tile_rows = max(1, tile // whole)
            warps = min(16, max(1, tile_rows * whole // 512))
            found.append(_config(tile_rows, whole, warps))
            if tile_rows == 1:
                found.append(_config(1, whole, min(32, 2 * warps)))
    if whole >= 8192:
        found += [_config(1, block, block // 256) for block in (4096, 8192, 2048)]
    return tuple([c for i, c in enumerate(found) if c not in found[:i]])


def _config(rows: int, block: int, warps: int) -> Config:
    return {"ROWS": rows, "BLOCK": block, "num_warps": warps}


# --- a tile of scores -----------------------------------------------------------------------------


@triton.jit
def _scores(
    x, x_step, mask, mask_step, row, column, inside, columns, queries, scale, CAUSAL: tl.constexpr
):
    """z = scale · x + mask, with −∞ where nothing is or may be seen."""
    z = tl.load(x + column * x_step, mask=inside, other=-float("inf")).to(tl.float32) * scale
    if mask is not None:
        z += tl.load(mask + column * mask_step, mask=inside, other=0.0).to(tl.float32)
    if CAUSAL:
        inside = inside & (column <= row % queries + (columns - queries))
    return tl.where(inside, z, -float("inf"))


@triton.jit
def _finite(m):
    """m, but 0 for −∞: there is nothing to subtract, and −∞ − −∞ would be NaN."""
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def _normalised(z, m, s, LOG: tl.constexpr):
    """y, where s = 0 (everything hidden) divides by nothing."""
    s = tl.where(s == 0.0, 1.0, s)
    if LOG:
        return z - m - tl.log(s)
    else:
        return tl.exp(z - m) / s


# --- forward --------------------------------------------------------------------------------------


@triton.jit
def _forward_whole_rows(
    x, mask, y, rows, columns, n1, n2,
    x0, x1, x2, x3, mask0, mask1, mask2, mask3, queries, scale,
    CAUSAL: tl.constexpr, LOG: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One walk: a program's tile holds ROWS rows from their first to their last column."""
    row, row_inside = rows_of(tl.program_id(0), rows, ROWS)
    column, column_inside = columns_of(0, columns, BLOCK, WIDE)
    inside = row_inside & column_inside
    x += row_offset(row, n1, n2, x0, x1, x2)
    if mask is not None:
        mask += row_offset(row, n1, n2, mask0, mask1, mask2)
    z = _scores(x, x3, mask, mask3, row, column, inside, columns, queries, scale, CAUSAL)
    m = _finite(tl.max(z, 1, keep_dims=True))
    s = tl.sum(tl.exp(z - m), 1, keep_dims=True)
    out = _normalised(z, m, s, LOG)
    tl.store(y + row * columns + column, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _forward_online(
    x, mask, y, rows, columns, n1, n2,
    x0, x1, x2, x3, mask0, mask1, mask2, mask3, queries, scale,
    CAUSAL: tl.constexpr, LOG: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Two walks over rows of any length: m and s block by block, then y."""
    row, row_inside = rows_of(tl.program_id(0), rows, ROWS)
    x += row_offset(row, n1, n2, x0, x1, x2)
    if mask is not None:
        mask += row_offset(row, n1, n2, mask0, mask1, mask2)
    m = tl.full([ROWS, 1], -float("inf"), tl.float32)
    s = tl.zeros([ROWS, 1], tl.float32)
    for start in range(0, columns, BLOCK):
        column, column_inside = columns_of(start, columns, BLOCK, WIDE)
        inside = row_inside & column_inside
        z = _scores(x, x3, mask, mask3, row, column, inside, columns, queries, scale, CAUSAL)
        m_new = tl.maximum(m, tl.max(z, 1, keep_dims=True))
        base = _finite(m_new)
        s = s * tl.exp(m - base) + tl.sum(tl.exp(z - base), 1, keep_dims=True)
        m = m_new
    m = _finite(m)
    for start in range(0, columns, BLOCK):
        column, column_inside = columns_of(start, columns, BLOCK, WIDE)
        inside = row_inside & column_inside
        z = _scores(x, x3, mask, mask3, row, column, inside, columns, queries, scale, CAUSAL)
        out = _normalised(z, m, s, LOG)
        tl.store(y + row * columns + column, out.to(y.dtype.element_ty), mask=inside)


# --- backward -------------------------------------------------------------------------------------


@triton.jit
def _loaded(g, g_step, y, y_step, column, inside, LOG: tl.constexpr):
    """(g, p) in float32, with p = softmax, and 0 in both outside of the rows."""
    dy = tl.load(g + column * g_step, mask=inside, other=0.0).to(tl.float32)
    p = tl.load(y + column * y_step, mask=inside, other=0.0).to(tl.float32)
    if LOG:
        p = tl.where(inside, tl.exp(p), 0.0)
    return dy, p


@triton.jit
def _gradient(
    dy, p, total, row, column, columns, queries, scale, CAUSAL: tl.constexpr, LOG: tl.constexpr
):
    if LOG:
        dx = scale * (dy - p * total)
    else:
        dx = scale * p * (dy - total)
    if CAUSAL:
        dx = tl.where(column <= row % queries + (columns - queries), dx, 0.0)
    return dx


@triton.jit
def _backward_whole_rows(
    g, y, dx, rows, columns, n1, n2, g0, g1, g2, g3, y0, y1, y2, y3, queries, scale,
    CAUSAL: tl.constexpr, LOG: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One walk, as `_forward_whole_rows`."""
    row, row_inside = rows_of(tl.program_id(0), rows, ROWS)
    column, column_inside = columns_of(0, columns, BLOCK, WIDE)
    inside = row_inside & column_inside
    g += row_offset(row, n1, n2, g0, g1, g2)
    y += row_offset(row, n1, n2, y0, y1, y2)
    dy, p = _loaded(g, g3, y, y3, column, inside, LOG)
    total = tl.sum(dy if LOG else dy * p, 1, keep_dims=True)
    out = _gradient(dy, p, total, row, column, columns, queries, scale, CAUSAL, LOG)
    tl.store(dx + row * columns + column, out.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _backward_blocks(
    g, y, dx, rows, columns, n1, n2, g0, g1, g2, g3, y0, y1, y2, y3, queries, scale,
    CAUSAL: tl.constexpr, LOG: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Two walks: Σ g ⊙ y block by block, then dx."""
    row, row_inside = rows_of(tl.program_id(0), rows, ROWS)
    g += row_offset(row, n1, n2, g0, g1, g2)
    y += row_offset(row, n1, n2, y0, y1, y2)
    total = tl.zeros([ROWS, 1], tl.float32)
    for start in range(0, columns, BLOCK):
        column, column_inside = columns_of(start, columns, BLOCK, WIDE)
        dy, p = _loaded(g, g3, y, y3, column, row_inside & column_inside, LOG)
        total += tl.sum(dy if LOG else dy * p, 1, keep_dims=True)
    for start in range(0, columns, BLOCK):
        column, column_inside = columns_of(start, columns, BLOCK, WIDE)
        inside = row_inside & column_inside
        dy, p = _loaded(g, g3, y, y3, column, inside, LOG)
        out = _gradient(dy, p, total, row, column, columns, queries, scale, CAUSAL, LOG)
        tl.store(dx + row * columns + column, out.to(dx.dtype.element_ty), mask=inside)


# --- for the x-ray --------------------------------------------------------------------------------


def specimens(dtype: str) -> Iterator[Specimen]:
    """What a GPT launches: causal scores of 1024 keys, and logits over GPT-2's tokens."""
    size = 4 if dtype == "fp32" else 2
    arrays = {"x": f"*{dtype}", "mask": None, "y": f"*{dtype}"}
    gradients = {"g": f"*{dtype}", "y": f"*{dtype}", "dx": f"*{dtype}"}
    flags = {"CAUSAL": True, "LOG": False, "WIDE": False}
    logs = {"CAUSAL": False, "LOG": True, "WIDE": True}
    masks = {"mask0": 0, "mask1": 0, "mask2": 0, "mask3": 0}

    def shape(names: str, rows: int, columns: int, queries: int) -> dict[str, Any]:
        steps = {f"{name}{i}": (columns, 0, 0, 1)[i] for name in names for i in range(4)}
        sizes = {"rows": rows, "columns": columns, "n1": 1, "n2": 1}
        return steps | sizes | {"queries": queries, "scale": 0.125}

    scores = (4096, 1024, 1024)
    tile = {"ROWS": 2, "BLOCK": 1024}
    yield Specimen(
        "forward, whole rows",
        _forward_whole_rows,
        arrays | masks | shape("x", *scores) | flags | tile,
        bytes=2 * 2 * 1024 * size,
        flops=5 * 2 * 1024,
    )
    yield Specimen(
        "backward, whole rows",
        _backward_whole_rows,
        gradients | shape("gy", *scores) | flags | tile,
        bytes=3 * 2 * 1024 * size,
        flops=4 * 2 * 1024,
    )
    # 50304: GPT-2's 50257 tokens, padded so that each row begins where wide loads may.
    logits, blocks = (4096, 50304, 1), {"ROWS": 1, "BLOCK": 4096}
    yield Specimen(
        "forward, online, log",
        _forward_online,
        arrays | masks | shape("x", *logits) | logs | blocks,
        num_warps=16,
        bytes=3 * 50304 * size,
        flops=9 * 50304,
    )
    yield Specimen(
        "backward, blocks, log",
        _backward_blocks,
        gradients | shape("gy", *logits) | logs | blocks,
        num_warps=16,
        bytes=5 * 50304 * size,
        flops=7 * 50304,
    )
    most = {"ROWS": 1, "BLOCK": 32768}
    yield Specimen(
        "forward, the longest whole row",
        _forward_whole_rows,
        arrays | masks | shape("x", 64, 32768, 1) | flags | most,
        num_warps=32,
        bytes=2 * 32768 * size,
        flops=5 * 32768,
    )
    most = {"ROWS": 1, "BLOCK": 16384}
    yield Specimen(
        "backward, the longest whole row",
        _backward_whole_rows,
        gradients | shape("gy", 64, 16384, 1) | flags | most,
        num_warps=32,
        bytes=3 * 16384 * size,
        flops=4 * 16384,
    )
    mask = {"mask": f"*{dtype}", "mask0": 0, "mask1": 0, "mask2": 1024, "mask3": 1}
    yield Specimen(
        "forward, causal and a mask",
        _forward_whole_rows,
        arrays | mask | shape("x", 4096, 1024, 1024) | flags | tile,
        bytes=3 * 2 * 1024 * size,
        flops=6 * 2 * 1024,
    )
