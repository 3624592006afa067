"""Scores of labels, each decided for itself: classes of texts, or tags word by word.

Precision, recall and F1 per label come from scikit-learn. The averages are those of the rows that
are shown; the micro average over all labels is the accuracy, for what is no true hit of one label
is a false one of another. Leaving a label out, as O in tagging, leaves out its row alone: a word
predicted to be B-PER where the gold data has O still counts against B-PER's precision.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinygrad_llm.metrics.scores import Averages, Score, sklearn_metrics


@dataclass(frozen=True)
class LabelScores:
    """A row for each label that occurs in the gold data or in the predictions."""

    rows: dict[str, Score]
    averages: Averages
    without: dict[str, Averages]  # what is left out → the averages without it: {'O': …}
    accuracy: float
    mcc: float  # Matthews: 1 all right, 0 no better than chance or than one label for all
    confusion: np.ndarray  # confusion[i, j]: gold label i taken for j, in the order of `rows`

    @property
    def labels(self) -> list[str]:
        """The labels, in the order of the rows."""
        return list(self.rows)

    def as_dict(self) -> dict[str, Any]:
        """What JSON holds of it."""
        found: dict[str, Any] = {"accuracy": self.accuracy, "mcc": self.mcc}
        found["labels"] = {name: row.as_dict() for name, row in self.rows.items()}
        found |= self.averages.as_dict()
        for name, averages in self.without.items():
            found[f"without {name}"] = averages.as_dict()
        found["confusion"] = {"labels": self.labels, "gold × predicted": self.confusion.tolist()}
        return found


def label_scores(
    gold: Sequence[str],
    predicted: Sequence[str],
    *,
    labels: Sequence[str] | None = None,
    without: Collection[str] = (),
) -> LabelScores:
    """The scores of predicted labels.

    labels: the order of the rows; None: sorted. Those that occur neither in the gold data nor in
    the predictions have no row, and so no part in an average. without: labels to average without,
    one after the other (a label that does not occur is passed over).

    Raises ValueError where there is nothing to score, or not as many of both; ImportError without
    scikit-learn.
    """
    if len(gold) != len(predicted):
        raise ValueError(f"expected {len(gold):,} predictions, got {len(predicted):,}")
    if not gold:
        raise ValueError("there is nothing to score: no label was given")
    metrics = sklearn_metrics()
    occur = set(gold) | set(predicted)
    order = [label for label in labels or () if label in occur]
    order += sorted(occur.difference(order))
    truth, guess = np.array(gold, object), np.array(predicted, object)
    p, r, f, support = metrics.precision_recall_fscore_support(
        truth, guess, labels=order, average=None, zero_division=0.0
    )
    counts = Counter(predicted)
    rows = {
        label: Score(float(p[i]), float(r[i]), float(f[i]), int(support[i]), counts[label])
        for i, label in enumerate(order)
    }
    confusion = _confusion(gold, predicted, order)
    right = dict(zip(order, map(int, np.diagonal(confusion)), strict=True))
    return LabelScores(
        rows,
        _averages(rows, right),
        {label: _averages(rows, right, label) for label in without if label in rows},
        sum(right.values()) / len(gold),
        float(metrics.matthews_corrcoef(truth, guess)) if len(order) > 1 else 0.0,
        confusion,
    )


def _confusion(gold: Sequence[str], predicted: Sequence[str], order: Sequence[str]) -> np.ndarray:
    place = {label: i for i, label in enumerate(order)}
    found = np.zeros((len(order), len(order)), np.int64)
    np.add.at(found, ([place[t] for t in gold], [place[t] for t in predicted]), 1)
    return found


def _averages(rows: dict[str, Score], right: dict[str, int], without: str = "") -> Averages:
    kept = {label: row for label, row in rows.items() if label != without}
    return Averages.of(kept, sum(right[label] for label in kept))


def majority(labels: Sequence[str]) -> str:
    """The most frequent label, the first by name of those that are as frequent.

    What a model must beat: to answer with it always. Take it from the training data.
    """
    if not labels:
        raise ValueError("expected labels, got none")
    counts = Counter(labels)
    return min(counts, key=lambda label: (-counts[label], label))


def usual_tags(
    words: Sequence[Sequence[str]],
    tags: Sequence[Sequence[str]],
    new_words: Sequence[Sequence[str]],
    *,
    otherwise: str = "O",
) -> list[list[str]]:
    """For each new word the tag that it has most often in training; `otherwise` where it has none.

    A second thing to beat: it knows words, but no sentences.
    """
    counts: dict[str, Counter[str]] = {}
    for sentence, its_tags in zip(words, tags, strict=True):
        for word, tag in zip(sentence, its_tags, strict=True):
            counts.setdefault(word, Counter())[tag] += 1
    usual = {word: min(found, key=lambda tag: (-found[tag], tag)) for word, found in counts.items()}
    return [[usual.get(word, otherwise) for word in sentence] for sentence in new_words]
