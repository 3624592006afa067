"""Tagging: a label for every word of a sentence, and how to learn it.

    rows      sentences → rows of words, and of pieces where the tagger has a checkpoint
    batches   rows of similar length side by side, all of them once in an epoch, in another order
              each time
    tags      emissions of the rows → those of the sentences → tags

A tagger over words has a row for each sentence. One on a checkpoint reads whole words into a row of
pieces, neighbouring sentences of a document together, and what stands before and after them:

    [CLS] context … | sentence 7 | sentence 8 | … context [SEP]         7 and 8 are scored here

Every word is scored exactly once. A sentence longer than a row is read in several that overlap
(`data.windows`), and its tags are chosen over all of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tinygrad_llm.autograd import no_grad
from tinygrad_llm.data.conll import Sentences
from tinygrad_llm.data.labels import LabelSet, Scheme, convert, detect, fault_note
from tinygrad_llm.data.loader import IGNORE_INDEX, shuffled
from tinygrad_llm.data.tables import counted
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.data.windows import Marks, Window, WordWindows, pad
from tinygrad_llm.metrics.classification import majority
from tinygrad_llm.metrics.entities import entity_scores
from tinygrad_llm.models.bert import BertConfig
from tinygrad_llm.models.pretrained import check_vocabulary
from tinygrad_llm.models.tagger import Tagger, TaggerConfig
from tinygrad_llm.models.word_features import LONGEST_WORD, Vocabularies, WordReader
from tinygrad_llm.tensor import Tensor

Batch = dict[str, np.ndarray]  # see `Tagger.emissions`; labels and sentences are in it, too


# --- from sentences to rows -----------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Words start … stop − 1 of a sentence, scored in a row from its word `at` on."""

    sentence: int
    start: int
    stop: int
    at: int


@dataclass(frozen=True)
class Row:
    """Words side by side, those of `parts` scored; with a checkpoint also their pieces.

    first[i] is where word i begins among the pieces; owners[t] is the word of piece t, counted from
    1, and 0 for a mark.
    """

    words: list[str]
    parts: list[Part]
    pieces: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    first: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    owners: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def __len__(self) -> int:
        """How long it is: what rows in a batch should have in common."""
        return len(self.pieces) or len(self.words)


