"""Products of matrices: where nearly all of the time of training goes.

Everything ends in `matmul`, which BLAS does; `einsum` is rewritten into it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.autograd import Function
from tinygrad_llm.backend import Array, namespace
from tinygrad_llm.ops.convert import as_tensor, float_pair, narrowed, pair, widened
from tinygrad_llm.ops.shape import sum_to
from tinygrad_llm.tensor import Tensor


class MatMul(Function):
    """y = A B        dA = g Bᵀ, dB = Aᵀ g  (summed over broadcast batch axes)"""

    kernel = "matmul"

    def forward(self, a: Array, b: Array) -> Array:
        self.shapes = a.shape, b.shape
        self.save(a if self.needs(1) else None, b if self.needs(0) else None)
        return product(a, b)

    def backward(self, g: Any, a: Any, b: Any) -> Any:
        da = None if b is None else sum_to(product(g, b.swapaxes(-1, -2)), self.shapes[0])
        return da, None if a is None else self._right(g, a)

    def _right(self, g: Any, a: Any) -> Any:
        """dB = Aᵀ g. One matrix B against a batch of A: one large product, not a sum of many."""
        shape = self.shapes[1]
        if len(shape) == 2 and g.ndim > 2:
            n = math.prod(g.shape[:-1])
            return product(a.reshape(n, shape[0]).swapaxes(0, 1), g.reshape(n, shape[1]))
        return sum_to(product(a.swapaxes(-1, -2), g), shape)

    def forward_kernel(self, kernel: Any, a: Array, b: Array) -> tuple[Array, Any]:
        self.shapes = a.shape, b.shape
        self.save(a if self.needs(1) else None, b if self.needs(0) else None)
        return kernel.forward(a, b, needs=self._needs())

    def backward_kernel(self, kernel: Any, g: Array, *saved: Any) -> Any:
        return kernel.backward(g, *saved, needs=self._needs())[:2]

    def _needs(self) -> tuple[bool, bool, bool, bool]:
        return self.needs(0), self.needs(1), False, False


class Linear(Function):
    """y = x Wᵀ + b        dx = g W, dW = gᵀ x, db = Σ g over rows"""

    kernel = "linear"

    def forward(self, x: Array, w: Array, b: Array | None = None) -> Array:
        self.shape, self.has_bias = x.shape, b is not None
        self.save(x if self.needs(1) else None, w if self.needs(0) else None)
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        y = product(rows, w.T)
        if b is not None:
            y += b
        return y.reshape(*x.shape[:-1], w.shape[0])

    def backward(self, g: Any, x: Any, w: Any) -> Any:
        rows = g.reshape(math.prod(g.shape[:-1]), g.shape[-1])
        dx = None if w is None else product(rows, w).reshape(self.shape)
        dw = None if x is None else product(rows.T, x.reshape(rows.shape[0], self.shape[-1]))
        if not self.has_bias:
            return dx, dw
        return dx, dw, column_sum(rows) if self.needs(2) else None

    def forward_kernel(
        self, kernel: Any, x: Array, w: Array, b: Array | None = None
    ) -> tuple[Array, Any]:
        self.shape, self.has_bias = x.shape, b is not None
        self.save(x if self.needs(1) else None, w if self.needs(0) else None)
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        y, saved = kernel.forward(rows, w.T, b, needs=self._needs())
        return y.reshape(*x.shape[:-1], w.shape[0]), (self.saved[0], *saved)

    def backward_kernel(self, kernel: Any, g: Array, x: Array | None, *saved: Any) -> Any:
        rows = g.reshape(math.prod(g.shape[:-1]), g.shape[-1])
        dx, _, db, _ = kernel.backward(rows, *saved, needs=self._needs())
        dx = None if dx is None else dx.reshape(self.shape)
        # (out, in) as W lies in memory; the product's own backward would give its transpose.
        dw = None if x is None else kernel.matmul(rows.T, x.reshape(len(rows), self.shape[-1]))
        return (dx, dw, db) if self.has_bias else (dx, dw)

    def _needs(self) -> tuple[bool, bool, bool, bool]:
        return self.needs(0), False, self.has_bias and self.needs(2), False


def product(a: Any, b: Any) -> Any:
    """a @ b of arrays or Tensors, half precision summed in float32 and rounded once.

    NumPy's BLAS has no half precision, and without BLAS a product takes a hundred times as long: so
    it is converted. CuPy has no batched product of bfloat16 matrices.
    """
    halves = a.dtype.itemsize == 2 and b.dtype.itemsize == 2
    if not halves or isinstance(a, Tensor):
        return a @ b
    lacking = a.ndim > 2 or b.ndim > 2
    if type(a) is np.ndarray or (lacking and a.dtype == backend.bfloat16):
        return narrowed(widened(a) @ widened(b), a)
    return narrowed(a @ b, a)


def column_sum(rows: Any) -> Any:
    """Σ over the rows of a matrix; as a product with ones, which BLAS does at memory speed."""
    if isinstance(rows, Tensor):
        return rows.sum(axis=0)
    wide = widened(rows)
    return narrowed(namespace(rows).ones(rows.shape[0], dtype=wide.dtype) @ wide, rows)


def row_dot(a: Any, b: Any) -> Any:
    """Σ a ⊙ b over the last axis, which stays with size 1; in one pass where NumPy does it."""
    if type(a) is np.ndarray and a.dtype.itemsize > 2:
        return np.vecdot(a, b)[..., None]
    return (a * b).sum(axis=-1, keepdims=True)


def row_mean(rows: Any) -> Any:
    """The mean of each row of a matrix, as a column; the product with 1/n again."""
    if isinstance(rows, Tensor):
        return rows.mean(axis=1, keepdims=True)
    n = rows.shape[1]
    return rows @ namespace(rows).full((n, 1), 1.0 / n, dtype=rows.dtype)


def matmul(a: Any, b: Any) -> Tensor:
    """y = A B over the last two axes, the others broadcast; vectors as in NumPy.

    (m, k) @ (k, n) -> (m, n);  (…, m, k) @ (…, k, n);  (k,) @ (k,) -> a scalar.
    """
    a, b = pair(a, b)
    left, right = a.data.shape, b.data.shape
    if not left or not right:
        raise ValueError("matmul() needs at least one dimension each; use * for scalars")
    row, column = len(left) == 1, len(right) == 1
    if left[-1] != right[0 if column else -2]:
        raise ValueError(
            f"matmul(): the last axis of {left} and the {'only' if column else 'second last'} "
            f"axis of {right} must be equal"
        )
    if row:
        a = a.reshape(1, -1)
    if column:
        b = b.reshape(-1, 1)
    y = MatMul.apply(a, b)
    if row or column:
        y = y.reshape(y.shape[:-2] + (() if row else (y.shape[-2],)) + y.shape[-1:] * (not column))
    return y


def linear(x: Any, weight: Any, bias: Any = None) -> Tensor:
    """y = x Wᵀ + b

    Args:
        x: (…, in)
        weight: (out, in), as in PyTorch
        bias: (out,) or None
    """
    x, weight = float_pair(x, weight)
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear() takes x (…, in) and weight (out, in), got {x.shape} and {weight.shape}"
        )
    if bias is None:
        return Linear.apply(x, weight)
    bias = as_tensor(bias)
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"linear() needs a bias of shape {weight.shape[:1]}, got {bias.shape}")
    return Linear.apply(x, weight, bias.astype(x.dtype))


# --- einsum ---------------------------------------------------------------------------------------


def einsum(subscripts: str, *operands: Any) -> Tensor:
    """y_out = Σ over the letters not in `out` of the product of the operands.

    `einsum("bthd,bshd->bhts", q, k)`. Letters, `...` and an optional `->out` as in NumPy. Worked
    out from left to right, two operands at a time, each as one batched matrix product: NumPy's own
    einsum runs 4-D contractions at a tenth of that speed.
    """
    tensors = [as_tensor(x) for x in operands]
    terms, out = _parse(subscripts, tensors)
    sizes = _sizes(subscripts, terms, tensors)
    left, x = terms[0], _diagonals(terms[0], tensors[0])
    left = "".join(dict.fromkeys(left))
    for i in range(1, len(terms)):
        right, y = "".join(dict.fromkeys(terms[i])), _diagonals(terms[i], tensors[i])
        later = set(out).union(*terms[i + 1 :])
        x, left = _contract(x, left, y, right, later, sizes)
    summed = tuple([i for i, letter in enumerate(left) if letter not in out])
    if summed:
        x = x.sum(axis=summed)
        left = "".join([letter for letter in left if letter in out])
    return x if left == out else x.transpose([left.index(letter) for letter in out])


def _parse(subscripts: str, tensors: list[Tensor]) -> tuple[list[str], str]:
    """'...ij,jk' -> terms in which `...` has become capital letters from Z down, and the output."""
    text = subscripts.replace(" ", "")
    inputs, arrow, out = text.partition("->")
    terms = inputs.split(",")
    letters = set(inputs + out) - set(",.")
    if not all(letter.isalpha() and letter.isascii() for letter in letters):
        raise ValueError(f"einsum({subscripts!r}): subscripts are letters, ',', '->' and '...'")
    if len(terms) != len(tensors):
        raise ValueError(f"einsum({subscripts!r}) names {len(terms)} operands, got {len(tensors)}")
    unused = [c for c in "ZYXWVUTSRQPONMLKJIHGFEDCBA" if c not in letters]
    batch = ""
    for i, (term, x) in enumerate(zip(terms, tensors, strict=True)):
        named = term.replace("...", "", 1)
        extra = x.ndim - len(named)
        if extra < 0 or (extra and "..." not in term) or "." in named:
            raise ValueError(f"einsum({subscripts!r}): {term!r} does not fit shape {x.shape}")
        dots = "".join(unused[:extra][::-1])
        batch = max(batch, dots, key=len)
        terms[i] = term.replace("...", dots)
    if arrow:
        out = out.replace("...", batch)
    else:
        seen = "".join(terms)
        out = batch + "".join(sorted(c for c in letters if seen.count(c) == 1))
    if len(set(out)) < len(out) or not set(out) <= set("".join(terms)):
        raise ValueError(f"einsum({subscripts!r}): each output letter once, and from an input")
    return terms, out


def _sizes(subscripts: str, terms: list[str], tensors: list[Tensor]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for term, x in zip(terms, tensors, strict=True):
        for letter, n in zip(term, x.shape, strict=True):
            known = sizes.setdefault(letter, n)
            if known != n and 1 not in (known, n):
                raise ValueError(f"einsum({subscripts!r}): {letter!r} is {known} and also {n}")
            sizes[letter] = n if known == 1 else known
    return sizes


def _diagonals(term: str, x: Tensor) -> Tensor:
    """'iij' -> 'ij': a letter named twice walks along the diagonal."""
    wanted = "".join(dict.fromkeys(term))
    while len(term) > len(set(term)):
        letter = next(c for c in term if term.count(c) > 1)
        i, j = term.index(letter), term.rindex(letter)
        if x.shape[i] != x.shape[j]:
            raise ValueError(f"einsum(): {letter!r} is {x.shape[i]} and also {x.shape[j]}")
        along = namespace(x.data).arange(x.shape[i])
        others = [k for k in range(x.ndim) if k not in (i, j)]
        x = x.transpose([i, j, *others])[along, along]
        term = letter + "".join([term[k] for k in others])
    return x if term == wanted else x.transpose([term.index(c) for c in wanted])


def _contract(
    x: Tensor, left: str, y: Tensor, right: str, later: set[str], sizes: dict[str, int]
) -> tuple[Tensor, str]:
    """Two operands into one: batch letters, rows of x, columns of y; the rest is summed."""
    both = set(left) & set(right)
    batch = [c for c in left if c in both and c in later]
    inner = [c for c in left if c in both and c not in later]
    x, rows = _arrange(x, left, batch, inner, later, sizes, inner_last=True)
    y, columns = _arrange(y, right, batch, inner, later, sizes, inner_last=False)
    z = matmul(x, y)
    names = "".join(batch + rows + columns)
    return z.reshape([sizes[c] for c in names]), names


def _arrange(
    x: Tensor,
    term: str,
    batch: list[str],
    inner: list[str],
    later: set[str],
    sizes: dict[str, int],
    inner_last: bool,
) -> tuple[Tensor, list[str]]:
    """x as (batch, own, inner) or (batch, inner, own), with letters used nowhere else summed."""
    lonely = tuple(
        [i for i, c in enumerate(term) if c not in batch and c not in inner and c not in later]
    )
    if lonely:
        x = x.sum(axis=lonely)
        term = "".join([c for i, c in enumerate(term) if i not in lonely])
    own = [c for c in term if c not in batch and c not in inner]
    order = [*batch, *own, *inner] if inner_last else [*batch, *inner, *own]
    x = x.transpose([term.index(c) for c in order])
    x = (
        x.broadcast_to([sizes[c] for c in order])
        if x.shape != tuple(sizes[c] for c in order)
        else x
    )  # an axis of size 1 that another operand has larger
    size = [math.prod([sizes[c] for c in group]) for group in (batch, own, inner)]
    shape = [size[0], size[1], size[2]] if inner_last else [size[0], size[2], size[1]]
    return x.reshape(shape), own
