"""Labelled rows from files of one's own: CSV, TSV and JSONL, and one sentence for a broken line.

.csv            fields between commas (or ';' or tabs, where the first line has no comma), in quotes
                where need be: a quote inside of quotes is doubled, a line may end inside of them
.tsv .tab .txt  fields between tabs. A quote is a letter as any other, as in MRPC and in what `cut`
                writes, unless quoting is evident: see `quoting_is_evident`
.jsonl .ndjson  an object per line; its keys are the columns
other names     as .tsv where the first line has a tab, else as .csv

All are UTF-8, with or without a byte-order mark, lines ending in LF or CRLF; blank lines are passed
over and counted. A line that does not fit is an error with its number, never skipped.
"""

from __future__ import annotations

import csv
import difflib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from tinygrad_llm.data import files

Column = str | int  # a name, or a number that counts from 1; −1 is the last

TABLE_SUFFIXES = (".csv", ".tsv", ".tab", ".txt", ".jsonl", ".ndjson")
_JSON = (".jsonl", ".ndjson")
_TABS = (".tsv", ".tab", ".txt")


@dataclass(frozen=True)
class Table:
    """rows[i][j] is row i in column j; it began in line `lines[i]` of the file.

    `columns` are the names in the header, or '1', '2', … where there is none. The fields are
    strings; of JSONL they are what the JSON held, None where the object lacks the key.
    """

    name: str  # where it came from, for errors
    columns: list[str]
    rows: list[list[Any]]
    lines: list[int]
    has_header: bool = True
    notes: list[str] = field(default_factory=list)  # what a user should know of how it was read

    def __len__(self) -> int:
        return len(self.rows)

    def index(self, column: Column) -> int:
        """The place of a column, from 0.

        A name comes before a number, so that a column called '2' is found by it. Raises ValueError,
        with the nearest name and all there are, for one that is not there.
        """
        if str(column) in self.columns:
            return self.columns.index(str(column))
        width = len(self.columns)
        number = _whole_number(column)
        if number is not None and number != 0 and -width <= number <= width:
            return number - 1 if number > 0 else width + number
        if number is not None:
            raise ValueError(
                f"{self.name} has no column {number}: it has {width} of them, counted from 1"
            )
        raise ValueError(self._no_column(str(column)))

    def _no_column(self, column: str) -> str:
        if not self.has_header:
            return (
                f"{self.name} has no column {column!r}: it has no header, so give a number from 1 "
                f"to {len(self.columns)}, or say that its first line is one (--header)"
            )
        lower = {name.lower(): name for name in reversed(self.columns)}
        close = difflib.get_close_matches(column.lower(), lower, 1)
        nearest = f" (did you mean {lower[close[0]]!r}?)" if close else ""
        return f"{self.name} has no column {column!r}{nearest}; it has {_listed(self.columns)}"

    def take(self, *columns: Column) -> Table:
        """The table of these columns alone, as text, less the rows with an empty field.

        What is left out is counted in `notes`. Numbers of JSON become text as JSON spells them
        (1 → '1', true → 'true'). Raises ValueError as `index`; where a row lacks the key or has
        null, a list or an object in it, with the line; and where no row is left.
        """
        places = [self.index(column) for column in columns]
        rows, lines, empty = [], [], []
        for row, line in zip(self.rows, self.lines, strict=True):
            texts = [self._text(row[i], self.columns[i], line) for i in places]
            if all(text.strip() for text in texts):
                rows.append(texts)
                lines.append(line)
            else:
                empty.append(line)
        names = [self.columns[i] for i in places]
        notes = list(self.notes)
        if empty:
            what = "an empty field" if len(empty) == 1 else "empty fields"
            notes.append(
                f"{self.name}: left out {counted(len(empty), 'row')} with {what} among "
                f"{_listed(names)}, the first in line {empty[0]}"
            )
        if not rows:
            raise ValueError(f"{self.name} has no row with text in {_listed(names)}")
        return replace(self, columns=names, rows=rows, lines=lines, notes=notes)

    def texts(self, column: Column) -> list[str]:
        """A column as text, empty fields as ''; raises ValueError as `take` where it is none."""
        i = self.index(column)
        name = self.columns[i]
        pairs = zip(self.rows, self.lines, strict=True)
        return [self._text(row[i], name, line) for row, line in pairs]

    def lists(self, column: Column) -> list[list[str]]:
        """A column whose fields are JSON lists of strings, such as the tokens of a sentence."""
        i = self.index(column)
        found = []
        for row, line in zip(self.rows, self.lines, strict=True):
            if not isinstance(row[i], list) or not all(isinstance(x, str) for x in row[i]):
                raise ValueError(
                    f"line {line} of {self.name} must have a list of strings in "
                    f"{self.columns[i]!r}, got {_json_type(row[i])}"
                )
            found.append(row[i])
        return found

    def _text(self, value: Any, column: str, line: int) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, bool | int | float):
            return json.dumps(value)
        raise ValueError(
            f"line {line} of {self.name} has {_json_type(value)} in {column!r}, expected text"
        )


