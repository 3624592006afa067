"""Span corruption, how T5 learns from plain text: fill in what is missing.

    text      Thank you for inviting me to your party last week .
    source    Thank you <extra_id_0> me to your party <extra_id_1> week .
    target    <extra_id_0> for inviting <extra_id_1> last

A share of the tokens is hidden, in spans of a few; each span leaves a mark, a sentinel, and the
target says what stood at which. Source and target both end with `<|endoftext|>`.

Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text transformer",
JMLR 2020, section 3.1.4.

Dimensions: B texts in a batch, L tokens in a text, K spans in a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from tinygrad_llm.backend import RandomStream
from tinygrad_llm.data.loader import (
    IGNORE_INDEX,
    Batch,
    DocumentWindows,
    OnePass,
    PackedWindows,
)
from tinygrad_llm.data.report import SILENT, Report
from tinygrad_llm.data.texts import Text
from tinygrad_llm.data.token_files import tokens_of
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.models.encoder_decoder import EncoderDecoder
from tinygrad_llm.tasks.causal import (
    Documents,
    Order,
    ValBy,
    check_sizes,
    refuse_other_texts,
    sides,
    training_batches,
    which_texts,
)
from tinygrad_llm.tasks.pairs import PairBatch, pair_batch, pair_loss, pair_targets
from tinygrad_llm.tensor import Tensor


class SpanTask:
    """Windows of a text with spans hidden, to train on; a part of it to validate on.

    Args:
        text: the text.
        tokenizer: cuts it into tokens; it knows the sentinels, see `with_sentinels`.
        context: tokens of the longest source; the text behind it is a little longer, as spans
            shrink to one token each (`text_length`).
        batch_size: texts in a batch, B.
        noise_density: the share of tokens that is hidden.
        mean_span: tokens of a hidden span, on average.
        val_fraction, val_by, validation, documents, order, eval_batches, seed, report: as in
            `CausalTask`.

    What is validated on is hidden in the same way every time. Raises ValueError where a part of the
    text is too short, or the tokenizer has too few sentinels.
    """

    def __init__(
        self,
        text: Text,
        tokenizer: Tokenizer,
        *,
        context: int,
        batch_size: int,
        noise_density: float = 0.15,
        mean_span: float = 3.0,
        val_fraction: float = 0.1,
        val_by: ValBy = "tail",
        validation: Text | None = None,
        documents: Documents = "packed",
        order: Order = "random",
        eval_batches: int = 0,
        seed: int = 0,
        report: Report = SILENT,
    ) -> None:
        self.text, self.validation_text = text, validation
        self.tokenizer, self.eval_batches = tokenizer, eval_batches
        self.spans = Spans(tokenizer, noise_density, mean_span)
        length = text_length(context, noise_density, mean_span)
        self.spans.check_room(length)
        if validation is None:
            train, held_out = sides(text, tokenizer, val_fraction, val_by, report)
        else:
            train = tokens_of(text, tokenizer, report)
            held_out = tokens_of(validation, tokenizer, report)
        # A window of the loaders has a text's first L − 1 tokens in x and its last L − 1 in y.
        window = length - 1
        check_sizes(train, held_out, window, documents)
        self.train = training_batches(train, batch_size, window, documents, order, seed)
        windows = DocumentWindows if documents == "separate" else None
        held = windows(held_out, window) if windows else PackedWindows(held_out.ids, window)
        self.held_out = OnePass(held, batch_size)
        self.stream = RandomStream(seed + 1)

    def next_batch(self) -> PairBatch:
        """The next training batch, its spans drawn anew."""
        return self._hidden(next(self.train), self.stream)

    def validation(self) -> Iterator[PairBatch]:
        """The validation batches, from the first."""
        stream = RandomStream(0)
        batches = (self._hidden(batch, stream) for batch in self.held_out)
        return islice(batches, self.eval_batches or None)

    def _hidden(self, batch: Batch, stream: RandomStream) -> PairBatch:
        pairs = [self.spans.hide(ids, stream) for ids in _texts(batch)]
        return pair_batch([source for source, _ in pairs], [target for _, target in pairs])

    def loss(self, model: EncoderDecoder, batch: PairBatch) -> Tensor:
        """The mean cross-entropy over the targets of the batch, in nats: a scalar Tensor."""
        return pair_loss(model, batch)

    def size(self, batch: PairBatch) -> int:
        """How many targets the batch has."""
        return pair_targets(batch)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json: a model without it reads and writes nothing."""
        self.tokenizer.save(folder)

    def state(self) -> dict[str, Any]:
        """The position in the training data and in the random spans, and which data it is."""
        position = {"train": self.train.state(), "spans": self.stream.state()}
        return position | which_texts(self.text, self.validation_text)

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`; ValueError when a text is no longer the same."""
        refuse_other_texts(state, self.text, self.validation_text)
        self.train.load_state(state["train"])
        self.stream.load_state(state["spans"])


def _texts(batch: Batch) -> Iterator[np.ndarray]:
    """The tokens of each window, without what fills it up."""
    for x, y in zip(*batch, strict=True):
        real = y != IGNORE_INDEX
        yield np.append(x[:1], y[real])


# --- hiding ---------------------------------------------------------------------------------------


class Spans:
    """Hides spans of a text of token ids.

    Args:
        tokenizer: knows `<extra_id_0>`, `<extra_id_1>` … and `<|endoftext|>`.
        noise_density: the share of tokens that is hidden, in (0, 1).
        mean_span: tokens of a hidden span, on average, at least 1.
    """

    def __init__(
        self, tokenizer: Tokenizer, noise_density: float = 0.15, mean_span: float = 3.0
    ) -> None:
        _check_noise(noise_density, mean_span)
        self.noise_density, self.mean_span = noise_density, mean_span
        self.sentinels = sentinel_ids(tokenizer)
        if tokenizer.eos_id is None:
            raise ValueError(
                "span corruption needs a tokenizer with <|endoftext|>, this one has none"
            )
        self.end = tokenizer.eos_id

    def check_room(self, length: int) -> None:
        """Raise ValueError where a text of so many tokens has more spans than sentinels."""
        _, spans = span_counts(length, self.noise_density, self.mean_span)
        if spans > len(self.sentinels):
            raise ValueError(
                f"a text of {length} tokens has {spans} spans, but the tokenizer has only "
                f"{len(self.sentinels)} sentinels: give a shorter context or more sentinels"
            )

    def hide(self, ids: np.ndarray, stream: RandomStream) -> tuple[np.ndarray, np.ndarray]:
        """(source, target) for a text of at least 2 tokens, int64; the spans come from `stream`."""
        self.check_room(len(ids))
        hidden = noise_mask(len(ids), self.noise_density, self.mean_span, stream)
        starts = np.flatnonzero(np.diff(hidden, prepend=False) & hidden)
        ends = np.flatnonzero(np.diff(hidden, append=False) & hidden) + 1
        source, target = [], []
        before = 0
        for start, end, sentinel in zip(starts, ends, self.sentinels, strict=False):
            source += [*ids[before:start], sentinel]
            target += [sentinel, *ids[start:end]]
            before = end
        source += [*ids[before:], self.end]
        return np.array(source, np.int64), np.array([*target, self.end], np.int64)


def restore(
    source: Sequence[int] | np.ndarray,
    target: Sequence[int] | np.ndarray,
    sentinels: Sequence[int],
) -> list[int]:
    """The text, from a source and what was written for it: `Spans.hide` backwards.

        [5, 90, 7], [90, 6, 6]        sentinels [90, 91]  ->  [5, 6, 6, 7]

    An end that both have stays, once. A sentinel that the target does not have stands for nothing.
    """
    known = set(sentinels)
    source, target = [int(i) for i in source], [int(i) for i in target]
    if source and target and source[-1] == target[-1]:
        target = target[:-1]
    spans: dict[int, list[int]] = {}
    inside: list[int] = []  # what stands before the first sentinel belongs nowhere
    for token in target:
        if token in known:
            inside = spans.setdefault(token, [])
        else:
            inside.append(token)
    text: list[int] = []
    for token in source:
        text += spans.get(token, []) if token in known else [token]
    return text


def noise_mask(
    length: int, noise_density: float, mean_span: float, stream: RandomStream
) -> np.ndarray:
    """(L,) booleans, True where a token is hidden: K spans of noise among K + 1 of text.

    How many tokens and spans is fixed (`span_counts`); where they are is drawn from `stream`, every
    way to place them apart being as likely as any other. (T5's own code begins with text and ends
    with noise: of a short text, which has one span, it always hides the end.)
    """
    noise, spans = span_counts(length, noise_density, mean_span)
    lengths = np.empty(2 * spans + 1, np.int64)  # text, noise, text … text
    lengths[1::2] = _divided(noise, spans, stream)
    lengths[0::2] = _divided(length - noise + 2, spans + 1, stream)
    lengths[[0, -1]] -= 1  # there may be none before the first span and after the last
    return np.repeat(np.arange(2 * spans + 1) % 2 == 1, lengths)


def span_counts(length: int, noise_density: float, mean_span: float) -> tuple[int, int]:
    """(hidden tokens, spans) in a text of so many tokens: (20, 0.15, 3) -> (3, 1)"""
    if length < 2:
        raise ValueError(f"a text needs at least 2 tokens for one to be hidden, got {length}")
    noise = min(max(round(length * noise_density), 1), length - 1)
    spans = max(round(noise / mean_span), 1)
    return noise, min(spans, noise, length - noise)


def _divided(total: int, parts: int, stream: RandomStream) -> np.ndarray:
    """Lengths of at least 1 that add up to `total`, all divisions equally likely."""
    cuts = np.sort(stream.permutation(total - 1)[: parts - 1]) + 1
    return np.diff(cuts, prepend=0, append=total)


def text_length(context: int, noise_density: float, mean_span: float) -> int:
    """The longest L of which the source, with its sentinels and its end, has `context` tokens."""
    _check_noise(noise_density, mean_span)

    def source(length: int) -> int:
        noise, spans = span_counts(length, noise_density, mean_span)
        return length - noise + spans + 1

    if context < source(2):
        raise ValueError(f"a context of {context} is too short for span corruption: give 3 or more")
    length = 2
    while source(length + 1) <= context:
        length += 1
    return length


def _check_noise(noise_density: float, mean_span: float) -> None:
    if not 0 < noise_density < 1:
        raise ValueError(f"noise_density must be above 0 and below 1, got {noise_density}")
    if not 1 <= mean_span < np.inf:
        raise ValueError(f"mean_span must be at least 1, got {mean_span}")


# --- sentinels ------------------------------------------------------------------------------------


def with_sentinels(tokenizer: Tokenizer, count: int = 100) -> Tokenizer:
    """A tokenizer that also knows <extra_id_0> … <extra_id_{count − 1}>, under T5's names.

    Those that are missing get new ids after the last one; T5's own vocabularies have them all.
    """
    if count < 1:
        raise ValueError(f"expected at least 1 sentinel, got {count}")
    copy = tokenizers.Tokenizer.from_str(tokenizer.tokenizer.to_str())
    copy.add_special_tokens([_sentinel(i) for i in range(count)])
    return Tokenizer(copy)


def sentinel_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids of <extra_id_0>, <extra_id_1> … as far as there are any; ValueError for none."""
    found: list[int] = []
    while (token_id := tokenizer.token_to_id(_sentinel(len(found)))) is not None:
        found.append(token_id)
    if not found:
        raise ValueError(
            "span corruption needs a tokenizer with <extra_id_0> and more, this one has none: "
            "make it by with_sentinels(tokenizer)"
        )
    return found


def _sentinel(number: int) -> str:
    return f"<extra_id_{number}>"
