"""GPT: a transformer that predicts the next token from those before it.

    x = wte[ids] + wpe[0 … T−1]
    for each of n_layer blocks:
        x = x + attention(ln_1(x))        looks at the positions before, and at itself
        x = x + mlp(ln_2(x))              works on each position alone
    logits = ln_f(x) wteᵀ                 the output layer is the token embedding again

This is GPT-2's architecture (Radford et al., "Language models are unsupervised multitask learners",
2019), and the names of its parameters and options are Hugging Face's: folders go back and forth
between this and `transformers`.

Dimensions: B batch, T time, C = n_embd, H = n_head, D = C / H head size, V = vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import reduce
from pathlib import Path
from typing import Any, Self

import numpy as np

from tinygrad_llm import backend, ops
from tinygrad_llm.checkpointing import checkpoint
from tinygrad_llm.models import checks, pretrained
from tinygrad_llm.nn import (
    Dropout,
    Embedding,
    LayerNorm,
    Linear,
    Module,
    ModuleList,
    activation,
    head_cross_entropy,
    init,
)
from tinygrad_llm.nn.cache import KVCache, LayerCache
from tinygrad_llm.tensor import Tensor


@dataclass(frozen=True)
class GPTConfig:
    """The sizes and options of a GPT, under Hugging Face's names.

    The defaults are the smallest GPT-2, but dropout is 0 unless asked for. ValueError for what
    makes no network.
    """

    vocab_size: int = 50257  # V
    n_positions: int = 1024  # the longest T
    n_embd: int = 768  # C
    n_layer: int = 12
    n_head: int = 12  # H
    n_inner: int | None = None  # how wide the middle of the MLP is; None: 4 C
    activation_function: str = "gelu_new"  # GELU by tanh
    resid_pdrop: float = 0.0  # dropout of what a block adds,
    embd_pdrop: float = 0.0  # of the sum of the embeddings,
    attn_pdrop: float = 0.0  # of the attention weights
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    bos_token_id: int | None = None  # not used by the network; kept for the folder
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in _SIZES}
        if self.n_inner is None:
            del sizes["n_inner"]
        checks.check_sizes(**sizes)
        checks.check_total(self.num_parameters(), **sizes)
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd must be a multiple of n_head, got {self.n_embd} and {self.n_head}"
            )
        checks.check_activation("activation_function", self.activation_function)
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            checks.check_number(name, getattr(self, name), 0.0, 1.0)
        for name in ("layer_norm_epsilon", "initializer_range"):
            checks.check_number(name, getattr(self, name))
        for name in ("bos_token_id", "eos_token_id"):
            checks.check_token_id(name, getattr(self, name))

    def num_parameters(self) -> int:
        """(V + P + 2) C + L (4 C² + 9 C + (2 C + 1) I): how many numbers the GPT learns

        with P = n_positions, L = n_layer, I = n_inner or 4 C.
        """
        c, inner = self.n_embd, self.n_inner or 4 * self.n_embd
        block = 4 * c * c + 9 * c + (2 * c + 1) * inner
        return (self.vocab_size + self.n_positions + 2) * c + self.n_layer * block

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> GPTConfig:
        """The config that the object in a config.json describes.

        Keys that do not concern the network are ignored. ValueError for another model_type, and
        for an option of GPT-2's that would make another network than this one.
        """
        model_type = config.get("model_type", "gpt2")
        if model_type != "gpt2":
            raise ValueError(f"model_type must be 'gpt2' for a GPT, got {checks.short(model_type)}")
        checks.check_fixed(config, "GPT", _FIXED)
        names = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in config.items() if key in names})

    def to_dict(self) -> dict[str, Any]:
        """The object for config.json, which `transformers` reads as a GPT2LMHeadModel."""
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            **asdict(self),
            "tie_word_embeddings": True,
        }


# Options of Hugging Face's GPT-2 that are not options here.
_FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
}


_SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")


class Attention(Module):
    """y = [head₁ … head_H] W,  headₕ = softmax(Qₕ Kₕᵀ / √D + causal mask) Vₕ"""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.attn_pdrop = config.n_head, config.attn_pdrop
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)  # q, k and v in one product
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.resid_dropout = Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        b, t, c = x.shape
        qkv = self.c_attn(x).reshape(b, t, 3, self.n_head, c // self.n_head)
        q, k, v = (qkv[:, :, i].swapaxes(1, 2) for i in range(3))  # (B, H, T, D) each, views
        if cache is not None:
            k, v = cache.extend(k, v)  # (B, H, S, D), with those of the positions before
        dropout_p = self.attn_pdrop if self.training else 0.0
        y = ops.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
        y = y.swapaxes(1, 2).reshape(b, t, c)  # (B, H, T, D) -> (B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(Module):
    """y = W₂ φ(W₁ x + b₁) + b₂, with φ = GELU"""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Linear(config.n_embd, inner)
        self.act = activation(config.activation_function)
        self.c_proj = Linear(inner, config.n_embd)
        self.dropout = Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(Module):
    """x ← x + attention(ln_1(x));  x ← x + mlp(ln_2(x))"""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class Transformer(Module):
    """Token ids (B, T) -> what the network knows at each position (B, T, C)"""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.wpe = Embedding(config.n_positions, config.n_embd)
        self.drop = Dropout(config.embd_pdrop)
        self.h = ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.gradient_checkpointing = False

    def forward(self, input_ids: Any, cache: KVCache | None = None) -> Tensor:
        ids = ops.as_tensor(input_ids)
        if ids.ndim != 2:
            raise ValueError(f"GPT takes input_ids of shape (B, T), got {ids.shape}")
        start = 0 if cache is None else cache.length
        end = start + ids.shape[1]
        if end > self.wpe.num_embeddings:
            raise ValueError(
                f"the input has {end} tokens, but this GPT sees at most n_positions = "
                f"{self.wpe.num_embeddings}: give it the last of them"
            )
        x = self.drop(self.wte(ids) + self.wpe.weight[start:end])  # (B, T, C) + (T, C)
        for i, block in enumerate(self.h):
            if cache is not None:
                x = block(x, cache.layers[i])
            elif self.gradient_checkpointing:
                x = checkpoint(block, x)
            else:
                x = block(x)
        return self.ln_f(x)


class GPT(Module):
    """logits (B, T, V): at each position, scores for the token that follows

    `GPT(config)(input_ids)`; the probabilities of the next token are softmax(logits[b, t]) and
    depend on input_ids[b, 0 … t] only. Weights begin as N(0, 0.02²), biases as 0; the projections
    that write into x are divided by √(2 n_layer), since that many of them add up.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        with init.skip_init():  # every weight is drawn once, by reset_parameters
            self.transformer = Transformer(config)
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew, in the order of `named_parameters()`."""
        std = self.config.initializer_range
        for name, p in self.named_parameters():
            if name.endswith(".bias"):
                init.zeros_(p)
            elif p.ndim == 1:  # the gain of a LayerNorm
                init.ones_(p)
            elif name.endswith(".c_proj.weight"):
                init.normal_(p, std=std / math.sqrt(2 * self.config.n_layer))
            else:
                init.normal_(p, std=std)

    def forward(self, input_ids: Any, cache: KVCache | None = None) -> Tensor:
        """logits (B, T, V) for input_ids (B, T), integers from 0 to V − 1, T ≤ n_positions.

        With a cache input_ids are the tokens after those that are in it, and are added to it.
        """
        return self.lm_head(self.transformer(input_ids, cache))

    def next_logits(self, input_ids: Any, cache: KVCache | None = None) -> Tensor:
        """logits (B, V) for the token after input_ids: forward's last, the others not computed."""
        return self.lm_head(self.transformer(input_ids, cache)[:, -1])

    def loss(self, input_ids: Any, targets: Any, ignore_index: int = -100) -> Tensor:
        """−mean ln p(targets[b, t] | input_ids[b, 0 … t]), a scalar, in nats

        targets (B, T) are the tokens that follow: targets[b, t] = input_ids[b, t + 1] in plain
        text. Those equal to `ignore_index` do not count.
        """
        x = self.transformer(input_ids)  # (B, T, C)
        labels = ops.as_tensor(targets)
        if labels.shape != x.shape[:2]:
            raise ValueError(
                f"targets must have the shape of input_ids {x.shape[:2]}, got {labels.shape}"
            )
        return head_cross_entropy(self.lm_head, x, labels, ignore_index)

    # --- what a step costs ------------------------------------------------------------------------

    def gradient_checkpointing_enable(self) -> None:
        """From now on each block keeps only its input for the backward pass, and runs again there.

        The same loss and gradients to the last bit, dropout included; the memory of one block and
        of n_layer inputs instead of that of n_layer blocks, for about a third more time. See
        `tinygrad_llm.checkpoint`.
        """
        self.transformer.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """From now on keep what backward needs: faster, in more memory."""
        self.transformer.gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether the blocks are computed again in the backward pass."""
        return self.transformer.gradient_checkpointing

    def flops_per_token(self, context: int) -> int:
        """6 N + 12 L T C: floating-point operations of a training step, for each of its tokens

        N counts the weights that a token is multiplied with: every Linear, and wte once, as the
        output layer. Looking up an embedding multiplies nothing; biases and norms are left out.
        Each of the N does a multiplication and an addition in the forward pass, and twice that in
        the backward. The second term is attention, q kᵀ and the weighted sum of v: 2 · 2 T C a
        layer, three times, as if no position were masked. What is computed again does not count,
        so this is a figure of the model, not of how it is run (Chowdhery et al., "PaLM", 2022,
        appendix B).

        Args:
            context: T, tokens in a text of the batch.
        """
        matrices = sum(p.size for p in self.parameters() if p.ndim == 2)
        n = matrices - self.transformer.wpe.weight.size
        return 6 * n + 12 * self.config.n_layer * context * self.config.n_embd

    # --- folders ----------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, max_shard_size: int | str = "5GB") -> None:
        """Write config.json and model.safetensors, as `transformers` reads and writes GPT-2.

        Weights beyond `max_shard_size` (bytes, or such as "500MB") go into several files and an
        index of them. Raises OSError where they cannot be written; what was there is then whole.
        """
        arrays = {name: tensor.data for name, tensor in self.state_dict().items()}
        del arrays["lm_head.weight"]  # is transformer.wte.weight
        config = self.config.to_dict() | {"torch_dtype": str(arrays[_WTE].dtype)}
        arrays = {n: a.T if n.endswith(_TRANSPOSED) else a for n, a in arrays.items()}
        pretrained.save_folder(folder, config, arrays, max_shard_size)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: Any = None) -> Self:
        """The GPT in `folder`, which this or `transformers` saved, after `eval()`.

        Its weights are in `dtype`, or in the dtype that they have in the file (the widest one where
        they have several). Where SHA256SUMS lies beside them, as in our checkpoints, the files are
        compared with it first.

        Raises:
            FileNotFoundError: config.json or model.safetensors, or a shard of it, is missing.
            ValueError: a file is damaged, is of another kind of model, or they disagree. Nothing
                large is allocated before that is known.
        """
        pretrained.check_folder(folder)
        config = pretrained.read_config(folder, GPTConfig.from_dict)
        weights = pretrained.Weights(folder)
        try:
            names = _names(weights)
            _check_sizes(config, {ours: weights.shapes[theirs] for ours, theirs in names.items()})
            _check_head(weights, names)
            dtype = _common_dtype(weights, names) if dtype is None else backend.as_dtype(dtype)
            arrays = {n: _as_ours(n, weights[theirs], dtype) for n, theirs in names.items()}
            with init.placeholders():
                model = cls(config)
            model.load_state_dict(arrays, assign=True)
        except ValueError as error:
            raise weights.damaged(error) from error
        return model.eval()


_WTE, _WPE = "transformer.wte.weight", "transformer.wpe.weight"

# Hugging Face's GPT-2 keeps these as (in, out), a Linear as (out, in).
_TRANSPOSED = (
    ".attn.c_attn.weight",
    ".attn.c_proj.weight",
    ".mlp.c_fc.weight",
    ".mlp.c_proj.weight",
)


def _names(weights: pretrained.Weights) -> dict[str, str]:
    """Our names of the tensors in the file -> the names they have there.

    A file of the network without lm_head has no "transformer." in front; old files also hold the
    causal mask of each layer.
    """
    names = {}
    for name in weights.shapes:
        if not name.endswith((".attn.bias", ".attn.masked_bias")):
            ours = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
            if ours in names:
                raise ValueError(f"it holds {ours} twice, with transformer. in front and without")
            names[ours] = name
    return names


def _check_sizes(config: GPTConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless the tensors have the sizes that the config names."""
    if not len(shapes.get(_WTE, ())) == len(shapes.get(_WPE, ())) == 2:
        raise ValueError("it holds no GPT-2, whose embeddings are the matrices wte and wpe")
    layers = {name.split(".")[2] for name in shapes if name.startswith("transformer.h.")}
    inner = shapes.get("transformer.h.0.mlp.c_fc.bias", (0,))
    found = {
        "vocab_size": shapes[_WTE][0],
        "n_positions": shapes[_WPE][0],
        "n_embd": shapes[_WTE][1],
        "n_layer": len(layers),
        "n_inner": inner[0] if inner else 0,
    }
    wanted = asdict(config) | {"n_inner": config.n_inner or 4 * config.n_embd}
    differing = [name for name in found if found[name] != wanted[name]]
    if differing:
        raise ValueError(
            "by its tensors and by config.json "
            + ", ".join(f"{name} is {found[name]} and {wanted[name]}" for name in differing)
        )


def _check_head(weights: pretrained.Weights, names: dict[str, str]) -> None:
    """Take lm_head out of the names; ValueError where it is another matrix than wte."""
    head = names.pop("lm_head.weight", None)
    if head is not None and not np.array_equal(weights[head], weights[names[_WTE]]):
        raise ValueError("its lm_head is not tied to wte, and this GPT has no other")


def _common_dtype(weights: pretrained.Weights, names: Mapping[str, str]) -> np.dtype:
    """The dtype that holds every weight to the last bit."""
    dtypes = {weights.dtypes[theirs] for theirs in names.values()}
    for dtype in dtypes:
        if not backend.is_float(dtype):
            raise ValueError(f"weights need a float dtype, got {dtype}")
    return reduce(backend.promote, dtypes)


def _as_ours(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """An array of a file as this network keeps it: (out, in), in the one dtype."""
    array = array.T if name.endswith(_TRANSPOSED) else array
    return np.array(array, dtype=dtype, order="C", copy=None)
