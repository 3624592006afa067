"""Llama: a GPT as they are built since 2023.

    x = embed_tokens[ids]                         positions are not added here,
    for each layer:
        x = x + attention(x / rms(x) ⊙ g)         but queries and keys are turned by theirs
        x = x + W_d (silu(W_g n) ⊙ W_u n)         n = x / rms(x) ⊙ g
    logits = lm_head(x / rms(x) ⊙ g)

Four things differ from gpt.py: norms without mean and bias (RMSNorm), rotary positions, a gated MLP
(SwiGLU), and H query heads that share fewer heads of keys and values, which is what a cache keeps.

Touvron et al., "LLaMA: open and efficient foundation language models", 2023; Grattafiori et al.,
"The Llama 3 herd of models", 2024. The names of parameters and options are Hugging Face's: folders
go back and forth between this and `transformers`.

Dimensions: B batch, T time, C = hidden_size, H = num_attention_heads, D = head_dim, V = vocab_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tinygrad_llm import backend, ops
from tinygrad_llm.checkpointing import checkpoint
from tinygrad_llm.models import checks
from tinygrad_llm.models.padding import Visible, visible
from tinygrad_llm.models.pretrained import PretrainedModel
from tinygrad_llm.nn import (
    Embedding,
    KVCache,
    LayerCache,
    Linear,
    Module,
    ModuleList,
    Parameter,
    RMSNorm,
    activation,
    init,
)
from tinygrad_llm.nn.losses import head_cross_entropy
from tinygrad_llm.tensor import Tensor


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes and options of a Llama, under Hugging Face's names; the defaults are the first 7B.

    ValueError for what makes no network.
    """

    vocab_size: int = 32000  # V
    hidden_size: int = 4096  # C
    intermediate_size: int = 11008  # how wide the middle of the MLP is
    num_hidden_layers: int = 32
    num_attention_heads: int = 32  # H
    num_key_value_heads: int | None = None  # None: H
    head_dim: int | None = None  # D; None: C / H
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048  # the longest T
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None  # see `ops.rotary_tables`
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0  # of the attention weights
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False  # whether the output layer is the embedding
    bos_token_id: int | None = 1  # not used by the network; kept for the folder
    eos_token_id: int | tuple[int, ...] | None = 2  # one, or several of which each ends a text
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        checks.check_sizes(**{name: getattr(self, name) for name in _SIZES}, **self._optional())
        for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
            checks.check_choice(name, getattr(self, name), (True, False))
        checks.check_total(self.num_parameters(), **{n: getattr(self, n) for n in _SIZES})
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                "hidden_size must be a multiple of num_attention_heads, got "
                f"{self.hidden_size} and {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                "num_key_value_heads must divide num_attention_heads, got "
                f"{self.kv_heads} and {self.num_attention_heads}"
            )
        if self.head_size % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {self.head_size}")
        checks.check_activation("hidden_act", self.hidden_act)
        checks.check_number("rope_theta", self.rope_theta, 1.0)
        checks.check_number("attention_dropout", self.attention_dropout, 0.0, 1.0)
        for name in ("rms_norm_eps", "initializer_range"):
            checks.check_number(name, getattr(self, name))
        ends = self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
        for value in ends:
            checks.check_token_id("eos_token_id", value)
        for name in ("bos_token_id", "pad_token_id"):
            checks.check_token_id(name, getattr(self, name))
        self._check_scaling()

    def _optional(self) -> dict[str, int]:
        names = ("num_key_value_heads", "head_dim")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _check_scaling(self) -> None:
        if self.rope_scaling is None:
            return
        if not isinstance(self.rope_scaling, Mapping):
            raise ValueError(
                f"rope_scaling must be an object or none, got {checks.short(self.rope_scaling)}"
            )
        checks.check_choice("rope_type", _rope_type(self.rope_scaling), ROPE_TYPES)
        ops.rotary_tables(0, self.head_size, self.rope_theta, self.rope_scaling)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """D"""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def n_layer(self) -> int:
        """How many layers a KVCache has."""
        return self.num_hidden_layers

    @property
    def n_positions(self) -> int:
        """The longest T."""
        return self.max_position_embeddings

    def num_parameters(self) -> int:
        """How many numbers the Llama learns."""
        c, inner = self.hidden_size, self.intermediate_size
        q, kv = (heads * self.head_size for heads in (self.num_attention_heads, self.kv_heads))
        attention = 2 * c * (q + kv) + self.attention_bias * (q + 2 * kv + c)
        mlp = 3 * c * inner + self.mlp_bias * (2 * inner + c)
        tables = (2 - self.tie_word_embeddings) * self.vocab_size * c
        return tables + self.num_hidden_layers * (attention + mlp + 2 * c) + c

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """The config that the object in a config.json describes; other keys are ignored.

        ValueError for another model_type, and for a kind of rotary positions that is not here.
        """
        checks.check_choice("model_type", config.get("model_type", "llama"), ("llama",))
        names = {field.name for field in fields(cls)}
        found = {key: value for key, value in config.items() if key in names}
        if isinstance(found.get("eos_token_id"), list):
            found["eos_token_id"] = tuple(found["eos_token_id"])
        if isinstance(rope := config.get("rope_parameters"), Mapping):  # transformers 5
            rope = dict(rope)
            found["rope_theta"] = rope.pop("rope_theta", 10000.0)
            found["rope_scaling"] = rope
        if found.get("rope_scaling") and _rope_type(found["rope_scaling"]) == "default":
            found["rope_scaling"] = None
        return cls(**found)

    def to_dict(self) -> dict[str, Any]:
        """The object for config.json, which `transformers` 4 and 5 read."""
        scaling = dict(self.rope_scaling or {"rope_type": "default"})
        return {
            "model_type": "llama",
            **asdict(self),
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "rope_scaling": None if self.rope_scaling is None else scaling,
            "rope_parameters": {**scaling, "rope_theta": self.rope_theta},
        }


