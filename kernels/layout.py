"""Arrays of any strides as kernels see them: few axes, strides in elements, safe offsets."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from tinygrad_llm import backend
from tinygrad_llm.backend import Array, namespace


def strides(x: Array) -> tuple[int, ...]:
    """The strides of x in elements, as `pointer + offset` counts; 0 for an axis of size 1.

    (What NumPy says of an axis of size 1 is arbitrary, and would compile kernels for nothing.)
    """
    pairs = zip(x.shape, x.strides, strict=True)
    return tuple([s // x.itemsize if n > 1 else 0 for n, s in pairs])


def needs_int64(*arrays: Array) -> bool:
    """True where an offset into one of the arrays does not fit 32 bits.

    Inside a kernel, `tl.arange` and `tl.program_id` are 32-bit numbers: before they are multiplied
    by a stride, one of both has to be made 64 bits wide, for every array that can be that large.
    """
    return any(_span(a) > _INT32 for a in arrays)


_INT32 = 2**31 - 1


def _span(x: Array) -> int:
    """The farthest offset from the first element, in elements."""
    return sum((n - 1) * abs(s) for n, s in zip(x.shape, strides(x), strict=True)) if x.size else 0


def merge_axes(
    shape: Sequence[int], *stride_lists: Sequence[int], at_most: int
) -> tuple[tuple[int, ...], list[tuple[int, ...]]] | None:
    """(shape, strides): `at_most` axes that walk through all arrays as the given ones do.

        merge_axes((2, 3, 4), (12, 4, 1), (0, 0, 1), at_most=3)
        -> ((6, 4, 1), [(4, 1, 0), (0, 1, 0)])

    Two axes are one where stepping over the end of the inner is a step of the outer, in every
    array. Ones are put behind until there are `at_most` axes: a kernel compiles the division by a
    size of 1 away. None where more axes remain: the caller then copies.
    """
    sizes: list[int] = []
    columns: list[list[int]] = []  # per kept axis: its stride in each array
    for n, *steps in zip(shape, *stride_lists, strict=True):
        if n == 1:
            continue
        if sizes and all(a == n * b for a, b in zip(columns[-1], steps, strict=True)):
            sizes[-1] *= n
            columns[-1] = steps
        else:
            sizes.append(n)
            columns.append(steps)
    missing = at_most - len(sizes)
    if missing < 0:
        return None
    sizes += [1] * missing
    columns += [[0] * len(stride_lists)] * missing
    per_array = [tuple(c[i] for c in columns) for i in range(len(stride_lists))]
    return tuple(sizes), per_array


class Rows(NamedTuple):
    """Arrays of one shape as rows: three axes lead from row to row, the last along the row.

    `sizes` are those of the inner two of the three (the outer one needs none: row // n₂ // n₁ is
    its index), `steps` the four strides of each array, in elements.
    """

    arrays: list[Any]
    sizes: tuple[int, int]
    steps: list[tuple[int, ...]]


def as_rows(*arrays: Array | None) -> Rows:
    """The arrays, which have one shape (…, C), as `Rows`; an absent one (None) has strides of 0.

    Arrays whose leading axes do not merge into three are copied.
    """
    present = [a for a in arrays if a is not None]
    found = _leading(present[0].shape, *[strides(a) for a in present])
    if found is None:
        present = [namespace(a).ascontiguousarray(a) for a in present]
        found = _leading(present[0].shape, *[strides(a) for a in present])
        assert found is not None  # contiguous arrays of one shape merge into one axis
    given = iter(zip(present, found[1], strict=True))
    filled = [(None, (0, 0, 0, 0)) if a is None else next(given) for a in arrays]
    return Rows([a for a, _ in filled], found[0], [s for _, s in filled])


@functools.lru_cache(4096)
def _leading(
    shape: tuple[int, ...], *stride_lists: tuple[int, ...]
) -> tuple[tuple[int, int], list[tuple[int, ...]]] | None:
    """(sizes, steps) of `Rows`; remembered, since a model has few shapes and launches often."""
    found = merge_axes(shape[:-1], *[s[:-1] for s in stride_lists], at_most=3)
    if found is None:
        return None
    (_, n1, n2), leading = found
    return (n1, n2), [(*s, all_[-1]) for s, all_ in zip(leading, stride_lists, strict=True)]


_FLOATS = {backend.float32, backend.float16, backend.bfloat16}


def check_floats(name: str, *arrays: Any) -> None:
    """TypeError unless every array is float32, float16 or bfloat16; they may differ."""
    for a in arrays:
        if a.dtype not in _FLOATS:
            raise TypeError(f"{name} takes float32, float16 or bfloat16 arrays, got {a.dtype}")


def broadcast(name: str, x: Array, shape: tuple[int, ...], what: str) -> Array:
    """x with stride 0 along the axes that it lacks; ValueError in the caller's words."""
    try:
        return namespace(x).broadcast_to(x, shape)
    except ValueError:
        raise ValueError(f"{name} needs {what} that broadcasts to {shape}, got {x.shape}") from None
