"""The scores of answers to questions, beside what is had without reading the question.

exact match     the answers that are the right one, but for case, punctuation and articles
F1 of words     2 P R / (P + R) over the words that answer and right answer share, the mean
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_llm.data.tables import counted
from tinygrad_llm.metrics.classification import majority
from tinygrad_llm.metrics.generated import AnswerScores, answer_scores
from tinygrad_llm.metrics.plot import figure_of, plain
from tinygrad_llm.metrics.report import WIDTH

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class AnswerReport:
    """The scores of answers, those of the baselines, and those by the length of the right answer.

    A question without an answer is right with '' alone, and a model that never answers is right on
    all of those: they are a group of their own.
    """

    name: str
    scores: AnswerScores
    baselines: dict[str, AnswerScores]
    groups: dict[str, AnswerScores]
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """What metrics.json holds of it."""
        found = self.scores.as_dict()
        for key, rows in (("baselines", self.baselines), ("right answers of", self.groups)):
            found[key] = {name: scores.as_dict() for name, scores in rows.items()}
        return found | {"notes": self.notes}

    def text(self) -> str:
        """A line for the model, for each baseline, and for each group."""
        groups = {f"right answers of {name}": scores for name, scores in self.groups.items()}
        parts = [{"this model": self.scores}, self.baselines, groups]
        width = min(60, max(len(name) for part in parts for name in [*part, "Of 100 questions"]))
        head = f"{'Of 100 questions':<{width}}  exact match   F1 of words   questions"
        lines = [f"{self.name}: {counted(self.scores.count, 'question')}", "", head]
        for part in parts:
            lines.append("-" * len(head))
            lines += [
                f"{_short(name, width):<{width}}  {scores.exact_match:11.2f}   {scores.f1:11.2f}  "
                f"{scores.count:10,}"
                for name, scores in part.items()
            ]
        said = [line for note in self.notes for line in textwrap.wrap(f"note: {note}", WIDTH)]
        return "\n".join([*lines, *([""] if said else []), *said])


def answer_report(
    predicted: Sequence[str],
    answers: Sequence[Sequence[str]],
    *,
    name: str = "evaluation",
    usual: str | None = None,
    baselines: Mapping[str, Sequence[str]] | None = None,
    notes: Sequence[str] = (),
) -> AnswerReport:
    """The report on answers; answers[i]: the right ones to question i, [''] where there is none.

    usual: the most frequent answer of the training data, with which the first baseline answers all;
    None: that of `answers`. baselines: the answers of others.

    Raises as `answer_scores`.
    """
    scores = answer_scores(predicted, answers)
    usual = majority([right[0] for right in answers]) if usual is None else usual
    never = "always " + (repr(_short(usual, 40)) if usual else "no answer")
    others = {never: [usual] * len(answers), **(baselines or {})}
    members: dict[str, list[int]] = {}
    for i, right in enumerate(answers):
        members.setdefault(_length_of(right[0]), []).append(i)
    groups = {
        group: answer_scores([predicted[i] for i in which], [answers[i] for i in which])
        for group in _LENGTHS
        if (which := members.get(group))
    }
    return AnswerReport(
        name,
        scores,
        {title: answer_scores(guesses, answers) for title, guesses in others.items()},
        groups,
        list(notes),
    )


_LENGTHS = ("1 word", "2 words", "3 to 5 words", "6 words and more", "none")


def _length_of(answer: str) -> str:
    words = len(answer.split())
    return _LENGTHS[(4, 0, 1, 2, 2, 2)[words] if words < 6 else 3]


def _short(name: str, width: int) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"


# --- the picture ----------------------------------------------------------------------------------


@figure_of.register(AnswerReport)
def answers_figure(report: AnswerReport) -> Figure:
    """Bars for exact match and F1: left of the model and the baselines, right by right answer."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=(12, 3.6), dpi=120, layout="constrained")
    figure.suptitle(plain(report.name))
    groups = {f"{name} ({scores.count:,})": scores for name, scores in report.groups.items()}
    parts = {"": {"this model": report.scores, **report.baselines}, "By right answer": groups}
    for axes, (title, rows) in zip(figure.subplots(1, 2), parts.items(), strict=True):
        places = np.arange(len(rows))
        exact, f1 = ([getattr(s, key) for s in rows.values()] for key in ("exact_match", "f1"))
        axes.barh(places - 0.2, exact, 0.4, color="tab:blue", label="exact match")
        axes.barh(places + 0.2, f1, 0.4, color="tab:orange", label="F1 of words")
        axes.set_yticks(places, [plain(_short(name, 40)) for name in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("of 100 questions")
        axes.set_title(title)
        axes.grid(axis="x", alpha=0.3)
    figure.axes[0].legend(loc="lower right", fontsize=8)
    return figure
