"""Attention: every position asks all others and takes a weighted mean of what they say.

Dimensions: B batch, H heads, T queries, S keys, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.autograd import Function
from tinygrad_llm.backend import Array, namespace
from tinygrad_llm.ops.convert import as_array, as_float, as_tensor
from tinygrad_llm.ops.dropout import dropout, keep_mask
from tinygrad_llm.ops.elementwise import masked_fill
from tinygrad_llm.ops.linalg import matmul, row_dot
from tinygrad_llm.ops.reduce import sum_of
from tinygrad_llm.ops.shape import sum_to
from tinygrad_llm.ops.softmax import finite_max, softmax
from tinygrad_llm.tensor import Tensor


class Attention(Function):
    """y = P̃ V,  P = softmax(s Q Kᵀ + bias),  P̃ = P ⊙ m / (1 − p) under dropout

    dV = P̃ᵀ g;  dP = (g Vᵀ) ⊙ m / (1 − p);  dS = P ⊙ (dP − Σ dP ⊙ P)
    dQ = s dS K;  dK = s dSᵀ Q;  dbias = dS

    Worked out in pieces, a few queries of a few heads at a time, so that their scores stay in the
    cache; under a causal mask a piece ends at its last query's own position. P is as large as all
    else together, so it is not kept: backward computes it again.
    """

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
        self.hidden, self.causal, self.scale = hidden, causal, scale
        self.has_bias, self.keep_scale, self.draw = bias is not None, 1.0 / (1.0 - p), draw
        xp = namespace(q)
        mask = keep_mask((*q.shape[:-1], k.shape[-2]), p, *draw, xp) if p else None
        y = xp.empty((*q.shape[:-1], v.shape[-1]), dtype=v.dtype)
        normalisers = []
        for piece in _pieces(q, k, causal):
            scores = self._scores(piece, piece.queries(q), piece.keys(k), piece.scores(bias))
            weights, m, share = _exponentials(scores)
            normalisers.append((m, share))
            y[piece.at_queries(y)] = (
                self._dropped(weights, piece.scores(mask)) @ piece.keys(v)
            ) * share  # dividing (T, D) instead of (T, S)
        self.save(q, k, v, bias, mask)
        self.keep(normalisers)
        return y

    def _scores(self, piece: _Piece, q: Any, k: Any, bias: Any) -> Any:
        """s Q Kᵀ + bias of a piece, −∞ where it is hidden. Of Tensors it is recorded."""
        scores = (q * self.scale) @ k.swapaxes(-1, -2)  # (…, T, D) x (…, D, S) -> (…, T, S)
        if bias is not None:
            scores = scores + bias
        if self.causal and piece.diagonal < piece.end:
            future = namespace(q).asarray(piece.future(), dtype=q.dtype)
            if isinstance(scores, Tensor):
                scores = scores + future
            else:
                scores[..., piece.diagonal :] += future[:, piece.diagonal :]
        hidden = piece.scores(self.hidden)
        if hidden is not None and isinstance(scores, Tensor):
            scores = masked_fill(scores, hidden, -np.inf)
        elif hidden is not None:
            namespace(q).copyto(scores, scores.dtype.type(-np.inf), where=hidden)
        return scores

    def _dropped(self, x: Any, mask: Array | None) -> Any:
        return x if mask is None else x * mask * self.keep_scale

    def backward(self, g: Any, q: Any, k: Any, v: Any, bias: Any, mask: Array | None) -> Any:
        if isinstance(g, Tensor):
            p = softmax(self._scores(_whole(q, k), q, k, bias))
            return self._gradients(p, g, q, k, v, bias, mask)[: 3 + self.has_bias]
        xp = namespace(g)
        dq, dk, dv = xp.empty_like(q), xp.zeros_like(k), xp.zeros_like(v)
        dbias = xp.zeros_like(bias) if self.has_bias else None
        pieces = _pieces(q, k, self.causal)
        for piece, (m, share) in zip(pieces, self.kept, strict=True):
            inputs = piece.queries(q), piece.keys(k), piece.keys(v), piece.scores(bias)
            p = self._scores(piece, inputs[0], inputs[1], inputs[3])
            p -= m
            xp.exp(p, out=p)
            p *= share
            dq[piece.at_queries(q)], dk_part, dv_part, dbias_part = self._gradients(
                p, piece.queries(g), *inputs, piece.scores(mask)
            )
            dk[piece.at_keys(k)] += dk_part
            dv[piece.at_keys(v)] += dv_part
            if dbias is not None:
                dbias[piece.at_scores(dbias)] += dbias_part
        return (dq, dk, dv, dbias) if self.has_bias else (dq, dk, dv)

    def _gradients(
        self, p: Any, g: Any, q: Any, k: Any, v: Any, bias: Any, mask: Array | None
    ) -> tuple[Any, Any, Any, Any]:
        dv = self._dropped(p, mask).swapaxes(-1, -2) @ g
        ds = self._dropped(g @ v.swapaxes(-1, -2), mask)  # dP so far
        if isinstance(ds, Tensor):
            ds = p * (ds - row_dot(ds, p))
        else:
            ds -= row_dot(ds, p)
            ds *= p
        dq, dk = (ds @ k) * self.scale, (ds.swapaxes(-1, -2) @ q) * self.scale
        # One key/value head may serve a group of query heads: its gradients add up.
        dbias = None if bias is None else sum_to(ds, bias.shape)
        return dq, sum_to(dk, k.shape), sum_to(dv, v.shape), dbias


def _exponentials(scores: Array) -> tuple[Array, Array, Array]:
    """e^(x − m) in the place of the scores x, m, and 1 / Σ e^(x − m) over each row.

    Any m gives the same softmax. One for the whole piece takes a third of the time of one a row,
    and is safe unless a row lies so far below the others that it vanishes: then each has its own.
    """
    xp = namespace(scores)
    if scores.size and scores.dtype == np.float32:
        m = scores.max()
        if m > -np.inf:
            weights = xp.exp(scores - m)
            total = weights @ xp.ones((scores.shape[-1], 1), dtype=scores.dtype)
            if total.min() > 1e-20:
                return weights, m, 1.0 / total
    m = finite_max(scores, -1)
    scores -= m
    xp.exp(scores, out=scores)
    total = sum_of(scores, -1, True)
    return scores, m, 1.0 / xp.where(total == 0, total.dtype.type(1), total)


class _Piece(NamedTuple):
    """Some queries, and the keys that they may see, of some heads."""

    lead: tuple[slice, ...]  # which batches and heads
    first: int  # query, the position of which among the keys is `shift` more
    last: int
    end: int  # of the keys
    shift: int

    def at_queries(self, x: Any) -> tuple[slice, ...]:
        return _index(x, (*self.lead, slice(self.first, self.last), slice(None)))

    def at_keys(self, x: Any) -> tuple[slice, ...]:
        lead = _index(x, (*self.lead, slice(None), slice(None)))[:-2]
        return (*lead, slice(self.end), slice(None))  # where S = 1, `end` may still be 0

    def at_scores(self, x: Any) -> tuple[slice, ...]:
        return _index(x, (*self.lead, slice(self.first, self.last), slice(self.end)))

    def queries(self, x: Any) -> Any:
        return x[self.at_queries(x)]

    def keys(self, x: Any) -> Any:
        return x[self.at_keys(x)]

    def scores(self, x: Any) -> Any:
        return None if x is None else x[self.at_scores(x)]

    @property
    def diagonal(self) -> int:
        """The first key that comes after the first query."""
        return max(self.first + self.shift + 1, 0)

    def future(self) -> np.ndarray:
        """(T, S): −∞ where a key comes after the query, else 0"""
        positions = np.arange(self.first, self.last) + self.shift
        return np.where(np.arange(self.end) > positions[:, None], -np.inf, 0.0)


def _index(x: Any, parts: tuple[slice, ...]) -> tuple[slice, ...]:
    """The part of x, aligned from the right; an axis of size 1 stands for all of it."""
    return tuple(
        [
            slice(None) if n == 1 else p
            for n, p in zip(x.shape, parts[len(parts) - x.ndim :], strict=True)
        ]
    )


def _whole(q: Any, k: Any) -> _Piece:
    t, s = q.shape[-2], k.shape[-2]
    return _Piece((slice(None),) * (q.ndim - 2), 0, t, s, s - t)


_ROWS, _ROOM = 128, 65536  # queries in a piece, and scores: 256 KiB in float32


def _pieces(q: Array, k: Array, causal: bool) -> Iterator[_Piece]:
    if type(q) is not np.ndarray:  # on a GPU a piece would only cost launches
        yield _whole(q, k)
        return
    t, s = q.shape[-2], k.shape[-2]
    rows = min(t, _ROWS)
    for lead in _leads(q.shape[:-2], _ROOM // max(1, rows * s)):
        for first in range(0, t, rows or 1):
            last = min(first + rows, t)
            end = min(max(s - t + last, 0), s) if causal else s
            yield _Piece(lead, first, last, end, s - t)


def _leads(shape: tuple[int, ...], room: int) -> Iterator[tuple[slice, ...]]:
    """Cut leading axes into parts of at most `room` elements, or of one."""
    if not shape:
        yield ()
        return
    inner = math.prod(shape[1:])
    step = max(1, room // max(1, inner))
    for start in range(0, shape[0], step):
        here = slice(start, min(start + step, shape[0]))
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
            hidden = ~mask.data
        elif backend.is_float(mask.dtype):
            bias = mask.astype(q.dtype)
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
