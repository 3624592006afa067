"""Causal language modelling: predict the next token from those before it.

    loss = −(1/n) Σ log p(y[b, t] | x[b, 0], …, x[b, t])        y[b, t] = x[b, t + 1]

Every position of a text is an example, so B texts of T tokens give n = B·T of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tinygrad_llm.backend import RandomStream
from tinygrad_llm.data.corpora import Corpus
from tinygrad_llm.data.loader import (
    IGNORE_INDEX,
    Batch,
    RandomBatches,
    SequentialBatches,
    compact,
    split,
)
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.models.gpt import GPT
from tinygrad_llm.tensor import Tensor


class CausalTask:
    """Random windows of a text to train on; its tail, the same every time, to validate on.

    Args:
        corpus: the text.
        tokenizer: cuts it into tokens.
        context: tokens in a window, T.
        batch_size: windows in a batch, B.
        val_fraction: the share of the tokens, at the end, that is only validated on.
        eval_batches: validate on so many batches from its start; 0: on all of it.
        seed: of the choice of windows.

    Raises ValueError where the text is too short for one window.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        *,
        context: int,
        batch_size: int,
        val_fraction: float = 0.1,
        eval_batches: int = 0,
        seed: int = 0,
    ) -> None:
        ids = compact(tokenizer.encode(corpus.text), tokenizer.vocab_size)
        train, validation = split(ids, val_fraction, context)
        self.corpus, self.tokenizer, self.eval_batches = corpus, tokenizer, eval_batches
        self.train = RandomBatches(train, batch_size, context, RandomStream(seed))
        self.held_out = SequentialBatches(validation, batch_size, context)

    def next_batch(self) -> Batch:
        """The next training batch: x and y, int64 (B, T)."""
        return next(self.train)

    def validation(self) -> Iterator[Batch]:
        """The validation batches, from the first."""
        return islice(self.held_out, self.eval_batches or None)

    def loss(self, model: GPT, batch: Batch) -> Tensor:
        """The mean cross-entropy over the targets of the batch, in nats: a scalar Tensor."""
        device = next(iter(model.parameters())).device
        x, y = (Tensor(ids, device=device) for ids in batch)  # (B, T) each
        return model.loss(x, y, ignore_index=IGNORE_INDEX)

    def size(self, batch: Batch) -> int:
        """How many targets the batch has: its weight in a mean, and its tokens in tokens/s."""
        return int((batch[1] != IGNORE_INDEX).sum())

    def save(self, folder: Path) -> None:
        """Write tokenizer.json: a model without it reads and writes nothing."""
        self.tokenizer.save(folder)

    def state(self) -> dict[str, Any]:
        """The position in the training data, and which data it is."""
        return {"train": self.train.state(), "sha256": self.corpus.sha256}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`; ValueError when the text is no longer the same."""
        if state["sha256"] != self.corpus.sha256:
            raise ValueError(
                f"the text of {self.corpus.name!r} has changed since the run began (sha256 "
                f"{state['sha256'][:12]} then, {self.corpus.sha256[:12]} now): resume with the old "
                "text, or start a new run"
            )
        self.train.load_state(state["train"])
