"""T5: an encoder–decoder that turns every task into text to text.

It differs from the first transformer (seq2seq.py) in what stands around attention:

    scores = Q Kᵀ + bias[bucket(s − t)]      positions are known by their distance alone,
    x = x + f(x / rms(x) ⊙ g)                norms have no mean and no bias, and stand before f,
    f = W₂ ReLU(W₁ x)                        nothing has a bias; in 1.1 W₂ (GELU(W₁ x) ⊙ W₃ x)

Scores are not divided by √D: the first values of W_q are that much smaller. The biases, one per
bucket and head, are the first layer's, and all others of its side add the same.

Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text transformer",
JMLR 2020. The names of parameters and options are Hugging Face's.

Dimensions: B batch, T queries, S keys, C = d_model, H = num_heads, D = d_kv, V = vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np

from tinygrad_llm import ops
from tinygrad_llm.backend import namespace
from tinygrad_llm.models import checks, hub
from tinygrad_llm.models.encoder_decoder import EncoderDecoder, check_special_ids
from tinygrad_llm.models.padding import ALL, Visible
from tinygrad_llm.models.pretrained import Loaded, Weights
from tinygrad_llm.nn import (
    ACTIVATIONS,
    DecoderCache,
    Dropout,
    Embedding,
    LayerCache,
    Linear,
    Module,
    ModuleList,
    Parameter,
    RMSNorm,
    activation,
    init,
)
from tinygrad_llm.tensor import Tensor


@dataclass(frozen=True)
class T5Config:
    """The sizes and options of a T5, under Hugging Face's names; the defaults are "t5-small".

    Only dropout, 0.1 there, is 0 unless asked for. ValueError for what makes no network.
    """

    vocab_size: int = 32128  # V
    d_model: int = 512  # C
    d_kv: int = 64  # D; H · D need not be C
    d_ff: int = 2048  # how wide the middle of an MLP is
    num_layers: int = 6  # of the encoder
    num_decoder_layers: int | None = None  # None: as many
    num_heads: int = 8  # H
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128  # all further ones are in the last bucket
    dropout_rate: float = 0.0
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"  # or another activation, or "gated-gelu" as in T5 1.1
    tie_word_embeddings: bool = True  # the output layer is the embedding,
    scale_decoder_outputs: bool | None = None  # and is given x / √C; None: where it is tied
    pad_token_id: int = 0
    eos_token_id: int | None = 1
    decoder_start_token_id: int = 0

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in _SIZES}
        if self.num_decoder_layers is not None:
            sizes["num_decoder_layers"] = self.num_decoder_layers
        checks.check_sizes(**sizes)
        names = [*ACTIVATIONS, *(f"gated-{name}" for name in ACTIVATIONS)]
        checks.check_choice("feed_forward_proj", self.feed_forward_proj, names)
        checks.check_choice("tie_word_embeddings", self.tie_word_embeddings, (True, False))
        checks.check_total(self.num_parameters(), **sizes)
        if self.relative_attention_num_buckets % 4:
            raise ValueError(
                "relative_attention_num_buckets must be a multiple of 4 (two directions, near and "
                f"far), got {self.relative_attention_num_buckets}"
            )
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 2:
            raise ValueError(
                "relative_attention_max_distance must be above half of "
                f"relative_attention_num_buckets, got {self.relative_attention_max_distance} and "
                f"{self.relative_attention_num_buckets}"
            )
        checks.check_number("dropout_rate", self.dropout_rate, 0.0, 1.0)
        checks.check_number("layer_norm_epsilon", self.layer_norm_epsilon)
        checks.check_number("initializer_factor", self.initializer_factor)
        scaled = self.scale_decoder_outputs
        checks.check_choice("scale_decoder_outputs", scaled, (True, False, None))
        check_special_ids(self)

    @property
    def n_layer(self) -> int:
        """How many layers the decoder has, and so a DecoderCache."""
        return self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers

    @property
    def scales_outputs(self) -> bool:
        """Whether the output layer is given x / √C."""
        scaled = self.scale_decoder_outputs
        return self.tie_word_embeddings if scaled is None else scaled

    @property
    def is_gated(self) -> bool:
        """Whether the MLP is φ(W₁ x) ⊙ W₃ x in its middle."""
        return self.feed_forward_proj.startswith("gated-")

    @property
    def activation(self) -> str:
        """φ; 'gated-gelu' is GELU by tanh, as T5 1.1 was trained."""
        name = self.feed_forward_proj.removeprefix("gated-")
        return "gelu_new" if self.feed_forward_proj == "gated-gelu" else name

    def num_parameters(self) -> int:
        """How many numbers the network learns."""
        c, inner = self.d_model, self.num_heads * self.d_kv
        attention = 4 * c * inner + c
        mlp = (2 + self.is_gated) * c * self.d_ff + c
        side = self.relative_attention_num_buckets * self.num_heads + c
        return (
            self.num_layers * (attention + mlp)
            + self.n_layer * (2 * attention + mlp)
            + 2 * side
            + (2 - self.tie_word_embeddings) * self.vocab_size * c
        )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> T5Config:
        """The config that the object in a config.json describes; other keys are ignored.

        ValueError for another model_type.
        """
        checks.check_choice("model_type", config.get("model_type", "t5"), ("t5",))
        names = {field.name for field in fields(cls)}
        found = {key: value for key, value in config.items() if key in names}
        if found.get("decoder_start_token_id") is None:  # Hugging Face's is the padding
            found["decoder_start_token_id"] = found.get("pad_token_id", 0)
        return cls(**found)

    def to_dict(self) -> dict[str, Any]:
        """The object for config.json, which `transformers` reads."""
        return {
            "model_type": "t5",
            **asdict(self),
            "num_decoder_layers": self.n_layer,
            "scale_decoder_outputs": self.scales_outputs,
            "is_encoder_decoder": True,
        }


_SIZES = (
    *("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"),
    *("relative_attention_num_buckets", "relative_attention_max_distance"),
)


# --- positions ------------------------------------------------------------------------------------


def relative_buckets(
    distances: np.ndarray, bidirectional: bool, buckets: int = 32, max_distance: int = 128
) -> np.ndarray:
    """The bucket of each distance s − t, from query t to key s: exact when near, coarse when far.

        0, 1, … N/2 − 1        each its own,
        N/2 … max_distance     N/2 buckets that grow as the logarithm,
        beyond                 the last one

    In both directions N is half of the buckets, and keys to the right have the other half. In one
    direction, N = `buckets`, keys to the right, which no query sees, are in bucket 0.
    """
    distances = np.asarray(distances)
    right = np.zeros(distances.shape, np.int64)
    if bidirectional:
        buckets //= 2
        right = (distances > 0) * buckets
        distances = np.abs(distances)
    else:
        distances = np.maximum(-distances, 0)
    exact = buckets // 2
    # In float32, as everywhere: a boundary that falls on a whole number is rounded there.
    far = np.log(np.maximum(distances, 1).astype(np.float32) / np.float32(exact))
    far = far / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)
    far = np.minimum(exact + far.astype(np.int64), buckets - 1)
    return right + np.where(distances < exact, distances, far)


# --- the network ----------------------------------------------------------------------------------


class T5Attention(Module):
    """y = [head₁ … head_H] W_o,  headₕ = softmax(Qₕ Kₕᵀ + biasₕ) Vₕ"""

    def __init__(self, config: T5Config, in_decoder: bool, has_bias: bool) -> None:
        super().__init__()
        self.config, self.in_decoder = config, in_decoder
        c, inner = config.d_model, config.num_heads * config.d_kv
        self.q = Linear(c, inner, bias=False)
        self.k = Linear(c, inner, bias=False)
        self.v = Linear(c, inner, bias=False)
        self.o = Linear(inner, c, bias=False)
        self.relative_attention_bias: Embedding | None = None
        if has_bias:
            buckets = config.relative_attention_num_buckets
            self.relative_attention_bias = Embedding(buckets, config.num_heads)

    def position_bias(self, start: int, end: int) -> Tensor:
        """(1, H, T, S): what the distance from each of the queries start … end − 1 to keys adds."""
        assert self.relative_attention_bias is not None
        distances = np.arange(end) - np.arange(start, end)[:, None]
        buckets = relative_buckets(
            distances,
            not self.in_decoder,
            self.config.relative_attention_num_buckets,
            self.config.relative_attention_max_distance,
        )
        return self.relative_attention_bias(buckets).transpose(2, 0, 1).unsqueeze(0)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        attn_mask: Any = None,
        lengths: Any = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        def keys_and_values() -> tuple[Tensor, Tensor]:
            source = x if memory is None else memory
            return self._heads(self.k(source)), self._heads(self.v(source))

        if cache is None:
            k, v = keys_and_values()  # (B, H, S, D)
        elif memory is None:
            k, v = cache.extend(*keys_and_values())
        else:
            k, v = cache.once(keys_and_values)
        y = ops.scaled_dot_product_attention(
            self._heads(self.q(x)),
            k,
            v,
            attn_mask=attn_mask,
            dropout_p=self.config.dropout_rate if self.training else 0.0,
            is_causal=self.in_decoder and memory is None,
            scale=1.0,
            lengths=lengths,
        )
        return self.o(y.swapaxes(1, 2).flatten(2))  # (B, H, T, D) -> (B, T, H·D)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, H·D) -> (B, H, T, D), a view"""
        b, t, _ = x.shape
        return x.reshape(b, t, self.config.num_heads, self.config.d_kv).swapaxes(1, 2)


