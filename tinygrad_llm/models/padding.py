"""Texts of several lengths in one batch: which of its tokens are real.

Dimensions: B texts, S tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.backend import Array, namespace
from tinygrad_llm.ops.convert import as_array
from tinygrad_llm.tensor import Tensor


class Visible(NamedTuple):
    """Which keys of each text are real: its first `lengths[b]`, or those where `mask` is True.

    Both are None where all are. Texts that are filled up at their end, as nearly all are, have
    lengths, which cost attention no array of its scores' size.
    """

    lengths: Array | None = None  # (B,) integers
    mask: Array | None = None  # (B, 1, 1, S) booleans


ALL = Visible()  # no padding


def visible(attention_mask: Any, x: Tensor, before: int = 0) -> Visible:
    """From Hugging Face's attention_mask (B, S): 1 where a token is real, 0 where it is padding.

    x (B, T, …) are the tokens, after `before` others that are in a cache: S = before + T. Raises
    ValueError for another shape or other values.
    """
    if attention_mask is None:
        return ALL
    given = as_array(attention_mask, x.data)
    b, s = x.shape[0], before + x.shape[1]
    if given.shape != (b, s):
        raise ValueError(f"attention_mask must be of shape {(b, s)}, got {given.shape}")
    real = given != 0
    if given.dtype != backend.bool_ and bool((real & (given != 1)).any()):
        raise ValueError("attention_mask must be 1 where a token is real and 0 where it is padding")
    if bool(real.all()):
        return ALL
    lengths = real.sum(axis=1)
    if bool((real == (namespace(real).arange(s) < lengths[:, None])).all()):
        return Visible(lengths=lengths)
    return Visible(mask=real[:, None, None, :])


def padded(texts: Sequence[Sequence[int] | np.ndarray], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, which of them are real), (B, T): the texts, filled up at their ends to the longest."""
    ids = np.full((len(texts), max(map(len, texts))), pad, np.int64)
    real = np.arange(ids.shape[1]) < np.array([len(text) for text in texts])[:, None]
    ids[real] = np.concatenate([np.asarray(text, np.int64) for text in texts])
    return ids, real
