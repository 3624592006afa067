"""LSTM: one layer in one direction over all steps, in one launch where that is faster.

    z = W x + b + U h′ + b′, cut into z_i, z_f, z_g, z_o
    i, f, o = σ(z_i), σ(z_f), σ(z_o)     v = tanh(z_g)     c = f ⊙ c′ + i ⊙ v     h = o ⊙ tanh(c)

    ċ = ċ″ + ḣ ⊙ o ⊙ (1 − tanh²c)        ż_i = ċ ⊙ v ⊙ i(1 − i)      ż_f = ċ ⊙ c′ ⊙ f(1 − f)
    ż_g = ċ ⊙ i ⊙ (1 − v²)               ż_o = ḣ ⊙ tanh(c) ⊙ o(1 − o)
    ḣ′ = Uᵀ ż     ċ′ = ċ ⊙ f     dx = ż W     dW = żᵀ x     dU = żᵀ h′     db = db′ = Σ ż

where ′ is of the step before, ″ of the one after. W x + b + b′ is one product over all steps, kept
in float32, and dx, dW, dU and db are one each: kernels/matmul.py makes them. What remains has to
wait for the step before: U h′ and the gates, a step of 8·B·H² FLOPs forward and as many backward.

`LAYER`: a program takes ROWS sequences through all their steps. h and c go from step to step
through its multiprocessor's cache, and U passes by once a step, from the level-2 cache: 4H² numbers
beside the 10·ROWS·H of the sequences. One launch in all, but no more programs than B / ROWS: for
small H, where a launch costs more than a step. Otherwise a step is a product over the whole GPU and
one pass over the gates, which reads 9H and writes 8H numbers a sequence (backward 9H and 9H): two
launches.

State (c and its gradient), gates and sums are float32; h, which is the output, is rounded to x's
dtype when the next step multiplies it, and so is ż. No atomics: the same numbers each time.

Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997. A whole layer in one launch: Diamos et
al., "Persistent RNNs: stashing recurrent weights on-chip", 2016.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from tinygrad_llm.backend import Array, namespace
from tinygrad_llm.kernels import matmul
from tinygrad_llm.kernels.compile import Known, Specimen
from tinygrad_llm.kernels.language import INTERPRETED, libdevice, tl, triton
from tinygrad_llm.kernels.launch import cdiv, launch, next_power_of_2
from tinygrad_llm.kernels.layout import check_floats
from tinygrad_llm.kernels.tune import Config, choose

Saved = tuple[Any, ...]


def forward(
    x: Array,
    h0: Array,
    c0: Array,
    w: Array,
    u: Array,
    b: Array | None = None,
    b2: Array | None = None,
    *,
    lengths: np.ndarray | None = None,
    reverse: bool = False,
    precision: str = "ieee",
    config: Config | None = None,
) -> tuple[Array, Saved]:
    """(T + 2, B, H): h of all steps, then the last h and the last c of each sequence.

    Args:
        x: (T, B, I) float32, float16 or bfloat16, any strides, as all that follow.
        h0, c0: (B, H), the state before the first step.
        w, u: (4H, I) and (4H, H), the gates i, f, g, o below one another.
        b, b2: (4H,) both, or None both.
        lengths: (B,) on the host, how many steps of each sequence are real; the rest gives zeros.
        reverse: from each sequence's last step to its first.
        precision: of float32 products, "ieee" or "tf32".
        config: {'LAYER', 'ROWS', 'BLOCK', 'INNER', 'num_warps', 'num_stages'} instead of the tuned
            one.

    Returns:
        (y, saved): y is contiguous and of x's dtype; `backward` takes what was saved.
    """
    _check(x, h0, c0, w, u, b, b2)
    xp, (time, batch, inputs), hidden = namespace(x), x.shape, u.shape[1]
    y = xp.zeros((time + 2, batch, hidden), dtype=x.dtype)
    y[time], y[time + 1] = h0, c0  # what sequences of no steps end with
    counts = None if lengths is None else xp.asarray(lengths, dtype=np.int32)
    gates = xp.zeros((time, batch, 4 * hidden), dtype=np.float32)
    cells = xp.zeros((time, batch, hidden), dtype=np.float32)
    saved = (x, h0, c0, w, u, b, counts, y, gates, cells)
    longest = time if lengths is None else int(lengths.max(initial=0))
    if y.size == 0 or longest == 0:
        return y, saved
    bias = None if b is None or b2 is None else b.astype(np.float32) + b2.astype(np.float32)
    rows = x.reshape(time * batch, inputs)
    z, _ = matmul.forward(
        rows, w.T, bias, precision=precision, dtype=np.float32, needs=(False,) * 4
    )
    h0, u = xp.ascontiguousarray(h0), xp.ascontiguousarray(u)
    states = xp.empty((2, batch, hidden), dtype=x.dtype)
    sizes = (time, batch, hidden)

    def run(config: Config) -> None:
        layer, constants = _split(config)
        c = xp.array(c0, dtype=np.float32, order="C", copy=True)
        outputs = (counts, y, gates, cells, states, c)
        if layer:
            launch(
                _forward_layer,
                cdiv(batch, config["ROWS"]),
                *(z, u, h0, *outputs, *sizes),
                REVERSE=reverse,
                PRECISION=precision,
                **constants,
            )
            return
        grid = cdiv(batch, constants["ROWS"]), cdiv(hidden, constants["BLOCK"])
        for step in range(longest):
            h = h0 if step == 0 else states[step % 2]
            product = matmul.matmul(h, u.T, precision=precision, dtype=np.float32)
            launch(_forward_step, grid, z, product, *outputs, *sizes, step, REVERSE=reverse,
                   **constants)  # fmt: skip

    candidates = _candidates(batch, hidden, x.dtype.itemsize)
    run(config or choose(_forward_layer, candidates, x, (time, batch, hidden), run))
    return y, saved


def backward(
    g: Array,
    x: Array,
    h0: Array,
    c0: Array,
    w: Array,
    u: Array,
    b: Array | None,
    counts: Array | None,
    y: Array,
    gates: Array,
    cells: Array,
    *,
    lengths: np.ndarray | None = None,
    reverse: bool = False,
    precision: str = "ieee",
    config: Config | None = None,
) -> tuple[Array | None, ...]:
    """(dx, dh0, dc0, dw, du, db, db2), each of the shape and dtype of what it belongs to.

    Args:
        g: the gradient of what `forward` returned, any strides.
        x … cells: what `forward` saved; the options are those of the forward.
    """
    check_floats("lstm", g)
    if g.shape != y.shape:
        raise ValueError(f"lstm needs a gradient of the shape {y.shape}, got {g.shape}")
    xp, (time, batch, inputs), hidden = namespace(x), x.shape, u.shape[1]
    g, longest = xp.ascontiguousarray(g), time if lengths is None else int(lengths.max(initial=0))
    dz = xp.zeros((time, batch, 4 * hidden), dtype=x.dtype)
    dh, dc = g[time].astype(np.float32), g[time + 1].astype(np.float32)
    if y.size and longest:
        first, recurrent = xp.ascontiguousarray(c0), xp.ascontiguousarray(u)
        sizes = (time, batch, hidden)

        def run(config: Config) -> None:
            layer, constants = _split(config)
            inputs = (g, first, counts, gates, cells)
            dh[...], dc[...] = g[time], g[time + 1]
            if layer:
                launch(
                    _backward_layer,
                    cdiv(batch, config["ROWS"]),
                    *(*inputs, recurrent, dz, dh, dc, *sizes),
                    REVERSE=reverse,
                    PRECISION=precision,
                    **constants,
                )
                return
            grid = cdiv(batch, constants["ROWS"]), cdiv(hidden, constants["BLOCK"])
            now, product = xp.empty((batch, 4 * hidden), dtype=x.dtype), dh
            for step in reversed(range(longest)):
                launch(_backward_step, grid, *inputs, product, dz, now, dh, dc, *sizes, step,
                       REVERSE=reverse, **constants)  # fmt: skip
                product = matmul.matmul(now, recurrent, precision=precision, dtype=np.float32)
            dh[...] = product if counts is None else xp.where(counts[:, None] > 0, product, dh)

        candidates = _candidates(batch, hidden, x.dtype.itemsize)
        run(config or choose(_backward_layer, candidates, x, (time, batch, hidden), run))
    flat = dz.reshape(time * batch, 4 * hidden)
    before = _before(y, h0, lengths, reverse).reshape(time * batch, hidden)
    multiply = functools.partial(matmul.matmul, precision=precision)
    dx = multiply(flat, w).reshape(x.shape)
    if lengths is not None:  # 0 times what padding holds must be 0, also where that is NaN
        real = np.arange(time)[:, None] < lengths
        x = xp.where(xp.asarray(real)[..., None], x, x.dtype.type(0))
    dw = multiply(flat.T, x.reshape(time * batch, inputs))
    du = multiply(flat.T, before)
    db = None if b is None else multiply(xp.ones((1, len(flat)), dtype=x.dtype), flat)[0]
    return dx, dh.astype(x.dtype), dc.astype(x.dtype), dw, du, db, db


def _check(
    x: Array, h0: Array, c0: Array, w: Array, u: Array, b: Array | None, b2: Array | None
) -> None:
    arrays = [x, h0, c0, w, u, *[a for a in (b, b2) if a is not None]]
    check_floats("lstm", *arrays)
    if any(a.dtype != x.dtype for a in arrays):
        found = ", ".join([str(a.dtype) for a in arrays])
        raise TypeError(f"lstm takes arrays of one dtype, got {found}")
    hidden = u.shape[-1] if u.ndim else 0
    state, gates = (*x.shape[1:2], hidden), (4 * hidden,)
    wanted = [state, state, (*gates, *x.shape[2:]), (*gates, hidden), gates, gates]
    found = [a.shape for a in arrays[1:]]
    if x.ndim != 3 or found != wanted[: len(found)] or (b is None) != (b2 is None):
        raise ValueError(
            "lstm takes x (T, B, I), h0 and c0 (B, H), w (4H, I), u (4H, H) and two biases (4H,), "
            f"or none, got {', '.join([str(a.shape) for a in arrays])}"
        )


def _before(y: Array, h0: Array, lengths: np.ndarray | None, reverse: bool) -> Array:
    """(T, B, H): the h that each step began with."""
    xp, time = namespace(y), len(y) - 2
    before = xp.empty_like(y[:time])
    if not time:
        return before
    if not reverse:
        before[0], before[1:] = h0, y[: time - 1]
        return before
    before[-1], before[:-1] = h0, y[1:time]
    if lengths is not None:
        rows = np.flatnonzero(lengths)
        before[xp.asarray(lengths[rows] - 1), xp.asarray(rows)] = h0[xp.asarray(rows)]
    return before


# --- configurations -------------------------------------------------------------------------------

_LONGEST_LAYER = 512  # above, one program would read more of U in a step than a launch costs


_STEP: Config = {"LAYER": False, "ROWS": 4, "BLOCK": 128, "num_warps": 4}


@functools.lru_cache(1024)
def _candidates(batch: int, hidden: int, itemsize: int) -> tuple[Config, ...]:
    """What may be fastest, the likeliest first: one launch for small H, one a step for large H."""
    if INTERPRETED:  # a program costs about the same whatever its size: few large ones
        block = _power(hidden, 128)
        return (_layer(_power(batch, 64), block, block, 4, 1),)
    return _for_gpu(batch, hidden, itemsize)


def _for_gpu(batch: int, hidden: int, itemsize: int) -> tuple[Config, ...]:
    if hidden > _LONGEST_LAYER:
        return (_STEP,)
    wide = itemsize == 2 and hidden % 8 == 0  # otherwise more registers are needed than there are
    block, inner = _power(hidden, 64 if wide else 32), _power(hidden, 128 // itemsize)
    layers = [_layer(16, block, inner, 4, 2)]
    layers += [_layer(16, 32, inner, 4, 2)] * (block > 32)
    layers += [_layer(32, 32, inner, 8, 2)] * (block >= 32 and batch > 16)
    return (*layers, _STEP) if hidden <= 128 else (_STEP, *layers)


def _power(n: int, at_most: int) -> int:
    """The next power of two, but at least 16, as `tl.dot` wants."""
    return min(max(16, next_power_of_2(n)), at_most)


def _layer(rows: int, block: int, inner: int, warps: int, stages: int) -> Config:
    sizes = {"LAYER": True, "ROWS": rows, "BLOCK": block, "INNER": inner}
    return sizes | {"num_warps": warps, "num_stages": stages}


def _split(config: Config) -> tuple[bool, Config]:
    """Whether it is a layer in one launch, and the constants of the kernel."""
    return config["LAYER"], {name: n for name, n in config.items() if name != "LAYER"}


# --- a tile of a step -----------------------------------------------------------------------------


@triton.jit
def _sequences(counts, time, batch, ROWS: tl.constexpr) -> Any:
    """The rows of a program, which of them there are, how many steps each has, and the longest."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < batch
    if counts is not None:
        length = tl.load(counts + row, mask=inside, other=0)
    else:
        length = tl.where(inside, time, 0)
    return row, inside, length, tl.max(length, 0)


