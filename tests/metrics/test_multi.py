"""The scores of several tasks side by side."""

import json

import numpy as np
import pytest

from tinygrad_llm.metrics.answers import answer_report
from tinygrad_llm.metrics.multi import MultiReport, measure_of, scores_figure
from tinygrad_llm.metrics.plot import draw_report
from tinygrad_llm.metrics.report import label_report, tag_report, write_metrics

GOLD, FOUND = ["a", "b", "b", "b"], ["a", "b", "a", "b"]
TAGS, GUESSES = [["B-X", "O"], ["B-X"]], [["B-X", "O"], ["O"]]


def report(score="val_accuracy"):
    texts = label_report(GOLD, FOUND, usual="b")
    tags = tag_report(TAGS, GUESSES, usual="O")
    measures = {"texts": measure_of(texts, score), "tags": measure_of(tags, "val_f1")}
    return MultiReport("two", {"texts": texts, "tags": tags}, measures)


def test_a_score_for_each_task_their_mean_and_what_is_had_for_nothing():
    found = report()
    assert found.measures == {"texts": "accuracy", "tags": "entity F1"}
    assert found.scores == {"texts": 0.75, "tags": pytest.approx(2 / 3)}
    assert found.baselines == {"texts": 0.75, "tags": 0.0}
    np.testing.assert_allclose(found.mean, (0.75 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("score", "name", "value"),
    [("val_macro_f1", "macro F1", (2 / 3 + 0.8) / 2), ("val_mcc", "MCC", 1 / 3**0.5)],
)
def test_labels_have_the_measure_that_chose_the_checkpoint(score, name, value):
    found = report(score)
    assert found.measures["texts"] == name
    np.testing.assert_allclose(found.scores["texts"], value)


def test_tags_that_mark_nothing_are_measured_by_accuracy():
    tags = tag_report([["N", "V"]], [["N", "N"]])
    found = MultiReport("one", {"t": tags}, {"t": measure_of(tags, "val_f1")})
    assert (found.measures, found.scores) == ({"t": "accuracy"}, {"t": 0.5})


def test_answers_are_measured_by_the_f1_of_their_words():
    answers = answer_report(["red car", "x"], [["car"], ["y"]], usual="y")
    found = MultiReport("one", {"qa": answers}, {"qa": measure_of(answers, "val_f1")})
    assert found.measures == {"qa": "answer F1"}
    np.testing.assert_allclose(found.scores["qa"], (2 / 3 + 0) / 2)
    np.testing.assert_allclose(found.baselines["qa"], 0.5)


def test_the_text_has_a_line_for_each_task_and_then_its_report():
    text = report().text()
    lines = text.splitlines()
    assert lines[0] == "two: 2 tasks on one encoder"
    assert [line.split()[0] for line in lines[4:6]] == ["texts", "tags"]
    assert lines[4].split()[1:] == ["accuracy", "0.7500", "0.7500"]
    assert lines[7].split() == ["mean", "0.7083", "0.3750"]
    for its in report().reports.values():
        assert its.text() in text
    assert max(map(len, lines)) <= 100


def test_metrics_json_holds_every_task(tmp_path):
    path = write_metrics(tmp_path / "metrics.json", report(), task="multi")
    found = json.loads(path.read_text())
    assert found["scores"]["tags"]["measure"] == "entity F1"
    assert found["tasks"]["texts"]["accuracy"] == 0.75
    np.testing.assert_allclose(found["mean"], report().mean)


def test_the_picture_has_two_bars_for_each_task(tmp_path):
    pytest.importorskip("matplotlib")
    assert draw_report(report(), tmp_path / "metrics.png") is None
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")
    assert len(scores_figure(report()).axes[0].patches) == 4


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install" in (draw_report(report(), tmp_path / "metrics.png") or "")
    assert not list(tmp_path.iterdir())
