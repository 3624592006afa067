"""Rows of a table by number, and the gradient that adds them up in the same order each time.

    y = W[ids]        dW = zeros with dW[idsₖ] += gₖ for k = 0, 1, …

Forward copies |y| bytes from and to memory, without arithmetic.

Backward sorts the ids, stably: the positions of one token become neighbours. A program for each
block of columns of each distinct id then reads its rows of g in their order, some at a time, adds
them in float32 and rounds once. No atomics, so nothing depends on which program comes first, and
the programs that find themselves in the middle of a token return at once: the host need not know
how many distinct ids there are. It moves |g| + |dW| bytes (dW is filled with zeros) and a row of dW
for each distinct id, with a FLOP per element of g.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from tinygrad_llm.backend import Array, int64, must_not_wait, namespace
from tinygrad_llm.kernels.compile import Specimen
from tinygrad_llm.kernels.language import INTERPRETED, tl, triton
from tinygrad_llm.kernels.launch import cdiv, launch, next_power_of_2
from tinygrad_llm.kernels.layout import check_floats, needs_int64, strides
from tinygrad_llm.kernels.tune import Config, choose


def forward(
    w: Array, ids: Array, *, padding_idx: int | None = None, config: Config | None = None
) -> tuple[Array, tuple[Array, Array]]:
    """y = W[ids]

    Args:
        w: (V, C) float32, float16 or bfloat16, any strides.
        ids: integers of any shape (…) in 0 … V − 1, which is for the caller to check: another one
            makes a row of NaN.
        padding_idx: a row that receives no gradient; the forward does not mind it.
        config: {'ROWS', 'BLOCK', 'num_warps'} instead of the tuned one.

    Returns:
        (y, saved): y (…, C), contiguous, of w's dtype; `backward` takes what was saved.
    """
    _check(w, ids)
    rows, columns = ids.size, w.shape[1]
    y = namespace(w).empty((*ids.shape, columns), dtype=w.dtype)
    if y.size == 0:
        return y, (w, ids)
    if len(w) == 0:
        y[...] = float("nan")  # no id is in the table
        return y, (w, ids)
    flat = ids.reshape(-1)
    wide = needs_int64(w)

    def run(config: Config) -> None:
        blocks = cdiv(columns, config["BLOCK"])
        launch(
            _gather,
            cdiv(rows, config["ROWS"]) * blocks,
            *(w, flat, y, rows, columns, len(w), blocks, *strides(w), *strides(flat)),
            WIDE=wide,
            **config,
        )

    run(config or choose(_gather, _candidates(rows, columns), w, (rows, columns), run))
    return y, (w, ids)


def backward(
    g: Array,
    w: Array,
    ids: Array,
    *,
    padding_idx: int | None = None,
    config: Config | None = None,
) -> Array:
    """dW = zeros with dW[idsₖ] += gₖ, except in the row `padding_idx`.

    Args:
        g: (…, C), the gradient of y, any strides.
        w, ids: what `forward` saved; of w only the shape and the dtype are used.
        config: {'ROWS', 'BLOCK', 'num_warps'} instead of the usual one.

    Returns:
        dW (V, C), contiguous, of w's dtype. Ids outside of the table add to nothing.
    """
    dw = namespace(w).zeros(w.shape, dtype=w.dtype)
    add_rows(dw, ids, g, padding_idx=padding_idx, config=config)
    return dw


def add_rows(
    table: Array,
    ids: Array,
    g: Array,
    *,
    padding_idx: int | None = None,
    config: Config | None = None,
) -> None:
    """table[idsₖ] += gₖ in place, for k in their order: `backward` into a gradient that is there.

    Args:
        table: (V, C) float32, float16 or bfloat16, any strides but 0.
        ids: integers of any shape (…).
        g: (…, C), any strides.
        padding_idx: a row that is left as it is; negative ones count from the end.
    """
    _check(table, ids)
    check_floats("embedding", g)
    if g.shape != (*ids.shape, table.shape[1]):
        raise ValueError(
            f"embedding needs a gradient of shape {(*ids.shape, table.shape[1])}, got {g.shape}"
        )
    if g.size == 0 or len(table) == 0:
        return
    if any(n > 1 and s == 0 for n, s in zip(table.shape, table.strides, strict=True)):
        raise ValueError("embedding cannot add into a table that was broadcast (stride 0)")
    columns = table.shape[1]
    flat, g = ids.reshape(-1), g.reshape(-1, columns)
    order = _order(flat)
    flat = flat[order]
    config = config or _adding(columns)
    blocks = cdiv(columns, config["BLOCK"])
    padding = -1 if padding_idx is None else padding_idx % len(table)
    launch(
        _add,
        flat.size * blocks,
        *(g, flat, order, table, flat.size, columns, len(table), padding, blocks),
        *(*strides(g), *strides(table)),
        WIDE=needs_int64(g, table),
        **config,
    )


def _check(w: Array, ids: Array) -> None:
    check_floats("embedding", w)
    if w.ndim != 2:
        raise ValueError(f"embedding needs a table (V, C), got {w.shape}")
    if ids.dtype.kind not in "iu":
        raise TypeError(f"embedding needs integer ids, got {ids.dtype}")


@functools.lru_cache(1024)
def _candidates(rows: int, columns: int) -> tuple[Config, ...]:
    """Tiles of the gather: a thread copies 16 numbers, or 8, or 32."""
    if INTERPRETED:  # a program costs about the same whatever its size: few large ones
        return (_tile(rows, columns, 65536),)
    found = [_tile(rows, columns, size) for size in (2048, 4096, 1024, 8192)]
    return tuple([c for i, c in enumerate(found) if c not in found[:i]])


def _order(ids: Array) -> Array:
    """argsort(ids), stable. CuPy's waits for the GPU, which a CUDA graph does not allow."""
    if not must_not_wait():
        return namespace(ids).argsort(ids, kind="stable")
    return ranked(ids)


