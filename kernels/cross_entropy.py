"""Cross-entropy of rows of logits with integer targets, and linear + cross-entropy without them.

    ℓ = m − x_t + ln s             m = max x       s = Σ e^(x − m)        lse = m + ln s
    y = (1 − ε) w_t ℓ + ε/C Σ_c w_c (lse − x_c)
    dx_c = g (Q e^(x_c − lse) − q_c)
        q_c = (1 − ε) w_t [c = t] + ε/C w_c       Q = Σ q = (1 − ε) w_t + ε/C Σ w

with t the row's target, ε the label smoothing and w the class weights (1 without them). All
arithmetic is float32, whatever the arrays hold.

Forward reads the logits once, in blocks that keep m and s "online" (see softmax.py), and keeps a
number per row, lse: it moves |x| bytes, with 5 FLOPs an element. Backward is a formula on each
element by itself, 2·|x| bytes and 4 FLOPs, and may write its result over the logits.
A row that does not count is not read; its loss and gradient are 0. A row that is −∞ everywhere has
no distribution: NaN, as in ops/softmax.py.

The logits of a language model, tokens × vocabulary, are its largest array by far.
`linear_forward` makes them some rows at a time, turns each chunk into its gradient in place and
that into its share of the gradients of the hidden states and the weight, all in the forward.
Hsu et al., "Liger Kernel: efficient Triton kernels for LLM training", 2024, section 3.2; Wijmans
et al., "Cut your losses in large-vocabulary language models", 2024.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Protocol

from tinygrad_llm.backend import Array, float32, namespace, uint8
from tinygrad_llm.kernels.compile import Specimen
from tinygrad_llm.kernels.language import INTERPRETED, tl, triton
from tinygrad_llm.kernels.launch import cdiv, launch, next_power_of_2
from tinygrad_llm.kernels.layout import check_floats, needs_int64, strides
from tinygrad_llm.kernels.tune import Config, choose

Saved = tuple[Array, Array, Array, Array | None, Array, Array | None]


def forward(
    x: Array,
    target: Array,
    counted: Array,
    class_weight: Array | None = None,
    *,
    smoothing: float = 0.0,
    dtype: Any = None,
    config: Config | None = None,
) -> tuple[Array, Saved]:
    """yᵢ = −Σ_c q_ic ln softmax(xᵢ)_c, one loss per row.

    Args:
        x: (N, C) float32, float16 or bfloat16 logits, any strides.
        target: (N,) integer classes. Of rows that count they must be in 0 … C − 1, which is for
            the caller to check: another one makes the row's loss NaN.
        counted: (N,) bool: False for the rows that count for nothing.
        class_weight: (C,) a weight per class.
        smoothing: ε in [0, 1): the target becomes (1 − ε) onehot(t) + ε/C.
        dtype: of the losses, x's by default.
        config: {'ROWS', 'BLOCK', 'num_warps'} instead of the tuned one.

    Returns:
        (y, saved): y is (N,), of that dtype; `backward` takes what was saved: the arguments, the
        rows' log-sum-exp, and the sum of the class weights where smoothing needs it.
    """
    y = namespace(x).empty(len(x) if x.ndim else 0, dtype=x.dtype if dtype is None else dtype)
    return y, _losses(x, target, counted, class_weight, smoothing, y, config)


def backward(
    g: Array,
    x: Array,
    target: Array,
    counted: Array,
    class_weight: Array | None,
    lse: Array,
    total_weight: Array | None,
    *,
    smoothing: float = 0.0,
    in_place: bool = False,
    config: Config | None = None,
) -> Array:
    """dxᵢ = gᵢ (Q softmax(xᵢ) − qᵢ)

    Args:
        g: (N,), the gradient of the losses, any stride.
        x … total_weight: what `forward` saved; `smoothing` is that of the forward.
        in_place: write dx over x instead of into new memory: the logits are then gone.

    Returns:
        dx (N, C) of x's dtype: contiguous, or x itself. Rows that do not count get 0.

    Raises:
        ValueError: `in_place` with logits that repeat in memory (stride 0).
    """
    check_floats("cross_entropy", g)
    rows, columns = x.shape
    if g.shape != (rows,):
        raise ValueError(f"cross_entropy needs a gradient of shape {(rows,)}, got {g.shape}")
    repeats = any(n > 1 and s == 0 for n, s in zip(x.shape, x.strides, strict=True))
    if in_place and repeats and x.size:
        raise ValueError(
            "cross_entropy cannot write in place into logits that were broadcast (stride 0): "
            "leave in_place out"
        )
    dx = x if in_place else namespace(x).empty(x.shape, dtype=x.dtype)
    if x.size == 0:
        return dx
    config = config or _tile(rows, columns, 4096)
    blocks = cdiv(columns, config["BLOCK"])
    launch(
        _backward,
        cdiv(rows, config["ROWS"]) * blocks,
        *(g, x, target, counted.view(uint8), class_weight, lse, total_weight, dx),
        *(rows, columns, blocks, float(smoothing), smoothing / columns),
        *(*strides(g), *strides(x), *strides(target), *strides(counted)),
        *_weight_stride(class_weight),
        *strides(dx),
        SMOOTH=smoothing != 0,
        WIDE=_wide(x, dx, class_weight),
        **config,
    )
    return dx


def _losses(
    x: Array,
    target: Array,
    counted: Array,
    class_weight: Array | None,
    smoothing: float,
    y: Array,
    config: Config | None,
) -> Saved:
    """Check, write the losses into y (N,) of any float dtype, and return what backward needs."""
    _check(x, target, counted, class_weight)
    xp, (rows, columns) = namespace(x), x.shape
    lse = xp.empty(rows, dtype=float32)
    needs_total = smoothing != 0 and class_weight is not None
    total_weight = xp.empty(1, dtype=float32) if needs_total else None
    wide = _wide(x, class_weight)

    def run(config: Config) -> None:
        launch(
            _forward,
            cdiv(rows, config["ROWS"]),
            *(x, target, counted.view(uint8), class_weight, y, lse, total_weight),
            *(rows, columns, float(smoothing), smoothing / columns),
            *(*strides(x), *strides(target), *strides(counted)),
            *_weight_stride(class_weight),
            SMOOTH=smoothing != 0,
            WIDE=wide,
            **config,
        )

    if rows:
        run(config or choose(_forward, _candidates(rows, columns), x, (rows, columns), run))
    return x, target, counted, class_weight, lse, total_weight


def _check(x: Array, target: Array, counted: Array, class_weight: Array | None) -> None:
    check_floats("cross_entropy", x, *([] if class_weight is None else [class_weight]))
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"cross_entropy needs logits (N, C) of at least one class, got {x.shape}")
    if target.dtype.kind not in "iu":
        raise TypeError(f"cross_entropy needs integer targets, got {target.dtype}")
    if counted.dtype != bool:
        raise TypeError(f"cross_entropy needs `counted` as bool, got {counted.dtype}")
    if target.shape != x.shape[:1] or counted.shape != x.shape[:1]:
        raise ValueError(
            f"cross_entropy needs a target and a `counted` for each of {len(x)} rows, got "
            f"{target.shape} and {counted.shape}"
        )
    if class_weight is not None and class_weight.shape != x.shape[1:]:
        raise ValueError(
            f"cross_entropy needs class weights {x.shape[1:]}, got {class_weight.shape}"
        )


def _wide(*arrays: Array | None) -> bool:
    return needs_int64(*[a for a in arrays if a is not None])


def _weight_stride(class_weight: Array | None) -> tuple[int, ...]:
    return (0,) if class_weight is None else strides(class_weight)


@functools.lru_cache(1024)
def _candidates(rows: int, columns: int) -> tuple[Config, ...]:
    """Tiles for the forward, the likeliest first: rows are read once whatever the block."""
    found = [_tile(rows, columns, size) for size in (4096, 8192, 2048, 1024)]
    return tuple([c for i, c in enumerate(found) if c not in found[:i]])


def _tile(rows: int, columns: int, size: int) -> Config:
    """A tile of about `size` logits, 16 for each thread."""
    if INTERPRETED:  # a program costs about the same whatever its size: few large ones
        size = 65536
    block = min(next_power_of_2(columns), size)
    tile_rows = min(next_power_of_2(rows), size // block)
    warps = min(16, max(1, tile_rows * block // 512))
    return {"ROWS": tile_rows, "BLOCK": block, "num_warps": warps}


# --- a tile of rows and columns -------------------------------------------------------------------


@triton.jit
def _targets(
    target, counted, class_weight, row, inside, columns, t0, k0, w0, smoothing, SMOOTH: tl.constexpr
):
    """(t, whether the row counts, (1 − ε) w_t), as columns; t = −1 where there is no such class."""
    counts = tl.load(counted + row * k0, mask=inside, other=0) != 0
    t = tl.load(target + row * t0, mask=counts, other=0).to(tl.int64)
    t = tl.where((t >= 0) & (t < columns), t, -1)
    share = tl.full(t.shape, 1.0, tl.float32)
    if class_weight is not None:
        share = tl.load(class_weight + t * w0, mask=counts & (t >= 0), other=0.0).to(tl.float32)
    if SMOOTH:
        share *= 1.0 - smoothing
    return t, counts, share


@triton.jit
def _columns(start, columns, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """(column, inside) of a tile, as a row."""
    column = start + tl.arange(0, BLOCK)[None, :]
    inside = column < columns
    if WIDE:
        column = column.to(tl.int64)
    return column, inside


@triton.jit
def _weights(class_weight, column, inside, w0):
    """w_c of a block of classes: 1 without weights, 0 behind the last class."""
    if class_weight is not None:
        return tl.load(class_weight + column * w0, mask=inside, other=0.0).to(tl.float32)
    else:
        return tl.where(inside, 1.0, 0.0)


@triton.jit
def _finite(m):
    """m, but 0 for −∞: there is nothing to subtract, and −∞ − −∞ would be NaN."""
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def _forward(
    x, target, counted, class_weight, y, lse, total_weight, rows, columns, smoothing, even,
    x0, x1, t0, k0, w0,
    SMOOTH: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One walk along ROWS rows: m and s block by block, with smoothing also Σ w_c (x_c − x_t).

    Logits far from 0 would drown the loss in the rounding of lse: all that goes into it is
    measured from x_t, or from 0 where that is −∞.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    row_inside = row < rows
    t, counts, share = _targets(
        target, counted, class_weight, row, row_inside, columns, t0, k0, w0, smoothing, SMOOTH
    )
    x += row * x0
    x_t = tl.load(x + t * x1, mask=counts & (t >= 0), other=float("nan")).to(tl.float32)
    zero = _finite(x_t)
    m = tl.full([ROWS, 1], -float("inf"), tl.float32)
    s = tl.zeros([ROWS, 1], tl.float32)
    spread = tl.zeros([ROWS, 1], tl.float32)
    weights = tl.zeros([1, BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column, column_inside = _columns(start, columns, BLOCK, WIDE)
        inside = counts & column_inside
        z = tl.load(x + column * x1, mask=inside, other=-float("inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(z, 1, keep_dims=True))
        base = _finite(m_new)
        s = s * tl.exp(m - base) + tl.sum(tl.exp(z - base), 1, keep_dims=True)
        m = m_new
        if SMOOTH:
            w = _weights(class_weight, column, column_inside, w0)
            spread += tl.sum(tl.where(inside, w * (z - zero), 0.0), 1, keep_dims=True)
            weights += w
    out = share * (m - x_t + tl.log(s))
    if SMOOTH:
        total = tl.sum(weights, 1, keep_dims=True)
        out += even * (total * (m - zero + tl.log(s)) - spread)
        if total_weight is not None:
            first = tl.program_id(0) + tl.zeros([1, 1], tl.int32)
            tl.store(total_weight + first, total, mask=first == 0)
    out = tl.where(counts, out, 0.0)
    tl.store(y + row, out.to(y.dtype.element_ty), mask=row_inside)
    tl.store(lse + row, tl.where(counts, m + tl.log(s), 0.0), mask=row_inside)


@triton.jit
def _backward(
    g, x, target, counted, class_weight, lse, total_weight, dx,
    rows, columns, blocks, smoothing, even, g0, x0, x1, t0, k0, w0, dx0, dx1,
    SMOOTH: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of dx. It reads no logit but those that it may then overwrite.

    Of a row that does not count it reads nothing: dy = 0 makes all of it 0.
    """
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    row_inside = row < rows
    column, column_inside = _columns(program % blocks * BLOCK, columns, BLOCK, WIDE)
    t, counts, share = _targets(
        target, counted, class_weight, row, row_inside, columns, t0, k0, w0, smoothing, SMOOTH
    )
    dy = tl.load(g + row * g0, mask=counts, other=0.0).to(tl.float32)
    base = tl.load(lse + row, mask=counts, other=0.0)
    z = tl.load(x + row * x0 + column * x1, mask=counts & column_inside, other=0.0).to(tl.float32)
    q = tl.where(column == t, share, 0.0)
    if SMOOTH:
        q += even * _weights(class_weight, column, column_inside, w0)
        total = columns * 1.0 if total_weight is None else tl.load(total_weight)
        share += even * total
    out = dy * (share * tl.exp(z - base) - q)
    inside = row_inside & column_inside
    tl.store(dx + row * dx0 + column * dx1, out.to(dx.dtype.element_ty), mask=inside)


