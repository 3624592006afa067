"""Texts and words as the ids that an encoder reads, in windows where they are longer than it sees.

    words         Alex  visited  Neuschwanstein
    pieces  [CLS] alex  visited  neu ##sch ##wan ##stein [SEP]
    labels  −100  B-PER O        B-LOC −100 −100 −100    −100

A word's label stands on its first piece, `IGNORE_INDEX` on all else, so that a word counts once
however many pieces it has. What is longer than `max_length` is read in windows that overlap, and a
word is scored in the one that shows most around it:

    window 1    a b c d e f          scored: a b c d
    window 2        c d e f g h      scored:         e f g h

Nothing is lost in silence: what vanished, was unknown or was cut stands in `notes`.

Legend: B windows in a batch, T pieces of a window, W words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from tinygrad_llm.data.loader import IGNORE_INDEX
from tinygrad_llm.data.tables import counted
from tinygrad_llm.data.tokenizers import UNKNOWN, Tokenizer


class Marks(NamedTuple):
    """The special ids that a tokenizer puts around a text and between two of them.

    BERT: before [CLS], after [SEP]; for a pair also [SEP] between. Empty where it puts none.
    """

    before: list[int]
    after: list[int]
    before_pair: list[int]
    between: list[int]
    after_pair: list[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Marks:
        """What the tokenizer.json says: learnt from how it encodes 'a', and the pair 'a', 'a'."""
        one = tokenizer.tokenizer.encode("a", add_special_tokens=True)
        two = tokenizer.tokenizer.encode("a", "a", add_special_tokens=True)
        ids, texts = two.ids, [i for i, text in enumerate(two.sequence_ids) if text is not None]
        second = two.sequence_ids.index(1) if 1 in two.sequence_ids else len(ids)
        end_of_first = max((i for i in texts if i < second), default=-1) + 1
        alone = [i for i, text in enumerate(one.sequence_ids) if text is not None] or [0]
        return cls(
            one.ids[: alone[0]],
            one.ids[alone[-1] + 1 :],
            ids[: texts[0]] if texts else [],
            ids[end_of_first:second],
            ids[texts[-1] + 1 :] if texts else [],
        )


@dataclass(frozen=True)
class Window:
    """Pieces of example `example`, with the marks around them.

    For words: `first[i]` is where in `ids` word `words[i]` begins, and those of `scored`, a part of
    `words`, count here. `types` is 0 for the first text and 1 for the second (token_type_ids).
    """

    example: int
    ids: np.ndarray  # (T,) int64
    types: np.ndarray  # (T,) int64
    words: range = range(0)
    scored: range = range(0)
    first: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def kept(self) -> slice:
        """The place of the scored words among those of the window: first[kept]."""
        return slice(self.scored.start - self.words.start, self.scored.stop - self.words.start)

    @property
    def scored_first(self) -> np.ndarray:
        """Where in `ids` the scored words begin: logits[scored_first] has a row for each."""
        return self.first[self.kept]

    def labels(self, of_words: np.ndarray) -> np.ndarray:
        """int64 of shape (T,): the labels of the example's words, (W,), on their first pieces.

        `IGNORE_INDEX` elsewhere, and on words that are scored in another window.
        """
        found = np.full(len(self.ids), IGNORE_INDEX, np.int64)
        found[self.scored_first] = of_words[self.scored.start : self.scored.stop]
        return found


def pad(windows: Sequence[Window], pad_id: int = 0) -> dict[str, np.ndarray]:
    """{'input_ids', 'token_type_ids', 'attention_mask'}, int64 of shape (B, T) each.

    T is the longest of these windows; the mask is 1 on pieces and 0 on what fills up.
    """
    longest = max((len(window.ids) for window in windows), default=0)
    shape = len(windows), longest
    ids = np.full(shape, pad_id, np.int64)
    types, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row, window in enumerate(windows):
        n = len(window.ids)
        ids[row, :n], types[row, :n], mask[row, :n] = window.ids, window.types, 1
    return {"input_ids": ids, "token_type_ids": types, "attention_mask": mask}


def pad_labels(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of labels as int64 (B, T), filled up with `IGNORE_INDEX`."""
    found = np.full((len(rows), max(map(len, rows), default=0)), IGNORE_INDEX, np.int64)
    for i, row in enumerate(rows):
        found[i, : len(row)] = row
    return found


# --- words ----------------------------------------------------------------------------------------


