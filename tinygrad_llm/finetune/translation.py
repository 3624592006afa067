"""Fine-tuning for translate: a text for a text, whatever the one has to do with the other.

    sources → Seq2Seq → targets          loss: cross-entropy of the target's tokens

Scored is what the model writes for held-out sources, by BLEU and chrF, beside the BLEU of copying
the source.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinygrad_llm.data.tables import Table, counted, read_table
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.finetune.config import FinetuneConfig
from tinygrad_llm.finetune.encoders import (
    check_max_length,
    model_folder,
    open_model,
    tokenizer_of,
)
from tinygrad_llm.finetune.kind import Columns, Defaults, Fitted, Rows, with_text
from tinygrad_llm.finetune.tables import SOURCES, TARGETS, named, open_table, splits
from tinygrad_llm.finetune.texts import only_column, plain_lines, trained_on
from tinygrad_llm.metrics.generated import translation_scores
from tinygrad_llm.metrics.report import GeneratedReport
from tinygrad_llm.models.pretrained import read_config
from tinygrad_llm.models.seq2seq import Seq2Seq, Seq2SeqConfig
from tinygrad_llm.tasks.classify import TASK_FILE, Texts, hold_out
from tinygrad_llm.tasks.translation import Pair, TranslationTask, translate
from tinygrad_llm.train.config import ConfigError
from tinygrad_llm.train.log import Log

MOST_SCORED = 1000  # held-out pairs that are translated for the report: writing takes its time


@dataclass(frozen=True)
class Translation:
    """The kind of translate."""

    examples: str = "pairs"
    models: tuple[type, ...] = (Seq2Seq,)

    def read(self, config: FinetuneConfig, log: Log) -> tuple[Texts, Texts]:
        """(training, validation); what is held out shares no source with the rest."""
        share, seed = config.data.val_fraction, config.train.seed
        return splits(
            config,
            log,
            examples=self.examples,
            built_in=lambda table: pairs_of(table, config),
            open_file=lambda path: pairs_of(open_table(path, config), config),
            check=lambda pairs: None,
            hold_out=lambda data: hold_out(data, share, seed, by_first=True),
        )

    # --- the model --------------------------------------------------------------------------------

    def begin(self, config: FinetuneConfig, train: Texts, log: Log) -> tuple[Tokenizer, Seq2Seq]:
        """(tokenizer, model): a checkpoint, or an encoder–decoder at random."""
        if config.model.checkpoint:
            return _begin_from(config)
        return _begin_at_random(config, train, log)

    def open(self, folder: Path) -> tuple[Tokenizer, Seq2Seq]:
        """(tokenizer, model) as a checkpoint of a run holds them."""
        model = open_model(folder, self.models)
        return Tokenizer.from_file(folder), model

    def defaults(self, config: FinetuneConfig, model: Seq2Seq) -> Defaults:
        """The narrower, the faster."""
        return Defaults(32, 2e-3 * 128 / model.config.d_model)

    def task(
        self,
        config: FinetuneConfig,
        train: Texts,
        validation: Texts,
        tokenizer: Tokenizer | None,
        model: Seq2Seq,
    ) -> Translating:
        """What the trainer is given."""
        assert tokenizer is not None
        data, longest = config.data, config.model.max_length
        return Translating(
            train,
            validation,
            tokenizer,
            batch_size=config.train.batch_size,
            max_length=longest,
            seed=config.data_seed,
            about={
                "task": config.task,
                "text_column": data.text_column,
                "second_column": data.second_column,
                "max_length": longest,
            },
        )

    def report(self, task: Translating, model: Seq2Seq) -> GeneratedReport:
        """BLEU and chrF of what the model writes."""
        return task.report(model)

    # --- new texts --------------------------------------------------------------------------------

    def of_file(self, fitted: Fitted, path: str, columns: Columns) -> Rows:
        """A translation of each row of a file; of plain text, of each line."""
        lines = plain_lines(path, columns)
        if lines is not None:
            return self.of_lines(fitted, lines)
        table = read_table(path, header=columns.header, quoted=columns.quoted)
        text = columns.text or trained_on(table, fitted.about, "text_column")
        text = text or only_column(table) or named(table, SOURCES, 1, "source", "--text-column")
        found, notes = _written(fitted, table.texts(text), table.lines)
        return found, [*table.notes, *notes]

    def of_lines(self, fitted: Fitted, lines: Sequence[str]) -> Rows:
        """A translation of each line."""
        numbers, texts = with_text(lines)
        return _written(fitted, texts, numbers)


def _written(fitted: Fitted, texts: Sequence[str], lines: Sequence[int]) -> Rows:
    assert fitted.tokenizer is not None
    written = translate(fitted.model, fitted.tokenizer, texts)
    rows = zip(lines, texts, written, strict=True)
    return ({"line": n, "text": a, "translation": b} for n, a, b in rows), []


def pairs_of(table: Table, config: FinetuneConfig) -> Texts:
    """The texts are sources, the seconds targets; labels there are none."""
    data = config.data
    if data.label_column:
        raise ConfigError("--label-column is not for translate: name --second-column, the target")
    source = data.text_column or named(table, SOURCES, 1, "source", "--text-column")
    target = data.second_column or named(table, TARGETS, 2, "target", "--second-column")
    taken = table.take(source, target)
    sources, targets = ([row[i] for row in taken.rows] for i in (0, 1))
    return Texts(table.name, sources, targets, [""] * len(taken), taken.lines, taken.notes)


# --- models ---------------------------------------------------------------------------------------


def _begin_from(config: FinetuneConfig) -> tuple[Tokenizer, Seq2Seq]:
    options = config.model
    folder = model_folder(options.checkpoint)
    found: dict[str, Any] = read_config(folder, dict)
    if found.get("model_type") != "tinygrad-llm-seq2seq":
        raise ConfigError(
            f"{options.checkpoint} is a model of type {found.get('model_type')!r}: to translate, "
            "expected a run of `tinygrad-llm finetune translate`"
        )
    model = Seq2Seq.from_pretrained(folder)
    check_max_length(options.max_length, options.checkpoint, model.config.max_position_embeddings)
    return tokenizer_of(folder, model.config.vocab_size), model


def _begin_at_random(config: FinetuneConfig, train: Texts, log: Log) -> tuple[Tokenizer, Seq2Seq]:
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


# --- the task -------------------------------------------------------------------------------------


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
