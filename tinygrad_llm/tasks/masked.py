"""BERT's pretraining: guess the words that were hidden, and whether one text follows another.

    loss = −(1/n) Σ ln p(word at a hidden place)  −  (1/B) Σ ln p(follows, or does not)

over the n hidden words of B pairs of texts. Whether a number is good is seen beside what knows
nothing of the text: how often each word comes (the unigram model), and the commoner answer.

Devlin et al., "BERT", NAACL 2019; see `data.masking` and `data.pairs` for how a batch is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinygrad_llm import ops
from tinygrad_llm.autograd import no_grad
from tinygrad_llm.backend import RandomStream
from tinygrad_llm.data.loader import IGNORE_INDEX
from tinygrad_llm.data.masking import Masking, special_id
from tinygrad_llm.data.pairs import SentencePairs, Sentences, longest_sentence, sentences_of
from tinygrad_llm.data.report import SILENT, Report
from tinygrad_llm.data.tables import counted
from tinygrad_llm.data.texts import Side, Text
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.models.bert import BertForPreTraining
from tinygrad_llm.tasks.causal import refuse_other_texts, which_texts
from tinygrad_llm.tensor import Tensor


class MaskedBatch(NamedTuple):
    """Pairs of texts with hidden words, int64, as `BertForPreTraining.losses` takes them."""

    input_ids: np.ndarray  # (B, T)
    labels: np.ndarray  # (B, T): the word at a hidden place, else IGNORE_INDEX
    next_sentence_label: np.ndarray  # (B,): 0 the second text follows, 1 it does not
    attention_mask: np.ndarray  # (B, T)
    token_type_ids: np.ndarray  # (B, T)


class MaskedTask:
    """Pairs of texts to train on, drawn and hidden anew each time; others to validate on.

    The best checkpoint is the one with the lowest `score`, both losses added.

    Args:
        text: documents. Whole ones are held out, see `Side`.
        tokenizer: WordPiece: with [CLS], [SEP], [MASK] and [PAD].
        context: tokens in a pair at most, T.
        batch_size: pairs in a batch, B.
        val_fraction: the share of the documents that is only validated on.
        validation: another text to validate on; then all of `text` is trained on.
        mask_probability: the share of the words that is asked for.
        whole_words: hide whole words instead of single tokens.
        short_probability: the share of pairs that are shorter.
        eval_batches: validate on so many batches; 0: on as many as hold all tokens held out once.
        seed: of the pairs and of what is hidden in them. Those of the validation are always the
            same, so that runs can be compared.
        report: hears how far the tokenising is.

    Raises ValueError where a part of the text has no pairs, or the tokenizer lacks a mark.
    """

    score = "val_loss"
    unit = "hidden words"

    def __init__(
        self,
        text: Text,
        tokenizer: Tokenizer,
        *,
        context: int,
        batch_size: int,
        val_fraction: float = 0.1,
        validation: Text | None = None,
        mask_probability: float = 0.15,
        whole_words: bool = False,
        short_probability: float = 0.1,
        eval_batches: int = 0,
        seed: int = 0,
        report: Report = SILENT,
    ) -> None:
        self.text, self.validation_text, self.tokenizer = text, validation, tokenizer
        self.context, self.batch_size, self.eval_batches = context, batch_size, eval_batches
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.masking = Masking.of(tokenizer, mask_probability, whole_words)
        train, held_out = text, validation
        if held_out is None:
            train = Side(text, val_fraction, held_out=False)
            held_out = Side(text, val_fraction, held_out=True)
        self.train_pairs = self._pairs(train, "train on", short_probability, report)
        self.val_pairs = self._pairs(held_out, "validate on", short_probability, report)
        self.stream = RandomStream(seed)
        self._at_unigram = 0  # validations in a row with the loss of the unigram model

    def _pairs(self, text: Text, purpose: str, short: float, report: Report) -> SentencePairs:
        longest = longest_sentence(self.tokenizer, self.context)
        sentences = sentences_of(text, self.tokenizer, longest, report)
        pad_id = special_id(self.tokenizer, "pad")
        try:
            return SentencePairs(sentences, self.tokenizer, pad_id, self.context, short)
        except ValueError as error:
            raise ValueError(f"the part of {text.name!r} to {purpose}: {error}") from None

    @property
    def notes(self) -> list[str]:
        """What is there to train and to validate on, and what gives no pair: sentences to say."""
        sides = (("to train on", self.train_pairs), ("to validate on", self.val_pairs))
        return [_note(where, pairs.sentences) for where, pairs in sides]

    def next_batch(self) -> MaskedBatch:
        """The next training batch, never seen before."""
        return self._draw(self.train_pairs, self.stream)

    def validation(self) -> Iterator[MaskedBatch]:
        """The validation batches, the same ones each time."""
        held_out, stream = len(self.val_pairs.sentences.ids), RandomStream(_VALIDATION_SEED)
        batches = self.eval_batches or -(-held_out // (self.batch_size * self.context))
        return (self._draw(self.val_pairs, stream) for _ in range(batches))

    def _draw(self, pairs: SentencePairs, stream: RandomStream) -> MaskedBatch:
        batch = pairs.draw(self.batch_size, stream)
        masked, labels = self.masking(batch.input_ids, stream)
        return MaskedBatch(
            masked, labels, batch.next_sentence_label, batch.attention_mask, batch.token_type_ids
        )

    def loss(self, model: BertForPreTraining, batch: MaskedBatch) -> Tensor:
        """Both losses added, in nats: a scalar Tensor."""
        return model.loss(*_on_device(model, batch))

    def losses(self, model: BertForPreTraining, batch: MaskedBatch) -> list[Tensor]:
        """(nats per hidden word, nats per pair), scalars."""
        found = model.losses(*_on_device(model, batch))
        return [found.masked_lm, found.next_sentence]

    def size(self, batch: MaskedBatch) -> int:
        """How many words of the batch are asked for."""
        return int((batch.labels != IGNORE_INDEX).sum())

    def sizes(self, batch: MaskedBatch) -> tuple[int, int]:
        """(hidden words, pairs): what the two losses are means of."""
        return self.size(batch), len(batch.next_sentence_label)

    # --- how good is it? --------------------------------------------------------------------------

    def evaluate(self, model: BertForPreTraining) -> dict[str, float]:
        """What is recorded of a validation: both guesses apart, and beside each what is no skill.

            val_loss               val_masked_loss + val_next_loss
            val_masked_loss        nats per hidden word
            val_masked_accuracy    the share of them that is guessed
            val_next_loss          nats per pair
            val_next_accuracy      the share of them that is told
            val_unigram_loss       nats per hidden word of who knows only how often each word comes
            val_majority_masked    the accuracy of always guessing the most frequent word,
            val_majority_next      and of always giving the commoner answer

        Means over all words and over all pairs of the validation batches.
        """
        model.eval()
        totals = np.zeros(6)
        with no_grad():
            for batch in self.validation():
                totals += _measured(model, batch)
        words, nats, right, pairs, pair_nats, pairs_right = totals.tolist()
        masked, following = nats / max(1, words), pair_nats / pairs
        return {
            "val_loss": masked + following,
            "val_masked_loss": masked,
            "val_masked_accuracy": right / max(1, words),
            "val_next_loss": following,
            "val_next_accuracy": pairs_right / pairs,
            **self.baselines,
        }

    @cached_property
    def baselines(self) -> dict[str, float]:
        """The last three of `evaluate`, which no model is needed for.

        The unigram model is counted on the training side, with one more of each word.
        """
        counts = np.bincount(
            self.train_pairs.sentences.ids, minlength=len(self.masking.ordinary)
        ) * self.masking.ordinary.astype(np.int64)
        words = [batch.labels[batch.labels != IGNORE_INDEX] for batch in self.validation()]
        asked = np.concatenate(words)
        answers = np.concatenate([batch.next_sentence_label for batch in self.validation()])
        smoothed = counts + self.masking.ordinary
        return {
            "val_unigram_loss": float(-np.log(smoothed[asked] / smoothed.sum()).mean()),
            "val_majority_masked": float((asked == counts.argmax()).mean()),
            "val_majority_next": float(max(answers.mean(), 1 - answers.mean())),
        }

    def remark(self, found: Mapping[str, float]) -> str | None:
        """What people should hear of what a validation found, if anything; once.

        That the loss of hidden words has sat at the unigram model's for a while: a network passes
        there on its way, but one that stays has not begun to read.
        """
        loss, unigram = found["val_masked_loss"], found["val_unigram_loss"]
        near = math.isfinite(loss) and abs(loss - unigram) <= _NEAR * unigram
        self._at_unigram = self._at_unigram + 1 if near else 0
        if self._at_unigram != _PATIENCE:
            return None
        return (
            f"the loss of hidden words, {loss:.3f}, has sat at the unigram entropy, {unigram:.3f}, "
            f"for {_PATIENCE} validations: the model knows how often words come, not yet where; "
            "if it stays there, try a higher learning rate, more warm-up or a larger batch"
        )

    # --- going on later ---------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, and vocab.txt as BERT has it."""
        self.tokenizer.save(folder)

    def state(self) -> dict[str, Any]:
        """The position in the training data, and which data it is."""
        position = {"train": self.stream.state()}
        return position | which_texts(self.text, self.validation_text)

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`; ValueError when a text is no longer the same."""
        refuse_other_texts(state, self.text, self.validation_text)
        self.stream.load_state(state["train"])


_VALIDATION_SEED = 0x5EED
_NEAR, _PATIENCE = 0.03, 3  # how near is at the unigram entropy, and validations in a row


def _on_device(model: BertForPreTraining, batch: MaskedBatch) -> list[Tensor]:
    device = next(iter(model.parameters())).device
    return [Tensor(array, device=device) for array in batch]


def _measured(model: BertForPreTraining, batch: MaskedBatch) -> list[float]:
    """Hidden words, their nats, how many are right; pairs, their nats, how many are right."""
    ids, labels, follows, mask, segments = _on_device(model, batch)
    asked = labels.data != IGNORE_INDEX
    words, pairs = model(ids, mask, segments, positions=asked)
    found: list[float] = []
    for logits, wanted in ((words, Tensor(labels.data[asked])), (pairs, follows)):
        logits = logits.astype("float32") if logits.dtype.itemsize < 4 else logits
        nats = ops.cross_entropy(logits, wanted, reduction="sum")
        right = (ops.argmax(logits, -1).data == wanted.data).sum()
        found += [wanted.size, nats.item(), float(right)]
    return found


def _note(where: str, sentences: Sentences) -> str:
    documents = np.diff(sentences.documents)
    note = (
        f"{where}: {counted(len(sentences.ids), 'token')} in {counted(len(sentences), 'sentence')} "
        f"of {counted(len(documents), 'document')}"
    )
    if alone := int((documents < 2).sum()):
        note += f", {alone:,} of them with one sentence, which give no pair"
    if sentences.divided:
        longer = counted(sentences.divided, "sentence")
        note += f"; {longer} longer than half of the context in pieces"
    return note
