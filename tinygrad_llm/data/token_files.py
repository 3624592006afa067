"""Token files: the ids of a text that is too large for memory, made once and mapped from the disk.

tokens/3f2a…/                  named by the SHA-256 of the text and of the tokenizer
    ids                        uint16 or uint32, little-endian, one after the other
    ends                       int64, one per document: see `Tokens`
    index.json                 counts, and the SHA-256 of each block of both files

They are built block by block in `3f2a….building`, where `journal.jsonl` has a line for each block
that is on the disk. A build that was killed goes on after the last of them (the text before it is
read again, but not encoded again) and ends with the same bytes as one that was not. The folder gets
its name when all is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

import numpy as np

from tinygrad_llm.data import cache
from tinygrad_llm.data.report import SILENT, Report
from tinygrad_llm.data.texts import Text
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.data.tokens import Encoder, Tokens, groups, in_memory
from tinygrad_llm.storage import sync, write_file

FORMAT = 1
IDS, ENDS, INDEX, JOURNAL = "ids", "ends", "index.json", "journal.jsonl"

_BLOCK = 1 << 22  # characters of a block, or a little more
_CHUNK = 1 << 20  # bytes read at a time


def tokens_of(text: Text, tokenizer: Tokenizer, report: Report = SILENT) -> Tokens:
    """The tokens of a text: in memory where the text is, else mapped from a token file.

    The file is made where the cache has none, or has one that is damaged: every block is compared
    with its SHA-256 before it is used. Two processes that want the same one do not both make it.
    Raises OSError with one sentence where it cannot be written, ValueError where the text cannot be
    read or encoded.
    """
    if text.in_memory:
        return in_memory(text, tokenizer)
    key = hashlib.sha256(f"{FORMAT} {text.sha256} {tokenizer.sha256}".encode()).hexdigest()[:32]
    found = _open(cache.folder() / "tokens" / key, text, tokenizer, SILENT, report)
    if found is not None:
        return found
    folder = cache.writable("tokens", report) / key
    doing = f"tokenising {text.name}"
    with cache.alone(folder.with_name(f".{key}.lock"), report, doing) as is_alone:
        found = _open(folder, text, tokenizer, report, report)
        if found is not None:  # another process made it while this one waited
            return found
        if folder.exists():
            shutil.rmtree(folder)
        building = folder.with_name(f"{key}.building" if is_alone else f"{key}.{os.getpid()}")
        for _ in range(2):
            try:
                build(building, text, tokenizer, report)
            except ValueError:  # the text or the tokenizer will not do: nothing to go on with
                shutil.rmtree(building, ignore_errors=True)
                raise
            with _writing(building, text):
                _finish(building, folder)
            found = _open(folder, text, tokenizer, report, report)
            if found is not None:
                return found
            shutil.rmtree(folder)
    raise OSError(f"the token file {folder} is damaged as soon as it is written: check the disk")


# --- reading --------------------------------------------------------------------------------------


class Block(NamedTuple):
    """Where a block ends, counted from the beginning, and what is in it."""

    parts: int
    tokens: int
    documents: int
    ids_sha256: str
    ends_sha256: str


def _open(
    folder: Path, text: Text, tokenizer: Tokenizer, damage: Report, report: Report
) -> Tokens | None:
    """The tokens in a finished folder; None where it is not there, or damaged, which is said."""
    if not folder.exists():
        return None
    try:
        index = _read_index(folder / INDEX)
        blocks = [Block(*block) for block in index["blocks"]]
        dtype = np.dtype(index["dtype"])
        _check(folder, blocks, dtype, f"checking the tokens of {text.name}", report)
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = getattr(error, "strerror", None) or error
        damage.say(f"the token file {folder} is damaged ({why}), so it is made again")
        return None
    return Tokens(
        _mapped(folder / IDS, dtype),
        _mapped(folder / ENDS, np.dtype("<i8")),
        tokenizer.eos_id is not None,
    )


def read_index(folder: Path) -> dict[str, Any]:
    """{"tokens", "documents", "bytes" of the documents in UTF-8, …} of a finished token file.

    Raises ValueError where it is damaged.
    """
    return _read_index(folder / INDEX)


def _read_index(path: Path) -> dict[str, Any]:
    index = json.loads(path.read_text(encoding="utf-8"))
    expected = index.pop("sha256")
    if _digest(index) != expected:
        raise ValueError(f"{path.name} is not what was written")
    return index


def _digest(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _check(
    folder: Path, blocks: list[Block], dtype: np.dtype[Any], what: str, report: Report
) -> None:
    """ValueError unless both files are, to the byte, what the blocks say."""
    tokens, documents = (blocks[-1].tokens, blocks[-1].documents) if blocks else (0, 0)
    for name, size in ((IDS, tokens * dtype.itemsize), (ENDS, documents * 8)):
        found = (folder / name).stat().st_size
        if found != size:
            raise ValueError(f"{name} has {found:,} bytes, expected {size:,}")
    for i, sound in enumerate(_sound(folder, blocks, dtype)):
        if not sound:
            raise ValueError(f"block {i + 1} of {len(blocks)} is not what was written")
        report.progress(what, blocks[i].tokens, max(tokens, 1))


def _sound(folder: Path, blocks: list[Block], dtype: np.dtype[Any]) -> Iterator[bool]:
    """For each block whether it is on the disk as it was written. Nothing is mapped here."""
    tokens = documents = 0
    with (folder / IDS).open("rb") as ids, (folder / ENDS).open("rb") as ends:
        for block in blocks:
            yield (
                _sha256(ids, (block.tokens - tokens) * dtype.itemsize) == block.ids_sha256
                and _sha256(ends, (block.documents - documents) * 8) == block.ends_sha256
            )
            tokens, documents = block.tokens, block.documents


def _sha256(file: BinaryIO, size: int) -> str:
    digest = hashlib.sha256()
    while size > 0 and (data := file.read(min(size, _CHUNK))):
        digest.update(data)
        size -= len(data)
    return digest.hexdigest()


def _mapped(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    if path.stat().st_size == 0:  # nothing can be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")


# --- building -------------------------------------------------------------------------------------


def build(folder: Path, text: Text, tokenizer: Tokenizer, report: Report = SILENT) -> None:
    """Fill `folder` with all files of a token file; go on with what a killed build left there."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    with _writing(folder, text):
        folder.mkdir(exist_ok=True)
        blocks = _left_over(folder, dtype)
    encoder, parts = Encoder(tokenizer), text.parts()
    what = f"tokenising {text.name}"
    if blocks:
        for part in islice(parts, blocks[-1].parts):
            encoder.pass_over(part)
            report.progress(what, encoder.characters, text.characters)
        encoder.tokens, encoder.documents = blocks[-1].tokens, blocks[-1].documents
        report.say(
            f"going on with the token file of {text.name} after {encoder.tokens:,} tokens that an "
            "earlier run has made"
        )
    with contextlib.ExitStack() as stack:
        with _writing(folder, text):
            writer = stack.enter_context(_Writer(folder, blocks, encoder.characters))
        for group in groups(parts):
            ids, ends = encoder.encode(group)
            with _writing(folder, text):
                writer.add(ids.astype(dtype, copy=False), ends.astype("<i8", copy=False))
                if encoder.characters - writer.characters >= _BLOCK:
                    writer.commit(encoder)
            report.progress(what, min(encoder.characters, text.characters), text.characters)
        with _writing(folder, text):
            writer.commit(encoder)
    report.progress(what, text.characters, text.characters)
    index = {
        "format": FORMAT,
        "dtype": dtype.str,
        "tokens": encoder.tokens,
        "documents": encoder.documents,
        "bytes": encoder.bytes,
        "text_sha256": text.sha256,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "blocks": [list(block) for block in blocks],
    }
    with _writing(folder, text):
        content = json.dumps({**index, "sha256": _digest(index)}, indent=1)
        write_file(folder / INDEX, lambda path: path.write_text(content, encoding="utf-8"))


