"""What a GPU has to tell of a step, read when it is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tinygrad_llm.backend import device_of, float32, is_array, namespace
from tinygrad_llm.train.parallel import Part
from tinygrad_llm.train.run import Record


class Late:
    """A step of which the loss and the norm may not be known yet.

    Args:
        record: its line, to which they go.
        numbers: (loss, norm), arrays of one number or floats.
        parts, random: what it was computed from, to find out what went wrong.
    """

    def __init__(
        self, record: Record, numbers: tuple[Any, Any], parts: Sequence[Part], random: Any
    ) -> None:
        self.record, self.parts, self.random = record, parts, random
        self.due = False  # whether the line is complete but for them
        self._read = read_later(numbers)

    def read(self) -> tuple[float, float]:
        """(loss, norm), waited for."""
        loss, norm = self._read()
        return loss, norm


def read_later(numbers: Sequence[Any]) -> Callable[[], list[float]]:
    """Begin to copy the numbers, arrays of one each, from a GPU; the call returned waits for them.

    One copy of a few bytes into pinned memory, behind what the GPU has to do so far, and no wait
    until somebody asks. Floats and NumPy arrays are there already.
    """
    on_gpu = [x for x in numbers if is_array(x) and device_of(x) != "cpu"]
    if not on_gpu:
        found = [float(np.asarray(x).reshape(())) for x in numbers]
        return lambda: found
    import cupyx  # pyright: ignore[reportMissingImports]

    xp = namespace(on_gpu[0])
    together = xp.concatenate([xp.asarray(x, dtype=float32).reshape(1) for x in numbers])
    host = cupyx.empty_pinned(len(numbers), np.float32)
    together.get(out=host, blocking=False)
    copied = xp.cuda.Event(disable_timing=True)
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return host.tolist()

    return read
