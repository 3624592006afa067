"""Fine-tuning for tag: a label for each word of a sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinygrad_llm.data.conll import Sentences, read_sentences
from tinygrad_llm.data.labels import spans
from tinygrad_llm.data.loader import shuffled
from tinygrad_llm.data.tables import Column, counted
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.finetune.config import FinetuneConfig
from tinygrad_llm.finetune.encoders import model_folder, open_model, tokenizer_of
from tinygrad_llm.finetune.kind import Columns, Defaults, Fitted, Found, Rows, with_text
from tinygrad_llm.finetune.tables import splits, title
from tinygrad_llm.metrics.classification import majority, usual_tags
from tinygrad_llm.metrics.report import TagReport, tag_report
from tinygrad_llm.models.bert import BertConfig
from tinygrad_llm.models.pretrained import read_config
from tinygrad_llm.models.tagger import Tagger
from tinygrad_llm.tasks import tag
from tinygrad_llm.tasks.classify import TASK_FILE
from tinygrad_llm.tasks.tag import TagTask, tagger_config
from tinygrad_llm.train.config import ConfigError
from tinygrad_llm.train.log import Log


@dataclass(frozen=True)
class Tagging:
    """The kind of tag."""

    examples: str = "sentences"
    models: tuple[type, ...] = (Tagger,)

    def read(self, config: FinetuneConfig, log: Log) -> tuple[Sentences, Sentences]:
        """(training, validation)"""
        return splits(
            config,
            log,
            examples=self.examples,
            built_in=lambda sentences: sentences,
            open_file=lambda path: open_sentences(path, config),
            check=lambda sentences: None,
            hold_out=lambda data: hold_out(data, config.data.val_fraction, config.train.seed),
        )

    # --- the model --------------------------------------------------------------------------------

    def begin(
        self, config: FinetuneConfig, train: Sentences, log: Log
    ) -> tuple[Tokenizer | None, Tagger]:
        """(tokenizer, model): above a checkpoint, or a BiLSTM-CRF at random, which needs none."""
        options = config.model
        if config.train.class_weights != "none":
            raise ConfigError("--class-weights is for texts and pairs of texts, not for tag")
        if options.checkpoint:
            return _begin_from(options.checkpoint, train)
        log.say("model: a BiLSTM-CRF over words, characters and word shapes, at random")
        sizes = tagger_config(
            train,
            scheme=learnt_scheme(train),
            hidden_size=options.n_embd,
            num_layers=options.n_layer,
            dropout=options.dropout,
        )
        return None, Tagger(sizes)

    def open(self, folder: Path) -> tuple[Tokenizer | None, Tagger]:
        """(tokenizer, model) as a checkpoint of a run holds them."""
        model = open_model(folder, self.models)
        return None if model.bert is None else Tokenizer.from_file(folder), model

    def defaults(self, config: FinetuneConfig, model: Tagger) -> Defaults:
        """Those of benchmarks/ner.py; a narrow checkpoint stands a higher rate than a wide one."""
        bert = model.config.bert
        if bert is None:
            return Defaults(16, 3e-3)
        if not config.model.checkpoint:
            return Defaults(16, 1e-3 * 128 / bert.hidden_size)
        lr = float(f"{1e-4 * 768 / bert.hidden_size:.2g}")
        return Defaults(4, lr, 5 * lr)

    def task(
        self,
        config: FinetuneConfig,
        train: Sentences,
        validation: Sentences,
        tokenizer: Tokenizer | None,
        model: Tagger,
    ) -> TagTask:
        """What the trainer is given."""
        size = config.train.batch_size
        task = _Tagging(
            model.config, train, validation, tokenizer, batch_size=size, seed=config.data_seed
        )
        task.about = {
            "task": config.task,
            "text_column": config.data.text_column,
            "second_column": "",
            "scheme": task.tag_scheme,
        }
        return task

    def report(self, task: TagTask, model: Tagger) -> TagReport:
        """The scores beside those of the most frequent tag, and of the usual tag of each word."""
        usual = majority([tag for tags in task.train_tags for tag in tags])
        known = usual_tags(task.train.words, task.train_tags, task.held_out.words, otherwise=usual)
        return tag_report(
            task.val_tags,
            task.scored(model)[1],
            name=title(task.held_out.name),
            usual=usual,
            baselines={"the word's usual tag": known},
            entities=task.tag_scheme != "plain",
            notes=task.notes,
        )

    # --- new sentences ----------------------------------------------------------------------------

    def of_file(self, fitted: Fitted, path: str, columns: Columns) -> Rows:
        """Tags for each sentence of a file."""
        words = _column(columns.text)
        header = bool(columns.header)
        return _tagged(fitted, read_sentences(path, words, tagged=False, header=header))

    def of_lines(self, fitted: Fitted, lines: Sequence[str]) -> Rows:
        """Tags for each line: words with blanks between."""
        numbers, texts = with_text(lines)
        words = [text.split() for text in texts]
        return _tagged(
            fitted, Sentences("the lines", words, None, numbers, list(range(len(words))))
        )


class _Tagging(TagTask):
    """With task.json beside the checkpoint."""

    about: dict[str, Any]

    def save(self, folder: Path) -> None:
        super().save(folder)
        text = json.dumps(self.about, indent=2, ensure_ascii=False) + "\n"
        (folder / TASK_FILE).write_text(text, encoding="utf-8")


def _tagged(fitted: Fitted, sentences: Sentences) -> Rows:
    tags, notes = tag.predict(
        fitted.model,
        fitted.tokenizer,
        sentences.words,
        tag.documents_of(sentences),
        scheme=fitted.about.get("scheme"),
    )
    marks = fitted.model.config.scheme != "plain"

    def found() -> Iterator[Found]:
        for line, words, its in zip(sentences.lines, sentences.words, tags, strict=True):
            entities = [
                {
                    "type": span.type,
                    "start": span.start,
                    "stop": span.stop,
                    "text": " ".join(words[span.start : span.stop]),
                }
                for span in (spans(its) if marks else [])
            ]
            yield {"line": line, "words": words, "tags": its, "spans": entities}

    return found(), [*sentences.notes, *notes]


# --- a checkpoint below ---------------------------------------------------------------------------


def _begin_from(checkpoint: str, train: Sentences) -> tuple[Tokenizer, Tagger]:
    folder = model_folder(checkpoint)
    found: dict[str, Any] = read_config(folder, dict)
    if found.get("model_type", "bert") != "bert":
        raise ConfigError(
            f"{checkpoint} is a model of type {found.get('model_type')!r}: to tag words, expected "
            "a BERT"
        )
    bert = read_config(folder, BertConfig.from_dict)
    sizes = tagger_config(train, scheme=learnt_scheme(train), bert=bert)
    return tokenizer_of(folder, bert.vocab_size), Tagger.from_checkpoint(folder, sizes)


def learnt_scheme(train: Sentences) -> Any:
    """BIOES is learnt where entities are marked: ends and single words are told apart."""
    tags = {tag for tags in train.tags or [] for tag in tags}
    return "BIOES" if any("-" in tag for tag in tags) else None


# --- training data --------------------------------------------------------------------------------


def open_sentences(path: str, config: FinetuneConfig) -> Sentences:
    """The tagged sentences of a file, read as the configuration says."""
    data = config.data
    if data.second_column:
        raise ConfigError("--second-column is for pairs of texts: tinygrad-llm finetune pair")
    return read_sentences(
        path,
        _column(data.text_column),
        _column(data.label_column),
        header=data.header == "yes",
    )


def _column(name: str) -> Column | None:
    """None where there is no name; a number where it is one."""
    if not name:
        return None
    return int(name) if name.removeprefix("-").isdecimal() else name


def hold_out(data: Sentences, share: float, seed: int) -> tuple[Sentences, Sentences]:
    """Whole documents, or where there is only one its sentences, at random."""
    groups: dict[int, list[int]] = {}
    several = len(set(data.documents)) > 1
    for i, document in enumerate(data.documents):
        groups.setdefault(document if several else i, []).append(i)
    numbers = list(groups)
    held: list[int] = []
    for g in shuffled(np.arange(len(numbers)), len(numbers), seed, 0).tolist():
        if len(held) >= share * len(data):
            break
        held += groups[numbers[g]]
    kept = sorted(set(range(len(data))) - set(held))
    if not held or not kept:
        raise ValueError(
            f"{data.name}: {counted(len(data), 'sentence')} are too few to hold some out for "
            "validation: name a file for it (--val-data)"
        )

    def take(which: list[int], name: str, notes: list[str]) -> Sentences:
        assert data.tags is not None
        columns = (data.words, data.tags, data.lines, data.documents)
        words, tags, lines, documents = ([column[i] for i in which] for column in columns)
        return Sentences(name, words, tags, lines, documents, notes)  # pyright: ignore[reportArgumentType]

    held_name = f"{data.name}, held out"
    return take(kept, data.name, data.notes), take(sorted(held), held_name, [])
