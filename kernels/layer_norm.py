"""Layer norm and RMS norm over the last axis, after a residual add if there is one.

    s = x + r                 what is normalised: x alone where there is no residual
    x̂ = (s − μ) ρ             ρ = 1 / √(var(s) + ε); for RMS norm μ = 0 and ρ = 1 / √(mean(s²) + ε)
    y = x̂ ⊙ w + b

    ds = ρ (ĝ − mean(ĝ) − x̂ mean(ĝ ⊙ x̂)) + gₛ        ĝ = g ⊙ w; RMS norm without mean(ĝ)
    dw = Σ g ⊙ x̂        db = Σ g, over rows

gₛ is the gradient that reaches s by its other way, and ds that of both x and r. The sum is rounded
to its dtype before it is normalised, so that y = norm(s) of the s that is given out; all other
arithmetic is float32.

**The mean and the variance.** E[x²] − μ² would cancel where the mean is large. A row that a tile
holds is centred in registers: d = s − Σs/C, then μ = Σs/C + Σd/C, since the first mean was rounded,
and var = Σd²/C − (Σd/C)², where the last term is a mere correction (the "corrected two-pass
algorithm" of Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983). In a
longer row each lane of the block follows the mean and the squares of its own numbers, less its
first one (Welford 1962); at the end the lanes are joined as Chan et al. join parts. Saved are ρ and
both parts of μ, so that backward sees the x̂ of the forward even where std(s) is but a few units in
the last place of μ.

**Bytes.** Where a tile holds whole rows: forward 2·|x|, with a residual 4·|x|; backward 3·|x|, with
gₛ 4·|x|. Longer rows are walked through twice: forward 3·|x| (6·|x|), backward 5·|x| for ds and
2·|x| for dw and db.

**dw and db are deterministic.** Each program walks through a strip of the rows and adds up one part
of them in registers; a second kernel adds the parts in a fixed order. No atomics.

Ba, Kiros, Hinton, "Layer Normalization", 2016. Zhang and Sennrich, "Root Mean Square Layer
Normalization", 2019.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from tinygrad_llm.backend import Array, namespace
from tinygrad_llm.kernels.compile import Specimen
from tinygrad_llm.kernels.language import INTERPRETED, tl, triton
from tinygrad_llm.kernels.launch import cdiv, launch, next_power_of_2
from tinygrad_llm.kernels.layout import as_rows, check_floats, needs_int64, strides
from tinygrad_llm.kernels.tiles import columns_of, row_offset, rows_of
from tinygrad_llm.kernels.tune import Config, choose

Saved = tuple[Array, Array | None, Array | None, Array]


def forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    residual: Array | None = None,
    *,
    eps: float = 1e-5,
    rms: bool = False,
    config: Config | None = None,
) -> tuple[Any, Saved]:
    """y = norm(x + residual) ⊙ weight + bias over the last axis.

    Args:
        x: (…, C) float32, float16 or bfloat16, any strides.
        weight, bias: (C,) of any of these dtypes, or None for 1 and 0.
        residual: of x's shape and dtype, or None for 0.
        eps: added to the variance.
        rms: RMS norm, which subtracts no mean.
        config: {'ROWS', 'BLOCK', 'num_warps'} instead of the tuned one. One walk where BLOCK ≥ C.

    Returns:
        (y, saved), or ((y, x + residual), saved) where there is a residual: contiguous, of x's
        dtype and shape. `backward` takes what was saved.
    """
    name = "rms_norm" if rms else "layer_norm"
    _check(name, x, weight, bias)
    xp = namespace(x)
    y, total = xp.empty(x.shape, dtype=x.dtype), None
    if residual is not None:
        if residual.shape != x.shape or residual.dtype != x.dtype:
            raise ValueError(
                f"{name} needs a residual of x's shape and dtype, {x.shape} {x.dtype}, got "
                f"{residual.shape} {residual.dtype}"
            )
        total = xp.empty(x.shape, dtype=x.dtype)
    columns = x.shape[-1]
    rows = x.size // max(1, columns)
    stats = xp.empty((1 if rms else 3, rows), dtype=xp.float32)
    saved = (x if total is None else total, weight, bias, stats)
    out = y if total is None else (y, total)
    if x.size == 0:
        return out, saved
    (x, residual), sizes, (x_steps, r_steps) = as_rows(x, residual)
    wide = needs_int64(x, *[a for a in (residual, weight, bias) if a is not None])

    def run(config: Config) -> None:
        kernel = _forward_whole_rows if config["BLOCK"] >= columns else _forward_blocks
        launch(
            kernel,
            cdiv(rows, config["ROWS"]),
            *(x, residual, weight, bias, y, total, stats, rows, columns),
            *(*sizes, *x_steps, *r_steps, _step(weight), _step(bias), float(eps)),
            RMS=rms,
            WIDE=wide,
            **config,
        )

    options = {"rms": rms, "residual": residual is not None}
    candidates = _forward_candidates(rows, columns)
    run(config or choose(_forward_whole_rows, candidates, x, (rows, columns), run, **options))
    return out, saved


def backward(
    g: Array | tuple[Array, Array | None],
    s: Array,
    weight: Array | None,
    bias: Array | None,
    stats: Array,
    *,
    eps: float = 1e-5,
    rms: bool = False,
    config: Config | None = None,
) -> tuple[Array, Any, Any]:
    """(ds, dw, db): ds is the gradient of x, and of the residual, too.

    Args:
        g: the gradient of y, of its shape, any strides; where the forward had a residual the pair
            (g, gₛ), with None for a sum that nobody used.
        s, weight, bias, stats: what `forward` saved; the options are those of the forward (ε is in
            stats already).
        config: {'ROWS', 'BLOCK', 'STRIPS', 'num_warps'} instead of the tuned one.

    Returns:
        ds contiguous, of s's dtype; dw and db of the dtypes of weight and bias, None without them.
    """
    name = "rms_norm" if rms else "layer_norm"
    dy, g_sum = g if isinstance(g, tuple) else (g, None)
    given = [a for a in (dy, g_sum) if a is not None]
    check_floats(name, s, *given)
    for a in given:
        if a.shape != s.shape:
            raise ValueError(f"{name} needs a gradient of the shape {s.shape}, got {a.shape}")
    xp = namespace(s)
    ds = xp.empty(s.shape, dtype=s.dtype)
    make = xp.empty if s.size else xp.zeros
    dw, db = [None if p is None else make(p.shape, dtype=p.dtype) for p in (weight, bias)]
    if s.size == 0:
        return ds, dw, db
    columns = s.shape[-1]
    rows = s.size // columns
    (dy, g_sum, s), sizes, (g_steps, gs_steps, s_steps) = as_rows(dy, g_sum, s)
    wide = needs_int64(*[a for a in (dy, g_sum, s, weight) if a is not None])

    def run(config: Config) -> None:
        constants = {"RMS": rms, "WIDE": wide, **config}
        limit = constants.pop("STRIPS")
        whole = config["BLOCK"] >= columns
        tiles, blocks = cdiv(rows, config["ROWS"]), cdiv(columns, config["BLOCK"])
        strips = min(tiles, max(1, limit // blocks))
        parts = [None if p is None else xp.empty((strips, columns), "float32") for p in (dw, db)]
        places = (*sizes, *g_steps, *gs_steps, *s_steps, _step(weight))
        launch(
            _backward_whole_rows if whole else _backward_blocks,
            strips if whole and (dw is not None or db is not None) else tiles,
            *(dy, g_sum, s, stats, weight, ds, *(parts if whole else ()), rows, columns, *places),
            **constants,
        )
        if dw is None and db is None:
            return
        if not whole:
            launch(
                _parameter_parts,
                (blocks, strips),
                *(dy, s, stats, *parts, rows, columns, *sizes, *g_steps, *s_steps),
                **constants,
            )
        _add(parts, dw, db, wide)

    options = {"rms": rms, "sum": g_sum is not None, "parameters": dw is not None or db is not None}
    candidates = _backward_candidates(rows, columns)
    run(config or choose(_backward_whole_rows, candidates, s, (rows, columns), run, **options))
    return ds, dw, db


def _add(parts: list[Any], dw: Array | None, db: Array | None, wide: bool) -> None:
    """dw and db from their parts, (strips, C) each; few bytes, so that one configuration does."""
    strips, columns = next(p.shape for p in parts if p is not None)
    tile: Config = {"ROWS": 64, "BLOCK": 32}
    if INTERPRETED:
        tile = {"ROWS": min(1024, next_power_of_2(strips)), "BLOCK": 256}
    grid = cdiv(columns, tile["BLOCK"])
    launch(_sum_parts, grid, *parts, dw, db, strips, columns, WIDE=wide, **tile)


def _check(name: str, x: Array, weight: Array | None, bias: Array | None) -> None:
    check_floats(name, *[a for a in (x, weight, bias) if a is not None])
    if x.ndim == 0:
        raise ValueError(f"{name} needs an array (…, C), got a number")
    for what, p in (("weight", weight), ("bias", bias)):
        if p is not None and p.shape != x.shape[-1:]:
            raise ValueError(f"{name} needs a {what} of the shape {x.shape[-1:]}, got {p.shape}")


def _step(p: Array | None) -> int:
    return 0 if p is None else strides(p)[0]


@functools.lru_cache(1024)
def _forward_candidates(rows: int, columns: int) -> tuple[Config, ...]:
    """What may be fastest, the likeliest first: whole rows up to 16 Ki columns, or else blocks."""
    whole = next_power_of_2(columns)
    if INTERPRETED:  # a program costs about the same whatever its size: few large ones
        block = min(whole, 4096)
        rows = min(next_power_of_2(rows), max(1, 65536 // block))
        return ({"ROWS": rows, "BLOCK": block, "num_warps": 4},)
    found = []
    if whole <= 16384:
        for tile in (2048, 1024, 4096, 8192):
            tile_rows = max(1, tile // whole)
            warps = min(32, max(1, tile_rows * whole // 512))
            found.append({"ROWS": tile_rows, "BLOCK": whole, "num_warps": warps})
            if tile_rows == 1:
                found.append({"ROWS": 1, "BLOCK": whole, "num_warps": min(32, 2 * warps)})
    if whole >= 8192:
        found += [{"ROWS": 1, "BLOCK": b, "num_warps": b // 256} for b in (4096, 8192, 2048)]
    return tuple([c for i, c in enumerate(found) if c not in found[:i]])


@functools.lru_cache(1024)
def _backward_candidates(rows: int, columns: int) -> tuple[Config, ...]:
    """As above, but whole rows up to 8 Ki columns: a thread also holds its part of dw and db.

    A multiprocessor runs 2 to 8 strips at once: more hide more of the memory's latency, but each
    writes its part of dw and db.
    """
    whole = next_power_of_2(columns)
    if INTERPRETED:
        return ({**_forward_candidates(rows, columns)[0], "STRIPS": 1},)
    found = []
    if whole <= 8192:
        for tile, strips in ((2048, 256), (2048, 512), (1024, 512), (1024, 1024), (4096, 256)):
            tile_rows = max(1, tile // whole)
            warps = min(16, max(1, tile_rows * whole // 512))
            found.append({"ROWS": tile_rows, "BLOCK": whole, "STRIPS": strips, "num_warps": warps})
    if whole >= 8192:
        found += [
            {"ROWS": 1, "BLOCK": b, "STRIPS": 1024, "num_warps": b // 256} for b in (4096, 2048)
        ]
    return tuple([c for i, c in enumerate(found) if c not in found[:i]])


# --- forward --------------------------------------------------------------------------------------


@triton.jit
def _summed(x, x_step, residual, r_step, column, inside):
    """s = x + residual as s's dtype holds it, in float32; 0 outside."""
    s = tl.load(x + column * x_step, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        s += tl.load(residual + column * r_step, mask=inside, other=0.0).to(tl.float32)
        s = s.to(x.dtype.element_ty).to(tl.float32)
    return s


@triton.jit
def _centred(s, base, shift, inside, RMS: tl.constexpr):
    """s − μ, with 0 outside; μ is base + shift, which one float32 would not hold."""
    if RMS:
        return s
    else:
        return tl.where(inside, (s - base) - shift, 0.0)


@triton.jit
def _store_stats(stats, row, row_inside, rows, rstd, base, shift, RMS: tl.constexpr):
    tl.store(stats + row, rstd, mask=row_inside)
    if not RMS:
        tl.store(stats + (row + rows), base, mask=row_inside)
        tl.store(stats + (row + rows + rows), shift, mask=row_inside)


@triton.jit
def _store_normed(
    xhat, s, weight, w_step, bias, b_step, y, total, row, column, columns, inside, column_inside
):
    """y = x̂ ⊙ w + b, and s where it is wanted."""
    place = row * columns + column
    if weight is not None:
        w = tl.load(weight + column * w_step, mask=column_inside, other=0.0)
        xhat = xhat * w.to(tl.float32)
    if bias is not None:
        b = tl.load(bias + column * b_step, mask=column_inside, other=0.0)
        xhat = xhat + b.to(tl.float32)
    tl.store(y + place, xhat.to(y.dtype.element_ty), mask=inside)
    if total is not None:
        tl.store(total + place, s.to(total.dtype.element_ty), mask=inside)


@triton.jit
def _forward_whole_rows(
    x, residual, weight, bias, y, total, stats, rows, columns, n1, n2,
    x0, x1, x2, x3, r0, r1, r2, r3, w_step, b_step, eps,
    RMS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One walk: a program's tile holds ROWS rows from their first to their last column."""
    row, row_inside = rows_of(tl.program_id(0), rows, ROWS)
    column, column_inside = columns_of(0, columns, BLOCK, WIDE)
    inside = row_inside & column_inside
    x += row_offset(row, n1, n2, x0, x1, x2)
    if residual is not None:
        residual += row_offset(row, n1, n2, r0, r1, r2)
    s = _summed(x, x3, residual, r3, column, inside)
    base = tl.sum(s, 1, keep_dims=True) / columns
    d = _centred(s, base, 0.0, inside, RMS)
    shift = tl.sum(d, 1, keep_dims=True) / columns
    variance = tl.sum(d * d, 1, keep_dims=True) / columns
    if not RMS:
        variance = tl.maximum(variance - shift * shift, 0.0)
        d -= shift
    rstd = tl.rsqrt(variance + eps)
    _store_stats(stats, row, row_inside, rows, rstd, base, shift, RMS)
    _store_normed(
        d * rstd, s, weight, w_step, bias, b_step, y, total,
        row, column, columns, inside, column_inside,
    )  # fmt: skip


@triton.jit
def _forward_blocks(
    x, residual, weight, bias, y, total, stats, rows, columns, n1, n2,
    x0, x1, x2, x3, r0, r1, r2, r3, w_step, b_step, eps,
    RMS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Two walks over rows of any length: the statistics, then y."""
    row, row_inside = rows_of(tl.program_id(0), rows, ROWS)
    x += row_offset(row, n1, n2, x0, x1, x2)
    if residual is not None:
        residual += row_offset(row, n1, n2, r0, r1, r2)
    column, column_inside = columns_of(0, columns, BLOCK, WIDE)
    first = _summed(x, x3, residual, r3, column, row_inside & column_inside)  # of each lane
    mean = tl.zeros([ROWS, BLOCK], tl.float32)  # of each lane, less its first
    squares = tl.zeros([ROWS, BLOCK], tl.float32)  # Σ (s − mean)² of each lane
    for start in range(0, columns, BLOCK):
        column, column_inside = columns_of(start, columns, BLOCK, WIDE)
        inside = row_inside & column_inside
        s = _summed(x, x3, residual, r3, column, inside)
        if RMS:
            squares += s * s
        else:
            d = tl.where(inside, (s - first) - mean, 0.0)
            mean += d * (1.0 / (start // BLOCK + 1))
            squares += d * tl.where(inside, (s - first) - mean, 0.0)
    lane = tl.arange(0, BLOCK)[None, :]
    count = ((columns - lane + BLOCK - 1) // BLOCK).to(tl.float32)  # how many numbers it saw
    base = tl.sum(count * (first + mean), 1, keep_dims=True) / columns
    d = (first - base) + mean
    shift = tl.sum(count * d, 1, keep_dims=True) / columns
    if RMS:
        variance = tl.sum(squares, 1, keep_dims=True) / columns
    else:
        variance = tl.sum(squares + count * d * d, 1, keep_dims=True) / columns
        variance = tl.maximum(variance - shift * shift, 0.0)
    rstd = tl.rsqrt(variance + eps)
    _store_stats(stats, row, row_inside, rows, rstd, base, shift, RMS)
    for start in range(0, columns, BLOCK):
        column, column_inside = columns_of(start, columns, BLOCK, WIDE)
        inside = row_inside & column_inside
        s = _summed(x, x3, residual, r3, column, inside)
        _store_normed(
            _centred(s, base, shift, inside, RMS) * rstd, s, weight, w_step, bias, b_step, y, total,
            row, column, columns, inside, column_inside,
        )  # fmt: skip


# --- backward -------------------------------------------------------------------------------------


@triton.jit
def _stats(stats, row, row_inside, rows, RMS: tl.constexpr):
    """(ρ, base, shift) of the rows, as `_store_stats` left them."""
    rstd = tl.load(stats + row, mask=row_inside, other=0.0)
    if RMS:
        return rstd, rstd, rstd
    else:
        base = tl.load(stats + (row + rows), mask=row_inside, other=0.0)
        return rstd, base, tl.load(stats + (row + rows + rows), mask=row_inside, other=0.0)


@triton.jit
def _loaded(g, g_step, s, s_step, rstd, base, shift, column, inside, RMS: tl.constexpr):
    """(g, x̂) in float32, with 0 in both outside of the rows."""
    dy = tl.load(g + column * g_step, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(s + column * s_step, mask=inside, other=0.0).to(tl.float32)
    return dy, _centred(x, base, shift, inside, RMS) * rstd


@triton.jit
def _weight(weight, w_step, column, column_inside):
    if weight is None:
        return 1.0
    else:
        return tl.load(weight + column * w_step, mask=column_inside, other=0.0).to(tl.float32)


@triton.jit
def _store_gradient(
    gw, xhat, mean, share, rstd, g_sum, gs_step, ds, row, column, columns, inside,
    RMS: tl.constexpr,
):  # fmt: skip
    """ds = ρ (ĝ − mean(ĝ) − x̂ mean(ĝ ⊙ x̂)) + gₛ"""
    d = gw - xhat * share
    if not RMS:
        d -= mean
    d *= rstd
    if g_sum is not None:
        d += tl.load(g_sum + column * gs_step, mask=inside, other=0.0).to(tl.float32)
    tl.store(ds + row * columns + column, d.to(ds.dtype.element_ty), mask=inside)


@triton.jit
def _backward_whole_rows(
    g, g_sum, s, stats, weight, ds, dw_parts, db_parts, rows, columns, n1, n2,
    g0, g1, g2, g3, gs0, gs1, gs2, gs3, s0, s1, s2, s3, w_step,
    RMS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One walk: of P programs, p takes tiles p, p + P, … of whole rows and adds up dw and db."""
    column, column_inside = columns_of(0, columns, BLOCK, WIDE)
    w = _weight(weight, w_step, column, column_inside)
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    db = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row, row_inside = rows_of(tile, rows, ROWS)
        inside = row_inside & column_inside
        rstd, base, shift = _stats(stats, row, row_inside, rows, RMS)
        g_row = g + row_offset(row, n1, n2, g0, g1, g2)
        s_row = s + row_offset(row, n1, n2, s0, s1, s2)
        dy, xhat = _loaded(g_row, g3, s_row, s3, rstd, base, shift, column, inside, RMS)
        gw = dy * w
        mean = tl.sum(gw, 1, keep_dims=True) / columns
        share = tl.sum(gw * xhat, 1, keep_dims=True) / columns
        gs_row = g_sum
        if g_sum is not None:
            gs_row += row_offset(row, n1, n2, gs0, gs1, gs2)
        _store_gradient(
            gw, xhat, mean, share, rstd, gs_row, gs3, ds, row, column, columns, inside, RMS
        )
        if dw_parts is not None:
            dw += dy * xhat
        if db_parts is not None:
            db += dy
    place = tl.program_id(0).to(tl.int64) * columns + column
    if dw_parts is not None:
        tl.store(dw_parts + place, tl.sum(dw, 0, keep_dims=True), mask=column_inside)
    if db_parts is not None:
        tl.store(db_parts + place, tl.sum(db, 0, keep_dims=True), mask=column_inside)


@triton.jit
def _backward_blocks(
    g, g_sum, s, stats, weight, ds, rows, columns, n1, n2,
    g0, g1, g2, g3, gs0, gs1, gs2, gs3, s0, s1, s2, s3, w_step,
    RMS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Two walks over rows of any length: the two means, then ds."""
    row, row_inside = rows_of(tl.program_id(0), rows, ROWS)
    rstd, base, shift = _stats(stats, row, row_inside, rows, RMS)
    g += row_offset(row, n1, n2, g0, g1, g2)
    s += row_offset(row, n1, n2, s0, s1, s2)
    if g_sum is not None:
        g_sum += row_offset(row, n1, n2, gs0, gs1, gs2)
    mean = tl.zeros([ROWS, BLOCK], tl.float32)
    share = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column, column_inside = columns_of(start, columns, BLOCK, WIDE)
        inside = row_inside & column_inside
        dy, xhat = _loaded(g, g3, s, s3, rstd, base, shift, column, inside, RMS)
        gw = dy * _weight(weight, w_step, column, column_inside)
        mean += gw
        share += gw * xhat
    mean = tl.sum(mean, 1, keep_dims=True) / columns
    share = tl.sum(share, 1, keep_dims=True) / columns
    for start in range(0, columns, BLOCK):
        column, column_inside = columns_of(start, columns, BLOCK, WIDE)
        inside = row_inside & column_inside
        dy, xhat = _loaded(g, g3, s, s3, rstd, base, shift, column, inside, RMS)
        gw = dy * _weight(weight, w_step, column, column_inside)
        _store_gradient(
            gw, xhat, mean, share, rstd, g_sum, gs3, ds, row, column, columns, inside, RMS
        )


@triton.jit
def _parameter_parts(
    g, s, stats, dw_parts, db_parts, rows, columns, n1, n2, g0, g1, g2, g3, s0, s1, s2, s3,
    RMS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dw and db of BLOCK columns, over the tiles p, p + P, … of rows."""
    column, column_inside = columns_of(tl.program_id(0) * BLOCK, columns, BLOCK, WIDE)
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    db = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1)):
        row, row_inside = rows_of(tile, rows, ROWS)
        rstd, base, shift = _stats(stats, row, row_inside, rows, RMS)
        g_row = g + row_offset(row, n1, n2, g0, g1, g2)
        s_row = s + row_offset(row, n1, n2, s0, s1, s2)
        inside = row_inside & column_inside
        dy, xhat = _loaded(g_row, g3, s_row, s3, rstd, base, shift, column, inside, RMS)
        dw += dy * xhat
        db += dy
    place = tl.program_id(1).to(tl.int64) * columns + column
    if dw_parts is not None:
        tl.store(dw_parts + place, tl.sum(dw, 0, keep_dims=True), mask=column_inside)
    if db_parts is not None:
        tl.store(db_parts + place, tl.sum(db, 0, keep_dims=True), mask=column_inside)


@triton.jit
def _sum_parts(
    dw_parts, db_parts, dw, db, parts, columns,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dw and db of BLOCK columns: the sums of their parts."""
    column, column_inside = columns_of(tl.program_id(0) * BLOCK, columns, BLOCK, WIDE)
    if dw is not None:
        out = _column_sum(dw_parts, parts, columns, column, column_inside, ROWS, BLOCK)
        tl.store(dw + column, out.to(dw.dtype.element_ty), mask=column_inside)
    if db is not None:
        out = _column_sum(db_parts, parts, columns, column, column_inside, ROWS, BLOCK)
        tl.store(db + column, out.to(db.dtype.element_ty), mask=column_inside)


@triton.jit
def _column_sum(x, rows, columns, column, column_inside, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(0, tl.cdiv(rows, ROWS)):
        row, row_inside = rows_of(tile, rows, ROWS)
        total += tl.load(x + row * columns + column, mask=row_inside & column_inside, other=0.0)
    return tl.sum(total, 0, keep_dims=True)


# --- for the x-ray --------------------------------------------------------------------------------


def specimens(dtype: str) -> Iterator[Specimen]:
    """GPT-2's layer norm, its sum with the residual, and rows that no tile holds."""
    size = 4 if dtype == "fp32" else 2
    x = f"*{dtype}"

    def shape(names: tuple[str, ...], rows: int, columns: int) -> dict[str, Any]:
        steps = {f"{name}{i}": (columns, 0, 0, 1)[i] for name in names for i in range(4)}
        return steps | {"rows": rows, "columns": columns, "n1": 1, "n2": 1, "w_step": 1}

    def forward_of(rows: int, columns: int, residual: bool, rms: bool) -> dict[str, Any]:
        arrays = {"x": x, "weight": x, "bias": None if rms else x, "y": x, "stats": "*fp32"}
        arrays |= {"residual": x if residual else None, "total": x if residual else None}
        flags = {"RMS": rms, "WIDE": columns > 8192, "b_step": int(not rms), "eps": 1e-5}
        return arrays | shape(("x", "r"), rows, columns) | flags

    def backward_of(rows: int, columns: int, residual: bool, rms: bool) -> dict[str, Any]:
        arrays = {"g": x, "g_sum": x if residual else None, "s": x, "stats": "*fp32"}
        arrays |= {"weight": x, "ds": x, "RMS": rms, "WIDE": columns > 8192}
        return arrays | shape(("g", "gs", "s"), rows, columns)

    for residual, rms in ((False, False), (True, False), (True, True)):
        what = f"{', rms' * rms}{', residual' * residual}"
        yield Specimen(
            f"forward, whole rows{what}",
            _forward_whole_rows,
            forward_of(8192, 768, residual, rms) | {"ROWS": 2, "BLOCK": 1024},
            bytes=(4 if residual else 2) * 2 * 768 * size,
            flops=(8 + residual) * 2 * 768,
        )
        parts = {"dw_parts": "*fp32", "db_parts": None if rms else "*fp32"}
        yield Specimen(
            f"backward, whole rows{what}",
            _backward_whole_rows,
            backward_of(8192, 768, residual, rms) | parts | {"ROWS": 2, "BLOCK": 1024},
            bytes=(4 if residual else 3) * 32 * 768 * size,  # with 256 strips, of 32 rows each
            flops=(13 + residual) * 32 * 768,
        )
    parts = {"dw_parts": "*fp32", "db_parts": "*fp32"}
    yield Specimen(
        "forward, the longest whole row",
        _forward_whole_rows,
        forward_of(64, 16384, True, False) | {"ROWS": 1, "BLOCK": 16384},
        num_warps=32,
        bytes=4 * 16384 * size,
        flops=9 * 16384,
    )
    yield Specimen(
        "backward, the longest whole row",
        _backward_whole_rows,
        backward_of(8192, 8192, True, False) | parts | {"ROWS": 1, "BLOCK": 8192},
        num_warps=16,
        bytes=4 * 32 * 8192 * size,
        flops=14 * 32 * 8192,
    )
    blocks = {"ROWS": 1, "BLOCK": 4096}
    yield Specimen(
        "forward, blocks",
        _forward_blocks,
        forward_of(64, 65536, True, False) | blocks,
        num_warps=16,
        bytes=6 * 65536 * size,
        flops=13 * 65536,
    )
    yield Specimen(
        "backward, blocks",
        _backward_blocks,
        backward_of(64, 65536, True, False) | blocks,
        num_warps=16,
        bytes=6 * 65536 * size,
        flops=16 * 65536,
    )
    sums = backward_of(64, 65536, False, False) | parts | blocks
    for name in ("g_sum", "weight", "ds", "w_step", "gs0", "gs1", "gs2", "gs3"):
        del sums[name]
    yield Specimen(
        "parts of dw and db, blocks",
        _parameter_parts,
        sums,
        num_warps=16,
        bytes=2 * 4096 * size,
        flops=5 * 4096,
    )
    yield Specimen(
        "sum of the parts",
        _sum_parts,
        parts
        | {"dw": x, "db": x, "parts": 256, "columns": 768, "WIDE": False, "ROWS": 64, "BLOCK": 32},
        bytes=2 * 256 * 32 * 4,
        flops=2 * 256 * 32,
    )
