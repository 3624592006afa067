"""Documents from files of one's own: what a source means, and one sentence where it cannot be read.

book.txt                a text file; several documents where it has `<|endoftext|>` in it
books/                  a folder: every .txt and .md file in it and in the folders below
'books/**/*.tex'        a pattern: every file it matches, in quotes against the shell
web.jsonl               an object per line, the text in its field `text`
web.jsonl:body          the same, with the text in the field `body`; also 'web/*.jsonl:body'
-                       standard input, which can be read only once
"""

from __future__ import annotations

import codecs
import glob
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tinygrad_llm.data import END_OF_TEXT

STANDARD_INPUT = "-"

# A word of GPT-2's pattern ends, and of WordPiece's, wherever a blank or newline follows a
# character that is neither: cut there, a text has the ids of the whole.
SEAM = re.compile(r"(?<=\S)[ \n]")

_TEXT_SUFFIXES = frozenset({".txt", ".md"})  # what is taken from a folder
_JSONL = ".jsonl"
_FIELD = "text"
_CHUNK = 1 << 18  # bytes read at a time
_PART = 1 << 18  # characters of a part, or a little more
_LONGEST = 4 * _PART  # where a text has no seam, it is cut after so many


class Part(NamedTuple):
    """A piece of a document; `ends` says that it is the last one."""

    text: str
    ends: bool


def documents(source: str | PathLike[str], *, once: bool = False) -> Iterator[str]:
    """The documents of a source, one after the other; the forms of a source stand above.

    Files are read one at a time, JSONL line by line, in the order of their paths. Folders skip what
    is hidden. A text file is kept to the letter (line ends too), less a byte-order mark; where
    there is more than one file, and in JSONL, blank documents are left out.

    once: take what cannot be read a second time, standard input and pipes, too.

    Raises FileNotFoundError where there is nothing of that name, ValueError where it is not text,
    with the position or the line; another OSError is the system's own.
    """
    pieces: list[str] = []
    for part in parts(source, once=once):
        pieces.append(part.text)
        if part.ends:
            yield "".join(pieces)
            pieces.clear()


def parts(source: str | PathLike[str], *, once: bool = False) -> Iterator[Part]:
    """The same documents, each in one part or more: no text file is ever in memory as a whole.

    A document of up to 262,144 characters is one part. A longer one is cut at the first seam after
    so many: before a blank or newline that follows a character which is neither, where the ids
    of the parts are those of the whole (see `Tokenizer`). Where there is none in the three times as
    many that follow, it is cut at that place, and what stands there may be cut into other
    tokens than elsewhere. Where the cuts fall depends on the document alone. A line of JSONL is
    read as a whole.

    Raises as `documents`.
    """
    if os.fspath(source) == "":
        raise ValueError("expected a text file, a folder or a pattern, got an empty name")
    if not once and flows(source):
        raise ValueError(
            f"{_name(source)} can be read only once, and the text is needed again when a run is "
            "resumed: save it to a file and give that"
        )
    found = False
    for part in _read(source):
        found = found or not _is_blank(part.text)
        yield part
    if not found:
        raise ValueError(f"{_name(source)} holds no text")


def parts_of(documents: Iterable[str]) -> Iterator[Part]:
    """Documents that are in memory, in parts."""
    for document in documents:
        *before, last = _cut(document, whole=True)
        yield from (Part(text, False) for text in before)
        yield Part(last, True)


def paths(source: str | PathLike[str]) -> list[Path]:
    """The files that the source means, in the order in which they are read.

    Raises as `documents` where there are none; what is in them is not looked at.
    """
    return [] if flows(source) else _found(source)[0]


def flows(source: str | PathLike[str]) -> bool:
    """Whether it is standard input or a pipe, such as the shell's <(command)."""
    return source == STANDARD_INPUT or Path(source).expanduser().is_fifo()


def decode(data: bytes, name: str) -> str:
    """UTF-8 to str, less a byte-order mark; ValueError, with the position, where it is not text."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _no_utf8(error, name) from error
    if "\0" in text:
        raise _binary(name, data.index(0))
    return text.removeprefix("\ufeff")


def _no_utf8(error: UnicodeDecodeError, name: str, offset: int = 0) -> ValueError:
    advice = ", but binary or UTF-16" if 0 in error.object else ": save it as UTF-8 first"
    return ValueError(
        f"{name} is not UTF-8 text (byte 0x{error.object[error.start]:02x} at position "
        f"{offset + error.start}){advice}"
    )


def _binary(name: str, position: int) -> ValueError:
    return ValueError(
        f"{name} has a NUL byte at position {position}, so it is binary or UTF-16, not UTF-8 text"
    )


def _name(source: str | PathLike[str]) -> str:
    return "standard input" if source == STANDARD_INPUT else repr(os.fspath(source))


def _is_blank(text: str) -> bool:
    return not text or text.isspace()


def _read(source: str | PathLike[str]) -> Iterator[Part]:
    if source == STANDARD_INPUT:
        if sys.stdin is None:  # closed by the shell
            return iter([Part("", True)])
        return _of_text(sys.stdin.buffer, "standard input")
    files, field, several = _found(source)
    return _in_order(files, field) if several else _of_file(files[0], field)


def _found(source: str | PathLike[str]) -> tuple[list[Path], str, bool]:
    """The files, the field of JSONL, and whether the source may mean more than one file."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _inside(path), _FIELD, True
    if path.is_file() or path.is_fifo():
        return [path], _FIELD, False
    if path.exists():
        raise ValueError(f"{_name(source)} is a device or a socket, not a text file")
    # No path as it stands: it may be a pattern, or end in a field.
    pattern, field = _split_field(str(path))
    if glob.has_magic(pattern) and not Path(pattern).exists():
        return _matching(pattern), field, True
    if pattern != str(path) and Path(pattern).is_file():
        return [Path(pattern)], field, False
    raise FileNotFoundError(f"no file {pattern!r}")


