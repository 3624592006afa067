"""Documents from files of one's own: what a source means, and one sentence where it cannot be read.

book.txt                a text file; several documents where it has `<|endoftext|>` in it
books/                  a folder: every .txt and .md file in it and in the folders below
'books/**/*.tex'        a pattern: every file it matches, in quotes against the shell
web.jsonl               an object per line, the text in its field `text`
web.jsonl:body          the same, with the text in the field `body`; also 'web/*.jsonl:body'
-                       standard input, which can be read only once
"""

from __future__ import annotations

import glob
import json
import os
import re
import sys
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from tinygrad_llm.data import END_OF_TEXT

STANDARD_INPUT = "-"

_TEXT_SUFFIXES = frozenset({".txt", ".md"})  # what is taken from a folder
_JSONL = ".jsonl"
_FIELD = "text"


def documents(source: str | PathLike[str], *, once: bool = False) -> Iterator[str]:
    """The documents of a source, one after the other; the forms of a source stand above.

    Files are read one at a time, JSONL line by line, in the order of their paths. Folders skip what
    is hidden. A text file is kept to the letter (line ends too), less a byte-order mark; where
    there is more than one file, and in JSONL, blank documents are left out.

    once: take what cannot be read a second time, standard input and pipes, too.

    Raises FileNotFoundError where there is nothing of that name, ValueError where it is not text,
    with the position or the line; another OSError is the system's own.
    """
    if os.fspath(source) == "":
        raise ValueError("expected a text file, a folder or a pattern, got an empty name")
    if not once and _flows(source):
        raise ValueError(
            f"{_name(source)} can be read only once, and the text is needed again when a run is "
            "resumed: save it to a file and give that"
        )
    found = False
    for document in _read(source):
        found = found or bool(document.strip())
        yield document
    if not found:
        raise ValueError(f"{_name(source)} holds no text")


def decode(data: bytes, name: str) -> str:
    """UTF-8 to str, less a byte-order mark; ValueError, with the position, where it is not text."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        advice = ", but binary or UTF-16" if 0 in data else ": save it as UTF-8 first"
        raise ValueError(
            f"{name} is not UTF-8 text (byte 0x{data[error.start]:02x} at position {error.start})"
            f"{advice}"
        ) from error
    if "\0" in text:
        raise ValueError(
            f"{name} has a NUL byte at position {data.index(0)}, so it is binary or UTF-16, not "
            "UTF-8 text"
        )
    return text.removeprefix("\ufeff")


def _flows(source: str | PathLike[str]) -> bool:
    """Whether it is standard input or a pipe, such as the shell's <(command)."""
    return source == STANDARD_INPUT or Path(source).expanduser().is_fifo()


def _name(source: str | PathLike[str]) -> str:
    return "standard input" if source == STANDARD_INPUT else repr(os.fspath(source))


def _read(source: str | PathLike[str]) -> Iterator[str]:
    if source == STANDARD_INPUT:
        data = b"" if sys.stdin is None else sys.stdin.buffer.read()  # None: closed by the shell
        yield from decode(data, "standard input").split(END_OF_TEXT)
        return
    path = Path(source).expanduser()
    if path.is_dir():
        yield from _in_order(_inside(path), _FIELD)
    elif path.is_file() or path.is_fifo():
        yield from _of_file(path, _FIELD)
    elif path.exists():
        raise ValueError(f"{_name(source)} is a device or a socket, not a text file")
    else:  # no path as it stands: it may be a pattern, or end in a field
        pattern, field = _split_field(str(path))
        if glob.has_magic(pattern) and not Path(pattern).exists():
            yield from _in_order(_matching(pattern), field)
        elif pattern != str(path) and Path(pattern).is_file():
            yield from _of_file(Path(pattern), field)
        else:
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


def _in_order(paths: list[Path], field: str) -> Iterator[str]:
    for path in paths:
        yield from (document for document in _of_file(path, field) if document.strip())


def _of_file(path: Path, field: str) -> Iterator[str]:
    if path.suffix.lower() == _JSONL:
        return _of_jsonl(path, field)
    return iter(decode(path.read_bytes(), repr(str(path))).split(END_OF_TEXT))


def _of_jsonl(path: Path, field: str) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"line {number} of {str(path)!r}"
            record = decode(line, where).strip()
            if record:
                text = _text_of(record, field, where)
                yield from (part for part in text.split(END_OF_TEXT) if part.strip())


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
