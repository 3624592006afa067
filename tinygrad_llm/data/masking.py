"""Words that are hidden: what a masked language model is asked for.

    ids      [CLS] the   cat   sat on the mat [SEP]
    masked   [CLS] the [MASK]  sat on dog mat [SEP]
    labels     ·    ·    cat    ·   · the  ·    ·        · is `IGNORE_INDEX`: it does not count

Of the tokens 15 % are asked for; of those 80 % are hidden, 10 % replaced by another word and 10 %
left as they are, so that a model cannot trust what it sees. Which, is drawn anew each time that a
text comes (dynamic masking), from a Philox stream: the same state, the same masks.

Devlin et al., "BERT", NAACL 2019; dynamic: Liu et al., "RoBERTa", 2019 (arXiv:1907.11692).

Dimensions: B batch, T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tinygrad_llm.backend import RandomStream
from tinygrad_llm.data.loader import IGNORE_INDEX
from tinygrad_llm.data.tokenizers import BERT_TOKENS, Tokenizer


class Masking:
    """masked, labels = masking(ids, stream)

    In each row round(probability · n) of its n ordinary tokens are asked for, at least one. A row
    without any has no label.

    Args:
        vocab_size: V.
        mask_id: of [MASK].
        special_ids: never asked for, and never put in place of another: [CLS], [SEP], [PAD] …
        probability: the share that is asked for.
        continues: (V,) booleans: whether a token goes on with the word before it, as '##ing' does.
            With it whole words are asked for, all tokens of one at once (each is then hidden,
            replaced or left by itself): words in random order, as long as they fit into the number
            above; the first of them in any case. None: single tokens.
        hidden, replaced: the shares of those asked for that become [MASK] and another token; the
            rest stays.

    Raises ValueError for shares that are none, and where no token is ordinary.
    """

    def __init__(
        self,
        vocab_size: int,
        mask_id: int,
        special_ids: Any = (),
        probability: float = 0.15,
        continues: Any = None,
        hidden: float = 0.8,
        replaced: float = 0.1,
    ) -> None:
        if not 0 < probability <= 1:
            raise ValueError(f"probability must be above 0 and at most 1, got {probability}")
        if hidden < 0 or replaced < 0 or hidden + replaced > 1 + 1e-9:
            raise ValueError(
                "hidden and replaced must be shares of 0 or more that add up to at most 1, got "
                f"{hidden} and {replaced}"
            )
        if not 0 <= mask_id < vocab_size:
            raise ValueError(f"mask_id must be from 0 to {vocab_size - 1}, got {mask_id}")
        self.mask_id, self.probability = mask_id, probability
        self.hidden, self.replaced = hidden, replaced
        self.ordinary = np.ones(vocab_size, bool)  # (V,)
        self.ordinary[[mask_id, *special_ids]] = False
        self._words = np.flatnonzero(self.ordinary)
        if not len(self._words):
            raise ValueError("every token is a special one: there is nothing to ask for")
        self.continues = None if continues is None else np.asarray(continues, bool)
        if self.continues is not None and self.continues.shape != (vocab_size,):
            raise ValueError(
                f"continues must be {(vocab_size,)} booleans, got {self.continues.shape}"
            )

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, probability: float = 0.15, whole_words: bool = False
    ) -> Masking:
        """For the ids of this tokenizer.

        Raises ValueError where it has no [MASK], and for whole words where it is no WordPiece,
        whose '##' tells where a word goes on.
        """
        return cls(
            tokenizer.vocab_size,
            special_id(tokenizer, "mask"),
            special_ids(tokenizer),
            probability,
            continuations(tokenizer) if whole_words else None,
        )

    def __call__(self, ids: Any, stream: RandomStream) -> tuple[np.ndarray, np.ndarray]:
        """(masked, labels) for ids (B, T), int64 of that shape; the ids stay as they are."""
        ids = np.asarray(ids, np.int64)
        order, action, other = stream.uniform((3, *ids.shape), np.float64)
        asked = self._asked(ids, order)
        hide = asked & (action < self.hidden)
        replace = asked & ~hide & (action < self.hidden + self.replaced)
        masked = np.where(hide, self.mask_id, ids)
        others = self._words[(other * len(self._words)).astype(np.int64)]
        return np.where(replace, others, masked), np.where(asked, ids, IGNORE_INDEX)

    def _asked(self, ids: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Which positions are asked for, (B, T) booleans."""
        ordinary = self.ordinary[ids]
        there = ordinary.sum(axis=1)
        wanted = np.maximum(np.rint(self.probability * there), 1) * (there > 0)
        if self.continues is None:
            order = np.where(ordinary, order, 2.0)  # the special ones last
            rank = order.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
            return rank < wanted[:, None]
        asked = np.zeros(ids.shape, bool)
        for row, count in enumerate(wanted):
            for word in self._whole_words(ids[row], ordinary[row], order[row], int(count)):
                asked[row, word] = True
        return asked

    def _whole_words(
        self, ids: np.ndarray, ordinary: np.ndarray, order: np.ndarray, count: int
    ) -> Iterator[slice]:
        """Words of a row in random order, of `count` tokens at most, and one in any case."""
        assert self.continues is not None
        # A word begins at an ordinary token that continues none, or whose beginning is not here.
        after_ordinary = np.concatenate([[False], ordinary[:-1]])
        begins = ordinary & ~(self.continues[ids] & after_ordinary)
        starts = np.flatnonzero(begins)
        ends = np.flatnonzero(ordinary & ~np.concatenate([(ordinary & ~begins)[1:], [False]])) + 1
        taken = 0
        for i in np.argsort(order[starts], kind="stable"):
            word = slice(int(starts[i]), int(ends[i]))
            if not taken or taken + word.stop - word.start <= count:
                taken += word.stop - word.start
                yield word


# --- what a tokenizer says ------------------------------------------------------------------------


def special_id(tokenizer: Tokenizer, name: str) -> int:
    """The id of [MASK] for 'mask', of [PAD] for 'pad', also where they are spelled <mask>, <pad>.

    Raises ValueError where there is none.
    """
    for token in (f"[{name.upper()}]", f"<{name}>"):
        if (found := tokenizer.token_to_id(token)) is not None:
            return found
    raise ValueError(
        f"this {tokenizer.kind} tokenizer has no [{name.upper()}], which a masked language model "
        "needs: use a WordPiece tokenizer"
    )


def special_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids of its special tokens: [PAD], [UNK], [CLS], [SEP], [MASK] and the like."""
    added = tokenizer.tokenizer.get_added_tokens_decoder()
    found = {i for i, token in added.items() if token.special}
    named = (tokenizer.token_to_id(token) for token in BERT_TOKENS)
    return sorted(found | {i for i in named if i is not None})


def continuations(tokenizer: Tokenizer) -> np.ndarray:
    """(V,) booleans: whether a token goes on with the word before it; WordPiece only."""
    if tokenizer.kind != "wordpiece":
        raise ValueError(
            "whole words are told apart by the '##' of WordPiece, and this is a "
            f"{tokenizer.kind} tokenizer: mask single tokens, or use WordPiece"
        )
    prefix: Any = tokenizer.tokenizer.model.continuing_subword_prefix
    tokens = (tokenizer.id_to_token(i) or "" for i in range(tokenizer.vocab_size))
    return np.array([token.startswith(prefix) and token != prefix for token in tokens])
