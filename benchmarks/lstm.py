"""Forward and backward of an LSTM on the CPU, beside PyTorch's: 2 × 512, 64 steps, batch 32.

Each implementation runs in a process of its own, with the same weights, the same input, the same
gradient and the same number of threads; the processes take turns in short bursts, so that what else
the machine does falls on all alike. For PyTorch glibc is told to keep freed memory, as our own
process does. Before anything is timed, outputs and gradients are compared.

    python benchmarks/lstm.py [--bursts 12] [--lengths] [--save]

`gemm` is the floor: the matrix products of one pass alone, through NumPy, with the state
feature-major as ours has it. `--lengths` gives the sequences 16 to 64 steps: PyTorch gets them
packed, and its time includes the packing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from train_step import threads
from worker import Worker, in_turns, serve

LAYERS, HIDDEN, STEPS, BATCH = 2, 512, 64, 32
PASSES = 2  # in a burst
RESULTS = Path(__file__).parent / "results"

# A pass gives what is compared: the output, the gradient of x, and those of all weights.
Pass = Callable[[], list[np.ndarray]]


def inputs(varied: bool) -> tuple[np.ndarray, np.ndarray, list[int] | None]:
    """x, the gradient of y, and the lengths."""
    rng = np.random.default_rng(1)
    x, g = (rng.normal(size=(STEPS, BATCH, HIDDEN)).astype(np.float32) for _ in range(2))
    lengths = rng.integers(STEPS // 4, STEPS + 1, size=BATCH).tolist() if varied else None
    if lengths is not None:
        lengths[0] = STEPS
    return x, g, lengths


def our_layer() -> Any:
    from tinygrad_llm import manual_seed, nn

    manual_seed(0)
    return nn.LSTM(HIDDEN, HIDDEN, LAYERS)


def ours(varied: bool) -> Pass:
    from tinygrad_llm import Tensor, backend

    backend.keep_freed_memory()
    layer, (x, g, lengths) = our_layer(), inputs(varied)
    leaf, start = Tensor(x, requires_grad=True), Tensor(g)

    def run() -> list[np.ndarray]:
        layer.zero_grad()
        leaf.grad = None
        y, _ = layer(leaf, lengths=lengths)
        y.backward(start)
        found = [y, leaf.grad, *[p.grad for p in layer.parameters()]]
        return [a.numpy() for a in found if a is not None]

    return run


def pytorch(varied: bool) -> Pass:
    import torch
    from torch.nn.utils import rnn

    torch.set_num_threads(threads())
    x, g, lengths = inputs(varied)
    layer = torch.nn.LSTM(HIDDEN, HIDDEN, LAYERS)
    state = our_layer().state_dict()
    layer.load_state_dict({name: torch.from_numpy(p.numpy().copy()) for name, p in state.items()})
    leaf, start = torch.from_numpy(x).requires_grad_(), torch.from_numpy(g)
    counts = None if lengths is None else torch.tensor(lengths)

    def run() -> list[np.ndarray]:
        layer.zero_grad()
        leaf.grad = None
        if counts is None:
            y, _ = layer(leaf)
        else:
            packed, _ = layer(rnn.pack_padded_sequence(leaf, counts, enforce_sorted=False))
            y, _ = rnn.pad_packed_sequence(packed, total_length=STEPS)
        y.backward(start)
        found = [y.detach(), leaf.grad, *[p.grad for p in layer.parameters()]]
        return [a.numpy() for a in found if a is not None]

    return run


def gemm(varied: bool) -> Pass:
    """Every matrix product of a pass, into memory that is already there."""
    rng = np.random.default_rng(0)
    _, _, lengths = inputs(varied)
    counts = [sum(n > t for n in lengths) if lengths else BATCH for t in range(STEPS)]
    total = sum(counts)

    def array(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    w, z, rows, h = (
        array(*s)
        for s in ((4 * HIDDEN, HIDDEN), (4 * HIDDEN, total), (total, HIDDEN), (HIDDEN, BATCH))
    )
    dx, dw, gates = np.empty_like(rows), np.empty_like(w), array(4 * HIDDEN, BATCH)

    def run() -> list[np.ndarray]:
        for _ in range(LAYERS):
            np.matmul(w, rows.T, out=z)
            for n in counts:
                np.matmul(w, h[:, :n], out=gates[:, :n])
            for n in counts:
                np.matmul(w.T, gates[:, :n], out=h[:, :n])
            np.matmul(z.T, w, out=dx)
            np.matmul(z, rows, out=dw)
            np.matmul(z, rows, out=dw)
            np.clip(h, -1.0, 1.0, out=h)  # multiplied so often it would overflow
        return []

    return run


IMPLEMENTATIONS: dict[str, Callable[[bool], Pass]] = {"gemm": gemm, "ours": ours, "torch": pytorch}


# --- one process per implementation ---------------------------------------------------------------


def work(name: str, varied: bool, file: str) -> None:
    """Leave one pass's results in `file`; then serve bursts: seconds per pass."""
    run = IMPLEMENTATIONS[name](varied)
    for _ in range(2):  # warm up: threads, memory
        run()
    np.savez(file, *run())

    def burst() -> float:
        start = time.perf_counter()
        for _ in range(PASSES):
            run()
        return (time.perf_counter() - start) / PASSES

    serve(burst)


