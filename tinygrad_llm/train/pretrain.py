"""Pretraining a GPT from text alone: every part of the house, put together once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tinygrad_llm import backend
from tinygrad_llm.data import corpora
from tinygrad_llm.data.corpora import Corpus
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.generate import prompt_ids, write
from tinygrad_llm.models.gpt import GPT, GPTConfig
from tinygrad_llm.optim import AdamW, LRScheduler, decay_groups
from tinygrad_llm.optim.schedules import Cosine, Warmup
from tinygrad_llm.tasks.causal import CausalTask
from tinygrad_llm.train import config as configuration
from tinygrad_llm.train.checkpoint import CheckpointError
from tinygrad_llm.train.config import ConfigError, DataConfig, PretrainConfig
from tinygrad_llm.train.log import Log
from tinygrad_llm.train.machine import choose_device
from tinygrad_llm.train.overfit import OneBatch
from tinygrad_llm.train.run import Run
from tinygrad_llm.train.trainer import Trainer


@dataclass(frozen=True)
class Pretraining:
    """A run that is ready to go: `pretraining.trainer.fit()` does the rest."""

    trainer: Trainer
    model: GPT
    tokenizer: Tokenizer
    run: Run
    config: PretrainConfig

    def sample(self) -> Iterator[str]:
        """What the model writes as it is now, piece by piece; the same seed, the same text."""
        return write(
            self.model,
            self.tokenizer,
            self.config.sample.prompt,
            self.config.sample.max_new_tokens,
            temperature=self.config.sample.temperature,
            top_k=self.config.sample.top_k,
            top_p=self.config.sample.top_p,
            seed=self.config.train.seed,
            stop_at_end=False,  # a document may be short: go on with the next
        )


def start(config: PretrainConfig, folder: str | Path | None, log: Log) -> Pretraining:
    """A new run in `folder` (or under runs/), its model fresh from the seed.

    The folder is made last, when all else is known to work. Raises ValueError or OSError, each with
    one sentence, for text, a configuration, a folder or a device that cannot be used.
    """
    run = Run.new(folder)
    device, why = choose_device(config.train.device)
    corpus = _corpus(config.data, log)
    log.say(f"device: {device} ({why})")
    if corpus.name not in corpora.names():  # so that resuming works from any folder
        source = str(Path(config.data.source).expanduser().absolute())
        config = replace(config, data=replace(config.data, source=source))
    tokenizer = make_tokenizer(config.data, corpus.text)
    model = new_model(config, tokenizer, device)
    trainer = _trainer(config, model, corpus, tokenizer, run, log)
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
    _refuse_changes(configuration.load(run.config_file), config, run)
    folder = run.checkpoint("latest")
    device, why = choose_device(config.train.device)
    corpus = _corpus(config.data, log)
    log.say(f"device: {device} ({why})")
    if folder is None:
        tokenizer = make_tokenizer(config.data, corpus.text)
        model = new_model(config, tokenizer, device)
    else:
        tokenizer, model = _load(folder, device)
    trainer = _trainer(config, model, corpus, tokenizer, run, log)
    if folder is None:
        run.forget_after(-1)
    else:
        trainer.resume(folder)
    if end := trainer.over():
        raise ConfigError(f"{run.folder} has {end.reason}: give a larger {end.flag} to train on")
    run.begin(configuration.dumps(config))
    return Pretraining(trainer, model, tokenizer, run, config)


# What another value for does not make it another run: how long, how often, where, the last words.
CHANGEABLE = (
    "train.steps",
    "train.max_seconds",
    "train.max_tokens",
    "train.patience",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_last",
    "train.device",
    "sample.",
)


def _refuse_changes(old: PretrainConfig, new: PretrainConfig, run: Run) -> None:
    for key, (before, after) in configuration.differences(old, new).items():
        if not key.startswith(CHANGEABLE):
            raise ConfigError(
                f"{run.folder} was started with {key} = {before}, which cannot become {after} on "
                "the way: leave it out, or start a new run"
            )


def _corpus(config: DataConfig, log: Log) -> Corpus:
    corpus = corpora.load_text(config.source)
    log.say(f"text: {corpus.name}, {len(corpus.text):,} characters, sha256 {corpus.sha256[:12]}")
    return corpus


def make_tokenizer(config: DataConfig, text: str) -> Tokenizer:
    """The tokenizer that `config` asks for, made from the text where it is learnt."""
    if config.tokenizer == "byte":
        return Tokenizer.byte()
    if config.tokenizer == "char":
        return Tokenizer.char(text)
    return Tokenizer.bpe(text, config.vocab_size)


def new_model(config: PretrainConfig, tokenizer: Tokenizer, device: str) -> GPT:
    """A GPT with weights from the seed; the random stream stands after them."""
    backend.manual_seed(config.train.seed)
    model = GPT(
        GPTConfig(
            vocab_size=tokenizer.vocab_size,
            n_positions=config.train.context,
            n_embd=config.model.n_embd,
            n_layer=config.model.n_layer,
            n_head=config.model.n_head,
            # GPT-2's 0.02 is for its width of 768; a narrower layer needs larger weights to say
            # as much. At 128 the demo's loss after 300 steps was 4.28 instead of 4.61.
            initializer_range=0.02 * math.sqrt(768 / config.model.n_embd),
            resid_pdrop=config.model.dropout,
            embd_pdrop=config.model.dropout,
            attn_pdrop=config.model.dropout,
            bos_token_id=tokenizer.eos_id,  # the mark between documents, as in GPT-2
            eos_token_id=tokenizer.eos_id,
        )
    )
    return model.to(device)


def _load(folder: Path, device: str) -> tuple[Tokenizer, GPT]:
    try:
        return Tokenizer.from_file(folder), GPT.from_pretrained(folder).to(device)
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{error}; delete the folder {folder} to go on from the checkpoint before it"
        ) from error


def _trainer(
    config: PretrainConfig, model: GPT, corpus: Corpus, tokenizer: Tokenizer, run: Run, log: Log
) -> Trainer:
    train = config.train
    prompt_ids(tokenizer, config.sample.prompt)  # better refused now than after the training
    task = CausalTask(
        corpus,
        tokenizer,
        context=train.context,
        batch_size=train.batch_size,
        val_fraction=config.data.val_fraction,
        eval_batches=train.eval_batches,
        seed=train.seed + 2**63,  # another sequence than the one of weights and dropout
    )
    log.say(
        f"tokens: {len(task.train.ids):,} to train on, {len(task.held_out.ids):,} to validate on, "
        f"vocabulary {tokenizer.vocab_size:,}"
    )
    log.say(f"model: {sum(p.size for p in model.parameters()):,} parameters")
    optimizer = AdamW(decay_groups(model, train.weight_decay), lr=train.lr, betas=train.betas)
    decay_steps = max(1, train.steps - train.warmup)
    final = train.min_lr / train.lr if train.lr else 0.0
    schedule = LRScheduler(optimizer, Warmup(train.warmup, Cosine(decay_steps, end=final)))
    if not train.overfit_one_batch:
        return Trainer(model, optimizer, schedule, task, train, run, log)
    log.say("overfitting one batch: expect a loss near 0, or look for a fault")
    return Trainer(model, optimizer, schedule, OneBatch(task), train, run, log)