def read_table(
    path: str | PathLike[str], *, header: bool | None = None, quoted: bool | None = None
) -> Table:
    """The rows of a CSV, TSV or JSONL file, which is in memory as a whole.

    header: whether the first line names the columns; None: see `looks_like_a_header`, and what was
    taken for one stands in `notes`. quoted: whether quotes enclose fields; None: always in CSV, in
    TSV where it is evident. JSONL has neither question.

    Raises FileNotFoundError where there is no such file; ValueError, with the line, where it is not
    UTF-8, a row has more or fewer fields than the first, quotes are left open or JSON is broken.
    """
    file = Path(path).expanduser()
    name = repr(str(path))
    if not file.is_file():
        raise FileNotFoundError(
            f"{name} is a folder: expected one file" if file.is_dir() else f"no file {name}"
        )
    suffix = file.suffix.lower()
    if suffix == ".json":
        raise ValueError(f"{name} is JSON as a whole; expected JSONL, an object per line, or CSV")
    lines = lines_of(files.decode(file.read_bytes(), name))
    if suffix in _JSON:
        return _read_jsonl(name, lines)
    return _read_fields(name, lines, suffix, header, quoted)


def lines_of(text: str) -> list[str]:
    """The lines of a text, their ends taken off: LF, CRLF, or CR where there is no LF at all.

    Unlike `str.splitlines` it leaves form feeds and U+2028 where they are: they are no line ends.
    """
    if "\n" not in text:
        return text.removesuffix("\r").split("\r")
    lines = text.removesuffix("\n").split("\n")
    return [line.removesuffix("\r") for line in lines]


def counted(n: int, what: str) -> str:
    """'1 row', '1,200 rows'"""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _whole_number(column: Column) -> int | None:
    try:
        return int(column)
    except ValueError:
        return None


def _listed(names: Sequence[str]) -> str:
    """'a', 'b' and 'c'; of more than 20 the first ones and how many follow."""
    shown = [repr(name) for name in names[:20]]
    if len(names) > 20:
        return f"{', '.join(shown)} and {len(names) - 20} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else "".join(shown)


# --- CSV and TSV ----------------------------------------------------------------------------------


def _read_fields(
    name: str, lines: list[str], suffix: str, header: bool | None, quoted: bool | None
) -> Table:
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise ValueError(f"{name} is empty: expected a row per line")
    delimiter, notes = _delimiter(name, suffix, first)
    if quoted is None:
        quoted = delimiter != "\t" or quoting_is_evident(lines)
    rows, numbers = [], []
    for number, row in (_quoted if quoted else _bare)(name, lines, delimiter):
        if rows and len(row) != len(rows[0]):
            raise ValueError(
                f"line {number} of {name} has {counted(len(row), 'field')}, expected "
                f"{len(rows[0])} as in line {numbers[0]}{_advice(delimiter, quoted, row)}"
            )
        rows.append(row)
        numbers.append(number)
    if blank := sum(not line.strip() for line in lines) if not quoted else 0:
        notes.append(f"{name}: passed over {counted(blank, 'blank line')}")
    if header is None and (header := looks_like_a_header(rows)):
        columns = _listed(rows[0])
        notes.append(f"{name}: took line {numbers[0]} for a header: {columns} (--no-header if not)")
    if not header:
        columns = [str(i + 1) for i in range(len(rows[0]))]
        return Table(name, columns, rows, numbers, False, notes)
    columns = [column.strip() for column in rows[0]]
    if twice := {column for column in columns if columns.count(column) > 1}:
        raise ValueError(f"the header of {name} has {_listed(sorted(twice))} more than once")
    return Table(name, columns, rows[1:], numbers[1:], True, notes)


def _delimiter(name: str, suffix: str, first: str) -> tuple[str, list[str]]:
    """What stands between fields, and a note where it is not what the file's name says."""
    if suffix in _TABS:
        return "\t", []
    if suffix == ".csv" and "," in first:
        return ",", []
    if "\t" in first:
        return "\t", [f"{name}: fields stand between tabs"] if suffix == ".csv" else []
    if ";" in first and "," not in first:
        return ";", [f"{name}: fields stand between semicolons"]
    return ",", []


