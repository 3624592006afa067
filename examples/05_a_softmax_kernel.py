"""Lesson 5: a softmax kernel, on a ladder of three.

What you will learn:
- what a kernel is: one program, written once, that runs many times, each time on another row;
- that softmax costs what it moves: four plain kernels, one fused kernel, and the bytes of each;
- the "online" softmax, which goes through a row of any length in blocks and reads it only twice.

The programs run here on the CPU, one after the other, in Triton's interpreter. Letters: R rows,
C columns, |x| the bytes of them all; m the largest of a row, s the sum of its e^(x − m).
"""

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np

os.environ.setdefault("TINYGRAD_LLM_KERNELS", "interpret")  # also where there is a GPU
try:
    from tinygrad_llm.kernels import softmax
    from tinygrad_llm.kernels.compile import Specimen
    from tinygrad_llm.kernels.language import tl, triton
    from tinygrad_llm.kernels.launch import launch
except ImportError as error:
    print(error)  # says what to install
    sys.exit(0)


# Rung 1: one kernel for every line of NumPy. `tl.program_id(0)` is the number of this program, and
# so of its row; a pointer plus a range of numbers is a range of addresses. A range has 2^k numbers:
# the mask keeps a program from touching what lies behind its row. A constexpr is compiled in.
@triton.jit
def reduce_row(x, result, C, SUM: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    values = tl.load(x + row * C + column, mask=column < C, other=0.0 if SUM else -float("inf"))
    tl.store(result + row, tl.sum(values, 0) if SUM else tl.max(values, 0))


@triton.jit
def exp_minus(x, m, e, C, BLOCK: tl.constexpr):
    at, inside = tl.program_id(0) * C + tl.arange(0, BLOCK), tl.arange(0, BLOCK) < C
    shifted = tl.load(x + at, mask=inside) - tl.load(m + tl.program_id(0))
    tl.store(e + at, tl.exp(shifted), mask=inside)


@triton.jit
def divide(e, s, y, C, BLOCK: tl.constexpr):
    at, inside = tl.program_id(0) * C + tl.arange(0, BLOCK), tl.arange(0, BLOCK) < C
    tl.store(y + at, tl.load(e + at, mask=inside) / tl.load(s + tl.program_id(0)), mask=inside)


# Rung 2: the four in one. Between the only load and the only store all stays in registers.
@triton.jit
def fused(x, y, C, BLOCK: tl.constexpr):
    at, inside = tl.program_id(0) * C + tl.arange(0, BLOCK), tl.arange(0, BLOCK) < C
    values = tl.load(x + at, mask=inside, other=-float("inf"))
    e = tl.exp(values - tl.max(values, 0))  # e^−∞ = 0: what is masked adds nothing
    tl.store(y + at, e / tl.sum(e, 0), mask=inside)


# Rung 3: a row too long for the registers, in blocks. s is a sum of e^(x − m) for the m known so
# far; if a block brings a larger one, e^(x − m_new) = e^(x − m) · e^(m − m_new) mends all terms at
# once. (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.)
@triton.jit
def online(x, y, C, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    m, s = -float("inf"), 0.0
    for start in range(0, C, BLOCK):
        inside = start + column < C
        values = tl.load(x + row * C + start + column, mask=inside, other=-float("inf"))
        m_new = tl.maximum(m, tl.max(values, 0))
        s = s * tl.exp(m - m_new) + tl.sum(tl.exp(values - m_new), 0)
        m = m_new
    for start in range(0, C, BLOCK):
        at, inside = row * C + start + column, start + column < C
        tl.store(y + at, tl.exp(tl.load(x + at, mask=inside) - m) / s, mask=inside)


def counted(kernels: Callable[[], object]) -> int:
    """The bytes that all programs of these launches read and write."""
    from tinygrad_llm.kernels import interpret

    sizes, check = [], interpret._check  # which the interpreter calls before it touches memory

    def count(pointers: Any, mask: Any, itemsize: int, verb: str) -> None:
        sizes.append(np.count_nonzero(mask) * itemsize)
        check(pointers, mask, itemsize, verb)

    with mock.patch.object(interpret, "_check", count):
        kernels()
    return sum(sizes)


def main() -> None:
    R, C, whole, part = 8, 1000, 1024, 256
    noise = np.random.default_rng(0).normal(size=(R, C))
    x = (1000 + np.linspace(0, 3, C) + noise).astype(np.float32)  # e^1000 would be ∞
    y, e, m, s = np.empty_like(x), np.empty_like(x), *np.empty((2, R), np.float32)
    expected = np.exp(x - x.max(axis=1, keepdims=True).astype(np.float64))
    expected /= expected.sum(axis=1, keepdims=True)

    def naive() -> None:
        launch(reduce_row, R, x, m, C, SUM=False, BLOCK=whole)  # R programs: one for each row
        launch(exp_minus, R, x, m, e, C, BLOCK=whole)
        launch(reduce_row, R, e, s, C, SUM=True, BLOCK=whole)
        launch(divide, R, e, s, y, C, BLOCK=whole)

    print(f"1. softmax of {R} rows of {C} numbers, |x| = {x.nbytes} bytes:")
    rungs = {
        "naive": (naive, 6 * x.nbytes + 4 * m.nbytes),
        "fused": (lambda: launch(fused, R, x, y, C, BLOCK=whole), 2 * x.nbytes),
        "online": (lambda: launch(online, R, x, y, C, BLOCK=part), 3 * x.nbytes),
        "the library's": (lambda: np.copyto(y, softmax.forward(x)[0]), 2 * x.nbytes),
    }
    for name, (run, claimed) in rungs.items():
        y[:] = np.nan
        moved, error = counted(run), np.abs(y - expected).max()
        print(f"   {name:13} {moved:7} bytes = {moved / x.nbytes:.2f} |x|; error {error:.0e}")
        assert moved == claimed
        assert error < 1e-6

    print(f"\n2. The first row online, {part} numbers at a time:")
    m, s = -np.inf, 0.0
    for block in np.split(x[0].astype(np.float64), range(part, C, part)):
        shrink, m = np.exp(m - max(m, block.max())), max(m, block.max())
        s = s * shrink + np.exp(block - m).sum()
        print(f"   m {m:.3f}: the s of before times {shrink:.4f}; s is now {s:.3f}")
    assert np.isclose(1 / s, expected[0].max(), rtol=1e-12)  # y = e^(x − m) / s, largest at x = m

    # Bytes per second as in NVIDIA's datasheets of the A100 80 GB SXM and the H100 SXM.
    print("\n3. On a GPU, 32768 rows of 4096 numbers in bfloat16, |x| = 256 MiB, at the least:")
    for name, walks in (("naive", 6), ("fused", 2), ("online", 3)):
        a100, h100 = (1e6 * walks * 2**28 / speed for speed in (2.039e12, 3.35e12))
        print(f"   {name:6}  A100 {a100:4.0f} µs  H100 {h100:4.0f} µs")
    print("   There thousands of programs run at once; launch() then takes the arrays of CuPy.")


def specimens(dtype: str) -> Iterator[Specimen]:
    """`tinygrad-llm xray examples/05_a_softmax_kernel.py`: 32768 numbers in one piece spill."""
    arguments = {"x": f"*{dtype}", "y": f"*{dtype}", "C": 32768}
    for kernel, BLOCK in ((fused, 32768), (online, 4096)) if dtype == "fp32" else ():
        yield Specimen(kernel.__name__, kernel, {**arguments, "BLOCK": BLOCK})


if __name__ == "__main__":
    main()