@triton.jit
def _places(row, length, step, batch, REVERSE: tl.constexpr):
    """Where the step of each sequence is in an array (T·B, …)."""
    if REVERSE:
        when = tl.maximum(length - 1 - step, 0)
    else:
        when = tl.minimum(step, tl.maximum(length - 1, 0))
    return when.to(tl.int64) * batch + row


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _tanh(z) -> Any:
    return libdevice.tanh(z)


@triton.jit
def _advance(
    zi, zf, zg, zo, z, y, gates, cells, h, c, row, column, inside, length, step,
    time, batch, hidden, REVERSE: tl.constexpr,
):  # fmt: skip
    """From U h′ of a tile to all that the step leaves behind: y, h, c, and i, f, v, o."""
    active = inside & (step < length)[:, None]
    place = _places(row, length, step, batch, REVERSE)[:, None]
    z += place * 4 * hidden + column
    i = _sigmoid(zi + tl.load(z, mask=active, other=0.0))
    f = _sigmoid(zf + tl.load(z + hidden, mask=active, other=0.0))
    v = _tanh(zg + tl.load(z + 2 * hidden, mask=active, other=0.0))
    o = _sigmoid(zo + tl.load(z + 3 * hidden, mask=active, other=0.0))
    at = row[:, None] * hidden + column
    c_new = f * tl.load(c + at, mask=active, other=0.0) + i * v
    tl.store(c + at, c_new, mask=active)
    tl.store(cells + place * hidden + column, c_new, mask=active)
    gates += place * 4 * hidden + column
    tl.store(gates, i, mask=active)
    tl.store(gates + hidden, f, mask=active)
    tl.store(gates + 2 * hidden, v, mask=active)
    tl.store(gates + 3 * hidden, o, mask=active)
    h_new = (o * _tanh(c_new)).to(y.dtype.element_ty)
    tl.store(h + at, h_new, mask=active)
    tl.store(y + place * hidden + column, h_new, mask=active)
    last = active & (step == length - 1)[:, None]
    end = (tl.cast(time, tl.int64) * batch + row)[:, None] * hidden + column
    tl.store(y + end, h_new, mask=last)
    end += batch * hidden
    tl.store(y + end, c_new.to(y.dtype.element_ty), mask=last)