def _split_field(path: str) -> tuple[str, str]:
    """'web.jsonl:body' -> ('web.jsonl', 'body'); 'web.jsonl' -> ('web.jsonl', 'text')"""
    match = re.fullmatch(rf"(.+{re.escape(_JSONL)}):(.+)", path, re.IGNORECASE | re.DOTALL)
    return (match[1], match[2]) if match else (path, _FIELD)


def _inside(folder: Path) -> list[Path]:
    """The .txt and .md files in the folder and below it, hidden ones left out, sorted."""

    def fail(error: OSError) -> None:
        raise error  # os.walk would pass over a folder that it may not open

    paths: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(parent, name) for name in names if not name.startswith(".")]
    paths = [path for path in paths if path.suffix.lower() in _TEXT_SUFFIXES]
    if not paths:
        raise ValueError(
            f"the folder {str(folder)!r} holds no .txt or .md file; name others by a pattern such "
            f"as {str(folder / '*.jsonl')!r}"
        )
    return sorted(paths, key=lambda path: path.relative_to(folder).as_posix())


def _matching(pattern: str) -> list[Path]:
    paths = {Path(path) for path in glob.glob(pattern, recursive=True)}
    files = [path for path in paths if path.is_file()]
    if not files:
        raise FileNotFoundError(f"no file matches {pattern!r}")
    return sorted(files, key=Path.as_posix)


def _in_order(paths: list[Path], field: str) -> Iterator[Part]:
    for path in paths:
        yield from _without_blank(_of_file(path, field))


def _without_blank(parts: Iterable[Part]) -> Iterator[Part]:
    """The parts of the documents that are more than blanks."""
    held: list[Part] = []  # blanks at the start of a document: perhaps all that there is of it
    speaks = False
    for part in parts:
        speaks = speaks or not _is_blank(part.text)
        held.append(part)
        if speaks:
            yield from held
        if speaks or part.ends:
            held.clear()
        speaks = speaks and not part.ends


def _of_file(path: Path, field: str) -> Iterator[Part]:
    if path.suffix.lower() == _JSONL:
        yield from _of_jsonl(path, field)
        return
    with path.open("rb") as file:
        yield from _of_text(file, repr(str(path)))


def _of_text(file: BinaryIO, name: str) -> Iterator[Part]:
    """A text file, a chunk at a time."""
    rest = ""  # of the document that the chunk before ended in
    for text in _decoded(file, name):
        *ended, rest = (rest + text).split(END_OF_TEXT)
        yield from parts_of(ended)
        *cut, rest = _cut(rest, whole=False)
        yield from (Part(piece, False) for piece in cut)
    yield from parts_of([rest])


def _cut(text: str, *, whole: bool) -> Iterator[str]:
    """The parts of a document, or, unless it is there as a whole, of its beginning; then the rest.

    A mark between documents may lie across the end of a chunk. It has no blank in it, so that a
    seam is never inside one; a cut without a seam waits for what may be the rest of the mark.
    """
    start = 0
    while len(text) - start > _PART:
        seam = SEAM.search(text, start + _PART, start + _LONGEST)
        if seam:
            end = seam.start()
        elif len(text) - start > _LONGEST + (0 if whole else len(END_OF_TEXT)):
            end = start + _LONGEST
        else:
            break
        yield text[start:end]
        start = end
    yield text[start:]


def _decoded(file: BinaryIO, name: str) -> Iterator[str]:
    """UTF-8 to str as `decode`, a chunk at a time."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position, data = 0, b"first"
    while data:
        data = file.read(_CHUNK)
        begun = len(decoder.getstate()[0])  # bytes of a character that the chunk before ended in
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise _no_utf8(error, name, position - begun) from error
        if "\0" in text:
            raise _binary(name, position + data.index(0))
        yield text.removeprefix("\ufeff") if position == 0 else text
        position += len(data)


def _of_jsonl(path: Path, field: str) -> Iterator[Part]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"line {number} of {str(path)!r}"
            record = decode(line, where).strip()
            if record:
                text = _text_of(record, field, where)
                yield from _without_blank(parts_of(text.split(END_OF_TEXT)))


def _text_of(record: str, field: str, where: str) -> str:
    """The string in that field of a JSON object."""
    try:
        value = json.loads(record)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of 5000 digits; a thousand brackets
        raise ValueError(f"{where} is not JSON that can be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {_json_type(value)}, expected an object with {field!r}")
    if field not in value:
        there = ", ".join(repr(key) for key in list(value)[:8]) or "nothing"
        raise ValueError(
            f"{where} has no field {field!r}, it has {there}: name the field of the text after a "
            f"colon, such as 'file{_JSONL}:body'"
        )
    text = value[field]
    if not isinstance(text, str):
        raise ValueError(
            f"{where} has {_json_type(text)} in the field {field!r}, expected a string"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has half a character (the lone surrogate U+{ord(text[error.start]):04X}) in "
            f"the field {field!r}"
        ) from error
    return text


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return names.get(type(value), "a number")