# --- linear + cross-entropy -----------------------------------------------------------------------


class Product(Protocol):
    """product(a, b) = a b of matrices, summed in float32, of their dtype or the one asked for."""

    def __call__(self, a: Array, b: Array, *, dtype: Any = None) -> Array: ...


def linear_forward(
    hidden: Array,
    weight: Array,
    target: Array,
    counted: Array,
    bias: Array | None = None,
    class_weight: Array | None = None,
    *,
    smoothing: float = 0.0,
    reduction: str = "mean",
    chunk: int | None = None,
    product: Product | None = None,
    gradients: bool = True,
) -> tuple[Array, tuple[Array | None, ...]]:
    """y = Σᵢ crossentropy(hiddenᵢ weightᵀ + bias, tᵢ), divided by Σ w_t of what counts for "mean".

    Never more than `chunk` rows of logits exist. As they die before the backward, their gradients
    are found here, for dy = 1 and undivided, so that not even float16 loses small ones:

        dz = Q softmax(z) − q        dhidden = dz weight     dweight = dzᵀ hidden     dbias = Σ dz

    That is 6·N·C·D FLOPs, as many as unfused; per chunk of n rows it moves 6·n·C logits (made,
    read, made a gradient, read by two products) and dweight twice.

    Args:
        hidden: (N, D) float32, float16 or bfloat16.
        weight: (C, D), of the same dtype.
        target, counted, class_weight, smoothing: see `forward`.
        bias: (C,)
        reduction: "mean" (0 where no row counts) or "sum".
        chunk: rows of logits at a time; as many as 2²⁶ logits hold if left out.
        product: `kernels.matmul.matmul`, which gives float32 shares of dweight, or NumPy's or
            CuPy's if left out (where halves round each chunk's share of dweight).
        gradients: False computes the loss alone.

    Returns:
        (y, saved): y float32 of shape (); dhidden of hidden's dtype, dweight and dbias in float32
        are in `saved`. It is empty without `gradients`.
    """
    _check_linear(hidden, weight, bias, reduction, chunk)
    xp, rows, classes = namespace(hidden), len(hidden), len(weight)
    chunk = chunk or max(256, 2**26 // max(1, classes) // 128 * 128)
    product = product or _product
    losses = xp.zeros(rows, dtype=float32)
    ones = xp.broadcast_to(xp.ones(1, dtype=float32), (rows,))
    dhidden = xp.empty(hidden.shape, dtype=hidden.dtype) if gradients else None
    dweight = xp.zeros(weight.shape, dtype=float32) if gradients else None
    dbias = xp.zeros(classes, dtype=float32) if gradients and bias is not None else None

    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        h = hidden[part]
        z = product(h, weight.T)
        if bias is not None:
            z += bias.astype(z.dtype, copy=False)
        saved = _losses(z, target[part], counted[part], class_weight, smoothing, losses[part], None)
        if dhidden is None or dweight is None:
            continue
        dz = backward(ones[part], *saved, smoothing=smoothing, in_place=True)
        if dbias is not None:
            dbias += dz.sum(axis=0, dtype=float32)
        dhidden[part] = product(dz, weight)
        dweight += product(dz.T, h, dtype=float32)

    factor = _factor(target, counted, class_weight, reduction)
    y = (losses.sum(keepdims=True) * factor).reshape(())
    return y, (dhidden, dweight, dbias, factor, weight) if gradients else ()


def linear_backward(
    g: Array, dhidden: Array, dweight: Array, dbias: Array | None, factor: Array, weight: Array
) -> tuple[Array, Array, Array | None]:
    """(dhidden, dweight, dbias): what `linear_forward` saved, times g and the mean's 1/Σ w_t.

    Args:
        g: the gradient of y, an array of one element.

    Returns:
        New arrays, of the dtypes of hidden and of weight.
    """
    scaled = [
        None if a is None else _scaled(a, g, factor, dtype)
        for a, dtype in ((dhidden, dhidden.dtype), (dweight, weight.dtype), (dbias, weight.dtype))
    ]
    return scaled[0], scaled[1], scaled[2]


def _check_linear(
    hidden: Array, weight: Array, bias: Array | None, reduction: str, chunk: int | None
) -> None:
    check_floats("linear_cross_entropy", hidden, weight, *([] if bias is None else [bias]))
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy needs hidden (N, D) and weight (C, D), got {hidden.shape} and "
            f"{weight.shape}"
        )
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"linear_cross_entropy needs hidden and weight of one dtype, got {hidden.dtype} and "
            f"{weight.dtype}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_cross_entropy needs a bias {weight.shape[:1]}, got {bias.shape}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is 'mean' or 'sum' here, got {reduction!r}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"a chunk has at least one row, got {chunk}")


