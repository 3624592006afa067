"""Lesson 7: flash attention against naive attention.

What you will learn:
- attention in one kernel of thirty lines, which never writes the matrix of scores down;
- the bytes and FLOPs of both ways, counted while they run;
- what that means on an A100 and an H100: the roofline, and how long a text can be.

Builds on lessons 3 (attention), 5 (online softmax) and 6 (tiles). Letters: T queries and as many
keys, D size of a head; s scores, p weights. The programs run in Triton's interpreter.
"""

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np

os.environ.setdefault("TINYGRAD_LLM_KERNELS", "interpret")  # also where there is a GPU
try:
    from tinygrad_llm.kernels import attention, matmul, softmax
    from tinygrad_llm.kernels.compile import Specimen
    from tinygrad_llm.kernels.language import tl, triton
    from tinygrad_llm.kernels.launch import cdiv, launch
except ImportError as error:
    print(error)  # says what to install
    sys.exit(0)


@triton.jit
def flash(
    q, k, v, y, T, scale,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """A program answers ROWS queries, against KEYS keys at a time.

    Online as in lesson 5, but what is summed are rows of V: y = Σ e^(s − m) v / Σ e^(s − m). If a
    tile of scores raises m, both sums shrink by e^(m_old − m). The scores live in registers.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, D)[None, :]
    queries = tl.load(q + row * D + column, mask=row < T, other=0.0)
    y_sum = tl.zeros([ROWS, D], tl.float32)
    s_sum = tl.zeros([ROWS, 1], tl.float32)
    m = tl.full([ROWS, 1], -1e30, tl.float32)  # not −∞: −∞ − −∞ would be NaN
    last = tl.minimum(T, (tl.program_id(0) + 1) * ROWS) if CAUSAL else T  # behind is the future
    for start in range(0, last, KEYS):
        at = start + tl.arange(0, KEYS)[:, None]
        keys = tl.load(k + at * D + column, mask=at < T, other=0.0)
        values = tl.load(v + at * D + column, mask=at < T, other=0.0)
        s = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        key = start + tl.arange(0, KEYS)[None, :]
        seen = (key < T) & (key <= row) if CAUSAL else key < T
        s = tl.where(seen, s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1, keep_dims=True))
        p, shrink = tl.exp(s - m_new), tl.exp(m - m_new)
        s_sum = s_sum * shrink + tl.sum(p, 1, keep_dims=True)
        y_sum = tl.dot(p.to(values.dtype), values, y_sum * shrink, input_precision="ieee")
        m = m_new
    tl.store(y + row * D + column, y_sum / s_sum, mask=row < T)


def naive(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> np.ndarray:
    """Three kernels of the library, with s and p, both (T, T), in memory between them."""
    s, _ = matmul.forward(q, k.T)
    p, _ = softmax.forward(s, scale=q.shape[1] ** -0.5, causal=causal)
    return matmul.forward(p, v)[0]


def counted(run: Callable[[], np.ndarray]) -> tuple[np.ndarray, int, int]:
    """(what run() returns, the bytes that its kernels move, the FLOPs of their products)"""
    from tinygrad_llm.kernels import interpret

    sizes, flops, builder = [], [], interpret.interpreter.InterpreterBuilder
    check, dot = interpret._check, builder.create_dot

    def access(pointers: Any, mask: Any, itemsize: int, verb: str) -> None:
        sizes.append(np.count_nonzero(mask) * itemsize)
        check(pointers, mask, itemsize, verb)  # which is called before memory is touched

    def product(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        flops.append(2 * a.data.size * b.data.shape[-1])
        return dot(self, a, b, *rest)

    with patch.object(interpret, "_check", access), patch.object(builder, "create_dot", product):
        return run(), sum(sizes), sum(flops)


def count(rng: np.random.Generator) -> None:
    T, D, ROWS = 256, 32, 64
    q, k, v = rng.normal(size=(3, T, D)).astype(np.float32)

    def ours(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> np.ndarray:
        y, n, scale = np.full_like(q, np.nan), len(q), D**-0.5
        launch(flash, cdiv(n, ROWS), q, k, v, y, n, scale, D=D, ROWS=ROWS, KEYS=32, CAUSAL=causal)
        return y

    print(f"1. {T} queries and keys, a head of {D}, float32: moved, multiplied, off by")
    for causal in (False, True):
        s = q @ k.T / np.sqrt(D) + np.triu(np.full((T, T), -np.inf if causal else 0.0), 1)
        p = np.exp(s - s.max(axis=1, keepdims=True))
        walks = 1 + ROWS / T if causal else 2  # twice the mean share of keys that a tile needs
        claims = {"naive": 4 * T * D + 4 * T * T, "flash": 2 * T * D + T // ROWS * walks * T * D}
        for name, way in (("naive", naive), ("flash", ours)):
            y, moved, flops = counted(partial(way, q, k, v, causal))
            error = np.abs(y - p / p.sum(axis=1, keepdims=True) @ v).max()
            print(f"   {name} {'causal' * causal:6}", end="")
            print(f" {moved // 1024:5} KiB  {flops / 1e6:.1f} MFLOP  {error:.0e}")
            assert moved == 4 * claims[name]
            assert flops == 4 * T * T * D * (walks / 2 if name == "flash" else 1)
            assert error < 2e-6
    q, k, v = q[:77], k[:77], v[:77]  # a number that no tile divides
    assert np.abs(ours(q, k, v, True) - attention.forward(q, k, v, causal=True)[0]).max() < 2e-6


def roofline() -> None:
    """Time ≥ FLOPs / (FLOP/s), and ≥ bytes / (bytes/s): the longer of the two is the roof."""
    T, D, H = 8192, 128, 16
    flops, scores, strip = 4 * T * T * D * H, T * T * H * 2, T * D * H * 2  # bfloat16: 2 bytes
    # NVIDIA's datasheets of the A100 80 GB SXM and H100 SXM: bfloat16 without sparsity; bytes/s.
    gpus = {"A100": (312e12, 2.039e12), "H100": (989e12, 3.35e12)}
    moved = {"naive": 4 * scores + 4 * strip, "flash": 4 * strip}  # K and V wait in the L2 cache
    print(f"\n2. {T} queries and keys, {H} heads of {D}, bfloat16: {flops / 1e9:.0f} GFLOP")
    for name, size in moved.items():
        print(f"   {name}: {size / 2**20:6.0f} MiB, {flops / size:6.1f} FLOPs a byte")
        for gpu, (rate, bandwidth) in gpus.items():
            times = {"multiplying": flops / rate, "memory": size / bandwidth}
            roof = max(times, key=lambda what: times[what])
            print(f"      {gpu}: at least {1e3 * times[roof]:.2f} ms, for {roof}")
            assert roof == ("memory" if name == "naive" else "multiplying")
    # Shah et al., "FlashAttention-3", 2024: an H100 makes 3.9e12 exponentials a second.
    share = (T * T * H / 3.9e12) / (flops / 989e12)
    print(f"   On an H100, e^s takes {share:.0%} of the time of the products: do both at once.")
    print("\n3. The memory for s and p, which flash attention does not need:")
    for T in (1024, 8192, 65536):
        print(f"   T {T:5}: {4 * T * T * H / 2**30:8.3f} GiB; y has {2 * T * D * H / 2**30:.3f}")
    print("   On a GPU: CuPy's arrays to the same launch(), in bfloat16 for the tensor cores.")


def specimens(dtype: str) -> Iterator[Specimen]:
    """`tinygrad-llm xray examples/07_flash_attention.py`: the kernel as a GPU would run it."""
    values = {"T": 4096, "scale": 0.125, "D": 64, "ROWS": 64, "KEYS": 32, "CAUSAL": True}
    yield Specimen("flash", flash, dict.fromkeys("qkvy", f"*{dtype}") | values)


if __name__ == "__main__":
    count(np.random.default_rng(0))
    roofline()
