"""Causal language modelling: predict the next token from those before it.

    loss = −(1/n) Σ log p(y[b, t] | x[b, 0], …, x[b, t])        y[b, t] = x[b, t + 1]

Every position of a text is an example, so B texts of T tokens give n = B·T of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from tinygrad_llm.backend import RandomStream
from tinygrad_llm.data.loader import (
    IGNORE_INDEX,
    Batch,
    DocumentWindows,
    EpochBatches,
    OnePass,
    PackedWindows,
    RandomBatches,
    RandomWindows,
    SequentialBatches,
    read_through,
    split,
)
from tinygrad_llm.data.report import SILENT, Report
from tinygrad_llm.data.texts import Side, Text
from tinygrad_llm.data.token_files import tokens_of
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.data.tokens import Tokens
from tinygrad_llm.models.gpt import GPT
from tinygrad_llm.ops import bounds
from tinygrad_llm.tasks.evaluate import byte_lengths
from tinygrad_llm.tensor import Tensor

Order = Literal["random", "sequential", "shuffled"]
ValBy = Literal["tail", "document"]
Documents = Literal["packed", "separate"]


class CausalTask:
    """Windows of a text to train on; a part of it, the same every time, to validate on.

    Args:
        text: the text; a small one is tokenised in memory, a large one into a token file.
        tokenizer: cuts it into tokens.
        context: tokens in a window, T.
        batch_size: windows in a batch, B.
        val_fraction: the share of the text that is only validated on.
        val_by: 'tail': the tokens at the end; 'document': whole documents, see `Side`.
        validation: another text to validate on; then all of `text` is trained on.
        documents: 'packed': a window may reach from one document into the next; 'separate': it is
            of one document, filled up at its end.
        order: 'random': windows drawn with replacement (packed: from any token on); 'sequential':
            side by side, epoch after epoch; 'shuffled': the same in another order every epoch.
        eval_batches: validate on so many batches from its start; 0: on all of it.
        seed: of the choice of windows.
        report: hears how far the tokenising is.

    Raises ValueError where a part of the text is too short.
    """

    def __init__(
        self,
        text: Text,
        tokenizer: Tokenizer,
        *,
        context: int,
        batch_size: int,
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
        if validation is not None:
            self.train_tokens = tokens_of(text, tokenizer, report)
            self.val_tokens = tokens_of(validation, tokenizer, report)
        else:
            self.train_tokens, self.val_tokens = sides(
                text, tokenizer, val_fraction, val_by, report
            )
        check_sizes(self.train_tokens, self.val_tokens, context, documents)
        self.train = training_batches(
            self.train_tokens, batch_size, context, documents, order, seed
        )
        self.held_out: SequentialBatches | OnePass
        if documents == "separate":
            self.held_out = OnePass(DocumentWindows(self.val_tokens, context), batch_size)
        else:
            self.held_out = SequentialBatches(self.val_tokens.ids, batch_size, context)

    @property
    def val_bytes(self) -> int | None:
        """Bytes of text that the tokens held out stand for, less the first, which nothing predicts.

        Nats per token · tokens / (ln 2 · bytes) are bits per byte. None where the tokens do not
        spell the text out (WordPiece). Counted anew at each call.
        """
        lengths, ids = byte_lengths(self.tokenizer), self.val_tokens.ids
        if lengths is None:
            return None
        return sum(int(lengths[piece].sum()) for piece in read_through(ids[1:]))

    def next_batch(self) -> Batch:
        """The next training batch: x and y, int64 (B, T)."""
        return next(self.train)

    def validation(self) -> Iterator[Batch]:
        """The validation batches, from the first."""
        batches: Iterable[Batch] = self.held_out
        return islice(batches, self.eval_batches or None)

    def loss(self, model: GPT, batch: Batch) -> Tensor:
        """The mean cross-entropy over the targets of the batch, in nats: a scalar Tensor."""
        device = next(iter(model.parameters())).device
        x, y = (bounds.ids_on(ids, device) for ids in batch)  # (B, T) each
        return model.loss(x, y, ignore_index=IGNORE_INDEX)

    def size(self, batch: Batch) -> int:
        """How many targets the batch has: its weight in a mean, and its tokens in tokens/s."""
        return int((batch[1] != IGNORE_INDEX).sum())

    def save(self, folder: Path) -> None:
        """Write tokenizer.json: a model without it reads and writes nothing."""
        self.tokenizer.save(folder)

    def state(self) -> dict[str, Any]:
        """The position in the training data, and which data it is."""
        position = {"train": self.train.state()}
        return position | which_texts(self.text, self.validation_text)

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`; ValueError when a text is no longer the same."""
        refuse_other_texts(state, self.text, self.validation_text)
        self.train.load_state(state["train"])