def _product(a: Array, b: Array, *, dtype: Any = None) -> Array:
    """a b, summed in float32: CuPy does so with halves, NumPy would sum them in halves."""
    dtype = dtype or a.dtype
    if namespace(a).__name__ == "numpy":
        a, b = a.astype(float32, copy=False), b.astype(float32, copy=False)
    return (a @ b).astype(dtype, copy=False)


def _factor(target: Array, counted: Array, class_weight: Array | None, reduction: str) -> Array:
    """What the sum of the losses is multiplied by, as an array (1,): the host waits for nothing."""
    xp = namespace(target)
    if reduction == "sum":
        return xp.ones(1, dtype=float32)
    counts = counted.astype(float32)
    if class_weight is not None:
        counts *= class_weight[xp.where(counted, target, 0)].astype(float32, copy=False)
    total = counts.sum(keepdims=True)
    return xp.where(total == 0, 0, 1 / xp.where(total == 0, 1, total)).astype(float32, copy=False)


def _scaled(x: Array, g: Array, factor: Array, dtype: object) -> Array:
    """x · g · factor, of another dtype; x is contiguous."""
    y = namespace(x).empty(x.shape, dtype=dtype)
    block = 65536 if INTERPRETED else 2048
    launch(_scale, cdiv(x.size, block), x, g, factor, y, x.size, BLOCK=block, num_warps=8)
    return y