_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "max_position_embeddings"),
)

# Those whose angles are the same however long a text is.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def _rope_type(scaling: Mapping[str, Any]) -> Any:
    return scaling.get("rope_type", scaling.get("type", "default"))


class Rotations:
    """cos and sin of the angles of as many positions as were asked for, shared by all layers."""

    def __init__(self, config: LlamaConfig) -> None:
        self.config = config
        self.tables: dict[tuple[str, Any], tuple[Tensor, Tensor]] = {}  # by device and dtype

    def until(self, end: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), (P, D/2) with P ≥ end, where `like` is; in float64 if it is, else float32."""
        wide = backend.float64 if like.dtype == backend.float64 else backend.float32
        found = self.tables.get((like.device, wide))
        if found is None or found[0].shape[0] < end:
            positions = min(max(2 * end, 256), max(end, self.config.max_position_embeddings))
            scaling, theta = self.config.rope_scaling, self.config.rope_theta
            made = ops.rotary_tables(positions, self.config.head_size, theta, scaling, wide)
            found = made[0].to(like.device), made[1].to(like.device)
            self.tables[like.device, wide] = found
        return found


class LlamaAttention(Module):
    """y = [head₁ … head_H] W_o,  headₕ = softmax(R Qₕ (R Kₕ)ᵀ / √D + causal mask) Vₕ"""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_size, self.attention_dropout = config.head_size, config.attention_dropout
        c, bias = config.hidden_size, config.attention_bias
        q, kv = config.num_attention_heads * self.head_size, config.kv_heads * self.head_size
        self.q_proj = Linear(c, q, bias)
        self.k_proj = Linear(c, kv, bias)
        self.v_proj = Linear(c, kv, bias)
        self.o_proj = Linear(q, c, bias)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, own: Visible, cache: LayerCache | None = None
    ) -> Tensor:
        start = 0 if cache is None else cache.length
        q, k, v = (self._heads(f(x)) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (ops.rotary_embedding(z, cos, sin, offset=start) for z in (q, k))
        if cache is not None:
            k, v = cache.extend(k, v)
        y = ops.scaled_dot_product_attention(
            q,  # (B, H, T, D)
            k,  # (B, kv_heads, S, D)
            v,
            attn_mask=own.mask,
            dropout_p=self.attention_dropout if self.training else 0.0,
            is_causal=True,
            lengths=own.lengths,
        )
        return self.o_proj(y.swapaxes(1, 2).flatten(2))  # (B, H, T, D) -> (B, T, H·D)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, H·D) -> (B, H, T, D), a view"""
        b, t, _ = x.shape
        return x.reshape(b, t, -1, self.head_size).swapaxes(1, 2)


