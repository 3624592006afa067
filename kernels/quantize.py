"""Products with weights of 8 or 4 bits, which become numbers again only in registers.

    y = x Ŵᵀ + b        dx = g Ŵ        Ŵ[n, k] = (q[n, k] − z[n, ⌊k/G⌋]) · s[n, ⌊k/G⌋]

q are integers: of 8 bits −127 … 127, without zero points z; of 4 bits 0 … 15, two to a byte, the
even k in its low half, with z = 8 where none are given. Each scale s belongs to G neighbours of a
row, or to the whole row. Ŵ is rounded to x's dtype, so that both products, and `ops/quantize.py`,
compute with the very same matrix; the sums are float32.

2·M·N·K FLOPs. For the few rows of decoding all time goes into reading the weights: N·K·bits/8
bytes, and 4·N·K/G for float32 scales, against 2·N·K of a half: at 4 bits, G = 64, 3.6 times fewer.
Up to 4 rows, a program multiplies and adds without tensor cores, row by row (the weights come from
the level-2 cache after the first); then tiles of 16 rows keep the tensor cores at least partly
busy. Tiles are computed transposed, Ŵ xᵀ: the instructions want 64 rows on their left at least, and
the weights always have them. For many rows the integers cost what they save in memory: about two
instructions a weight and tile.

Frantar et al., "GPTQ", 2022, and Dettmers et al., "QLoRA", 2023, use such products so.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from tinygrad_llm.backend import Array, int8, namespace, uint8
from tinygrad_llm.kernels.compile import Specimen
from tinygrad_llm.kernels.language import INTERPRETED, tl, triton
from tinygrad_llm.kernels.launch import cdiv, launch, next_power_of_2
from tinygrad_llm.kernels.layout import check_floats, needs_int64, strides
from tinygrad_llm.kernels.tune import Config, choose

PRECISIONS = ("ieee", "tf32")
Saved = tuple[Array, Array, Array, Array | None]


def forward(
    x: Array,
    packed: Array,
    scales: Array,
    zeros: Array | None = None,
    bias: Array | None = None,
    *,
    group_size: int = 0,
    precision: str = "ieee",
    config: Config | None = None,
) -> tuple[Array, Saved]:
    """y = x Ŵᵀ + b.

    Args:
        x: (M, K) float32, float16 or bfloat16, any strides.
        packed: (N, K) int8, or (N, ⌈K/2⌉) uint8 for 4 bits.
        scales: (N, ⌈K/G⌉), float.
        zeros: of scales' shape, uint8; with 4 bits only.
        bias: (N,).
        group_size: G, a power of two of at least 16; 0: the whole row.
        precision: of float32 products, "ieee" or "tf32".
        config: {'VECTOR', 'ROWS', 'COLUMNS', 'INNER', 'num_warps', 'num_stages'} instead of the
            tuned one; INNER is a multiple or a divisor of G.

    Returns:
        (y, saved): y (M, N), contiguous, of x's dtype. saved holds the weights, nothing of x.
    """
    _check(x, packed, scales, zeros, bias, group_size, precision)
    y = namespace(x).empty((len(x), len(packed)), dtype=x.dtype)
    weights = _contiguous(packed, scales, zeros)
    if y.size:
        _launch_forward(x, weights, bias, y, group_size, precision, config)
    return y, (_stand_in(x), *weights)


def backward(
    g: Array,
    x: Array,
    packed: Array,
    scales: Array,
    zeros: Array | None = None,
    *,
    group_size: int = 0,
    precision: str = "ieee",
    config: Config | None = None,
) -> Array:
    """dx = g Ŵ: all that a frozen weight has to say in training.

    Args:
        g: the gradient of y, (M, N), any strides.
        x, packed, scales, zeros: what `forward` saved; the options are those of the forward. In
            `config` there is no VECTOR.
    """
    _check(x, packed, scales, zeros, None, group_size, precision)
    check_floats("quantize", g)
    if g.shape != (len(x), len(packed)):
        raise ValueError(
            f"quantize needs a gradient of the shape {(len(x), len(packed))}, got {g.shape}"
        )
    dx = namespace(g).empty(x.shape, dtype=x.dtype)
    if dx.size:
        weights = _contiguous(packed, scales, zeros)
        _launch_backward(g, weights, dx, group_size, precision, config)
    return dx


def _check(
    x: Array,
    packed: Array,
    scales: Array,
    zeros: Array | None,
    bias: Array | None,
    group_size: int,
    precision: str,
) -> None:
    check_floats("quantize", x, scales, *([] if bias is None else [bias]))
    if packed.dtype not in (int8, uint8) or packed.ndim != 2:
        raise TypeError(
            f"quantize takes packed weights (N, K) of int8, or (N, ⌈K/2⌉) of uint8 for 4 bits, got "
            f"{packed.dtype}{packed.shape}"
        )
    if group_size and (group_size < 16 or group_size & (group_size - 1)):
        raise ValueError(
            f"a group of quantize is a power of two of at least 16, or 0 for the row, got "
            f"{group_size}"
        )
    inner = x.shape[-1]
    width = inner if packed.dtype == int8 else cdiv(inner, 2)
    if x.ndim != 2 or packed.shape[1] != width:
        raise ValueError(
            f"quantize takes x (M, K) and weights of as many columns, {width} in memory, got "
            f"{x.shape} and {packed.shape}"
        )
    shape = (len(packed), cdiv(inner, group_size) if group_size else 1)
    if scales.shape != shape:
        raise ValueError(f"quantize needs scales of the shape {shape}, got {scales.shape}")
    if zeros is not None and (packed.dtype == int8 or zeros.dtype != uint8 or zeros.shape != shape):
        raise ValueError(
            f"quantize takes zero points with 4 bits only, as uint8{shape}, got "
            f"{zeros.dtype}{zeros.shape} with {packed.dtype}"
        )
    if bias is not None and bias.shape != packed.shape[:1]:
        raise ValueError(f"quantize needs a bias {packed.shape[:1]}, got {bias.shape}")
    if precision not in PRECISIONS:
        raise ValueError(f"quantize's precision is 'ieee' or 'tf32', got {precision!r}")


def _contiguous(*arrays: Array | None) -> tuple[Any, Any, Any]:
    packed, scales, zeros = (a if a is None else namespace(a).ascontiguousarray(a) for a in arrays)
    return packed, scales, zeros


def _stand_in(x: Array) -> Array:
    """An array of x's shape and dtype, with the memory of one element."""
    xp = namespace(x)
    return xp.broadcast_to(xp.empty((), dtype=x.dtype), x.shape)