def _advice(delimiter: str, quoted: bool, row: Sequence[str]) -> str:
    if delimiter != "\t":
        return ": put a field with a comma in it in double quotes"
    if not quoted and any('"' in cell for cell in row):
        return ": if quotes enclose fields here, say so (--quoted)"
    return ""


def _bare(name: str, lines: Sequence[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, line.split(delimiter)


def _quoted(name: str, lines: Sequence[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """RFC 4180: "a ""b"", c" is one field; a row ends at a line's end outside of quotes."""
    reader = csv.reader((line + "\n" for line in lines), delimiter=delimiter, strict=True)
    longest = csv.field_size_limit(sys.maxsize)  # of the process: a long text is no error
    start = 1
    try:
        for row in reader:
            if row and (len(row) > 1 or row[0].strip()):
                yield start, row
            start = reader.line_num + 1
    except csv.Error as error:
        open_quote = "unexpected end of data" in str(error)
        why = "a double quote is opened and never closed" if open_quote else str(error)
        raise ValueError(
            f"line {start} of {name} is broken: {why}; a quote inside of quotes is doubled"
        ) from error
    finally:
        csv.field_size_limit(longest)


def quoting_is_evident(lines: Sequence[str]) -> bool:
    r"""Whether the quotes of a TSV enclose fields, rather than being letters of them.

    They do where every field that has a quote at all is quoted in full ("…", those inside doubled)
    and there is a sign that a program wrote it so: a doubled quote, or a first line of nothing but
    quoted fields. One field such as `he said "no"` and they are letters:

        "id"\t"text"                →  id, text
        1\t"a ""b"" c"              →  1, a "b" c
        1\t"The Matrix" is good     →  1, "The Matrix" is good
    """
    sign, first = False, True
    for line in lines:
        if not line.strip():
            continue
        cells = line.split("\t")
        with_quote = [cell for cell in cells if '"' in cell]
        if not all(map(_is_quoted, with_quote)):
            return False
        sign = sign or (first and len(with_quote) == len(cells))
        sign = sign or any('""' in cell[1:-1] for cell in with_quote)
        first = False
    return sign


def _is_quoted(cell: str) -> bool:
    whole = len(cell) >= 2 and cell[0] == cell[-1] == '"'
    return whole and '"' not in cell[1:-1].replace('""', "")


_HEADER_WORDS = frozenset(
    {"text", "sentence", "sentence1", "sentence2", "review", "comment", "content", "title"}
    | {"label", "labels", "class", "category", "target", "tag", "tags", "quality", "score"}
    | {"word", "words", "token", "tokens", "question", "answer", "context", "source"}
)


def looks_like_a_header(rows: Sequence[Sequence[str]]) -> bool:
    """Whether the first row names the columns.

    Its fields are short, distinct, not empty, and no numbers; and one of them is a word that such
    tables are headed by ('text', 'label', …), or tells its column from the rest of it: the others
    are all numbers, or are few values that come again and again, and it is none of them.
    """
    head, rest = [cell.strip() for cell in rows[0]], rows[1:]
    named = all(0 < len(cell) <= 40 and not _is_number(cell) for cell in head)
    if not rest or not named or len(set(head)) != len(head):
        return False
    if _HEADER_WORDS.intersection(cell.lower() for cell in head):
        return True
    for i, cell in enumerate(head):
        values = {row[i].strip() for row in rest}
        few = len(values) <= min(len(rest) // 3, 100)
        if cell not in values and (few or all(map(_is_number, values))):
            return True
    return False


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


# --- JSONL ----------------------------------------------------------------------------------------


def _read_jsonl(name: str, lines: Sequence[str]) -> Table:
    objects, numbers, columns = [], [], {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            value = _object(line, f"line {number} of {name}")
            columns.update(dict.fromkeys(value))
            objects.append(value)
            numbers.append(number)
    if not objects:
        raise ValueError(f"{name} is empty: expected an object per line")
    rows = [[value.get(column) for column in columns] for value in objects]
    blank = len(lines) - len(objects)
    notes = [f"{name}: passed over {counted(blank, 'blank line')}"] if blank else []
    return Table(name, list(columns), rows, numbers, True, notes)


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of 5000 digits; a thousand brackets
        raise ValueError(f"{where} is not JSON that can be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {_json_type(value)}, expected an object")
    if "\\ud" in line.lower():  # JSON can spell half a character; no text can hold it
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where} has half a character (a lone surrogate) in it") from error
    return value


def _json_type(value: Any) -> str:
    if value is None:
        return "nothing (null or no such key)"
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return names.get(type(value), "a number")
