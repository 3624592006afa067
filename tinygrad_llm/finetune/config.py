"""The configuration of fine-tuning: sections as in `train.config`, read and written by it.

A 0 stands for a number that is chosen once model and data are known; config.toml of the run has the
number that was chosen.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from tinygrad_llm.train import config as configuration
from tinygrad_llm.train.config import ConfigError, DataConfig, PretrainConfig, TrainConfig

TaskName = Literal["classify", "pair", "tag", "translate", "lm", "qa", "multi"]
TASKS: tuple[TaskName, ...] = ("classify", "pair", "tag", "translate", "lm", "qa", "multi")

BUILTIN = "builtin"

YesNo = Literal["auto", "yes", "no"]

_PATTERNS = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="PATTERN",
    instance_from_str=" ".join,
    is_instance=lambda value: isinstance(value, str),
    str_from_instance=lambda patterns: patterns.split(),
)
_NO_HINT = tyro.conf.arg(help_behavior_hint="")


def _column(metavar: str = "COLUMN") -> Any:
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


# --- the sections ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class FinetuneData:
    """The labelled files."""

    source: Annotated[str, tyro.conf.arg(name="data", metavar="builtin|FILE")] = BUILTIN
    """What to learn from: builtin, or a file: CSV, TSV or JSONL; for tag CoNLL columns or JSONL;
    for qa also SQuAD's JSON; for lm any text that `pretrain` learns from, or a table; for multi a
    TOML file with a section for each task."""
    val_source: Annotated[
        str, tyro.conf.arg(name="val-data", metavar="FILE", help_behavior_hint="")
    ] = ""
    """What to validate with; otherwise a part of the data is held out."""
    val_fraction: float = 0.1
    """How much is held out where there is no --val-data."""
    text_column: Annotated[str, _column()] = ""
    """The column of the text (of words, for tag): its name, or its number from 1."""
    second_column: Annotated[str, _column()] = ""
    """The column of the second text, for pair; of the target, for translate."""
    label_column: Annotated[str, _column()] = ""
    """The column of the label (of the tags, for tag)."""
    question_column: Annotated[str, _column()] = ""
    """The column of the question, for qa."""
    context_column: Annotated[str, _column()] = ""
    """The column of the context that holds the answer, for qa."""
    answer_column: Annotated[str, _column()] = ""
    """The column of the answer, for qa; an empty field: the context has none."""
    start_column: Annotated[str, _column()] = ""
    """The column of the place of the answer, in characters from 0, for qa; none: it is found."""
    prefix: Annotated[str, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")] = ""
    """What stands before every source, for translate: what a T5 was taught to ask for, such as
    'translate English to French: '."""
    header: YesNo = "auto"
    """Whether the first line names the columns: --header, --no-header, or what it looks like."""
    quoted: YesNo = "auto"
    """Whether fields are in quotes: --quoted, --no-quoted, or what it looks like."""

    def __post_init__(self) -> None:
        configuration.require(
            0 < self.val_fraction < 1, "data.val_fraction", "in (0, 1)", self.val_fraction
        )

    @property
    def columns_of_questions(self) -> list[str]:
        """The flags given that name a column of questions."""
        names = ("question_column", "context_column", "answer_column", "start_column")
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name)]


@dataclass(frozen=True)
class FinetuneModel:
    """What is fine-tuned, or what begins at random where nothing is."""

    checkpoint: Annotated[
        str, tyro.conf.arg(name="model", metavar="FOLDER|RUN|NAME", help_behavior_hint="")
    ] = ""
    """A folder with a BERT (for lm a GPT, a Llama or an LSTM), a run, or a name on the Hugging Face
    hub; none: begin at random."""
    new_head: bool = False
    """Begin the head anew where the checkpoint has one for other labels."""
    encoder: Literal["bert", "bilstm"] = "bert"
    """What begins at random where there is no --model (for tag it is always a bilstm)."""
    vocab_size: int = 8192
    """Pieces of its tokenizer, which is made from the training texts."""
    cased: bool = False
    """Whether its tokenizer tells upper from lower case."""
    n_layer: int = 2
    """Its layers."""
    n_head: int = 4
    """Attention heads in a layer of a bert; divides n_embd."""
    n_embd: int = 128
    """Its width (of a bilstm in each direction)."""
    dropout: float = 0.1
    """Share of activations zeroed while training, of what begins at random."""
    max_length: int = 128
    """Pieces of a text that are read at once, marks included; 0, for lm: up to 128."""
    long: Literal["cut", "windows"] = "cut"
    """Longer texts: read their head, or all of them in windows that overlap."""
    pooling: Literal["auto", "cls", "mean", "compare"] = "auto"
    """What a classifier looks at: a bert's pooled first token, the mean of all, or for pairs what
    the two texts have in common. auto: as the checkpoint was trained (of sentence embeddings the
    mean), else cls; at random, compare for pairs."""
    num_beams: int = 1
    """Texts that are weighed against each other while one is written, for translate; 1: greedy."""
    freeze: Annotated[str, _PATTERNS, _NO_HINT] = ""
    """Parameters that stay as they are: whole parts of their names, such as embeddings
    'layer.[0-2]'."""

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "num_beams"):
            value = getattr(self, name)
            configuration.require(value >= 1, f"model.{name}", "at least 1", value)
        configuration.require(
            self.vocab_size >= 6, "model.vocab_size", "at least 6", self.vocab_size
        )
        longest = self.max_length
        fits = longest == 0 or longest >= 4
        configuration.require(fits, "model.max_length", "at least 4", longest)
        configuration.require(0 <= self.dropout < 1, "model.dropout", "in [0, 1)", self.dropout)
        if self.encoder == "bert" and self.n_embd % self.n_head:
            raise ConfigError(
                f"model.n_embd must be a multiple of model.n_head, got {self.n_embd} and "
                f"{self.n_head}"
            )


@dataclass(frozen=True)
class FinetuneTrain:
    """The loop and the optimiser (AdamW: warm-up, then decay to 0)."""

    epochs: int = 3
    """How often all of the data is learnt from."""
    batch_size: int = 0
    """Texts (rows, for tag) in a batch; 0: 32, for tag 16, or 4 rows of a checkpoint."""
    accumulate: int = 1
    """Batches in one update."""
    lr: float = 0.0
    """Learning rate at its peak, of a checkpoint's last layer; 0: chosen by the model's width."""
    head_lr: float = 0.0
    """That of what is new above a checkpoint; 0: for tag 5 × lr, else lr."""
    layer_decay: float = 0.9
    """Each layer of a checkpoint learns at so much of the rate of the one above it; 1: at one."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How the rate falls to 0."""
    warmup: float = 0.1
    """Share of the steps in which the rate climbs to its peak."""
    weight_decay: float = 0.01
    """Pull of the weight matrices towards zero."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's memory of the gradient and of its square."""
    grad_clip: float = 1.0
    """Longest gradient allowed (L2 norm over all parameters); 0: any."""
    label_smoothing: float = 0.0
    """Share of the target's probability that is spread over all tokens, for translate."""
    ema: float = 0.0
    """Keep a running average of the weights with so much memory, such as 0.995; it is what is
    scored, and what `predict` takes. 0: none."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: every label counts as much as any other, however rare (not for tag, qa)."""
    metric: Literal["accuracy", "macro-f1", "mcc", "loss"] = "accuracy"
    """What makes a checkpoint the best, and what --patience waits for; for tag and qa it is F1."""
    evals_per_epoch: int = 1
    """Validations in an epoch; each one is a checkpoint."""
    patience: int = 0
    """Stop after so many validations in a row that were no better; 0: never."""
    max_seconds: float = 0.0
    """Stop after so much training time; 0: no limit."""
    keep_last: int = 1
    """Checkpoints to keep: so many of the newest, and always the best; 0: all."""
    seed: int = 1
    """Of the weights, the batches, dropout and what is held out: the same seed, the same run."""
    processes: int = 0
    """Processes that share each step on the CPU; 0: one per core, where the model is small."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: the GPU where CuPy sees one."""
    dtype: Annotated[str, tyro.conf.arg(metavar="float32|bfloat16|float16")] = "float32"
    """What the network computes with; the weights stay in float32 beside it."""
    steps: tyro.conf.Suppress[int] = 0
    """Updates in all; the run writes it down, for it follows from epochs and data."""

    def __post_init__(self) -> None:
        for name in ("epochs", "accumulate", "evals_per_epoch"):
            value = getattr(self, name)
            configuration.require(value >= 1, f"train.{name}", "at least 1", value)
        for name in ("batch_size", "head_lr"):
            value = getattr(self, name)
            configuration.require(0 <= value < float("inf"), f"train.{name}", "0 or more", value)
        for name in ("layer_decay", "warmup"):
            value = getattr(self, name)
            configuration.require(0 <= value <= 1, f"train.{name}", "in [0, 1]", value)
        smoothing = self.label_smoothing
        configuration.require(0 <= smoothing < 1, "train.label_smoothing", "in [0, 1)", smoothing)
        self.loop(1, 1)  # refuses the rest

    def loop(self, steps_per_epoch: int, context: int) -> TrainConfig:
        """What the trainer is told, where an epoch has so many batches."""
        updates = -(-steps_per_epoch // self.accumulate)
        every = -(-updates // self.evals_per_epoch)
        steps = self.epochs * updates
        return TrainConfig(
            steps=steps,
            batch_size=max(1, self.batch_size),
            accumulate=self.accumulate,
            context=context,
            lr=self.lr,
            min_lr=0.0,
            warmup=round(self.warmup * steps),
            weight_decay=self.weight_decay,
            betas=self.betas,
            grad_clip=self.grad_clip,
            ema=self.ema,
            max_seconds=self.max_seconds,
            patience=self.patience,
            mfu=False,
            eval_every=every,
            checkpoint_every=every,
            keep_last=self.keep_last,
            seed=self.seed,
            processes=self.processes,
            device=self.device,
            dtype=self.dtype,
        )


@dataclass(frozen=True)
class FinetuneConfig:
    """Everything that decides a fine-tuning run."""

    task: tyro.conf.Suppress[TaskName] = "classify"
    data: FinetuneData = field(default_factory=FinetuneData)
    model: FinetuneModel = field(default_factory=FinetuneModel)
    train: FinetuneTrain = field(default_factory=FinetuneTrain)

    def __post_init__(self) -> None:
        for flag in self.data.columns_of_questions:
            if self.task not in ("qa", "multi"):
                raise ConfigError(f"{flag} is for questions: tinygrad-llm finetune qa")
        given = {
            "prefix": self.data.prefix,
            "num-beams": self.model.num_beams > 1,
            "label-smoothing": self.train.label_smoothing,
        }
        for name, value in given.items():
            if value and self.task != "translate":
                raise ConfigError(f"--{name} is for translations: tinygrad-llm finetune translate")
        if self.model.pooling == "compare" and self.task not in ("pair", "multi"):
            raise ConfigError("--pooling compare is for pairs of texts: tinygrad-llm finetune pair")
        longest = self.model.max_length
        configuration.require(
            longest > 0 or self.task == "lm", "model.max_length", "at least 4", longest
        )

    @property
    def data_seed(self) -> int:
        """Of the batches: another sequence than that of weights and dropout."""
        return self.train.seed + 2**63


# --- presets --------------------------------------------------------------------------------------

# Where a task wants other numbers than the dataclasses say: the BiLSTM-CRF of benchmarks/ner.py.
OF_TASK: dict[TaskName, dict[str, Any]] = {
    "classify": {},
    # From few pairs a BiLSTM learns to compare, where a BERT at random hardly does.
    "pair": {
        "model": {"encoder": "bilstm", "n_layer": 1, "vocab_size": 1024},
        "train": {"epochs": 5},
    },
    # Nothing in a language model is new, so all of it learns at one rate.
    "lm": {"model": {"vocab_size": 1024, "max_length": 0}, "train": {"layer_decay": 1.0}},
    # A small piece can be put together anew; whole words want far more data than most have.
    "translate": {
        "model": {"vocab_size": 1024, "max_length": 64, "dropout": 0.2, "num_beams": 4},
        "train": {"epochs": 10, "label_smoothing": 0.1, "layer_decay": 1.0},
    },
    "tag": {"model": {"encoder": "bilstm", "n_layer": 1, "n_embd": 200, "dropout": 0.5}},
    "multi": {},
    # The answer may be anywhere. Pieces that are small come often enough to be told apart.
    "qa": {
        "model": {"vocab_size": 1024, "max_length": 256, "long": "windows"},
        "train": {"epochs": 6},
    },
}

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # Seconds: for trying things out and for the tests.
    "tiny": {
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 300, "max_length": 24},
        "train": {"epochs": 2, "batch_size": 8},
    },
    # Named entities, as benchmarks/ner.py: above a checkpoint (--model), and from nothing.
    "ner": {"train": {"epochs": 5, "ema": 0.995}},
    "ner-bilstm": {"train": {"epochs": 8, "ema": 0.998, "warmup": 0.02, "grad_clip": 5.0}},
}

