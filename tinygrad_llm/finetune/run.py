"""A run of fine-tuning: from labelled data to a model that labels, and its scores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinygrad_llm import backend
from tinygrad_llm.data import corpora
from tinygrad_llm.data.tables import counted
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.finetune.config import BUILTIN, FinetuneConfig, dumps, load
from tinygrad_llm.finetune.encoders import averaged
from tinygrad_llm.finetune.kind import Kind, Learnt
from tinygrad_llm.finetune.kinds import KINDS
from tinygrad_llm.finetune.layers import layer_factors
from tinygrad_llm.metrics.multi import MultiReport
from tinygrad_llm.metrics.plot import draw_report
from tinygrad_llm.metrics.report import Report, write_metrics
from tinygrad_llm.optim import AdamW, LRScheduler, Optimizer, Warmup, decay_groups, lr_groups
from tinygrad_llm.optim.groups import matches
from tinygrad_llm.optim.schedules import Cosine, Linear
from tinygrad_llm.storage import write_file
from tinygrad_llm.train import checkpoint
from tinygrad_llm.train import config as configuration
from tinygrad_llm.train.config import ConfigError, TrainConfig
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
    model: Any
    task: Any
    run: Run
    config: FinetuneConfig

    def report(self) -> tuple[Report, str | None]:
        """The scores of the best checkpoint on the validation data, beside those of baselines.

        They are written to metrics.json and metrics.txt and drawn into metrics.png in the run
        folder; second is a sentence where no picture could be drawn.
        """
        best = self.run.checkpoint("best") or self.run.checkpoint("latest")
        assert best is not None  # the run is over: its last step is saved
        name, best = best.name, averaged(best)
        device = next(iter(self.model.parameters())).device
        model = type(self.model).from_pretrained(best).to(device)
        report = KINDS[self.config.task].report(self.task, model)
        about = {"task": self.config.task, "checkpoint": name}
        write_metrics(self.run.folder / "metrics.json", report, **about)
        text = (report.text() + "\n").encode()
        write_file(self.run.folder / "metrics.txt", lambda path: path.write_bytes(text))
        for task, part in report.reports.items() if isinstance(report, MultiReport) else ():
            draw_report(part, self.run.folder / f"metrics_{task}.png")
        return report, draw_report(report, self.run.folder / "metrics.png")


# --- runs -----------------------------------------------------------------------------------------


def start(config: FinetuneConfig, folder: str | Path | None, log: Log) -> Finetuning:
    """A new run in `folder` (or under runs/).

    The folder is made last, when all else is known to work. Raises ValueError or OSError, each with
    one sentence, for data, a checkpoint, a configuration, a folder or a device that cannot be used.
    """
    run = Run.new(folder)
    device, why = choose_device(config.train.device)
    config = _lasting(config)
    kind = KINDS[config.task]
    train, validation = kind.read(config, log)
    log.say(f"device: {device} ({why})")
    backend.manual_seed(config.train.seed)
    tokenizer, model = kind.begin(config, train, log)
    config = _settled(config, kind, model)
    task = kind.task(config, train, validation, tokenizer, model.to(device))
    return _ready(config, task, model, run, log, None)


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
    kind = KINDS[config.task]
    train, validation = kind.read(config, log)
    log.say(f"device: {device} ({why})")
    backend.manual_seed(config.train.seed)
    if folder is None:
        tokenizer, model = kind.begin(config, train, log)
    else:
        tokenizer, model = _open(kind, folder)
    config = _settled(config, kind, model)
    task = kind.task(config, train, validation, tokenizer, model.to(device))
    return _ready(config, task, model, run, log, folder)


def _open(kind: Kind, folder: Path) -> tuple[Tokenizer | None, Any]:
    try:
        return kind.open(folder)
    except (ValueError, OSError) as error:
        raise checkpoint.unusable(folder, error) from error


def _ready(
    config: FinetuneConfig, task: Learnt, model: Any, run: Run, log: Log, folder: Path | None
) -> Finetuning:
    for note in task.notes:
        log.say(f"note: {note}")
    _freeze(model, config.model.freeze)
    learnt = sum(p.size for p in model.parameters() if p.requires_grad)
    total = sum(p.size for p in model.parameters())
    frozen = f", {total - learnt:,} of them frozen" if learnt < total else ""
    log.say(f"model: {total:,} parameters{frozen}")
    if slow := slow_on_cpu(config.train.dtype, next(iter(model.parameters())).device):
        log.say(slow)
    config = _with_processes(config, learnt, log)
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
    trainer = Trainer(model, optimizer, schedule, task, loop, run, log, judge_average=True)
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
    lasting = corpora.lasting if config.task == "lm" else whole  # also a pattern, or a corpus
    if data.source != BUILTIN:
        data = replace(data, source=lasting(data.source))
    if data.val_source:
        data = replace(data, val_source=lasting(data.val_source))
    model = config.model
    if model.checkpoint:
        model = replace(model, checkpoint=whole(model.checkpoint))
    return replace(config, data=data, model=model)


def _settled(config: FinetuneConfig, kind: Kind, model: Any) -> FinetuneConfig:
    """With the numbers that depend on task and model in place of 0."""
    train, usual = config.train, kind.defaults(config, model)
    lr = train.lr or float(f"{usual.lr:.2g}")
    # What is new learns faster than the checkpoint below it by the same factor at any rate.
    faster = (usual.head_lr or usual.lr) / usual.lr
    longest = config.model.max_length or usual.max_length or 0
    return replace(
        config,
        model=replace(config.model, max_length=longest),
        train=replace(
            train,
            batch_size=train.batch_size or usual.batch_size,
            lr=lr,
            head_lr=train.head_lr or float(f"{lr * faster:.6g}"),
        ),
    )


def _with_processes(config: FinetuneConfig, parameters: int, log: Log) -> FinetuneConfig:
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


# --- what is learnt at which rate -----------------------------------------------------------------


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
