"""Questions and contexts as windows of pieces, and answers as the pieces they begin and end with.

    pieces    [CLS] who wrote it ? [SEP] ada wrote it in 18 ##43 . [SEP]
    place     0     1   2     3  4 5     6   7     8  9  10 11   12 13
    types     0     0   0     0  0 0     1   1     1  1  1  1    1  1
    answer                               6, 6: characters 0 … 3 of the context, 'Ada'
    no answer 0, 0: [CLS] stands for it

A context that is longer than the room beside its question is read in windows half of which overlap;
a window that does not hold the whole answer has none, as in Hugging Face. Characters are those of
the context as it was given: an answer is cut out of it, never put together from pieces.

Legend: K windows, T pieces of one, with its marks.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tinygrad_llm.data.questions import Answer
from tinygrad_llm.data.tables import counted
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.data.windows import Long, Marks, Window


class Pieces(NamedTuple):
    """Pieces of a text: piece i is of the characters starts[i] … stops[i] − 1.

    Blanks at either end are no part of it; a piece of nothing else has starts[i] = stops[i].
    """

    ids: np.ndarray  # all (n,)
    starts: np.ndarray
    stops: np.ndarray

    def covering(self, start: int, stop: int) -> tuple[int, int] | None:
        """(first, last): the pieces that these characters are of; None where they are of none."""
        inside = np.flatnonzero(
            (self.starts < self.stops) & (self.stops > start) & (self.starts < stop)
        )
        return (int(inside[0]), int(inside[-1])) if len(inside) else None


def pieces_of(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Pieces]:
    """The pieces of each text, without marks."""
    found: list[Pieces] = []
    for start in range(0, len(texts), _BATCH):
        batch = list(texts[start : start + _BATCH])
        encodings = tokenizer.tokenizer.encode_batch(batch, add_special_tokens=False)
        for text, encoding in zip(batch, encodings, strict=True):
            offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
            starts, stops = _without_blanks(text, offsets)
            if not text.isascii():
                stops = _with_marks(text, starts, stops)
            found.append(Pieces(np.array(encoding.ids, np.int64), starts, stops))
    return found


_BATCH = 256  # texts encoded at a time: an Encoding is a hundred times larger than its ids


def _without_blanks(text: str, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Byte-level pieces begin with the blank before a word: ' caf' -> 'caf'."""
    blank = np.array([letter.isspace() for letter in text] + [True])
    starts, stops = offsets[:, 0].copy(), offsets[:, 1].copy()
    while (more := (starts < stops) & blank[starts]).any():
        starts += more
    while (more := (starts < stops) & blank[stops - 1]).any():
        stops -= more
    return starts, stops


