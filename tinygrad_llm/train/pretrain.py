"""Pretraining from text alone: every part of the house, put together once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinygrad_llm import backend
from tinygrad_llm.data import corpora
from tinygrad_llm.data.texts import Text, alphabet, open_text, sample
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.generate import prompt_ids, write
from tinygrad_llm.models.pretrained import check_vocabulary
from tinygrad_llm.optim import AdamW, LRScheduler, decay_groups, lr_groups
from tinygrad_llm.optim.schedules import Cosine, Warmup
from tinygrad_llm.train import checkpoint
from tinygrad_llm.train import config as configuration
from tinygrad_llm.train.architectures import ARCHITECTURES, Texts
from tinygrad_llm.train.config import (
    TOKENIZERS,
    ConfigError,
    DataConfig,
    PretrainConfig,
    TrainConfig,
)
from tinygrad_llm.train.log import Log
from tinygrad_llm.train.machine import choose_device, physical_memory
from tinygrad_llm.train.overfit import one_batch
from tinygrad_llm.train.parallel import processes_for
from tinygrad_llm.train.precision import slow_on_cpu
from tinygrad_llm.train.progress import LogReport
from tinygrad_llm.train.run import Run, find_checkpoint
from tinygrad_llm.train.samples import Samples
from tinygrad_llm.train.trainer import Trainer
from tinygrad_llm.train.utilisation import Utilisation, measured_peak


@dataclass(frozen=True)
class Pretraining:
    """A run that is ready to go: `pretraining.trainer.fit()` does the rest."""

    trainer: Trainer
    model: Any
    tokenizer: Tokenizer
    run: Run
    config: PretrainConfig

    def sample(self) -> Iterator[str]:
        """What the model writes as it is now, piece by piece; the same seed, the same text."""
        return _sample(self.model, self.tokenizer, self.config, self.config.sample.max_new_tokens)


def start(config: PretrainConfig, folder: str | Path | None, log: Log) -> Pretraining:
    """A new run in `folder` (or under runs/), its model fresh from the seed.

    The folder is made last, when all else is known to work. Raises ValueError or OSError, each with
    one sentence, for text, a configuration, a folder or a device that cannot be used.
    """
    run = Run.new(folder)
    device, why = choose_device(config.train.device)
    texts = _open_texts(config.data, log)
    log.say(f"device: {device} ({why})")
    config = replace(config, data=_lasting(config.data))
    tokenizer = _tokenizer(config, texts, log)
    model = new_model(config, tokenizer, device)
    config = _with_processes(config, model, device, log)
    trainer = _trainer(config, model, texts, tokenizer, run, log)
    run.begin(configuration.dumps(config))
    return Pretraining(trainer, model, tokenizer, run, config)


def resume(run: Run, config: PretrainConfig, log: Log) -> Pretraining:
    """The run as its latest checkpoint left it; from the start where it has none yet.

    `config` is the run's own, or it with other values for what may change on the way
    (`CHANGEABLE`). Raises ValueError or OSError as `start`, also for a damaged checkpoint, a text
    that has changed, a run that is over, and one that another process works on.
    """
    run.hold()
    try:
        return _resume(run, config, log)
    except BaseException:
        run.close()
        raise


def _resume(run: Run, config: PretrainConfig, log: Log) -> Pretraining:
    folder = run.checkpoint("latest")
    configuration.refuse_changes(_begun_with(run, folder), config, run.folder, CHANGEABLE)
    device, why = choose_device(config.train.device)
    texts = _open_texts(config.data, log)
    log.say(f"device: {device} ({why})")
    if folder is None:
        tokenizer = _tokenizer(config, texts, log)
        model = new_model(config, tokenizer, device)
    else:
        tokenizer, model = _load(config, folder, device)
    config = _with_processes(config, model, device, log)
    trainer = _trainer(config, model, texts, tokenizer, run, log)
    trainer.resume(folder)
    if end := trainer.over():
        raise RunIsOver(f"{run.folder} has {end.reason}: give a larger {end.flag} to train on")
    run.begin(configuration.dumps(config))
    return Pretraining(trainer, model, tokenizer, run, config)


def _with_processes(config: PretrainConfig, model: Any, device: str, log: Log) -> PretrainConfig:
    """With the number of processes settled: another number is another order of the same sums."""
    train = config.train
    tokens = train.batch_size * train.context
    parameters = sum(p.size for p in model.parameters())
    alone = train.dtype != "float32" and not train.processes  # a team has no masters
    count = (
        1 if alone else processes_for(train.processes, device, train.batch_size, tokens, parameters)
    )
    if count > 1:
        log.say(f"processes: {count}, which share every batch")
    return replace(config, train=replace(train, processes=count))


def _begun_with(run: Run, folder: Path | None) -> PretrainConfig:
    """What the checkpoint was made with: config.toml may have been edited since."""
    if folder is None:
        return configuration.load(run.config_file)
    with checkpoint.reading(folder):
        return configuration.load(run.saved_config(folder))


class RunIsOver(ConfigError):
    """A run that has reached a limit of its configuration already."""


# What another value for does not make it another run: how long, how often, where, the last words.
CHANGEABLE = (
    "train.steps",
    "train.max_seconds",
    "train.max_tokens",
    "train.patience",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_last",
    "train.gradient_checkpointing",
    "train.mfu",
    "train.processes",
    "train.device",
    "train.cuda_graph",
    "sample.",
)


def _open_texts(config: DataConfig, log: Log) -> Texts:
    with LogReport(log) as report:
        train = open_text(config.source, report)
        _tell("text", train, log)
        if not config.val_source:
            return Texts(train, None)
        validation = open_text(config.val_source, report)
        _tell("text to validate on", validation, log)
    if validation.sha256 == train.sha256:
        raise ConfigError(
            f"data.val_source {config.val_source} is the text that is trained on: name another, or "
            "leave it out to hold out a part"
        )
    return Texts(train, validation)


def _tell(what: str, text: Text, log: Log) -> None:
    log.say(f"{what}: {text.name}, {text.characters:,} characters, sha256 {text.sha256[:12]}")


def _lasting(config: DataConfig) -> DataConfig:
    """With paths that mean the same when the run is resumed from another folder."""
    tokenizer = config.tokenizer
    if tokenizer not in TOKENIZERS:
        tokenizer = str(Path(tokenizer).expanduser().absolute())
    return replace(
        config,
        source=corpora.lasting(config.source),
        val_source=config.val_source and corpora.lasting(config.val_source),
        tokenizer=tokenizer,
    )


def make_tokenizer(config: DataConfig, texts: Texts, log: Log) -> Tokenizer:
    """The tokenizer that `config` asks for, made from the text where it is learnt.

    bpe, wordpiece and unigram learn from `texts.sample` of the text that is trained on, char takes
    the characters of both texts. Raises ValueError or FileNotFoundError where it cannot be made.
    """
    if config.tokenizer not in TOKENIZERS:
        folder = Path(config.tokenizer).expanduser()
        is_run = (folder / "checkpoints").is_dir()
        return Tokenizer.from_file(find_checkpoint(folder) if is_run else folder)
    if config.tokenizer == "byte":
        return Tokenizer.byte()
    if config.tokenizer == "char":
        return Tokenizer.char(alphabet(*(text for text in texts if text is not None)))
    with LogReport(log) as report:
        words = sample(texts.train, report=report)
        if config.tokenizer == "wordpiece":
            return Tokenizer.wordpiece(words, config.vocab_size)
        if config.tokenizer == "unigram":
            return Tokenizer.unigram(words, config.vocab_size)
        return Tokenizer.bpe(words, config.vocab_size)


def _tokenizer(config: PretrainConfig, texts: Texts, log: Log) -> Tokenizer:
    made = make_tokenizer(config.data, texts, log)
    return ARCHITECTURES[config.model.architecture].tokenizer(made)


def new_model(config: PretrainConfig, tokenizer: Tokenizer, device: str) -> Any:
    """The network that `config` describes with weights from the seed; the stream stands after them.

    Raises ValueError for one that this machine's memory cannot hold, before any of it is taken.
    """
    architecture = ARCHITECTURES[config.model.architecture]
    sizes = architecture.sizes(config, tokenizer)
    _check_memory(sizes)
    backend.manual_seed(config.train.seed)
    return architecture.model(sizes).to(device)


def _check_memory(sizes: Any) -> None:
    """On a GPU, too: the weights are drawn in the machine's memory."""
    needed, there = 4 * sizes.num_parameters(), physical_memory()
    if there is not None and needed > there:
        raise ConfigError(
            f"a model of {sizes.num_parameters():,} parameters needs {needed / 1e9:,.0f} GB for "
            f"its weights, this machine has {there / 1e9:,.0f}: make n_embd or n_layer smaller"
        )


