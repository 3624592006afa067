"""The loss curve."""

import importlib.util
import os
import sys

import numpy as np
import pytest

from tinygrad_llm.train import plot

RECORDS = [
    {"step": 0, "val_loss": 5.0},
    *({"step": i, "loss": 5.0 / i, "lr": 0.1 / i} for i in range(1, 60)),
    {"step": 60, "loss": 1.0, "lr": 0.001, "val_loss": 1.5, "val_loss_ema": 1.4},
]


@pytest.mark.parametrize("records", [RECORDS, RECORDS[:1], []])
def test_a_picture_is_drawn(records, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "loss.png"
    assert plot.draw_loss(records, path) is None
    assert path.read_bytes().startswith(b"\x89PNG")
    assert os.listdir(tmp_path) == ["loss.png"]
    assert "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib_a_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    why = plot.draw_loss(RECORDS, tmp_path / "loss.png")
    assert why is not None
    assert "pip install 'tinygrad-llm[plots]'" in why
    assert os.listdir(tmp_path) == []


def test_smoothing_starts_as_a_mean():
    assert plot._smooth([2.0, 2.0, 2.0]) == [2.0, 2.0, 2.0]
    smooth = plot._smooth([3.0, 1.0] * 100)  # window 4
    assert smooth[:2] == [3.0, 2.0]
    assert abs(smooth[-1] - 2.0) < 0.5


def curves(figure):
    """label -> (steps, values), of every axes."""
    return {
        str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata()))
        for axes in figure.axes
        for line in axes.lines
    }


def test_the_curves_are_the_records():
    pytest.importorskip("matplotlib")
    figure = plot.loss_figure(RECORDS)
    found = curves(figure)
    losses = [record["loss"] for record in RECORDS[1:]]
    assert found["training (running mean)"] == (list(range(1, 61)), plot._smooth(losses))
    assert found["validation (last 1.500, best 1.500)"] == ([0, 60], [5.0, 1.5])
    assert found["validation, averaged weights (last 1.400, best 1.400)"] == ([60], [1.4])
    assert (list(range(1, 61)), losses) in found.values()
    assert (list(range(1, 61)), [record["lr"] for record in RECORDS[1:]]) in found.values()
    assert "learning rate" in figure.axes[1].get_ylabel()


def test_several_runs_are_drawn_by_their_names(tmp_path):
    pytest.importorskip("matplotlib")
    runs = {"seed 1": RECORDS, "seed 2": RECORDS[:1], "seed 3": []}
    found = curves(plot.runs_figure(runs))
    assert found["seed 1 (validation: last 1.500, best 1.500)"] == ([0, 60], [5.0, 1.5])
    assert found["seed 2 (validation: last 5.000, best 5.000)"] == ([0], [5.0])
    assert plot.draw_runs(runs, tmp_path / "runs.png") is None
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_several_runs_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert plot.draw_runs({"a": RECORDS}, tmp_path / "runs.png") == plot.NOT_INSTALLED


def test_accuracies_have_a_panel_of_their_own():
    pytest.importorskip("matplotlib")
    shares = {"val_masked_accuracy": 0.2, "val_majority_masked": 0.06, "val_accuracy": 0.5}
    figure = plot.loss_figure([*RECORDS, {"step": 61, "val_loss": 1.4, **shares}])
    below = figure.axes[1]
    labels = below.get_legend_handles_labels()[1]
    assert [label.partition(" (")[0] for label in labels] == [
        "masked accuracy",
        "masked accuracy without skill",
        "accuracy",
    ]
    assert np.asarray(below.lines[0].get_xydata()).tolist() == [[61, 0.2]]
    assert below.get_ylabel() == "share that is right"
    without = plot.loss_figure(RECORDS).axes
    assert "share that is right" not in [axes.get_ylabel() for axes in without]