def sides(
    text: Text, tokenizer: Tokenizer, val_fraction: float, val_by: ValBy, report: Report = SILENT
) -> tuple[Tokens, Tokens]:
    """(to train on, to validate on): the tokens of a text, divided the same way each time.

    Raises ValueError where a side is empty.
    """
    if val_by == "tail":
        tokens = tokens_of(text, tokenizer, report)
        cut = len(split(tokens.ids, val_fraction, 1)[0])
        return tokens.part(0, cut), tokens.part(cut, len(tokens))
    train, held_out = (
        tokens_of(Side(text, val_fraction, held_out=side), tokenizer, report)
        for side in (False, True)
    )
    if not len(held_out) or not len(train):
        total = len(held_out.ends) + len(train.ends)
        which = "none" if not len(held_out) else "all"
        raise ValueError(
            f"val_fraction {val_fraction} by document holds out {which} of the {total} documents "
            f"of {text.name!r} (they are told apart by <|endoftext|>, files or lines of JSONL): "
            "give more documents, or another fraction, or divide by tail"
        )
    return train, held_out


def check_sizes(train: Tokens, held_out: Tokens, context: int, documents: Documents) -> None:
    """Raise ValueError where one side is too short for a window of this context."""
    needed = context + 1 if documents == "packed" else 2
    if len(train) < needed:
        raise ValueError(
            f"the training part of the text has {len(train)} tokens, but a context of {context} "
            f"needs {needed}: give a longer text or a shorter context"
        )
    if len(held_out) < 2:
        raise ValueError(
            f"the text to validate on has {len(held_out)} tokens, which is too short: 2 are needed "
            "to predict one"
        )


def training_batches(
    tokens: Tokens, batch_size: int, context: int, documents: Documents, order: Order, seed: int
) -> RandomBatches | RandomWindows | EpochBatches:
    """Endless batches of windows; the options are those of `CausalTask`."""
    if documents == "packed" and order == "random":
        return RandomBatches(tokens.ids, batch_size, context, RandomStream(seed))
    if documents == "packed":
        windows = PackedWindows(tokens.ids, context)
    else:
        windows = DocumentWindows(tokens, context)
    if order == "random":
        return RandomWindows(windows, batch_size, RandomStream(seed))
    return EpochBatches(windows, batch_size, seed if order == "shuffled" else None)


def which_texts(text: Text, validation: Text | None) -> dict[str, str]:
    """The checksums by which `refuse_other_texts` knows them again: a part of a task's state."""
    found = {"sha256": text.sha256}
    return found if validation is None else found | {"val_sha256": validation.sha256}


def refuse_other_texts(state: dict[str, Any], text: Text, validation: Text | None) -> None:
    """Raise ValueError unless the texts are those that the state was taken with."""
    _refuse_another(text, state["sha256"])
    if validation is not None:
        _refuse_another(validation, state["val_sha256"])


def _refuse_another(text: Text, sha256: str) -> None:
    if sha256 != text.sha256:
        raise ValueError(
            f"the text of {text.name!r} has changed since the run began (sha256 {sha256[:12]} "
            f"then, {text.sha256[:12]} now): resume with the old text, or start a new run"
        )
