"""Fine-tuning for translate: a text for a text, whatever the one has to do with the other.

    sources → Seq2Seq or T5 → targets          loss: cross-entropy of the target's tokens

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
from tinygrad_llm.finetune.tables import SOURCES, TARGETS, named, open_table, splits, title
from tinygrad_llm.finetune.texts import only_column, plain_lines, trained_on
from tinygrad_llm.generate import GenerationConfig
from tinygrad_llm.metrics.report import GeneratedReport, translation_report
from tinygrad_llm.models.pretrained import read_config
from tinygrad_llm.models.seq2seq import MODEL_TYPE, Seq2Seq, Seq2SeqConfig
from tinygrad_llm.models.t5 import T5
from tinygrad_llm.tasks.classify import TASK_FILE, Texts, hold_out
from tinygrad_llm.tasks.translation import Pair, TranslationTask, translate
from tinygrad_llm.train.config import ConfigError
from tinygrad_llm.train.log import Log

MOST_SCORED = 1000  # held-out sources that are translated for the report: writing takes its time

Model = Seq2Seq | T5


@dataclass(frozen=True)
class Translation:
    """The kind of translate."""

    examples: str = "pairs"
    models: tuple[type, ...] = (Seq2Seq, T5)

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

    def begin(self, config: FinetuneConfig, train: Texts, log: Log) -> tuple[Tokenizer, Model]:
        """(tokenizer, model): a checkpoint, or an encoder–decoder at random."""
        if config.train.layer_decay != 1:
            raise ConfigError(
                "--layer-decay is for a stack of layers, and to translate takes two: leave it out"
            )
        if config.model.checkpoint:
            return _begin_from(config)
        return _begin_at_random(config, train, log)

    def open(self, folder: Path) -> tuple[Tokenizer, Model]:
        """(tokenizer, model) as a checkpoint of a run holds them."""
        model = open_model(folder, self.models)
        return Tokenizer.from_file(folder), model

    def defaults(self, config: FinetuneConfig, model: Model) -> Defaults:
        """The narrower, the faster; a T5 that has learnt a language already, with care."""
        width = model.config.d_model
        if isinstance(model, T5):
            return Defaults(32, min(1e-3, 3e-4 * 512 / width))
        return Defaults(32, 1e-3 * 128 / width)

    def task(
        self,
        config: FinetuneConfig,
        train: Texts,
        validation: Texts,
        tokenizer: Tokenizer | None,
        model: Model,
    ) -> Translating:
        """What the trainer is given."""
        assert tokenizer is not None
        data = config.data
        return Translating(
            train,
            validation,
            tokenizer,
            batch_size=config.train.batch_size,
            eos_id=model.config.eos_token_id,
            label_smoothing=config.train.label_smoothing,
            seed=config.data_seed,
            about={
                "task": config.task,
                "text_column": data.text_column,
                "second_column": data.second_column,
                "prefix": data.prefix,
                "max_length": config.model.max_length,
                "num_beams": config.model.num_beams,
            },
        )

    def report(self, task: Translating, model: Model) -> GeneratedReport:
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
    written = _translate(fitted.model, fitted.tokenizer, texts, fitted.about)
    rows = zip(lines, texts, written, strict=True)
    return ({"line": n, "text": a, "translation": b} for n, a, b in rows), []


def _translate(
    model: Model, tokenizer: Tokenizer, texts: Sequence[str], about: Mapping[str, Any]
) -> list[str]:
    """As task.json says: its prefix and its beams, and no target longer than in training."""
    options: dict[str, Any] = {"temperature": 0.0}
    if (beams := about.get("num_beams", 1)) > 1:
        options = {"num_beams": beams}
    if longest := about.get("max_length"):
        options["max_new_tokens"] = longest
    prefix = about.get("prefix", "")
    return translate(model, tokenizer, texts, GenerationConfig(**options), prefix=prefix)


def pairs_of(table: Table, config: FinetuneConfig) -> Texts:
    """The texts are sources, the seconds targets; labels there are none."""
    data = config.data
    if data.label_column:
        raise ConfigError("--label-column is not for translate: name --second-column, the target")
    source = data.text_column or named(table, SOURCES, 1, "source", "--text-column")
    target = data.second_column or named(table, TARGETS, 2, "target", "--second-column")
    if table.index(source) == table.index(target):
        raise ConfigError(
            f"{table.name}: source and target are both column {str(target)!r}: name the other with "
            "--text-column or --second-column"
        )
    taken = table.take(source, target)
    notes = list(taken.notes)
    if (
        len(table.columns) > 2
        and not table.has_header
        and not (data.text_column and data.second_column)
    ):
        notes.append(
            f"{table.name}: took column {source} for the source and column {target} for the "
            f"target, of {len(table.columns)} (--text-column and --second-column if not)"
        )
    sources, targets = ([row[i] for row in taken.rows] for i in (0, 1))
    return Texts(table.name, sources, targets, [""] * len(taken), taken.lines, notes)


# --- models ---------------------------------------------------------------------------------------


_MODELS: dict[str, type[Model]] = {MODEL_TYPE: Seq2Seq, "t5": T5}


def _begin_from(config: FinetuneConfig) -> tuple[Tokenizer, Model]:
    options = config.model
    folder = model_folder(options.checkpoint)
    found: dict[str, Any] = read_config(folder, dict)
    kind = _MODELS.get(str(found.get("model_type")))
    if kind is None:
        raise ConfigError(
            f"{options.checkpoint} is a model of type {found.get('model_type')!r}: to translate, "
            "expected a T5 or a run of `tinygrad-llm finetune translate`"
        )
    model = kind.from_pretrained(folder)
    if isinstance(model, Seq2Seq):  # a T5 has no longest text
        longest = model.config.max_position_embeddings
        check_max_length(options.max_length, options.checkpoint, longest)
    if model.config.eos_token_id is None:
        raise ConfigError(
            f"{options.checkpoint} does not say which token ends a text: its config.json needs an "
            "eos_token_id"
        )
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
        eos_id: int | None,
        label_smoothing: float,
        seed: int,
        about: Mapping[str, Any],
    ) -> None:
        self.notes: list[str] = []
        prefix, longest = about["prefix"], about["max_length"]
        learnt = self._fitting(train, tokenizer, prefix, longest)
        self.pairs = self._fitting(validation, tokenizer, prefix, longest)
        super().__init__(
            learnt,
            self.pairs,
            tokenizer,
            batch_size=batch_size,
            max_source=longest,
            max_target=longest,
            eos_id=eos_id,
            prefix=prefix,
            label_smoothing=label_smoothing,
            seed=seed,
        )
        self.name = title(validation.name)
        self.about = dict(about)

    def _fitting(self, data: Texts, tokenizer: Tokenizer, prefix: str, longest: int) -> list[Pair]:
        """Its pairs whose sides fit, an end included; the others are counted in `notes`."""
        assert data.seconds is not None
        sources = [prefix + text for text in data.texts]
        sides = [tokenizer.encode_each(side) for side in (sources, data.seconds)]
        fit = [max(len(a), len(b)) < longest for a, b in zip(*sides, strict=True)]
        pairs = [p for p, fits in zip(data.contents(), fit, strict=True) if fits]
        if not pairs:
            raise ConfigError(
                f"{data.name}: each of the {counted(len(data), 'pair')} has more than {longest} "
                f"pieces on a side{', the prefix among them' if prefix else ''}: give a larger "
                "--max-length"
            )
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

    def report(self, model: Model) -> GeneratedReport:
        """BLEU and chrF of what the model writes for the held-out sources.

        A source that has several targets is translated once, and any of them is right.
        """
        targets: dict[str, list[str]] = {}
        for source, target in self.pairs:
            targets.setdefault(source, []).append(target)
        sources, notes = list(targets)[:MOST_SCORED], list(self.notes)
        if len(targets) < len(self.pairs):
            notes.append(
                f"the {len(self.pairs):,} held-out pairs have {len(targets):,} sources: each is "
                "scored once, against all of its targets"
            )
        if len(sources) < len(targets):
            notes.append(f"scored are the first {MOST_SCORED:,} of {len(targets):,} sources")
        found = _translate(model, self.tokenizer, sources, self.about)
        right = [list(dict.fromkeys(targets[source])) for source in sources]
        return translation_report(found, right, sources, name=self.name, notes=notes)

    def save(self, folder: Path) -> None:
        """Write the tokenizer and task.json."""
        super().save(folder)
        text = json.dumps(self.about, indent=2, ensure_ascii=False) + "\n"
        (folder / TASK_FILE).write_text(text, encoding="utf-8")
