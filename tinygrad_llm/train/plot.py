"""loss.png: the training and the validation loss over the steps."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from tinygrad_llm.train import files
from tinygrad_llm.train.run import Record

NOT_INSTALLED = (
    "loss.png was not drawn because matplotlib is not installed: pip install 'tinygrad-llm[plots]'"
)


def draw_loss(records: Sequence[Record], path: Path) -> str | None:
    """Draw the curves into `path`; or say in one sentence why not."""
    if importlib.util.find_spec("matplotlib") is None:
        return NOT_INSTALLED
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    validation = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
    averaged = [(r["step"], r["val_loss_ema"]) for r in records if "val_loss_ema" in r]
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(losses), color="tab:blue", label="training (running mean)")
    for points, name, color in (
        (validation, "validation", "tab:orange"),
        (averaged, "validation, averaged weights", "tab:green"),
    ):
        if points:
            steps, losses = zip(*points, strict=True)
            label = f"{name} (last {losses[-1]:.3f}, best {min(losses):.3f})"
            axes.plot(steps, losses, color=color, marker="o", markersize=3, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy per token (nats)")
    axes.grid(alpha=0.3)
    if train or validation:
        axes.legend()
    files.write_file(path, lambda temporary: figure.savefig(temporary, format="png"))
    return None


def _smooth(losses: Sequence[float]) -> list[float]:
    """m ← m + (loss − m) / min(n, window): a mean at first, then an exponential one."""
    window = max(1, len(losses) // 50)
    mean, smooth = 0.0, []
    for n, loss in enumerate(losses, start=1):
        mean += (loss - mean) / min(n, window)
        smooth.append(mean)
    return smooth
