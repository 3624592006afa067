"""A text as token ids, and where its documents end.

ids        d₀ d₀ d₀ mark d₁ d₁ mark d₂       N of them
ends              3            6       8     one per document: where its own ids stop
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tinygrad_llm.data import END_OF_TEXT
from tinygrad_llm.data.files import Part
from tinygrad_llm.data.loader import compact
from tinygrad_llm.data.texts import Text
from tinygrad_llm.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Tokens:
    """Token ids in one row, with the ends of documents; memory maps where they come from a file.

    Args:
        ids: uint16 or uint32, shape (N,).
        ends: int64, one per document, ascending: the i-th is `ids[… : ends[i] - start]`.
        marked: whether `<|endoftext|>` stands between documents as one id; a tokenizer without it
            puts nothing there.
        start: where `ids` begins, counted as `ends` is.
    """

    ids: np.ndarray
    ends: np.ndarray
    marked: bool
    start: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, begin: int, end: int) -> Tokens:
        """ids[begin : end], with the documents, or pieces of such, in it. Views, not copies."""
        low, high = self.start + begin, self.start + end
        first = int(np.searchsorted(self.ends, low))
        last = int(np.searchsorted(self.ends, high))
        return Tokens(self.ids[begin:end], self.ends[first : last + 1], self.marked, low)

    def ends_of(self, first: int, stop: int) -> np.ndarray:
        """The ends of the documents first … stop − 1, counted from the first id here: int64."""
        return np.clip(np.asarray(self.ends[first:stop], np.int64) - self.start, 0, len(self.ids))

    def spans(self) -> Iterator[tuple[int, int]]:
        """(first, stop) of each document, from the mark before it to the one behind it."""
        first = 0
        for number in range(len(self.ends)):
            end = int(self.ends_of(number, number + 1)[0])
            yield first, end + 1 if self.marked else end
            first = end


def in_memory(text: Text, tokenizer: Tokenizer) -> Tokens:
    """The tokens of a text as arrays: the ids are those of `tokenizer.encode` of the whole."""
    encoder = Encoder(tokenizer)
    pairs = [encoder.encode(group) for group in groups(text.parts())]
    ids = np.concatenate([compact([], tokenizer.vocab_size), *(ids for ids, _ in pairs)])
    ends = np.concatenate([np.empty(0, np.int64), *(ends for _, ends in pairs)])
    return Tokens(ids, ends, encoder.marked)


_GROUP = 1 << 19  # characters that are encoded at a time, or a little more
_GROUP_PARTS = 4096


def groups(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Lists of parts, each long enough to keep the cores busy and short enough for memory."""
    group: list[Part] = []
    characters = 0
    for part in parts:
        group.append(part)
        characters += len(part.text)
        if characters >= _GROUP or len(group) >= _GROUP_PARTS:
            yield group
            group, characters = [], 0
    if group:
        yield group


class Encoder:
    """Encodes the parts of a text in their order, and counts: how far it is, what it has made.

    Between documents it puts the id of `<|endoftext|>`, where the tokenizer has one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.marked = tokenizer.eos_id is not None
        self.parts = self.characters = self.bytes = 0  # read; `bytes` are the documents' own
        self.tokens = self.documents = 0  # made
        self._between = False  # a document has ended, and the next one has not begun

    def pass_over(self, part: Part) -> bool:
        """Count a part without encoding it; whether a mark stands before it."""
        marked = self._between
        self.parts += 1
        self.characters += len(part.text) + len(END_OF_TEXT) * marked
        self.bytes += len(part.text) if part.text.isascii() else len(part.text.encode())
        self._between = part.ends
        return marked

    def encode(self, parts: Sequence[Part]) -> tuple[np.ndarray, np.ndarray]:
        """(ids, ends of the documents that end here); `ends` count from the text's first id."""
        marks, positions = [], []
        for part in parts:
            marks.append(self.pass_over(part) and self.marked)
            positions.append(self.characters - len(part.text))
        found = self.tokenizer.encode_each([part.text for part in parts], positions=positions)
        pieces: list[np.ndarray] = []
        ends: list[int] = []
        for part, mark, ids in zip(parts, marks, found, strict=True):
            if mark:
                pieces.append(np.array([self.tokenizer.eos_id], np.int64))
            pieces.append(ids)
            self.tokens += len(ids) + mark
            if part.ends:
                ends.append(self.tokens)
        self.documents += len(ends)
        return (
            compact(np.concatenate(pieces), self.tokenizer.vocab_size),
            np.array(ends, np.int64),
        )