def _launch_forward(
    x: Array,
    weights: tuple[Any, ...],
    bias: Array | None,
    y: Array,
    group_size: int,
    precision: str,
    config: Config | None,
) -> None:
    (m, k), n = x.shape, y.shape[1]
    bias_step = 0 if bias is None else strides(bias)[0]
    bits = _bits(weights[0])

    def run(config: Config) -> None:
        config = dict(config)
        vector, columns = config.pop("VECTOR"), cdiv(n, config["COLUMNS"])
        sizes = (m, n, k, weights[0].shape[1], weights[1].shape[1])
        arguments = (x, *weights, bias, y, *sizes, *strides(x), bias_step)
        constants = _groups(bits, group_size, config)
        constants |= {"EVEN": k % config["INNER"] == 0, "WIDE": needs_int64(x)}
        if vector:
            config.pop("ROWS")
            launch(_dot_rows, (columns, m), *arguments, **constants, **config)
        else:
            tiles = columns * cdiv(m, config["ROWS"])
            launch(_multiply, tiles, *arguments, PRECISION=precision, **constants, **config)

    found = _candidates(m, n, k, _kind(x, precision))
    run(config or _chosen(_multiply, found, x, (m, n, k), run, bits, group_size, precision))


def _launch_backward(
    g: Array,
    weights: tuple[Any, ...],
    dx: Array,
    group_size: int,
    precision: str,
    config: Config | None,
) -> None:
    (m, k), n = dx.shape, g.shape[1]
    bits = _bits(weights[0])

    def run(config: Config) -> None:
        launch(
            _multiply_back,
            cdiv(m, config["ROWS"]) * cdiv(k, config["INNER"]),
            *(g, *weights, dx, m, n, k, weights[0].shape[1], weights[1].shape[1], *strides(g)),
            PRECISION=precision,
            **_groups(bits, group_size, config),
            **config,
        )

    found = _back_candidates(m, n, k, _kind(dx, precision))
    run(config or _chosen(_multiply_back, found, dx, (m, n, k), run, bits, group_size, precision))


def _bits(packed: Array) -> int:
    return 8 if packed.dtype == int8 else 4


