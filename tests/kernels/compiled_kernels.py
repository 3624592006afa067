"""Small kernels for the tests of compile.py: each is good, or has one fault of its own."""

from collections.abc import Iterator

from tinygrad_llm.kernels.compile import Known, Specimen
from tinygrad_llm.kernels.language import tl, triton


@triton.jit
def _add(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n) + 1, mask=i < n)


@triton.jit
def _sum(x, total, mask, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i).to(tl.float32)
    if mask is not None:
        value = tl.where(tl.load(mask + i) != 0, value, 0.0)
    tl.atomic_add(total, tl.sum(value, 0))


@triton.jit
def _sine(x, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + i, tl.sin(tl.load(x + i).to(tl.float32)).to(x.dtype.element_ty))


@triton.jit
def _matmul(
    a, b, c, K, stride,
    M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK):
        left = tl.load(a + m[:, None] * stride + (start + k)[None, :])
        right = tl.load(b + (start + k)[:, None] * stride + n[None, :])
        total = tl.dot(left, right, total, input_precision=PRECISION)
    tl.store(c + m[:, None] * stride + n[None, :], total)


@triton.jit
def _two_lengths(x, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i) + tl.arange(0, 2 * BLOCK))


def specimens(dtype: str) -> Iterator[Specimen]:
    x = f"*{dtype}"
    add = {"x": x, "y": x, "n": 4096, "BLOCK": 1024}
    yield Specimen("add", _add, add, bytes=2048, flops=1024)
    yield Specimen("add, odd", _add, {**add, "n": 4097})
    yield Specimen("sum", _sum, {"x": x, "total": "*fp32", "mask": None, "BLOCK": 1024})
    yield Specimen("sum, masked", _sum, {"x": x, "total": "*fp32", "mask": "*u8", "BLOCK": 1024})
    yield Specimen("sine", _sine, {"x": x, "BLOCK": 1024})
    sizes = {"K": 512, "stride": 512, "M": 64, "N": 64, "BLOCK": 32, "PRECISION": "tf32"}
    matmul = {"a": x, "b": x, "c": "*fp32", **sizes}
    yield Specimen("matmul", _matmul, matmul)
    if dtype == "fp32":
        yield Specimen("matmul, exact", _matmul, {**matmul, "PRECISION": "ieee"})
        return
    few = {"maxnreg": 40}
    yield Specimen("few registers", _matmul, matmul, options=few, archs=(80,))
    spills = Known("spills", "we took its registers away", at_most=100_000)
    yield Specimen("few, known", _matmul, matmul, options=few, known=(spills,), archs=(80,))
    spills = Known("spills", "we took its registers away", at_most=1)
    yield Specimen("few, too few", _matmul, matmul, options=few, known=(spills,), archs=(80,))
    yield Specimen("stages", _matmul, {**matmul, "BLOCK": 128}, num_stages=8)
    small = {**matmul, "M": 16, "N": 16, "BLOCK": 16}
    yield Specimen("small", _matmul, small, archs=(75, 90))
    yield Specimen("two lengths", _two_lengths, {"x": x, "BLOCK": 1024})
    yield Specimen("an argument less", _two_lengths, {"x": x})
