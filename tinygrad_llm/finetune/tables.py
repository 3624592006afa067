"""Files of a fine-tuning run: training and validation, and which column is what."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from tinygrad_llm.data import builtin
from tinygrad_llm.data.tables import Column, Table, read_table
from tinygrad_llm.finetune.config import BUILTIN, FinetuneConfig, YesNo
from tinygrad_llm.train.config import ConfigError
from tinygrad_llm.train.log import Log


def splits(
    config: FinetuneConfig,
    log: Log,
    *,
    examples: str,
    built_in: Callable[[Any], Any],
    open_file: Callable[[str], Any],
    check: Callable[[Any], None],
    hold_out: Callable[[Any], tuple[Any, Any]],
) -> tuple[Any, Any]:
    """(training, validation): built in, of two files, or of one of which a part is held out.

    built_in: makes examples of a built-in `Table` or `Sentences`. check: refuses training data of a
    file that cannot be what is meant, before any of it is held out.
    """
    data = config.data
    if data.source == BUILTIN:
        if data.val_source:
            raise ConfigError("built-in data has its own validation: leave out --val-data")
        found = builtin.load(config.task)
        log.say(f"data: {found.about} (sha256 {found.sha256[:12]})")
        train, validation = built_in(found.train), built_in(found.validation)
    else:
        train = open_file(data.source)
        check(train)
        if data.val_source:
            validation = open_file(data.val_source)
        else:
            train, validation = hold_out(train)
    log.say(f"data: {len(train):,} {examples} to train on, {len(validation):,} to validate with")
    return train, validation


def open_table(path: str, config: FinetuneConfig) -> Table:
    """The file as rows, read as the configuration says."""
    return read_table(path, header=flag(config.data.header), quoted=flag(config.data.quoted))


def flag(value: YesNo) -> bool | None:
    """What the reader of tables is told; None: what it looks like."""
    return {"auto": None, "yes": True, "no": False}[value]


def title(name: str) -> str:
    """The name without its quotes, for a headline: "'a.tsv', held out" -> "a.tsv, held out"."""
    return re.sub(r"^'(.*)'(?=$|, held out$)", r"\1", name)


# --- which column is what -------------------------------------------------------------------------

TEXTS = ("text", "sentence", "text1", "sentence1", "premise", "review", "content", "document")
FIRSTS = ("text1", "sentence1", "premise", "question1", "text_a", "text", "sentence")
SECONDS = ("text2", "sentence2", "hypothesis", "question2", "text_b")
LABELS = ("label", "labels", "class", "category", "target", "sentiment", "quality")
SOURCES = ("source", "src", "text", "input")
TARGETS = ("target", "tgt", "translation", "output")


def named(table: Table, names: Sequence[str], place: int, what: str, flag: str) -> Column:
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
