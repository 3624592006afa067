"""Attention: every position asks all others and takes a weighted mean of what they say.

Dimensions: B batch, H heads, T queries, S keys, D head size.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.autograd import Function
from tinygrad_llm.backend import Array, namespace
from tinygrad_llm.ops.convert import as_array, as_float, as_tensor, narrowed
from tinygrad_llm.ops.dropout import dropout, keep_mask
from tinygrad_llm.ops.elementwise import masked_fill
from tinygrad_llm.ops.linalg import matmul
from tinygrad_llm.ops.shape import sum_to
from tinygrad_llm.ops.softmax import softmax, softmax_of
from tinygrad_llm.tensor import Tensor


class Attention(Function):
    """y = P̃ V,  P = softmax(s Q Kᵀ + bias),  P̃ = P ⊙ m / (1 − p) under dropout

    dV = P̃ᵀ g;  dP = (g Vᵀ) ⊙ m / (1 − p);  dS = P ⊙ (dP − Σ dP ⊙ P)
    dQ = s dS K;  dK = s dSᵀ Q;  dbias = dS
    """

    def forward(
        self,
        q: Array,
        k: Array,
        v: Array,
        bias: Array | None = None,
        *,
        hidden: Array | None,
        scale: float,
        p: float,
        draw: tuple[int, int],
    ) -> Array:
        self.scale, self.hidden, self.has_bias = scale, hidden, bias is not None
        self.bias_shape = bias.shape if bias is not None else ()
        probabilities = self._probabilities(q, k, bias)
        self.keep_scale = 1.0 / (1.0 - p)
        self.mask = keep_mask(probabilities.shape, p, *draw, namespace(q)) if p else None
        self.save(q, k, v, bias)
        self.keep(probabilities)
        return narrowed(self._dropped(probabilities) @ v, v)

    def _probabilities(self, q: Any, k: Any, bias: Any) -> Any:
        """P (…, T, S). Of Tensors it is recorded, for the second order."""
        scores = (q * self.scale) @ k.swapaxes(-1, -2)  # (…, T, D) x (…, D, S) -> (…, T, S)
        if isinstance(scores, Tensor):
            scores = scores if bias is None else scores + bias
            scores = scores if self.hidden is None else masked_fill(scores, self.hidden, -np.inf)
            return softmax(scores)
        if bias is not None:
            scores += bias
        if self.hidden is not None:
            namespace(q).copyto(scores, scores.dtype.type(-np.inf), where=self.hidden)
        return softmax_of(scores, axis=-1, out=scores)

    def _dropped(self, x: Any) -> Any:
        return x if self.mask is None else x * self.mask * self.keep_scale

    def backward(self, g: Any, q: Any, k: Any, v: Any, bias: Any = None) -> Any:
        p = self.kept if self.kept is not None else self._probabilities(q, k, bias)
        dv = self._dropped(p).swapaxes(-1, -2) @ g if self.needs(2) else None
        ds = self._dropped(g @ v.swapaxes(-1, -2))
        if isinstance(ds, Tensor):
            ds = p * (ds - (ds * p).sum(axis=-1, keepdims=True))
        else:
            ds -= (ds * p).sum(axis=-1, keepdims=True)
            ds *= p
        dq = (ds @ k) * self.scale if self.needs(0) else None
        dk = (ds.swapaxes(-1, -2) @ q) * self.scale if self.needs(1) else None
        # One key/value head may serve a group of query heads: its gradients add up.
        dk = dk if dk is None else sum_to(dk, k.shape)
        dv = dv if dv is None else sum_to(dv, v.shape)
        if not self.has_bias:
            return dq, dk, dv
        return dq, dk, dv, sum_to(ds, self.bias_shape) if self.needs(3) else None


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
    bias, hidden = _masks(q, attn_mask, is_causal, lengths, s)
    if group > 1:
        q = q.reshape((*q.shape[:-3], k.shape[-3], group, t, q.shape[-1]))  # (B, H′, G, T, D)
        k, v = k.unsqueeze(-3), v.unsqueeze(-3)
        bias = None if bias is None else _group(bias, group)
        hidden = None if hidden is None else _group(Tensor(hidden), group).data
    scale = 1.0 / math.sqrt(q.shape[-1] or 1) if scale is None else float(scale)
    count = math.prod(q.shape[:-1]) * s
    draw = backend.random.reserve(count) if dropout_p else (0, 0)
    inputs = (q, k, v) if bias is None else (q, k, v, bias)
    y = Attention.apply(*inputs, hidden=hidden, scale=scale, p=float(dropout_p), draw=draw)
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


def _masks(
    q: Tensor, attn_mask: Any, is_causal: bool, lengths: Any, s: int
) -> tuple[Tensor | None, Array | None]:
    """What is added to the scores, and where they are hidden; each None when there is nothing."""
    xp, t = namespace(q.data), q.shape[-2]
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
    if is_causal:
        future = xp.arange(s) > xp.arange(s - t, s)[:, None]  # (T, S)
        hidden = future if hidden is None else hidden | future
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
