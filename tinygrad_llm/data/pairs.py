"""Pairs of texts from documents: does the second follow the first?

    document    s₀ s₁ s₂ │ s₃ s₄ s₅ …                 sentences; │ is a gap, drawn at random
    first               s₁ s₂                         sentences up to the gap,
    second                       s₃ s₄                those after it: it follows (label 0)
    or                                  r₇ r₈ r₉      those after a gap of another document (1)

    input_ids        [CLS] first [SEP] second [SEP] [PAD] …
    token_type_ids     0     0     0     1      1     0
    attention_mask     1     1     1     1      1     0

One half of the pairs follow. Both kinds of second text begin behind a gap, drawn with the same
chances but for the document, and have the same room: neither tells by its place in a document or
by its length which kind it is. No pair is cut: a sentence longer than half of the context is
divided beforehand into pieces that fit, each of which counts as a sentence.

Devlin et al., "BERT", NAACL 2019, section 3.1; there pairs are made once, here anew at every draw.

Dimensions: N tokens, S sentences, D documents, G gaps, B pairs in a batch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tinygrad_llm.backend import RandomStream
from tinygrad_llm.data.loader import compact
from tinygrad_llm.data.report import SILENT, Report
from tinygrad_llm.data.texts import Text
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.data.windows import Marks

# After the end of a sentence: white space that no small letter follows ("e.g. this" goes on), or
# nothing where Chinese or Japanese ends one; and a blank line.
_SEAM = re.compile(
    r"(?<=[.!?…])\s+(?=[^\sa-z])|(?<=[.!?…][\"')\]»”’])\s+(?=[^\sa-z])|(?<=[。！？])\s*|\n\s*\n"
)


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, less the blanks between them: "A b. C." -> ["A b.", "C."]

    A sentence here is a stretch that may stand alone, as in BERT; a wrong seam, such as after
    "Dr.", only makes two short ones.
    """
    return [part for piece in _SEAM.split(text) if (part := piece.strip())]


@dataclass(frozen=True)
class Sentences:
    """The token ids of a text, by sentences and documents.

    Args:
        ids: uint16 or uint32, (N,).
        starts: int64, (S + 1,): sentence i is ids[starts[i] : starts[i + 1]].
        documents: int64, (D + 1,): document d has the sentences documents[d] … documents[d + 1] − 1
        divided: how many sentences were too long and are here in pieces.
    """

    ids: np.ndarray
    starts: np.ndarray
    documents: np.ndarray
    divided: int = 0

    def __len__(self) -> int:
        return len(self.starts) - 1

    def tokens(self, first: int, stop: int) -> np.ndarray:
        """The ids of the sentences first … stop − 1."""
        return self.ids[self.starts[first] : self.starts[stop]]


def sentences_of(
    text: Text, tokenizer: Tokenizer, longest: int, report: Report = SILENT
) -> Sentences:
    """The sentences of a text as tokens, those longer than `longest` tokens in pieces.

    The text is read in parts, and the ids are held in memory, two or four bytes each; a sentence
    without a token is left out, and so is a document without a sentence.
    """
    builder, what, done = _Builder(tokenizer, longest), f"sentences of {text.name}", 0
    for part in text.parts():
        builder.add(split_sentences(part.text), part.ends)
        done = min(done + len(part.text), text.characters)
        report.progress(what, done, text.characters)
    found = builder.finish()
    report.progress(what, text.characters, text.characters)
    return found


