"""Model-FLOPs utilisation: the share of the machine's peak that training gets out of it.

    mfu = tokens per second · FLOPs per token / peak FLOPs per second

The numerator is what the model needs, by its formula (`GPT.flops_per_token`), not what was run: who
computes more than that, such as with gradient checkpointing, has a lower figure. The peak is not a
number from a data sheet but what a large matrix product reaches here and now, in the dtype that is
trained in. The share can come near 1 only where nearly all the time goes to matrix products.

Chowdhery et al., "PaLM: scaling language modeling with pathways", 2022, appendix B.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from tinygrad_llm import backend

_LONG_ENOUGH = 0.004  # seconds: a product that takes this long drowns the cost of the call
_LARGEST = 4096  # rows; three such matrices are 200 MB


@dataclass(frozen=True)
class Utilisation:
    """What a token costs and what the machine could do: `mfu(tokens, seconds)` compares."""

    flops_per_token: int
    peak: float  # FLOP/s

    def mfu(self, tokens: int, seconds: float) -> float:
        """The share of the peak, 1 being all of it; measured, so that it may be a little above."""
        return tokens * self.flops_per_token / seconds / self.peak


@cache
def measured_peak(device: str = "cpu", seconds: float = 0.15, dtype: str = "float32") -> float:
    """2 n³ / shortest time of C = A B: the FLOP/s of a product of n × n matrices in `dtype`.

    The shortest, since whatever else the machine does can only make it longer.

    n doubles from 256 until a product takes 4 ms or n is 4096; then it is repeated until about
    `seconds` are used up, three times at least. Once per process and device: later calls give the
    same number, so that the runs of one command have the same denominator. Draws nothing from the
    random stream.
    """
    until = time.perf_counter() + seconds
    product = _product if dtype == "float32" else partial(_product, dtype=dtype)
    n, took = 256, min(product(256, device, repeat=5))  # the first one wakes the threads
    while took < _LONG_ENOUGH and n < _LARGEST:
        n *= 2
        took = min(product(n, device, repeat=2))
    left = max(0.0, until - time.perf_counter())
    times = product(n, device, repeat=min(1000, max(3, round(left / took))))
    return 2 * n**3 / min(times)


def _product(n: int, device: str, repeat: int, dtype: str = "float32") -> list[float]:
    """The seconds that each of `repeat` products took, a GPU's work waited for."""
    numbers = np.linspace(-1, 1, n * n, dtype=np.float32)  # zeros would be too easy
    a: Any = backend.to_device(numbers.astype(backend.as_dtype(dtype)).reshape(n, n), device)
    xp = backend.namespace(a)
    on_gpu = device != "cpu"
    times = []
    with a.device if on_gpu else nullcontext():
        wait = xp.cuda.get_current_stream().synchronize if on_gpu else lambda: None
        out = xp.empty_like(a)
        for _ in range(repeat):
            wait()
            began = time.perf_counter()
            if dtype == "bfloat16":  # CuPy multiplies it only into new memory
                out = a @ a
            else:
                xp.matmul(a, a, out=out)
            wait()
            times.append(time.perf_counter() - began)
    return times
