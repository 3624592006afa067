"""Batches for an encoder–decoder: sources, and the targets that are to be written for them.

    loss = −(1/n) Σ log p(target[b, t] | source[b], target[b, 0 … t − 1])

Dimensions: B pairs, S tokens of the longest source, T of the longest target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tinygrad_llm.data.loader import IGNORE_INDEX
from tinygrad_llm.models.encoder_decoder import EncoderDecoder
from tinygrad_llm.models.padding import padded
from tinygrad_llm.tensor import Tensor


class PairBatch(NamedTuple):
    """B pairs, filled up at their ends to the longest source and to the longest target."""

    input_ids: Any  # (B, S) integers
    attention_mask: Any  # (B, S) booleans: True where a token of the source is real
    labels: Any  # (B, T) integers, `IGNORE_INDEX` where there is no target


def pair_batch(
    sources: Sequence[Sequence[int] | np.ndarray], targets: Sequence[Sequence[int] | np.ndarray]
) -> PairBatch:
    """([[5, 6], [7]], [[8], [8, 9]]) -> [[5, 6], [7, 0]], [[1, 1], [1, 0]], [[8, −100], [8, 9]]"""
    labels, _ = padded(targets, IGNORE_INDEX)
    return PairBatch(*padded(sources, 0), labels)


def pair_loss(model: EncoderDecoder, batch: PairBatch, label_smoothing: float = 0.0) -> Tensor:
    """The mean cross-entropy over the targets of the batch, in nats: a scalar Tensor.

    Labels are smoothed in training only, so that what is validated can be compared.
    """
    device = next(iter(model.parameters())).device
    ids, mask, labels = (Tensor(array, device=device) for array in batch)
    smoothing = label_smoothing if model.training else 0.0
    return model.loss(ids, labels, mask, IGNORE_INDEX, smoothing)


def pair_targets(batch: PairBatch) -> int:
    """How many targets the batch has."""
    return int((batch.labels != IGNORE_INDEX).sum())
