"""Going on with the training of a language model on other texts, and whether that made it better.

    before     the loss of the model as it came, on the validation text
    after      the loss of the same model later, on the very same tokens
    unigram    the loss of who knows only how often each token comes in the training text

A number alone says little: a loss of 3 is much for one text and little for another. Beside these
two it says what was learnt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tinygrad_llm.data.loader import (
    IGNORE_INDEX,
    Batch,
    DocumentWindows,
    EpochBatches,
    read_through,
    shuffled,
)
from tinygrad_llm.data.report import SILENT, Report
from tinygrad_llm.data.texts import Side, Text
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.data.tokens import Tokens
from tinygrad_llm.data.windows import unknown_id
from tinygrad_llm.generate import write
from tinygrad_llm.metrics.language import LanguageReport, LanguageScore, Written
from tinygrad_llm.models.gpt import GPT
from tinygrad_llm.tasks.causal import CausalTask
from tinygrad_llm.tasks.classify import TASK_FILE
from tinygrad_llm.tasks.evaluate import Reading, byte_lengths, evaluate_ids


@dataclass(frozen=True)
class Sampling:
    """What the model is let write before and after: the same seed, the same choices."""

    max_new_tokens: int = 60
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 1


class ContinuedTask(CausalTask):
    """Texts to go on learning from in whole epochs; others to validate with, document by document.

    An epoch has every token once as a target, in windows of `context` tokens that never reach from
    one document into the next; the order is another one in each epoch.

    Args:
        text, tokenizer, context, batch_size, seed, report: as for `CausalTask`.
        validation: another text to validate with; None: a part of `text` is held out. That is whole
            documents, chosen by their content, where some ten of them are held out so; else the
            tail of the text, as in pretraining.
        val_fraction: how much is held out.
        sampling: of the text that is written before and after.
        came: what the model was before, for the report.
        about: what is kept beside a checkpoint.

    The first `evaluate` is of the model as it came; what it finds is a part of `state()`.

    Raises ValueError where a part of the text is too short.
    """

    score = "val_loss"

    def __init__(
        self,
        text: Text,
        tokenizer: Tokenizer,
        *,
        context: int,
        batch_size: int,
        validation: Text | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
        sampling: Sampling | None = None,
        came: str = "as it came",
        about: Mapping[str, Any] | None = None,
        report: Report = SILENT,
    ) -> None:
        by_document = validation is None and has_documents(text, val_fraction)
        super().__init__(
            text,
            tokenizer,
            context=context,
            batch_size=batch_size,
            val_fraction=val_fraction,
            val_by="document" if by_document else "tail",
            validation=validation,
            documents="separate",
            order="shuffled",
            seed=seed,
            report=report,
        )
        self.context, self.sampling, self.came = context, sampling or Sampling(), came
        self.about = dict(about or {})
        windows = DocumentWindows(self.train_tokens, context)
        self.train = self.epochs = _WholeEpochs(windows, batch_size, seed)
        self.name = text.name if validation is None else validation.name
        if by_document:
            whole = Side(text, val_fraction, held_out=True)
        else:
            whole = validation  # None: the tail begins inside of a document
        self.scored_tokens, self.scored_bytes = _scored(self.val_tokens, tokenizer, whole)
        self.before: LanguageScore | None = None
        self.written_before = ""
        self.notes = self._notes(validation, by_document)

    @property
    def steps_per_epoch(self) -> int:
        """⌈windows / batch_size⌉"""
        return -(-len(self.epochs.windows) // self.epochs.batch_size)

    def next_batch(self) -> Batch:
        """The next training batch, as wide as its longest window: x and y, int64 (B, ≤ T)."""
        x, y = next(self.train)
        width = 1 + int(np.flatnonzero((y != IGNORE_INDEX).any(axis=0))[-1])
        return x[:, :width], y[:, :width]

    # --- how good is it? --------------------------------------------------------------------------

    def evaluate(self, model: GPT) -> dict[str, float]:
        """val_loss in nats per token; val_bits_per_byte where the tokens tell it.

        The first time the model is what it was before, which is kept, with a text that it writes.
        """
        score = self.scored(model)
        if self.before is None:
            self.before = score
            self.written_before = self.write(model) if math.isfinite(score.nats) else ""
        found = {"val_loss": score.loss}
        if score.bits_per_byte is not None:
            found["val_bits_per_byte"] = score.bits_per_byte
        return found

    def remark(self, found: dict[str, float]) -> str | None:
        """The scores beside what is had for nothing, for the log."""
        assert self.before is not None
        bits = found.get("val_bits_per_byte")
        said = "" if bits is None else f", {bits:.4f} bits per byte"
        return (
            f"validation: loss {found['val_loss']:.4f}{said} (before {self.before.loss:.4f}, "
            f"unigram {self.unigram.loss:.4f})"
        )

    def scored(self, model: GPT) -> LanguageScore:
        """The score of the model on the validation text, every token of it."""
        reading = Reading(self.context, apart=True)
        tokens = self.scored_tokens
        found = evaluate_ids(model, self.tokenizer, tokens.ids, reading, tokens.spans())
        return LanguageScore(found.nats, found.tokens, self.scored_bytes)

    @cached_property
    def unigram(self) -> LanguageScore:
        """−Σ ln (c[token] + 1) / (N + V) over the tokens that are scored

        c: how often each comes among the N tokens trained on; V: the size of the vocabulary.
        """
        size = self.tokenizer.vocab_size
        counts = np.ones(size)
        for piece in read_through(self.train_tokens.ids):
            counts += np.bincount(piece, minlength=size)
        log_p = np.log(counts / counts.sum())
        nats, scored = 0.0, 0
        for first, stop in self.scored_tokens.spans():
            targets = self.scored_tokens.ids[first + 1 : stop]
            nats -= float(log_p[targets].sum())
            scored += len(targets)
        return LanguageScore(nats, scored, self.scored_bytes)

    def report(self, model: GPT) -> LanguageReport:
        """The model beside itself as it came and the unigram model, and what it writes."""
        assert self.before is not None  # a run begins with a validation
        score = self.scored(model)
        written = Written(self.prompt, self.written_before, self.write(model))
        began, notes = f"before, {self.came}", list(self.notes)
        return LanguageReport(self.name, score, self.before, self.unigram, written, began, notes)

    def write(self, model: GPT) -> str:
        """How the model goes on from `prompt`."""
        how = self.sampling
        pieces = write(
            model,
            self.tokenizer,
            self.prompt,
            how.max_new_tokens,
            temperature=how.temperature,
            top_p=how.top_p,
            seed=how.seed,
        )
        return "".join(pieces)

    @cached_property
    def prompt(self) -> str:
        """The beginning of the validation text, some words at most and half of a document."""
        tokens, mark = self.scored_tokens, self.tokenizer.eos_id
        first, stop = next(tokens.spans())
        ids = [i for i in tokens.ids[first : min(stop, first + 2 * _PROMPT)].tolist() if i != mark]
        text = self.tokenizer.decode(ids[: max(1, min(_PROMPT, len(ids) // 2))])
        text = text.replace("\ufffd", "").rstrip()
        if not text and mark is None:
            raise ValueError(
                f"the validation text of {self.name!r} begins with blanks, and its tokenizer has "
                "no <|endoftext|>: there is nothing to let the model go on from"
            )
        return text

    # --- going on later ---------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write the tokenizer, and task.json."""
        super().save(folder)
        text = json.dumps(self.about, indent=2, ensure_ascii=False) + "\n"
        (folder / TASK_FILE).write_text(text, encoding="utf-8")

    def state(self) -> dict[str, Any]:
        """The position in the training data, which data it is, and how good the model was."""
        found = super().state()
        if self.before is not None:
            before = [self.before.nats, self.before.tokens, self.before.bytes]
            found |= {"before": before, "written_before": self.written_before}
        return found

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`; ValueError where a text is no longer the same."""
        super().load_state(state)
        if "before" in state:
            self.before = LanguageScore(*state["before"])
            self.written_before = state["written_before"]

    # --- inside -----------------------------------------------------------------------------------

    def _notes(self, validation: Text | None, by_document: bool) -> list[str]:
        train, held_out = self.train_tokens, self.val_tokens
        how = "" if validation is not None else ", the end of the text"
        if by_document:
            held, total = len(held_out.ends), len(held_out.ends) + len(train.ends)
            how = f", {held:,} of {total:,} documents"
        sizes = f"{len(train):,} to train on, {len(held_out):,} to validate with{how}"
        notes = [f"tokens: {sizes}; {self.context} are read at a time"]
        unknown = unknown_id(self.tokenizer)
        for where, tokens in (("train on", train), ("validate with", held_out)):
            if unknown is None:
                continue
            count = sum(int((piece == unknown).sum()) for piece in read_through(tokens.ids))
            if count:
                notes.append(
                    f"{count:,} of the {len(tokens):,} tokens to {where} stand for what the "
                    "tokenizer lacks: what they are is not learnt"
                )
        return notes


_PROMPT = 12  # tokens


def has_documents(text: Text, val_fraction: float, enough: int = 10) -> bool:
    """Whether some ten documents or more are expected on the smaller side of such a division."""
    needed = math.ceil(enough / min(val_fraction, 1 - val_fraction))
    ends = (part for part in text.parts() if part.ends)
    return sum(1 for _ in islice(ends, needed)) == needed


def _scored(tokens: Tokens, tokenizer: Tokenizer, text: Text | None) -> tuple[Tokens, int | None]:
    """(tokens, bytes) to score: with the mark before the first document, so that all of it counts.

    `text` is what the tokens are of, None where they begin inside of a document: then there is no
    mark to put there, their first is not scored, and the bytes are those of the others.
    """
    if text is not None and tokenizer.eos_id is not None:
        ids = np.concatenate([np.array([tokenizer.eos_id], tokens.ids.dtype), tokens.ids])
        size = sum(len(part.text.encode()) for part in text.parts())
        return Tokens(ids, np.asarray(tokens.ends, np.int64) + 1, tokens.marked), size
    lengths = byte_lengths(tokenizer)
    if lengths is None:
        return tokens, None
    targets = (tokens.ids[first + 1 : stop] for first, stop in tokens.spans())
    return tokens, sum(int(lengths[ids].sum()) for ids in targets)


class _WholeEpochs(EpochBatches):
    """As `EpochBatches`, but the last batch of an epoch holds no more than what is left of it."""

    def __init__(self, windows: DocumentWindows, batch_size: int, shuffle: int) -> None:
        super().__init__(windows, batch_size, shuffle)
        self.seed = shuffle

    def __next__(self) -> Batch:
        count = len(self.windows)
        epoch, start = divmod(self.position, count)
        numbers = np.arange(start, min(start + self.batch_size, count))
        self.position += len(numbers)
        return self.windows.take(shuffled(numbers, count, self.seed, epoch))