class WordWindows:
    """Sentences of words as windows: every word is scored in exactly one, in order.

        sentences      words[i][j], of any length; empty ones have no window
        max_length     the most pieces of a window, marks included
        stride         how many pieces further on the next window begins; None: half of the room

    Tokenizers over bytes and characters read a blank before each word but the first, as in a text;
    the others get the words as they stand. A word of which the tokenizer leaves nothing
    (a zero-width blank, in BERT's) is read as the unknown token; one with more pieces than the
    room of a window is cut. Both are counted in `notes`.

    Raises ValueError where `max_length` has no room for a piece, for a stride that is not from 1 to
    that room, and for a word that vanishes where there is no unknown token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        sentences: Sequence[Sequence[str]],
        max_length: int,
        stride: int | None = None,
    ) -> None:
        self.marks = Marks.of(tokenizer)
        room = max_length - len(self.marks.before) - len(self.marks.after)
        _check_room(room, max_length, 1)
        stride = max(1, room // 2) if stride is None else stride
        if not 1 <= stride <= room:
            raise ValueError(
                f"stride must be from 1 to {room}, the pieces of a window without its marks, got "
                f"{stride}"
            )
        self.lengths = [len(words) for words in sentences]
        self.vanished = self.unknown = self.cut = self.cut_pieces = self.long = 0
        self.windows: list[Window] = []
        for i, pieces in enumerate(self._pieces(tokenizer, sentences)):
            self.windows += self._windows(i, self._fitted(pieces, room), room, stride)

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def notes(self) -> list[str]:
        """A sentence on each thing that a user should know of."""
        total = counted(sum(self.lengths), "word")
        said = []
        if empty := self.lengths.count(0):
            said.append(f"{counted(empty, 'sentence')} of zero length: nothing to read there")
        if self.vanished:
            said.append(
                f"{self.vanished:,} of {total} vanish in the tokenizer and are read as unknown"
            )
        if self.unknown:
            said.append(f"{self.unknown:,} of {total} have a piece that the tokenizer lacks")
        if self.cut:
            said.append(
                f"{self.cut:,} of {total} have more pieces than a window: "
                f"{counted(self.cut_pieces, 'piece')} cut off their ends, their labels kept"
            )
        if self.long:
            n = counted(self.long, "sentence")
            said.append(f"{n} longer than a window, read in several that overlap")
        return said

    def merge(self, values: Sequence[Any]) -> list[list[Any]]:
        """merged[i][j] is what was found for word j of sentence i.

        values[k][j]: for scored word j of window k, such as logits[scored_first] or predicted tags.
        Raises ValueError where there are not as many as the window scores.
        """
        if len(values) != len(self.windows):
            raise ValueError(f"expected {len(self.windows)} windows of values, got {len(values)}")
        merged: list[list[Any]] = [[] for _ in self.lengths]
        for window, found in zip(self.windows, values, strict=True):
            if len(found) != len(window.scored):
                raise ValueError(
                    f"expected {len(window.scored)} values, one for each word that this window of "
                    f"sentence {window.example} scores, got {len(found)}"
                )
            merged[window.example].extend(found)
        return merged

    def _pieces(
        self, tokenizer: Tokenizer, sentences: Sequence[Sequence[str]]
    ) -> Iterator[list[list[int]]]:
        """The ids of each word of each sentence."""
        unknown = unknown_id(tokenizer)
        blank = " " if tokenizer.kind in ("byte", "char", "bpe", "unigram") else ""
        for start in range(0, len(sentences), _BATCH):
            batch = [
                [blank * (j > 0) + word for j, word in enumerate(words)]
                for words in sentences[start : start + _BATCH]
            ]
            for words, encoding in zip(
                batch,
                tokenizer.tokenizer.encode_batch(
                    batch, is_pretokenized=True, add_special_tokens=False
                ),
                strict=True,
            ):
                pieces: list[list[int]] = [[] for _ in words]
                for piece, word in zip(encoding.ids, encoding.word_ids, strict=True):
                    if word is not None:
                        pieces[word].append(piece)
                yield [self._seen(word, unknown) for word in pieces]

    def _seen(self, pieces: list[int], unknown: int | None) -> list[int]:
        """The word's pieces, counted; the unknown token where there are none."""
        if not pieces:
            if unknown is None:
                raise ValueError(
                    "a word vanishes in the tokenizer, which has no unknown token to stand for it"
                )
            self.vanished += 1
            return [unknown]
        self.unknown += unknown in pieces
        return pieces

    def _fitted(self, pieces: list[list[int]], room: int) -> list[list[int]]:
        too_long = [len(word) - room for word in pieces if len(word) > room]
        self.cut += len(too_long)
        self.cut_pieces += sum(too_long)
        return [word[:room] for word in pieces] if too_long else pieces

    def _windows(
        self, example: int, pieces: list[list[int]], room: int, stride: int
    ) -> Iterator[Window]:
        begins = np.concatenate([[0], np.cumsum([len(word) for word in pieces])]).astype(np.int64)
        spans = list(word_spans(begins, room, stride))
        self.long += len(spans) > 1
        for words, scored in zip(spans, scored_words(begins, spans), strict=True):
            inside = [piece for word in pieces[words.start : words.stop] for piece in word]
            ids = np.array([*self.marks.before, *inside, *self.marks.after], np.int64)
            first = begins[words.start : words.stop] - begins[words.start] + len(self.marks.before)
            yield Window(example, ids, np.zeros_like(ids), words, scored, first)


