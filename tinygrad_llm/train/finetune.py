"""Fine-tuning on labelled files: from columns of text to a model that labels, and its scores."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinygrad_llm import backend
from tinygrad_llm.data.labels import LabelSet
from tinygrad_llm.data.tables import counted
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.metrics.classification import majority, usual_tags
from tinygrad_llm.metrics.plot import draw_report
from tinygrad_llm.metrics.report import (
    GeneratedReport,
    LabelReport,
    TagReport,
    label_report,
    tag_report,
    write_metrics,
)
from tinygrad_llm.models.bert import BertConfig
from tinygrad_llm.models.seq2seq import Seq2Seq
from tinygrad_llm.models.tagger import Tagger
from tinygrad_llm.optim import (
    AdamW,
    LRScheduler,
    Optimizer,
    Warmup,
    decay_groups,
    lr_groups,
)
from tinygrad_llm.optim.groups import matches
from tinygrad_llm.optim.schedules import Cosine, Linear
from tinygrad_llm.tasks.classify import (
    TASK_FILE,
    ClassifyTask,
)
from tinygrad_llm.tasks.tag import TagTask
from tinygrad_llm.train import checkpoint
from tinygrad_llm.train import config as configuration
from tinygrad_llm.train.config import ConfigError, TrainConfig
from tinygrad_llm.train.finetune_config import (
    BUILTIN,
    FinetuneConfig,
    dumps,
    load,
)
from tinygrad_llm.train.finetune_data import read
from tinygrad_llm.train.finetune_models import Network, begin, open_folder
from tinygrad_llm.train.finetune_translate import Translating
from tinygrad_llm.train.log import Log
from tinygrad_llm.train.machine import choose_device
from tinygrad_llm.train.parallel import processes_for
from tinygrad_llm.train.precision import slow_on_cpu
from tinygrad_llm.train.run import Run
from tinygrad_llm.train.trainer import Trainer


@dataclass(frozen=True)
class Finetuning:
    """A run that is ready to go: `trainer.fit()` trains, `report()` scores its best checkpoint."""

    trainer: Trainer
    model: Network
    task: ClassifyTask | TagTask | Translating
    run: Run
    config: FinetuneConfig

    def report(self) -> tuple[LabelReport | TagReport | GeneratedReport, str | None]:
        """The scores of the best checkpoint on the validation data, beside those of baselines.

        They are written to metrics.json and, but for translations, drawn into metrics.png in the
        run folder; second is a sentence where no picture could be drawn.
        """
        best = self.run.checkpoint("best") or self.run.checkpoint("latest")
        assert best is not None  # the run is over: its last step is saved
        device = next(iter(self.model.parameters())).device
        model: Any = type(self.model).from_pretrained(best).to(device)
        about = {"task": self.config.task, "checkpoint": best.name}
        if isinstance(self.task, Translating):
            written = self.task.report(model)
            write_metrics(self.run.folder / "metrics.json", written, **about)
            return written, None
        found = _tag_report(self.task, model) if isinstance(self.task, TagTask) else None
        report = found or _label_report(self.task, model)
        write_metrics(self.run.folder / "metrics.json", report, **about)
        return report, draw_report(report, self.run.folder / "metrics.png")


def _label_report(task: Any, model: Any) -> LabelReport:
    return label_report(
        task.held_out.labels,
        task.predicted(model),
        name=task.held_out.name.strip("'"),
        usual=majority(task.train.labels),
        notes=task.notes,
    )


def _tag_report(task: TagTask, model: Tagger) -> TagReport:
    usual = majority([tag for tags in task.train_tags for tag in tags])
    known = usual_tags(task.train.words, task.train_tags, task.held_out.words, otherwise=usual)
    return tag_report(
        task.val_tags,
        task.scored(model)[1],
        name=task.held_out.name.strip("'"),
        usual=usual,
        baselines={"the word's usual tag": known},
        notes=task.notes,
    )


# --- runs -----------------------------------------------------------------------------------------


def start(config: FinetuneConfig, folder: str | Path | None, log: Log) -> Finetuning:
    """A new run in `folder` (or under runs/).

    The folder is made last, when all else is known to work. Raises ValueError or OSError, each with
    one sentence, for data, a checkpoint, a configuration, a folder or a device that cannot be used.
    """
    run = Run.new(folder)
    device, why = choose_device(config.train.device)
    config = _lasting(config)
    train, validation = read(config, log)
    log.say(f"device: {device} ({why})")
    backend.manual_seed(config.train.seed)
    tokenizer, model = begin(config, train, log)
    return _ready(config, train, validation, tokenizer, model.to(device), run, log, None)


def resume(run: Run, config: FinetuneConfig, log: Log) -> Finetuning:
    """The run as its latest checkpoint left it; from the start where it has none yet.

    Raises as `start`, and also for a damaged checkpoint, data that has changed, a run that is over,
    and one that another process works on.
    """
    run.hold()
    try:
        return _resume(run, config, log)
    except BaseException:
        run.close()
        raise


def _resume(run: Run, config: FinetuneConfig, log: Log) -> Finetuning:
    folder = run.checkpoint("latest")
    if folder is None:
        begun = load(run.config_file)
    else:
        with checkpoint.reading(folder):
            begun = load(run.saved_config(folder))
    configuration.refuse_changes(begun, config, run.folder, CHANGEABLE)
    device, why = choose_device(config.train.device)
    train, validation = read(config, log)
    log.say(f"device: {device} ({why})")
    backend.manual_seed(config.train.seed)
    if folder is None:
        tokenizer, model = begin(config, train, log)
    else:
        try:
            tokenizer, model = open_folder(folder)
        except (ValueError, OSError) as error:
            raise checkpoint.unusable(folder, error) from error
    return _ready(config, train, validation, tokenizer, model.to(device), run, log, folder)


def _ready(
    config: FinetuneConfig,
    train: Any,
    validation: Any,
    tokenizer: Tokenizer | None,
    model: Any,
    run: Run,
    log: Log,
    folder: Path | None,
) -> Finetuning:
    config = _settled(config, model)
    task = _task(config, train, validation, tokenizer, model)
    for note in task.notes:
        log.say(f"note: {note}")
    _freeze(model, config.model.freeze)
    learnt = sum(p.size for p in model.parameters() if p.requires_grad)
    total = sum(p.size for p in model.parameters())
    frozen = f", {total - learnt:,} of them frozen" if learnt < total else ""
    log.say(f"model: {total:,} parameters{frozen}")
    if slow := slow_on_cpu(config.train.dtype, next(iter(model.parameters())).device):
        log.say(slow)
    config = _with_processes(config, learnt, task, log)
    loop = config.train.loop(task.steps_per_epoch, config.model.max_length)
    config = replace(config, train=replace(config.train, steps=loop.steps))
    optimizer = _optimizer(config, model, loop)
    decay_steps = max(1, loop.steps - loop.warmup)
    fall = Linear(decay_steps, end=0.0)
    if config.train.schedule == "cosine":
        fall = Cosine(decay_steps, end=0.0)
    schedule = LRScheduler(optimizer, Warmup(loop.warmup, fall) if loop.warmup else fall)
    rates = f"learning rate {config.train.lr:g}"
    if config.train.head_lr != config.train.lr:
        rates += f", of what is new {config.train.head_lr:g}"
    log.say(
        f"training: {counted(config.train.epochs, 'epoch')} of {task.steps_per_epoch:,} batches of "
        f"{config.train.batch_size}, {rates}"
    )
    trainer = Trainer(model, optimizer, schedule, task, loop, run, log)
    if run.config_file.exists():
        trainer.resume(folder)
        if end := trainer.over():
            flag = "--epochs" if end.flag == "--steps" else end.flag
            raise ConfigError(f"{run.folder} has {end.reason}: give a larger {flag} to train on")
    run.begin(dumps(config))
    return Finetuning(trainer, model, task, run, config)


# What another value for does not make it another run: how long, where.
CHANGEABLE = (
    "train.epochs",
    "train.steps",
    "train.patience",
    "train.max_seconds",
    "train.keep_last",
    "train.processes",
    "train.device",
)


def _lasting(config: FinetuneConfig) -> FinetuneConfig:
    """With paths that mean the same when the run is resumed from another folder."""

    def whole(path: str) -> str:
        return str(Path(path).expanduser().absolute()) if Path(path).expanduser().exists() else path

    data = config.data
    if data.source != BUILTIN:
        data = replace(data, source=whole(data.source))
    if data.val_source:
        data = replace(data, val_source=whole(data.val_source))
    model = config.model
    if model.checkpoint:
        model = replace(model, checkpoint=whole(model.checkpoint))
    return replace(config, data=data, model=model)


def _settled(config: FinetuneConfig, model: Any) -> FinetuneConfig:
    """With the numbers that depend on the model in place of 0.

    BERT's authors fine-tune at 2e-5 to 5e-5 a width of 768; a narrower one stands and wants more,
    about in inverse proportion. What begins at random learns at the rates of pretraining.
    """
    train, tag = config.train, config.task == "tag"
    on_checkpoint = bool(config.model.checkpoint)
    bert = model.config.bert if isinstance(model, Tagger) else model.config
    if not train.batch_size:
        size = (4 if on_checkpoint else 16) if tag else 32
        train = replace(train, batch_size=size)
    if not train.lr:
        if on_checkpoint and isinstance(bert, BertConfig):
            lr = (1e-4 if tag else 5e-5) * 768 / bert.hidden_size
        elif isinstance(bert, BertConfig):
            lr = 1e-3 * 128 / bert.hidden_size
        elif isinstance(model, Seq2Seq):
            lr = 2e-3 * 128 / model.config.d_model
        else:
            lr = 3e-3 if tag else 2e-3
        train = replace(train, lr=float(f"{lr:.2g}"))
    if not train.head_lr:
        factor = 5.0 if tag and on_checkpoint else 1.0
        train = replace(train, head_lr=train.lr * factor)
    return replace(config, train=train)


def _with_processes(
    config: FinetuneConfig, parameters: int, task: ClassifyTask | TagTask | Translating, log: Log
) -> FinetuneConfig:
    """With the number of processes settled: another number is another order of the same sums."""
    train = config.train
    tokens = train.batch_size * config.model.max_length
    alone = train.dtype != "float32" and not train.processes
    device, _ = choose_device(train.device)
    count = (
        1 if alone else processes_for(train.processes, device, train.batch_size, tokens, parameters)
    )
    if count > 1:
        log.say(f"processes: {count}, which share every batch")
    return replace(config, train=replace(train, processes=count))


# --- what is learnt, and how ----------------------------------------------------------------------


class _Tagging(TagTask):
    """With task.json beside the checkpoint."""

    about: dict[str, Any]

    def save(self, folder: Path) -> None:
        super().save(folder)
        text = json.dumps(self.about, indent=2, ensure_ascii=False) + "\n"
        (folder / TASK_FILE).write_text(text, encoding="utf-8")


def _task(
    config: FinetuneConfig, train: Any, validation: Any, tokenizer: Tokenizer | None, model: Any
) -> ClassifyTask | TagTask | Translating:
    data, options = config.data, config.model
    seed = config.train.seed + 2**63  # another sequence than the one of weights and dropout
    about = {
        "task": config.task,
        "text_column": data.text_column,
        "second_column": data.second_column,
    }
    if config.task == "tag":
        sizes = model.config
        task = _Tagging(
            sizes, train, validation, tokenizer, batch_size=config.train.batch_size, seed=seed
        )
        task.about = about | {"scheme": task.tag_scheme}
        return task
    assert tokenizer is not None
    if config.task == "translate":
        return Translating(
            train,
            validation,
            tokenizer,
            batch_size=config.train.batch_size,
            max_length=options.max_length,
            seed=seed,
            about=about | {"max_length": options.max_length},
        )
    labels = LabelSet(model.config.labels.values())
    weights = None
    if config.train.class_weights == "balanced":
        weights = labels.weights(train.labels)
    return ClassifyTask(
        train,
        validation,
        labels,
        tokenizer,
        max_length=options.max_length,
        long=options.long,
        batch_size=config.train.batch_size,
        weights=weights,
        metric=config.train.metric,
        segments=getattr(model.config, "type_vocab_size", 1),
        seed=seed,
        about=about | {"max_length": options.max_length, "long": options.long},
    )


def _freeze(model: Any, patterns: str) -> None:
    """requires_grad = False where a pattern is whole parts of the name."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns.split():
        if not any(matches(pattern, name) for name in names):
            raise ConfigError(
                f"--freeze: {pattern!r} matches no parameter; they are such as {names[0]!r} and "
                f"{names[-1]!r}"
            )
    for name, parameter in model.named_parameters():
        if any(matches(pattern, name) for pattern in patterns.split()):
            parameter.requires_grad = False
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("--freeze leaves nothing to train: freeze less")