@triton.jit
def _retreat(
    later, g, first, gates, cells, dz, dc, row, column, inside, length, step,
    batch, hidden, REVERSE: tl.constexpr,
):  # fmt: skip
    """ż_i, ż_f, ż_g and ż_o of a tile, from what the step after it sent: `later`, and dc."""
    active = inside & (step < length)[:, None]
    place = _places(row, length, step, batch, REVERSE)[:, None]
    here = place * hidden + column
    gates += place * 4 * hidden + column
    i = tl.load(gates, mask=active, other=0.0)
    f = tl.load(gates + hidden, mask=active, other=0.0)
    v = tl.load(gates + 2 * hidden, mask=active, other=0.0)
    o = tl.load(gates + 3 * hidden, mask=active, other=0.0)
    t = _tanh(tl.load(cells + here, mask=active, other=0.0))
    at = row[:, None] * hidden + column
    if step == 0:
        c_before = tl.load(first + at, mask=active, other=0.0).to(tl.float32)
    else:
        earlier = place + batch if REVERSE else place - batch
        c_before = tl.load(cells + earlier * hidden + column, mask=active, other=0.0)
    dh = later + tl.load(g + here, mask=active, other=0.0).to(tl.float32)
    dc_now = tl.load(dc + at, mask=active, other=0.0) + dh * o * (1.0 - t * t)
    tl.store(dc + at, dc_now * f, mask=active)
    zi = dc_now * v * i * (1.0 - i)
    zf = dc_now * c_before * f * (1.0 - f)
    zg = dc_now * i * (1.0 - v * v)
    zo = dh * t * o * (1.0 - o)
    dz += place * 4 * hidden + column
    _store_gates(dz, zi, zf, zg, zo, hidden, active)
    return zi, zf, zg, zo


