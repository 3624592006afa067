"""The transformer's layer: attention between positions, then a small network at each position.

Dimensions: B batch, T time, S time of the memory, C channels.
"""

from __future__ import annotations

from typing import Any

from tinygrad_llm import ops
from tinygrad_llm.nn.activations import activation as activation_named
from tinygrad_llm.nn.attention import MultiHeadAttention
from tinygrad_llm.nn.cache import LayerCache
from tinygrad_llm.nn.dropout import Dropout
from tinygrad_llm.nn.linear import Linear
from tinygrad_llm.nn.module import Module
from tinygrad_llm.nn.normalization import LayerNorm
from tinygrad_llm.tensor import Tensor


class MLP(Module):
    """y = W₂ dropout(φ(W₁ x + b₁)) + b₂

    Args:
        in_features: C
        hidden_features: how wide the middle is; default 4 C
        activation: the name of φ, one of `nn.ACTIVATIONS`
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        activation: str = "gelu",
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        hidden = 4 * in_features if hidden_features is None else hidden_features
        self.linear1 = Linear(in_features, hidden, bias)
        self.activation = activation_named(activation)
        self.dropout = Dropout(dropout)
        self.linear2 = Linear(hidden, in_features, bias)

    def forward(self, x: Any) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class TransformerBlock(Module):
    """x ← x + f(norm(x)) for f = self-attention, [cross-attention,] MLP; with norm_first=False
    x ← norm(x + f(x)), as in the first transformers and in BERT

    PyTorch's TransformerEncoderLayer, and with `cross_attention` its TransformerDecoderLayer,
    batch first. Dropout stands after each f, on attention weights, and inside the MLP.

    Args:
        d_model: C
        nhead: heads of attention
        dim_feedforward: how wide the middle of the MLP is; default 4 C
        activation: a name from `nn.ACTIVATIONS`
        norm_first: normalise what enters each f (pre-norm), or what leaves each sum (post-norm)
        cross_attention: attend to a second sequence too, the `memory` of `forward`
        kv_heads: see MultiHeadAttention

    Vaswani et al., "Attention Is All You Need", 2017; Xiong et al., "On layer normalization in the
    transformer architecture", 2020.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int | None = None,
        dropout: float = 0.1,
        activation: str = "gelu",
        layer_norm_eps: float = 1e-5,
        norm_first: bool = True,
        bias: bool = True,
        cross_attention: bool = False,
        kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.self_attn = MultiHeadAttention(d_model, nhead, dropout, bias, kv_heads)
        self.self_attn_norm = LayerNorm(d_model, layer_norm_eps, bias=bias)
        self.cross_attn: MultiHeadAttention | None = None
        self.cross_attn_norm: LayerNorm | None = None
        if cross_attention:
            self.cross_attn = MultiHeadAttention(d_model, nhead, dropout, bias, kv_heads)
            self.cross_attn_norm = LayerNorm(d_model, layer_norm_eps, bias=bias)
        self.mlp = MLP(d_model, dim_feedforward, activation, dropout, bias)
        self.mlp_norm = LayerNorm(d_model, layer_norm_eps, bias=bias)
        self.dropout = Dropout(dropout)

    def forward(
        self,
        x: Any,
        memory: Any = None,
        attn_mask: Any = None,
        is_causal: bool = False,
        lengths: Any = None,
        memory_mask: Any = None,
        memory_lengths: Any = None,
        cache: LayerCache | None = None,
        memory_cache: LayerCache | None = None,
    ) -> Tensor:
        """y (B, T, C)

        Args:
            x: (B, T, C)
            memory: (B, S, C), what cross-attention reads
            attn_mask, is_causal, lengths: of the self-attention, as in MultiHeadAttention
            memory_mask, memory_lengths: of the cross-attention
            cache, memory_cache: of the self-attention and of the cross-attention
        """
        if (memory is None) != (self.cross_attn is None):
            wanted = "needs a memory" if memory is None else "has no cross-attention for a memory"
            raise ValueError(f"this TransformerBlock {wanted} (cross_attention={memory is None})")

        x = self._residual(
            ops.as_tensor(x),
            self.self_attn_norm,
            self.self_attn,
            attn_mask=attn_mask,
            is_causal=is_causal,
            lengths=lengths,
            cache=cache,
        )
        if self.cross_attn is not None:
            x = self._residual(
                x,
                self.cross_attn_norm,
                self.cross_attn,
                key=memory,
                attn_mask=memory_mask,
                lengths=memory_lengths,
                cache=memory_cache,
            )
        return self._residual(x, self.mlp_norm, self.mlp)

    def _residual(self, x: Tensor, norm: Any, f: Any, **options: Any) -> Tensor:
        if self.norm_first:
            return x + self.dropout(f(norm(x), **options))
        return norm(x + self.dropout(f(x, **options)))

    def extra_repr(self) -> str:
        return f"norm_first={self.norm_first}"
