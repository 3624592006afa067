"""Rows of a table by number: how tokens become vectors."""

from __future__ import annotations

from functools import partial
from typing import Any

from tinygrad_llm.autograd import Function, Part
from tinygrad_llm.backend import Array, namespace
from tinygrad_llm.ops import bounds
from tinygrad_llm.ops.convert import as_tensor, widened
from tinygrad_llm.tensor import Tensor


class Embedding(Function):
    """y = W[ids]        dW = zeros with dW[idsₖ] += gₖ"""

    kernel = "embedding"

    def forward(self, w: Array, ids: Array, padding_idx: int | None) -> Array:
        self.shape, self.padding_idx = w.shape, padding_idx
        self.save(ids)
        return namespace(w).take(w, ids, axis=0)

    def backward(self, g: Any, ids: Array) -> Any:
        ids, rows = ids.reshape(-1), g.reshape(ids.size, self.shape[1])
        if self.padding_idx is not None:
            used = (ids != self.padding_idx).nonzero()[0]
            ids, rows = ids[used], rows[used]
        if isinstance(g, Tensor):
            return AddRows.apply(rows, ids=ids, shape=self.shape)
        return Part(rows, self.shape, lambda whole, g: add_rows(whole, ids, g))

    def forward_kernel(
        self, kernel: Any, w: Array, ids: Array, padding_idx: int | None
    ) -> tuple[Array, Any]:
        self.shape, self.padding_idx = w.shape, padding_idx
        self.save(ids)
        y, _ = kernel.forward(w, ids, padding_idx=padding_idx)
        return y, (ids,)

    def backward_kernel(self, kernel: Any, g: Array, ids: Array) -> Any:
        ids, rows, padding = ids.reshape(-1), g.reshape(ids.size, self.shape[1]), self.padding_idx

        def add(whole: Array, g: Array) -> None:
            kernel.add_rows(whole, ids, g, padding_idx=padding)

        return Part(rows, self.shape, add)


class AddRows(Function):
    """Y = zeros with Y[idsₖ] += xₖ        dxₖ = g[idsₖ]"""

    def forward(self, x: Array, ids: Array, shape: tuple[int, ...]) -> Array:
        self.save(ids)
        y = namespace(x).zeros(shape, dtype=x.dtype)
        add_rows(y, ids, x)
        return y

    def backward(self, g: Any, ids: Array) -> Any:
        return g[ids]


def add_rows(table: Array, ids: Array, rows: Array) -> None:
    """table[idsₖ] += rowsₖ for every k, in place, in a fixed order.

    Sorted by id, the rows of one token are neighbours and add up in one reduction: half the time
    of `add.at`, and the same result every time.
    """
    if ids.size == 0:
        return
    xp = namespace(table)
    if rows.shape[1] == 0:
        return
    order = xp.argsort(ids, kind="stable")
    ids = ids[order]
    starts = xp.concatenate((xp.zeros(1, dtype=ids.dtype), ids[1:] != ids[:-1])).nonzero()[0]
    starts = xp.concatenate((xp.zeros(1, dtype=starts.dtype), starts))
    if xp.__name__ == "numpy":
        table[ids[starts]] += xp.add.reduceat(widened(rows)[order], starts, axis=0)
    else:  # CuPy has no reduceat: differences of a running sum would lose precision
        xp.add.at(table, ids, rows[order])


def embedding(ids: Any, weight: Any, padding_idx: int | None = None) -> Tensor:
    """y = W[ids]

    Args:
        ids: integers of any shape (…), from 0 to V − 1
        weight: (V, C)
        padding_idx: a row that receives no gradient

    Raises:
        IndexError: an id outside the table; it is named.
    """
    weight = as_tensor(weight)
    if weight.ndim != 2:
        raise ValueError(f"embedding() needs a weight of shape (V, C), got {weight.shape}")
    places = bounds.as_ids(ids, weight.data)
    if places.dtype.kind not in "iu":
        raise TypeError(f"embedding() needs integer ids, got {places.dtype}")
    rows = weight.shape[0]
    bounds.check(places, rows, partial(_no_row, rows))
    if padding_idx is not None:
        if not -rows <= padding_idx < rows:
            raise ValueError(f"padding_idx {padding_idx} is outside the table of {rows} rows")
        padding_idx %= rows
    return Embedding.apply(weight, ids=places, padding_idx=padding_idx)


def _no_row(rows: int, id: int) -> IndexError:
    return IndexError(f"embedding(): id {id} is outside the table's rows 0 to {rows - 1}")