def _optimizer(config: FinetuneConfig, model: Any, loop: TrainConfig) -> Optimizer:
    """AdamW; the layers of a checkpoint at rates of their own."""
    groups = decay_groups(model, loop.weight_decay)
    factors = layer_factors(model, config) if config.model.checkpoint else {}
    names = [name for group in groups for name, _ in group["params"]]
    factors = {p: f for p, f in factors.items() if any(matches(p, name) for name in names)}
    return AdamW(lr_groups(groups, loop.lr, factors), lr=loop.lr, betas=loop.betas)


def layer_factors(model: Any, config: FinetuneConfig) -> dict[str, float]:
    """Part of a name → what the rate of its parameters is multiplied with.

    The last layer of the encoder has 1, each one below `layer_decay` times as much as the one above
    it, the embeddings as much as a layer below the first; what is new has head_lr / lr.
    """
    train = config.train
    tops = {name.partition(".")[0] for name, _ in model.named_parameters()}
    factors = dict.fromkeys(tops - {"bert"}, train.head_lr / train.lr)
    if "bert" in tops and model.bert is not None:
        layers = len(model.bert.encoder.layer)
        for i in range(layers):
            factors[f"bert.encoder.layer.{i}"] = train.layer_decay ** (layers - 1 - i)
        factors["bert.embeddings"] = train.layer_decay**layers
    return factors
