"""loss.png: training and validation loss over the steps; and several runs in one picture.

Where a task measures more, such as how many hidden words are guessed, that is below, beside what
needs no skill.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinygrad_llm.train import files
from tinygrad_llm.train.run import Record, accuracies

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
    """Training loss and its running mean, validation loss, learning rate: over the steps.

    In a second panel, where there are any: accuracies of the validation, and dotted the baselines.
    """
    shares = accuracies(records)
    figure, axes = _empty(panels=2 if shares else 1)
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
    if shares:
        _add_accuracies(figure.axes[1], records, shares)
    return figure


def _add_accuracies(
    axes: Axes, records: Sequence[Record], shares: Mapping[str, tuple[str, str]]
) -> None:
    for i, (key, (name, baseline)) in enumerate(shares.items()):
        steps, values = points(records, key)
        label = f"{name} (last {values[-1]:.3f}, best {max(values):.3f})"
        axes.plot(steps, values, color=f"C{i}", marker="o", markersize=3, label=label)
        steps, values = points(records, baseline)
        if steps:
            label = f"{name} without skill ({values[-1]:.3f})"
            axes.plot(steps, values, color=f"C{i}", linestyle=":", label=label)
    axes.set_ylabel("share that is right")
    axes.set_ylim(0, 1)
    axes.legend(fontsize="small")


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


def _empty(panels: int = 1) -> tuple[Figure, Axes]:
    """The figure and its first panel, which is for the loss."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=(8, 5 + 4 * (panels - 1)), dpi=120, layout="constrained")
    for axes in figure.subplots(panels, squeeze=False)[:, 0]:
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("cross-entropy per token (nats)")
    return figure, figure.axes[0]


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
