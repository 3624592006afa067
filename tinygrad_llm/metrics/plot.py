"""metrics.png: the confusion matrix, each row as shares of its gold label, and the F1 of each."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tinygrad_llm.metrics.report import LabelReport, TagReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tinygrad_llm.metrics.classification import LabelScores
    from tinygrad_llm.metrics.scores import Score

NOT_INSTALLED = (
    "metrics.png was not drawn because matplotlib is not installed: "
    "pip install 'tinygrad-llm[plots]'"
)


def draw_report(report: TagReport | LabelReport, path: str | Path) -> str | None:
    """Draw the report into `path`; or say in one sentence why not."""
    if importlib.util.find_spec("matplotlib") is None:
        return NOT_INSTALLED
    figure = report_figure(report)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a label in letters that the font lacks
        figure.savefig(path, format="png")
    return None


def report_figure(report: TagReport | LabelReport) -> Figure:
    """Left the confusion matrix of the labels, right a bar for the F1 of each.

    Of tags that mark entities the bars are the types of entities, with the micro average; of others
    the labels, with the macro average.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    if isinstance(report, TagReport):
        scores, entities = report.scores.words, report.scores.entities
    else:
        scores, entities = report.scores, None
    size = min(12.0, 3.0 + 0.4 * len(scores.rows))
    figure = Figure(figsize=(2 * size, size + 0.6), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(_plain(report.name))
    _draw_confusion(left, scores)
    if entities is None:
        _draw_bars(right, scores.rows, scores.averages.macro.f1, "F1 of each label (line: macro)")
    else:
        title = "F1 of whole entities (line: micro)"
        _draw_bars(right, entities.rows, entities.averages.micro.f1, title)
    return figure


_MOST_NUMBERS = 15  # labels up to which the counts are written into the matrix


def _draw_confusion(axes: Axes, scores: LabelScores) -> None:
    """Dark where many of a gold label are taken for that label."""
    matrix = scores.confusion
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="equal")
    places = range(len(scores.labels))
    names = [_plain(label) for label in scores.labels]
    axes.set_xticks(places, names, rotation=90)
    axes.set_yticks(places, names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("gold")
    axes.set_title("Confusions (shade: share of the gold label)")
    if len(scores.labels) <= _MOST_NUMBERS:
        for i in places:
            for j in places:
                color = "white" if shares[i, j] > 0.5 else "black"
                text = f"{matrix[i, j]:,}"
                axes.text(j, i, text, ha="center", va="center", color=color, fontsize=7)


def _draw_bars(axes: Axes, rows: dict[str, Score], average: float, title: str) -> None:
    places = np.arange(len(rows))
    axes.barh(places, [row.f1 for row in rows.values()], color="tab:blue")
    axes.set_yticks(places, [f"{_plain(name)} ({row.support:,})" for name, row in rows.items()])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("F1 (in brackets: how many there are)")
    axes.set_title(title)
    axes.axvline(average, color="tab:orange", linewidth=1.5)
    axes.grid(axis="x", alpha=0.3)


def _plain(text: str) -> str:
    """The text as it stands: to matplotlib, what is between dollars is a formula."""
    return text.replace("$", r"\$")
