"""The loss curve."""

import importlib.util
import os
import sys

import pytest

from tinygrad_llm.train import plot

RECORDS = [
    {"step": 0, "val_loss": 5.0},
    *({"step": i, "loss": 5.0 / i} for i in range(1, 60)),
    {"step": 60, "loss": 1.0, "val_loss": 1.5, "val_loss_ema": 1.4},
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
