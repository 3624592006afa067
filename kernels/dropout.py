"""Dropout whose mask is drawn again in the backward: nothing is stored.

    y = x ⊙ m / (1 − p)        dx = g ⊙ m / (1 − p)        mᵢ = (wordᵢ ≥ p · 2³²)

    wordᵢ = Philox4x32-10(key = seed, counter = offset + i // 4)[i % 4],  element i in C order

These are the words of `backend.philox` and the mask of `ops.dropout.keep_mask`, bit for bit: a step
on the CPU, in the interpreter and on a GPU drops the same elements. One counter gives four words,
so a program draws for four elements at a time. The mask depends on an element's place in the
array, not on how the array lies in memory, nor on the size of a block.

Bytes: 2·|x| forward and backward. FLOPs: ten rounds of four integer products and six other
instructions for four elements, about 30 an element: below what the bytes cost.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from collections.abc import Iterator

from tinygrad_llm.backend import Array, namespace
from tinygrad_llm.kernels.compile import Specimen
from tinygrad_llm.kernels.language import tl, triton
from tinygrad_llm.kernels.launch import cdiv, launch
from tinygrad_llm.kernels.layout import check_floats, needs_int64
from tinygrad_llm.kernels.tiles import element_offset, first_of, flattened, stretches
from tinygrad_llm.kernels.tune import Config, choose


def forward(
    x: Array, *, p: float, seed: int, offset: int | Array, config: Config | None = None
) -> tuple[Array, tuple[()]]:
    """y = x with each element zeroed with probability p, the others scaled by 1 / (1 − p).

    Args:
        x: any shape, float32, float16 or bfloat16, any strides.
        p: 0 ≤ p < 1.
        seed, offset: what `RandomStream.reserve(x.size)` gives. The offset may also be an int64
            array with one element, in the memory of x: a captured CUDA graph that is replayed reads
            it anew each time, where it would repeat a number, and with it the mask, for ever.
        config: {'BLOCK', 'num_warps'} instead of the tuned one; BLOCK counts four elements each.

    Returns:
        (y, ()): y is contiguous, of x's dtype and shape. The mask is a function of the options.
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout needs 0 ≤ p < 1, got {p}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"a seed is an integer from 0 to 2⁶⁴ − 1, got {seed}")
    check_floats("dropout", x)
    y = namespace(x).empty(x.shape, dtype=x.dtype)
    if x.size == 0:
        return y, ()
    size, scale = x.size, 1.0 / (1.0 - p)
    wide = needs_int64(x, y)
    (x,), sizes, (steps,) = flattened(x)
    least = min(round(p * 2**32), 2**32 - 1)  # the smallest word that keeps its element
    numbers = (_signed(seed, 64), _place(offset), _signed(least, 32))

    def run(config: Config) -> None:
        grid = cdiv(size, 4 * config["BLOCK"])
        launch(_dropout, grid, *(x, y, size, *sizes, *steps, *numbers, scale), WIDE=wide, **config)

    run(config or choose(_dropout, stretches(size, 4), x, (size,), run))
    return y, ()


def backward(
    g: Array, *, p: float, seed: int, offset: int | Array, config: Config | None = None
) -> Array:
    """dx = g ⊙ m / (1 − p): the same map of g, with the mask of the same seed and offset."""
    dx, _ = forward(g, p=p, seed=seed, offset=offset, config=config)
    return dx


def _place(offset: int | Array) -> int | Array:
    """The offset as a number that fits 64 bits with a sign, or the array that holds it."""
    if isinstance(offset, int):
        return _signed(offset % 2**64, 64)
    if offset.dtype != "int64" or offset.size != 1:
        raise TypeError(
            f"dropout needs an offset that is an integer, or an int64 array with one element, got "
            f"{offset.dtype}{offset.shape}"
        )
    return offset


def _signed(n: int, bits: int) -> int:
    """The same bits as a number with a sign: one type for all of them."""
    return n - 2**bits if n >= 2 ** (bits - 1) else n


# --- random words, which other kernels may draw, too ----------------------------------------------


@triton.jit
def words_of(seed, counter):
    """(w₀, w₁, w₂, w₃), uint32: the words 4i, …, 4i + 3 of a stream, for i = counter (64 bits)."""
    counter = counter.to(tl.uint64)
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    return tl.philox(seed, low, high, zero, zero)


# Seed, offset and threshold change from call to call: without this, each that happens to be 1 or a
# multiple of 16 would compile a kernel of its own.
@triton.jit(do_not_specialize=["seed", "offset", "least"])
def _dropout(
    x, y, size, n1, n2, n3, x0, x1, x2, x3, seed, offset, least, scale,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of (BLOCK, 4) elements: those of a row share a counter."""
    quad = first_of(BLOCK, WIDE) + tl.arange(0, BLOCK)
    if offset.dtype.is_ptr():
        offset = tl.load(offset)
    w0, w1, w2, w3 = words_of(seed, offset.to(tl.int64) + quad.to(tl.int64))
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [quad, i // 2, i % 2]
    words = tl.reshape(words, (4 * BLOCK,))
    i = first_of(4 * BLOCK, WIDE) + tl.arange(0, 4 * BLOCK)
    inside = i < size
    value = tl.load(x + element_offset(i, n1, n2, n3, x0, x1, x2, x3), mask=inside, other=0.0)
    keep = (words >= least.to(tl.uint32)).to(tl.float32)
    out = value.to(tl.float32) * keep * scale  # not `where`: a dropped ∞ is NaN, as in the op
    tl.store(y + i, out.to(y.dtype.element_ty), mask=inside)


# --- for the x-ray --------------------------------------------------------------------------------


def specimens(dtype: str) -> Iterator[Specimen]:
    """The residual branch of GPT-2, contiguous; and a transposed array, its offset in memory."""
    size, x, elements = (4 if dtype == "fp32" else 2), f"*{dtype}", 1024
    flat = {"x": x, "y": x, "size": 8192 * 768, "n1": 1, "n2": 1, "n3": 1}
    draw = {"seed": 1234, "offset": 2**33 + 5, "least": 429496730, "scale": 1.25}
    steps = {"x0": 1, "x1": 0, "x2": 0, "x3": 0}
    yield Specimen(
        "contiguous",
        _dropout,
        flat | draw | steps | {"WIDE": False, "BLOCK": elements // 4},
        bytes=2 * elements * size,
        flops=30 * elements,
    )
    yield Specimen(
        "transposed, 64 bits, the offset in memory",
        _dropout,
        flat
        | draw
        | {"n1": 8192, "x0": 1, "x1": 768, "x2": 0, "x3": 0, "offset": "*i64"}
        | {"WIDE": True, "BLOCK": elements // 4},
        bytes=2 * elements * size,
        flops=30 * elements,
    )
