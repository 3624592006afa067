"""What can be pretrained: how each network is made from a configuration, and what it learns.

    gpt, llama    predict the next token of a text                              tasks/causal.py
    lstm          the same, with a state instead of attention                   tasks/causal.py
    bert          guess hidden words, and whether a text follows another        tasks/masked.py
    t5            fill in spans that are hidden                                 tasks/span.py

Everything else is the same for all of them: pretrain.py, trainer.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from tinygrad_llm.data.masking import special_id
from tinygrad_llm.data.report import Report
from tinygrad_llm.data.texts import Text
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.models.bert import BertConfig, BertForPreTraining
from tinygrad_llm.models.gpt import GPT, GPTConfig
from tinygrad_llm.models.llama import Llama, LlamaConfig
from tinygrad_llm.models.lstm import LSTMConfig, LSTMLanguageModel
from tinygrad_llm.models.t5 import T5, T5Config
from tinygrad_llm.tasks.causal import CausalTask
from tinygrad_llm.tasks.masked import MaskedTask
from tinygrad_llm.tasks.span import SpanTask, with_sentinels
from tinygrad_llm.train.config import PretrainConfig


class Texts(NamedTuple):
    """What is trained on, and what is validated on where that is another text."""

    train: Text
    validation: Text | None


@dataclass(frozen=True)
class Architecture:
    """One kind of network.

    Attributes:
        model: its class; `model(sizes)` makes one, `model.from_pretrained(folder)` opens one.
        sizes: its config, for a configuration of the run and a tokenizer.
        task: what it learns from the texts; the last argument hears how far the tokenising is.
        tokenizer: the tokenizer with the marks that the task needs besides.
        writes: whether it goes on from a prompt.
    """

    model: Any
    sizes: Callable[[PretrainConfig, Tokenizer], Any]
    task: Callable[[PretrainConfig, Texts, Tokenizer, Report], Any]
    tokenizer: Callable[[Tokenizer], Tokenizer] = lambda tokenizer: tokenizer
    writes: bool = True


# --- the sizes ------------------------------------------------------------------------------------


def _gpt(config: PretrainConfig, tokenizer: Tokenizer) -> GPTConfig:
    model = config.model
    return GPTConfig(
        vocab_size=tokenizer.vocab_size,
        n_positions=config.train.context,
        n_embd=model.n_embd,
        n_layer=model.n_layer,
        n_head=model.n_head,
        initializer_range=_initial(model.n_embd),
        resid_pdrop=model.dropout,
        embd_pdrop=model.dropout,
        attn_pdrop=model.dropout,
        bos_token_id=tokenizer.eos_id,  # the mark between documents, as in GPT-2
        eos_token_id=tokenizer.eos_id,
    )


def _initial(width: int) -> float:
    """How far weights are spread at first.

    GPT-2's and BERT's 0.02 is for a width of 768; a narrower layer needs larger weights to say as
    much. At 128 the loss of GPT's demo after 300 steps was 4.28 instead of 4.61.
    """
    return 0.02 * math.sqrt(768 / width)


def _llama(config: PretrainConfig, tokenizer: Tokenizer) -> LlamaConfig:
    """Its MLP has three matrices: at 8/3 of the width it has as many weights as GPT's at 4."""
    model = config.model
    return LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=model.n_embd,
        intermediate_size=max(1, round(model.n_embd * 8 / 3)),
        num_hidden_layers=model.n_layer,
        num_attention_heads=model.n_head,
        max_position_embeddings=config.train.context,
        attention_dropout=model.dropout,  # the only dropout of a Llama
        initializer_range=_initial(model.n_embd),
        tie_word_embeddings=True,  # as in the small ones of Llama 3.2
        bos_token_id=tokenizer.eos_id,
        eos_token_id=tokenizer.eos_id,
    )


def _bert(config: PretrainConfig, tokenizer: Tokenizer) -> BertConfig:
    model = config.model
    return BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=model.n_embd,
        num_hidden_layers=model.n_layer,
        num_attention_heads=model.n_head,
        intermediate_size=4 * model.n_embd,
        hidden_dropout_prob=model.dropout,
        attention_probs_dropout_prob=model.dropout,
        max_position_embeddings=config.train.context,
        initializer_range=_initial(model.n_embd),
        pad_token_id=special_id(tokenizer, "pad"),
    )


def _lstm(config: PretrainConfig, tokenizer: Tokenizer) -> LSTMConfig:
    model = config.model
    return LSTMConfig(
        vocab_size=tokenizer.vocab_size,
        n_positions=config.train.context,
        n_embd=model.n_embd,
        n_hidden=model.n_embd,
        n_layer=model.n_layer,
        dropout=model.dropout,
        tie_word_embeddings=model.tied,
        bos_token_id=tokenizer.eos_id,
        eos_token_id=tokenizer.eos_id,
    )


def _t5(config: PretrainConfig, tokenizer: Tokenizer) -> T5Config:
    """`<|endoftext|>` ends a target, stands before its first token and fills up."""
    model, end = config.model, tokenizer.eos_id
    if end is None:
        raise ValueError("a t5 needs a tokenizer with <|endoftext|>, this one has none")
    return T5Config(
        vocab_size=tokenizer.vocab_size,
        d_model=model.n_embd,
        d_kv=model.n_embd // model.n_head,
        d_ff=4 * model.n_embd,
        num_layers=model.n_layer,
        num_heads=model.n_head,
        dropout_rate=model.dropout,
        pad_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=end,
    )


# --- the tasks ------------------------------------------------------------------------------------


def _causal(
    config: PretrainConfig, texts: Texts, tokenizer: Tokenizer, report: Report
) -> CausalTask:
    return CausalTask(texts.train, tokenizer, **_windows(config, texts), report=report)


def _spans(config: PretrainConfig, texts: Texts, tokenizer: Tokenizer, report: Report) -> SpanTask:
    return SpanTask(
        texts.train,
        tokenizer,
        **_windows(config, texts),
        noise_density=config.span.noise_density,
        mean_span=config.span.mean_span,
        report=report,
    )


def _windows(config: PretrainConfig, texts: Texts) -> dict[str, Any]:
    data = config.data
    return {
        **_batches(config, texts),
        "val_by": data.val_by,
        "documents": data.documents,
        "order": data.order,
    }


def _masked(
    config: PretrainConfig, texts: Texts, tokenizer: Tokenizer, report: Report
) -> MaskedTask:
    return MaskedTask(
        texts.train,
        tokenizer,
        **_batches(config, texts),
        mask_probability=config.masking.mask_probability,
        whole_words=config.masking.whole_words,
        short_probability=config.masking.short_probability,
        report=report,
    )


def _batches(config: PretrainConfig, texts: Texts) -> dict[str, Any]:
    train = config.train
    return {
        "context": train.context,
        "batch_size": train.batch_size,
        "val_fraction": config.data.val_fraction,
        "validation": texts.validation,
        "eval_batches": train.eval_batches,
        "seed": train.seed + 2**63,  # another sequence than the one of weights and dropout
    }


ARCHITECTURES: dict[str, Architecture] = {
    "gpt": Architecture(GPT, _gpt, _causal),
    "llama": Architecture(Llama, _llama, _causal),
    "bert": Architecture(BertForPreTraining, _bert, _masked, writes=False),
    "lstm": Architecture(LSTMLanguageModel, _lstm, _causal),
    "t5": Architecture(T5, _t5, _spans, with_sentinels, writes=False),
}
