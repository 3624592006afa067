"""The configuration of a run: frozen dataclasses, from a preset, a TOML file and flags.

config = preset < TOML file < flags: each layer names only what it changes. An unknown key is
refused with the nearest match, a value of the wrong type with the type that was expected.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used, in one sentence for people."""


def _read_factors(words: list[str]) -> dict[str, float]:
    """['wte=0.1', 'h.0=0.5'] -> {'wte': 0.1, 'h.0': 0.5}"""
    found: dict[str, float] = {}
    for word in words:
        pattern, _, factor = word.rpartition("=")
        if pattern in found:
            raise ValueError(f"{pattern!r} has two factors, expected one")
        try:
            found[pattern] = float(factor)
        except ValueError:
            raise ValueError(f"expected PATTERN=FACTOR, such as wte=0.1, got {word!r}") from None
    return found


_FACTORS = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="PATTERN=FACTOR",
    instance_from_str=_read_factors,
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda factors: [f"{key}={value:g}" for key, value in factors.items()],
)
_NO_HINT = tyro.conf.arg(help_behavior_hint="")


# --- the sections ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataConfig:
    """The text and how it is cut into tokens."""

    source: Annotated[str, tyro.conf.arg(name="data", metavar="NAME|PATH|URL")] = "python-docs"
    """What to learn from: a built-in corpus (python-docs, python-code), a text file, folder, quoted
    pattern or .jsonl[:FIELD], or from the network: shakespeare, https://…[#sha256=…]."""
    tokenizer: Annotated[str, tyro.conf.arg(metavar="KIND|PATH")] = "bpe"
    """char: a token per character; byte: per UTF-8 byte; bpe, wordpiece, unigram: pieces learnt
    from the text; or the path of a tokenizer.json, a model or a run."""
    vocab_size: int = 1024
    """How many tokens bpe, wordpiece and unigram may have (the others have what they need)."""
    val_fraction: float = 0.1
    """The share of the text that is never trained on, to validate with."""
    val_by: Literal["tail", "document"] = "tail"
    """Which share: the end of the text, or whole documents, chosen by their content."""
    val_source: Annotated[
        str, tyro.conf.arg(name="val-data", metavar="NAME|PATH|URL", help_behavior_hint="")
    ] = ""
    """Validate with this text instead, and train on all of the other."""
    documents: Literal["packed", "separate"] = "packed"
    """packed: a piece may reach from one document into the next; separate: it ends with its own."""
    order: Literal["random", "sequential", "shuffled"] = "random"
    """Pieces of the text at random, side by side, or side by side in another order each epoch."""

    def __post_init__(self) -> None:
        require(self.vocab_size >= 257, "data.vocab_size", "at least 257", self.vocab_size)
        require(0 < self.val_fraction < 1, "data.val_fraction", "in (0, 1)", self.val_fraction)
        if self.tokenizer not in TOKENIZERS and not _is_path(self.tokenizer):
            raise ConfigError(
                f"data.tokenizer must be one of {', '.join(TOKENIZERS)}, or a path, got "
                f"{self.tokenizer!r}{nearest(self.tokenizer, TOKENIZERS)}"
            )


TOKENIZERS = ("char", "byte", "bpe", "wordpiece", "unigram")


def _is_path(word: str) -> bool:
    named = "/" in word or "\\" in word or Path(word).suffix != ""
    return named or (word != "" and Path(word).exists())


Architecture = Literal["gpt", "llama", "bert", "lstm", "t5"]

ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)


@dataclass(frozen=True)
class ModelConfig:
    """The kind of network and its size."""

    architecture: Architecture = "gpt"
    """gpt, llama: they write; bert reads; lstm writes with a memory; t5 reads and then writes."""
    n_layer: int = 4
    """Layers, one after the other; t5 has so many to read and so many to write."""
    n_head: int = 4
    """Attention heads in a block; divides n_embd."""
    n_embd: int = 128
    """Width: numbers that describe one token."""
    dropout: float = 0.0
    """Share of activations zeroed while training."""
    tied: bool = True
    """The output layer is the table of embeddings again."""

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd"):
            require(getattr(self, name) >= 1, f"model.{name}", "at least 1", getattr(self, name))
        of_heads = self.architecture != "lstm"
        if of_heads and self.n_embd % self.n_head:
            raise ConfigError(
                f"model.n_embd must be a multiple of model.n_head, got {self.n_embd} "
                f"and {self.n_head}"
            )
        require(0 <= self.dropout < 1, "model.dropout", "in [0, 1)", self.dropout)


