"""loss.png: training and validation loss over the steps; and several runs in one picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinygrad_llm.train import files
from tinygrad_llm.train.run import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOT_INSTALLED = (
    "loss.png was not drawn because matplotlib is not installed: pip install 'tinygrad-llm[plots]'"
)


def draw_loss(records: Sequence[Record], path: Path) -> str | None:
    """Draw the curves of a run into `path`; or say in one sentence why not."""
    if importlib.util.find_spec("matplotlib") is None:
        return NOT_INSTALLED
    _save(loss_figure(records), path)
    return None


def draw_runs(runs: Mapping[str, Sequence[Record]], path: Path) -> str | None:
    """Draw the curves of several runs, by their names, into `path`; or say why not."""
    if importlib.util.find_spec("matplotlib") is None:
        return NOT_INSTALLED
    _save(runs_figure(runs), path)
    return None


def loss_figure(records: Sequence[Record]) -> Figure:
    """Training loss and its running mean, validation loss, learning rate: over the steps."""
    figure, axes = _empty()
    steps, losses = points(records, "loss")
    if steps:
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(losses), color="tab:blue", label="training (running mean)")
    for key, name, color in (
        ("val_loss", "validation", "tab:orange"),
        ("val_loss_ema", "validation, averaged weights", "tab:green"),
    ):
        steps, losses = points(records, key)
        if steps:
            label = f"{name} (last {losses[-1]:.3f}, best {min(losses):.3f})"
            axes.plot(steps, losses, color=color, marker="o", markersize=3, label=label)
    _add_learning_rate(axes, *points(records, "lr"))
    _add_legend(axes)
    return figure


def runs_figure(runs: Mapping[str, Sequence[Record]]) -> Figure:
    """A colour for each run: its validation loss, and thinly its training loss, smoothed."""
    figure, axes = _empty()
    for i, (name, records) in enumerate(runs.items()):
        color = f"C{i % 10}"
        steps, losses = points(records, "loss")
        axes.plot(steps, _smooth(losses), color=color, alpha=0.4, linewidth=0.8)
        steps, losses = points(records, "val_loss")
        if steps:
            label = f"{name} (validation: last {losses[-1]:.3f}, best {min(losses):.3f})"
            axes.plot(steps, losses, color=color, marker="o", markersize=3, label=label)
    _add_legend(axes)
    return figure


def points(records: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    """The steps that have this number, and the numbers."""
    found = [record for record in records if key in record]
    return [record["step"] for record in found], [record[key] for record in found]


def _empty() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy per token (nats)")
    axes.grid(alpha=0.3)
    return figure, axes


def _add_learning_rate(axes: Axes, steps: Sequence[int], rates: Sequence[float]) -> None:
    if steps:
        right = axes.twinx()
        right.plot(steps, rates, color="tab:gray", linewidth=0.8, linestyle="--", alpha=0.6)
        right.set_ylabel("learning rate (dashed)", color="tab:gray")
        right.set_ylim(bottom=0)


def _add_legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def _save(figure: Figure, path: Path) -> None:
    files.write_file(path, lambda temporary: figure.savefig(temporary, format="png"))


def _smooth(losses: Sequence[float]) -> list[float]:
    """m ← m + (loss − m) / min(n, window): a mean at first, then an exponential one."""
    window = max(1, len(losses) // 50)
    mean, smooth = 0.0, []
    for n, loss in enumerate(losses, start=1):
        mean += (loss - mean) / min(n, window)
        smooth.append(mean)
    return smooth
