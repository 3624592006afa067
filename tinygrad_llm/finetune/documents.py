"""Texts of a run that learns from nothing but text: files, corpora, and columns of tables.

book.txt  books/  'notes/*.md'  web.jsonl  web.jsonl:body  python-docs  https://…
                        as `pretrain` reads them, see `data.files` and `data.corpora`
reviews.csv  posts.tsv  each row a document, in the column that --text-column names
"""

from __future__ import annotations

from pathlib import Path

from tinygrad_llm.data import END_OF_TEXT, builtin, download
from tinygrad_llm.data.corpora import Corpus
from tinygrad_llm.data.report import Report
from tinygrad_llm.data.tables import Column, Table
from tinygrad_llm.data.texts import Text, open_text
from tinygrad_llm.finetune.config import BUILTIN, FinetuneConfig
from tinygrad_llm.finetune.tables import TEXTS, named, open_table
from tinygrad_llm.train.config import ConfigError
from tinygrad_llm.train.log import Log
from tinygrad_llm.train.progress import LogReport


def texts_of(config: FinetuneConfig, log: Log) -> tuple[Text, Text | None]:
    """(training, validation); None where a part of the one text is to be held out.

    Raises ValueError or FileNotFoundError, with one sentence, where a text cannot be read.
    """
    data = config.data
    if data.source == BUILTIN:
        return _built_in(config, log)
    with LogReport(log) as report:
        train = open_documents(data.source, config, report)
        _tell("text", train, log)
        if not data.val_source:
            return train, None
        validation = open_documents(data.val_source, config, report)
        _tell("text to validate with", validation, log)
    if validation.sha256 == train.sha256:
        raise ConfigError(
            f"--val-data {data.val_source} is the text that is trained on: name another, or leave "
            "it out to hold out a part"
        )
    return train, validation


def _tell(what: str, text: Text, log: Log) -> None:
    log.say(f"{what}: {text.name}, {text.characters:,} characters, sha256 {text.sha256[:12]}")


def _built_in(config: FinetuneConfig, log: Log) -> tuple[Text, Text]:
    if config.data.val_source:
        raise ConfigError("built-in data has its own validation: leave out --val-data")
    _refuse_columns(config, "the built-in texts")
    found = builtin.load(config.task)
    log.say(f"data: {found.about} (sha256 {found.sha256[:12]})")
    assert isinstance(found.train, Table)
    assert isinstance(found.validation, Table)
    return _corpus(found.train, "text"), _corpus(found.validation, "text")


def open_documents(source: str, config: FinetuneConfig, report: Report) -> Text:
    """The documents of a source: the rows of a table, or whatever `open_text` finds."""
    asked, suffix = config.data.text_column, Path(source).suffix.lower()
    if suffix == ".jsonl":
        _refuse_columns(config, f"{source!r}, which is JSONL", text_column=True)
        return open_text(f"{source}:{asked}" if asked else source, report)
    columns = asked or (config.data.header, config.data.quoted) != ("auto", "auto")
    if suffix in _ROWS and download.find(source) is not None:
        raise ConfigError(f"{source} is a table on the network: download it, and give the file")
    if suffix in _ROWS or (columns and suffix == ".txt"):
        table = open_table(source, config)
        column = asked or _column(table)
        for note in table.take(column).notes:
            report.say(f"note: {note}")
        return _corpus(table, column)
    _refuse_columns(config, f"{source!r}, which is read as plain text")
    return open_text(source, report)


_ROWS = frozenset((".csv", ".tsv", ".tab", ".ndjson"))


def _refuse_columns(config: FinetuneConfig, what: str, text_column: bool = False) -> None:
    """ConfigError for a flag about columns where there are none."""
    data = config.data
    given = {
        "--text-column": bool(data.text_column) and not text_column,
        "--header": data.header != "auto",
        "--quoted": data.quoted != "auto",
    }
    for flag, there in given.items():
        if there:
            raise ConfigError(f"{flag} is for columns of CSV and TSV, not for {what}: leave it out")


def _column(table: Table) -> Column:
    """The only column, or the one that is called as texts usually are."""
    if len(table.columns) == 1:
        return table.columns[0]
    return named(table, TEXTS, 1, "text", "--text-column")


def _corpus(table: Table, column: Column) -> Corpus:
    """A row is a document, or several where it has `<|endoftext|>` in it."""
    rows = table.take(column).texts(1)
    pieces = (piece for row in rows for piece in row.split(END_OF_TEXT))
    return Corpus(table.name.strip("'"), [piece for piece in pieces if piece.strip()])