@triton.jit
def _scale(x, g, factor, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    out = tl.load(x + i, mask=i < n).to(tl.float32)
    out *= tl.load(g).to(tl.float32) * tl.load(factor)
    tl.store(y + i, out.to(y.dtype.element_ty), mask=i < n)


# --- for the x-ray --------------------------------------------------------------------------------


def specimens(dtype: str) -> Iterator[Specimen]:
    """What a GPT launches: GPT-2's logits (padded from 50257 to 50304 so that loads are wide)."""
    size = 4 if dtype == "fp32" else 2
    columns, block = 50304, 4096
    steps = {"t0": 1, "k0": 1, "w0": 0, "x0": columns, "x1": 1}
    common = {
        **{"x": f"*{dtype}", "target": "*i64", "counted": "*u8", "class_weight": None},
        **{"lse": "*fp32", "total_weight": None, "rows": 4096, "columns": columns, **steps},
        **{"smoothing": 0.0, "even": 0.0, "SMOOTH": False, "WIDE": False},
    }
    smooth = {
        **{"class_weight": "*fp32", "w0": 1, "total_weight": "*fp32"},
        **{"smoothing": 0.1, "even": 2e-6, "SMOOTH": True, "WIDE": True},
    }
    tile = {"ROWS": 1, "BLOCK": block}
    results = {"y": f"*{dtype}"}
    gradients = {"g": f"*{dtype}", "g0": 1, "dx": f"*{dtype}", "dx0": columns, "dx1": 1}
    gradients |= {"blocks": 13}
    for name, options in (("", {}), (", smoothed and weighted", smooth)):
        yield Specimen(
            f"forward{name}",
            _forward,
            {**common, **results, **options, **tile},
            num_warps=8,
            bytes=columns * size,
            flops=5 * columns,
        )
        yield Specimen(
            f"backward{name}",
            _backward,
            {**common, **gradients, **options, **tile},
            num_warps=8,
            bytes=2 * block * size,
            flops=4 * block,
        )
    few = {"columns": 65, "x0": 65}
    yield Specimen(
        "forward, characters",
        _forward,
        {**common, **results, **few, "ROWS": 32, "BLOCK": 128},
        num_warps=8,
        bytes=32 * 65 * size,
        flops=32 * 5 * 65,
    )
    scale = {"x": "*fp32", "g": "*fp32", "factor": "*fp32", "y": f"*{dtype}", "n": 2**24}
    yield Specimen(
        "scale", _scale, {**scale, "BLOCK": 2048}, num_warps=8, bytes=2048 * (4 + size), flops=2048
    )
