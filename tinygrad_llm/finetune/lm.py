"""Fine-tuning for lm: go on training a language model on texts of one's own.

    a text → GPT, Llama or LSTM → p(next token)          loss: cross-entropy of every token

Nothing is new in the model, and the tokenizer is the checkpoint's. What is had for it is seen on
the validation text: the loss after, beside the loss before, on the very same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tinygrad_llm.data.texts import Text, sample
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.finetune.config import FinetuneConfig
from tinygrad_llm.finetune.documents import texts_of
from tinygrad_llm.finetune.encoders import (
    check_max_length,
    model_folder,
    open_model,
    tokenizer_of,
)
from tinygrad_llm.finetune.kind import Columns, Defaults, Fitted, Rows
from tinygrad_llm.finetune.layers import LANGUAGE_MODELS
from tinygrad_llm.metrics.language import LanguageReport
from tinygrad_llm.models import auto
from tinygrad_llm.models.gpt import GPT
from tinygrad_llm.models.llama import Llama
from tinygrad_llm.models.lstm import LSTMLanguageModel
from tinygrad_llm.tasks.continued import ContinuedTask, Sampling
from tinygrad_llm.train.architectures import ARCHITECTURES
from tinygrad_llm.train.config import ConfigError, ModelConfig, PretrainConfig, TrainConfig
from tinygrad_llm.train.log import Log
from tinygrad_llm.train.progress import LogReport

LanguageModel = GPT | Llama | LSTMLanguageModel

CONTEXT = 128  # tokens read at a time unless another number is asked for


@dataclass(frozen=True)
class LanguageModelling:
    """The kind of lm."""

    examples: str = "documents"
    models: tuple[type, ...] = LANGUAGE_MODELS

    def read(self, config: FinetuneConfig, log: Log) -> tuple[Text, Text | None]:
        """(training, validation); None where a part of the one text is to be held out."""
        _refuse_what_is_for_labels(config)
        return texts_of(config, log)

    # --- the model --------------------------------------------------------------------------------

    def begin(
        self, config: FinetuneConfig, train: Text, log: Log
    ) -> tuple[Tokenizer, LanguageModel]:
        """(tokenizer, model): a checkpoint, or a small GPT at random."""
        if config.model.checkpoint:
            return self._begin_from(config)
        return _begin_at_random(config, train, log)

    def _begin_from(self, config: FinetuneConfig) -> tuple[Tokenizer, LanguageModel]:
        options = config.model
        folder = model_folder(options.checkpoint)
        kind = auto.class_of(folder)
        if kind not in self.models:
            raise ConfigError(
                f"{options.checkpoint} holds a {kind.__name__}, which does not predict each token "
                "of a text from those before it: give a GPT, a Llama or an LSTM language model, "
                "such as `tinygrad-llm pretrain gpt` makes"
            )
        model = kind.from_pretrained(folder, "float32")
        check_max_length(options.max_length, options.checkpoint, model.config.n_positions)
        return tokenizer_of(folder, model.config.vocab_size), model

    def open(self, folder: Path) -> tuple[Tokenizer, LanguageModel]:
        """(tokenizer, model) as a checkpoint of a run holds them."""
        model = open_model(folder, self.models)
        return Tokenizer.from_file(folder), model

    def defaults(self, config: FinetuneConfig, model: LanguageModel) -> Defaults:
        """The narrower, the faster: a GPT-2, 768 wide, is fine-tuned at about 1e-4."""
        sizes: Any = model.config
        width = sizes.hidden_size if isinstance(model, Llama) else sizes.n_embd
        lr = 1e-4 * 768 / width if config.model.checkpoint else 3e-3 * 128 / width
        return Defaults(16, lr, max_length=min(sizes.n_positions, CONTEXT))

    def task(
        self,
        config: FinetuneConfig,
        train: Text,
        validation: Text | None,
        tokenizer: Tokenizer | None,
        model: LanguageModel,
    ) -> ContinuedTask:
        """What the trainer is given."""
        assert tokenizer is not None
        context = config.model.max_length
        return ContinuedTask(
            train,
            tokenizer,
            context=context,
            batch_size=config.train.batch_size,
            validation=validation,
            val_fraction=config.data.val_fraction,
            seed=config.data_seed,
            sampling=Sampling(seed=config.train.seed),
            came="as it came" if config.model.checkpoint else "at random",
            about={"task": config.task, "max_length": context},
        )

    def report(self, task: ContinuedTask, model: Any) -> LanguageReport:
        """Loss, perplexity and bits per byte, beside those of before and of the unigram model."""
        return task.report(model)

    # --- new texts --------------------------------------------------------------------------------

    def of_file(self, fitted: Fitted, path: str, columns: Columns) -> Rows:
        """ConfigError: it labels nothing."""
        raise labels_nothing(fitted.model)

    def of_lines(self, fitted: Fitted, lines: Sequence[str]) -> Rows:
        """ConfigError: it labels nothing."""
        raise labels_nothing(fitted.model)


def labels_nothing(model: Any, where: str | Path = "this folder") -> ConfigError:
    """What to do instead of asking a language model, or its class, for labels."""
    kind = model if isinstance(model, type) else type(model)
    return ConfigError(
        f"{where} holds a {kind.__name__}, which labels nothing: let it write with `tinygrad-llm "
        "generate --model RUN`, or score a text with `tinygrad-llm evaluate --model RUN --data "
        "FILE`"
    )


def _refuse_what_is_for_labels(config: FinetuneConfig) -> None:
    """ConfigError for a flag that would change nothing: somebody expects that it does."""
    for section, names in _FOR_LABELS.items():
        given = getattr(config, section)
        usual = {field.name: field.default for field in fields(given)}
        for name in names:
            if getattr(given, name) != usual[name]:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(
                    f"{flag} is for other tasks: lm learns each token of a text from those before "
                    f"it, and has no labels, heads or encoders; leave {flag} out"
                )
    if config.train.head_lr not in (0, config.train.lr):
        raise ConfigError("--head-lr is for what is new above a checkpoint: lm has --lr alone")


_FOR_LABELS = {
    "data": ("second_column", "label_column"),
    "model": ("new_head", "encoder", "cased", "long"),
    "train": ("class_weights", "metric"),
}


def _begin_at_random(config: FinetuneConfig, train: Text, log: Log) -> tuple[Tokenizer, GPT]:
    """A small GPT, its pieces learnt from the text, as `pretrain` makes one."""
    options = config.model
    with LogReport(log) as report:
        tokenizer = Tokenizer.bpe(sample(train, report=report), options.vocab_size)
    log.say(f"tokenizer: {tokenizer.vocab_size:,} pieces, made from the training text")
    sizes = ModelConfig(
        n_layer=options.n_layer,
        n_head=options.n_head,
        n_embd=options.n_embd,
        dropout=options.dropout,
    )
    read = TrainConfig(context=options.max_length or CONTEXT)
    made = ARCHITECTURES["gpt"].sizes(PretrainConfig(model=sizes, train=read), tokenizer)
    return tokenizer, GPT(made)
