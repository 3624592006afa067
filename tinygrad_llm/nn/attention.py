"""Multi-head attention with its projections.

Dimensions: B batch, T queries, S keys, C channels, H heads, D = C / H head size.
"""

from __future__ import annotations

from typing import Any

from tinygrad_llm import ops
from tinygrad_llm.nn import init
from tinygrad_llm.nn.cache import LayerCache
from tinygrad_llm.nn.dropout import check_probability
from tinygrad_llm.nn.linear import Linear
from tinygrad_llm.nn.module import Module
from tinygrad_llm.tensor import Tensor


class MultiHeadAttention(Module):
    """y = [head₁ … head_H] Wₒ,  headₕ = softmax(Qₕ Kₕᵀ / √D) Vₕ,  Q = x W_q, K = z W_k, V = z W_v

    Self-attention with one input (z = x), cross-attention with two. Batch first, always. Each of
    the four projections is a Linear of its own (`q_proj`, `k_proj`, `v_proj`, `out_proj`), so that
    each can be replaced, frozen or adapted alone; q, k and v begin Xavier-uniform, biases as zeros.

    Args:
        embed_dim: C, divisible by num_heads
        num_heads: H
        dropout: probability of dropping an attention weight in training
        bias: whether the projections have one
        kv_heads: heads of keys and values, each serving H / kv_heads query heads; default H.
            Ainslie et al., "GQA: training generalized multi-query transformer models", 2023

    Vaswani et al., "Attention Is All You Need", 2017.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if kv_heads is None else kv_heads
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}"
            )
        if kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"kv_heads must divide num_heads, got {kv_heads} and {num_heads}")
        self.embed_dim, self.num_heads, self.kv_heads = embed_dim, num_heads, kv_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = check_probability(dropout)
        self.q_proj = Linear(embed_dim, embed_dim, bias)
        self.k_proj = Linear(embed_dim, kv_heads * self.head_dim, bias)
        self.v_proj = Linear(embed_dim, kv_heads * self.head_dim, bias)
        self.out_proj = Linear(embed_dim, embed_dim, bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw q_proj, k_proj and v_proj anew and set all biases to 0."""
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            init.xavier_uniform_(projection.weight)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            if projection.bias is not None:
                init.zeros_(projection.bias)

    def forward(
        self,
        query: Any,
        key: Any = None,
        value: Any = None,
        attn_mask: Any = None,
        is_causal: bool = False,
        lengths: Any = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """y (B, T, C)

        Args:
            query: (B, T, C)
            key: (B, S, C), or None for self-attention
            value: (B, S, C), or None for `key`
            attn_mask: broadcastable to (B, H, T, S): boolean, True where attention is allowed, or
                float, added to the scores
            is_causal: query i sees keys up to S − T + i
            lengths: (B,) how many keys of each sequence are real, the rest being padding
            cache: keys and values that were computed before: of self-attention those of the
                positions to the left, to which the query's are added; of cross-attention those of
                `key` and `value`, which are read when they come first
        """

        def keys_and_values() -> tuple[Tensor, Tensor]:
            keys = query if key is None else key
            values = keys if value is None else value
            return self._heads(self.k_proj(keys)), self._heads(self.v_proj(values))

        if cache is None:
            k, v = keys_and_values()  # (B, kv_heads, S, D) each
        elif key is None:
            k, v = cache.extend(*keys_and_values())
        else:
            k, v = cache.once(keys_and_values)
        y = ops.scaled_dot_product_attention(
            self._heads(self.q_proj(query)),  # (B, H, T, D)
            k,
            v,
            attn_mask=attn_mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            lengths=lengths,
        )
        y = y.swapaxes(-3, -2)  # (B, H, T, D) -> (B, T, H, D)
        return self.out_proj(y.reshape(*y.shape[:-2], self.embed_dim))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, H·D) -> (B, H, T, D), a view"""
        return x.reshape(*x.shape[:-1], -1, self.head_dim).swapaxes(-3, -2)

    def extra_repr(self) -> str:
        groups = "" if self.kv_heads == self.num_heads else f", kv_heads={self.kv_heads}"
        return f"{self.embed_dim}, num_heads={self.num_heads}{groups}, dropout={self.dropout}"
