"""The scores of several tasks side by side: the report of each, and their mean.

A mean over an accuracy and an F1 has no unit. It serves to choose between checkpoints of the same
tasks, and stands beside the mean of what is had for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_llm.data.tables import counted
from tinygrad_llm.metrics.answers import AnswerReport
from tinygrad_llm.metrics.classification import LabelScores
from tinygrad_llm.metrics.generated import AnswerScores
from tinygrad_llm.metrics.plot import figure_of
from tinygrad_llm.metrics.report import WIDTH, LabelReport, TagReport, TagScores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Single = LabelReport | TagReport | AnswerReport


@dataclass(frozen=True)
class MultiReport:
    """The report of each task by its name, and the measure that stands for it among the others.

    A measure is accuracy, macro F1 or MCC of labels; of tags always the F1 of entities or, where
    they mark none, the accuracy over words; of answers the F1 of their words.
    """

    name: str
    reports: dict[str, Single]
    measures: dict[str, str]

    @property
    def scores(self) -> dict[str, float]:
        """The score of each task by its measure."""
        return {
            task: measured(report.scores, self.measures[task])
            for task, report in self.reports.items()
        }

    @property
    def baselines(self) -> dict[str, float]:
        """By the same measure what is had for nothing: the best of the baselines."""
        return {
            task: max(measured(s, self.measures[task]) for s in report.baselines.values())
            for task, report in self.reports.items()
        }

    @property
    def mean(self) -> float:
        """The mean of `scores`."""
        return _mean(self.scores)

    def as_dict(self) -> dict[str, Any]:
        """What metrics.json holds of it."""
        scores, baselines = self.scores, self.baselines
        return {
            "mean": self.mean,
            "mean of the baselines": _mean(baselines),
            "scores": {
                task: {"measure": self.measures[task], "score": scores[task], "baseline": had}
                for task, had in baselines.items()
            },
            "tasks": {
                task: {"name": report.name, **report.as_dict()}
                for task, report in self.reports.items()
            },
        }

    def text(self) -> str:
        """A line for each task, then the report of each."""
        scores, baselines = self.scores, self.baselines
        width = max(map(len, [*scores, "task"]))
        wide = max(map(len, [*self.measures.values(), "measure"]))
        head = f"{'task':<{width}}  {'measure':<{wide}}  this model  for nothing"
        lines = [f"{self.name}: {counted(len(scores), 'task')} on one encoder", "", head]
        lines.append("-" * len(head))
        for task, score in scores.items():
            row = f"{task:<{width}}  {self.measures[task]:<{wide}}"
            lines.append(f"{row}  {score:10.4f}  {baselines[task]:11.4f}")
        lines.append("-" * len(head))
        both = f"{self.mean:10.4f}  {_mean(baselines):11.4f}"
        lines.append(f"{'mean':<{width}}  {'':<{wide}}  {both}")
        for task, report in self.reports.items():
            lines += ["", f"{f'--- {task} ':-<{WIDTH}}", "", report.text()]
        return "\n".join(lines)


def measure_of(report: Single, score: str) -> str:
    """The measure that this score of a task is: of labels val_macro_f1 -> 'macro F1'."""
    if isinstance(report, AnswerReport):
        return "answer F1"
    if isinstance(report, TagReport):
        return "accuracy" if report.scores.entities is None else "entity F1"
    return {"val_accuracy": "accuracy", "val_macro_f1": "macro F1", "val_mcc": "MCC"}[score]


def measured(scores: LabelScores | TagScores | AnswerScores, measure: str) -> float:
    """The score by this measure, between 0 and 1 (MCC from −1 on)."""
    if isinstance(scores, AnswerScores):
        return scores.f1 / 100
    if isinstance(scores, TagScores):
        entities = scores.entities
        return scores.words.accuracy if entities is None else entities.averages.micro.f1
    found = {
        "accuracy": scores.accuracy,
        "macro F1": scores.averages.macro.f1,
        "MCC": scores.mcc,
    }
    return found[measure]


def _mean(scores: Mapping[str, float]) -> float:
    return float(np.mean(list(scores.values())))


@figure_of.register(MultiReport)
def scores_figure(report: MultiReport) -> Figure:
    """A bar for the score of each task, and below it one for what is had for nothing."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    scores, baselines = report.scores, report.baselines
    figure = Figure(figsize=(7, 1.6 + 0.6 * len(scores)), dpi=120, layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(scores))
    axes.barh(places - 0.2, list(scores.values()), 0.4, color="tab:blue", label="this model")
    axes.barh(places + 0.2, list(baselines.values()), 0.4, color="tab:gray", label="for nothing")
    axes.set_yticks(places, [f"{task} ({report.measures[task]})" for task in scores])
    axes.invert_yaxis()
    axes.set_xlim(min(0.0, *scores.values(), *baselines.values()), 1)
    axes.axvline(report.mean, color="tab:orange", linewidth=1.5, label=f"mean {report.mean:.3f}")
    axes.set_title("Each task on the validation data")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    return figure
