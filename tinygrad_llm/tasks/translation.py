"""Translation: write the target that belongs to a source; any pairs of texts will do.

    task = TranslationTask(pairs, validation, tokenizer, batch_size=32)
    translate(model, tokenizer, ["une phrase"], GenerationConfig(num_beams=4))

A source and a target each end with a mark, our tokenizers' `<|endoftext|>` or T5's `</s>`, by which
the model knows that it has read everything, and says that it has written everything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tinygrad_llm.data.loader import shuffled
from tinygrad_llm.data.report import SILENT, Report
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.generate import GenerationConfig, generate_all, source_ids
from tinygrad_llm.models.encoder_decoder import EncoderDecoder
from tinygrad_llm.tasks.pairs import PairBatch, pair_batch, pair_loss, pair_targets
from tinygrad_llm.tensor import Tensor

Pair = tuple[str, str]  # (source, target)


class TranslationTask:
    """Pairs of texts to train on, and others to validate on.

    Args:
        train: (source, target) to train on.
        validation: (source, target) to validate on.
        tokenizer: cuts both sides into tokens, and adds none of its own.
        batch_size: pairs in a batch, B.
        max_source, max_target: tokens of a source and of a target, the end included. Longer pairs
            are left out, whole, and counted: `left_out`.
        eos_id: of the end, the model's `config.eos_token_id`; None: the tokenizer's `eos_id`.
        prefix: what stands before every source, such as T5's "translate English to French: ".
        label_smoothing: ε of the training loss; 0.1 in "Attention Is All You Need".
        eval_batches: validate on so many batches, always the same; 0: on all.
        seed: of the order.
        report: hears what was left out.

    Batches are of pairs of similar length, so that little is padding; the batches of an epoch come
    in another order each time. Raises ValueError where no pair is left.
    """

    def __init__(
        self,
        train: Sequence[Pair],
        validation: Sequence[Pair],
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        max_source: int = 256,
        max_target: int = 256,
        eos_id: int | None = None,
        prefix: str = "",
        label_smoothing: float = 0.0,
        eval_batches: int = 0,
        seed: int = 0,
        report: Report = SILENT,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.tokenizer, self.batch_size, self.eval_batches = tokenizer, batch_size, eval_batches
        self.label_smoothing = label_smoothing
        self.eos_id = end = _end(tokenizer, eos_id)
        self.prefix, longest = prefix, (max_source, max_target)

        def encoded(pairs: Sequence[Pair], purpose: str) -> EncodedPairs:
            whole = [(prefix + source, target) for source, target in pairs]
            return _encoded(whole, tokenizer, end, longest, purpose, report)

        self.train = encoded(train, "train on")
        self.held_out = encoded(validation, "validate on")
        self.left_out = self.train.left_out + self.held_out.left_out
        self.batches = LengthBatches(self.train, batch_size, seed)

    def next_batch(self) -> PairBatch:
        """The next training batch."""
        return next(self.batches)

    def validation(self) -> Iterator[PairBatch]:
        """The validation batches, short and long ones mixed."""
        batches = LengthBatches(self.held_out, self.batch_size, seed=0)
        return islice(batches, min(len(batches), self.eval_batches or len(batches)))

    def loss(self, model: EncoderDecoder, batch: PairBatch) -> Tensor:
        """The mean cross-entropy over the targets of the batch, in nats: a scalar Tensor."""
        return pair_loss(model, batch, self.label_smoothing)

    def size(self, batch: PairBatch) -> int:
        """How many targets the batch has."""
        return pair_targets(batch)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json: a model without it reads and writes nothing."""
        self.tokenizer.save(folder)

    def state(self) -> dict[str, Any]:
        """The position in the training pairs, and which they are."""
        return {"train": self.batches.state(), "sha256": self.train.sha256()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`; ValueError when the pairs are no longer the same."""
        if state["sha256"] != self.train.sha256():
            raise ValueError(
                "the pairs have changed since the run began: resume with the old ones, or start a "
                "new run"
            )
        self.batches.load_state(state["train"])


@dataclass(frozen=True)
class EncodedPairs:
    """N pairs as token ids, each side with its end, and how many more were too long."""

    sources: list[np.ndarray]
    targets: list[np.ndarray]
    left_out: int

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def lengths(self) -> np.ndarray:
        """What a pair costs: the tokens of both sides, (N,)."""
        pairs = zip(self.sources, self.targets, strict=True)
        return np.array([len(source) + len(target) for source, target in pairs])

    def take(self, numbers: np.ndarray) -> PairBatch:
        """The pairs with these numbers."""
        return pair_batch([self.sources[i] for i in numbers], [self.targets[i] for i in numbers])

    def sha256(self) -> str:
        """Of all tokens."""
        digest = hashlib.sha256()
        for ids in (*self.sources, *self.targets):
            digest.update(np.asarray(ids, np.int64).tobytes())
        return digest.hexdigest()


def _end(tokenizer: Tokenizer, eos_id: int | None) -> int:
    """The id of the end of a text; ValueError where there is none."""
    end = tokenizer.eos_id if eos_id is None else eos_id
    if end is None:
        raise ValueError("translation needs a tokenizer with <|endoftext|>, this one has none")
    if not 0 <= end < tokenizer.vocab_size:
        raise ValueError(
            f"the end of texts, {end}, is no id of the tokenizer, which has {tokenizer.vocab_size}"
        )
    return end


def _encoded(
    pairs: Sequence[Pair],
    tokenizer: Tokenizer,
    end: int,
    longest: tuple[int, int],
    purpose: str,
    report: Report,
) -> EncodedPairs:
    if not len(pairs):
        raise ValueError(f"there is no pair of texts to {purpose}")
    sides = [[pair[side] for pair in pairs] for side in (0, 1)]
    sources, targets = (
        [np.append(ids, end) for ids in tokenizer.encode_each(side)] for side in sides
    )
    kept = [
        i
        for i in range(len(pairs))
        if len(sources[i]) <= longest[0] and len(targets[i]) <= longest[1]
    ]
    left_out = len(pairs) - len(kept)
    limits = f"{longest[0]} tokens (source) or {longest[1]} (target)"
    if not kept:
        raise ValueError(f"all {left_out} pairs to {purpose} are longer than {limits}")
    if left_out:
        report.say(f"left out {left_out} of {len(pairs)} pairs to {purpose}: over {limits}")
    return EncodedPairs([sources[i] for i in kept], [targets[i] for i in kept], left_out)


class LengthBatches:
    """Every pair once in an epoch, with others of similar length: an endless iterator.

    The pairs of an epoch are shuffled, each `_POOL` batches of them sorted by length and cut into
    batches, and these shuffled again. So the position is one number, and going on is exact; the
    last batch of an epoch holds the pairs that are left.
    """

    def __init__(self, pairs: EncodedPairs, batch_size: int, seed: int) -> None:
        self.pairs, self.batch_size, self.seed = pairs, batch_size, seed
        self.position = 0  # batches given so far, over all epochs
        self._order: tuple[int, list[np.ndarray]] = (-1, [])  # (epoch, its batches)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.pairs) // self.batch_size)

    def __iter__(self) -> LengthBatches:
        return self

    def __next__(self) -> PairBatch:
        epoch, number = divmod(self.position, len(self))
        if self._order[0] != epoch:
            self._order = epoch, self._batches(epoch)
        self.position += 1
        return self.pairs.take(self._order[1][number])

    def _batches(self, epoch: int) -> list[np.ndarray]:
        n, lengths = len(self.pairs), self.pairs.lengths
        numbers = shuffled(np.arange(n), n, self.seed, 2 * epoch)
        pool = _POOL * self.batch_size
        parts = [numbers[start : start + pool] for start in range(0, n, pool)]
        numbers = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
        cut = [numbers[i : i + self.batch_size] for i in range(0, n, self.batch_size)]
        order = shuffled(np.arange(len(cut)), len(cut), self.seed, 2 * epoch + 1)
        return [cut[i] for i in order]

    def state(self) -> dict[str, int]:
        """Where the next batch comes from."""
        return {"position": self.position}

    def load_state(self, state: dict[str, int]) -> None:
        """Go on from `state()`."""
        self.position = int(state["position"])


_POOL = 64  # batches


# --- with a trained model -------------------------------------------------------------------------


def translate(
    model: EncoderDecoder,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    config: GenerationConfig | None = None,
    *,
    prefix: str = "",
    batch_size: int = 32,
    seed: int = 0,
) -> list[str]:
    """The target that the model writes for each text; greedily, unless `config` says otherwise.

    `prefix` stands before every text, as in training. Special tokens are not shown, and stop
    strings not looked at. Raises as `generate_all` does.
    """
    config = GenerationConfig(temperature=0.0) if config is None else config
    sources = [source_ids(model, tokenizer, prefix + text) for text in texts]
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed}
    targets = generate_all(model, sources, config, vocab_size=tokenizer.vocab_size, **options)
    end = model.config.eos_token_id
    written = ([i for i in ids if i != end] for ids in targets)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
