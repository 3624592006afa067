"""What a run of fine-tuning, and `predict` after it, must know of the task: a `Kind` for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.finetune.config import FinetuneConfig
from tinygrad_llm.metrics.report import Report
from tinygrad_llm.train.log import Log
from tinygrad_llm.train.trainer import Measured, Task


class Learnt(Task, Protocol):
    """What a trainer learns, and what a run says of it. Most are `Measured`, too."""

    notes: list[str]  # what a user should know of how the data was read

    @property
    def steps_per_epoch(self) -> int:
        """Batches in which all of the training data comes once."""
        ...


class Defaults(NamedTuple):
    """Numbers that depend on model and task, in place of a 0 in the configuration."""

    batch_size: int
    lr: float
    head_lr: float | None = None  # None: as lr
    max_length: int | None = None  # None: a task that has a number of its own


Found = dict[str, Any]  # what is said of one row of new data: a line of JSON
Rows = tuple[Iterator[Found], list[str]]  # (one for each row, notes on how the data was read)


@dataclass(frozen=True)
class Columns:
    """How a file is read; '' and None: by what is usual, and as the training data was."""

    text: str = ""
    second: str = ""
    header: bool | None = None
    quoted: bool | None = None
    question: str = ""
    context: str = ""


@dataclass(frozen=True)
class Fitted:
    """A fine-tuned model, and how it reads."""

    model: Any
    tokenizer: Tokenizer | None
    about: dict[str, Any] = field(default_factory=dict)  # task.json, where there is one


class Kind(Protocol):
    """One task. Each method raises ValueError or OSError, with one sentence, for bad input."""

    @property
    def examples(self) -> str:
        """What the data is made of, for the log: texts, pairs, sentences."""
        ...

    @property
    def models(self) -> tuple[type, ...]:
        """The classes of the models that it leaves behind."""
        ...

    def read(self, config: FinetuneConfig, log: Log) -> tuple[Any, Any]:
        """(training, validation): the data, each with a length."""
        ...

    def begin(self, config: FinetuneConfig, train: Any, log: Log) -> tuple[Tokenizer | None, Any]:
        """(tokenizer, model): from a checkpoint, or at random."""
        ...

    def open(self, folder: Path) -> tuple[Tokenizer | None, Any]:
        """(tokenizer, model) as a checkpoint of a run holds them."""
        ...

    def defaults(self, config: FinetuneConfig, model: Any) -> Defaults:
        """What stands for a 0 in the configuration."""
        ...

    def task(
        self,
        config: FinetuneConfig,
        train: Any,
        validation: Any,
        tokenizer: Tokenizer | None,
        model: Any,
    ) -> Learnt:
        """What the trainer is given."""
        ...

    def report(self, task: Any, model: Any) -> Report:
        """The scores of a model on the validation data."""
        ...

    def of_file(self, fitted: Fitted, path: str, columns: Columns) -> Rows:
        """What the model says of each row of a file."""
        ...

    def of_lines(self, fitted: Fitted, lines: Sequence[str]) -> Rows:
        """What it says of each line that is not blank."""
        ...


__all__ = [
    "Columns",
    "Defaults",
    "Fitted",
    "Found",
    "Kind",
    "Learnt",
    "Measured",
    "Rows",
    "with_text",
]


def with_text(lines: Sequence[str]) -> tuple[list[int], list[str]]:
    """(numbers, texts) of the lines that are not blank; ValueError where there is none."""
    kept = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not kept:
        raise ValueError("there is no line with text in it to label")
    return [i for i, _ in kept], [line.strip("\r\n") for _, line in kept]
