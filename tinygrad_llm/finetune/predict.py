"""What a fine-tuned checkpoint says of new data: a JSON object for each row.

    classify   {"line": 1, "text": …, "label": "pos", "probability": 0.98, "probabilities": {…}}
    pair       the same with "text1" and "text2"
    translate  {"line": 1, "text": …, "translation": …}
    tag        {"line": 1, "words": […], "tags": […], "spans": [{"type", "start", "stop", "text"}]}
    qa         {"line": 1, "question": …, "context": …, "answer": …, "start": 4, "stop": 9,
               "probability": 0.9}; of SQuAD's JSON "id" in place of "line"

Of tags `start` and `stop` count words: a span is words[start:stop]; of answers characters: one is
context[start:stop]. A text of zero length gets a label like
any other, so that every row of the data has its line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinygrad_llm.finetune.config import TaskName
from tinygrad_llm.finetune.encoders import model_folder
from tinygrad_llm.finetune.kind import Columns, Fitted, Kind, Rows
from tinygrad_llm.finetune.kinds import KINDS
from tinygrad_llm.finetune.layers import LANGUAGE_MODELS
from tinygrad_llm.finetune.lm import labels_nothing
from tinygrad_llm.finetune.multi import one_head
from tinygrad_llm.models import auto
from tinygrad_llm.storage import check_sums
from tinygrad_llm.tasks.classify import TASK_FILE
from tinygrad_llm.train.config import ConfigError

__all__ = ["Columns", "Predictor"]


@dataclass(frozen=True)
class Predictor:
    """A fine-tuned model that reads files and lines; `Predictor.open(folder)` makes one."""

    task: TaskName
    fitted: Fitted

    @classmethod
    def open(cls, folder: str, device: str = "cpu", head: str = "") -> Predictor:
        """That of a run (its best checkpoint), or of a checkpoint; of several heads the one named.

        Raises FileNotFoundError and ValueError, with one sentence, where it cannot be opened or
        labels nothing.
        """
        found = model_folder(folder)
        about: dict[str, Any] = {}
        if (found / TASK_FILE).is_file():
            check_sums(found, lambda name: name == TASK_FILE)
            about = json.loads((found / TASK_FILE).read_text(encoding="utf-8"))
        task = _task_of(found, about)
        tokenizer, model = KINDS[task].open(found)
        fitted = Fitted(model.to(device), tokenizer, about)
        if task == "multi":
            return cls(*one_head(fitted, head))
        if head:
            raise ConfigError(f"{folder} has one head, for {task}: leave out --task")
        return cls(task, fitted)

    def of_file(self, path: str, columns: Columns) -> Rows:
        """(what was found for each row of a file, notes on how they were read)"""
        if (columns.question or columns.context) and self.task != "qa":
            raise ConfigError("--question-column and --context-column are for a model of qa")
        return self._kind.of_file(self.fitted, path, columns)

    def of_lines(self, lines: Sequence[str]) -> Rows:
        """The same for lines; blank ones are no texts.

        Raises ValueError for a line without a pair where one is expected.
        """
        return self._kind.of_lines(self.fitted, lines)

    @property
    def _kind(self) -> Kind:
        return KINDS[self.task]


def _task_of(folder: Path, about: dict[str, Any]) -> TaskName:
    """By task.json; without one the first task that leaves such a model behind."""
    kind = auto.class_of(folder)
    if kind in LANGUAGE_MODELS:
        raise labels_nothing(kind, folder)
    fit: list[TaskName] = [task for task, known in KINDS.items() if kind in known.models]
    if not fit:
        raise ConfigError(
            f"{folder} holds a {kind.__name__}, which labels nothing: expected what "
            "`tinygrad-llm finetune` leaves behind"
        )
    return about["task"] if about.get("task") in fit else fit[0]
