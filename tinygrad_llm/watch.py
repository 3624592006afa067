"""What a thread does beside computing: record, look for anomalies, checkpoint.

The hot path of the engine only asks `mode.level`; what happens when more than recording is on
stands here.
"""

from __future__ import annotations

import contextlib
import itertools
import linecache
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_llm import backend

if TYPE_CHECKING:
    from tinygrad_llm.autograd import Function

RECORD, ANOMALY, DROP, COLLECT, NOTE = 1, 2, 4, 8, 16

# One clock for the whole engine: every recorded node and every write in place takes a tick. Later
# nodes have later ticks, so descending ticks are a topological order; and an array is stale for a
# node when it was written after the node's tick.
clock = itertools.count(1)

DROPPED: Any = ("dropped",)  # what a checkpointed node has in place of what it saved


class _Mode(threading.local):
    """What the current thread does beside computing; `level` is a sum of the flags above."""

    level: int = RECORD
    replay: Any = None  # the checkpointed call that is running, for DROP and COLLECT
    noted: dict[int, weakref.ref[Any]] | None = None  # arrays that ops were given, for NOTE


mode = _Mode()


def after_forward(node: Function, given: Sequence[Any], y: Any) -> None:
    """Called for every op while more than recording is on; `given`: its arrays and options."""
    if mode.level & ANOMALY:
        _check_forward(node, given, y)
    if mode.level & (DROP | COLLECT) and node.parents and mode.replay is not None:
        mode.replay.note(node, dropping=bool(mode.level & DROP))
    if mode.level & NOTE and mode.noted is not None:
        _note(given, mode.noted)


def after_backward(node: Function, g: Any, gradients: Sequence[Any]) -> None:
    """Called for every node of a backward pass while more than recording is on."""
    if mode.level & ANOMALY:
        _check_backward(node, g, gradients)


# --- what ops read --------------------------------------------------------------------------------


@contextlib.contextmanager
def noting_inputs() -> Iterator[Callable[[], list[Any]]]:
    """Within: whose memory ops are given is noted; the call returned gives those still alive.

    They are not kept alive by it: what an op is given most often dies with the next.
    """
    level, noted = mode.level, mode.noted
    here: dict[int, weakref.ref[Any]] = {}
    mode.level, mode.noted = level | NOTE, here
    try:
        yield lambda: [array for reference in here.values() if (array := reference()) is not None]
    finally:
        mode.level, mode.noted = level, noted


def _note(given: Sequence[Any], noted: dict[int, weakref.ref[Any]]) -> None:
    from tinygrad_llm.autograd import _owner

    for array in given:
        if backend.is_array(array):
            owner = _owner(array)  # a view is gone after the step, what it is a view of is not
            noted[id(owner)] = weakref.ref(owner)


# --- anomaly mode ---------------------------------------------------------------------------------


@contextlib.contextmanager
def detect_anomaly() -> Any:
    """Raise at the op and source line that made the first NaN or infinity, forward or backward.

    `with detect_anomaly(): loss = model(x); loss.backward()`. An op made it when its inputs were
    free of it and its output is not. Several times slower; for finding, not for training.

    Raises:
        FloatingPointError: names the op, the count, the place in the array and the source line.
    """
    before = mode.level
    mode.level = before | ANOMALY
    try:
        yield
    finally:
        mode.level = before


def _check_forward(node: Function, given: Sequence[Any], y: Any) -> None:
    node.site = _user_line()
    flaw = _new_flaw([y], given)
    if flaw is not None:
        raise FloatingPointError(f"{type(node).__name__} made {flaw} at {node.site}")


def _check_backward(node: Function, g: Any, gradients: Sequence[Any]) -> None:
    outputs = [_raw(x) for x, p in zip(gradients, node.parents, strict=True) if p is not None]
    flaw = _new_flaw([x for x in outputs if x is not None], [_raw(g)])
    if flaw is not None:
        where = f"; its forward ran at {node.site}" if node.site else ""
        raise FloatingPointError(f"the backward of {type(node).__name__} made {flaw}{where}")


def _raw(x: Any) -> Any:
    """The array inside a Tensor or a partial gradient."""
    x = getattr(x, "g", x)
    return x if x is None or backend.is_array(x) else getattr(x, "data", x)


def _new_flaw(outputs: Sequence[Any], inputs: Sequence[Any]) -> str | None:
    """'2 NaN of 6 elements, the first at (0, 1)' when the outputs have what no input had."""
    had_nan = any(_count(x, np.isnan) for x in inputs)
    had_inf = had_nan or any(_count(x, np.isinf) for x in inputs)
    for y in outputs:
        for word, test, excused in (("NaN", np.isnan, had_nan), ("infinity", np.isinf, had_inf)):
            if not excused and (found := _count(y, test)):
                first = tuple(int(i[0]) for i in test(np.atleast_1d(_host(y))).nonzero())
                return f"{word} in {found} of {y.size} elements, the first at {first},"
    return None


def _count(x: Any, test: Callable[[Any], Any]) -> int:
    if isinstance(x, float):
        x = np.float64(x)
    if not isinstance(getattr(x, "dtype", None), np.dtype) or not backend.is_float(x.dtype):
        return 0
    return int(test(_host(x)).sum())


def _host(x: Any) -> Any:
    return x if isinstance(x, np.ndarray | np.generic) else x.get()


_HERE = str(Path(__file__).parent)


def _user_line() -> str:
    """'train.py:42 in step: loss = x.log()': the innermost frame outside this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
        frame = frame.f_back
    code = frame.f_code
    line = linecache.getline(code.co_filename, frame.f_lineno).strip()
    return f"{Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}: {line}"
