"""The report on answers: the model, constants, and groups side by side."""

import json

import pytest

from tinygrad_llm.metrics.answers import answer_report, answers_figure
from tinygrad_llm.metrics.plot import NOT_INSTALLED, draw_report
from tinygrad_llm.metrics.report import WIDTH, write_metrics

RIGHT = [["Rome"], ["in Rome", "Rome"], ["of the five towns"], [""], ["a b c d e f g"]]
GUESS = ["rome.", "Rome", "five towns", "Oslo", "a b c d e f g"]


def report(**options):
    return answer_report(GUESS, RIGHT, name="dev $ dev", notes=["1 cut"], **options)


def test_the_model_stands_beside_what_constants_have():
    found = report(usual="Rome", baselines={"the usual one there": ["Rome", "", "", "", ""]})
    assert found.scores.exact_match == pytest.approx(60)
    assert found.baselines["always 'Rome'"].exact_match == pytest.approx(40)
    assert found.baselines["the usual one there"].exact_match == pytest.approx(40)  # and the empty
    assert list(found.groups) == [
        *("1 word", "2 words", "3 to 5 words", "6 words and more", "none"),
    ]
    assert found.groups["none"].exact_match == 0
    assert found.groups["3 to 5 words"].f1 == pytest.approx(100 * 2 * (2 / 3) / (5 / 3))
    assert sum(scores.count for scores in found.groups.values()) == 5


def test_without_a_training_set_the_best_constant_is_the_baseline():
    assert "always no answer" in answer_report(["a"] * 3, [[""], [""], ["a"]]).baselines
    assert "always 'a'" in answer_report(["a"] * 3, [[""], ["a"], ["a"]]).baselines


def test_the_text_is_narrow_and_says_everything():
    text = report(usual="a very long answer " * 20).text()
    lines = text.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert lines[0] == "dev $ dev: 5 questions"
    assert any(line.startswith("this model ") and " 60.00 " in line for line in lines)
    assert any(line.startswith("right answers of none") for line in lines)
    assert lines[-1] == "note: 1 cut"


def test_json_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.patches import Rectangle

    found = report(usual="$5")
    write_metrics(tmp_path / "metrics.json", found)
    read = json.loads((tmp_path / "metrics.json").read_text())
    assert read["exact match"] == pytest.approx(60)
    assert read["baselines"]["always '$5'"]["f1"] == 0
    assert read["right answers of"]["1 word"]["count"] == 1
    assert draw_report(found, tmp_path / "metrics.png") is None
    assert (tmp_path / "metrics.png").stat().st_size > 1000
    left, right = answers_figure(found).axes
    widths = [round(bar.get_bbox().width, 2) for bar in left.patches if isinstance(bar, Rectangle)]
    assert widths[0] == 60.0  # exact match of the model
    assert len(right.patches) == 10


def test_without_matplotlib_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert draw_report(report(), tmp_path / "metrics.png") == NOT_INSTALLED


def test_what_cannot_be_scored():
    with pytest.raises(ValueError, match="expected 1 right answers, got 2"):
        answer_report(["a"], [["a"], ["b"]])
