"""Attention: every position asks all others and takes a weighted mean of what they say.

Dimensions: B batch, H heads, T queries, S keys, D head size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.autograd import Function
from tinygrad_llm.backend import Array, namespace
from tinygrad_llm.ops.convert import as_array, as_float, as_tensor, narrowed, widened
from tinygrad_llm.ops.dropout import dropout, keep_mask
from tinygrad_llm.ops.elementwise import masked_fill
from tinygrad_llm.ops.linalg import matmul, row_dot
from tinygrad_llm.ops.shape import sum_to
from tinygrad_llm.ops.softmax import finite_max, softmax
from tinygrad_llm.tensor import Tensor


class Attention(Function):
    """y = P̃ V,  P = softmax(s Q Kᵀ + bias),  P̃ = P ⊙ m / (1 − p) under dropout

    dV = P̃ᵀ g;  dP = (g Vᵀ) ⊙ m / (1 − p);  dS = P ⊙ (dP − δ), δ = Σ dP ⊙ P = Σ g ⊙ y
    dQ = s dS K;  dK = s dSᵀ Q;  dbias = dS

    Worked out in pieces, a few queries of a few heads at a time, so that their scores stay in the
    cache; under a causal mask a piece ends at its last query's own position. P is as large as all
    else together, so it is not kept: backward computes it again, P = exp(s Q Kᵀ + bias − L), from
    the logarithms L of its normalisers (Dao et al., "FlashAttention", 2022).

    What is subtracted from all scores of a query takes no pass over them. It rides in the product
    as one more column: [s Q, −L] [K, 1]ᵀ = s Q Kᵀ − L, and [g, −δ] [V, 1]ᵀ = g Vᵀ − δ.
    """

    kernel = "attention"

    def forward(
        self,
        q: Array,
        k: Array,
        v: Array,
        bias: Array | None = None,
        *,
        hidden: Array | None,
        causal: bool,
        scale: float,
        p: float,
        draw: tuple[int, int],
    ) -> Array:
        self._remember(bias, hidden, causal, scale, p, draw)
        xp = namespace(q)
        mask = keep_mask((*q.shape[:-1], k.shape[-2]), p, *draw, xp) if p else None
        y = xp.empty((*q.shape[:-1], v.shape[-1]), dtype=v.dtype)
        logs = xp.empty((*q.shape[:-1], 1), dtype=_wide(q.dtype))

        def compute(part: _Part) -> None:
            queries, keys = _with_column(part.of(q), 0.0), _with_column(part.of(k), 1.0)
            queries[..., :-1] *= scale
            values, drop = widened(part.of(v)), part.of(mask)
            found: tuple[Array, Array, Array] | None = None
            if bias is None and type(q) is np.ndarray:
                queries[..., -1:] = -_shifts(queries[..., :-1], keys[..., :-1])
                found = self._weigh(part, queries, keys, values, None, drop, by_row=False)
            if found is None:
                queries[..., -1:] = 0.0
                found = self._weigh(part, queries, keys, values, bias, drop, by_row=True)
            assert found is not None  # by row nothing vanishes
            sums, total, m = found
            share = 1.0 / xp.where(total == 0, total.dtype.type(1), total)
            part.of(y)[...] = sums * share  # dividing (T, D) instead of (T, S)
            part.of(logs)[...] = m - xp.log(share)

        with _quiet():
            for part in _parts(q, k, causal):
                compute(part)
        self.save(q, k, v, bias, mask, y)
        self.keep(logs)
        return y

    def _remember(
        self,
        bias: Array | None,
        hidden: Array | None,
        causal: bool,
        scale: float,
        p: float,
        draw: tuple[int, int],
    ) -> None:
        self.hidden, self.causal, self.scale = hidden, causal, scale
        self.has_bias, self.p, self.draw = bias is not None, p, draw
        self.keep_scale = 1.0 / (1.0 - p)

    def _weigh(
        self,
        part: _Part,
        q: Array,
        k: Array,
        v: Array,
        bias: Array | None,
        mask: Array | None,
        by_row: bool,
    ) -> tuple[Array, Array, Array] | None:
        """Σ e^(x − m) V and Σ e^(x − m) for every query, and m.

        Any m gives the same softmax. By row it is the largest score; else it is what the last
        column of q brings along, which takes no pass over the scores, and the answer is None where
        some row vanishes with it.
        """
        xp = namespace(q)
        sums = xp.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype)
        total, m = xp.empty_like(q[..., :1]), -q[..., -1:]
        ones = xp.ones((k.shape[-2], 1), dtype=q.dtype)
        for piece in part.pieces:
            rows, keys = piece.rows, piece.keys
            weights = self._scores(piece, part, q, k, bias)
            if by_row:
                m[..., rows, :] = finite_max(weights, -1)
                weights -= m[..., rows, :]
            xp.exp(weights, out=weights)
            total[..., rows, :] = weights @ ones[keys]
            sums[..., rows, :] = self._dropped(weights, piece.of(mask)) @ v[..., keys, :]
        if not by_row and total.size and not total.min() > _LOWEST:
            return None
        return sums, total, m

    def _scores(self, piece: _Piece, part: _Part, q: Array, k: Array, bias: Array | None) -> Array:
        """[s Q, …] [K, 1]ᵀ + bias of a piece, −∞ where a key comes later or is hidden."""
        xp = namespace(q)
        scores = q[..., piece.rows, :] @ k[..., piece.keys, :].swapaxes(-1, -2)
        if bias is not None:
            scores += piece.of(part.of(bias))
        if self.causal and piece.diagonal < piece.end:
            scores[..., piece.diagonal :] += xp.asarray(piece.future(scores.dtype))
        if self.hidden is not None:
            hidden = piece.of(part.of(self.hidden))
            xp.copyto(scores, scores.dtype.type(-np.inf), where=hidden)
        return scores

    def _dropped(self, x: Any, mask: Array | None) -> Any:
        return x if mask is None else x * mask * self.keep_scale

    def backward(
        self, g: Any, q: Any, k: Any, v: Any, bias: Any, mask: Array | None, y: Any
    ) -> Any:
        if isinstance(g, Tensor):
            if self.p and mask is None:  # a kernel ran the forward
                scores = (*q.shape[:-1], k.shape[-2])
                mask = keep_mask(scores, self.p, *self.draw, namespace(q.data))
            return self._recorded(g, q, k, v, bias, mask)[: 3 + self.has_bias]
        xp, logs = namespace(g), self.kept
        dq, dk, dv = xp.empty_like(q), xp.empty_like(k), xp.empty_like(v)
        dbias = xp.zeros(bias.shape, _wide(bias.dtype)) if self.has_bias else None

        def compute(part: _Part) -> None:
            mine = part.of
            queries, keys = _with_column(mine(q), -mine(logs)), _with_column(mine(k), 1.0)
            queries[..., :-1] *= self.scale
            delta = row_dot(widened(mine(g)), widened(mine(y)))
            gs, values = _with_column(mine(g), -delta), _with_column(mine(v), 1.0)
            dk_here, dv_here = xp.zeros_like(keys[..., :-1]), xp.zeros_like(values[..., :-1])
            dq_here = xp.empty_like(queries[..., :-1])
            for piece in part.pieces:
                rows, cols, drop = piece.rows, piece.keys, piece.of(mine(mask))
                p = self._scores(piece, part, queries, keys, bias)
                xp.exp(p, out=p)
                add(
                    dv_here[..., cols, :],
                    self._dropped(p, drop).swapaxes(-1, -2) @ gs[..., rows, :-1],
                )
                if drop is None:
                    ds = gs[..., rows, :] @ values[..., cols, :].swapaxes(-1, -2)
                else:
                    ds = gs[..., rows, :-1] @ values[..., cols, :-1].swapaxes(-1, -2)
                    ds = self._dropped(ds, drop) - delta[..., rows, :]
                ds *= p
                dq_here[..., rows, :] = ds @ keys[..., cols, :-1]
                add(dk_here[..., cols, :], ds.swapaxes(-1, -2) @ queries[..., rows, :-1])
                if dbias is not None:
                    add(piece.of(mine(dbias)), ds)
            mine(dq)[...] = dq_here * self.scale
            mine(dk)[...], mine(dv)[...] = dk_here, dv_here

        def add(total: Array, parts: Array) -> None:
            """One key/value head may serve a group of query heads: its gradients add up."""
            total += sum_to(parts, total.shape)

        with _quiet():
            for part in _parts(q, k, self.causal):
                compute(part)
        return (dq, dk, dv) if dbias is None else (dq, dk, dv, narrowed(dbias, bias))

    def _recorded(
        self, g: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Any, mask: Array | None
    ) -> tuple[Any, ...]:
        """The same in plain ops on Tensors, for the second order; P is computed whole."""
        scores = (q * self.scale) @ k.swapaxes(-1, -2)
        if bias is not None:
            scores = scores + bias
        if self.causal:
            t, s = scores.shape[-2:]
            future = namespace(q.data).arange(s) > namespace(q.data).arange(t)[:, None] + (s - t)
            scores = masked_fill(scores, future, -np.inf)
        if self.hidden is not None:
            scores = masked_fill(scores, self.hidden, -np.inf)
        p = softmax(scores)
        dv = self._dropped(p, mask).swapaxes(-1, -2) @ g
        ds = self._dropped(g @ v.swapaxes(-1, -2), mask)  # dP so far
        ds = p * (ds - row_dot(ds, p))
        dq, dk = (ds @ k) * self.scale, (ds.swapaxes(-1, -2) @ q) * self.scale
        # One key/value head may serve a group of query heads: its gradients add up.
        dbias = None if bias is None else sum_to(ds, bias.shape)
        return dq, sum_to(dk, k.shape), sum_to(dv, v.shape), dbias

    def forward_kernel(
        self,
        kernel: Any,
        q: Array,
        k: Array,
        v: Array,
        bias: Array | None = None,
        *,
        hidden: Array | None,
        **options: Any,
    ) -> tuple[Array, Any]:
        self._remember(bias, hidden, **options)
        y, saved = kernel.forward(q, k, v, bias, hidden, **options)
        self.save(q, k, v, bias, None, y)
        return y, saved

    def backward_kernel(self, kernel: Any, g: Array, *saved: Any) -> Any:
        gradients = kernel.backward(
            g,
            *saved,
            causal=self.causal,
            scale=self.scale,
            p=self.p,
            draw=self.draw,
            bias_gradient=self.has_bias and self.needs(3),
        )
        return gradients[: 3 + self.has_bias]


def _quiet() -> np.errstate:
    """OpenBLAS sometimes raises the flag "invalid" over lanes that it then throws away."""
    return np.errstate(invalid="ignore")


def _wide(dtype: np.dtype) -> np.dtype:
    return np.promote_types(dtype, np.float32)


def _with_column(x: Array, last: Any) -> Array:
    """[x, last], at least in float32: (…, D) and (…, 1) -> (…, D + 1)"""
    xp = namespace(x)
    y = xp.empty((*x.shape[:-1], x.shape[-1] + 1), dtype=_wide(x.dtype))
    y[..., :-1] = x
    y[..., -1:] = last
    return y


# e^60 times the number of keys is far below float32's largest number, 1e38; and where a row adds up
# to 1e-20, weights that fall under its smallest, 1e-38, do not count.
_HIGHEST, _LOWEST = 60.0, 1e-20


def _shifts(q: Array, k: Array) -> Array:
    """c ≥ 0, (…, T, 1), with which no score less c is above 60: |q·k| ≤ ‖q‖ ‖k‖, so it is safe.

    Zero for what a model of usual weights gives, and found without a look at the scores.
    """
    xp = namespace(q)
    if not k.size:
        return xp.zeros((*q.shape[:-1], 1), dtype=q.dtype)
    largest = xp.sqrt(row_dot(k, k).max(axis=-2, keepdims=True))
    return xp.maximum(xp.sqrt(row_dot(q, q)) * largest - _HIGHEST, q.dtype.type(0))


class _Piece(NamedTuple):
    """Some queries, and the keys that they may see."""

    first: int  # query, the position of which among the keys is `shift` more
    last: int
    end: int  # of the keys
    shift: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.last)

    @property
    def keys(self) -> slice:
        return slice(self.end)

    def of(self, x: Any) -> Any:
        """What (…, T, S) holds for the piece; None of None. An axis of size 1 stands for all."""
        if x is None:
            return None
        rows = self.rows if x.shape[-2] > 1 else slice(None)
        return x[..., rows, self.keys if x.shape[-1] > 1 else slice(None)]

    @property
    def diagonal(self) -> int:
        """The first key that comes after the first query."""
        return max(self.first + self.shift + 1, 0)

    def future(self, dtype: np.dtype) -> np.ndarray:
        """For the keys from the diagonal on: −∞ where a key comes after the query, else 0."""
        offset = self.diagonal - (self.first + self.shift + 1)
        return _later(self.last - self.first, self.end - self.diagonal, offset, dtype)


@functools.lru_cache(maxsize=32)
def _later(t: int, s: int, offset: int, dtype: np.dtype) -> np.ndarray:
    later = np.arange(s) + offset >= np.arange(t)[:, None]
    return np.where(later, -np.inf, 0.0).astype(dtype)


class _Part(NamedTuple):
    """Some of the heads, and the pieces of their queries."""

    lead: tuple[slice, ...]  # which of the leading axes
    pieces: list[_Piece]

    def of(self, x: Any) -> Any:
        """The heads' part of an array (…, m, n); None of None. An axis of size 1 stands for all."""
        if x is None:
            return None
        lead = self.lead[max(0, len(self.lead) + 2 - x.ndim) :]
        return x[tuple([slice(None) if n == 1 else s for n, s in zip(x.shape, lead, strict=False)])]