class _Builder:
    """Collects sentences, in groups that keep the tokenizer's cores busy."""

    def __init__(self, tokenizer: Tokenizer, longest: int) -> None:
        if longest < 1:
            raise ValueError(f"longest must be at least 1, got {longest}")
        self.tokenizer, self.longest = tokenizer, longest
        self.divided = self._characters = 0
        self._waiting: list[str] = []
        self._ends: list[int] = []  # of documents, as the number of sentences waiting before it
        self._ids: list[np.ndarray] = []
        self._lengths: list[int] = []
        self._documents = [0]

    def add(self, sentences: Sequence[str], ends: bool) -> None:
        self._waiting += sentences
        self._characters += sum(map(len, sentences))
        if ends:
            self._ends.append(len(self._waiting))
        if self._characters >= _GROUP:
            self._encode()

    def _encode(self) -> None:
        if not self._waiting:
            self._ends.clear()
            return
        ends = iter([*self._ends, -1])
        end = next(ends)
        for i, ids in enumerate(self.tokenizer.encode_each(self._waiting)):
            while end == i:
                self._end_document()
                end = next(ends)
            pieces = list(_pieces(ids, self.longest))
            self.divided += len(pieces) > 1
            self._lengths += map(len, pieces)
            self._ids.append(compact(ids, self.tokenizer.vocab_size))
        if end >= 0:  # all that are left end here
            self._end_document()
        self._waiting, self._ends, self._characters = [], [], 0

    def _end_document(self) -> None:
        if len(self._lengths) > self._documents[-1]:
            self._documents.append(len(self._lengths))

    def finish(self) -> Sentences:
        self._encode()
        self._end_document()
        ids = np.concatenate([compact([], self.tokenizer.vocab_size), *self._ids])
        starts = np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)]).astype(np.int64)
        return Sentences(ids, starts, np.array(self._documents, np.int64), self.divided)


_GROUP = 1 << 19  # characters