def _groups(bits: int, group_size: int, config: Config) -> dict[str, Any]:
    parts = max(1, config["INNER"] // group_size) if group_size else 1
    return {"BITS": bits, "GROUP": group_size, "PARTS": parts}


def _chosen(
    kernel: Any,
    found: tuple[Config, ...],
    x: Array,
    sizes: tuple[int, ...],
    run: Any,
    bits: int,
    group: int,
    precision: str,
) -> Config:
    if len(found) == 1:
        return found[0]
    return choose(kernel, found, x, sizes, run, bits=bits, group=group, precision=precision)


def _kind(x: Array, precision: str) -> str:
    return "half" if x.dtype.itemsize == 2 else precision


# --- which configuration --------------------------------------------------------------------------

# (ROWS, COLUMNS, INNER, num_warps, num_stages), the likeliest first
_TILES = {
    "half": (
        (128, 128, 64, 8, 3),
        (128, 64, 64, 4, 3),
        (64, 64, 64, 4, 4),
        (32, 64, 64, 4, 4),
    ),
    "tf32": ((128, 64, 32, 4, 3), (64, 64, 32, 4, 3), (32, 64, 32, 4, 3)),
    "ieee": ((64, 64, 16, 4, 3), (32, 64, 16, 4, 3)),
}
_FEW = ((16, 64, 128, 4, 4), (16, 32, 128, 4, 4), (16, 64, 64, 4, 5), (16, 16, 128, 4, 4))
_FEW_EXACT = ((16, 64, 32, 4, 3), (16, 32, 32, 4, 3), (16, 16, 64, 4, 3))
_VECTORS = ((1, 4, 1024, 4, 1), (1, 8, 512, 4, 1), (1, 2, 1024, 2, 1), (1, 16, 512, 8, 1))
_AT_MOST = 4  # rows for which rows alone are tried


@functools.lru_cache(1024)
def _candidates(m: int, n: int, k: int, kind: str) -> tuple[Config, ...]:
    """Rows alone, or tiles that are not mostly empty; in the interpreter few large programs."""
    if INTERPRETED:
        rows, columns, inner = (max(16, min(512, next_power_of_2(size))) for size in (m, n, k))
        return (_config(rows, columns, inner, 4, 1, vector=m <= _AT_MOST),)
    vectors = [_config(*tile, vector=True) for tile in _VECTORS if m <= _AT_MOST]
    few = [_config(*t) for t in (_FEW_EXACT if kind == "ieee" else _FEW) if m <= 32]
    tiles = [_config(*tile) for tile in _tiles(m, k, kind)]
    return tuple(vectors + few + tiles * (m > 16))


def _tiles(m: int, k: int, kind: str) -> list[tuple[int, ...]]:
    """Not the largest where rows are not aligned: their addresses take the registers it needs."""
    return [t for t in _TILES[kind][k % 16 != 0 :] if t[0] < 2 * max(m, 32)]


@functools.lru_cache(1024)
def _back_candidates(m: int, n: int, k: int, kind: str) -> tuple[Config, ...]:
    """COLUMNS of Ŵ's rows are multiplied at a time, INNER columns of dx made."""
    if INTERPRETED:
        rows, columns, inner = (max(16, min(512, next_power_of_2(size))) for size in (m, n, k))
        found = [_config(rows, columns, inner, 4, 1)]
    else:
        tiles = _tiles(m, k, kind)
        found = [_config(r, i, c, warps, stages) for r, c, i, warps, stages in tiles]
    return tuple([{name: c[name] for name in c if name != "VECTOR"} for c in found])


def _config(
    rows: int, columns: int, inner: int, warps: int, stages: int, *, vector: bool = False
) -> Config:
    return {
        "VECTOR": vector,
        "ROWS": rows,
        "COLUMNS": columns,
        "INNER": inner,
        "num_warps": warps,
        "num_stages": stages,
    }


# --- the kernels ----------------------------------------------------------------------------------


@triton.jit
def _weights(
    packed, scales, zeros, n, n_inside, start, K, width, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Ŵ of rows n (a column of COLUMNS) and columns start … start + INNER − 1, in float32.

    Beyond the last column something finite; of rows beyond the last one 0. PARTS groups are in it.
    """
    if BITS == 8:
        k = start + tl.arange(0, INNER)[None, :]
        q = tl.load(packed + n * width + k, mask=n_inside & (k < K), other=0)
    else:
        j = start // 2 + tl.arange(0, INNER // 2)[None, :]
        two = tl.load(packed + n * width + j, mask=n_inside & (j < width), other=0)
        q = tl.interleave(two & 15, two >> 4)
    first = start // GROUP if GROUP > 0 else 0
    group = first + tl.arange(0, PARTS)[None, :]
    inside = n_inside & (group < groups)
    s = tl.load(scales + n * groups + group, mask=inside, other=0.0).to(tl.float32)
    if zeros is not None:
        z = tl.load(zeros + n * groups + group, mask=inside, other=0).to(tl.float32)
    else:
        z = tl.full([COLUMNS, PARTS], 8.0 if BITS == 4 else 0.0, tl.float32)
    w = tl.reshape(q.to(tl.float32), [COLUMNS, PARTS, INNER // PARTS])
    w = (w - z[:, :, None]) * s[:, :, None]
    return tl.reshape(w, [COLUMNS, INNER])


@triton.jit
def _multiply(
    x, packed, scales, zeros, bias, y, M, N, K, width, groups, x0, x1, bias_step,
    BITS: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """A tile of yᵀ: COLUMNS rows of Ŵ times ROWS rows of x."""
    i, j = _tile(tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS))
    row = i * ROWS + tl.arange(0, ROWS)[None, :]
    n = j * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    total = tl.zeros([COLUMNS, ROWS], tl.float32)
    for start in range(0, K, INNER):
        w = _weights(
            packed,
            scales,
            zeros,
            n,
            n < N,
            start,
            K,
            width,
            groups,
            BITS,
            GROUP,
            PARTS,
            COLUMNS,
            INNER,
        )
        k = start + tl.arange(0, INNER)[:, None]
        if WIDE:
            k = k.to(tl.int64)
        inside = row < M if EVEN else (row < M) & (k < K)
        values = tl.load(x + row * x0 + k * x1, mask=inside, other=0.0)
        w = w.to(values.dtype)
        total = tl.dot(w, values, total, input_precision=PRECISION)
    if bias is not None:
        total += tl.load(bias + n * bias_step, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + row * N + n, total.to(y.dtype.element_ty), mask=(row < M) & (n < N))


@triton.jit
def _tile(rows, columns):
    """(i, j) of this program's tile among rows × columns, in 64 bits; neighbours share much."""
    i, j = tl.program_id(0) // columns, tl.program_id(0) % columns
    i, j = tl.swizzle2d(i, j, rows, columns, 8)
    return i.to(tl.int64), j.to(tl.int64)


@triton.jit
def _dot_rows(
    x, packed, scales, zeros, bias, y, M, N, K, width, groups, x0, x1, bias_step,
    BITS: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr,
    WIDE: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """COLUMNS elements of one row of y: each thread adds up products of its own, then all join."""
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    total = tl.zeros([COLUMNS, INNER], tl.float32)
    for start in range(0, K, INNER):
        w = _weights(
            packed,
            scales,
            zeros,
            n,
            n < N,
            start,
            K,
            width,
            groups,
            BITS,
            GROUP,
            PARTS,
            COLUMNS,
            INNER,
        )
        k = start + tl.arange(0, INNER)[None, :]
        if WIDE:
            k = k.to(tl.int64)
        if EVEN:
            values = tl.load(x + row * x0 + k * x1)
        else:
            values = tl.load(x + row * x0 + k * x1, mask=k < K, other=0.0)
        total += w.to(values.dtype).to(tl.float32) * values.to(tl.float32)
    out = tl.sum(total, 1, keep_dims=True)
    if bias is not None:
        out += tl.load(bias + n * bias_step, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + row * N + n, out.to(y.dtype.element_ty), mask=n < N)


@triton.jit
def _multiply_back(
    g, packed, scales, zeros, dx, M, N, K, width, groups, g0, g1,
    BITS: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """A tile of dx: ROWS rows of g times INNER columns of Ŵ, COLUMNS of its rows at a time."""
    i, j = _tile(tl.cdiv(M, ROWS), tl.cdiv(K, INNER))
    row, k = i * ROWS + tl.arange(0, ROWS)[:, None], j * INNER + tl.arange(0, INNER)[None, :]
    total = tl.zeros([ROWS, INNER], tl.float32)
    for start in range(0, N, COLUMNS):
        n = start + tl.arange(0, COLUMNS).to(tl.int64)
        w = _weights(
            packed, scales, zeros, n[:, None], n[:, None] < N, j * INNER, K, width, groups,
            BITS, GROUP, PARTS, COLUMNS, INNER,
        )  # fmt: skip
        inside = (row < M) & (n[None, :] < N)
        values = tl.load(g + row * g0 + n[None, :] * g1, mask=inside, other=0.0)
        values = values.to(dx.dtype.element_ty)
        total = tl.dot(values, w.to(values.dtype), total, input_precision=PRECISION)
    tl.store(dx + row * K + k, total.to(dx.dtype.element_ty), mask=(row < M) & (k < K))


# --- for the x-ray --------------------------------------------------------------------------------


def specimens(dtype: str) -> Iterator[Specimen]:
    """A layer of a model of 7 billion, 4096 to 11008, for one token, for 16 and for 2048."""
    size, n, k = (4 if dtype == "fp32" else 2), 11008, 4096
    kind = "tf32" if dtype == "fp32" else "half"

    def given(m: int, bits: int, group: int, inner: int, **further: Any) -> dict[str, Any]:
        groups = k // group if group else 1
        return {
            **{"packed": "*i8" if bits == 8 else "*u8", "scales": "*fp32", "zeros": None},
            **{"M": m, "N": n, "K": k, "width": k * bits // 8, "groups": groups},
            **_groups(bits, group, {"INNER": inner}),
            **further,
        }

    def forward(
        name: str, m: int, tile: tuple[int, ...], bits: int, group: int, **further: Any
    ) -> Specimen:
        rows, columns, inner, warps, stages = tile
        vector = rows == 1
        shape = {"COLUMNS": columns, "INNER": inner, "EVEN": True, "WIDE": False}
        shape |= {} if vector else {"ROWS": rows, "PRECISION": "tf32"}
        arrays = {"x": f"*{dtype}", "bias": None, "y": f"*{dtype}", "bias_step": 0}
        steps = {"x0": k, "x1": 1}
        return Specimen(
            f"{name}, {bits} bits",
            _dot_rows if vector else _multiply,
            given(m, bits, group, inner) | arrays | steps | shape | further,
            num_warps=warps,
            num_stages=stages,
            bytes=columns * k * bits // 8 + rows * (k + columns) * size,
            flops=2 * rows * columns * k,
        )

    points = {"zeros": "*u8", "bias": f"*{dtype}", "bias_step": 1}
    for bits, group, further in ((8, 0, {}), (4, 64, {}), (4, 128, points)):
        name = "with zero points and bias, " if further else ""
        yield forward(f"{name}one row", 1, _VECTORS[0], bits, group, **further)
        yield forward(f"{name}16 rows", 16, _FEW[0], bits, group, **further)
        yield forward(f"{name}2048 rows", 2048, _TILES[kind][0], bits, group, **further)
    yield forward("64-bit offsets, 2048 rows", 2048, _TILES[kind][0], 4, 64, WIDE=True)
    odd = {"K": 4095, "width": 2048, "groups": 128, "x0": 4095, "EVEN": False}
    yield forward("odd sizes", 2047, _TILES[kind][1], 4, 32, **odd)

    def backward(name: str, tile: tuple[int, ...], bits: int, group: int, how: str) -> Specimen:
        rows, inner, columns, warps, stages = tile
        return Specimen(
            f"{name}, {bits} bits",
            _multiply_back,
            given(2048, bits, group, inner, ROWS=rows, COLUMNS=columns, INNER=inner)
            | {"g": f"*{dtype}", "dx": f"*{dtype}", "g0": n, "g1": 1, "PRECISION": how},
            num_warps=warps,
            num_stages=stages,
            bytes=n * inner * bits // 8 + rows * (n + inner) * size,
            flops=2 * rows * inner * n,
        )

    for bits, group in ((8, 0), (4, 64)):
        yield backward("gradient of x", _TILES[kind][0], bits, group, "tf32")
    if dtype == "fp32":
        exact: dict[str, Any] = {"PRECISION": "ieee"}
        for bits, group in ((8, 0), (4, 64)):
            yield forward("exact, 16 rows", 16, _FEW_EXACT[0], bits, group, **exact)
            yield forward("exact, 2048 rows", 2048, _TILES["ieee"][0], bits, group, **exact)
            yield backward("exact gradient of x", _TILES["ieee"][0], bits, group, "ieee")
