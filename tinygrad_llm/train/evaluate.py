"""Which model, which text and which part of it: what stands before `tasks.evaluate`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Literal, NamedTuple

from tinygrad_llm.data import corpora, files, texts
from tinygrad_llm.data.report import SILENT, Report
from tinygrad_llm.data.token_files import tokens_of
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.data.tokens import Tokens
from tinygrad_llm.finetune import config as finetune_config
from tinygrad_llm.models.auto import class_of
from tinygrad_llm.models.encoder_decoder import EncoderDecoder
from tinygrad_llm.models.gpt import GPT
from tinygrad_llm.tasks.causal import sides
from tinygrad_llm.tasks.evaluate import Reading, Score, evaluate_ids, evaluate_text
from tinygrad_llm.train.config import DataConfig, PretrainConfig
from tinygrad_llm.train.machine import choose_device
from tinygrad_llm.train.run import find_checkpoint

Split = Literal["all", "val"]


@dataclass(frozen=True)
class Subject:
    """A trained model, and the configuration of its run where it lies in one."""

    folder: Path
    model: GPT  # or a Llama or an LSTM, which answer to the same
    tokenizer: Tokenizer
    config: PretrainConfig | None
    finetuned: bool = False  # by a run of `finetune`, which holds out in another way


def load(path: str | Path, device: str = "auto") -> Subject:
    """The model that `path` means: a run's best checkpoint, or the checkpoint itself.

    Raises FileNotFoundError or ValueError where there is none that can be used.
    """
    folder = find_checkpoint(path)
    chosen, _ = choose_device(device)
    kind = class_of(folder)
    if not hasattr(kind, "next_logits") or issubclass(kind, EncoderDecoder):
        raise ValueError(
            f"{folder} holds a {kind.__name__}, which does not predict each token of a text from "
            "those before it: its accuracies and losses are in its run's metrics.jsonl"
        )
    model = kind.from_pretrained(folder).to(chosen)
    tokenizer, run = Tokenizer.from_file(folder), _run_of(folder)
    if run is None:
        return Subject(folder, model, tokenizer, None)
    finetuned = finetune_config.is_finetuning(run)
    return Subject(folder, model, tokenizer, finetune_config.of_any_run(run), finetuned)


def _run_of(checkpoint: Path) -> Path | None:
    """The config.toml of the run: RUN/checkpoints/step-N, or its ema/, lies in one."""
    for folder in list(checkpoint.resolve().parents)[:3]:
        file = folder / "config.toml"
        if file.is_file() and (folder / "checkpoints").is_dir():
            return file
    return None


class Documents(NamedTuple):
    """Documents in parts (see `files.parts`), and the bytes of their files; 0: not known."""

    parts: Iterable[tuple[str, bool]]
    size: int


Text = Tokens | Documents


def open_text(subject: Subject, source: str, part: Split, report: Report = SILENT) -> Text:
    """The text called `source` ('': the run's own), all of it or the run's validation split.

    For all of it, a file is read as it is scored, not before. Raises ValueError or OSError, each
    with one sentence, where it cannot be, or where the model has no run to say what its split is.
    """
    if part == "val":
        return _validation(subject, source, report)
    return _documents(source or own_text(subject, part), report)


def evaluate(subject: Subject, text: Text, reading: Reading, report: Report = SILENT) -> Score:
    """Score the text; documents apart where the run was trained so. Raises as `open_text`."""
    data = subject.config.data if subject.config else DataConfig()
    reading = replace(reading, apart=data.documents == "separate")
    total = len(text) - 1 if isinstance(text, Tokens) else text.size

    def watch(tokens: int, size: int) -> None:
        done = tokens if isinstance(text, Tokens) else size
        if 0 < done < total:
            report.progress("scoring", done, total)

    if isinstance(text, Documents):
        return evaluate_text(subject.model, subject.tokenizer, text.parts, reading, watch)
    spans = text.spans() if reading.apart else None
    return evaluate_ids(subject.model, subject.tokenizer, text.ids, reading, spans, watch)


def own_text(subject: Subject, part: Split) -> str:
    """What the model's run was trained on, or validated with; ValueError where it has no run."""
    data = _config(subject, "which text is meant", "name one with --data").data
    return (part == "val" and data.val_source) or data.source


def _config(subject: Subject, what: str, advice: str) -> PretrainConfig:
    if subject.config is None:
        raise ValueError(f"{subject.folder} lies in no run, which would say {what}: {advice}")
    if subject.finetuned:
        raise ValueError(
            f"{subject.folder} was fine-tuned, and metrics.json of its run has its score on the "
            f"text that it was validated with: {advice}"
        )
    return subject.config


def _documents(source: str, report: Report) -> Documents:
    """Only a built-in corpus, of some megabytes, is held as a whole."""
    name, place = corpora.locate(source, report)
    if place is None:
        corpus = corpora.load(name)
        return Documents(corpus.parts(), len(corpus.text.encode()))
    size = sum(path.stat().st_size for path in corpora.paths(place))
    return Documents(_begun(files.parts(place, once=True)), size)


def _begun(parts: Iterable[tuple[str, bool]]) -> Iterable[tuple[str, bool]]:
    """The same, after the first was read: a file that is not there is told at once."""
    rest = iter(parts)
    return chain([*islice(rest, 1)], rest)


def _validation(subject: Subject, source: str, report: Report) -> Tokens:
    """The tokens that the run is validated on, or those of another text, divided as the run's."""
    if not source:
        own_text(subject, "val")  # where there is no run, a text is what is missing first
    config = _config(subject, "where its validation split begins", "take --split all")
    data, tokenizer = config.data, subject.tokenizer
    if not source and data.val_source:
        return tokens_of(texts.open_text(data.val_source, report), tokenizer, report)
    text = texts.open_text(source or data.source, report)
    return sides(text, tokenizer, data.val_fraction, data.val_by, report)[1]