class LlamaMLP(Module):
    """y = W_d (φ(W_g x) ⊙ W_u x), with φ = silu: SwiGLU"""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        c, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(c, inner, bias)
        self.up_proj = Linear(c, inner, bias)
        self.down_proj = Linear(inner, c, bias)
        self.act = None if config.hidden_act in ("silu", "swish") else activation(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(ops.swiglu(gate, up) if self.act is None else self.act(gate) * up)


class LlamaLayer(Module):
    """x ← x + attention(norm(x));  x ← x + mlp(norm(x))"""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, own: Visible, cache: LayerCache | None = None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, own, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(Module):
    """Token ids (B, T) -> what the network knows at each position (B, T, C)"""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.max_positions = config.max_position_embeddings
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = ModuleList(LlamaLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotations = Rotations(config)
        self.gradient_checkpointing = False

    def forward(
        self, input_ids: Any, cache: KVCache | None = None, attention_mask: Any = None
    ) -> Tensor:
        ids = ops.as_tensor(input_ids)
        if ids.ndim != 2:
            raise ValueError(f"Llama takes input_ids of shape (B, T), got {ids.shape}")
        start = 0 if cache is None else cache.length
        end = start + ids.shape[1]
        if end > self.max_positions:
            raise ValueError(
                f"the input has {end} tokens, but this Llama sees at most max_position_embeddings "
                f"= {self.max_positions}: give it the last of them"
            )
        own = visible(attention_mask, ids, start)
        x = self.embed_tokens(ids)
        cos, sin = self.rotations.until(end, x)
        for i, layer in enumerate(self.layers):
            if cache is not None:
                x = layer(x, cos, sin, own, cache.layers[i])
            elif self.gradient_checkpointing:
                x = checkpoint(layer, x, cos, sin, own)
            else:
                x = layer(x, cos, sin, own)
        return self.norm(x)


class Llama(PretrainedModel):
    """logits (B, T, V): at each position, scores for the token that follows

    `Llama(config)(input_ids)`; the probabilities of the next token are softmax(logits[b, t]) and
    depend on input_ids[b, 0 … t] only. Weights begin as N(0, 0.02²), biases as 0.
    """

    config_class = LlamaConfig
    architecture = "LlamaForCausalLM"
    base = "model"
    obsolete = (".rotary_emb.inv_freq",)  # in old files; it follows from rope_theta
    config: LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        with init.skip_init():  # every weight is drawn once, by reset_parameters
            self.model = LlamaModel(config)
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.reset_parameters()

    def init_parameter(self, name: str, parameter: Parameter) -> None:
        """Write the first values of the parameter of that name."""
        if name.endswith(".bias"):
            init.zeros_(parameter)
        elif parameter.ndim == 1:  # the gain of a norm
            init.ones_(parameter)
        else:
            init.normal_(parameter, std=self.config.initializer_range)

    def forward(
        self, input_ids: Any, cache: KVCache | None = None, attention_mask: Any = None
    ) -> Tensor:
        """logits (B, T, V) for input_ids (B, T), integers from 0 to V − 1

        With a cache input_ids are the tokens after those that are in it, and are added to it.
        attention_mask (B, S), with S all tokens so far, is 1 for a real one, 0 for padding, which
        may be on either side; to go on from texts of several lengths, it is on the left.
        """
        return self.lm_head(self.model(input_ids, cache, attention_mask))

    def next_logits(
        self, input_ids: Any, cache: KVCache | None = None, attention_mask: Any = None
    ) -> Tensor:
        """logits (B, V) for the token after input_ids: forward's last, the others not computed."""
        return self.lm_head(self.model(input_ids, cache, attention_mask)[:, -1])

    def loss(
        self,
        input_ids: Any,
        targets: Any,
        ignore_index: int = -100,
        attention_mask: Any = None,
    ) -> Tensor:
        """−mean ln p(targets[b, t] | input_ids[b, 0 … t]), a scalar, in nats

        targets (B, T) are the tokens that follow: targets[b, t] = input_ids[b, t + 1] in plain
        text. Those equal to `ignore_index` do not count.
        """
        x = self.model(input_ids, None, attention_mask)
        labels = ops.as_tensor(targets)
        if labels.shape != x.shape[:2]:
            raise ValueError(
                f"targets must have the shape of input_ids {x.shape[:2]}, got {labels.shape}"
            )
        return head_cross_entropy(self.lm_head, x, labels, ignore_index)

    # --- what a step costs ------------------------------------------------------------------------

    def gradient_checkpointing_enable(self) -> None:
        """From now on each layer keeps only its input for the backward pass, and runs again there.

        The same loss and gradients to the last bit; see `tinygrad_llm.checkpoint`.
        """
        self.model.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """From now on keep what backward needs: faster, in more memory."""
        self.model.gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether the layers are computed again in the backward pass."""
        return self.model.gradient_checkpointing

    def flops_per_token(self, context: int) -> int:
        """6 N + 12 L T H D: floating-point operations of a training step, for each of its tokens

        As GPT's: N counts the weights that a token is multiplied with, and the second term is
        attention over a context of T tokens as if none were masked.
        """
        config = self.config
        matrices = sum(p.size for p in self.parameters() if p.ndim == 2)
        n = matrices - (not config.tie_word_embeddings) * self.model.embed_tokens.weight.size
        heads = config.num_attention_heads * config.head_size
        return 6 * n + 12 * config.num_hidden_layers * context * heads