class _Writer:
    """Appends to both files; a block counts when it is on the disk and the journal says so."""

    def __init__(self, folder: Path, blocks: list[Block], characters: int) -> None:
        self.folder, self.blocks = folder, blocks
        self.characters = characters  # of the text, up to the last block
        self._ids, self._ends = hashlib.sha256(), hashlib.sha256()

    def __enter__(self) -> _Writer:
        with contextlib.ExitStack() as stack:
            self._ids_file: BinaryIO = stack.enter_context((self.folder / IDS).open("ab"))
            self._ends_file: BinaryIO = stack.enter_context((self.folder / ENDS).open("ab"))
            self._journal: TextIO = stack.enter_context(
                (self.folder / JOURNAL).open("a", encoding="utf-8")
            )
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # a full disk was met before; commit() left nothing open
            self._open.close()

    def add(self, ids: np.ndarray, ends: np.ndarray) -> None:
        self._ids_file.write(ids.data)
        self._ends_file.write(ends.data)
        self._ids.update(ids.data)
        self._ends.update(ends.data)

    def commit(self, encoder: Encoder) -> None:
        """End the block here: first the data on the disk, then the line that vouches for it."""
        if self.blocks and self.blocks[-1].parts == encoder.parts:
            return  # nothing came since
        for file in (self._ids_file, self._ends_file):
            file.flush()
            os.fsync(file.fileno())
        block = Block(
            encoder.parts,
            encoder.tokens,
            encoder.documents,
            self._ids.hexdigest(),
            self._ends.hexdigest(),
        )
        self._journal.write(f"{json.dumps(block)}\n")
        self._journal.flush()
        self.blocks.append(block)
        self.characters = encoder.characters
        self._ids, self._ends = hashlib.sha256(), hashlib.sha256()