# The dtypes to train in, by what people write for them.
DTYPES = {
    **{"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"},
    **{"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"},
}


@dataclass(frozen=True)
class TrainConfig:
    """The loop and the optimiser (AdamW: warm-up, then cosine decay)."""

    steps: int = 1000
    """Updates of the weights."""
    batch_size: int = 16
    """Pieces of text in one batch."""
    accumulate: int = 1
    """Batches in one update, worked on one after the other: N times the batch, the memory of 1."""
    context: int = 64
    """Tokens in a piece: how far back the model can look."""
    lr: float = 1e-3
    """Learning rate at its peak."""
    min_lr: float = 1e-4
    """Learning rate at the end."""
    lr_groups: Annotated[dict[str, float], _FACTORS, _NO_HINT] = field(default_factory=dict)
    """Other rates for some parameters: PATTERN=FACTOR multiplies lr where the pattern is whole
    parts of the name, such as wte=0.1 'h.[0-3]=0.5' bias=2; in TOML {"wte" = 0.1}."""
    warmup: int = 100
    """Steps in which the learning rate climbs to its peak."""
    weight_decay: float = 0.1
    """Pull of the weight matrices towards zero."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's memory of the gradient and of its square."""
    grad_clip: float = 1.0
    """Longest gradient allowed (L2 norm over all parameters); 0: any."""
    ema: float = 0.0
    """Also keep an average of the weights that forgets slowly, such as 0.999; 0: none."""
    max_seconds: float = 0.0
    """Stop after so much training time, resumed runs added up; 0: no limit."""
    max_tokens: int = 0
    """Stop after so many tokens trained on; 0: no limit."""
    patience: int = 0
    """Stop after so many validations in a row without a better loss, and save each time that it is
    better; 0: never."""
    overfit_one_batch: bool = False
    """Train and validate on the first batch alone: a sound model's loss goes to nearly 0."""
    gradient_checkpointing: bool = False
    """Compute the blocks again in the backward pass instead of keeping them: the same weights, in
    less memory and more time."""
    mfu: bool = True
    """Measure the machine's peak (0.2 s at the start) and record what share of it training gets:
    model-FLOPs utilisation."""
    eval_every: int = 100
    """Steps from one validation to the next."""
    eval_batches: int = 0
    """Batches of a validation, from the start of the split; 0: all of it."""
    checkpoint_every: int = 100
    """Steps from one checkpoint to the next (each one is validated)."""
    keep_last: int = 0
    """Checkpoints to keep: so many of the newest, and always the best; 0: all."""
    seed: int = 1
    """Of the weights, the batches, dropout and the sample: the same seed, the same run."""
    processes: int = 0
    """Processes that share each step on the CPU; 0: one per core, where the model is small."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: the GPU where CuPy sees one."""
    dtype: Annotated[str, tyro.conf.arg(metavar="float32|bfloat16|float16")] = "float32"
    """What the network computes with. bfloat16 (bf16) and float16 (fp16) keep the weights in
    float32 beside it; float16 also scales the loss."""
    cuda_graph: bool = False
    """On a GPU, record a whole step once and replay it with one launch: the same numbers, and less
    work for the CPU; the products are those of our own kernels."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            names = dict.fromkeys(DTYPES.values())
            raise ConfigError(f"train.dtype must be one of {', '.join(names)}, got {self.dtype!r}")
        object.__setattr__(self, "dtype", DTYPES[self.dtype])  # one name, however it was written
        for name in _AT_LEAST_1:
            require(getattr(self, name) >= 1, f"train.{name}", "at least 1", getattr(self, name))
        for name in _0_OR_MORE:
            value = getattr(self, name)
            require(0 <= value < math.inf, f"train.{name}", "0 or more", value)
        require(0 <= self.ema < 1, "train.ema", "in [0, 1)", self.ema)
        require(self.min_lr <= self.lr, "train.min_lr", f"at most lr = {self.lr}", self.min_lr)
        require(all(0 <= b < 1 for b in self.betas), "train.betas", "in [0, 1)", self.betas)
        for pattern, factor in self.lr_groups.items():
            require(bool(pattern), "a pattern of train.lr_groups", "some text", repr(pattern))
            require(0 <= factor < math.inf, f"train.lr_groups {pattern}", "0 or more", factor)
        require(0 <= self.seed < 2**63, "train.seed", "from 0 to 2⁶³ − 1", self.seed)


_AT_LEAST_1 = ("steps", "batch_size", "accumulate", "context", "eval_every", "checkpoint_every")
_0_OR_MORE = (
    *("lr", "min_lr", "warmup", "weight_decay", "grad_clip", "eval_batches"),
    *("max_seconds", "max_tokens", "patience", "keep_last", "processes"),
)


@dataclass(frozen=True)
class SampleConfig:
    """The text that the model writes when training ends, and on the way."""

    prompt: str = ""
    """What it goes on from; empty: it begins a document."""
    max_new_tokens: int = 200
    """How many tokens it writes; 0: none."""
    temperature: float = 0.8
    """Below 1: safer words; above 1: bolder; 0: always the likeliest."""
    top_k: int = 0
    """Choose among the k likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that share this much probability."""
    every: Annotated[int, tyro.conf.arg(name="sample-every")] = 0
    """Also write a short text every so many steps, into the log and samples.jsonl; 0: never."""
    every_max_new_tokens: Annotated[int, tyro.conf.arg(name="sample-max-new-tokens")] = 60
    """How many tokens a text on the way has."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "temperature", "top_k", "every"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"sample.{name}", "0 or more", value)
        length = self.every_max_new_tokens
        require(length >= 1, "sample.every_max_new_tokens", "at least 1", length)
        require(0 < self.top_p <= 1, "sample.top_p", "in (0, 1]", self.top_p)