class T5MLP(Module):
    """y = W₂ φ(W₁ x), or gated W₂ (φ(W₁ x) ⊙ W₃ x)"""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.is_gated = config.is_gated
        if config.is_gated:
            self.wi_0 = Linear(config.d_model, config.d_ff, bias=False)
            self.wi_1 = Linear(config.d_model, config.d_ff, bias=False)
        else:
            self.wi = Linear(config.d_model, config.d_ff, bias=False)
        self.wo = Linear(config.d_ff, config.d_model, bias=False)
        self.act = activation(config.activation)
        self.dropout = Dropout(config.dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.wi_0(x)) * self.wi_1(x) if self.is_gated else self.act(self.wi(x))
        return self.wo(self.dropout(y))


class T5Part(Module):
    """y = x + dropout(f(x / rms(x) ⊙ g)), f the module of that name"""

    def __init__(self, config: T5Config, name: str, f: Module) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, f)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = Dropout(config.dropout_rate)

    @property
    def f(self) -> Any:
        """The module of that name."""
        return getattr(self, self.name)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return x + self.dropout(self.f(self.layer_norm(x), **options))


class T5Block(Module):
    """self-attention, in the decoder cross-attention, MLP"""

    def __init__(self, config: T5Config, in_decoder: bool, is_first: bool) -> None:
        super().__init__()
        own = T5Attention(config, in_decoder, has_bias=is_first)
        parts = [T5Part(config, "SelfAttention", own)]
        if in_decoder:
            cross = T5Attention(config, in_decoder, has_bias=False)
            parts.append(T5Part(config, "EncDecAttention", cross))
        parts.append(T5Part(config, "DenseReluDense", T5MLP(config)))
        self.layer = ModuleList(parts)