def ranked(ids: Array) -> Array:
    """argsort(ids), stable, by counting for each id those that come before it: nothing waits.

    n² comparisons: for the 16384 tokens of a batch a matter of microseconds, and for 10⁵ tokens
    still below the time of a layer.

    Args:
        ids: (n,) integers, any stride; n < 2³¹.
    """
    order = namespace(ids).empty(ids.shape, dtype=int64)
    block, across = 128, 16
    if INTERPRETED:
        block = across = min(1024, next_power_of_2(ids.size))
    config: Config = {"BLOCK": block, "ACROSS": across, "num_warps": 4}
    (step,) = strides(ids)
    launch(_rank, cdiv(ids.size, block), ids, order, ids.size, step, **config)
    return order


def _tile(rows: int, columns: int, size: int) -> Config:
    block = min(next_power_of_2(columns), size)
    tile_rows = min(next_power_of_2(rows), size // block)
    return {"ROWS": tile_rows, "BLOCK": block, "num_warps": min(8, max(1, size // 512))}


def _adding(columns: int) -> Config:
    """Most tokens are rare, one in ten is a comma: few rows at a time, but not one by one.

    The order in which a tile's rows are added is part of the result. So this is not tuned: it would
    give other roundings on other days.
    """
    block = min(next_power_of_2(columns), 4096 if INTERPRETED else 256)
    return {"ROWS": 8, "BLOCK": block, "num_warps": 4}


@triton.jit
def _gather(
    w, ids, y, rows, columns, size, blocks, w0, w1, ids0,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of y; an id outside of the table reads nothing and gives NaN."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < columns)
    if WIDE:
        column = column.to(tl.int64)
    id = tl.load(ids + row * ids0, mask=row < rows, other=0).to(tl.int64)
    known = inside & (id >= 0) & (id < size)
    values = tl.load(w + id * w0 + column * w1, mask=known, other=float("nan"))
    tl.store(y + row * columns + column, values, mask=inside)


@triton.jit
def _rank(ids, order, n, ids0, BLOCK: tl.constexpr, ACROSS: tl.constexpr):
    """order[r] = i, where r counts the ids below ids[i], and the equal ones in front of it."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    mine = tl.load(ids + i.to(tl.int64) * ids0, mask=i < n, other=0)
    rank = tl.zeros([BLOCK, 1], tl.int32)
    for start in range(0, n, ACROSS):
        j = start + tl.arange(0, ACROSS)[None, :]
        other = tl.load(ids + j.to(tl.int64) * ids0, mask=j < n, other=0)
        before = (other < mine) | ((other == mine) & (j < i))
        rank += tl.sum((before & (j < n)).to(tl.int32), 1, keep_dims=True)
    tl.store(order + rank, i.to(tl.int64), mask=i < n)


@triton.jit
def _add(
    g, ids, order, table, n, columns, size, padding, blocks, g0, g1, table0, table1,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where a new id begins among the sorted ones: its rows of g, ROWS at a time, to the last."""
    program = tl.program_id(0)
    first = program // blocks
    id = tl.load(ids + first).to(tl.int64)
    before = tl.load(ids + first - 1, mask=first > 0, other=0).to(tl.int64)
    if ((first == 0) | (before != id)) & (id != padding) & (id >= 0) & (id < size):
        column = program % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = column < columns
        if WIDE:
            column = column.to(tl.int64)
        total = tl.zeros([1, BLOCK], tl.float32)
        place = first
        mine = ROWS
        while mine == ROWS:
            k = place + tl.arange(0, ROWS)[:, None]
            here = (k < n) & (tl.load(ids + k, mask=k < n, other=0).to(tl.int64) == id)
            row = tl.load(order + k, mask=here, other=0).to(tl.int64)
            values = tl.load(g + row * g0 + column * g1, mask=here & inside, other=0.0)
            total += tl.sum(values.to(tl.float32), 0, keep_dims=True)
            mine = tl.sum(here.to(tl.int32))
            place += ROWS
        at = table + id * table0 + column * table1
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        tl.store(at, total.to(table.dtype.element_ty), mask=inside)


# --- for the x-ray --------------------------------------------------------------------------------


def specimens(dtype: str) -> Iterator[Specimen]:
    """What a GPT launches: 8192 tokens of GPT-2's table."""
    size = 4 if dtype == "fp32" else 2
    columns, table = 768, 50257
    sizes = {"columns": columns, "size": table}
    steps = {"w0": columns, "w1": 1, "ids0": 1}
    arrays = {"w": f"*{dtype}", "ids": "*i64", "y": f"*{dtype}", "rows": 8192}
    yield Specimen(
        "gather",
        _gather,
        {**arrays, **sizes, **steps, "blocks": 1, "WIDE": False, "ROWS": 2, "BLOCK": 1024},
        bytes=2 * 2 * columns * size,
    )
    arrays = {"g": f"*{dtype}", "ids": "*i64", "order": "*i64", "table": f"*{dtype}"}
    steps = {"g0": columns, "g1": 1, "table0": columns, "table1": 1}
    options = {"n": 8192, "padding": -1, "blocks": 3, "WIDE": True, "ROWS": 8, "BLOCK": 256}
    yield Specimen(
        "order, for a graph",
        _rank,
        {"ids": "*i64", "order": "*i64", "n": 8192, "ids0": 1, "BLOCK": 128, "ACROSS": 16},
        bytes=128 * 16 + 8192 * 8,
    )
    yield Specimen(
        "add the rows of one id",
        _add,
        {**arrays, **sizes, **steps, **options},
        bytes=10 * 256 * size,  # of one tile of eight rows
        flops=9 * 256,
    )