@dataclass(frozen=True)
class MaskingConfig:
    """What BERT has to guess: hidden words, and whether one text follows another."""

    mask_probability: float = 0.15
    """The share of the tokens that is asked for; of them 80% are hidden, 10% replaced, 10% left."""
    whole_words: bool = False
    """Ask for whole words instead of single pieces of them."""
    short_probability: float = 0.1
    """The share of the pairs of texts that is shorter than the context."""

    def __post_init__(self) -> None:
        share = self.mask_probability
        require(0 < share < 1, "masking.mask_probability", "in (0, 1)", share)
        share = self.short_probability
        require(0 <= share <= 1, "masking.short_probability", "in [0, 1]", share)


@dataclass(frozen=True)
class SpanConfig:
    """What T5 has to fill in: spans of the text that are hidden."""

    noise_density: float = 0.15
    """The share of the tokens that is hidden."""
    mean_span: float = 3.0
    """Tokens of a hidden span, on average."""

    def __post_init__(self) -> None:
        require(0 < self.noise_density < 1, "span.noise_density", "in (0, 1)", self.noise_density)
        require(1 <= self.mean_span < math.inf, "span.mean_span", "at least 1", self.mean_span)


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides a pretraining run.

    Some keys are for some architectures only: `applies` says which.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    span: SpanConfig = field(default_factory=SpanConfig)


# What an architecture has no use for: keys, and sections with a dot behind them.
_WRITES = ("masking.", "span.")
_WITHOUT: dict[str, tuple[str, ...]] = {
    "gpt": (*_WRITES, "model.tied"),
    "llama": (*_WRITES, "model.tied"),
    "lstm": (*_WRITES, "model.n_head", "train.gradient_checkpointing"),
    # Its pairs are drawn from whole documents, and its targets are not all of the tokens, of whose
    # cost model-FLOPs utilisation is made. It writes nothing.
    "bert": (
        *("span.", "sample.", "model.tied", "train.mfu"),
        *("data.val_by", "data.documents", "data.order"),
    ),
    "t5": ("masking.", "sample.", "model.tied", "train.mfu", "train.gradient_checkpointing"),
}


def applies(architecture: str, key: str) -> bool:
    """Whether it has a use for the key, such as 'model.n_head'; or for a section, 'masking.'"""
    return not key.startswith(_WITHOUT[architecture])


def require(ok: bool, key: str, expected: str, got: object) -> None:
    """ConfigError unless ok: what key must be, and what it is."""
    if not ok:  # also when a comparison with NaN was false
        raise ConfigError(f"{key} must be {expected}, got {got}")


# --- presets --------------------------------------------------------------------------------------

# What `make demo` runs: minutes on two CPU cores, and the sample reads like the corpus.
DEMO = {
    "data": {"source": "python-docs", "tokenizer": "bpe", "vocab_size": 1024},
    "model": {"n_layer": 4, "n_head": 4, "n_embd": 128, "dropout": 0.0},
    "train": {
        "steps": 2200,
        "batch_size": 16,
        "context": 64,
        "lr": 3e-3,
        "min_lr": 3e-4,
        "warmup": 50,
        "eval_every": 100,
        "eval_batches": 40,
        "checkpoint_every": 500,
    },
    "sample": {"max_new_tokens": 200, "temperature": 0.8, "top_p": 0.95},
}

