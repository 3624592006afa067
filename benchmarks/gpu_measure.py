"""Times of rivals on one device: in turns, from cold caches; and how the results are written.

`Gpu` measures with CUDA events. `Host` measures with the CPU's clock, so that a machine without a
GPU can go through all the code of `gpu.py --dry`: its numbers mean nothing.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

Run = Callable[[], Any]
Row = dict[str, Any]

OURS = "ours"
LIBRARY = "CuPy"  # matrix products through it are cuBLAS's


class Case(NamedTuple):
    """One comparison: the same work done by several, `OURS` first.

    `work` is what one run does, in FLOPs or bytes by the formula; `unit` is 'TFLOP/s' or 'GB/s'.
    A run returns its array or arrays: ours may differ from the first rival's by `tolerance` of the
    largest number; None where there is nothing to compare.
    """

    work: float
    unit: str
    runs: Mapping[str, Run]
    tolerance: float | None


# --- clocks ---------------------------------------------------------------------------------------


class Timer(Protocol):
    xp: Any

    def milliseconds(self, runs: Sequence[Run], rounds: int) -> list[list[float]]:
        """The times of each of the runs, which take turns, each beginning with cold caches."""
        ...

    def free(self) -> None:
        """Give memory that nobody uses back to the device."""
        ...


class Gpu:
    """CUDA events on CuPy's default stream, which is PyTorch's default stream, too."""

    def __init__(self) -> None:
        from tinygrad_llm import backend

        self.xp = backend.cupy()
        level_2 = self.xp.cuda.Device().attributes.get("L2CacheSize", 0)
        self._words = self.xp.empty(max(4 * level_2, 2**28) // 4, dtype="uint32")

    def milliseconds(self, runs: Sequence[Run], rounds: int) -> list[list[float]]:
        cuda = self.xp.cuda
        events = [[(cuda.Event(), cuda.Event()) for _ in runs] for _ in range(rounds)]
        for pairs in events:
            for (start, stop), run in zip(pairs, runs, strict=True):
                self._flush()
                start.record()
                run()
                stop.record()
            pairs[-1][1].synchronize()
        columns = zip(*events, strict=True)
        return [[cuda.get_elapsed_time(*pair) for pair in column] for column in columns]

    def _flush(self) -> None:
        """Some hundred microseconds of work, in which Python gets ahead of the GPU.

        The last pass reads: what the level-2 cache then holds need not be written back.
        """
        for _ in range(4):
            self._words.data.memset_async(0, self._words.nbytes)
        self._words.max()

    def free(self) -> None:
        self.xp.get_default_memory_pool().free_all_blocks()


class Host:
    """The same for NumPy arrays."""

    xp = np

    def milliseconds(self, runs: Sequence[Run], rounds: int) -> list[list[float]]:
        found: list[list[float]] = [[] for _ in runs]
        for _ in range(rounds):
            for times, run in zip(found, runs, strict=True):
                start = time.perf_counter()
                run()
                times.append(1e3 * (time.perf_counter() - start))
        return found

    def free(self) -> None:
        pass


# --- measuring ------------------------------------------------------------------------------------


def measure(part: str, name: str, case: Case, timer: Timer, seconds: float = 1.0) -> Row:
    """The row of one case: per rival the median, the quartiles, the rate; and what went wrong.

    A rival that fails is noted under 'notes', for it may merely not take such arrays; where ours
    fails, or computes something else, the row has 'failed'.
    """
    row: Row = {"part": part, "case": name, "unit": case.unit, "work": case.work}
    runs, outputs, notes = {}, {}, {}
    for rival, run in case.runs.items():
        try:
            outputs[rival] = run() if case.tolerance is not None else None
            run()
            run()
        except Exception as error:
            notes[rival] = sentence(error)
        else:
            runs[rival] = run
    if case.tolerance is not None and OURS in runs and len(runs) > 1:
        rival = next(r for r in runs if r != OURS)
        row["difference"] = difference(outputs[OURS], outputs[rival])
        if not row["difference"] <= case.tolerance:
            row["failed"] = (
                f"ours differs from {rival} by {row['difference']:.2g} of the largest number, "
                f"more than {case.tolerance:g}"
            )
    outputs.clear()
    if OURS not in runs and OURS in case.runs:
        row["failed"] = notes.pop(OURS)
    if notes:
        row["notes"] = notes
    row["times"] = _times(case, runs, timer, seconds) if runs else {}
    return row


def _times(
    case: Case, runs: Mapping[str, Run], timer: Timer, seconds: float
) -> dict[str, dict[str, float]]:
    order = list(runs.values())
    once = sum(times[0] for times in timer.milliseconds(order, 1))
    rounds = max(5, min(40, int(1e3 * seconds / max(once, 1e-3))))
    found = {}
    for rival, times in zip(runs, timer.milliseconds(order, rounds), strict=True):
        low, median, high = statistics.quantiles(times, n=4)
        found[rival] = {
            "ms": median,
            "low": low,
            "high": high,
            "rounds": rounds,
            "rate": rate(case.work, median, case.unit),
        }
    return found


def rate(work: float, milliseconds: float, unit: str) -> float:
    """Work per second in 'TFLOP/s' or 'GB/s'."""
    return work / (max(milliseconds, 1e-9) * 1e-3) / {"TFLOP/s": 1e12, "GB/s": 1e9}[unit]


def difference(ours: Any, other: Any) -> float:
    """max |ours − other| / max |other|, the largest of the arrays; NaN and shapes count as ∞."""
    pairs = zip(_arrays(ours), _arrays(other), strict=True)
    largest = 0.0
    for a, b in pairs:
        if a.shape != b.shape:
            return float("inf")
        a, b = a.astype("float32"), b.astype("float32")
        size = float(abs(b).max())
        found = float(abs(a - b).max()) / (size or 1.0)
        largest = max(largest, found if found == found else float("inf"))
    return largest


def _arrays(outputs: Any) -> list[Any]:
    """As NumPy or CuPy arrays, PyTorch's tensors too."""
    found = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    return [from_torch(a) if type(a).__module__.startswith("torch") else a for a in found]


