"""Precision, recall and F1 from counts; and their averages.

    precision = right / predicted      recall = right / gold      F1 = 2 P R / (P + R)

A quotient of nothing is 0, as in conlleval and in scikit-learn's default.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """What one label, one type of entity, or an average of them scores."""

    precision: float
    recall: float
    f1: float
    support: int  # how many there are in the gold data
    predicted: int  # how many the model says there are

    @classmethod
    def of(cls, right: int, predicted: int, gold: int) -> Score:
        """From the counts of what was found right, of what was predicted and of what there is."""
        precision = right / predicted if predicted else 0.0
        recall = right / gold if gold else 0.0
        f1 = 2 * right / (predicted + gold) if right else 0.0
        return cls(precision, recall, f1, gold, predicted)

    def as_dict(self) -> dict[str, float | int]:
        """What JSON holds of it."""
        return {
            "precision": self.precision,
            "recall": self.recall,
            "f1": self.f1,
            "support": self.support,
            "predicted": self.predicted,
        }


@dataclass(frozen=True)
class Averages:
    """micro: over all decisions; macro: the mean of the rows; weighted: by their support.

    F1 of an average is the average of the F1, not F1 of the averaged precision and recall; but the
    micro average is one score over the summed counts.
    """

    micro: Score
    macro: Score
    weighted: Score

    @classmethod
    def of(cls, rows: Mapping[str, Score], right: int) -> Averages:
        """The averages of these rows, of whose predictions `right` are right."""
        gold = sum(row.support for row in rows.values())
        predicted = sum(row.predicted for row in rows.values())
        return cls(
            Score.of(right, predicted, gold),
            _mean(rows.values(), [1] * len(rows), predicted, gold),
            _mean(rows.values(), [row.support for row in rows.values()], predicted, gold),
        )

    def as_dict(self) -> dict[str, dict[str, float | int]]:
        """What JSON holds of them."""
        return {
            "micro": self.micro.as_dict(),
            "macro": self.macro.as_dict(),
            "weighted": self.weighted.as_dict(),
        }


def _mean(rows: Iterable[Score], weights: Sequence[int], predicted: int, gold: int) -> Score:
    """Σ w P / Σ w, and so for recall and F1; 0 where nothing weighs anything."""
    total, precision, recall, f1 = sum(weights), 0.0, 0.0, 0.0
    for row, weight in zip(rows, weights, strict=True):
        if weight:
            precision += weight * row.precision / total
            recall += weight * row.recall / total
            f1 += weight * row.f1 / total
    return Score(precision, recall, f1, gold, predicted)


def sklearn_metrics() -> Any:
    """scikit-learn's metrics; ImportError with what to install where it is missing."""
    try:
        return importlib.import_module("sklearn.metrics")
    except ImportError as error:
        raise ImportError(
            "scores per label need scikit-learn: pip install 'tinygrad-llm[metrics]'"
        ) from error
