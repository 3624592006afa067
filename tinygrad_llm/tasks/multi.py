"""Several tasks at once: each step is a batch of one of them, and all share an encoder.

    an epoch    reviews ■■■■■■  names ■■■  pairs ■■■■    so many batches each
    its order   ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■                shuffled over the tasks
    a step      task = order[step]    loss = weight[task] · task.loss(model.heads[task], batch)

An epoch has each batch of each task exactly once, so no example is missed for another. With a
temperature T other than 1, a task of n batches has a share of them in proportion to n^(1/T), as in
T5's mixtures: T > 1 lets small tasks come more often, and large ones go on with the rest of their
data in the next epoch.

Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text transformer",
JMLR 2020, section 3.5.2.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from tinygrad_llm.data.loader import shuffled
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.tasks.classify import TASK_FILE
from tinygrad_llm.tensor import Tensor

Arrays = dict[str, np.ndarray]  # a batch of one task, a row per example


class Single(Protocol):
    """One of the tasks: `ClassifyTask` and `TagTask` are such."""

    score: str
    notes: list[str]

    @property
    def steps_per_epoch(self) -> int: ...

    def next_batch(self) -> Any: ...

    def loss(self, model: Any, batch: Any, /) -> Tensor: ...

    def size(self, batch: Any, /) -> int: ...

    def validation(self) -> Iterator[Any]: ...

    def evaluate(self, model: Any, /) -> dict[str, float]: ...

    def remark(self, found: dict[str, float], /) -> str | None: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any], /) -> None: ...


class Of(NamedTuple):
    """What the arrays are of: a task, and the whole batch that they are a part of."""

    task: str
    rows: int  # R
    targets: int  # N: words of a tagger, texts of a classifier


Batch = dict[Of, Arrays]  # with one key: it goes along where the arrays are divided or uploaded


class SeveralTasks:
    """Tasks that are learnt side by side by a `MultiTask` with a head of the same name for each.

    Args:
        tasks: by name. Each is `Measured`: it scores its own head.
        tokenizer: the one that all of them read with; it is kept beside a checkpoint.
        weights: how much the loss of each counts; none said: 1.
        temperature: T ≥ 1 of the shares, see above; 1: every batch once in an epoch.
        score: by which a checkpoint is the best: 'val_mean', the mean over the tasks of the score
            of each, or 'val_loss'.
        seed: of the order of the batches.
        about: what is kept beside a checkpoint, for `predict`.

    Rows weigh the same in every task: where a step is made of several batches (accumulation), a
    batch of sentences does not count more than one of texts because it has more words.

    Raises ValueError for no task, weights that are not above 0, and a temperature below 1.
    """

    unit = "rows"

    def __init__(
        self,
        tasks: Mapping[str, Single],
        tokenizer: Tokenizer,
        *,
        weights: Mapping[str, float] | None = None,
        temperature: float = 1.0,
        score: str = "val_mean",
        seed: int = 0,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        if not tasks:
            raise ValueError("expected at least one task, got none")
        self.tasks, self.tokenizer = dict(tasks), tokenizer
        self.weights = dict.fromkeys(tasks, 1.0) | dict(weights or {})
        for name, weight in self.weights.items():
            if name not in self.tasks or not 0 < weight < float("inf"):
                raise ValueError(
                    f"weights are numbers above 0 of {', '.join(self.tasks)}, got {name} = {weight}"
                )
        self.shares = shares([task.steps_per_epoch for task in tasks.values()], temperature)
        self.score, self.seed, self.about = score, seed, dict(about or {})
        self.notes = [f"{name}: {note}" for name, task in tasks.items() for note in task.notes]
        self._position = 0  # batches given so far, over all epochs
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))  # (epoch, its tasks)

    # --- what a trainer calls ---------------------------------------------------------------------

    @property
    def steps_per_epoch(self) -> int:
        """The batches of all tasks."""
        return sum(self.shares)

    def next_batch(self) -> Batch:
        """The next training batch, of whichever task is next."""
        epoch, number = divmod(self._position, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, self._order_of(epoch)
        self._position += 1
        name = list(self.tasks)[self._order[1][number]]
        return self._of(name, self.tasks[name].next_batch())

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """weight · the loss of the task on its head: a scalar

        Of a part of a batch also times (n / N) / (r / R), its share of the targets over its share
        of the rows: parts that weigh by their rows then add up to the loss of the whole.
        """
        of, arrays = _only(batch)
        task, rows = self.tasks[of.task], _rows(arrays)
        factor = self.weights[of.task]
        if rows != of.rows:
            factor *= task.size(arrays) / of.targets * of.rows / rows
        loss = task.loss(model.heads[of.task], arrays)
        return loss if factor == 1.0 else loss * factor

    def size(self, batch: Batch) -> int:
        """How many rows the batch has: texts, pairs, rows of words; 0 where none has a target."""
        of, arrays = _only(batch)
        return _rows(arrays) if self.tasks[of.task].size(arrays) else 0

    def validation(self) -> Iterator[Batch]:
        """The validation batches of one task after the other."""
        for name, task in self.tasks.items():
            for arrays in task.validation():
                yield self._of(name, arrays)

    def evaluate(self, model: Any) -> dict[str, float]:
        """val_NAME_… of every task, val_loss and val_mean.

        val_loss is the mean of the losses as they weigh; val_mean that of the scores by which each
        task alone would choose a checkpoint, such as accuracy and F1.
        """
        found: dict[str, float] = {}
        loss, scores = 0.0, []
        for name, task in self.tasks.items():
            its = task.evaluate(model.heads[name])
            scores.append(its[task.score])
            loss += self.weights[name] * its["val_loss"]
            for key, value in its.items():
                found[_key(name, key)] = value
        loss /= sum(self.weights.values())
        return {"val_loss": loss, "val_mean": float(np.mean(scores)), **found}

    def main_scores(self, found: Mapping[str, float]) -> dict[str, float]:
        """The score of each task, of what `evaluate` found."""
        return {name: found[_key(name, task.score)] for name, task in self.tasks.items()}

    def remark(self, found: dict[str, float]) -> str | None:
        """What each task says of its scores, and their mean, for the log."""
        said = []
        for name, task in self.tasks.items():
            its = _those_of(name, found)
            remark = task.remark(its) or f"{task.score.removeprefix('val_')} {its[task.score]:.4f}"
            said.append(f"{name}: {remark.removeprefix('validation: ')}")
        return f"validation: mean {found['val_mean']:.4f}; {' | '.join(said)}"

    def save(self, folder: Path) -> None:
        """Write the tokenizer, and task.json: how each task reads."""
        self.tokenizer.save(folder)
        if self.about:
            text = json.dumps(self.about, indent=2, ensure_ascii=False) + "\n"
            (folder / TASK_FILE).write_text(text, encoding="utf-8")

    def state(self) -> dict[str, Any]:
        """The position among the batches and in each task, and how they are mixed."""
        return {
            "position": self._position,
            "mixture": self._mixture(),
            "tasks": {name: task.state() for name, task in self.tasks.items()},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`; ValueError where tasks, weights or texts are others now."""
        before, now = state["mixture"], self._mixture()
        if list(before) != list(now):
            raise ValueError(
                f"the run began with the tasks {', '.join(before)}, and now there are "
                f"{', '.join(now)}: resume with the old ones, or start a new run"
            )
        for name, (batches, weight) in now.items():
            if [batches, weight] != list(before[name]):
                raise ValueError(
                    f"the task {name} had {before[name][0]:,} batches in an epoch and the weight "
                    f"{before[name][1]:g} when the run began, now {batches:,} and {weight:g}: "
                    "resume with what it was, or start a new run"
                )
        for name, task in self.tasks.items():
            task.load_state(state["tasks"][name])
        self._position = int(state["position"])

    # --- inside -----------------------------------------------------------------------------------

    def _mixture(self) -> dict[str, list[Any]]:
        """{name: [batches in an epoch, weight]}"""
        named = zip(self.tasks, self.shares, strict=True)
        return {name: [share, self.weights[name]] for name, share in named}

    def _order_of(self, epoch: int) -> np.ndarray:
        """The number of the task of each batch of an epoch."""
        order = np.repeat(np.arange(len(self.shares)), self.shares)
        return order[shuffled(np.arange(len(order)), len(order), self.seed, epoch)]

    def _of(self, name: str, arrays: Arrays) -> Batch:
        return {Of(name, _rows(arrays), self.tasks[name].size(arrays)): arrays}


