"""metrics.png is drawn, from labels of any letters; or a sentence says why not."""

import importlib.util
from pathlib import Path

import pytest

from tinygrad_llm.metrics import plot
from tinygrad_llm.metrics.report import label_report, tag_report

pytest.importorskip("matplotlib")


def test_tags_and_their_entities(tmp_path: Path):
    report = tag_report([["B-LOC", "O"], ["B-PER"]], [["B-LOC", "O"], ["O"]], name="dev")
    figure = plot.report_figure(report)
    left, right = figure.axes
    assert [text.get_text() for text in left.get_yticklabels()] == ["B-LOC", "B-PER", "O"]
    assert [text.get_text() for text in right.get_yticklabels()] == ["LOC (1)", "PER (1)"]
    assert [bar.get_width() for bar in right.patches] == [1.0, 0.0]  # pyright: ignore
    assert {text.get_text() for text in left.texts} == {"0", "1"}
    assert plot.draw_report(report, tmp_path / "metrics.png") is None
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")


def test_labels_of_any_letters(tmp_path: Path):
    report = label_report(["PRP$ $", "好", "a_b^c"], ["好", "好", "a_b^c"], name="$x$")
    assert plot.draw_report(report, tmp_path / "metrics.png") is None


def test_many_labels_have_no_numbers(tmp_path: Path):
    names = [str(i) for i in range(40)]
    report = label_report(names, names)
    assert list(plot.report_figure(report).axes[0].texts) == []
    assert plot.draw_report(report, tmp_path / "metrics.png") is None


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = plot.draw_report(label_report(["a"], ["a"]), tmp_path / "metrics.png")
    assert found == plot.NOT_INSTALLED
    assert not (tmp_path / "metrics.png").exists()