_BATCH = 512  # sentences encoded at a time


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """The id of `[UNK]` or `<unk>`, or None."""
    found = (tokenizer.token_to_id(token) for token in ("[UNK]", UNKNOWN))
    return next((i for i in found if i is not None), None)


def word_spans(begins: np.ndarray, room: int, stride: int) -> Iterator[range]:
    """The words of each window; `begins` (W + 1,) are the places of the words among the pieces.

    A window takes as many whole words as fit. The next begins with the last word that is no more
    than `stride` pieces further on, though so far that it shows a word more than this one and never
    past the end of it. The last is moved back until it is full.
    """
    count = len(begins) - 1
    start = 0
    while start < count:
        stop = int(np.searchsorted(begins, begins[start] + room, "right")) - 1
        if stop == count:
            yield range(int(np.searchsorted(begins, begins[count] - room, "left")), count)
            return
        yield range(start, stop)
        further = int(np.searchsorted(begins, begins[start] + stride, "right")) - 1
        reaches = int(np.searchsorted(begins, begins[stop + 1] - room, "left"))
        start = min(max(further, reaches, start + 1), stop)


def scored_words(begins: np.ndarray, spans: Sequence[range]) -> list[range]:
    """The words that each window scores: 0 … W − 1 are cut into as many runs, in order.

    A word goes to the window that shows most around it, which is the smaller of what it shows
    before and after it in pieces; where the text itself begins or ends, nothing is missing on that
    side. The earlier window where two show the same.
    """
    if not spans:
        return []
    middle = begins[:-1] + begins[1:]  # twice the middle of each word
    cuts = [0]
    for left, right in pairwise(spans):
        # Only where they overlap is there a choice: what `left` shows after, `right` before a word.
        words = np.arange(right.start, left.stop)
        after_in_left = 2 * begins[left.stop] - middle[words]
        before_in_right = middle[words] - 2 * begins[right.start]
        later = words[after_in_left < before_in_right]
        cuts.append(int(later[0]) if len(later) else left.stop)
    cuts.append(len(begins) - 1)
    return [range(a, b) for a, b in pairwise(cuts)]


# --- texts and pairs of texts ---------------------------------------------------------------------

Long = Literal["cut", "windows"]


