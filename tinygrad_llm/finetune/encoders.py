"""Encoders: of a checkpoint, of a run of fine-tuning, and the small one that begins at random."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.finetune.config import FinetuneModel
from tinygrad_llm.models import auto, hub
from tinygrad_llm.models.bert import BertConfig, Pooling
from tinygrad_llm.models.pretrained import check_vocabulary
from tinygrad_llm.train import checkpoint
from tinygrad_llm.train.config import ConfigError
from tinygrad_llm.train.log import Log
from tinygrad_llm.train.run import find_checkpoint


def model_folder(name: str) -> Path:
    """The folder of a model: of a run its best checkpoint; or a name on the hub, fetched."""
    found = Path(name).expanduser()
    return averaged(find_checkpoint(found)) if found.exists() else hub.find(name)


def averaged(folder: Path) -> Path:
    """The average of the weights, where the checkpoint of a run keeps one; else the checkpoint."""
    average = folder / checkpoint.AVERAGE
    return average if (average / "config.json").is_file() else folder


def tokenizer_of(folder: Path, vocab_size: int) -> Tokenizer:
    """That in the folder of a checkpoint; ValueError where the model has fewer embeddings."""
    tokenizer = Tokenizer.from_file(folder)
    check_vocabulary(tokenizer.vocab_size, vocab_size)
    return tokenizer


def sentence_pooling(folder: Path) -> Pooling | None:
    """What a sentence-transformers checkpoint was trained to pool; None where it is none."""
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        modes = [key for key, value in found.items() if key.startswith("pooling_mode") and value]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: expected a JSON object ({error})") from error
    if modes == ["pooling_mode_mean_tokens"]:
        return "mean"
    return "cls" if modes == ["pooling_mode_cls_token"] else None  # others: as BERT itself does


def open_model(folder: Path, kinds: Sequence[type]) -> Any:
    """The model that a run left in this folder; ConfigError where it is none of `kinds`."""
    kind = auto.class_of(folder)
    if kind not in kinds:
        raise ConfigError(
            f"{folder} holds a {kind.__name__}, which labels nothing: expected what "
            "`tinygrad-llm finetune` leaves behind"
        )
    return kind.from_pretrained(folder)


def check_max_length(max_length: int, checkpoint: str, longest: int, advice: str = "") -> None:
    """Refuse a `model.max_length` of more pieces than the checkpoint has positions for."""
    if max_length > longest:
        raise ConfigError(
            f"model.max_length is {max_length}, but {checkpoint} reads at most {longest} pieces at "
            f"once: give --max-length {longest}{advice}"
        )


# --- at random ------------------------------------------------------------------------------------


def learnt_tokenizer(
    columns: Iterable[Sequence[str]], options: FinetuneModel, log: Log
) -> Tokenizer:
    """WordPiece, learnt from these texts."""
    texts = (text for column in columns for text in column)
    tokenizer = Tokenizer.wordpiece(texts, options.vocab_size, cased=options.cased)
    log.say(f"tokenizer: {tokenizer.vocab_size:,} pieces, made from the training texts")
    return tokenizer


def small_bert(options: FinetuneModel, vocab_size: int, **others: Any) -> BertConfig:
    """The BERT of the sizes that are asked for; `others`: of its head."""
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=options.n_embd,
        num_hidden_layers=options.n_layer,
        num_attention_heads=options.n_head,
        intermediate_size=4 * options.n_embd,
        hidden_dropout_prob=options.dropout,
        attention_probs_dropout_prob=options.dropout,
        max_position_embeddings=options.max_length,
        # BERT's 0.02 is for its width of 768; a narrower layer needs larger weights to say as much.
        initializer_range=0.02 * math.sqrt(768 / options.n_embd),
        **others,
    )