class T5Stack(Module):
    """Token ids (B, T) -> what one side knows at each position (B, T, C)"""

    def __init__(
        self, config: T5Config, layers: int, embed_tokens: Embedding, in_decoder: bool
    ) -> None:
        super().__init__()
        self.in_decoder = in_decoder
        self.embed_tokens = embed_tokens
        self.block: Any = ModuleList(T5Block(config, in_decoder, i == 0) for i in range(layers))
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = Dropout(config.dropout_rate)

    def forward(
        self,
        ids: Tensor,
        own: Visible,
        memory: Tensor | None = None,
        source: Visible = ALL,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        x = self.dropout(self.embed_tokens(ids))
        start = 0 if cache is None else cache.length
        bias = self._bias(start, start + ids.shape[1], own)  # one for all layers
        for i, block in enumerate(self.block):
            layers: list[LayerCache | None] = [None, None]
            if cache is not None:
                layers = [cache.layers[i], cache.sources[i]]
            x = block.layer[0](x, attn_mask=bias, lengths=own.lengths, cache=layers[0])
            if self.in_decoder:
                x = block.layer[1](
                    x,
                    memory=memory,
                    attn_mask=source.mask,
                    lengths=source.lengths,
                    cache=layers[1],
                )
            x = block.layer[-1](x)
        return self.dropout(self.final_layer_norm(x))

    def _bias(self, start: int, end: int, own: Visible) -> Tensor:
        """What the scores of all layers are added: the biases of positions, −∞ where padding is."""
        bias = self.block[0].layer[0].f.position_bias(start, end)
        if own.mask is None:
            return bias
        xp = namespace(own.mask)
        return bias + Tensor(xp.where(own.mask, 0.0, -np.inf).astype(bias.dtype))


class T5(EncoderDecoder):
    """logits (B, T, V): at each position of the target, scores for the token that follows

    `T5(config)(input_ids, decoder_input_ids)`, see `EncoderDecoder`. Weights begin as N(0, σ²) with
    Hugging Face's σ: 1 for the embedding, 1/√C for what reads x, 1/√(C D) for W_q.
    """

    config_class = T5Config
    architecture = "T5ForConditionalGeneration"
    # Cross-attention knows no positions; the first checkpoints have a bias there that is not used.
    obsolete = ("EncDecAttention.relative_attention_bias.weight",)
    config: T5Config

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        with init.skip_init():  # every weight is drawn once, by reset_parameters
            self.shared = Embedding(config.vocab_size, config.d_model)
            self.encoder = T5Stack(config, config.num_layers, self.shared, in_decoder=False)
            self.decoder = T5Stack(config, config.n_layer, self.shared, in_decoder=True)
            self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.shared.weight
        self.reset_parameters()

    def init_parameter(self, name: str, parameter: Parameter) -> None:
        """Write the first values of the parameter of that name."""
        config = self.config
        factor, part = config.initializer_factor, name.split(".")[-2]
        if parameter.ndim == 1:
            init.constant_(parameter, factor)
        elif part in ("shared", "lm_head"):
            init.normal_(parameter, std=factor)
        else:
            fan = {
                "q": config.d_model * config.d_kv,
                "o": config.num_heads * config.d_kv,
                "wo": config.d_ff,
            }
            init.normal_(parameter, std=factor * fan.get(part, config.d_model) ** -0.5)

    def decode(
        self,
        decoder_input_ids: Any,
        memory: Tensor,
        attention_mask: Any = None,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """(B, T, C) from which the output layer makes logits; see `EncoderDecoder.decode`."""
        x = super().decode(decoder_input_ids, memory, attention_mask, cache)
        return x * self.config.d_model**-0.5 if self.config.scales_outputs else x

    @classmethod
    def load(
        cls, folder: str | Path, dtype: Any = None, *, revision: str | None = None, **options: Any
    ) -> tuple[Self, Loaded]:
        """As `PretrainedModel.load`; the file says whether the output layer is tied.

        `transformers` 5 writes tie_word_embeddings = true for a T5 1.1, too, which has an output
        layer of its own.
        """
        folder = hub.find(folder, revision)
        if _has_own_head(Weights(folder)):
            options.setdefault("tie_word_embeddings", False)
        return super().load(folder, dtype, **options)


def _has_own_head(weights: Weights) -> bool:
    names = ("lm_head.weight", "shared.weight")
    if any(name not in weights.shapes for name in names):
        return False
    head, shared = (weights[name] for name in names)
    return not np.array_equal(head, shared)
