"""Lesson 6: a matmul kernel, on a ladder of five.

What you will learn:
- why a product made in tiles reads 16 times less than one made element by element: counted;
- why the order of the programs decides how much comes from memory: counted, too;
- what pipelining and tensor cores are, and where the x-ray of the compiled kernel shows them.

y = A B with A (M, K), B (K, N): 2·M·N·K FLOPs. The programs run on the CPU, in Triton's
interpreter; the x-ray is of what the compiler makes of them for an H100.
"""

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np

os.environ.setdefault("TINYGRAD_LLM_KERNELS", "interpret")  # also where there is a GPU
try:
    from tinygrad_llm.kernels import matmul
    from tinygrad_llm.kernels.compile import Specimen, xray
    from tinygrad_llm.kernels.language import tl, triton
    from tinygrad_llm.kernels.launch import cdiv, launch
except ImportError as error:
    print(error)  # says what to install
    sys.exit(0)


@triton.jit
def element(a, b, y, M, N, K, BLOCK: tl.constexpr):
    """Rung 1: a program makes one number of y, from a row of A and a column of B."""
    row, column = tl.program_id(0) // N, tl.program_id(0) % N
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        left = tl.load(a + row * K + k, mask=k < K, other=0.0)
        products += left * tl.load(b + k * N + column, mask=k < K, other=0.0)
    tl.store(y + row * N + column, tl.sum(products, 0))