# A piece: 64 queries where the keys after them are left out, and about 512 KiB of scores.
_ROWS, _ROOM = 64, 131072


def _parts(q: Array, k: Array, causal: bool) -> Iterator[_Part]:
    t, s = q.shape[-2], k.shape[-2]
    if type(q) is not np.ndarray:  # on a GPU a piece would only cost launches
        yield _Part((slice(None),) * (q.ndim - 2), [_Piece(0, t, s, s - t)])
        return
    rows = max(1, min(_ROWS if causal else 2 * _ROWS, -(-t // 2)))
    pieces = []
    for first in range(0, t, rows):
        last = min(first + rows, t)
        end = min(max(s - t + last, 0), s) if causal else s
        pieces.append(_Piece(first, last, end, s - t))
    shared = math.prod(q.shape[:-2]) // max(1, math.prod(k.shape[:-2]))  # queries' heads per key's
    for lead in _leads(k.shape[:-2], _ROOM // max(1, rows * s * shared)):
        yield _Part(lead, pieces)


def _leads(shape: tuple[int, ...], room: int) -> Iterator[tuple[slice, ...]]:
    """Cut leading axes into parts of at most `room` elements, or of one."""
    if not shape:
        yield ()
        return
    inner = math.prod(shape[1:])
    step = max(1, room // max(1, inner))
    for start in range(0, shape[0], step):
        here = slice(None) if shape[0] == 1 else slice(start, min(start + step, shape[0]))
        if inner > room:
            for rest in _leads(shape[1:], room):
                yield (here, *rest)
        else:
            yield (here, *(slice(None),) * (len(shape) - 1))


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    lengths: Any = None,
) -> Tensor:
    """y = softmax(s Q Kᵀ + mask) V, with s = 1/√D

    Args:
        query: (B, H, T, D), or any leading axes
        key: (B, H, S, D); (B, H′, S, D) when H′ divides H: grouped heads, each serving H/H′ queries
        value: (B, H, S, E), heads as the key's
        attn_mask: broadcastable to (B, H, T, S): boolean, True where attention is allowed; or
            float, added to the scores (and given a gradient if it requires one)
        dropout_p: probability of dropping an attention weight (the caller passes 0 in evaluation)
        is_causal: query i sees keys up to S − T + i: the last query sees all. (With T = S that is
            the lower triangle. PyTorch aligns the first query instead when T ≠ S, which is wrong
            for decoding against a cache.)
        scale: s
        lengths: (B,) how many keys of each sequence are real; the rest is padding

    A query which may see no key gives zeros, never NaN.

    Vaswani et al., "Attention Is All You Need", 2017.
    """
    q, k, v = as_float(query), as_float(key), as_float(value)
    _check(q, k, v, dropout_p)
    t, s = q.shape[-2], k.shape[-2]
    group = q.shape[-3] // k.shape[-3] if q.ndim > 2 and k.shape[-3] else 1
    bias, hidden = _masks(q, attn_mask, lengths, s)
    if group > 1:
        q = q.reshape((*q.shape[:-3], k.shape[-3], group, t, q.shape[-1]))  # (B, H′, G, T, D)
        k, v = k.unsqueeze(-3), v.unsqueeze(-3)
        bias = None if bias is None else _group(bias, group)
        hidden = None if hidden is None else _group(Tensor(hidden), group).data
    scale = 1.0 / math.sqrt(q.shape[-1] or 1) if scale is None else float(scale)
    count = math.prod(q.shape[:-1]) * s
    draw = backend.random.reserve(count) if dropout_p else (0, 0)
    inputs = (q, k, v) if bias is None else (q, k, v, bias)
    y = Attention.apply(
        *inputs, hidden=hidden, causal=is_causal, scale=scale, p=float(dropout_p), draw=draw
    )
    return y if group <= 1 else y.flatten(-4, -3)


def _check(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> None:
    shapes = f"got query {q.shape}, key {k.shape}, value {v.shape}"
    if not (q.ndim == k.ndim == v.ndim >= 2):
        raise ValueError(f"attention needs query, key and value of equal rank ≥ 2, {shapes}")
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise TypeError(f"attention needs one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"query and key need the same head size, {shapes}")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"key and value need the same batch, heads and length, {shapes}")
    if q.ndim > 2:
        heads, shared = q.shape[-3], k.shape[-3]
        if q.shape[:-3] != k.shape[:-3] or (heads != shared and (not shared or heads % shared)):
            raise ValueError(
                f"the batch must agree and the key's heads must divide the query's, {shapes}"
            )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")


def _masks(q: Tensor, attn_mask: Any, lengths: Any, s: int) -> tuple[Tensor | None, Array | None]:
    """What is added to the scores, and where they are hidden; each None when there is nothing."""
    xp = namespace(q.data)
    scores = (*q.shape[:-1], s)
    bias, hidden = None, None
    if attn_mask is not None:
        mask = (
            as_tensor(attn_mask)
            if isinstance(attn_mask, Tensor)
            else Tensor(as_array(attn_mask, q.data))
        )
        if mask.ndim > len(scores) or any(
            n not in (1, m) for n, m in zip(mask.shape[::-1], scores[::-1], strict=False)
        ):
            raise ValueError(f"attn_mask {mask.shape} does not broadcast to the scores {scores}")
        if mask.dtype == backend.bool_:
            hidden = xp.atleast_2d(~mask.data)
        elif backend.is_float(mask.dtype):
            bias = mask.astype(q.dtype)
            bias = bias if bias.ndim > 1 else bias.reshape((1, bias.size))
        else:
            raise TypeError(f"attn_mask is boolean (True = attend) or float, got {mask.dtype}")
    if lengths is not None:
        real = as_array(lengths, q.data)
        if q.ndim < 3 or real.shape != q.shape[:1] or real.dtype.kind not in "iu":
            raise ValueError(
                f"lengths must be {q.shape[:1]} integers, got {real.dtype} of shape {real.shape}"
            )
        padding = xp.arange(s) >= real.reshape(-1, *(1,) * (q.ndim - 1))  # (B, 1, 1, S)
        hidden = padding if hidden is None else hidden | padding
    return bias, hidden


def _group(mask: Tensor, group: int) -> Tensor:
    """(…, H, T, S) -> (…, H′, G, T, S); a mask without its own heads gets an axis of size 1."""
    if mask.ndim < 3:
        return mask
    heads = mask.shape[-3]
    split = (1, 1) if heads == 1 else (heads // group, group)
    return mask.reshape((*mask.shape[:-3], *split, *mask.shape[-2:]))


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """The same in five plain ops: what the fused op is held against, and the lesson."""
    t, s = query.shape[-2], key.shape[-2]
    scores = matmul(query, key.swapaxes(-1, -2)) * (1.0 / math.sqrt(query.shape[-1]))
    if attn_mask is not None:
        visible = attn_mask.dtype == backend.bool_
        scores = masked_fill(scores, ~attn_mask, -np.inf) if visible else scores + attn_mask
    if is_causal:
        past = Tensor(np.tril(np.ones((t, s), dtype=bool), s - t))
        scores = masked_fill(scores, ~past, -np.inf)
    return matmul(dropout(softmax(scores), dropout_p), value)