def _load(config: PretrainConfig, folder: Path, device: str) -> tuple[Tokenizer, Any]:
    kind = ARCHITECTURES[config.model.architecture].model
    try:
        model = kind.from_pretrained(folder).to(device)  # first: it looks at the checksums of both
        tokenizer = Tokenizer.from_file(folder)
        check_vocabulary(tokenizer.vocab_size, model.config.vocab_size)
    except (ValueError, OSError) as error:
        raise checkpoint.unusable(folder, error) from error
    return tokenizer, model


def _trainer(
    config: PretrainConfig, model: Any, texts: Texts, tokenizer: Tokenizer, run: Run, log: Log
) -> Trainer:
    train = config.train
    architecture = ARCHITECTURES[config.model.architecture]
    if architecture.writes:
        prompt_ids(tokenizer, config.sample.prompt)  # better refused now than after the training
    with LogReport(log) as report:
        task = architecture.task(config, texts, tokenizer, report)
    for note in _notes(task, tokenizer):
        log.say(note)
    log.say(f"model: {sum(p.size for p in model.parameters()):,} parameters")
    if slow := slow_on_cpu(train.dtype, next(iter(model.parameters())).device):
        log.say(slow)
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    groups = lr_groups(decay_groups(model, train.weight_decay), train.lr, train.lr_groups)
    optimizer = AdamW(groups, lr=train.lr, betas=train.betas)
    decay_steps = max(1, train.steps - train.warmup)
    final = train.min_lr / train.lr if train.lr else 0.0
    schedule = LRScheduler(optimizer, Warmup(train.warmup, Cosine(decay_steps, end=final)))
    samples = _samples(config, model, tokenizer, run) if architecture.writes else None
    counted = configuration.applies(config.model.architecture, "train.mfu")
    utilisation = _utilisation(train, model, log) if train.mfu and counted else None
    if train.overfit_one_batch:
        log.say("overfitting one batch: expect a loss near 0, or look for a fault")
    learnt = one_batch(task) if train.overfit_one_batch else task
    return Trainer(model, optimizer, schedule, learnt, train, run, log, samples, utilisation)


