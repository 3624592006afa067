"""Tagged sentences: CoNLL columns, a word per line and a blank line between sentences, or JSONL.

    EU NNP B-NP B-ORG            columns between blanks; where the first line has a tab, between
    rejects VBZ B-VP O           tabs, each exactly one
                                 a blank line ends the sentence
    -DOCSTART- -X- -X- O         a new document begins: not a word

In JSONL a line is a sentence: {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from tinygrad_llm.data import files
from tinygrad_llm.data.tables import Column, Table, counted, lines_of, read_table

DOCUMENT = "-DOCSTART-"


@dataclass(frozen=True)
class Sentences:
    """words[i][j] is word j of sentence i, tags[i][j] its tag; the sentence began in `lines[i]`.

    documents[i] numbers the documents from 0: sentences of the same one stand together. `tags` is
    None where no column of them was asked for.
    """

    name: str
    words: list[list[str]]
    tags: list[list[str]] | None
    lines: list[int]
    documents: list[int]
    notes: list[str] = field(default_factory=list)  # what a user should know of how it was read

    def __len__(self) -> int:
        return len(self.words)

    @property
    def tokens(self) -> int:
        """How many words there are in all."""
        return sum(map(len, self.words))


def read_sentences(
    path: str | PathLike[str],
    words: Column | None = None,
    tags: Column | None = None,
    *,
    tagged: bool = True,
    header: bool = False,
) -> Sentences:
    """The sentences of a file of CoNLL columns or JSONL.

    words, tags: the columns, by number from 1 (−1 is the last), or by name where `header` says that
    the first line has names. None: the first and the last; in JSONL `tokens` (or `words`) and
    `tags` (or `labels`, `ner_tags`). tagged: False leaves the tags unread, for prediction.

    Sentences of zero length (a blank line after a blank line, an empty list) are left out and
    counted in `notes`. Raises FileNotFoundError where there is no such file; ValueError, with the
    line, where it is not UTF-8, a line has more or fewer columns than the first, a word or tag is
    empty, or there are not as many tags as words.
    """
    file = Path(path).expanduser()
    if file.suffix.lower() in (".jsonl", ".ndjson"):
        return _from_table(read_table(path), words, tags, tagged)
    name = repr(str(path))
    if not file.is_file():
        raise FileNotFoundError(
            f"{name} is a folder: expected one file" if file.is_dir() else f"no file {name}"
        )
    lines = lines_of(files.decode(file.read_bytes(), name))
    return _Reader(name, lines, header).read(
        1 if words is None else words, (-1 if tags is None else tags) if tagged else None
    )


# CoNLL-U's remarks, such as '# sent_id = 7': only where the columns stand between tabs.
_REMARK = re.compile(r"#( [^\t]*)?")


class _Reader:
    """Lines → sentences."""

    def __init__(self, name: str, lines: Sequence[str], header: bool) -> None:
        self.name, self.lines = name, lines
        said = [line for line in lines if line.strip() and not line.startswith(DOCUMENT)]
        # A remark has no tab in it and may stand at the top of a file that has them.
        self.tabs = "\t" in next((line for line in said if line[0] != "#"), "")
        first = next((n for n, line in enumerate(lines) if self._has_columns(line)), None)
        if first is None:
            raise ValueError(f"{name} holds no sentence: expected a word and its tag per line")
        self.first = first + 1
        self.width = len(self._cells(lines[first]))
        head = self._cells(lines[first]) if header else [str(i + 1) for i in range(self.width)]
        self.start = self.first if header else 0
        self.columns = Table(name, head, [], [], header)
        self.notes: list[str] = []

    def read(self, words: Column, tags: Column | None) -> Sentences:
        if tags is not None and self.width == 1:
            raise ValueError(
                f"line {self.first} of {self.name} has one column, expected a word and its tag"
            )
        word = self.columns.index(words)
        tag = None if tags is None else self.columns.index(tags)
        found = Sentences(self.name, [], None if tag is None else [], [], [], self.notes)
        rows: list[list[str]] = []  # of the sentence that is being read
        begun, document, empty, remarks = 0, 0, 0, 0
        for number, line in enumerate(self.lines[self.start :], self.start + 1):
            if self._has_columns(line):
                begun = begun if rows else number
                rows.append(self._row(line, number, word, tag))
                continue
            if self._is_remark(line):
                remarks += 1
                continue
            _close(found, rows, begun, document, word, tag)
            rows = []
            if line.strip():  # -DOCSTART-
                document += 1 if found.words else 0
            elif number > 1 and not self.lines[number - 2].strip():
                empty += 1  # a blank line after a blank line: nothing stands between them
        _close(found, rows, begun, document, word, tag)
        self._note(empty, remarks)
        if not found.words:
            raise ValueError(f"{self.name} holds no sentence: expected a word and its tag per line")
        return found

    def _has_columns(self, line: str) -> bool:
        return bool(line.strip()) and not line.startswith(DOCUMENT) and not self._is_remark(line)

    def _is_remark(self, line: str) -> bool:
        return self.tabs and _REMARK.fullmatch(line) is not None

    def _cells(self, line: str) -> list[str]:
        if self.tabs:
            return line.split("\t")
        # Not str.split(): a word may have a no-break space in it.
        return [cell for cell in line.replace("\t", " ").split(" ") if cell]

    def _row(self, line: str, number: int, word: int, tag: int | None) -> list[str]:
        cells = self._cells(line)
        where = f"line {number} of {self.name}"
        if len(cells) != self.width:
            raise ValueError(
                f"{where} has {counted(len(cells), 'column')}, expected {self.width} as in line "
                f"{self.first}, between {'tabs' if self.tabs else 'blanks'}: {line[:60]!r}"
            )
        for what, i in (("word", word), ("tag", tag)):
            if i is not None and not cells[i].strip():
                raise ValueError(f"{where} has no {what} in column {i + 1}: {line[:60]!r}")
        return cells

    def _note(self, empty: int, remarks: int) -> None:
        if empty:
            what = counted(empty, "sentence")
            self.notes.append(
                f"{self.name}: left out {what} of zero length (a blank line after a blank line)"
            )
        if remarks:
            self.notes.append(f"{self.name}: passed over {counted(remarks, 'remark')} ('# …')")


def _close(
    found: Sentences, rows: list[list[str]], begun: int, document: int, word: int, tag: int | None
) -> None:
    """Append the sentence of these rows, if there are any."""
    if rows:
        found.words.append([row[word] for row in rows])
        found.lines.append(begun)
        found.documents.append(document)
        if found.tags is not None and tag is not None:
            found.tags.append([row[tag].strip() for row in rows])


_WORDS, _TAGS = ("tokens", "words"), ("tags", "labels", "ner_tags")


def _from_table(table: Table, words: Column | None, tags: Column | None, tagged: bool) -> Sentences:
    """A sentence per row: lists of words and of tags."""
    words = _usual(table, _WORDS) if words is None else words
    all_words = table.lists(words)
    all_tags = table.lists(_usual(table, _TAGS) if tags is None else tags) if tagged else None
    for i, (line, row) in enumerate(zip(table.lines, all_words, strict=True)):
        if all_tags is not None and len(all_tags[i]) != len(row):
            raise ValueError(
                f"line {line} of {table.name} has {counted(len(row), 'word')} and "
                f"{counted(len(all_tags[i]), 'tag')}, expected as many"
            )
        cells = row if all_tags is None else row + all_tags[i]
        if not all(cell.strip() for cell in cells):
            raise ValueError(f"line {line} of {table.name} has an empty word or tag")
    kept = [i for i, row in enumerate(all_words) if row]
    notes = list(table.notes)
    if empty := len(all_words) - len(kept):
        notes.append(f"{table.name}: left out {counted(empty, 'sentence')} of zero length")
    if not kept:
        raise ValueError(f"{table.name} holds no sentence with a word in it")
    return Sentences(
        table.name,
        [all_words[i] for i in kept],
        None if all_tags is None else [all_tags[i] for i in kept],
        [table.lines[i] for i in kept],
        list(range(len(kept))),  # nothing says that they belong together
        notes,
    )


def _usual(table: Table, names: Sequence[str]) -> str:
    """The first of these names that the table has; else the first one, for the error."""
    return next((name for name in names if name in table.columns), names[0])