def shares(batches: Sequence[int], temperature: float = 1.0) -> list[int]:
    """Batches of each task in an epoch: N nᵢ^(1/T) / Σ n^(1/T), N = Σ n, at least 1

    `shares([90, 10]) -> [90, 10]`, `shares([90, 10], 2.0) -> [75, 25]`. ValueError for T < 1.
    """
    if not 1.0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a number from 1, got {temperature}")
    if temperature == 1.0:
        return list(batches)
    powers = np.array(batches, np.float64) ** (1.0 / temperature)
    return [max(1, round(share)) for share in (sum(batches) * powers / powers.sum()).tolist()]


def _only(batch: Batch) -> tuple[Of, Arrays]:
    ((of, arrays),) = batch.items()
    return of, arrays


def _rows(arrays: Mapping[str, Any]) -> int:
    return len(next(iter(arrays.values())))


def _key(name: str, key: str) -> str:
    """'val_f1' of the task names -> 'val_names_f1'"""
    return f"val_{name}_{key.removeprefix('val_')}"


def _those_of(name: str, found: Mapping[str, float]) -> dict[str, float]:
    """What the task itself said: its numbers, under its own names for them."""
    start = f"val_{name}_"
    its = {key: value for key, value in found.items() if key.startswith(start)}
    return {f"val_{key.removeprefix(start)}": value for key, value in its.items()}
