"""metrics.png: what a table of scores does not show at a glance.

labels, tags     the confusion matrix, each row as shares of its gold label; the F1 of each
generated texts  the scores beside those of copying; how many are how good; how good by length
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import singledispatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_llm.metrics.generated import AnswerScores
from tinygrad_llm.metrics.report import GeneratedReport, LabelReport, Report, TagReport
from tinygrad_llm.storage import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tinygrad_llm.metrics.classification import LabelScores
    from tinygrad_llm.metrics.scores import Score

NOT_INSTALLED = (
    "metrics.png was not drawn because matplotlib is not installed: "
    "pip install 'tinygrad-llm[plots]'"
)


def draw_report(report: Report, path: str | Path) -> str | None:
    """Draw the report into `path`, which is there whole, or as it was before; or say why not."""
    if importlib.util.find_spec("matplotlib") is None:
        return NOT_INSTALLED
    figure = figure_of(report)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a label in letters that the font lacks
        write_file(Path(path), lambda temporary: figure.savefig(temporary, format="png"))
    return None


@singledispatch
def figure_of(report: Report) -> Figure:
    """The picture of a report; each kind registers its own."""
    raise TypeError(f"there is no picture of a {type(report).__name__}")


@figure_of.register(TagReport)
@figure_of.register(LabelReport)
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
    figure.suptitle(plain(report.name))
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
    names = [plain(label) for label in scores.labels]
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
    axes.set_yticks(places, [f"{plain(name)} ({row.support:,})" for name, row in rows.items()])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("F1 (in brackets: how many there are)")
    axes.set_title(title)
    axes.axvline(average, color="tab:orange", linewidth=1.5)
    axes.grid(axis="x", alpha=0.3)


# --- generated texts ------------------------------------------------------------------------------


@figure_of.register(GeneratedReport)
def generated_figure(report: GeneratedReport) -> Figure:
    """The scores beside those of copying the source; with the texts, how many of them are how good,
    and how good they are by the length of their sources.
    """
    from matplotlib.figure import Figure

    panels = 3 if report.written else 1
    figure = Figure(figsize=(4.5 * panels, 3.8), dpi=120, layout="constrained")
    axes: Any = np.ravel(figure.subplots(1, panels))
    figure.suptitle(f"{plain(report.name)} ({report.scores.count:,} texts)")
    _draw_scores(axes[0], report)
    if report.written:
        what = "F1 of words" if isinstance(report.scores, AnswerScores) else "chrF of a text"
        _draw_spread(axes[1], [row.score for row in report.written], what)
        lengths = [len(row.source) for row in report.written]
        _draw_by_length(axes[2], lengths, [row.score for row in report.written], what)
    return figure


def _draw_scores(axes: Axes, report: GeneratedReport) -> None:
    scores = report.scores
    copied = []
    if isinstance(scores, AnswerScores):
        own = {"exact match": scores.exact_match, "F1 of words": scores.f1}
    else:
        own = {"BLEU": scores.bleu, "chrF": scores.chrf, "exact": scores.exact}
        copied = [scores.copied, scores.copied_chrf, scores.copied_exact]
    places = np.arange(len(own))
    bars = [axes.bar(places - 0.2, list(own.values()), 0.4, color="tab:blue", label="this model")]
    if copied and None not in copied:
        height: Any = copied
        bars += [axes.bar(places + 0.2, height, 0.4, color="tab:gray", label="copying the source")]
        axes.legend(fontsize=8)
    for container in bars:
        axes.bar_label(container, fmt="%.1f", fontsize=8)
    axes.set_xticks(places, list(own))
    axes.set_ylim(0, 108)
    axes.set_title("Scores, of 100")
    axes.grid(axis="y", alpha=0.3)


def _draw_spread(axes: Axes, scores: list[float], what: str) -> None:
    axes.hist(scores, bins=20, range=(0, 100), color="tab:blue")
    mean = float(np.mean(scores))
    axes.axvline(mean, color="tab:orange", linewidth=1.5)
    axes.set_xlabel(f"{what} (line: the mean, {mean:.1f})")
    axes.set_title("How many texts are how good")
    axes.grid(axis="y", alpha=0.3)


_MOST_LENGTHS = 8  # bars


def _draw_by_length(axes: Axes, lengths: list[int], scores: list[float], what: str) -> None:
    """A bar for each group of lengths, all with about as many texts."""
    groups = _length_groups(lengths, _MOST_LENGTHS)
    means = [
        np.mean([s for n, s in zip(lengths, scores, strict=True) if a <= n <= b]) for a, b in groups
    ]
    counts = [sum(a <= n <= b for n in lengths) for a, b in groups]
    places = np.arange(len(groups))
    bars = axes.bar(places, means, color="tab:blue")
    axes.bar_label(bars, [f"{n:,}" for n in counts], fontsize=8)
    names = [f"{a:,}" if a == b else f"{a:,}–{b:,}" for a, b in groups]
    axes.set_xticks(places, names, fontsize=8)
    axes.set_ylim(0, 108)
    axes.set_xlabel("characters of the source (on the bars: how many texts)")
    axes.set_title(f"{what}, the mean by length")
    axes.grid(axis="y", alpha=0.3)


def _length_groups(lengths: list[int], most: int) -> list[tuple[int, int]]:
    """(first, last) length of each group: [1, 1, 2, 5, 6, 9], 3 -> [(1, 1), (2, 5), (6, 9)]"""
    ordered = np.sort(lengths)
    starts = [ordered[i * len(ordered) // most] for i in range(most)]
    found = []
    for first in np.unique(starts):
        later = [start for start in starts if start > first]
        inside = ordered[(ordered >= first) & (ordered < min(later, default=ordered[-1] + 1))]
        found.append((int(inside[0]), int(inside[-1])))
    return found


def plain(text: str) -> str:
    """The text as it stands: to matplotlib, what is between dollars is a formula."""
    return text.replace("$", r"\$")
