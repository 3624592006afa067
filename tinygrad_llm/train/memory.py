"""How much memory a run takes; where it is not enough: who asked, who has it, what would fit."""

from __future__ import annotations

import gc
import re
import traceback
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tinygrad_llm import autograd, backend
from tinygrad_llm.autograd import Function
from tinygrad_llm.tensor import Tensor

if TYPE_CHECKING:
    from tinygrad_llm.train.run import Record

# --- while all is well ----------------------------------------------------------------------------


class GpuMemory:
    """What CuPy's pools hold of a GPU's memory, in bytes.

    A pool keeps what it once had, and no other program can have it: the most of that so far is
    `memory`. `memory_used` is what arrays occupy at this moment.
    """

    def __init__(self) -> None:
        self.pools: list[Any] = [backend.cupy().get_default_memory_pool()]
        self.peak = 0

    def record(self) -> Record:
        """{'memory': …, 'memory_used': …}: for a line of metrics.jsonl."""
        self.peak = max(self.peak, sum(pool.total_bytes() for pool in self.pools))
        used = sum(pool.used_bytes() for pool in self.pools)
        return {"memory": self.peak, "memory_used": used}

    def summary(self) -> str:
        """'memory: 3.1 GB of the GPU's 80.0 GB at most, 1.2 GB in use now'"""
        found = self.record()
        _, total = backend.cupy().cuda.runtime.memGetInfo()
        return (
            f"memory: {readable(found['memory'])} of the GPU's {readable(total)} at most, "
            f"{readable(found['memory_used'])} in use now"
        )


def readable(count: float) -> str:
    """3100000000 -> '3.1 GB'"""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:.0f} bytes"


# --- when there is not enough ---------------------------------------------------------------------


class Shortage(NamedTuple):
    """An allocation that failed."""

    op: str  # what was computed; "" where that is not known
    asked: int | None  # bytes
    alive: list[tuple[str, int, str]]  # (what, bytes, its largest parts) when it failed
    said: str  # by whoever refused
    there: str = ""  # how much memory there is in all

    def __str__(self) -> str:
        """Linear of float32(8, 64) asked for 3.1 GB; alive were parameters 1.2 GB, …"""
        text = f"{self.op or 'an array'} asked for {readable(self.asked or 0)}"
        if self.asked is None or self.said.startswith("Unable to"):  # as NumPy says it, with shapes
            text = " in ".join(part for part in (self.said, self.op) if part)
        parts = [f"{what} {readable(n)}{more}" for what, n, more in self.alive if n]
        alive = f"alive were {', '.join(parts)}" if parts else ""
        return "; ".join(part for part in (text, self.there, alive) if part)


def is_shortage(error: BaseException) -> bool:
    """Whether memory could not be had: of NumPy, of CuPy's pool, or of CUDA itself."""
    named = type(error).__name__ in ("CUDARuntimeError", "CUDADriverError")
    text = str(error)
    return isinstance(error, MemoryError) or (
        named and ("MemoryAllocation" in text or "OUT_OF_MEMORY" in text)
    )


def look_at(
    error: BaseException, parameters: Iterable[Tensor], optimizer: Any, device: str = "cpu"
) -> Shortage:
    """What is known about it. Call it first: the traceback still holds what was alive."""
    alive = _alive(list(parameters), optimizer)
    said = " ".join(str(error).split())
    return Shortage(_op(error), _asked(error), alive, said, _there(device))


def _there(device: str) -> str:
    if device != "cpu":
        _, total = backend.cupy().cuda.runtime.memGetInfo()
        return f"the GPU has {readable(total)}"
    from tinygrad_llm.train.machine import physical_memory

    total = physical_memory()
    return "" if total is None else f"the machine has {readable(total)}"


def _op(error: BaseException) -> str:
    """From the note that `Function.apply` or the backward walk left on it."""
    for note in getattr(error, "__notes__", ()):
        if note.startswith("in "):
            return note.removeprefix("in ").partition(", with ")[0]
    inside = [Path(frame.filename).parent.name for frame in traceback.extract_tb(_trace(error))]
    return "the optimiser's step" if "optim" in inside else ""


def _trace(error: BaseException) -> TracebackType | None:
    return error.__traceback__


def _asked(error: BaseException) -> int | None:
    size = getattr(error, "_size", None)  # CuPy's
    if isinstance(size, int):
        return size
    shape, dtype = getattr(error, "shape", None), getattr(error, "dtype", None)  # NumPy's
    if isinstance(shape, tuple) and dtype is not None:
        return int(np.prod([float(n) for n in shape]) * np.dtype(dtype).itemsize)
    found = re.search(r"allocating ([\d,]+) bytes", str(error))
    return int(found[1].replace(",", "")) if found else None


