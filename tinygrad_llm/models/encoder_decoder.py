"""What every encoder–decoder does: read a source, write a target, learn from pairs of both.

    memory = encode(source)                                   once
    logits(decode([start, y₀ … y_t], memory))[t]              scores for the token after y_t

Dimensions: B batch, S source, T target, C channels, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from tinygrad_llm import ops
from tinygrad_llm.backend import namespace
from tinygrad_llm.models import checks
from tinygrad_llm.models.padding import ALL, visible
from tinygrad_llm.models.pretrained import PretrainedModel
from tinygrad_llm.nn import DecoderCache, Linear
from tinygrad_llm.nn.losses import head_cross_entropy
from tinygrad_llm.tensor import Tensor


class EncoderDecoder(PretrainedModel):
    """logits (B, T, V): at each position of the target, scores for the token that follows

    `model(input_ids, decoder_input_ids)`; the probabilities of target token t are
    softmax(logits[b, t]) and depend on the source and on decoder_input_ids[b, 0 … t] only, which
    are the start token and the t tokens before.

    An architecture has an `lm_head`, and `encoder` and `decoder`, which are called with the ids and
    which of them are real; the decoder also with the memory, which of that is real, and a cache.
    """

    encoder: Any
    decoder: Any
    lm_head: Linear

    def forward(self, input_ids: Any, decoder_input_ids: Any, attention_mask: Any = None) -> Tensor:
        """logits (B, T, V)

        Args:
            input_ids: (B, S) the source
            decoder_input_ids: (B, T) the target so far, after the start token
            attention_mask: (B, S), 1 for a real token of the source, 0 for padding
        """
        memory = self.encode(input_ids, attention_mask)
        return self.lm_head(self.decode(decoder_input_ids, memory, attention_mask))

    def encode(self, input_ids: Any, attention_mask: Any = None) -> Tensor:
        """The memory (B, S, C): what is known at each position of the source."""
        ids = _as_ids(input_ids, "input_ids")
        return self.encoder(ids, visible(attention_mask, ids))

    def decode(
        self,
        decoder_input_ids: Any,
        memory: Tensor,
        attention_mask: Any = None,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """(B, T, C) from which the output layer makes logits

        With a cache decoder_input_ids are the tokens after those that are in it, and are added.
        """
        ids = _as_ids(decoder_input_ids, "decoder_input_ids")
        return self.decoder(ids, ALL, memory, visible(attention_mask, memory), cache)

    def next_logits(
        self,
        decoder_input_ids: Any,
        memory: Tensor,
        attention_mask: Any = None,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """logits (B, V) for the token after decoder_input_ids, the others not computed."""
        return self.lm_head(self.decode(decoder_input_ids, memory, attention_mask, cache)[:, -1])

    def loss(
        self,
        input_ids: Any,
        labels: Any,
        attention_mask: Any = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """−mean ln p(labels[b, t] | source b, labels[b, 0 … t − 1]), a scalar, in nats

        The decoder is given the labels one position to the right (teacher forcing). Labels (B, T)
        equal to `ignore_index` do not count, and no logits are computed for them. With label
        smoothing ε the target is (1 − ε) labels + ε / V (Szegedy et al., 2016).
        """
        memory = self.encode(input_ids, attention_mask)
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        shifted = shift_right(labels, start, pad, ignore_index)
        x = self.decode(shifted, memory, attention_mask)
        return head_cross_entropy(self.lm_head, x, labels, ignore_index, label_smoothing)


def check_special_ids(config: Any) -> None:
    """Raise ValueError unless the ids that start, fill up and end a target are the model's."""
    checks.check_token_id("eos_token_id", config.eos_token_id)
    for name in ("decoder_start_token_id", "pad_token_id"):
        value = getattr(config, name)
        checks.check_token_id(name, value)
        if value is None or value >= config.vocab_size:
            raise ValueError(
                f"{name} must be from 0 to {config.vocab_size - 1}, for vocab_size is "
                f"{config.vocab_size}, got {value}"
            )


def _as_ids(ids: Any, name: str) -> Tensor:
    """The ids as a Tensor (B, T); ValueError for another rank."""
    found = ops.as_tensor(ids)
    if found.ndim != 2:
        raise ValueError(f"{name} must be of shape (B, T), got {found.shape}")
    return found


def shift_right(labels: Any, start: int, pad: int, ignore_index: int = -100) -> Tensor:
    """The decoder's input for these labels: [7, 8, 9, −100] -> [start, 7, 8, 9]

    Those equal to `ignore_index` become `pad`.
    """
    ids = _as_ids(labels, "labels").data
    shifted = namespace(ids).empty_like(ids)
    shifted[:, 1:] = ids[:, :-1]
    shifted[:, :1] = start
    shifted[shifted == ignore_index] = pad
    return Tensor(shifted)