def _with_marks(text: str, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """The accents that a tokenizer drops belong to the letter before them: 'cafe' + '́ ' -> 'café'.

    So do joiners and variation selectors, of which emoji are made.
    """
    stops = stops.copy()
    for i in range(len(stops)):
        if starts[i] == stops[i]:
            continue
        stop = int(stops[i])
        taken = starts[i + 1 :]
        limit = int(taken[0]) if len(taken) else len(text)
        while stop < limit and _clings(text[stop]):
            stop += 1
        stops[i] = stop
    return stops


def _clings(letter: str) -> bool:
    return unicodedata.category(letter)[0] == "M" or letter == "\u200d"


class AnswerWindows:
    """Questions about contexts as windows, each with the place of its answer.

        answers      answers[i]: what is right, None where the context does not tell; `answers`
                     None: nothing is known, as of new questions
        max_length   the most pieces of a window, marks included
        long         'windows': a long context is read in windows that overlap; 'cut': its head is

    A question is cut where it would leave less than a quarter of the room to the context. That, and
    what of the answers could not be learnt, stands in `notes`.

    Raises ValueError for a tokenizer without [CLS], and where `max_length` has no room for a piece
    of each text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        questions: Sequence[str],
        contexts: Sequence[str],
        answers: Sequence[Answer | None] | None = None,
        *,
        max_length: int,
        long: Long = "windows",
    ) -> None:
        if long not in ("cut", "windows"):
            raise ValueError(f"long must be 'cut' or 'windows', got {long!r}")
        self.marks = Marks.of(tokenizer)
        cls_id = tokenizer.token_to_id("[CLS]")
        if cls_id is None or self.marks.before_pair[:1] != [cls_id]:
            raise ValueError(
                "question answering needs a tokenizer that puts [CLS] before a text, the place of "
                "'no answer'; this one does not: take a BERT's"
            )
        room = max_length - sum(map(len, self.marks[2:]))
        if room < 2:
            raise ValueError(
                f"max_length {max_length} has no room for a question and a context beside the "
                f"{max_length - room} marks around them"
            )
        self.long = long
        self.count = len(questions)
        self.cut_questions = self.several = self.cut = self.unseen = self.inexact = 0
        self.vanished = self.empty = 0
        self._contexts = _by_text(tokenizer, contexts)
        self._heads = self._cut_questions(_by_text(tokenizer, questions), room)
        self._spans = [] if answers is None else list(self._of_pieces(answers))
        windows = [part for i in range(self.count) for part in self._parts(i, room)]
        table = np.array(windows, np.int64).reshape(-1, 3)
        self.examples, self.firsts, self.sizes = table.T  # (K,) each; pieces of contexts
        # What is learnt: (K, 2), the places of the first and of the last piece; 0, 0 for none.
        self.targets = np.zeros((len(table), 2), np.int64)
        self.learnable = np.ones(len(table), bool)
        if answers is not None:
            self._set_targets(answers)

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def lengths(self) -> np.ndarray:
        """T of each window, (K,)."""
        heads = np.array([len(head) for head in self._heads], np.int64)
        marks = sum(map(len, self.marks[2:]))
        return heads[self.examples] + self.sizes + marks

    def window(self, k: int) -> Window:
        """The pieces of window k with their marks."""
        i, first, size = int(self.examples[k]), int(self.firsts[k]), int(self.sizes[k])
        marks = self.marks
        head = [*marks.before_pair, *self._heads[i], *marks.between]
        tail = [*self._contexts[i].ids[first : first + size], *marks.after_pair]
        types = np.repeat(np.array([0, 1], np.int64), [len(head), len(tail)])
        return Window(i, np.array(head + tail, np.int64), types)

    def begin(self, k: int) -> int:
        """The place of the first piece of the context in window k."""
        head = self._heads[self.examples[k]]
        return len(self.marks.before_pair) + len(head) + len(self.marks.between)

    def allowed(self, k: int) -> np.ndarray:
        """(T,): the places at which an answer may begin and end: the context, less blanks."""
        context, first = self._contexts[self.examples[k]], int(self.firsts[k])
        part = slice(first, first + int(self.sizes[k]))
        found = np.zeros(self.begin(k) + int(self.sizes[k]) + len(self.marks.after_pair), bool)
        found[self.begin(k) :][: self.sizes[k]] = context.starts[part] < context.stops[part]
        return found

    def characters(self, k: int, first: int, last: int) -> tuple[int, int]:
        """(start, stop): the characters of the context from place `first` to place `last`."""
        context, shift = self._contexts[self.examples[k]], int(self.firsts[k]) - self.begin(k)
        return int(context.starts[first + shift]), int(context.stops[last + shift])

    @property
    def longest_answer(self) -> int:
        """Pieces of the longest answer; 0 where there is none."""
        return max(
            (last - first + 1 for span in self._spans if span for first, last in [span]), default=0
        )

    @property
    def notes(self) -> list[str]:
        """A sentence on each thing that a user should know of."""
        total = counted(self.count, "question")
        said = []
        if self.empty:
            said.append(
                f"{self.empty:,} of {total} have a context of zero length for the tokenizer"
            )
        if self.cut_questions:
            said.append(
                f"{self.cut_questions:,} of {total} leave too little room to their contexts: cut "
                "at their ends"
            )
        if self.several:
            said.append(
                f"{self.several:,} of {total} have a context longer than a window: read in several "
                "that overlap"
            )
        if self.cut:
            said.append(f"{self.cut:,} of {total} have a context too long: only its head is read")
        if self.inexact:
            said.append(
                f"{self.inexact:,} of {total} have an answer that begins or ends within a piece: "
                "the whole piece is taken"
            )
        if self.vanished:
            said.append(
                f"{self.vanished:,} of {total} have an answer of which the tokenizer leaves nothing"
            )
        if self.unseen:
            said.append(
                f"{self.unseen:,} of {total} have an answer that no window shows as a whole: it is "
                "neither learnt nor found"
            )
        return said

    # --- inside -----------------------------------------------------------------------------------

    def _cut_questions(self, questions: Sequence[Pieces], room: int) -> list[np.ndarray]:
        heads = []
        for question, context in zip(questions, self._contexts, strict=True):
            most = room - min(len(context.ids), max(1, room // 4))
            self.cut_questions += len(question.ids) > most
            heads.append(question.ids[:most])
        return heads

    def _of_pieces(self, answers: Sequence[Answer | None]) -> list[tuple[int, int] | None]:
        """The first and the last piece of each answer; None where there is none."""
        spans: list[tuple[int, int] | None] = []
        for answer, context in zip(answers, self._contexts, strict=True):
            span = None if answer is None else context.covering(answer.start, answer.stop)
            if answer is not None and span is None:
                self.vanished += 1
            elif answer is not None and span is not None:
                exact = context.starts[span[0]], context.stops[span[1]]
                self.inexact += exact != (answer.start, answer.stop)
            spans.append(span)
        return spans

    def _parts(self, i: int, room: int) -> list[tuple[int, int, int]]:
        """(example, first piece of the context, pieces of it) of each window."""
        total = len(self._contexts[i].ids)
        space = room - len(self._heads[i])
        self.empty += total == 0
        if total <= space:
            return [(i, 0, total)]
        if self.long == "cut":
            self.cut += 1
            return [(i, 0, space)]
        self.several += 1
        starts = [0]
        while starts[-1] + space < total:
            starts.append(min(starts[-1] + max(1, space // 2), total - space))
        return [(i, start, space) for start in starts]

    def _set_targets(self, answers: Sequence[Answer | None]) -> None:
        shown = np.zeros(self.count, bool)  # nothing is to be found, or a window has all of it
        for i, answer in enumerate(answers):
            shown[i] = answer is None
        for k in range(len(self)):
            span = self._spans[self.examples[k]]
            first, size = int(self.firsts[k]), int(self.sizes[k])
            if span is not None and first <= span[0] and span[1] < first + size:
                shift = self.begin(k) - first
                self.targets[k] = span[0] + shift, span[1] + shift
                shown[self.examples[k]] = True
        self.learnable = shown[self.examples]
        self.unseen = int((~shown).sum()) - self.vanished


def _by_text(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Pieces]:
    """The pieces of each; texts that come again, as SQuAD's contexts do, are encoded once."""
    places = {text: n for n, text in enumerate(dict.fromkeys(texts))}
    found = pieces_of(tokenizer, list(places))
    return [found[places[text]] for text in texts]