# Seconds: for trying things out and for the tests.
TINY = {
    "data": {"tokenizer": "byte"},
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "dropout": 0.1},
    "train": {
        "steps": 20,
        "batch_size": 4,
        "context": 16,
        "warmup": 5,
        "eval_every": 10,
        "eval_batches": 4,
        "checkpoint_every": 10,
    },
    "sample": {"max_new_tokens": 40},
}

# nanoGPT (github.com/karpathy/nanoGPT). The optimiser is that of config/train_shakespeare_char.py,
# weight decay and clipping those of train.py; its README's CPU command changes the sizes, and its
# validation loss there is 1.88. Its network has no biases and its vocabulary no end of text.
SHAKESPEARE_CHAR = {
    "data": {"source": "shakespeare", "tokenizer": "char", "val_fraction": 0.1},  # prepare.py
    "model": {"n_layer": 4, "n_head": 4, "n_embd": 128, "dropout": 0.0},  # README
    "train": {
        "steps": 2000,  # README: max_iters and lr_decay_iters
        "batch_size": 12,  # README
        "context": 64,  # README: block_size
        "lr": 1e-3,
        "min_lr": 1e-4,
        "warmup": 100,
        "betas": (0.9, 0.99),
        "weight_decay": 0.1,
        "grad_clip": 1.0,
        "eval_every": 500,  # it has 250, each over 20 random batches; here it is the whole split
        "eval_batches": 0,
        "checkpoint_every": 500,
    },
    "sample": {"prompt": "\n", "max_new_tokens": 300, "temperature": 0.8},  # sample.py
}

# The same file as it stands, for a GPU: validation loss 1.4697 in the README.
SHAKESPEARE_CHAR_GPU = {
    **SHAKESPEARE_CHAR,
    "model": {"n_layer": 6, "n_head": 6, "n_embd": 384, "dropout": 0.2},
    "train": {
        **SHAKESPEARE_CHAR["train"],
        "steps": 5000,
        "batch_size": 64,
        "context": 256,
        "eval_every": 250,
        "checkpoint_every": 250,
    },
}

# GPT-2 small, 124M parameters (Radford et al. 2019, table 2), trained as in nanoGPT's
# config/train_gpt2.py and train.py: 12 · 1024 · 40 = 491,520 tokens a step.
GPT2 = {
    # None is a good default: it wants gigabytes. vocab_size is GPT-2's, val_fraction prepare.py's.
    "data": {"source": "", "tokenizer": "bpe", "vocab_size": 50257, "val_fraction": 0.0005},
    "model": {"n_layer": 12, "n_head": 12, "n_embd": 768, "dropout": 0.0},
    "train": {
        "steps": 600_000,
        "batch_size": 12,
        "accumulate": 40,  # 5 on each of its 8 GPUs
        "context": 1024,
        "lr": 6e-4,
        "min_lr": 6e-5,
        "warmup": 2000,
        "betas": (0.9, 0.95),
        "weight_decay": 0.1,
        "grad_clip": 1.0,
        "eval_every": 1000,
        "eval_batches": 200,
        "checkpoint_every": 1000,
        "keep_last": 3,  # ours: a checkpoint takes 1.5 GB
    },
    "sample": {"max_new_tokens": 200, "temperature": 0.8, "top_k": 200},  # sample.py
}

# GPT-2 medium, 355M: the sizes of table 2; the learning rate of GPT-3's medium (Brown et al. 2020,
# table 2.1), which is half of its small one's, and a tenth of it at the end.
GPT2_MEDIUM = {
    **GPT2,
    "model": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "dropout": 0.0},
    "train": {**GPT2["train"], "lr": 3e-4, "min_lr": 3e-5},
}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "demo": DEMO,
    "tiny": TINY,
    "shakespeare-char": SHAKESPEARE_CHAR,
    "shakespeare-char-gpu": SHAKESPEARE_CHAR_GPU,
    "gpt2": GPT2,
    "gpt2-medium": GPT2_MEDIUM,
}


# Minutes on two cores, on the documentation that comes with Python, as DEMO.
LLAMA_DEMO = {**DEMO, "model": {"architecture": "llama", **DEMO["model"]}}

