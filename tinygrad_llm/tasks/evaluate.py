"""How well a language model predicts a text.

    loss            L = −(1/n) Σ ln p(token | those before it)      nats per token, n tokens
    perplexity      e^L
    bits per byte   n L / (ln 2 · bytes)                            comparable between tokenizers

A model sees T tokens at most, so a longer text is read in windows, each `stride` tokens further on
than the one before, and of each only that is scored which no earlier one has scored:

    T = 4, stride 4    a b c d → b c d e        side by side: each knows nothing of the one before,
                       e f g h → f g h i        so f is told from e alone
    T = 4, stride 2    a b c d → b c d e
                       c d e f →     f g        f is told from c d e

Every token but the first is scored exactly once. A smaller stride is a better reader at more cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np

from tinygrad_llm.autograd import no_grad
from tinygrad_llm.data.loader import IGNORE_INDEX
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.metrics.language import LanguageScore
from tinygrad_llm.models.gpt import GPT
from tinygrad_llm.ops import bounds

Watch = Callable[[int, int], None]  # (tokens, bytes; 0 where the tokens do not tell them)


@dataclass(frozen=True)
class Score(LanguageScore):
    """What the scoring of a text found, and how long it took."""

    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """How fast it was scored."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Reading:
    """How a text is read: T tokens at a time, `stride` on from window to window, B side by side.

    0: as many as the model sees (T), windows side by side (stride = T). `fit` fills them in.
    apart: no window reaches from one document into the next, as where a run was trained so.
    """

    context: int = 0
    stride: int = 0
    batch_size: int = 16
    apart: bool = False

    def fit(self, model: GPT) -> Reading:
        """The same with every number given; ValueError for what this model cannot do."""
        sees = model.config.n_positions
        context = self.context or sees
        stride = self.stride or context
        for name, value, most in (("context", context, sees), ("stride", stride, context)):
            if not 1 <= value <= most:
                whose = "what the model sees" if name == "context" else "the context"
                raise ValueError(f"{name} must be from 1 to {most}, {whose}, got {value}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        return replace(self, context=context, stride=stride)


def evaluate_text(
    model: GPT,
    tokenizer: Tokenizer,
    parts: Iterable[tuple[str, bool]],
    reading: Reading | None = None,
    watch: Watch | None = None,
) -> Score:
    """Score every token of the documents in `parts`, with `<|endoftext|>` before each of them.

    A part is (text, whether its document ends there), as `files.parts` gives them; one is in memory
    at a time, and of its tokens a window. The first mark is where the model begins and is not
    scored, the others are. Raises ValueError for a tokenizer without the mark or with more tokens
    than the model, and where there is nothing to score.

    watch: is called with the tokens scored so far and the bytes they stand for, now and then.
    """
    if tokenizer.eos_id is None:
        raise ValueError("this tokenizer has no <|endoftext|> to begin a text with")
    reading = reading or Reading()
    stream = _Documents(parts, tokenizer)
    rows: Iterator[Iterator[np.ndarray]] = stream.rows(reading.apart)
    if not reading.apart:
        rows = iter([chain.from_iterable(rows)])
    found = _evaluate(model, tokenizer, rows, reading, watch)
    return replace(found, bytes=stream.bytes)  # also where the tokens do not spell the text out


class _Documents:
    """The documents as token ids, and how many bytes of text they had so far."""

    def __init__(self, parts: Iterable[tuple[str, bool]], tokenizer: Tokenizer) -> None:
        self._parts, self._tokenizer = iter(parts), tokenizer
        self._next = next(self._parts, None)
        self._mark = np.array([tokenizer.eos_id], np.int64)
        self.bytes = 0

    def rows(self, apart: bool) -> Iterator[Iterator[np.ndarray]]:
        """A document after the other, the mark before it; apart: also the mark behind it.

        Each is to be read to its end before the next is taken.
        """
        while self._next is not None:
            yield self._document(apart)

    def _document(self, apart: bool) -> Iterator[np.ndarray]:
        yield self._mark
        ends = False
        while self._next is not None and not ends:
            text, ends = self._next
            self.bytes += len(text.encode())
            yield self._tokenizer.encode(text)
            self._next = next(self._parts, None)
        if apart and self._next is not None:
            yield self._mark


def evaluate_ids(
    model: GPT,
    tokenizer: Tokenizer,
    ids: np.ndarray,
    reading: Reading | None = None,
    spans: Iterable[tuple[int, int]] | None = None,
    watch: Watch | None = None,
) -> Score:
    """Score ids[1:], such as a run's validation split; a memory map is read in pieces.

    With windows side by side that is the run's `val_loss`. `spans` are the documents of a `reading`
    with `apart`, as first : stop; the first id of each is not scored. Raises ValueError as
    `evaluate_text`.
    """
    reading = reading or Reading()
    if reading.apart != (spans is not None):
        raise ValueError("expected spans where documents are read apart, and only there")
    rows = (
        _pieces(ids[first:stop]) for first, stop in ([(0, len(ids))] if spans is None else spans)
    )
    return _evaluate(model, tokenizer, rows, reading, watch)


def _pieces(ids: np.ndarray) -> Iterator[np.ndarray]:
    return (ids[start : start + _PIECE] for start in range(0, len(ids), _PIECE))


_PIECE = 1 << 16  # ids


def _evaluate(
    model: GPT,
    tokenizer: Tokenizer,
    rows: Iterable[Iterable[np.ndarray]],
    reading: Reading,
    watch: Watch | None,
) -> Score:
    """The score of the rows of ids, each read from its first on."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model knows "
            f"{model.config.vocab_size:,}: they do not belong together"
        )
    reading = reading.fit(model)
    lengths = byte_lengths(tokenizer)
    nats, tokens, size, began = 0.0, 0, 0, time.perf_counter()
    model.eval()
    all_windows = chain.from_iterable(
        windows(pieces, reading.context, reading.stride) for pieces in rows
    )
    with no_grad():
        while batch := list(islice(all_windows, reading.batch_size)):
            x, y = (np.stack(part) for part in zip(*batch, strict=True))  # (B, T) each
            scored = y[y != IGNORE_INDEX]
            nats += _loss(model, x, y) * len(scored)
            tokens += len(scored)
            size += 0 if lengths is None else int(lengths[scored].sum())
            if watch is not None:
                watch(tokens, size)
    if not tokens:
        raise ValueError("there is nothing to score: the text has no token after its first")
    seconds = time.perf_counter() - began
    return Score(nats, tokens, None if lengths is None else size, seconds)


def _loss(model: GPT, x: np.ndarray, y: np.ndarray) -> float:
    device = next(iter(model.parameters())).device
    inputs, targets = (bounds.ids_on(ids, device) for ids in (x, y))
    return model.loss(inputs, targets, ignore_index=IGNORE_INDEX).item()


def windows(
    pieces: Iterable[Any], context: int, stride: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(x, y), int64 of shape (T,) each, over the ids of all pieces in one row.

    y[t] is what follows x[t], or `IGNORE_INDEX` where an earlier window has scored it. What is
    missing from the last window is filled up with x = 0 and y = `IGNORE_INDEX`. No more than a
    window and a piece are held.
    """
    held, first = np.empty(0, np.int64), True
    for piece in pieces:
        held = np.concatenate([held, np.asarray(piece, np.int64)])
        start = 0
        while len(held) - start > context:
            ids = held[start : start + context + 1]
            yield _window(ids, context, 0 if first else context - stride)
            start, first = start + stride, False
        held = held[start:]
    seen = 0 if first else context - stride
    if len(held) - 1 > seen:
        yield _window(held, context, seen)


def _window(ids: np.ndarray, context: int, seen: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of at most T + 1 ids, the first `seen` targets left out."""
    x, y = np.zeros(context, np.int64), np.full(context, IGNORE_INDEX, np.int64)
    x[: len(ids) - 1] = ids[:-1]
    y[seen : len(ids) - 1] = ids[1 + seen :]
    return x, y


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray | None:
    """lengths[id] = bytes of UTF-8 that the token stands for; the mark between documents has 0.

    None for WordPiece and what is not of our kinds: their tokens do not spell the text out.
    """
    if tokenizer.kind in ("wordpiece", "other"):
        return None
    lengths = np.zeros(tokenizer.vocab_size, np.int64)
    for token_id in range(tokenizer.vocab_size):
        if token_id != tokenizer.eos_id and tokenizer.id_to_token(token_id) is not None:
            piece = tokenizer.piece(token_id)
            lengths[token_id] = len(piece if isinstance(piece, bytes) else piece.encode())
    return lengths