def _left_over(folder: Path, dtype: np.dtype[Any]) -> list[Block]:
    """The blocks of a build that did not come to its end; whatever stands behind them is cut off.

    A block counts that is on the disk as the journal says, after blocks that are so, too.
    """
    for name in (IDS, ENDS, JOURNAL):
        (folder / name).touch()
    told = _told(folder / JOURNAL)
    sound = 0
    for good in _sound(folder, told, dtype):
        if not good:
            break
        sound += 1
    blocks = told[:sound]
    tokens, documents = (blocks[-1].tokens, blocks[-1].documents) if blocks else (0, 0)
    os.truncate(folder / IDS, tokens * dtype.itemsize)
    os.truncate(folder / ENDS, documents * 8)
    lines = "".join(f"{json.dumps(block)}\n" for block in blocks)
    write_file(folder / JOURNAL, lambda path: path.write_text(lines, encoding="utf-8"))
    return blocks


def _told(journal: Path) -> list[Block]:
    """The lines of the journal, up to the first that is not whole or goes backwards."""
    blocks: list[Block] = []
    for line in journal.read_bytes().splitlines(keepends=True):
        try:
            block = Block(*json.loads(line)) if line.endswith(b"\n") else None
            if block is None or (blocks and not block[:3] >= blocks[-1][:3]):
                break
            if not all(type(count) is int and count >= 0 for count in block[:3]):
                break
        except (ValueError, TypeError):  # not JSON, or not of five things that can be compared
            break
        blocks.append(block)
    return blocks


def _finish(building: Path, folder: Path) -> None:
    sync(building)
    try:
        os.replace(building, folder)
    except OSError:
        if not (folder / INDEX).exists():
            raise
        shutil.rmtree(building)  # without locks: another process was faster, with the same bytes
    sync(folder.parent)
    (folder / JOURNAL).unlink(missing_ok=True)  # last: before the renaming a kill needs it


@contextlib.contextmanager
def _writing(folder: Path, text: Text) -> Iterator[None]:
    """Within: what the disk refuses is one sentence."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"the tokens of {text.name} cannot be written into {folder.parent} "
            f"({error.strerror or error}): free some space, or set {cache.VARIABLE} to another "
            "folder; what is done is kept for the next time"
        ) from error