def _alive(parameters: list[Tensor], optimizer: Any) -> list[tuple[str, int, str]]:
    seen: set[int] = set()  # memory that is counted already
    weights = _count([p.data for p in parameters], seen)
    gradients = _count([p.grad.data for p in parameters if p.grad is not None], seen)
    states = getattr(optimizer, "state", {})
    kept = _count(states.values() if isinstance(states, Mapping) else (), seen)
    ops: Counter[str] = Counter()
    for node in gc.get_objects():
        if isinstance(node, Function):
            ops[type(node).__name__] += _count([node.saved, node.kept], seen)
    largest = ", ".join(f"{name} {readable(n)}" for name, n in ops.most_common(3) if n)
    return [
        ("parameters", weights, ""),
        ("gradients", gradients, ""),
        ("the optimiser's state", kept, ""),
        ("saved activations", ops.total(), f" ({largest})" if largest else ""),
    ]


def _count(values: Iterable[Any], seen: set[int]) -> int:
    """The bytes of the arrays in the values, views counted as what they are views of, once."""
    total = 0
    for array in _arrays(values):
        owner = autograd._owner(array)
        if id(owner) not in seen:
            seen.add(id(owner))
            total += owner.nbytes
    return total


def _arrays(value: Any) -> Iterator[Any]:
    if backend.is_array(value):
        yield value
    elif isinstance(value, Mapping):
        yield from _arrays(list(value.values()))
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes | Tensor):
        for inner in value:
            yield from _arrays(inner)


# --- what would fit -------------------------------------------------------------------------------


def batch_that_fits(
    error: BaseException, step: Callable[[int], object], device: str, reserved: int = 0
) -> int | None:
    """How many rows a batch may have, from the bytes that steps with one and two of them took.

    All that the failed step held is freed first: its variables are gone from the traceback.

    Args:
        error: that of the step that failed.
        step: a forward and a backward pass with so many rows.
        device: where.
        reserved: bytes that are needed besides, such as for an optimiser that has none yet.

    Returns:
        None where it cannot be measured, or where the machine does not say what is free.
    """
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(_trace(seen))
        seen = seen.__context__
    gc.collect()
    try:
        _release(device)
        free = _free(device)
        if free is None:
            return None
        with peak_of(device) as one:
            step(1)
        with peak_of(device) as two:
            step(2)
    except Exception as problem:
        if not is_shortage(problem):
            return None
        traceback.clear_frames(_trace(problem))
        return 0
    row = two.bytes - one.bytes
    if row <= 0:
        return None
    # A share of it is lost between blocks.
    return max(0, int((0.95 * (free - reserved) - (one.bytes - row)) / row))


def _release(device: str) -> None:
    if device != "cpu":
        backend.cupy().get_default_memory_pool().free_all_blocks()


def _free(device: str) -> int | None:
    """Bytes that new arrays may have."""
    if device != "cpu":
        cupy = backend.cupy()
        free, _ = cupy.cuda.runtime.memGetInfo()
        pool = cupy.get_default_memory_pool()
        limit = pool.get_limit()
        return min(free, limit - pool.used_bytes()) if limit else free
    return _free_on_linux()


def _free_on_linux() -> int | None:
    """The least of what the system could give and what the process may still take."""
    try:
        import resource

        info = Path("/proc/meminfo").read_text(encoding="ascii")
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
        page = resource.getpagesize()
    except (ImportError, OSError, ValueError):
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", info)
    there = [1024 * int(found[1])] if found else []
    if allowed != resource.RLIM_INFINITY:
        there.append(max(0, allowed - page * pages))
    return min(there, default=None)


@contextmanager
def peak_of(device: str) -> Iterator[Any]:
    """The most bytes in use at a time within the block, over those before it, as `.bytes`."""
    found = SimpleNamespace(bytes=0)
    if device != "cpu":
        with _watching(backend.cupy()) as hook:
            yield found
        found.bytes = hook.most
        return
    traced = tracemalloc.is_tracing()
    if not traced:
        tracemalloc.start()
    try:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        yield found
        found.bytes = tracemalloc.get_traced_memory()[1] - before
    finally:
        if not traced:
            tracemalloc.stop()


def _watching(cupy: Any) -> Any:
    class Hook(cupy.cuda.MemoryHook):
        """Called by CuPy's pool at each allocation and each release."""

        name = "tinygrad_llm"
        now = most = 0

        def malloc_postprocess(self, **what: Any) -> None:
            self.now += what["mem_size"]
            self.most = max(self.most, self.now)

        def free_postprocess(self, **what: Any) -> None:
            self.now -= what["mem_size"]

    return Hook()
