"""Scores of labels: scikit-learn's, with averages that are those of the rows."""

import importlib
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm.metrics.classification import label_scores, majority, usual_tags

metrics: Any = importlib.import_module("sklearn.metrics")

LABELS = st.lists(st.tuples(st.sampled_from("OABC"), st.sampled_from("OABC")), min_size=1)


@given(LABELS)
def test_averages_are_scikit_learns(pairs: list[tuple[str, str]]):
    gold, guess = ([pair[i] for pair in pairs] for i in (0, 1))
    scores = label_scores(gold, guess, without=("O",))
    assert scores.accuracy == pytest.approx(metrics.accuracy_score(gold, guess))
    labels = scores.labels
    assert labels == sorted({*gold, *guess})
    for averages, kept in (
        (scores.averages, labels),
        (scores.without.get("O"), [label for label in labels if label != "O"]),
    ):
        if averages is None or not kept:
            continue
        for kind in ("micro", "macro", "weighted"):
            p, r, f, _ = metrics.precision_recall_fscore_support(
                gold, guess, labels=kept, average=kind, zero_division=0.0
            )
            ours = getattr(averages, kind)
            assert (ours.precision, ours.recall, ours.f1) == pytest.approx((p, r, f))


@given(LABELS)
def test_rows_and_confusion_agree(pairs: list[tuple[str, str]]):
    gold, guess = ([pair[i] for pair in pairs] for i in (0, 1))
    scores = label_scores(gold, guess)
    if len(scores.labels) > 1:  # scikit-learn warns of a matrix of one label
        theirs = metrics.confusion_matrix(gold, guess, labels=scores.labels)
        np.testing.assert_array_equal(scores.confusion, theirs)
    assert scores.confusion.sum() == len(pairs)
    assert scores.confusion.sum(axis=1).tolist() == [r.support for r in scores.rows.values()]
    assert scores.confusion.sum(axis=0).tolist() == [r.predicted for r in scores.rows.values()]
    assert scores.averages.micro.f1 == pytest.approx(scores.accuracy)
    mean = np.mean([row.f1 for row in scores.rows.values()])
    assert scores.averages.macro.f1 == pytest.approx(mean)


def test_a_model_that_finds_nothing_is_good_with_o_and_nothing_without():
    gold = ["O"] * 9 + ["B-X"]
    scores = label_scores(gold, ["O"] * 10, without=("O",))
    assert scores.averages.micro.f1 == 0.9
    assert scores.without["O"].micro.f1 == 0.0
    assert scores.mcc == 0.0


def test_wrong_hits_on_o_count_against_precision_without_o():
    scores = label_scores(["O", "O", "A"], ["A", "O", "A"], without=("O",))
    assert scores.without["O"].micro.precision == 0.5
    assert scores.without["O"].micro.recall == 1.0


def test_matthews_of_pairs():
    gold, guess = ["yes", "yes", "no", "no", "no"], ["yes", "no", "no", "no", "yes"]
    assert label_scores(gold, guess).mcc == pytest.approx((1 * 2 - 1 * 1) / 6)


def test_one_label_alone_is_no_warning():
    assert label_scores(["a", "a"], ["a", "a"]).accuracy == 1.0


def test_order_of_the_rows():
    scores = label_scores(["b", "a"], ["b", "c"], labels=["b", "never", "a"])
    assert scores.labels == ["b", "a", "c"]


def test_what_cannot_be_scored(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="nothing to score"):
        label_scores([], [])
    with pytest.raises(ValueError, match="expected 2 predictions, got 1"):
        label_scores(["a", "b"], ["a"])
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match=r"pip install 'tinygrad-llm\[metrics\]'"):
        label_scores(["a"], ["a"])


def test_majority():
    assert majority(["b", "a", "b"]) == "b"
    assert majority(["b", "a"]) == "a"
    with pytest.raises(ValueError, match="got none"):
        majority([])


def test_usual_tags():
    words, tags = [["Paris", "is", "Paris", "is"]], [["B-LOC", "O", "B-PER", "O"]]
    tags.append(["B-LOC"])
    words.append(["Paris"])
    assert usual_tags(words, tags, [["Paris", "was"], []]) == [["B-LOC", "O"], []]