class Rows:
    """The rows of sentences for a tagger of this config, in their order.

    Args:
        config: says how they are read.
        tokenizer: the checkpoint's; None for a tagger without one.
        words: sentences of words; those of zero length have no row.
        documents: the number of the document of each sentence; None: each is one of its own.

    `notes` says in sentences what a user should know of how they were read.
    """

    def __init__(
        self,
        config: TaggerConfig,
        tokenizer: Tokenizer | None,
        words: Sequence[Sequence[str]],
        documents: Sequence[int] | None = None,
    ) -> None:
        if (config.encoder == "bert") != (tokenizer is not None):
            raise ValueError(
                f"a tokenizer belongs to the encoder 'bert' and to no other, got the encoder "
                f"{config.encoder!r} and {'none' if tokenizer is None else 'one'}"
            )
        self.sentences = words
        self.notes = _notes_on_words(config, words)
        self.rows: list[Row]
        if tokenizer is None:
            whole = (Row(list(row), [Part(i, 0, len(row), 0)]) for i, row in enumerate(words))
            self.rows = [row for row in whole if row.words]
            return
        assert config.bert is not None
        check_vocabulary(tokenizer.vocab_size, config.bert.vocab_size)
        longest = config.bert.max_position_embeddings
        windows = WordWindows(tokenizer, words, longest)
        self.notes += windows.notes
        marks = Marks.of(tokenizer)
        room = longest - len(marks.before) - len(marks.after)
        packer = _Packer(words, marks, config.row_pieces, config.context_pieces, room)
        self.rows = list(packer.rows(windows.windows, documents))

    def merge(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        """merged[i][j]: what was found for word j of sentence i; values[k] (V, …) of row k."""
        if len(values) != len(self.rows):
            raise ValueError(f"expected values of {len(self.rows)} rows, got {len(values)}")
        shape = values[0].shape[1:] if values else ()
        found: list[list[np.ndarray]] = [[] for _ in self.sentences]
        for row, value in zip(self.rows, values, strict=True):
            for part in row.parts:  # in their order: each goes on where the last one ended
                found[part.sentence].append(value[part.at : part.at + part.stop - part.start])
        return [np.concatenate(f) if f else np.zeros((0, *shape), np.float32) for f in found]


def _notes_on_words(config: TaggerConfig, words: Sequence[Sequence[str]]) -> list[str]:
    n = sum(len(word) > LONGEST_WORD for row in words for word in row)
    if not n or config.character_encoder == "none":
        return []
    half, long = LONGEST_WORD // 2, f"{counted(n, 'word')} of more than {LONGEST_WORD} characters"
    return [f"{long}: the character encoder reads the first {half} and the last {half} of them"]


class _Packer:
    """Windows of single sentences → rows of neighbouring sentences with context around them."""

    def __init__(
        self,
        sentences: Sequence[Sequence[str]],
        marks: Marks,
        row_pieces: int,
        context: int,
        room: int,
    ) -> None:
        self.sentences, self.marks = sentences, marks
        self.row_pieces, self.context, self.room = min(row_pieces, room), context, room

    def rows(self, windows: Sequence[Window], documents: Sequence[int] | None) -> Iterator[Row]:
        """In the order of the sentences. One that has several windows is a row for each."""
        numbers = [window.example for window in windows]
        near: list[Window] = []  # of one document, side by side, none of them cut
        for k, window in enumerate(windows):
            whole = len(window.scored) == len(self.sentences[window.example])
            document = None if documents is None else documents[window.example]
            before = None if documents is None or not k else documents[numbers[k - 1]]
            if near and (not whole or document is None or document != before):
                yield from self._packed(near)
                near = []
            if whole:
                near.append(window)
            else:
                yield self._row([window], 0, len(window.words), [_part_of(window)])
        if near:
            yield from self._packed(near)

    def _packed(self, near: list[Window]) -> Iterator[Row]:
        """Rows of as many sentences as fit, with words of their neighbours on both sides."""
        sizes = [self._inside(window) for window in near]
        ends = np.cumsum([len(window.words) for window in near])
        # The place of each word's first piece in the document, and at last its end.
        begins = np.cumsum([0, *(n for window in near for n in self._lengths(window))])
        first = 0
        while first < len(near):
            last, total = first + 1, sizes[first]
            while last < len(near) and total + sizes[last] <= self.row_pieces:
                total += sizes[last]
                last += 1
            start, stop = int(ends[first - 1]) if first else 0, int(ends[last - 1])
            spare = min(self.context, (self.room - total) // 2)
            left = int(np.searchsorted(begins, begins[start] - spare, "left"))
            right = int(np.searchsorted(begins, begins[stop] + spare, "right")) - 1
            parts, at = [], start - left
            for window in near[first:last]:
                parts.append(replace(_part_of(window), at=at))
                at += len(window.words)
            yield self._row(near, left, right, parts)
            first = last

    def _inside(self, window: Window) -> int:
        return len(window.ids) - len(self.marks.before) - len(self.marks.after)

    def _lengths(self, window: Window) -> np.ndarray:
        """How many pieces each word has."""
        end = len(window.ids) - len(self.marks.after)
        return np.diff(np.append(window.first, end))

    def _row(self, near: list[Window], left: int, right: int, parts: list[Part]) -> Row:
        """Words left … right − 1 of these windows, counted through all of them."""
        words: list[str] = []
        pieces: list[np.ndarray] = []
        lengths: list[int] = []
        seen = 0
        for window in near:
            a, b = max(left - seen, 0), min(right - seen, len(window.words))
            seen += len(window.words)
            if a >= b:
                continue
            its = self.sentences[window.example][window.words.start : window.words.stop]
            words += its[a:b]
            counts = self._lengths(window)
            begin = int(window.first[a])
            pieces.append(window.ids[begin : begin + int(counts[a:b].sum())])
            lengths += counts[a:b].tolist()
        before, after = self.marks.before, self.marks.after
        first = len(before) + np.cumsum([0, *lengths])[:-1]
        owners = np.repeat(np.arange(1, len(words) + 1), lengths)
        return Row(
            words,
            parts,
            np.concatenate([np.array(before, np.int64), *pieces, np.array(after, np.int64)]),
            first.astype(np.int64),
            np.concatenate([[0] * len(before), owners, [0] * len(after)]).astype(np.int64),
        )


def _part_of(window: Window) -> Part:
    return Part(window.example, window.scored.start, window.scored.stop, window.kept.start)


# --- from rows to batches -------------------------------------------------------------------------


class Collator:
    """Rows → the arrays of a batch, a row of theirs in each."""

    def __init__(self, config: TaggerConfig, pad_id: int = 0) -> None:
        self.reader, self.pad_id = WordReader(config.vocabularies), pad_id
        self.labels = LabelSet(config.labels)
        self.scheme: Scheme = config.scheme

    def __call__(self, rows: Sequence[Row], tags: Sequence[Sequence[str]] | None = None) -> Batch:
        """tags: of all sentences, in the config's scheme; None: nothing to learn from.

        A part with a tag that the tagger has not is not counted: its sentence number is −1.
        """
        batch = self.reader.read([row.words for row in rows])
        shape = batch["words"].shape
        batch["lengths"] = np.array([len(row.words) for row in rows], np.int64)
        labels, sentences = np.full(shape, IGNORE_INDEX, np.int64), np.full(shape, -1, np.int64)
        for i, row in enumerate(rows):
            for number, part in enumerate(row.parts):
                place = slice(part.at, part.at + part.stop - part.start)
                if tags is not None:
                    labels[i, place] = self._ids(tags[part.sentence][part.start : part.stop])
                if tags is None or (labels[i, place] != IGNORE_INDEX).all():
                    sentences[i, place] = number
        batch |= {"labels": labels, "sentences": sentences}
        if len(rows[0].pieces):
            windows = [Window(0, row.pieces, np.zeros_like(row.pieces)) for row in rows]
            padded = pad(windows, self.pad_id)
            batch |= {key: padded[key] for key in ("input_ids", "attention_mask")}
            batch["first"] = np.zeros(shape, np.int64)
            batch["piece_words"] = np.zeros_like(batch["input_ids"])
            for i, row in enumerate(rows):
                batch["first"][i, : len(row.words)] = row.first
                batch["piece_words"][i, : len(row.pieces)] = row.owners
        return batch

    def _ids(self, tags: Sequence[str]) -> np.ndarray:
        # An entity that the end of a row divides is well formed on both sides of it.
        whole = tags if self.scheme == "plain" else convert(tags, self.scheme)
        return self.labels.encode(whole, ignore_unseen=True)


# --- the task -------------------------------------------------------------------------------------


class TagTask:
    """Tagged sentences to train a `Tagger` on, and others to validate it with.

    Args:
        config: of the tagger; `tagger_config` makes one from the training sentences.
        train, validation: what `data.conll.read_sentences` gives, both with tags.
        tokenizer: of the checkpoint, where there is one.
        batch_size: rows in a batch.
        eval_batch_size: the same in validation.
        shuffle: whether each epoch has another order.
        seed: of the order.

    `notes` says what is to be known of the data: tags that are not well formed, labels that
    training never shows (they count as missed), words that vanish in the tokenizer.

    Raises ValueError for sentences without tags, and where there is nothing to train on.
    """

    score: str = "val_f1"  # the higher the better: entities, or words where none are
    unit = "words"

    def __init__(
        self,
        config: TaggerConfig,
        train: Sentences,
        validation: Sentences,
        tokenizer: Tokenizer | None = None,
        *,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        if batch_size < 1 or eval_batch_size < 1:
            raise ValueError(
                f"batch sizes must be at least 1, got {batch_size} and {eval_batch_size}"
            )
        self.config, self.tokenizer = config, tokenizer
        self.train, self.held_out = train, validation
        self.train_tags = _tags_of(train)
        self.tag_scheme: Scheme = detect(self.train_tags)  # predictions are written so, too
        self.val_tags = _all_in_scheme(validation, self.tag_scheme)
        self.train_rows = Rows(config, tokenizer, train.words, documents_of(train))
        self.val_rows = Rows(config, tokenizer, validation.words, documents_of(validation))
        if not self.train_rows.rows or not self.val_rows.rows:
            raise ValueError("expected sentences to train on and to validate with, got none")
        pad_id = 0 if config.bert is None else config.bert.pad_token_id or 0
        self.collate = Collator(config, pad_id)
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.shuffle, self.seed = shuffle, seed
        self.notes = self._notes()
        self._sha256 = _sha256(train)
        self._position = 0  # batches given so far, over all epochs
        self._order: tuple[int, list[np.ndarray]] = (-1, [])  # (epoch, its batches)
        self._val_batches: list[np.ndarray] = _by_length(self.val_rows.rows, eval_batch_size)

    # --- what a trainer calls ---------------------------------------------------------------------

    @property
    def steps_per_epoch(self) -> int:
        """⌈rows / batch_size⌉"""
        return -(-len(self.train_rows.rows) // self.batch_size)

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self._position // self.steps_per_epoch

    def next_batch(self) -> Batch:
        """The next training batch."""
        epoch, number = divmod(self._position, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, self._batches_of(epoch)
        self._position += 1
        rows = [self.train_rows.rows[i] for i in self._order[1][number]]
        return self.collate(rows, self.train_tags)

    def loss(self, model: Tagger, batch: Batch) -> Tensor:
        """−Σ ln p(tags of a sentence) / words: a scalar, in nats for each word."""
        return model.loss(_on_device(model, batch))

    def size(self, batch: Batch) -> int:
        """How many words are scored in the batch."""
        return int((batch["sentences"] >= 0).sum())

    def validation(self) -> Iterator[Batch]:
        """The validation batches, in the same order every time."""
        for numbers in self._val_batches:
            yield self.collate([self.val_rows.rows[i] for i in numbers], self.val_tags)

    def evaluate(self, model: Tagger) -> dict[str, float]:
        """val_loss, val_f1 (of entities, where the tags mark them) and val_token_accuracy."""
        return self.scored(model)[0]

    def scored(self, model: Tagger) -> tuple[dict[str, float], list[list[str]]]:
        """What `evaluate` says, and the tags behind it: in the scheme of the training sentences."""
        emissions: list[Any] = [None] * len(self.val_rows.rows)
        total, words = 0.0, 0
        model.eval()
        with no_grad():
            for numbers, batch in zip(self._val_batches, self.validation(), strict=True):
                there = _on_device(model, batch)
                found = model.emissions(there)
                if n := self.size(batch):
                    total += model.loss_of(found, there).item() * n
                    words += n
                for i, row in zip(numbers, found.numpy(), strict=True):
                    emissions[i] = row
        predicted = self._predicted(model, emissions)
        return {"val_loss": total / max(1, words), **self._scores(predicted)}, predicted

    def remark(self, found: dict[str, float]) -> str | None:
        """The scores, for the log; and a warning where a constant answer is as good."""
        entities = "" if self.config.scheme == "plain" else f"entity F1 {found['val_f1']:.4f}, "
        said = f"validation: {entities}accuracy over words {found['val_token_accuracy']:.4f}"
        usual = majority([tag for sentence in self.train_tags for tag in sentence])
        tags = [tag for sentence in self.val_tags for tag in sentence]
        share = tags.count(usual) / len(tags)
        if found["val_token_accuracy"] <= share:
            said += f"; {usual} for every word would be right for {share:.4f}"
        return said

    def save(self, folder: Path) -> None:
        """Write the tokenizer, where there is one; all else is in the tagger's config."""
        if self.tokenizer is not None:
            self.tokenizer.save(folder)

    def state(self) -> dict[str, Any]:
        """The position in the training data, and which data it is."""
        return {"position": self._position, "sha256": self._sha256}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`; ValueError where the sentences are no longer the same."""
        if state["sha256"] != self._sha256:
            raise ValueError(
                f"the sentences of {self.train.name} have changed since the run began (sha256 "
                f"{state['sha256'][:12]} then, {self._sha256[:12]} now): resume with the old ones, "
                "or start a new run"
            )
        self._position = int(state["position"])

    # --- the order --------------------------------------------------------------------------------

    def _batches_of(self, epoch: int) -> list[np.ndarray]:
        """The rows of each batch: shuffled, then sorted by length within pools of many batches."""
        n, size = len(self.train_rows.rows), self.batch_size
        order = np.arange(n)
        if self.shuffle:
            order = shuffled(order, n, self.seed, 2 * epoch)
        lengths = np.array([len(row) for row in self.train_rows.rows])
        pool = _POOL * size
        pools = [order[start : start + pool] for start in range(0, n, pool)]
        order = np.concatenate([p[np.argsort(lengths[p], kind="stable")] for p in pools])
        batches = [order[start : start + size] for start in range(0, n, size)]
        if self.shuffle:
            places = np.arange(len(batches))
            batches = [batches[i] for i in shuffled(places, len(places), self.seed, 2 * epoch + 1)]
        return batches

    # --- scores -----------------------------------------------------------------------------------

    def _predicted(self, model: Tagger, emissions: Sequence[np.ndarray]) -> list[list[str]]:
        tags = model.decode(self.val_rows.merge(emissions))
        return [in_scheme(sentence, self.tag_scheme) for sentence in tags]

    def _scores(self, predicted: Sequence[Sequence[str]]) -> dict[str, float]:
        pairs = [
            (gold, guess)
            for tags, guesses in zip(self.val_tags, predicted, strict=True)
            for gold, guess in zip(tags, guesses, strict=True)
        ]
        accuracy = sum(gold == guess for gold, guess in pairs) / len(pairs)
        if self.config.scheme == "plain":
            return {"val_f1": accuracy, "val_token_accuracy": accuracy}
        micro = entity_scores(self.val_tags, predicted).averages.micro
        return {
            "val_f1": micro.f1,
            "val_precision": micro.precision,
            "val_recall": micro.recall,
            "val_token_accuracy": accuracy,
        }

    def _notes(self) -> list[str]:
        notes = [*self.train.notes, *self.held_out.notes]
        for sentences, rows in ((self.train, self.train_rows), (self.held_out, self.val_rows)):
            notes += [f"{sentences.name}: {note}" for note in rows.notes]
            scheme = detect(_tags_of(sentences))
            if note := fault_note(_tags_of(sentences), scheme, name=sentences.name):
                notes.append(note)
        known = {tag for tags in self.train_tags for tag in tags}
        unseen = [tag for tags in self.val_tags for tag in tags if tag not in known]
        if unseen:
            notes.append(
                f"{self.held_out.name}: {counted(len(unseen), 'word')} with a tag that training "
                f"never shows ({', '.join(sorted(set(unseen))[:5])}): they count as missed, and "
                "their sentences are left out of the validation loss"
            )
        return notes


_POOL = 32  # batches whose rows are sorted by length together


def tagger_config(
    train: Sentences,
    *,
    scheme: Scheme | None = None,
    bert: BertConfig | None = None,
    **options: Any,
) -> TaggerConfig:
    """The config of a tagger for these sentences: their labels, words, characters and shapes.

    Args:
        train: sentences with tags.
        scheme: in which labels are learnt, 'BIO' or 'BIOES'; None: BIO, where the tags mark
            entities, which may also be written as IOB1 or BILOU. Predictions come in the scheme of
            the sentences.
        bert: the config of a checkpoint to begin from.
        options: further ones of `TaggerConfig`.
    """
    tags = _tags_of(train)
    found = detect(tags)
    if found == "plain":
        scheme = "plain"
    else:
        scheme = "BIO" if scheme is None else scheme
        tags = [convert(sentence, scheme) for sentence in tags]
    if bert is not None:
        options = {"encoder": "bert", "bert": bert, **_FOR_CHECKPOINT, **options}
    known = Vocabularies.of(train.words)
    if options.get("word_size") == 0:  # no word is looked up
        known = replace(known, words=(), rare=0)
    return TaggerConfig(
        labels=LabelSet.of_tags(tags).names,
        vocabularies=known,
        scheme=scheme,
        **options,
    )


def documents_of(sentences: Sentences) -> list[int] | None:
    """The number of each one's document; None where nothing says that there are several.

    A file without -DOCSTART- may hold one text or, as WNUT's, a thousand that are strangers to one
    another: then no sentence is context to the next.
    """
    return sentences.documents if len(set(sentences.documents)) > 1 else None


# A checkpoint has words of its own; what it lacks is the case.
_FOR_CHECKPOINT: dict[str, Any] = {
    "word_size": 0,
    "word_dropout": 0.0,
    "hidden_size": 192,
    "dropout": 0.35,
    "row_pieces": 192,
    "context_pieces": 24,
}


def in_scheme(tags: Sequence[str], scheme: Scheme) -> list[str]:
    """The tags as that scheme writes them; those that mark nothing as they are."""
    return list(tags) if scheme == "plain" else convert(tags, scheme)


# --- prediction -----------------------------------------------------------------------------------


def predict(
    model: Tagger,
    tokenizer: Tokenizer | None,
    words: Sequence[Sequence[str]],
    documents: Sequence[int] | None = None,
    *,
    batch_size: int = 64,
    scheme: Scheme | None = None,
) -> tuple[list[list[str]], list[str]]:
    """(a tag for every word of every sentence, notes on how they were read)

    documents: the number of the document of each sentence: neighbours of the same one are context
    to a checkpoint. scheme: in which the tags are written; None: the model's.
    """
    rows = Rows(model.config, tokenizer, words, documents)
    pad_id = 0 if model.config.bert is None else model.config.bert.pad_token_id or 0
    emissions = row_emissions(model, rows, Collator(model.config, pad_id), batch_size)
    tags = model.decode(rows.merge(emissions))
    wanted = model.config.scheme if scheme is None else scheme
    return [in_scheme(sentence, wanted) for sentence in tags], rows.notes


def row_emissions(
    model: Tagger, rows: Rows, collate: Collator, batch_size: int = 64
) -> list[np.ndarray]:
    """The emissions (V, K) of each row, dropout off; rows of similar length side by side."""
    found: list[Any] = [None] * len(rows.rows)
    model.eval()
    with no_grad():
        for numbers in _by_length(rows.rows, batch_size):
            batch = collate([rows.rows[i] for i in numbers])
            emissions = model.emissions(_on_device(model, batch)).numpy()
            for i, row in zip(numbers, emissions, strict=True):
                found[i] = row
    return found


def _by_length(rows: Sequence[Row], batch_size: int) -> list[np.ndarray]:
    order = np.argsort([len(row) for row in rows], kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _on_device(model: Tagger, batch: Mapping[str, Any]) -> dict[str, Any]:
    device = model.classifier.weight.device
    return {name: Tensor(array).to(device).data for name, array in batch.items()}


def _all_in_scheme(sentences: Sentences, scheme: Scheme) -> list[list[str]]:
    """Their tags in the scheme; ValueError with the line of a sentence that has none there."""
    found = []
    for tags, line in zip(_tags_of(sentences), sentences.lines, strict=True):
        try:
            found.append(in_scheme(tags, scheme))
        except ValueError as error:
            raise ValueError(
                f"{sentences.name}, the sentence of line {line}: {error}; the tags to train on "
                f"mark entities, as {scheme}"
            ) from error
    return found


def _tags_of(sentences: Sentences) -> list[list[str]]:
    if sentences.tags is None:
        raise ValueError(f"{sentences.name} has no tags: a tagger learns from words with tags")
    return sentences.tags


def _sha256(sentences: Sentences) -> str:
    text = json.dumps([sentences.words, sentences.tags], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
