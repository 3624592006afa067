"""metrics.png is drawn, from labels of any letters; or a sentence says why not."""

import importlib.util
import os
from pathlib import Path

import pytest

from tinygrad_llm.metrics import plot
from tinygrad_llm.metrics.generated import answer_scores
from tinygrad_llm.metrics.report import (
    GeneratedReport,
    label_report,
    tag_report,
    translation_report,
)

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


def test_translations_beside_copying(tmp_path: Path):
    pytest.importorskip("sacrebleu")
    sources = ["a", "b b", "c c c", "d d d d"] * 5
    report = translation_report(
        ["a"] * 20, [[text] for text in sources], ["x" * len(text) for text in sources], name="$x$"
    )
    figure = plot.generated_figure(report)
    left, middle, right = figure.axes
    heights = [bar.get_height() for bar in left.patches]  # pyright: ignore
    scores = report.scores.as_dict()
    assert heights[:3] == [scores[name] for name in ("bleu", "chrf", "exact")]
    assert heights[3:] == [0, 0, 0]  # copying
    assert sum(bar.get_height() for bar in middle.patches) == 20  # pyright: ignore
    assert [text.get_text() for text in right.get_xticklabels()] == ["1", "3", "5", "7"]
    assert [text.get_text() for text in right.texts] == ["5"] * 4  # how many
    means = [bar.get_height() for bar in right.patches]  # pyright: ignore
    assert means[0] == pytest.approx(100)
    assert sorted(means, reverse=True) == means
    assert plot.draw_report(report, tmp_path / "metrics.png") is None
    assert (tmp_path / "metrics.png").read_bytes().startswith(b"\x89PNG")


def test_scores_without_texts_are_drawn_alone(tmp_path: Path):
    report = GeneratedReport("qa", answer_scores(["a b"], ["b c"]))
    (axes,) = plot.generated_figure(report).axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["exact match", "F1 of words"]
    assert plot.draw_report(report, tmp_path / "metrics.png") is None


@pytest.mark.parametrize(
    ("lengths", "most", "groups"),
    [
        ([1, 1, 2, 5, 6, 9], 3, [(1, 1), (2, 5), (6, 9)]),
        ([4], 8, [(4, 4)]),
        ([0, 0, 0, 7], 8, [(0, 0), (7, 7)]),
        (list(range(100)), 4, [(0, 24), (25, 49), (50, 74), (75, 99)]),
    ],
)
def test_groups_of_lengths(lengths: list[int], most: int, groups: list[tuple[int, int]]):
    assert plot._length_groups(lengths, most) == groups


def test_a_picture_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "metrics.png"
    file.write_bytes(b"old")

    def fails(*_: object):
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="power cut"):
        plot.draw_report(label_report(["a"], ["a"]), file)
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["metrics.png"]