@triton.jit
def tiled(a, b, y, M, N, K, TILE: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr):
    """Rung 2: a program makes TILE × TILE numbers. Each number it reads serves TILE of them.

    Rung 3: neighbours in time make neighbouring tiles. The programs go down GROUP tiles, then one
    to the right; with GROUP = 1 along the rows. Rungs 4 and 5 are this kernel, compiled otherwise.
    """
    down, across = tl.cdiv(M, TILE), tl.cdiv(N, TILE)
    first = tl.program_id(0) // (GROUP * across) * GROUP
    height, inside = tl.minimum(down - first, GROUP), tl.program_id(0) % (GROUP * across)
    row = (first + inside % height) * TILE + tl.arange(0, TILE)[:, None]
    column = inside // height * TILE + tl.arange(0, TILE)[None, :]
    total = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, K, INNER):
        k, kt = start + tl.arange(0, INNER)[None, :], start + tl.arange(0, INNER)[:, None]
        left = tl.load(a + row * K + k, mask=(row < M) & (k < K), other=0.0)
        right = tl.load(b + kt * N + column, mask=(kt < K) & (column < N), other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")  # float32 is not rounded first
    tl.store(y + row * N + column, total, mask=(row < M) & (column < N))


RUNGS: dict[str, tuple[Any, str, dict[str, int]]] = {
    "1 one element": (element, "fp32", {"BLOCK": 128}),
    "2 tiles": (tiled, "fp32", {"TILE": 64, "INNER": 16, "GROUP": 1}),
    "3 grouped": (tiled, "fp32", {"TILE": 64, "INNER": 16, "GROUP": 8}),
    # 4 fetches the next strips of A and B while it multiplies; 5 takes units made for tiles.
    "4 pipelined": (tiled, "fp32", {"TILE": 64, "INNER": 16, "GROUP": 8}),
    "5 tensor cores": (tiled, "bf16", {"TILE": 128, "INNER": 64, "GROUP": 8}),
}


def specimens(dtype: str) -> Iterator[Specimen]:
    """What the x-ray compiles: the rungs of this dtype, for a product of 4096 × 4096 matrices."""
    sizes = {"a": f"*{dtype}", "b": f"*{dtype}", "y": "*fp32", "M": 4096, "N": 4096, "K": 4096}
    for name, (kernel, its_dtype, constants) in RUNGS.items():
        if its_dtype == dtype:
            tile = constants.get("TILE", 1)
            yield Specimen(
                *(name, kernel, {**sizes, **constants}),
                num_warps=8 if tile == 128 else 4,
                num_stages=3 if name > "4" else 1,  # 1: nothing is fetched ahead
                bytes=2 * tile * 4096 * (2 if dtype == "bf16" else 4),  # a strip of A, one of B
                flops=2 * tile * tile * 4096,
            )


def reads(run: Callable[[], object], together: int = 1) -> int:
    """The bytes that are read, when programs that run `together` fetch an address only once."""
    from tinygrad_llm.kernels import interpret

    fetched, check, builder = set(), interpret._check, interpret.interpreter.interpreter_builder

    def count(pointers: Any, mask: Any, itemsize: int, verb: str) -> None:
        if verb == "reads":
            wave = builder.grid_idx[0] // together
            fetched.update((wave, address) for address in pointers[mask].tolist())
        check(pointers, mask, itemsize, verb)  # which is called before memory is touched

    with mock.patch.object(interpret, "_check", count):
        run()
    return 4 * len(fetched)


def count_reads(rng: np.random.Generator) -> None:
    def product(M: int, N: int, K: int, together: int, kernel: Any, **constants: Any) -> int:
        a, b = (rng.normal(size=size).astype(np.float32) for size in ((M, K), (K, N)))
        y, tile = np.full((M, N), np.nan, np.float32), constants.get("TILE", 1)
        grid = cdiv(M, tile) * cdiv(N, tile)
        size = reads(lambda: launch(kernel, grid, a, b, y, M, N, K, **constants), together)
        for result in (y, matmul.forward(a, b)[0]):
            np.testing.assert_allclose(result, a.astype(float) @ b, atol=1e-5)
        return size

    print("1. What the programs of a (16, 64) by (64, 16) product read; the matrices have 8 KiB:")
    alone = product(16, 16, 64, 1, element, BLOCK=64)
    tiles = product(16, 16, 64, 1, tiled, TILE=16, INNER=16, GROUP=1)
    print(f"   one element a program {alone // 1024} KiB, a tile of 16 × 16 {tiles // 1024} KiB")
    assert alone == 16 * tiles == 4 * 16 * 16 * 2 * 64
    product(37, 50, 41, 1, tiled, TILE=16, INNER=16, GROUP=2)  # sizes that no tile divides

    print("\n2. 9 × 9 tiles of a (144, 16) by (16, 144) product, by 9 programs at a time:")
    for group, strips in ((1, 1 + 9), (3, 3 + 3)):
        size = product(144, 144, 16, 9, tiled, TILE=16, INNER=16, GROUP=group)
        print(f"   GROUP {group}: {size // 1024} KiB, as 9 tiles need {strips} strips of A and B")
        assert size == 9 * strips * 16 * 16 * 4


def look_inside() -> None:
    print("\n3. The x-ray, for an H100, and the most it could do were all read from memory:")
    peak = {"fp32": 67.0, "bf16": 989.0}  # TFLOP/s; with 3.35 TB/s NVIDIA's datasheet, H100 SXM
    reports = list(xray([__file__], archs=[90], dtypes=["fp32", "bf16"]))
    for x in reports:
        intensity = x.flops / x.bytes
        print(
            f"   {x.specimen:14} {x.registers:3} registers, {x.shared // 1024:2} KiB shared, "
            f"loads of {max(x.loads):2} bytes, {'+'.join(x.tensor_cores) or 'no tensor cores'}\n"
            f"{intensity:23.4g} FLOPs a byte: {min(peak[x.dtype], 3.35 * intensity):.3g} TFLOP/s"
        )
        assert bool(x.tensor_cores) == (x.dtype == "bf16"), x.verdict
    assert reports[3].shared > reports[2].shared
    print(f"   132 programs in groups of 8 share 25 strips, not 264: {64 * 264 / 25:.0f} a byte.")
    print(f"   The peak takes {989 / 3.35:.0f}. On a GPU, launch() takes CuPy's arrays instead.")


if __name__ == "__main__":
    count_reads(np.random.default_rng(0))
    look_inside()
