"""What one recorded op costs beside its arithmetic: forward and backward on 4×4 float32.

Chains of 200 ops, so that what a call costs is divided by 200. Ours and PyTorch's (where it is
installed) run in turns in one process on one thread; the table has medians over the rounds and,
as spread, the quartiles.

    python benchmarks/op_overhead.py [--rounds 60] [--save]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from machine import environment

import tinygrad_llm as tg

LENGTH = 200
RESULTS = Path(__file__).parent / "results"

# How each op goes from h to the next h; w is another 4×4 that requires a gradient.
OPS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda h, w: h + w,
    "multiply": lambda h, w: h * w,
    "scale by 0.5": lambda h, w: h * 0.5,
    "negative": lambda h, w: -h,
    "tanh": lambda h, w: h.tanh(),
    "matmul": lambda h, w: h @ w,
}


def chain(op: Callable[[Any, Any], Any], x: Any, w: Any, seed: Any, backward: bool) -> None:
    x.grad = w.grad = None
    h = x
    for _ in range(LENGTH):
        h = op(h, w)
    if backward:
        h.backward(seed)


def tensors(make: Callable[[np.ndarray], Any], leaf: Callable[[Any], Any]) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    orthogonal = np.linalg.qr(rng.normal(size=(4, 4)))[0].astype(np.float32)  # powers stay bounded
    x = leaf(make(rng.uniform(-1, 1, (4, 4)).astype(np.float32)))
    return x, leaf(make(orthogonal)), make(np.ones((4, 4), np.float32))


def contestants() -> dict[str, tuple[Any, ...]]:
    """The tensors of each library; PyTorch only where it can be imported."""
    found = {"ours": tensors(tg.Tensor, lambda t: t.requires_grad_())}
    try:
        import torch
    except ImportError:
        return found
    torch.set_num_threads(1)
    return found | {"torch": tensors(torch.from_numpy, lambda t: t.requires_grad_())}


def measure(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Microseconds per op: {op: {'ours forward': [one per round], …}}, the libraries in turns."""
    libraries = contestants()
    times: dict[str, dict[str, list[float]]] = {}
    gc.disable()
    for name, op in OPS.items():
        found = times.setdefault(name, {})
        for i in range(rounds + 3):
            for library, (x, w, seed) in libraries.items():
                for what, backward in (("forward", False), ("both", True)):
                    start = time.perf_counter()
                    chain(op, x, w, seed, backward)
                    took = (time.perf_counter() - start) / LENGTH * 1e6
                    if i >= 3:  # the first rounds warm up
                        found.setdefault(f"{library} {what}", []).append(took)
    gc.enable()
    return times


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, low, high


def table(times: dict[str, dict[str, list[float]]]) -> str:
    """Markdown: a row per op, medians in microseconds with quartiles, and the ratio."""
    torch = any("torch both" in found for found in times.values())
    heads = ["op", "forward µs", "forward + backward µs"]
    heads += ["PyTorch forward µs", "PyTorch both µs", "ratio"] * torch
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, found in times.items():
        cells = [name]
        keys = ["ours forward", "ours both"] + ["torch forward", "torch both"] * torch
        for key in keys:
            middle, low, high = quartiles(found[key])
            cells.append(f"{middle:.2f} ({low:.2f}–{high:.2f})")
        if torch:
            ratios = [a / b for a, b in zip(found["ours both"], found["torch both"], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=60, help="how often each chain runs")
    parser.add_argument("--save", action="store_true", help="write into benchmarks/results/")
    arguments = parser.parse_args()
    times, about = measure(arguments.rounds), environment()
    title = ", ".join(f"{key} {value}" for key, value in about.items())
    text = f"{title}\n4×4 float32, one thread, {arguments.rounds} rounds, median (quartiles)\n\n"
    text += table(times)
    print(text)
    if arguments.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "op_overhead.md").write_text(
            f"# Cost per recorded op\n\n`{Path(__file__).name} --rounds {arguments.rounds}`\n\n"
            f"{text}\n",
            encoding="utf-8",
        )
        (RESULTS / "op_overhead.json").write_text(
            json.dumps({"environment": about, "microseconds": times}, indent=1) + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