@triton.jit
def _store_gates(at, zi, zf, zg, zo, hidden, mask):
    tl.store(at, zi.to(at.dtype.element_ty), mask=mask)
    tl.store(at + hidden, zf.to(at.dtype.element_ty), mask=mask)
    tl.store(at + 2 * hidden, zg.to(at.dtype.element_ty), mask=mask)
    tl.store(at + 3 * hidden, zo.to(at.dtype.element_ty), mask=mask)


# --- a launch a step ------------------------------------------------------------------------------


@triton.jit
def _forward_step(
    z, product, counts, y, gates, cells, states, c, time, batch, hidden, step,
    REVERSE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gates of a step, whose U h′ is in `product`."""
    row, inside, length, _ = _sequences(counts, time, batch, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = inside[:, None] & (column < hidden)
    product += row[:, None] * 4 * hidden + column
    zi = tl.load(product, mask=inside, other=0.0)
    zf = tl.load(product + hidden, mask=inside, other=0.0)
    zg = tl.load(product + 2 * hidden, mask=inside, other=0.0)
    zo = tl.load(product + 3 * hidden, mask=inside, other=0.0)
    h = states + tl.cast((step + 1) % 2, tl.int64) * batch * hidden
    _advance(
        zi, zf, zg, zo, z, y, gates, cells, h, c, row, column, inside, length, step,
        time, batch, hidden, REVERSE,
    )  # fmt: skip


@triton.jit
def _backward_step(
    g, first, counts, gates, cells, product, dz, now, dh, dc, time, batch, hidden, step,
    REVERSE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ż of a step, into its place in dz and, for the next product, into `now`."""
    row, inside, length, _ = _sequences(counts, time, batch, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = inside[:, None] & (column < hidden)
    at, ends = row[:, None] * hidden + column, (step == length - 1)[:, None]
    later = tl.load(dh + at, mask=inside & ends, other=0.0)
    later += tl.load(product + at, mask=inside & (step < length - 1)[:, None], other=0.0)
    zi, zf, zg, zo = _retreat(
        later, g, first, gates, cells, dz, dc, row, column, inside, length, step,
        batch, hidden, REVERSE,
    )  # fmt: skip
    # Of a sequence that is not there everything was 0 that the gates are multiplied with.
    _store_gates(now + row[:, None] * 4 * hidden + column, zi, zf, zg, zo, hidden, inside)


# --- all steps in one launch ----------------------------------------------------------------------


@triton.jit
def _forward_layer(
    z, u, h0, counts, y, gates, cells, states, c, time, batch, hidden,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """ROWS sequences through all their steps; h goes from step to step through `states`.

    Other threads of the program wrote what a thread reads there: hence the barriers.
    """
    row, inside, length, steps = _sequences(counts, time, batch, ROWS)
    offset = row[:, None] * hidden
    for start in range(0, hidden, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        mask = inside[:, None] & (column < hidden)
        tl.store(states + offset + column, tl.load(h0 + offset + column, mask=mask), mask=mask)
    tl.debug_barrier()
    for step in range(0, steps):
        h = states + tl.cast(step % 2, tl.int64) * batch * hidden
        h_next = states + tl.cast((step + 1) % 2, tl.int64) * batch * hidden
        for start in range(0, hidden, BLOCK):
            column = start + tl.arange(0, BLOCK)[None, :]
            zi = tl.zeros([ROWS, BLOCK], tl.float32)
            zf = tl.zeros([ROWS, BLOCK], tl.float32)
            zg = tl.zeros([ROWS, BLOCK], tl.float32)
            zo = tl.zeros([ROWS, BLOCK], tl.float32)
            for inner in range(0, hidden, INNER):
                k = inner + tl.arange(0, INNER)
                mask = inside[:, None] & (k < hidden)[None, :]
                a = tl.load(h + offset + k[None, :], mask=mask, other=0.0)
                mask = (k < hidden)[:, None] & (column < hidden)
                at = u + column.to(tl.int64) * hidden + k[:, None]
                size = tl.cast(hidden, tl.int64) * hidden
                b = tl.load(at, mask=mask, other=0.0)
                zi = tl.dot(a, b, zi, input_precision=PRECISION)
                b = tl.load(at + size, mask=mask, other=0.0)
                zf = tl.dot(a, b, zf, input_precision=PRECISION)
                b = tl.load(at + 2 * size, mask=mask, other=0.0)
                zg = tl.dot(a, b, zg, input_precision=PRECISION)
                b = tl.load(at + 3 * size, mask=mask, other=0.0)
                zo = tl.dot(a, b, zo, input_precision=PRECISION)
            _advance(
                zi, zf, zg, zo, z, y, gates, cells, h_next, c, row, column,
                inside[:, None] & (column < hidden), length, step,
                time, batch, hidden, REVERSE,
            )  # fmt: skip
        tl.debug_barrier()


@triton.jit
def _backward_layer(
    g, first, counts, gates, cells, u, dz, dh, dc, time, batch, hidden,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """ROWS sequences from their last step to their first; ż goes through dz into ḣ′ = Uᵀ ż."""
    row, inside, length, steps = _sequences(counts, time, batch, ROWS)
    offset = row[:, None] * hidden
    for back in range(0, steps):
        step = steps - 1 - back
        for start in range(0, hidden, BLOCK):
            column = start + tl.arange(0, BLOCK)[None, :]
            mask = inside[:, None] & (column < hidden)
            later = tl.load(dh + offset + column, mask=mask, other=0.0)
            _retreat(
                later, g, first, gates, cells, dz, dc, row, column, mask, length, step,
                batch, hidden, REVERSE,
            )  # fmt: skip
        tl.debug_barrier()
        active = inside & (step < length)
        now = dz + _places(row, length, step, batch, REVERSE)[:, None] * 4 * hidden
        for start in range(0, hidden, BLOCK):
            column = start + tl.arange(0, BLOCK)[None, :]
            total = tl.zeros([ROWS, BLOCK], tl.float32)
            for inner in range(0, 4 * hidden, INNER):
                k = inner + tl.arange(0, INNER)
                mask = active[:, None] & (k < 4 * hidden)[None, :]
                a = tl.load(now + k[None, :], mask=mask, other=0.0)
                mask = (k < 4 * hidden)[:, None] & (column < hidden)
                b = tl.load(u + k[:, None].to(tl.int64) * hidden + column, mask=mask, other=0.0)
                total = tl.dot(a, b, total, input_precision=PRECISION)
            tl.store(dh + offset + column, total, mask=active[:, None] & (column < hidden))
        tl.debug_barrier()


# --- for the x-ray --------------------------------------------------------------------------------


def specimens(dtype: str) -> Iterator[Specimen]:
    """A tagger's layer of 128, all its steps at once; one of 512, so and a launch a step."""
    x, half = f"*{dtype}", dtype != "fp32"
    size = 2 if half else 4
    numbers = dict.fromkeys(("z", "gates", "cells", "c", "dh", "dc", "product"), "*fp32")
    arrays = dict.fromkeys(("u", "h0", "y", "states", "g", "first", "dz", "now"), x)

    def made(
        name: str,
        kernel: Any,
        sizes: tuple[int, int, int],
        config: Config,
        known: Any = (),
        **of: Any,
    ) -> Specimen:
        time, batch, hidden = sizes
        layer, constants = _split(config)
        also = {"counts": None, "time": time, "batch": batch, "hidden": hidden, "REVERSE": False}
        also |= {"PRECISION": "tf32"} if layer else {"step": time // 2}
        options = {
            key: constants.pop(key) for key in ("num_warps", "num_stages") if key in constants
        }
        every = numbers | arrays | also | constants | of
        arguments = {key: every[key] for key in kernel.arg_names}
        wide, narrow = {  # numbers that an element of h moves, in float32 and in the arrays' dtype
            _forward_layer: (11, 3),
            _backward_layer: (10, 9),
            _forward_step: (15, 2),
            _backward_step: (9, 9),
        }[kernel]
        elements = config["ROWS"] * (time * hidden if layer else config["BLOCK"])
        moved, flops = elements * (wide * 4 + narrow * size), 40 * elements
        if layer:
            moved += time * 4 * hidden * hidden * size
            flops += 8 * elements * hidden
        return Specimen(name, kernel, arguments, bytes=moved, flops=flops, known=known, **options)

    small, large = (64, 64, 128), (64, 64, 512)
    configs = [c for c in _for_gpu(64, 128, size) if c["LAYER"]]
    for config in configs:
        tile = f"{config['ROWS']} × {config['BLOCK']}"
        yield made(f"forward, all steps, {tile}", _forward_layer, small, config)
        yield made(f"backward, all steps, {tile}", _backward_layer, small, config)
    lengths = {"counts": "*i32", "REVERSE": True}
    yield made("forward, lengths, reverse", _forward_layer, large, configs[0], **lengths)
    yield made("backward, lengths, reverse", _backward_layer, large, configs[0], **lengths)
    if not half:
        exact = {"PRECISION": "ieee"}
        yield made("forward, exact", _forward_layer, small, configs[0], **exact)
        yield made("backward, exact", _backward_layer, small, configs[0], **exact)
    (odd, *_) = _for_gpu(1, 101, size)
    yield made("forward, odd sizes", _forward_layer, (1, 1, 101), odd)
    spills = Known("spills", "at float32, 128 registers fall two short", (90,), at_most=16)
    known = (spills,) * (not half)
    yield made("backward, odd sizes", _backward_layer, (1, 1, 101), odd, known)
    yield made("forward, a step", _forward_step, large, _STEP)
    yield made("backward, a step", _backward_step, large, _STEP, **lengths)
    yield made("forward, the second step", _forward_step, large, _STEP, step=1)
    yield made("backward, the first step", _backward_step, large, _STEP, step=0)
    yield made("backward, the second step", _backward_step, large, _STEP, step=1)