BERT_DEMO = {
    "data": {"source": "python-docs", "tokenizer": "wordpiece", "vocab_size": 2048},
    "model": {"architecture": "bert", "n_layer": 4, "n_head": 4, "n_embd": 128, "dropout": 0.0},
    "train": {
        "steps": 2000,
        "batch_size": 32,
        "context": 64,
        "lr": 2e-3,
        "min_lr": 2e-4,
        "warmup": 100,
        "eval_every": 250,
        "eval_batches": 40,
        "checkpoint_every": 500,
    },
}

LSTM_DEMO = {
    "data": {"source": "python-docs", "tokenizer": "bpe", "vocab_size": 1024},
    "model": {"architecture": "lstm", "n_layer": 2, "n_embd": 256, "dropout": 0.0},
    "train": {**DEMO["train"], "steps": 1500, "batch_size": 32},
    "sample": DEMO["sample"],
}

T5_DEMO = {
    "data": {"source": "python-docs", "tokenizer": "bpe", "vocab_size": 1024},
    "model": {"architecture": "t5", "n_layer": 3, "n_head": 4, "n_embd": 128, "dropout": 0.0},
    "train": {**DEMO["train"], "steps": 2000, "batch_size": 32},
}

LLAMA_TINY = {**TINY, "model": {"architecture": "llama", "n_layer": 1, "n_head": 2, "n_embd": 16}}
BERT_TINY = {
    "data": {"tokenizer": "wordpiece", "vocab_size": 1024},
    "model": {"architecture": "bert", **TINY["model"]},
    "train": TINY["train"],
}
LSTM_TINY = {
    **TINY,
    "model": {"architecture": "lstm", "n_layer": 1, "n_embd": 16, "dropout": 0.1},
}
T5_TINY = {
    "data": TINY["data"],
    "model": {"architecture": "t5", **TINY["model"]},
    "train": TINY["train"],
}

# The presets of each architecture.
PRESETS_OF: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
    "gpt": PRESETS,
    "llama": {"demo": LLAMA_DEMO, "tiny": LLAMA_TINY},
    "bert": {"demo": BERT_DEMO, "tiny": BERT_TINY},
    "lstm": {"demo": LSTM_DEMO, "tiny": LSTM_TINY},
    "t5": {"demo": T5_DEMO, "tiny": T5_TINY},
}


def preset(name: str, architecture: str = "gpt") -> PretrainConfig:
    """The configuration called `name`; ConfigError with the nearest name when there is none."""
    presets = PRESETS_OF[architecture]
    if name not in presets:
        of = "" if architecture == "gpt" else f" of {architecture}"
        raise ConfigError(f"unknown preset {name!r}{of}{nearest(name, presets)}")
    return merge(PretrainConfig(), presets[name], where=f"preset {name}")