# Where a preset is too small for a task: a window must show more than the question.
TASK_IN_PRESET: dict[tuple[str, TaskName], dict[str, Any]] = {
    ("tiny", "lm"): {"model": {"max_length": 0}},
    ("tiny", "qa"): {"model": {"max_length": 64, "long": "cut"}},
}

ONLY_FOR: dict[str, TaskName] = {"ner": "tag", "ner-bilstm": "tag"}  # presets of one task


def preset(name: str, task: TaskName = "classify") -> FinetuneConfig:
    """The configuration called `name`; ConfigError with the nearest name when there is none."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}{configuration.nearest(name, PRESETS)}")
    if ONLY_FOR.get(name, task) != task:
        raise ConfigError(f"the preset {name} is for {ONLY_FOR[name]}, not for {task}")
    begun = configuration.merge(FinetuneConfig(task=task), OF_TASK[task], where=f"task {task}")
    begun = configuration.merge(begun, PRESETS[name], where=f"preset {name}")
    own = TASK_IN_PRESET.get((name, task), {})
    return configuration.merge(begun, own, where=f"preset {name} of {task}")


def dumps(config: FinetuneConfig) -> str:
    """`config` as TOML; `load` gives an equal one back."""
    lines = [
        "# Run it again: tinygrad-llm finetune TASK --config config.toml",
        f"task = {configuration.toml_value(config.task)}",
    ]
    for section in ("data", "model", "train"):
        lines += ["", f"[{section}]"]
        values = vars(getattr(config, section))
        lines += [f"{key} = {configuration.toml_value(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def of_any_run(path: Path) -> PretrainConfig:
    """The config.toml of a run; of a fine-tuning run what it has in common with the others.

    Raises as `config.load`.
    """
    config = own_of_run(path)
    return in_common(config) if isinstance(config, FinetuneConfig) else config


def own_of_run(path: Path) -> PretrainConfig | FinetuneConfig:
    """The config.toml of a run of either sort, as it is. Raises as `config.load`."""
    return load(path) if is_finetuning(path) else configuration.load(path)


def in_common(config: FinetuneConfig) -> PretrainConfig:
    """What a fine-tuning run has in common with the others: its loop, its files."""
    train = config.train.loop(1, config.model.max_length)
    data = DataConfig(
        source=config.data.source, val_source=config.data.val_source, documents="separate"
    )
    return PretrainConfig(
        data=data, train=dataclasses.replace(train, steps=max(1, config.train.steps))
    )


def is_finetuning(path: Path) -> bool:
    """Whether a config.toml is that of a run of fine-tuning."""
    lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    return any(line.startswith("task = ") for line in lines)


def load(path: Any, base: FinetuneConfig | None = None) -> FinetuneConfig:
    """`base` (or the defaults) with what the TOML file at `path` changes; see `config.load`."""
    return configuration.load(path, base or FinetuneConfig())  # pyright: ignore
