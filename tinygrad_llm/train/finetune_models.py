"""The model of a fine-tuning run: a checkpoint with a head for the labels, or a small new one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tinygrad_llm.data.conll import Sentences
from tinygrad_llm.data.labels import LabelSet
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.models import hub
from tinygrad_llm.models.bert import BertConfig, BertForSequenceClassification
from tinygrad_llm.models.lstm import LSTMConfig, LSTMForSequenceClassification
from tinygrad_llm.models.pretrained import check_vocabulary, read_config
from tinygrad_llm.models.seq2seq import Seq2Seq
from tinygrad_llm.models.tagger import Tagger
from tinygrad_llm.tasks.tag import tagger_config
from tinygrad_llm.train.config import ConfigError
from tinygrad_llm.train.finetune_config import (
    FinetuneConfig,
    FinetuneModel,
)
from tinygrad_llm.train.finetune_translate import begin_translation
from tinygrad_llm.train.log import Log
from tinygrad_llm.train.run import find_checkpoint

Network = BertForSequenceClassification | LSTMForSequenceClassification | Tagger | Seq2Seq


def begin(config: FinetuneConfig, train: Any, log: Log) -> tuple[Tokenizer | None, Network]:
    """(tokenizer, model): from the checkpoint, or at random."""
    if config.task == "tag":
        return _begin_tagger(config, train, log)
    if config.task == "translate":
        return _begin_seq2seq(config, train, log)
    labels = LabelSet.of(train.labels)
    if config.model.checkpoint:
        return _begin_from(config.model, labels, log)
    columns = [train.texts, *([] if train.seconds is None else [train.seconds])]
    options = config.model
    tokenizer = Tokenizer.wordpiece(
        (text for column in columns for text in column), options.vocab_size, cased=options.cased
    )
    named: dict[str, Any] = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels.names)),
        "vocab_size": tokenizer.vocab_size,
    }
    log.say(f"tokenizer: {tokenizer.vocab_size:,} pieces, made from the training texts")
    if options.encoder == "bilstm":
        sizes = LSTMConfig(
            n_positions=options.max_length,
            n_embd=options.n_embd,
            n_hidden=options.n_embd,
            n_layer=options.n_layer,
            dropout=options.dropout,
            tie_word_embeddings=False,
            bidirectional=True,
            **named,
        )
        return tokenizer, LSTMForSequenceClassification(sizes)
    sizes = BertConfig(
        hidden_size=options.n_embd,
        num_hidden_layers=options.n_layer,
        num_attention_heads=options.n_head,
        intermediate_size=4 * options.n_embd,
        hidden_dropout_prob=options.dropout,
        attention_probs_dropout_prob=options.dropout,
        max_position_embeddings=options.max_length,
        # BERT's 0.02 is for its width of 768; a narrower layer needs larger weights to say as much.
        initializer_range=0.02 * math.sqrt(768 / options.n_embd),
        **named,
    )
    return tokenizer, BertForSequenceClassification(sizes)


# --- from a checkpoint ----------------------------------------------------------------------------


def _begin_seq2seq(config: FinetuneConfig, train: Any, log: Log) -> tuple[Tokenizer, Seq2Seq]:
    options = config.model
    if not options.checkpoint:
        return begin_translation(config, train, log)
    folder = model_folder(options.checkpoint)
    found: dict[str, Any] = read_config(folder, dict)
    if found.get("model_type") != "tinygrad-llm-seq2seq":
        raise ConfigError(
            f"{options.checkpoint} is a model of type {found.get('model_type')!r}: to translate, "
            "expected a run of `tinygrad-llm finetune translate`"
        )
    model, tokenizer = Seq2Seq.from_pretrained(folder), Tokenizer.from_file(folder)
    check_vocabulary(tokenizer.vocab_size, model.config.vocab_size)
    if options.max_length > model.config.max_position_embeddings:
        raise ConfigError(
            f"model.max_length is {options.max_length}, but {options.checkpoint} reads at most "
            f"{model.config.max_position_embeddings} pieces"
        )
    return tokenizer, model


_HEADS: dict[str, Any] = {
    "bert": BertForSequenceClassification,
    "tinygrad-llm-lstm": LSTMForSequenceClassification,
}


def _begin_from(
    options: FinetuneModel, labels: LabelSet, log: Log
) -> tuple[Tokenizer, BertForSequenceClassification | LSTMForSequenceClassification]:
    """The checkpoint with a head for these labels: its own where it has one for them."""
    folder = model_folder(options.checkpoint)
    found: dict[str, Any] = read_config(folder, dict)
    kind = _HEADS.get(str(found.get("model_type")))
    if kind is None:
        raise ConfigError(
            f"{options.checkpoint} is a model of type {found.get('model_type')!r}: to label texts, "
            "expected a BERT or an LSTM classifier"
        )
    has_head = (found.get("architectures") or [None])[0] == kind.architecture
    if kind is LSTMForSequenceClassification and not has_head:
        raise ConfigError(f"{options.checkpoint} is an LSTM without a classifier: expected a BERT")
    if has_head and not options.new_head:
        labels = _labels_of_head(options.checkpoint, kind, found, labels)
    named = {"num_labels": len(labels), "id2label": dict(enumerate(labels.names))}
    model, loaded = kind.load(folder, np.float32, ignore_mismatched_sizes=True, **named)
    if has_head and options.new_head:
        for name, parameter in model.named_parameters():
            if name.startswith("classifier."):
                model.init_parameter(name, parameter)
    if loaded.new:
        log.say(f"{options.checkpoint}: new at random: {', '.join(loaded.new)}")
    tokenizer = Tokenizer.from_file(folder)
    check_vocabulary(tokenizer.vocab_size, model.config.vocab_size)
    longest = getattr(model.config, "max_position_embeddings", options.max_length)
    if options.max_length > longest:
        raise ConfigError(
            f"model.max_length is {options.max_length}, but {options.checkpoint} reads at most "
            f"{longest} pieces at once: give --max-length {longest}, and --long windows to read all"
        )
    return tokenizer, model


def _labels_of_head(name: str, kind: Any, found: Mapping[str, Any], labels: LabelSet) -> LabelSet:
    """The labels in the order of the head; ConfigError where it is for others."""
    own = LabelSet(kind.config_class.from_dict(found).labels.values())
    if set(own.names) != set(labels.names):
        theirs, ours = (", ".join(map(repr, some.names[:6])) for some in (own, labels))
        raise ConfigError(
            f"{name} has a head for the {len(own)} labels {theirs}, the data has {len(labels)}: "
            f"{ours}; give --new-head to begin one anew"
        )
    return own


def model_folder(name: str) -> Path:
    """The folder of a model: of a run its best checkpoint; or a name on the hub, fetched."""
    return find_checkpoint(name) if Path(name).expanduser().exists() else hub.find(name)


# --- taggers --------------------------------------------------------------------------------------


def _begin_tagger(
    config: FinetuneConfig, train: Sentences, log: Log
) -> tuple[Tokenizer | None, Tagger]:
    options = config.model
    if config.train.class_weights != "none":
        raise ConfigError("--class-weights is for texts and pairs of texts, not for tag")
    if not options.checkpoint:
        log.say("model: a BiLSTM-CRF over words, characters and word shapes, at random")
        sizes = tagger_config(
            train,
            scheme=_scheme(train),
            hidden_size=options.n_embd,
            num_layers=options.n_layer,
            dropout=options.dropout,
        )
        return None, Tagger(sizes)
    folder = model_folder(options.checkpoint)
    found: dict[str, Any] = read_config(folder, dict)
    if found.get("model_type", "bert") != "bert":
        raise ConfigError(
            f"{options.checkpoint} is a model of type {found.get('model_type')!r}: to tag words, "
            "expected a BERT"
        )
    bert = replace(read_config(folder, BertConfig.from_dict), attention_probs_dropout_prob=0.0)
    sizes = tagger_config(train, scheme=_scheme(train), bert=bert)
    tokenizer = Tokenizer.from_file(folder)
    check_vocabulary(tokenizer.vocab_size, bert.vocab_size)
    return tokenizer, Tagger.from_checkpoint(folder, sizes)


def _scheme(train: Sentences) -> Any:
    """BIOES is learnt where entities are marked: ends and single words are told apart."""
    tags = {tag for tags in train.tags or [] for tag in tags}
    return "BIOES" if any("-" in tag for tag in tags) else None


# --- what a run left ------------------------------------------------------------------------------


def open_folder(folder: Path) -> tuple[Tokenizer | None, Any]:
    """(tokenizer, model) as a checkpoint of a run holds them."""
    from tinygrad_llm.models import auto

    kind = auto.class_of(folder)
    if kind not in (*_HEADS.values(), Tagger, Seq2Seq):
        raise ConfigError(
            f"{folder} holds a {kind.__name__}, which labels nothing: expected what "
            "`tinygrad-llm finetune` leaves behind"
        )
    model = kind.from_pretrained(folder)
    needs_none = isinstance(model, Tagger) and model.config.encoder == "bilstm"
    return None if needs_none else Tokenizer.from_file(folder), model