def _notes(task: Any, tokenizer: Tokenizer) -> list[str]:
    """What there is to train on, as far as the task can say it."""
    vocabulary = f"vocabulary {tokenizer.vocab_size:,}"
    if hasattr(task, "notes"):
        return [*task.notes, vocabulary]
    if not hasattr(task, "train_tokens"):
        return [vocabulary]
    train, held_out = len(task.train_tokens), len(task.val_tokens)
    return [f"tokens: {train:,} to train on, {held_out:,} to validate on, {vocabulary}"]


def _samples(config: PretrainConfig, model: Any, tokenizer: Tokenizer, run: Run) -> Samples:
    sample = config.sample

    def text() -> str:
        return "".join(_sample(model, tokenizer, config, sample.every_max_new_tokens))

    return Samples(run.folder, sample.every, text)


def _sample(
    model: Any, tokenizer: Tokenizer, config: PretrainConfig, max_new_tokens: int
) -> Iterator[str]:
    sample = config.sample
    return write(
        model,
        tokenizer,
        sample.prompt,
        max_new_tokens,
        temperature=sample.temperature,
        top_k=sample.top_k,
        top_p=sample.top_p,
        seed=config.train.seed,
        stop_at_end=False,  # a document may be short: go on with the next
    )


def _utilisation(train: TrainConfig, model: Any, log: Log) -> Utilisation:
    flops = model.flops_per_token(train.context)
    device = next(iter(model.parameters())).device
    # On the CPU products of half precision are float32's, too.
    half = {"dtype": train.dtype} if device != "cpu" and train.dtype != "float32" else {}
    peak = measured_peak(device, **half)
    log.say(
        f"peak: {peak / 1e9:,.0f} GFLOP/s (measured, {half.get('dtype', 'float32')}); a token "
        f"needs {flops / 1e6:,.2f} MFLOP to train on"
    )
    return Utilisation(flops, peak)