def nearest(word: str, choices: Iterable[str]) -> str:
    """ "; did you mean 'x'?" for the choice most like `word`, or the list of them."""
    choices = list(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; there is {', '.join(choices)}"


# --- merging, reading, writing --------------------------------------------------------------------


def load(path: str | Path, base: PretrainConfig | None = None) -> PretrainConfig:
    """`base` (or the defaults) with what the TOML file at `path` changes.

    Raises FileNotFoundError where there is no such file and ConfigError where it cannot be used.
    """
    try:
        changes = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no configuration file {path}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: byte {error.start} is invalid") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    return merge(base or PretrainConfig(), changes, where=str(path))


def merge(config: T, changes: Mapping[str, Any], where: str, section: str = "") -> T:
    """`config` with `changes`, a mapping of its keys (nested like the sections), checked."""
    types = get_type_hints(type(config))
    checked: dict[str, Any] = {}
    for key, value in changes.items():
        name = f"{section}{key}"
        if key not in types:
            raise ConfigError(f"{where}: unknown key {name!r}{_nearest_key(config, key, section)}")
        current = getattr(config, key)
        if not dataclasses.is_dataclass(current):
            checked[key] = _checked(value, types[key], f"{where}: {name}")
        elif isinstance(value, Mapping):
            checked[key] = merge(current, value, where, f"{name}.")
        else:
            raise ConfigError(f"{where}: {name} must be a section [{name}], got {value!r}")
    try:
        merged = dataclasses.replace(config, **checked)  # pyright: ignore[reportArgumentType]
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    architecture = getattr(getattr(merged, "model", None), "architecture", None)
    if architecture is not None and isinstance(config, PretrainConfig):
        _refuse_inapplicable(architecture, changes, where)
    return merged


def _refuse_inapplicable(architecture: str, changes: Mapping[str, Any], where: str) -> None:
    """ConfigError for a key that is there and changes nothing: somebody expects that it does."""
    for section, inner in changes.items():
        for key in inner:
            if not applies(architecture, f"{section}.{key}"):
                others = [name for name in ARCHITECTURES if applies(name, f"{section}.{key}")]
                raise ConfigError(
                    f"{where}: {section}.{key} is nothing that pretraining {architecture} has: it "
                    f"is for {', '.join(others)}"
                )


def _nearest_key(config: Any, key: str, section: str) -> str:
    """The nearest key, also one of another section: `lr` at the top is 'train.lr'."""
    keys = [f"{section}{f.name}" for f in dataclasses.fields(config)]
    close = difflib.get_close_matches(f"{section}{key}", keys, n=1, cutoff=0.6)
    elsewhere = [
        f"{f.name}.{inner.name}"
        for f in dataclasses.fields(PretrainConfig)
        for inner in dataclasses.fields(getattr(PretrainConfig(), f.name))
        if inner.name == key
    ]
    if elsewhere and not close:
        return f"; did you mean {elsewhere[0]!r}?"
    return nearest(f"{section}{key}", keys)


def _checked(value: Any, kind: Any, name: str) -> Any:
    """`value` as the type `kind`; ConfigError naming both where it is of another type."""
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        hint = nearest(str(value), get_args(kind))
        raise ConfigError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}{hint}")
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        if isinstance(value, list | tuple) and len(value) == len(inner):
            return tuple(_checked(v, t, name) for v, t in zip(value, inner, strict=True))
        raise ConfigError(f"{name} must be a list of {len(inner)} numbers, got {value!r}")
    if get_origin(kind) is dict:
        if isinstance(value, Mapping):
            inner = get_args(kind)[1]
            return {key: _checked(v, inner, f"{name}.{key}") for key, v in value.items()}
        raise ConfigError(f'{name} must be a table such as {{"wte" = 0.1}}, got {value!r}')
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:  # not isinstance: true is no integer here
        words = {str: "text", int: "an integer", float: "a number", bool: "true or false"}
        raise ConfigError(f"{name} must be {words[kind]}, got {value!r}")
    return value


def dumps(config: PretrainConfig) -> str:
    """`config` as TOML, one section after the other: `load` gives an equal one back."""
    kind = config.model.architecture
    lines = [f"# Run it again: tinygrad-llm pretrain {kind} --config config.toml"]
    for section, values in as_dict(config).items():
        lines += ["", f"[{section}]"]
        lines += [f"{key} = {toml_value(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def as_dict(config: PretrainConfig) -> dict[str, dict[str, Any]]:
    """{section: {key: value}} of what the architecture has a use for: `merge` takes it back."""
    kind = config.model.architecture
    found = {
        section.name: {
            key: value
            for key, value in vars(getattr(config, section.name)).items()
            if applies(kind, f"{section.name}.{key}")
        }
        for section in dataclasses.fields(config)
    }
    return {section: values for section, values in found.items() if values}


def toml_value(value: object) -> str:
    """The value as TOML has it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):  # JSON's escapes are TOML's, except that DEL needs one too
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, dict):
        return (
            f"{{{', '.join(f'{toml_value(key)} = {toml_value(v)}' for key, v in value.items())}}}"
        )
    return repr(value)


def differences(old: Any, new: Any, section: str = "") -> dict[str, tuple[Any, Any]]:
    """{'train.lr': (old value, new value), …} for what differs between two configurations."""
    found: dict[str, tuple[Any, Any]] = {}
    for f in dataclasses.fields(old):
        a, b = getattr(old, f.name), getattr(new, f.name)
        if dataclasses.is_dataclass(a):
            found |= differences(a, b, f"{section}{f.name}.")
        elif a != b:
            found[f"{section}{f.name}"] = (a, b)
    return found


def refuse_changes(old: Any, new: Any, folder: Path, changeable: tuple[str, ...]) -> None:
    """ConfigError where `new` is another run than the one in `folder`, begun with `old`.

    `changeable` are the beginnings of the keys that may have another value.
    """
    changed = [
        f"{key} = {before}, which cannot become {after}"
        for key, (before, after) in differences(old, new).items()
        if not key.startswith(changeable)
    ]
    if changed:
        more = f" ({len(changed) - 3} more differ)" if len(changed) > 3 else ""
        raise ConfigError(
            f"{folder} was started with {', with '.join(changed[:3])} on the way{more}: leave it "
            "out, or start a new run"
        )
