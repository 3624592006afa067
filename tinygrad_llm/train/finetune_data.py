"""The labelled data of a fine-tuning run: built in, or columns of files; what is held out of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinygrad_llm.data import builtin
from tinygrad_llm.data.conll import Sentences, read_sentences
from tinygrad_llm.data.labels import LabelSet
from tinygrad_llm.data.loader import shuffled
from tinygrad_llm.data.tables import Column, Table, counted, read_table
from tinygrad_llm.tasks.classify import (
    Texts,
    hold_out,
)
from tinygrad_llm.train.config import ConfigError
from tinygrad_llm.train.finetune_config import (
    BUILTIN,
    FinetuneConfig,
    YesNo,
)
from tinygrad_llm.train.log import Log


def read(config: FinetuneConfig, log: Log) -> tuple[Any, Any]:
    """(training, validation): `Texts`, or for tag `Sentences`.

    Raises ValueError or OSError, with one sentence, for a file or a column that cannot be used.
    """
    data = config.data
    if data.source == BUILTIN:
        if data.val_source:
            raise ConfigError("built-in data has its own validation: leave out --val-data")
        found = builtin.load(config.task)
        log.say(f"data: {found.about} (sha256 {found.sha256[:12]})")
        train, validation = found.train, found.validation
        if isinstance(train, Table) and isinstance(validation, Table):
            train, validation = (texts_of(table, config) for table in (train, validation))
    else:
        opened = _open_sentences if config.task == "tag" else _open_texts
        train, validation = opened(data.source, config), None
        if isinstance(train, Texts) and config.task != "translate":
            _check_labels(train)
        if data.val_source:
            validation = opened(data.val_source, config)
        elif isinstance(train, Texts):
            by_first = config.task == "translate"  # one source may have several targets
            train, validation = hold_out(
                train, data.val_fraction, config.train.seed, by_first=by_first
            )
        else:
            train, validation = _hold_out(train, data.val_fraction, config.train.seed)
    what = {"classify": "texts", "tag": "sentences"}.get(config.task, "pairs")
    log.say(f"data: {len(train):,} {what} to train on, {len(validation):,} to validate with")
    return train, validation


# --- columns of text ------------------------------------------------------------------------------


def _open_texts(path: str, config: FinetuneConfig) -> Texts:
    return texts_of(
        read_table(path, header=_flag(config.data.header), quoted=_quoted(config)), config
    )


def _check_labels(data: Texts) -> None:
    """Refuse what is no column of labels: one label for all, or nearly as many as texts."""
    labels = LabelSet.of(data.labels)
    why = ""
    if len(labels) < 2:
        why = f"all texts have the label {labels.names[0]!r}, so there is nothing to learn"
    elif len(labels) > 100 and len(labels) > len(data) // 4:
        first = labels.names[0][:40]
        why = f"{len(labels):,} different labels among {len(data):,} texts, such as {first!r}"
    if why:
        raise ValueError(f"{data.name}: {why}; is it the right --label-column?")


def _flag(value: YesNo) -> bool | None:
    return {"auto": None, "yes": True, "no": False}[value]


def _quoted(config: FinetuneConfig) -> bool | None:
    return _flag(config.data.quoted)


def texts_of(table: Table, config: FinetuneConfig) -> Texts:
    """The texts and labels in the columns that are named, or that are named as is usual."""
    data = config.data
    if config.task == "translate":
        return _translations(table, config)
    pair = config.task == "pair"
    if data.second_column and not pair:
        raise ConfigError("--second-column is for pairs of texts: tinygrad-llm finetune pair")
    text = data.text_column or text_column(table, pair)
    second = None
    if pair:
        second = data.second_column or _named(table, _SECONDS, 2, "second text", "--second-column")
    place = 3 if pair else 2
    label = data.label_column or _named(table, _LABELS, place, "label", "--label-column")
    return Texts.of(table, text, label, second)


def _translations(table: Table, config: FinetuneConfig) -> Texts:
    """The texts are sources, the seconds targets; labels there are none."""
    data = config.data
    if data.label_column:
        raise ConfigError("--label-column is not for translate: name --second-column, the target")
    source = data.text_column or _named(table, _SOURCES, 1, "source", "--text-column")
    target = data.second_column or _named(table, _TARGETS, 2, "target", "--second-column")
    taken = table.take(source, target)
    sources, targets = ([row[i] for row in taken.rows] for i in (0, 1))
    return Texts(table.name, sources, targets, [""] * len(taken), taken.lines, taken.notes)


_SOURCES = ("source", "src", "text", "input")
_TARGETS = ("target", "tgt", "translation", "output")
_TEXTS = ("text", "sentence", "text1", "sentence1", "premise", "review", "content", "document")
_FIRSTS = ("text1", "sentence1", "premise", "question1", "text_a", "text", "sentence")
_SECONDS = ("text2", "sentence2", "hypothesis", "question2", "text_b")
_LABELS = ("label", "labels", "class", "category", "target", "sentiment", "quality")


def text_column(table: Table, pair: bool = False) -> Column:
    """The column of the (first) text where none is named."""
    names = _FIRSTS if pair else _TEXTS
    what = "first text" if pair else "text"
    return _named(table, names, 1, what, "--text-column")


def second_column(table: Table) -> Column:
    """The column of the second text where none is named."""
    return _named(table, _SECONDS, 2, "second text", "--second-column")


def _named(table: Table, names: Sequence[str], place: int, what: str, flag: str) -> Column:
    """The first of the usual names; without a header the place, where the columns are so many."""
    lower = {name.lower(): name for name in reversed(table.columns)}
    found = next((lower[name] for name in names if name in lower), None)
    if found is not None:
        return found
    if not table.has_header and place <= len(table.columns) <= 3:
        return place
    have = ", ".join(map(repr, table.columns[:12]))
    raise ValueError(
        f"{table.name}: which column is the {what}? Name it with {flag}; it has {have}"
    )


# --- tagged sentences -----------------------------------------------------------------------------


def _open_sentences(path: str, config: FinetuneConfig) -> Sentences:
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


def _hold_out(data: Sentences, share: float, seed: int) -> tuple[Sentences, Sentences]:
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
