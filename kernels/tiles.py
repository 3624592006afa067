"""Where a program's elements lie: rows and columns of a matrix, or a stretch of all elements.

A kernel that works along rows sees (rows, columns) tiles of arrays that `layout.as_rows` prepared;
one that treats all elements alike sees a stretch of them, counted in C order, of arrays that
`flattened` prepared.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from tinygrad_llm.backend import Array, namespace
from tinygrad_llm.kernels.language import INTERPRETED, tl, triton
from tinygrad_llm.kernels.launch import next_power_of_2
from tinygrad_llm.kernels.layout import merge_axes, strides
from tinygrad_llm.kernels.tune import Config

# --- rows and columns -----------------------------------------------------------------------------


@triton.jit
def rows_of(tile, rows, ROWS: tl.constexpr):
    """(row, inside) of tile number `tile`, as a column; 64 bits, as rows times a stride need."""
    row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    return row, row < rows


@triton.jit
def columns_of(start, columns, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """(column, inside) of a tile, as a row."""
    column = start + tl.arange(0, BLOCK)[None, :]
    inside = column < columns
    if WIDE:
        column = column.to(tl.int64)
    return column, inside


@triton.jit
def row_offset(row, n1, n2, s0, s1, s2):
    """The offset of a row's first element: the row counts through three axes."""
    return (row // n2 // n1) * s0 + (row // n2 % n1) * s1 + (row % n2) * s2


# --- all elements alike ---------------------------------------------------------------------------


class Flat(NamedTuple):
    """Arrays of one shape as four axes: `sizes` are those of the inner three, `steps` per array."""

    arrays: list[Any]
    sizes: tuple[int, int, int]
    steps: list[tuple[int, ...]]


def flattened(*arrays: Array) -> Flat:
    """The arrays, which have one shape, as `Flat`; those that do not merge into it are copied."""
    found = _axes(arrays[0].shape, *[strides(a) for a in arrays])
    if found is None:
        arrays = tuple([namespace(a).ascontiguousarray(a) for a in arrays])
        found = _axes(arrays[0].shape, *[strides(a) for a in arrays])
        assert found is not None  # contiguous arrays of one shape merge into one axis
    return Flat(list(arrays), *found)


@functools.lru_cache(4096)
def _axes(
    shape: tuple[int, ...], *stride_lists: tuple[int, ...]
) -> tuple[tuple[int, int, int], list[tuple[int, ...]]] | None:
    """(sizes, steps) of `Flat`; remembered, since a model has few shapes and launches often."""
    found = merge_axes(shape, *stride_lists, at_most=4)
    if found is None:
        return None
    (_, n1, n2, n3), steps = found
    return (n1, n2, n3), steps


@functools.lru_cache(1024)
def stretches(size: int, unit: int = 1) -> tuple[Config, ...]:
    """{'BLOCK', 'num_warps'} that may be fastest for so many elements, the likeliest first.

    BLOCK counts units. A thread should hold 8 to 16 elements: two wide loads, and few registers.
    """
    if INTERPRETED:  # a program costs about the same whatever its size: few large ones
        return (_stretch(min(next_power_of_2(size), 65536), 4, unit),)
    sizes = ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (1024, 2))
    return tuple([_stretch(block, warps, unit) for block, warps in sizes])


def _stretch(elements: int, warps: int, unit: int) -> Config:
    return {"BLOCK": max(1, elements // unit), "num_warps": warps}


@triton.jit
def first_of(BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The number of a program's first unit; 64 bits where 32 do not suffice."""
    start = tl.program_id(0)
    if WIDE:
        start = start.to(tl.int64)
    return start * BLOCK


@triton.jit
def element_offset(i, n1, n2, n3, s0, s1, s2, s3):
    """The offset of element i, counted in C order: it counts through four axes.

    A size of 1 compiles away, and with it the whole division of an array that is contiguous.
    """
    inner = i // n3
    middle = inner // n2
    return (middle // n1) * s0 + (middle % n1) * s1 + (inner % n2) * s2 + (i % n3) * s3
