"""Fine-tuning for classify and pair: a label for a text, or for a pair of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinygrad_llm.data import files
from tinygrad_llm.data.labels import LabelSet
from tinygrad_llm.data.tables import Column, Table, lines_of, read_table
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.data.windows import TextWindows
from tinygrad_llm.finetune.config import FinetuneConfig, FinetuneModel
from tinygrad_llm.finetune.encoders import (
    check_max_length,
    learnt_tokenizer,
    model_folder,
    open_model,
    sentence_pooling,
    small_bert,
    tokenizer_of,
)
from tinygrad_llm.finetune.kind import Columns, Defaults, Fitted, Found, Rows, with_text
from tinygrad_llm.finetune.tables import (
    FIRSTS,
    LABELS,
    SECONDS,
    TEXTS,
    named,
    open_table,
    splits,
    title,
)
from tinygrad_llm.metrics.classification import majority
from tinygrad_llm.metrics.report import LabelReport, label_report
from tinygrad_llm.models.bert import BertConfig, BertForSequenceClassification, Pooling
from tinygrad_llm.models.lstm import LSTMConfig, LSTMForSequenceClassification
from tinygrad_llm.models.pretrained import read_config
from tinygrad_llm.tasks.classify import (
    ClassifyTask,
    Collator,
    Texts,
    hold_out,
    window_probabilities,
)
from tinygrad_llm.train.config import ConfigError
from tinygrad_llm.train.log import Log

Classifier = BertForSequenceClassification | LSTMForSequenceClassification

_MODELS: dict[str, Any] = {
    "bert": BertForSequenceClassification,
    "tinygrad-llm-lstm": LSTMForSequenceClassification,
}


@dataclass(frozen=True)
class Classification:
    """The kind of classify, and of pair."""

    pairs: bool = False

    @property
    def examples(self) -> str:
        """texts or pairs"""
        return "pairs" if self.pairs else "texts"

    @property
    def models(self) -> tuple[type, ...]:
        """The classifiers."""
        return tuple(_MODELS.values())

    def read(self, config: FinetuneConfig, log: Log) -> tuple[Texts, Texts]:
        """(training, validation)"""
        return splits(
            config,
            log,
            examples=self.examples,
            built_in=lambda table: self.texts_of(table, config),
            open_file=lambda path: self.texts_of(open_table(path, config), config),
            check=check_labels,
            hold_out=lambda data: hold_out(data, config.data.val_fraction, config.train.seed),
        )

    def texts_of(self, table: Table, config: FinetuneConfig) -> Texts:
        """The texts and labels in the columns that are named, or that are named as is usual."""
        data = config.data
        if data.second_column and not self.pairs:
            raise ConfigError("--second-column is for pairs of texts: tinygrad-llm finetune pair")
        text = data.text_column or self._text_column(table)
        second = data.second_column or self._second_column(table) if self.pairs else None
        place = 3 if self.pairs else 2
        label = data.label_column or named(table, LABELS, place, "label", "--label-column")
        return Texts.of(table, text, label, second)

    def _text_column(self, table: Table) -> Column:
        names = FIRSTS if self.pairs else TEXTS
        what = "first text" if self.pairs else "text"
        return named(table, names, 1, what, "--text-column")

    def _second_column(self, table: Table) -> Column:
        return named(table, SECONDS, 2, "second text", "--second-column")

    # --- the model --------------------------------------------------------------------------------

    def begin(self, config: FinetuneConfig, train: Texts, log: Log) -> tuple[Tokenizer, Classifier]:
        """(tokenizer, model): a checkpoint with a head for the labels, or a small one at random."""
        labels = LabelSet.of(train.labels)
        if config.model.checkpoint:
            return _begin_from(config.model, labels, log)
        return _begin_at_random(config.model, train, labels, log)

    def open(self, folder: Path) -> tuple[Tokenizer, Classifier]:
        """(tokenizer, model) as a checkpoint of a run holds them."""
        model = open_model(folder, self.models)
        return Tokenizer.from_file(folder), model

    def defaults(self, config: FinetuneConfig, model: Classifier) -> Defaults:
        """BERT's authors fine-tune at 2e-5 to 5e-5 a width of 768; a narrower one stands more.

        About in inverse proportion; what begins at random learns at the rates of pretraining.
        """
        if not isinstance(model.config, BertConfig):
            return Defaults(32, 2e-3)
        width = model.config.hidden_size
        return Defaults(32, 5e-5 * 768 / width if config.model.checkpoint else 1e-3 * 128 / width)

    def task(
        self,
        config: FinetuneConfig,
        train: Texts,
        validation: Texts,
        tokenizer: Tokenizer | None,
        model: Classifier,
    ) -> ClassifyTask:
        """What the trainer is given."""
        assert tokenizer is not None
        data, options = config.data, config.model
        labels = LabelSet(model.config.labels.values())
        balanced = config.train.class_weights == "balanced"
        return ClassifyTask(
            train,
            validation,
            labels,
            tokenizer,
            max_length=options.max_length,
            long=options.long,
            batch_size=config.train.batch_size,
            weights=labels.weights(train.labels) if balanced else None,
            metric=config.train.metric,
            segments=_segments(model.config),
            seed=config.data_seed,
            about={
                "task": config.task,
                "text_column": data.text_column,
                "second_column": data.second_column,
                "max_length": options.max_length,
                "long": options.long,
            },
        )

    def report(self, task: ClassifyTask, model: Classifier) -> LabelReport:
        """The scores beside those of the most frequent label."""
        return label_report(
            task.held_out.labels,
            task.predicted(model),
            name=title(task.held_out.name),
            usual=majority(task.train.labels),
            notes=task.notes,
        )

    # --- new texts --------------------------------------------------------------------------------

    def of_file(self, fitted: Fitted, path: str, columns: Columns) -> Rows:
        """A label for each row of a file; of plain text, for each line."""
        lines = None if self.pairs else plain_lines(path, columns)
        if lines is not None:
            return self.of_lines(fitted, lines)
        table = read_table(path, header=columns.header, quoted=columns.quoted)
        known = fitted.about
        text = columns.text or trained_on(table, known, "text_column")
        text = text or only_column(table, self.pairs) or self._text_column(table)
        seconds = None
        if self.pairs:
            second = columns.second or trained_on(table, known, "second_column")
            seconds = table.texts(second or self._second_column(table))
        found, notes = self._labelled(fitted, table.texts(text), seconds, table.lines)
        return found, [*table.notes, *notes]

    def of_lines(self, fitted: Fitted, lines: Sequence[str]) -> Rows:
        """A label for each line; of a pair with a tab between its texts."""
        numbers, texts = with_text(lines)
        if not self.pairs:
            return self._labelled(fitted, texts, None, numbers)
        pairs = [text.split("\t") for text in texts]
        wrong = next((i for i, pair in zip(numbers, pairs, strict=True) if len(pair) != 2), None)
        if wrong is not None:
            raise ValueError(f"line {wrong} must hold two texts with a tab between them")
        return self._labelled(fitted, [a for a, _ in pairs], [b for _, b in pairs], numbers)

    def _labelled(
        self,
        fitted: Fitted,
        texts: Sequence[str],
        seconds: Sequence[str] | None,
        lines: Sequence[int],
    ) -> Rows:
        assert fitted.tokenizer is not None
        config, about = fitted.model.config, fitted.about
        longest = getattr(config, "max_position_embeddings", 512)
        windows = TextWindows(
            fitted.tokenizer,
            texts,
            seconds,
            max_length=min(about.get("max_length", longest), longest),
            long=about.get("long", "cut"),
        )
        collate = Collator(fitted.tokenizer, _segments(config))
        probabilities = window_probabilities(fitted.model, windows, collate)
        names = list(config.labels.values())

        def found() -> Iterator[Found]:
            for i, row in enumerate(probabilities):
                said = {"text": texts[i]}
                if seconds is not None:
                    said = {"text1": texts[i], "text2": seconds[i]}
                shares = {n: round(float(p), 6) for n, p in zip(names, row, strict=True)}
                label = names[int(row.argmax())]
                yield {
                    "line": lines[i],
                    **said,
                    "label": label,
                    "probability": shares[label],
                    "probabilities": shares,
                }

        return found(), windows.notes


# --- training data --------------------------------------------------------------------------------


def check_labels(data: Texts) -> None:
    """Refuse what is no column of labels: one label for all, or nearly as many as texts."""
    labels = LabelSet.of(data.labels)
    why = ""
    if len(data) == 1:
        raise ValueError(
            f"{data.name} has a single row of data, {data.texts[0][:40]!r} with the label "
            f"{data.labels[0][:40]!r}: too few to learn from"
        )
    if len(labels) < 2:
        why = f"all texts have the label {labels.names[0]!r}, so there is nothing to learn"
    elif len(labels) > 100 and len(labels) > len(data) // 4:
        first = labels.names[0][:40]
        why = f"{len(labels):,} different labels among {len(data):,} texts, such as {first!r}"
    if why:
        raise ValueError(f"{data.name}: {why}; is it the right --label-column?")


# --- new data -------------------------------------------------------------------------------------


def plain_lines(path: str, columns: Columns) -> list[str] | None:
    """The lines of a .txt file in which nothing looks like columns; None of any other."""
    file = Path(path).expanduser()
    if file.suffix.lower() != ".txt" or not file.is_file() or columns.text:
        return None
    lines = lines_of(files.decode(file.read_bytes(), repr(path)))
    return None if any("\t" in line for line in lines) else lines


def trained_on(table: Table, about: Mapping[str, Any], key: str) -> Column:
    """The column that was trained on, where the table has one of that name; otherwise ''."""
    known = str(about.get(key) or "")
    return known if known in table.columns else ""


def only_column(table: Table, pairs: bool = False) -> Column:
    """The one of a table that has no other; otherwise ''."""
    return table.columns[0] if len(table.columns) == 1 and not pairs else ""


# --- models ---------------------------------------------------------------------------------------


def _begin_at_random(
    options: FinetuneModel, train: Texts, labels: LabelSet, log: Log
) -> tuple[Tokenizer, Classifier]:
    tokenizer = learnt_tokenizer([train.texts, train.seconds or []], options, log)
    head: dict[str, Any] = {"num_labels": len(labels), "id2label": dict(enumerate(labels.names))}
    if options.encoder == "bert":
        # From few examples a network at random learns to compare only where that is easy to see.
        usual = "cls" if train.seconds is None else "compare"
        head["classifier_pooling"] = usual if options.pooling == "auto" else options.pooling
        sizes = small_bert(options, tokenizer.vocab_size, **head)
        return tokenizer, BertForSequenceClassification(sizes)
    if options.pooling == "cls":
        raise ConfigError("--pooling cls is for a bert: a bilstm takes mean, or compare for pairs")
    compare = train.seconds is not None and options.pooling != "mean"
    sizes = LSTMConfig(
        vocab_size=tokenizer.vocab_size,
        n_positions=options.max_length,
        n_embd=options.n_embd,
        n_hidden=options.n_embd,
        n_layer=options.n_layer,
        dropout=options.dropout,
        tie_word_embeddings=False,
        bidirectional=True,
        pooling="mean" if options.pooling == "mean" else "max",
        compare=compare,
        # Where words are compared they must differ from the first step on.
        initializer_range=0.5 if compare else 0.1,
        **head,
    )
    return tokenizer, LSTMForSequenceClassification(sizes)


def _begin_from(options: FinetuneModel, labels: LabelSet, log: Log) -> tuple[Tokenizer, Classifier]:
    """The checkpoint with a head for these labels: its own where it has one for them."""
    folder = model_folder(options.checkpoint)
    found: dict[str, Any] = read_config(folder, dict)
    kind = _MODELS.get(str(found.get("model_type")))
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
    head: dict[str, Any] = {"num_labels": len(labels), "id2label": dict(enumerate(labels.names))}
    if kind is BertForSequenceClassification and (pooling := _pooling(options, folder)):
        head["classifier_pooling"] = pooling
    model, loaded = kind.load(folder, np.float32, ignore_mismatched_sizes=True, **head)
    if has_head and options.new_head:
        for name, parameter in model.named_parameters():
            if name.startswith("classifier."):
                model.init_parameter(name, parameter)
    if loaded.new:
        log.say(f"{options.checkpoint}: new at random: {', '.join(loaded.new)}")
    tokenizer = tokenizer_of(folder, model.config.vocab_size)
    longest = getattr(model.config, "max_position_embeddings", options.max_length)
    advice = ", and --long windows to read all"
    check_max_length(options.max_length, options.checkpoint, longest, advice)
    return tokenizer, model


def _segments(config: BertConfig | LSTMConfig) -> int:
    """How many texts the model tells apart."""
    if isinstance(config, BertConfig):
        return config.type_vocab_size
    return 2 if config.compare else 1


def _pooling(options: FinetuneModel, folder: Path) -> Pooling | None:
    """As asked; None: as the checkpoint's config says, where it does not embed sentences."""
    if options.pooling != "auto":
        return options.pooling
    return sentence_pooling(folder)


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