class TextWindows:
    """Texts, or pairs of them, as windows: for a label to each.

        texts, seconds   second[i] belongs to texts[i]; None: single texts
        long             what becomes of a text longer than `max_length`, marks included
                         'cut': its head is read; of a pair, the longer one loses its tail first
                         'windows': all is read, in windows half of which overlap, and their
                         values are averaged by `merge`; of a pair, the second is read so

    How many were cut, and how much of them, stands in `notes`. A text of zero length is a window of
    marks, and counted.

    Raises ValueError where `max_length` has no room for a piece of each text, or where the first of
    a pair leaves none to windows of the second.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        texts: Sequence[str],
        seconds: Sequence[str] | None = None,
        *,
        max_length: int,
        long: Long = "cut",
    ) -> None:
        if long not in ("cut", "windows"):
            raise ValueError(f"long must be 'cut' or 'windows', got {long!r}")
        if seconds is not None and len(seconds) != len(texts):
            raise ValueError(f"expected as many second texts as first ones, {len(texts)}")
        self.marks = Marks.of(tokenizer)
        marks = self.marks[:2] if seconds is None else self.marks[2:]
        room = max_length - sum(map(len, marks))
        _check_room(room, max_length, 1 if seconds is None else 2)
        self.count = len(texts)
        self.empty = self.unknown = self.cut = self.cut_pieces = self.several = 0
        self.windows: list[Window] = []
        unknown = unknown_id(tokenizer)
        for start in range(0, len(texts), _BATCH):
            part = slice(start, start + _BATCH)
            firsts = tokenizer.encode_each(texts[part], allow_unknown=True)
            others = None
            if seconds is not None:
                others = tokenizer.encode_each(seconds[part], allow_unknown=True)
            for i, first in enumerate(firsts):
                second = None if others is None else others[i]
                both = [first] if second is None else [first, second]
                self.empty += any(len(ids) == 0 for ids in both)
                self.unknown += unknown is not None and any(unknown in ids for ids in both)
                parts = self._cut if long == "cut" else self._spread
                self.windows += (
                    self._window(start + i, a, b) for a, b in parts(first, second, room)
                )

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def notes(self) -> list[str]:
        """A sentence on each thing that a user should know of."""
        total = counted(self.count, "text")
        said = []
        if self.empty:
            said.append(f"{self.empty:,} of {total} of zero length for the tokenizer")
        if self.unknown:
            said.append(f"{self.unknown:,} of {total} have a piece that the tokenizer lacks")
        if self.cut:
            pieces = counted(self.cut_pieces, "piece")
            said.append(f"{self.cut:,} of {total} too long: {pieces} cut off their ends")
        if self.several:
            said.append(f"{self.several:,} of {total} too long: read in several windows, averaged")
        return said

    def merge(self, values: np.ndarray) -> np.ndarray:
        """The mean over each text's windows: (windows, …) -> (texts, …)."""
        values = np.asarray(values)
        if len(values) != len(self.windows):
            raise ValueError(
                f"expected {len(self.windows)} values, one a window, got {len(values)}"
            )
        owners = np.array([window.example for window in self.windows], np.int64)
        if self.several == 0:
            return values
        starts = np.searchsorted(owners, np.arange(self.count))
        sums = np.add.reduceat(values, starts, axis=0)
        sizes = np.bincount(owners, minlength=self.count)
        return sums / sizes.reshape(-1, *[1] * (values.ndim - 1)).astype(values.dtype)

    def _cut(
        self, first: np.ndarray, second: np.ndarray | None, room: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        lengths = [len(first), 0 if second is None else len(second)]
        over = sum(lengths) - room
        if over > 0:
            self.cut += 1
            self.cut_pieces += over
        if second is None:
            yield first[:room], None
            return
        keep = longest_first(lengths[0], lengths[1], room)
        yield first[: keep[0]], second[: keep[1]]

    def _spread(
        self, first: np.ndarray, second: np.ndarray | None, room: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        text, space = (first, room) if second is None else (second, room - len(first))
        if second is not None and space < 1:
            raise ValueError(
                f"a first text of {len(first)} pieces leaves no room for windows of the second "
                f"one among {room}: give a larger max_length, or cut long texts"
            )
        starts = [0]
        while starts[-1] + space < len(text):
            starts.append(min(starts[-1] + max(1, space // 2), len(text) - space))
        self.several += len(starts) > 1
        for start in starts:
            part = text[start : start + space]
            yield (part, None) if second is None else (first, part)

    def _window(self, example: int, first: np.ndarray, second: np.ndarray | None) -> Window:
        marks = self.marks
        if second is None:
            ids = np.array([*marks.before, *first, *marks.after], np.int64)
            return Window(example, ids, np.zeros_like(ids))
        head = [*marks.before_pair, *first, *marks.between]
        tail = [*second, *marks.after_pair]
        types = np.repeat(np.array([0, 1], np.int64), [len(head), len(tail)])
        return Window(example, np.array(head + tail, np.int64), types)


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """How much of two texts is kept: the longer loses pieces until both fit. 10, 4, 10 -> 6, 4"""
    if first + second <= room:
        return first, second
    half = room // 2
    if second <= half:
        return room - second, second
    if first <= room - half:
        return first, room - first
    return room - half, half


def _check_room(room: int, max_length: int, needed: int) -> None:
    if room < needed:
        raise ValueError(
            f"max_length {max_length} has no room for {counted(needed, 'piece')} beside the "
            f"{max_length - room} marks around them"
        )