def from_torch(x: Any) -> Any:
    """The same memory as a CuPy array (NumPy, on the CPU); bfloat16 goes through as integers."""
    from tinygrad_llm import backend

    xp = backend.cupy() if x.is_cuda else np
    dtype = backend.as_dtype(str(x.dtype).removeprefix("torch."))
    integers = getattr(importlib.import_module("torch"), f"int{8 * x.element_size()}")
    return xp.from_dlpack(x.detach().contiguous().view(integers)).view(dtype)


def to_torch(x: Any) -> Any:
    """The same memory as a PyTorch tensor."""
    torch = importlib.import_module("torch")
    integers = torch.from_dlpack(x.view(f"int{8 * x.itemsize}"))
    return integers.view(getattr(torch, str(x.dtype)))


def sentence(error: BaseException) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    return f"{type(error).__name__}: {text[:300]}"


# --- in words -------------------------------------------------------------------------------------


def number(rate: float) -> str:
    """1234, 56.7, 8.9: no digit that another run would not show."""
    return f"{rate:.0f}" if rate >= 99.95 else f"{rate:.1f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table that is also straight in a terminal."""
    cells = [list(head), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def all_times(rows: Sequence[Row]) -> str:
    """Every measurement, a line each."""
    return table(
        ("part", "case", "who", "ms", "quartiles", "rate"),
        [
            (
                row["part"],
                row["case"],
                rival,
                f"{t['ms']:.4f}",
                f"{t['low']:.4f}–{t['high']:.4f}",
                f"{number(t['rate'])} {row['unit']}",
            )
            for row in rows
            for rival, t in row.get("times", {}).items()
        ],
    )


def summary(rows: Sequence[Row], ceilings: Mapping[str, float]) -> str:
    """A line per case: our rate, beside the best rival, beside the ceiling of its unit."""
    lines = []
    for row in rows:
        times = dict(row.get("times", {}))
        ours = times.pop(OURS, None)
        if ours is None and not times:
            continue
        best = min(times, key=lambda rival: times[rival]["ms"], default=None)
        slower = row["case"].startswith(("float32 ", "tf32 ")) and row["unit"] == "TFLOP/s"
        ceiling = None if slower else ceilings.get(row["unit"])  # that of half precision
        lines.append(
            (
                row["part"],
                row["case"],
                "failed" if ours is None else f"{number(ours['rate'])} {row['unit']}",
                "–" if best is None else f"{number(times[best]['rate'])} ({best})",
                "–" if best is None or ours is None else f"{times[best]['ms'] / ours['ms']:.2f}",
                "–" if not ceiling or ours is None else f"{ours['rate'] / ceiling:.2f}",
            )
        )
    head = ("part", "case", "ours", "best other", "speed against it", "of the ceiling")
    return table(head, lines)
