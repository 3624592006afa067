"""A text to train on, which may be larger than memory: it is read in parts, as often as need be.

`open_text` finds it. A small one, of up to 8 MiB of files, is a `Corpus` in memory; a larger one is
a `FileText`, of which no more than a part is ever there.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import zlib
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from tinygrad_llm.data import END_OF_TEXT, cache, corpora, files
from tinygrad_llm.data.corpora import Corpus
from tinygrad_llm.data.files import Part
from tinygrad_llm.data.report import SILENT, Report
from tinygrad_llm.storage import write_file

IN_MEMORY = 8 << 20  # bytes of files
SAMPLE = 32 << 20  # characters that a tokenizer is trained on
WORDS = 2 << 20  # bytes of different words in them


def open_text(source: str | PathLike[str], report: Report = SILENT) -> Text:
    """What `source` means, as `corpora.load_text`, but no large file is read into memory.

    A large text is read through once for its SHA-256, which also finds what is no UTF-8. The cache
    remembers it by the paths, sizes and times of change of the files: whoever sees the same ones
    again trusts that they are the same files (a change in the same instant apart, which is never
    remembered). Reading the text checks the hash again, so no wrong text gets past its end.

    Raises as `corpora.load_text`.
    """
    name, place = corpora.locate(source, report)
    if place is None:
        return corpora.load(name)
    size = sum(path.stat().st_size for path in corpora.paths(place))
    if size <= IN_MEMORY:
        return corpora.read(name, place)
    return FileText(name, place, report)


class FileText:
    """The text of files, read again each time it is needed, and never whole.

    Raises ValueError where it is not text, or, at its end, where it is no longer the same.
    """

    in_memory = False

    def __init__(self, name: str, source: str | PathLike[str], report: Report = SILENT) -> None:
        self.name, self.source = name, source
        known = _known(source)
        if known is None:
            known = _read_through(name, source, report)
        self.sha256: str = known["sha256"]
        self.characters: int = known["characters"]

    def parts(self) -> Iterator[Part]:
        """The text from its beginning; ValueError at its end when it is another than before."""
        digest, between = hashlib.sha256(), False
        for part in files.parts(self.source):
            digest.update(f"{END_OF_TEXT * between}{part.text}".encode())
            between = part.ends
            yield part
        if digest.hexdigest() != self.sha256:
            raise ValueError(
                f"{self.name!r} changed while it was read, or it was changed with its size and "
                "time kept: try again"
            )


class Side:
    """The documents of a text that are held out for validation, or the ones that are not.

    A document is held out when the first 64 bits of the SHA-256 of its first part (all of it, up to
    262,144 characters) are below `fraction` · 2⁶⁴: about that share of the documents, the same ones
    each time, whatever stands beside them; and two equal ones are on one side.
    """

    def __init__(self, text: Text, fraction: float, *, held_out: bool) -> None:
        self.text, self.fraction, self.held_out = text, fraction, held_out
        self.name, self.in_memory = text.name, text.in_memory
        share = fraction if held_out else 1 - fraction
        self.characters = round(share * text.characters)
        origin = f"{text.sha256} {'below' if held_out else 'from'} {fraction!r}"
        self.sha256 = hashlib.sha256(origin.encode()).hexdigest()

    def parts(self) -> Iterator[Part]:
        """The documents of this side, in their order."""
        begins = mine = True
        for part in self.text.parts():
            if begins:
                mine = _is_held_out(part.text, self.fraction) == self.held_out
            begins = part.ends
            if mine:
                yield part


def _is_held_out(text: str, fraction: float) -> bool:
    first = hashlib.sha256(text.encode()).digest()[:8]
    return int.from_bytes(first, "big") < fraction * 2**64


# What has documents, in parts: `name`, `sha256` (of the text in UTF-8 with `<|endoftext|>` between
# its documents, or of where it comes from), `characters`, `in_memory`, `parts()`.
Text = Corpus | FileText | Side


# --- what tokenizers are made from ----------------------------------------------------------------


def sample(text: Text, limit: int = SAMPLE, report: Report = SILENT) -> Iterator[str]:
    """All of the text, or about `limit` characters of it (32 Mi), spread evenly.

    Of a longer text, a part is taken whenever what was taken, as a share of `limit`, is not ahead
    of what was passed, as a share of the text. The same text gives the same sample; pieces are cut
    where no word is, so that the words and their numbers are those of the whole.

    BPE needs some 150 bytes for every byte of every different word. So, where the text is
    not in memory, no part is taken any more once its different words (runs of letters, digits and
    underscores) are 2 MiB long together: more than a natural text of this length has, less than
    one of hashes or base64. `report` is told how much was taken, where it was not all.
    """
    passed = taken = 0
    words = _Words()
    for part in text.parts():
        if not text.in_memory and words.size > WORDS:
            break
        if text.characters <= limit or taken * text.characters <= passed * limit:
            taken += len(part.text)
            if not text.in_memory:
                words.add(part.text)
            yield from _short(part.text)
        passed += len(part.text)
    if text.characters > limit or words.size > WORDS:
        spread = "of many different words" if words.size > WORDS else "spread evenly"
        report.say(
            f"tokenizer: learns from {taken:,} of the {text.characters:,} characters, {spread}"
        )


class _Words:
    """The different words seen so far, and their bytes."""

    def __init__(self) -> None:
        self.size = 0
        self._seen: set[int] = set()  # hashes: two words with one do no harm

    def add(self, text: str) -> None:
        for word in set(_WORD.findall(text)):
            if (key := zlib.crc32(data := word.encode())) not in self._seen:
                self._seen.add(key)
                self.size += len(data)


_WORD = re.compile(r"\w+")


def alphabet(*texts: Text) -> str:
    """The distinct characters of the texts, sorted, in one pass over each."""
    found: set[str] = set()
    for text in texts:
        for part in text.parts():
            found.update(part.text)
    return "".join(sorted(found))


_SHORT = 1 << 14  # characters: the trainers hold tens of times as much of each string they work on


def _short(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _SHORT and (seam := files.SEAM.search(text, start + _SHORT)):
        yield text[start : seam.start()]
        start = seam.start()
    yield text[start:]


# --- what is known of a large text ----------------------------------------------------------------


def _read_through(name: str, source: str | PathLike[str], report: Report) -> dict[str, Any]:
    """{"sha256": …, "characters": …}, remembered for the next time."""
    before = _stamp(source)
    total = sum(size for _, size, _ in before)
    digest, characters, done, between = hashlib.sha256(), 0, 0, False
    for part in files.parts(source):
        piece = END_OF_TEXT * between + part.text
        between = part.ends
        data = piece.encode()
        digest.update(data)
        characters += len(piece)
        done += len(data)
        report.progress(f"reading {name}", min(done, total), total)
    report.progress(f"reading {name}", total, total)
    if _stamp(source) != before:
        raise ValueError(f"{name!r} changed while it was read: try again")
    known = {"sha256": digest.hexdigest(), "characters": characters}
    _remember(source, before, known)
    return known


def _stamp(source: str | PathLike[str]) -> list[tuple[str, int, int]]:
    """Path, size and time of change of each file."""
    stats = [(path.absolute(), path.stat()) for path in corpora.paths(source)]
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def _note(source: str | PathLike[str], stamp: list[tuple[str, int, int]]) -> Path:
    """The file in the cache that speaks of these files read in this way (the field of JSONL)."""
    origin = json.dumps(["1", str(Path(source).expanduser().absolute()), stamp])
    return cache.folder() / "texts" / f"{hashlib.sha256(origin.encode()).hexdigest()[:32]}.json"


def _known(source: str | PathLike[str]) -> dict[str, Any] | None:
    try:
        known = json.loads(_note(source, _stamp(source)).read_text(encoding="utf-8"))
        whole = isinstance(known["sha256"], str) and isinstance(known["characters"], int)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return known if whole else None


def _remember(
    source: str | PathLike[str], stamp: list[tuple[str, int, int]], known: dict[str, Any]
) -> None:
    # A file that changes twice within its clock's tick has one time for two contents.
    newest = max((time_ns for _, _, time_ns in stamp), default=0)
    if time.time_ns() - newest < 2 * 10**9:
        return
    note = _note(source, stamp)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_file(note, lambda path: path.write_text(json.dumps(known), encoding="utf-8"))
    except OSError:
        pass  # the next run reads the text once more: that is all
