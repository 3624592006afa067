"""What fine-tuning needs to learn translations: any texts that belong to other texts.

    sources → Seq2Seq → targets          loss: cross-entropy of the target's tokens

Scored is what the model writes for held-out sources, by BLEU and chrF, beside the BLEU of copying
the source.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinygrad_llm.data.tables import counted
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.metrics.generated import translation_scores
from tinygrad_llm.metrics.report import GeneratedReport
from tinygrad_llm.models.seq2seq import Seq2Seq, Seq2SeqConfig
from tinygrad_llm.tasks.classify import TASK_FILE, Texts
from tinygrad_llm.tasks.translation import Pair, TranslationTask, translate
from tinygrad_llm.train.finetune_config import FinetuneConfig
from tinygrad_llm.train.log import Log

MOST_SCORED = 1000  # held-out pairs that are translated for the report: writing takes its time


def begin_translation(config: FinetuneConfig, train: Texts, log: Log) -> tuple[Tokenizer, Seq2Seq]:
    """(tokenizer, model): an encoder–decoder at random, pieces learnt from both sides."""
    options = config.model
    assert train.seconds is not None
    tokenizer = Tokenizer.bpe([*train.texts, *train.seconds], options.vocab_size)
    log.say(f"tokenizer: {tokenizer.vocab_size:,} pieces, made from both sides of the pairs")
    each_side = {
        "layers": options.n_layer,
        "attention_heads": options.n_head,
        "ffn_dim": 4 * options.n_embd,
    }
    sides: dict[str, Any] = {f"encoder_{name}": n for name, n in each_side.items()}
    sides |= {f"decoder_{name}": n for name, n in each_side.items()}
    sizes = Seq2SeqConfig(
        tokenizer.vocab_size,
        d_model=options.n_embd,
        dropout=options.dropout,
        max_position_embeddings=options.max_length,
        norm_first=True,  # the paper's order, norm last, needs a longer warm-up
        decoder_start_token_id=tokenizer.eos_id or 0,
        eos_token_id=tokenizer.eos_id,
        **sides,
    )
    return tokenizer, Seq2Seq(sizes)


class Translating(TranslationTask):
    """The task with what a run needs beside: notes, scores, task.json."""

    def __init__(
        self,
        train: Texts,
        validation: Texts,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        max_length: int,
        seed: int,
        about: Mapping[str, Any],
    ) -> None:
        self.notes: list[str] = []
        learnt = self._fitting(train, tokenizer, max_length)
        self.pairs = self._fitting(validation, tokenizer, max_length)
        super().__init__(
            learnt,
            self.pairs,
            tokenizer,
            batch_size=batch_size,
            max_source=max_length,
            max_target=max_length,
            seed=seed,
        )
        self.name, self.about = validation.name.strip("'"), dict(about)

    def _fitting(self, data: Texts, tokenizer: Tokenizer, longest: int) -> list[Pair]:
        """Its pairs whose sides fit, an end included; the others are counted in `notes`."""
        assert data.seconds is not None
        sides = [tokenizer.encode_each(side) for side in (data.texts, data.seconds)]
        fit = [max(len(a), len(b)) < longest for a, b in zip(*sides, strict=True)]
        pairs = [p for p, fits in zip(data.contents(), fit, strict=True) if fits]
        self.notes += [note for note in data.notes if note not in self.notes]
        if left := len(data) - len(pairs):
            self.notes.append(
                f"{data.name}: left out {left:,} of {counted(len(data), 'pair')} with more than "
                f"{longest} pieces on a side"
            )
        return [(source, target) for source, target in pairs]

    @property
    def steps_per_epoch(self) -> int:
        """⌈pairs / batch_size⌉"""
        return len(self.batches)

    def report(self, model: Seq2Seq) -> GeneratedReport:
        """BLEU and chrF of what the model writes for the held-out sources."""
        pairs, notes = self.pairs[:MOST_SCORED], list(self.notes)
        if len(pairs) < len(self.pairs):
            notes.append(f"scored are the first {MOST_SCORED:,} of {len(self.pairs):,} pairs")
        sources = [source for source, _ in pairs]
        found = translate(model, self.tokenizer, sources)
        targets = [target for _, target in pairs]
        return GeneratedReport(self.name, translation_scores(found, targets, sources), notes)

    def save(self, folder: Path) -> None:
        """Write the tokenizer and task.json."""
        super().save(folder)
        text = json.dumps(self.about, indent=2, ensure_ascii=False) + "\n"
        (folder / TASK_FILE).write_text(text, encoding="utf-8")