def _pieces(ids: np.ndarray, longest: int) -> Iterator[np.ndarray]:
    """The ids in as few pieces of at most `longest` as will do, of nearly equal length."""
    if len(ids):
        yield from np.array_split(ids, -(-len(ids) // longest))


class SentenceBatch(NamedTuple):
    """What an encoder reads, int64 (B, T) each, T the longest of the batch; and labels (B,)."""

    input_ids: np.ndarray
    attention_mask: np.ndarray
    token_type_ids: np.ndarray
    next_sentence_label: np.ndarray


class SentencePairs:
    """Pairs drawn from the sentences of a text: `pairs.draw(B, stream)`.

    A pair fills the context as far as whole sentences do; its first text has between a quarter and
    three quarters of the room. One in ten is shorter, for a model that shall read short texts, too.

    Args:
        sentences: of at least two documents with two sentences each, none longer than half of the
            room for text (`longest_sentence`).
        tokenizer: whose marks stand around the texts.
        pad_id: stands where there is no token.
        context: tokens in a pair at most, marks included.
        short_probability: how many are shorter.

    Raises ValueError where that cannot be.
    """

    def __init__(
        self,
        sentences: Sentences,
        tokenizer: Tokenizer,
        pad_id: int,
        context: int,
        short_probability: float = 0.1,
    ) -> None:
        self.sentences, self.pad_id = sentences, pad_id
        self.marks = Marks.of(tokenizer)
        self.room = context - _marks(self.marks)
        self.short_probability = short_probability
        if not 0 <= short_probability <= 1:
            raise ValueError(f"short_probability must be from 0 to 1, got {short_probability}")
        longest = int(np.diff(sentences.starts).max(initial=0))
        if 2 * longest > self.room:
            raise ValueError(
                f"a sentence has {longest} tokens, of which two do not fit into a context of "
                f"{context}: divide them (longest = {self.room // 2})"
            )
        gaps = np.diff(sentences.documents) - 1  # of each document
        self._first_gap = np.concatenate([[0], np.cumsum(gaps)])
        if (gaps > 0).sum() < 2:
            raise ValueError(
                f"pairs of sentences need two documents of two sentences each, got {len(gaps)} "
                f"documents, {int((gaps > 0).sum())} of them with two sentences: give more "
                "documents (they are told apart by <|endoftext|>, files or lines of JSONL)"
            )

    @property
    def gaps(self) -> int:
        """G: places between two sentences of one document, at each of which a pair may be made."""
        return int(self._first_gap[-1])

    def draw(self, count: int, stream: RandomStream) -> SentenceBatch:
        """The next `count` pairs of the stream."""
        u = stream.uniform((6, count), np.float64)
        gaps = (u[0] * self.gaps).astype(np.int64)
        random = u[1] < 0.5
        seconds = np.where(random, self._elsewhere(gaps, u[2]), gaps)
        # A short one has room for anything from two tokens on; a sentence of each is there anyway.
        rooms = np.where(u[3] < self.short_probability, 2 + u[4] * (self.room - 1), self.room)
        rooms = rooms.astype(np.int64)
        shares = (rooms * (0.25 + 0.5 * u[5])).astype(np.int64)
        rows = [
            self._pair(int(first), int(second), int(share), int(room))
            for first, second, share, room in zip(gaps, seconds, shares, rooms, strict=True)
        ]
        return self._batch(rows, random)

    def _elsewhere(self, gaps: np.ndarray, u: np.ndarray) -> np.ndarray:
        """A gap of another document for each, all of them with equal chances."""
        document = self._document(gaps)
        begin, end = self._first_gap[document], self._first_gap[document + 1]
        drawn = (u * (self.gaps - (end - begin))).astype(np.int64)
        return drawn + np.where(drawn >= begin, end - begin, 0)  # past the gaps of its own

    def _document(self, gaps: Any) -> Any:
        return np.searchsorted(self._first_gap, gaps, side="right") - 1

    def _pair(self, gap: int, other: int, share: int, room: int) -> tuple[np.ndarray, np.ndarray]:
        """The sentences up to a gap, and those behind a gap."""
        starts, documents = self.sentences.starts, self.sentences.documents
        document, after = self._document(gap), self._document(other)
        stop = gap + document + 1  # a document has one gap less than sentences
        begin = other + after + 1
        end = begin + 1
        share = min(share, self.room - int(starts[end] - starts[begin]))
        first = stop - 1
        while first > documents[document] and starts[stop] - starts[first - 1] <= share:
            first -= 1
        # What the first leaves of its share stays free: else the second were longer behind the
        # beginning of a document, which it is behind only where it follows.
        room -= max(share, int(starts[stop] - starts[first]))
        while end < documents[after + 1] and starts[end + 1] - starts[begin] <= room:
            end += 1
        return self.sentences.tokens(first, stop), self.sentences.tokens(begin, end)

    def _batch(
        self, rows: Sequence[tuple[np.ndarray, np.ndarray]], random: np.ndarray
    ) -> SentenceBatch:
        marks = self.marks
        longest = max(len(a) + len(b) for a, b in rows) + _marks(marks)
        ids = np.full((len(rows), longest), self.pad_id, np.int64)
        mask, segments = np.zeros_like(ids), np.zeros_like(ids)
        for row, (a, b) in enumerate(rows):
            first = np.concatenate([marks.before_pair, a, marks.between])
            both = np.concatenate([first, b, marks.after_pair])
            ids[row, : len(both)] = both
            mask[row, : len(both)] = 1
            segments[row, len(first) : len(both)] = 1
        return SentenceBatch(ids, mask, segments, random.astype(np.int64))


def longest_sentence(tokenizer: Tokenizer, context: int) -> int:
    """How many tokens a sentence may have, so that a pair of them fits into the context.

    Raises ValueError for a tokenizer without marks, and a context without room.
    """
    marks = Marks.of(tokenizer)
    if not marks.before_pair or not marks.between or not marks.after_pair:
        raise ValueError(
            f"this {tokenizer.kind} tokenizer puts no [CLS] and [SEP] around two texts: use a "
            "WordPiece tokenizer"
        )
    longest = (context - _marks(marks)) // 2
    if longest < 1:
        raise ValueError(
            f"a context of {context} has no room for two texts and {_marks(marks)} marks: "
            f"make it {_marks(marks) + 2} or longer"
        )
    return longest


def _marks(marks: Marks) -> int:
    return len(marks.before_pair) + len(marks.between) + len(marks.after_pair)
