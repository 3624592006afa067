"""The encoder–decoder transformer: reads a whole text, then writes another, token by token.

    memory = encoder(source)                          every position sees every other one
    for each layer of the decoder:
        y = y + self-attention(y)                     sees what is written so far,
        y = y + cross-attention(y, memory)            then the source,
        y = y + mlp(y)                                and thinks about it
    logits = y Wᵀ

Vaswani et al., "Attention Is All You Need", 2017. By default it is theirs: sinusoidal positions, a
norm after each sum, ReLU, and one matrix E for the tokens of the source, those of the target and
the output layer (W = E). Options give what became usual after them. The names of the sizes are
those of Hugging Face's BART and Marian.

Dimensions: B batch, S source, T target, C = d_model, V = vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.models import checks
from tinygrad_llm.models.encoder_decoder import EncoderDecoder, check_special_ids
from tinygrad_llm.models.padding import ALL, Visible
from tinygrad_llm.nn import (
    DecoderCache,
    Dropout,
    Embedding,
    LayerNorm,
    Linear,
    Module,
    ModuleList,
    Parameter,
    TransformerBlock,
    init,
)
from tinygrad_llm.tensor import Tensor

Positions = Literal["sinusoidal", "learned"]


@dataclass(frozen=True)
class Seq2SeqConfig:
    """The sizes and options of an encoder–decoder transformer; the defaults are the paper's "base".

    Only dropout, 0.1 there, is 0 unless asked for. ValueError for what makes no network.
    """

    vocab_size: int = 37000  # V, of source and target together
    d_model: int = 512  # C
    encoder_layers: int = 6
    decoder_layers: int = 6
    encoder_attention_heads: int = 8
    decoder_attention_heads: int = 8
    encoder_ffn_dim: int = 2048  # how wide the middle of an MLP is
    decoder_ffn_dim: int = 2048
    max_position_embeddings: int = 1024  # the longest S and T
    position_embedding: Positions = "sinusoidal"
    norm_first: bool = False  # normalise what enters each part (pre-norm) instead of each sum
    activation_function: str = "relu"
    dropout: float = 0.0  # of what a part adds, of the embeddings, of attention, within an MLP
    layer_norm_eps: float = 1e-5
    scale_embedding: bool = True  # by √C
    share_encoder_decoder_embeddings: bool = True
    tie_word_embeddings: bool = True  # the output layer is the decoder's embedding
    pad_token_id: int = 0  # stands where there is no token; which one it is does not matter
    decoder_start_token_id: int = 0  # stands before the first token of a target
    eos_token_id: int | None = None  # the last token of a target

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in _SIZES}
        checks.check_sizes(**sizes)
        for name in _FLAGS:
            checks.check_choice(name, getattr(self, name), (True, False))
        checks.check_total(self.num_parameters(), **sizes)
        for side in ("encoder", "decoder"):
            heads = getattr(self, f"{side}_attention_heads")
            if self.d_model % heads:
                raise ValueError(
                    f"d_model must be a multiple of {side}_attention_heads, got {self.d_model} "
                    f"and {heads}"
                )
        positions = ("sinusoidal", "learned")
        checks.check_choice("position_embedding", self.position_embedding, positions)
        checks.check_activation("activation_function", self.activation_function)
        checks.check_number("dropout", self.dropout, 0.0, 1.0)
        checks.check_number("layer_norm_eps", self.layer_norm_eps)
        check_special_ids(self)

    @property
    def n_layer(self) -> int:
        """How many layers a DecoderCache has."""
        return self.decoder_layers

    @property
    def n_positions(self) -> int:
        """The longest text that it reads or writes."""
        return self.max_position_embeddings

    def num_parameters(self) -> int:
        """How many numbers the network learns."""
        c = self.d_model
        norm, square = 2 * c, 4 * (c * c + c)
        encoder = square + 2 * norm + (2 * c + 1) * self.encoder_ffn_dim + c
        decoder = 2 * square + 3 * norm + (2 * c + 1) * self.decoder_ffn_dim + c
        tables = 3 - self.share_encoder_decoder_embeddings - self.tie_word_embeddings
        learned = 2 * self.max_position_embeddings * (self.position_embedding == "learned")
        return (
            self.encoder_layers * encoder
            + self.decoder_layers * decoder
            + (tables * self.vocab_size + learned) * c
            + 2 * norm * self.norm_first
        )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Seq2SeqConfig:
        """The config that the object in a config.json describes; other keys are ignored.

        ValueError for another model_type.
        """
        model_type = config.get("model_type", MODEL_TYPE)
        if model_type != MODEL_TYPE:
            raise ValueError(
                f"model_type must be {MODEL_TYPE!r} for a Seq2Seq, got {checks.short(model_type)}"
            )
        names = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in config.items() if key in names})

    def to_dict(self) -> dict[str, Any]:
        """The object for config.json."""
        return {
            "model_type": MODEL_TYPE,
            **asdict(self),
            "is_encoder_decoder": True,
        }


MODEL_TYPE = "tinygrad-llm-seq2seq"

_SIZES = (
    *("vocab_size", "d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads"),
    *("decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim", "max_position_embeddings"),
)
_FLAGS = (
    *("norm_first", "scale_embedding", "share_encoder_decoder_embeddings"),
    "tie_word_embeddings",
)


class Stack(Module):
    """Token ids (B, T) -> what one side knows at each position (B, T, C)

    With `cross_attention` the decoder: positions see those before them, and the memory.
    """

    position_table: Tensor | None

    def __init__(
        self, config: Seq2SeqConfig, layers: int, heads: int, width: int, cross_attention: bool
    ) -> None:
        super().__init__()
        c, self.cross_attention = config.d_model, cross_attention
        self.scale = math.sqrt(c) if config.scale_embedding else 1.0
        self.max_positions = config.max_position_embeddings
        self.embed_tokens = Embedding(config.vocab_size, c)
        self.embed_positions: Embedding | None = None
        table = None
        if config.position_embedding == "learned":
            self.embed_positions = Embedding(self.max_positions, c)
        else:
            table = Tensor(sinusoids(self.max_positions, c).astype(backend.default_dtype()))
        self.register_buffer("position_table", table, persistent=False)
        self.dropout = Dropout(config.dropout)
        self.layers = ModuleList(
            TransformerBlock(
                c,
                heads,
                width,
                config.dropout,
                config.activation_function,
                config.layer_norm_eps,
                config.norm_first,
                cross_attention=cross_attention,
            )
            for _ in range(layers)
        )
        # With post-norm the last layer has normalised already.
        self.norm = LayerNorm(c, config.layer_norm_eps) if config.norm_first else None

    def forward(
        self,
        ids: Tensor,
        own: Visible,
        memory: Tensor | None = None,
        source: Visible = ALL,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        start = 0 if cache is None else cache.length
        end = start + ids.shape[1]
        if end > self.max_positions:
            raise ValueError(
                f"the {'target' if self.cross_attention else 'source'} has {end} tokens, but this "
                f"Seq2Seq takes at most max_position_embeddings = {self.max_positions}"
            )
        x = self.dropout(self.embed_tokens(ids) * self.scale + self._positions(start, end))
        for i, layer in enumerate(self.layers):
            x = layer(
                x,
                memory,
                attn_mask=own.mask,
                is_causal=self.cross_attention,
                lengths=own.lengths,
                memory_mask=source.mask,
                memory_lengths=source.lengths,
                cache=None if cache is None else cache.layers[i],
                memory_cache=None if cache is None else cache.sources[i],
            )
        return x if self.norm is None else self.norm(x)

    def _positions(self, start: int, end: int) -> Tensor:
        """(T, C)"""
        if self.embed_positions is not None:
            return self.embed_positions.weight[start:end]
        assert self.position_table is not None
        return self.position_table[start:end]


def sinusoids(positions: int, size: int) -> np.ndarray:
    """PE(t, 2i) = sin(t / 10000^(2i/C)),  PE(t, 2i + 1) = cos of the same; (positions, C) float64

    So PE(t + k) is a fixed rotation of PE(t): a linear map can look k positions further.
    """
    table = np.empty((positions, size))
    even = np.arange(0, size, 2)
    angles = np.arange(positions)[:, None] / 10000 ** (even / size)
    table[:, 0::2] = np.sin(angles)
    table[:, 1::2] = np.cos(angles[:, : size // 2])
    return table


class Seq2Seq(EncoderDecoder):
    """logits (B, T, V): at each position of the target, scores for the token that follows

    `Seq2Seq(config)(input_ids, decoder_input_ids)`; the probabilities of target token t are
    softmax(logits[b, t]) and depend on the source and on decoder_input_ids[b, 0 … t] only, which
    are the start token and the t tokens before. Matrices begin Xavier-uniform, embeddings as
    N(0, 1/C) where they are scaled by √C, else as N(0, 0.02²), biases as 0.
    """

    config_class = Seq2SeqConfig
    architecture = "Seq2Seq"
    config: Seq2SeqConfig

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__(config)
        with init.skip_init():  # every weight is drawn once, by reset_parameters
            self.encoder = Stack(
                config,
                config.encoder_layers,
                config.encoder_attention_heads,
                config.encoder_ffn_dim,
                cross_attention=False,
            )
            self.decoder = Stack(
                config,
                config.decoder_layers,
                config.decoder_attention_heads,
                config.decoder_ffn_dim,
                cross_attention=True,
            )
            self.lm_head = Linear(config.d_model, config.vocab_size, bias=False)
        if config.share_encoder_decoder_embeddings:
            self.decoder.embed_tokens.weight = self.encoder.embed_tokens.weight
        if config.tie_word_embeddings:
            self.lm_head.weight = self.decoder.embed_tokens.weight
        self.reset_parameters()

    def init_parameter(self, name: str, parameter: Parameter) -> None:
        """Write the first values of the parameter of that name."""
        if name.endswith(".bias"):
            init.zeros_(parameter)
        elif parameter.ndim == 1:  # the gain of a LayerNorm
            init.ones_(parameter)
        elif ".embed_tokens." in name or name == "lm_head.weight":
            scaled = self.config.scale_embedding
            init.normal_(parameter, std=self.config.d_model**-0.5 if scaled else 0.02)
        elif ".embed_positions." in name:
            init.normal_(parameter, std=0.02)
        else:
            init.xavier_uniform_(parameter)