def measure(names: list[str], varied: bool, bursts: int) -> dict[str, list[float]]:
    """All bursts of each implementation, taken in turns."""
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.npz" for name in names}
        workers = [
            Worker(
                *(__file__, name, "--worker", name, "--file", str(file)), *["--lengths"] * varied
            )
            for name, file in files.items()
        ]
        if "torch" in names:
            print(f"largest relative difference to torch: {difference(files):.1e}")
    return in_turns(workers, bursts)


def difference(files: dict[str, Path]) -> float:
    """Between our output and gradients and PyTorch's; each relative to its largest element."""
    with np.load(files["ours"]) as mine, np.load(files["torch"]) as theirs:
        worst = max(
            float(np.abs(mine[name] - theirs[name]).max() / np.abs(theirs[name]).max())
            for name in theirs.files
        )
    if worst > 1e-4:
        raise SystemExit(f"ours and torch's differ by {worst:.1e}: times would mean nothing")
    return worst


def table(found: dict[str, list[float]]) -> str:
    """Markdown: a row per implementation; the ratio is the median of the ratios turn by turn."""
    against = found.get("torch")
    floor = statistics.median(found["gemm"])
    lines = [
        "| | ms per pass | spread | against torch | products |",
        "|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        low, middle, high = statistics.quantiles(runs, n=4)
        ratios = [a / b for a, b in zip(runs, against or [], strict=against is not None)]
        lines.append(
            f"| {name} | {middle * 1e3:.1f} | {low * 1e3:.1f}–{high * 1e3:.1f} | "
            f"{f'{statistics.median(ratios):.2f}' if ratios else ''} | {floor / middle:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bursts", type=int, default=12, help="turns per implementation")
    parser.add_argument("--lengths", action="store_true", help="16 to 64 steps, not 64 each")
    parser.add_argument("--save", action="store_true", help="write into benchmarks/results/")
    parser.add_argument("--worker", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.lengths, arguments.file)
        return
    if arguments.bursts < 2:
        parser.error("--bursts must be at least 2: there is no spread of one")
    names = ["gemm", "ours"] + ["torch"] * _has_torch()
    from machine import environment

    about = ", ".join(f"{key} {value}" for key, value in environment().items())
    print(f"{about}, {threads()} threads")
    found = table(measure(names, arguments.lengths, arguments.bursts))
    print(f"\n{found}")
    if arguments.save:
        name = "lstm_lengths" if arguments.lengths else "lstm"
        command = f"`{Path(__file__).name}{' --lengths' * arguments.lengths}`"
        title = f"# LSTM {LAYERS} × {HIDDEN}, {STEPS} steps, batch {BATCH}: forward and backward"
        text = "\n\n".join([title, f"{command}: {about}, {threads()} threads", found])
        (RESULTS / f"{name}.md").write_text(text + "\n", encoding="utf-8")


def _has_torch() -> bool:
    try:
        import torch  # for its version in the title; the workers import their own
    except ImportError:
        return False
    return bool(torch.__version__)


if __name__ == "__main__":
    main()
