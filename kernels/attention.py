"""Attention without its matrix of weights: flash attention, forward and backward.

    X = s Q Kᵀ + bias, −∞ where hidden        P = softmax(X)        P̃ = P ⊙ m / (1 − p)
    Y = P̃ V        L = log₂ Σ 2^(X log₂ e), one number a query

    δ = Σ g ⊙ y        dS = P ⊙ (dP − δ),  dP = (g Vᵀ) ⊙ m / (1 − p)
    dV = P̃ᵀ g        dQ = s dS K        dK = s dSᵀ Q        dbias = dS

A tile of queries walks over the keys: the largest score m and the sum of weights so far are kept
"online", and when a tile raises m, what came before shrinks by 2^(m_old − m). Exponents are in base
2, which GPUs have as one instruction. Backward computes P again from L. All statistics and sums are
float32; the products are tensor-core products of the arrays' own dtype.

                  memory                                     products of 2·T·S·D FLOPs
    forward       |Q| + |Y| + (K and V, once a query tile)   2
    backward      dQ: as the forward, dK and dV: Q and g     7: 3 for dQ, 4 for dK and dV
                  once a key tile

of which a causal mask leaves out half. Nothing of size T·S is written. Backward takes two passes,
dQ by query and dK, dV by key, where one with atomic additions would have 5 products: so its sums
have an order, and two runs give the same bits. A query that sees no key gives zeros.

Heads in groups share keys: the queries of a group lie in one tile, so that a single new token
(T = 1) fills it with its group, and K and V are read once for all. Where queries are too few to
fill a GPU, the keys are split, and `_combine` adds up what the splits found.

Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018. Dao et al.,
"FlashAttention", 2022. Dao, "FlashAttention-2", 2023, and "Flash-Decoding", 2023. Press et al.,
"Train short, test long" (ALiBi), 2022.

Dimensions: B batch, H heads, H′ heads of keys and values, T queries, S keys, D and E head sizes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from tinygrad_llm.backend import Array, namespace
from tinygrad_llm.kernels.compile import Known, Specimen
from tinygrad_llm.kernels.language import INTERPRETED, tl, triton
from tinygrad_llm.kernels.launch import cdiv, launch, next_power_of_2
from tinygrad_llm.kernels.layout import broadcast, check_floats, merge_axes, needs_int64, strides
from tinygrad_llm.kernels.tune import Config, choose

LARGEST_HEAD = 256
PRECISIONS = ("ieee", "tf32")
_LOG2E = tl.constexpr(math.log2(math.e))

Saved = tuple[Array, Array, Array, Array | None, Array | None, Array | None, Array | None, Any, Any]


def forward(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None = None,
    hidden: Array | None = None,
    lengths: Array | None = None,
    slopes: Array | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    p: float = 0.0,
    draw: tuple[int, int | Array] = (0, 0),
    precision: str = "ieee",
    config: Config | None = None,
) -> tuple[Array, Saved]:
    """y = P̃ V, P = softmax(s Q Kᵀ + bias)

    Args:
        q: (B, H, T, D) float32, float16 or bfloat16, any strides; or any other leading axes.
        k: (B, H′, S, D) of q's dtype, where H′ divides H.
        v: (B, H′, S, E).
        bias: added to the scores, of a shape that broadcasts to (B, H, T, S); −∞ hides.
        hidden: boolean, broadcasts likewise, True where a query may not see a key.
        lengths: (B,) integers, how many keys of each sequence are real; the rest is padding.
        slopes: (H,) floats, ALiBi: head h adds −slope · |distance| to the scores.
        causal: query t stands at key S − T + t, the last at the last, and sees none after it.
        window: a query sees keys that are less than `window` away from it.
        scale: s, else 1/√D.
        p: the probability of dropping a weight. Weight i, in C order of (B, H, T, S), is kept where
            word i of the Philox stream at `draw` = (seed, offset) is at least p · 2³². The offset
            may also be an int64 array with one element, which a CUDA graph reads at each replay.
        precision: of float32 products, "ieee" or, on tensor cores, "tf32".
        config: {'BLOCK_T', 'BLOCK_S', 'SPLITS', 'num_warps', 'num_stages'} instead of the tuned.

    Returns:
        (y, saved): y (B, H, T, E), laid out in memory as q; `backward` takes what was saved, the
        inputs, y and L.

    Raises:
        TypeError, ValueError: dtypes or shapes that do not go together, a head above 256.
    """
    _check(q, k, v, bias, hidden, lengths, slopes, window, p)
    if q.ndim == 2:
        y, saved = forward(
            *(q[None], k[None], v[None], bias, hidden, lengths, slopes),
            causal=causal, window=window, scale=scale, p=p, draw=draw, precision=precision,
            config=config,
        )  # fmt: skip
        return y[0], saved
    xp, (t, s) = namespace(q), (q.shape[-2], k.shape[-2])
    logs = xp.empty(q.shape[:-1], dtype=xp.float32)
    masks = _masks(q, k, bias, hidden, lengths, slopes)
    inputs = _walkable(k, [q, k, v, *masks])
    y = _empty_like(q, v.shape[-1], k, inputs)
    saved = (q, k, v, bias, hidden, lengths, slopes, y, logs)
    if logs.size == 0:
        return y, saved
    options = _options(q, k, v, causal, window, scale, p, draw, precision)

    def run(config: Config) -> None:
        config = dict(config)
        tile, block = config["BLOCK_T"], config["BLOCK_S"]
        splits = config.pop("SPLITS", 1)
        chunk = cdiv(cdiv(s, block), splits) * block
        out, sums = y, logs
        if splits > 1:
            out = xp.empty((splits, *y.shape), dtype=xp.float32)
            sums = xp.empty((splits, *logs.shape), dtype=xp.float32)
        view = _layout(k, [*inputs, out[0] if splits > 1 else out])
        launch(
            _forward,
            (view.batch * cdiv(view.group * t, tile), splits),
            *(*view.arrays[:-1], out, sums, view.n2, view.group, t, s, math.prod(q.shape[:-1])),
            *(chunk, *view.steps, *options.numbers),
            SPLIT=splits > 1,
            WIDE=view.wide,
            **options.constants,
            **config,
        )
        if splits > 1:
            _launch_combine(k, out, sums, y, logs, splits)

    run(config or _tuned(_forward, _forward_candidates, q, k, v, run, options))
    return y, saved


def backward(
    g: Array,
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    hidden: Array | None,
    lengths: Array | None,
    slopes: Array | None,
    y: Array,
    logs: Array,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    p: float = 0.0,
    draw: tuple[int, int | Array] = (0, 0),
    precision: str = "ieee",
    bias_gradient: bool = False,
    config: Config | None = None,
) -> tuple[Array, Array, Array, Array | None]:
    """(dq, dk, dv, dbias) from the gradient of y; the same bits at each run.

    Args:
        g: the gradient of y, of y's shape, any strides.
        q, …, logs: what `forward` saved; the options are those of the forward.
        bias_gradient: whether dbias is wanted. It takes a pass of its own, which sums over the
            axes along which the bias was broadcast.
        config: {'BLOCK_T', 'BLOCK_S', 'num_warps', 'num_stages'} of all passes.

    Returns:
        Gradients of the shapes and dtypes of q, k, v and bias; dbias is None where not wanted.
    """
    check_floats("attention", g)
    if g.ndim == q.ndim - 1 == 2:  # the forward was of (T, D) arrays
        dq, dk, dv, dbias = backward(
            *(g[None], q, k, v, bias, hidden, lengths, slopes, y, logs),
            causal=causal, window=window, scale=scale, p=p, draw=draw, precision=precision,
            bias_gradient=bias_gradient, config=config,
        )  # fmt: skip
        return dq[0], dk[0], dv[0], dbias
    if g.shape != y.shape:
        raise ValueError(f"attention needs a gradient of the shape {y.shape}, got {g.shape}")
    if bias_gradient and bias is None:
        raise ValueError("attention has no bias here, so bias_gradient=True asks for nothing")
    xp = namespace(q)
    masks = _masks(q, k, bias, hidden, lengths, slopes)
    inputs = _walkable(k, [q, k, v, *masks, y, g])
    dq, dk, dv = [_empty_like(x, x.shape[-1], k, inputs) for x in (q, k, v)]
    delta = xp.empty_like(logs)
    dbias = xp.zeros(bias.shape, dtype=bias.dtype) if bias_gradient and bias is not None else None
    if math.prod(k.shape[:-2]) == 0:
        return dq, dk, dv, dbias
    options = _options(q, k, v, causal, window, scale, p, draw, precision)
    t, s = q.shape[-2], k.shape[-2]

    def queries(config: Config) -> None:
        view = _layout(k, [*inputs, dq])
        launch(
            _backward_queries,
            view.batch * cdiv(view.group * t, config["BLOCK_T"]),
            *(*view.arrays, logs, delta, view.n2, view.group, t, s),
            *(*view.steps, *options.numbers),
            WIDE=view.wide,
            **options.constants,
            **config,
        )

    def keys(config: Config) -> None:
        view = _layout(k, [*inputs[:-2], inputs[-1], dk, dv])
        launch(
            _backward_keys,
            view.batch * cdiv(s, config["BLOCK_S"]),
            *(*view.arrays, logs, delta, view.n2, view.group, t, s),
            *(*view.steps, *options.numbers),
            WIDE=view.wide,
            **options.constants,
            **config,
        )

    run = queries  # first, since it also writes δ
    run(config or _tuned(_backward_queries, _query_candidates, q, k, v, run, options))
    run = keys
    run(config or _tuned(_backward_keys, _key_candidates, q, k, v, run, options))
    if dbias is not None and logs.size and s:
        _launch_bias(k, inputs, dbias, logs, delta, options, config)
    return dq, dk, dv, dbias


def _check(
    q: Array, k: Array, v: Array, bias: Any, hidden: Any, lengths: Any, slopes: Any,
    window: int | None, p: float,
) -> None:  # fmt: skip
    check_floats("attention", *[x for x in (q, k, v, bias, slopes) if x is not None])
    shapes = f"got q {q.shape}, k {k.shape}, v {v.shape}"
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"attention needs one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not (q.ndim == k.ndim == v.ndim >= 2):
        raise ValueError(f"attention needs q, k and v of equal rank ≥ 2, {shapes}")
    if q.shape[-1] != k.shape[-1] or k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"attention needs k (…, S, D) and v (…, S, E) for q (…, T, D), {shapes}")
    if q.ndim > 2:
        heads, shared = q.shape[-3], k.shape[-3]
        if q.shape[:-3] != k.shape[:-3] or (heads != shared and (not shared or heads % shared)):
            raise ValueError(
                f"the batch must agree and the key's heads must divide the query's, {shapes}"
            )
    if max(q.shape[-1], v.shape[-1]) > LARGEST_HEAD:
        raise ValueError(f"the attention kernel takes heads of at most {LARGEST_HEAD}, {shapes}")
    if hidden is not None and hidden.dtype != bool:
        raise TypeError(f"hidden is boolean (True = not to be seen), got {hidden.dtype}")
    if lengths is not None and (
        q.ndim < 3 or lengths.shape != q.shape[:1] or lengths.dtype.kind not in "iu"
    ):
        raise ValueError(
            f"lengths must be {q.shape[:1]} integers, got {lengths.dtype} of shape {lengths.shape}"
        )
    if slopes is not None and slopes.shape != (q.shape[-3] if q.ndim > 2 else 1,):
        raise ValueError(
            f"slopes must be one number a head, got the shape {slopes.shape}, {shapes}"
        )
    if window is not None and window < 1:
        raise ValueError(f"a window holds at least the key of the query itself: 1, got {window}")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"attention needs 0 ≤ p < 1, got {p}")


# --- how the arrays lie ---------------------------------------------------------------------------


def _masks(q: Array, k: Array, bias: Any, hidden: Any, lengths: Any, slopes: Any) -> list[Any]:
    """[bias, hidden, lengths, slopes], each as if it were of the scores' shape, or None."""
    scores = (*q.shape[:-1], k.shape[-2])
    if lengths is not None:
        lengths = lengths.reshape(-1, *(1,) * (q.ndim - 1))
    if slopes is not None:
        slopes = slopes.reshape(-1, 1, 1)
    if hidden is not None:
        hidden = hidden.view("uint8")
    given = {"a bias": bias, "a mask": hidden, "lengths": lengths, "slopes": slopes}
    return [
        None if x is None else broadcast("attention", x, scores, name) for name, x in given.items()
    ]


class _View(NamedTuple):
    """Arrays (…, H, T or S, D) with their leading axes as two, and heads as groups."""

    arrays: list[Any]
    batch: int  # how many heads of keys in all: n₁ · n₂
    n2: int
    group: int  # how many heads of queries to one of keys
    steps: list[int]  # of each array in elements: along n₁, n₂, the group, its rows, its columns
    wide: bool  # whether an offset within a group may need 64 bits


def _layout(k: Array, arrays: list[Any]) -> _View:
    """The arrays, of which the first is q or as large, as one `_View`."""
    found = _leading(k, arrays)
    assert found is not None  # since `_walkable` and `_empty_like` gave the arrays
    (n1, n2), given = found[0], iter(found[1])
    steps = [n for a in arrays for n in ((0,) * 5 if a is None else next(given))]
    group = arrays[0].shape[-3] // max(1, k.shape[-3])
    wide = any(needs_int64(a[(0,) * (a.ndim - 3)]) for a in arrays if a is not None)
    return _View(arrays, n1 * n2, n2, group, steps, wide)


def _walkable(k: Array, arrays: list[Any]) -> list[Any]:
    """The arrays; or copies, where more than two leading axes go through memory in odd ways."""
    if _leading(k, arrays) is not None:
        return arrays
    return [a if a is None else namespace(k).ascontiguousarray(a) for a in arrays]


def _empty_like(x: Array, columns: int, k: Array, arrays: list[Any]) -> Array:
    """A new array (…, columns) with its axes in memory in the order of x's, where that will do."""
    shape = (*x.shape[:-1], columns)
    y = namespace(x).empty_like(x, shape=shape)
    return y if _leading(k, [*arrays, y]) else namespace(x).empty(shape, dtype=x.dtype)


def _leading(k: Array, arrays: list[Any]) -> Any:
    return _merged(k.shape[:-2], *[(a.shape[-3], strides(a)) for a in arrays if a is not None])


@functools.lru_cache(4096)
def _merged(
    shape: tuple[int, ...], *arrays: tuple[int, tuple[int, ...]]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]] | None:
    """((n₁, n₂), the five steps of each array); remembered, since a model has few shapes."""
    leading, inner = [], []
    for heads, steps in arrays:
        group = heads // max(1, shape[-1])
        leading.append((*steps[:-3], steps[-3] * group))
        inner.append((steps[-3] if group > 1 else 0, *steps[-2:]))
    found = merge_axes(shape, *leading, at_most=2)
    return found and (found[0], [a + b for a, b in zip(found[1], inner, strict=True)])


class _Options(NamedTuple):
    """What all the kernels take besides arrays."""

    numbers: tuple[Any, ...]  # scale, window, seed, offset, threshold, 1 / (1 − p)
    constants: Config
    kind: Config  # what makes other kernels of them, for the key of the tuning
    products: str  # "half", "ieee" or "tf32"


def _options(
    q: Array, k: Array, v: Array, causal: bool, window: int | None, scale: float | None,
    p: float, draw: tuple[int, int | Array], precision: str,
) -> _Options:  # fmt: skip
    if precision not in PRECISIONS:
        raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, got {precision!r}")
    d, e = q.shape[-1], v.shape[-1]
    scale = 1.0 / math.sqrt(d or 1) if scale is None else float(scale)
    threshold = min(round(p * 2**32), 2**32 - 1)  # as in ops/dropout.py: the same mask
    kind = {
        "CAUSAL": bool(causal),
        "WINDOW": window is not None,
        "DROPOUT": p > 0.0,
        "PRECISION": precision if q.itemsize == 4 else "ieee",
    }
    constants = {
        **kind,
        "QUADS": k.shape[-2] % 4 == 0,
        "D": d,
        "E": e,
        "BLOCK_D": max(16, next_power_of_2(d)),
        "BLOCK_E": max(16, next_power_of_2(e)),
    }
    numbers = (scale, window or 0, *draw, threshold, 1.0 / (1.0 - p))
    return _Options(numbers, constants, kind, precision if q.itemsize == 4 else "half")


# They change from call to call: no kernel of its own for one that is 1 or a multiple of 16.
_DRAWN = ["seed", "offset", "threshold"]


# --- a tile of queries and what it may see --------------------------------------------------------


@triton.jit
def _rows(row, member, t, inside, T, S, padding, alibi, WIDE: tl.constexpr):
    """A tile of queries, as a column or as a row of numbers: which of the arrays' queries each is,
    its head in the group, its time, whether it exists, at which key it stands, how many keys are
    real for it, and its slope."""
    lengths, lengths_at, lengths_step = padding
    slopes, slopes_at, slopes_step = alibi
    position = t + (S - T)
    length = tl.zeros_like(position) + S
    if lengths is not None:
        given = tl.load(lengths + lengths_at + member * lengths_step, mask=inside, other=0)
        length = tl.minimum(given.to(tl.int64), S).to(tl.int32)
    slope = position
    if slopes is not None:
        slope = tl.load(slopes + slopes_at + member * slopes_step, mask=inside, other=0.0)
        slope = slope.to(tl.float32)
    if WIDE:
        member, t = member.to(tl.int64), t.to(tl.int64)
    return row, member, t, inside, position, length, slope


@triton.jit
def _group_rows(
    tile, first, group, T, S, padding, alibi, WIDE: tl.constexpr, BLOCK_T: tl.constexpr
):
    """Tile `tile` of the queries of a group, one head after the other, as a column."""
    r = tile * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    return _rows(first + r, r // T, r % T, r < group * T, T, S, padding, alibi, WIDE)


@triton.jit
def _keys_of(rows, S, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_S: tl.constexpr):
    """(first, full, last): keys that some query of the tile sees, up to `full` in whole blocks that
    all of them see, but for masks. Keys after S, in the last block, are seen by none."""
    _, _, _, inside, position, length, _ = rows
    # The keys that come right after the earliest and after the latest of the queries.
    early = tl.min(tl.where(inside, position + 1, 2147483647))
    late = tl.max(tl.where(inside, position + 1, -2147483648))
    first = early * 0
    full = tl.min(tl.where(inside, length, 2147483647))
    last = tl.max(tl.where(inside, length, 0))
    if CAUSAL:
        full = tl.minimum(full, early)
        last = tl.minimum(last, late)
    if WINDOW:
        first = tl.maximum(early - window, 0) // BLOCK_S * BLOCK_S
        full = first
        last = tl.minimum(last, late + (window - 1))
    return first, tl.maximum(full, 0) // BLOCK_S * BLOCK_S, last


@triton.jit
def _load(
    x, index, inside, step, column_step, MASKED, WIDE: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows `index` of x (…, D), with zeros for what there is not."""
    column = tl.arange(0, BLOCK_D)[None, :]
    if WIDE:
        index, column = index.to(tl.int64), column.to(tl.int64)
    x += index * step + column * column_step
    if D < BLOCK_D:
        return tl.load(x, mask=inside & (column < D), other=0.0)
    elif MASKED:
        return tl.load(x, mask=inside, other=0.0)
    else:
        return tl.load(x)


@triton.jit
def _exponents(
    x, rows, s, inside, scale, window, masks,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASKED,
):  # fmt: skip
    """log₂ e (s Q Kᵀ + bias) from a tile of Q Kᵀ, −∞ where a query does not see a key.

    Without MASKED, the tile is known to be seen but for `hidden`.
    """
    (
        bias, bias_at, bias2, bias3, bias4,
        hidden, hidden_at, hidden2, hidden3, hidden4, slopes,
    ) = masks  # fmt: skip
    _, member, t, _, position, length, slope = rows
    x *= scale * _LOG2E
    if bias is not None:
        at = member * bias2 + t * bias3 + s.to(t.dtype) * bias4
        added = tl.load(bias + bias_at + at, mask=inside, other=0.0)
        x += added.to(tl.float32) * _LOG2E
    if slopes is not None:
        x -= slope * tl.abs(position - s).to(tl.float32) * _LOG2E
    if MASKED:
        seen = s < length
        if CAUSAL:
            seen = seen & (s <= position)
        if WINDOW:
            seen = seen & (position - s < window)
            if not CAUSAL:
                seen = seen & (s - position < window)
        x = tl.where(seen, x, -float("inf"))
    if hidden is not None:
        at = member * hidden2 + t * hidden3 + s.to(t.dtype) * hidden4
        x = tl.where(tl.load(hidden + hidden_at + at, mask=inside, other=1) == 0, x, -float("inf"))
    return x


@triton.jit
def _kept(row, first, S, dropout, QUADS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which weights of a tile dropout keeps, for rows (a column of numbers) and keys from `first`.

    Word i % 4 of the stream's counter i // 4 decides on weight i. Where S is a multiple of 4, the
    four words of a counter are four neighbours, so that each is computed once.
    """
    seed, offset, threshold = dropout
    if offset.dtype.is_ptr():  # of a captured graph, which repeats its arguments but not its memory
        offset = tl.load(offset)
    row = row.to(tl.int64)
    if QUADS:
        quad = first // 4 + tl.arange(0, COLUMNS // 4)[None, :]
        a, b, c, d = _words(row * (S // 4) + quad + offset, seed)
        word = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, COLUMNS))
    else:
        index = row * S + (first + tl.arange(0, COLUMNS)[None, :])
        a, b, c, d = _words(index // 4 + offset, seed)
        which = index % 4
        word = tl.where(which < 2, tl.where(which == 0, a, b), tl.where(which == 2, c, d))
    return word >= tl.cast(threshold, tl.uint32)


@triton.jit
def _words(counter, seed):
    """The four words of 64-bit counters."""
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, low, high, 0, 0)


# --- forward --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_DRAWN)
def _forward(
    q, k, v, bias, hidden, lengths, slopes, y, logs,
    n2, group, T, S, queries, chunk,
    q0, q1, q2, q3, q4, k0, k1, k2, k3, k4, v0, v1, v2, v3, v4,
    bias0, bias1, bias2, bias3, bias4, hidden0, hidden1, hidden2, hidden3, hidden4,
    lengths0, lengths1, lengths2, lengths3, lengths4, slopes0, slopes1, slopes2, slopes3, slopes4,
    y0, y1, y2, y3, y4,
    scale, window, seed, offset, threshold, keep_scale,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DROPOUT: tl.constexpr, QUADS: tl.constexpr,
    SPLIT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A tile of queries against all keys that it sees, or under SPLIT those of one chunk."""
    tiles = (group * T + BLOCK_T - 1) // BLOCK_T
    pair, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if CAUSAL:  # the longest walks first, so that none is left alone at the end
        tile = tiles - 1 - tile
    n1, n2 = (pair // n2).to(tl.int64), (pair % n2).to(tl.int64)
    q += n1 * q0 + n2 * q1
    k += n1 * k0 + n2 * k1
    v += n1 * v0 + n2 * v1
    y += n1 * y0 + n2 * y1
    padding = (lengths, n1 * lengths0 + n2 * lengths1, lengths2)
    alibi = (slopes, n1 * slopes0 + n2 * slopes1, slopes2)
    masks = (
        bias, n1 * bias0 + n2 * bias1, bias2, bias3, bias4,
        hidden, n1 * hidden0 + n2 * hidden1, hidden2, hidden3, hidden4, slopes,
    )  # fmt: skip
    first_row = pair.to(tl.int64) * group * T
    rows = _group_rows(tile, first_row, group, T, S, padding, alibi, WIDE, BLOCK_T)
    row, member, t, inside, _, _, _ = rows
    first, full, last = _keys_of(rows, S, window, CAUSAL, WINDOW, BLOCK_S)
    if SPLIT:
        split = tl.program_id(1)
        y += split.to(tl.int64) * queries * E
        logs += split.to(tl.int64) * queries
        first = tl.maximum(first, split * chunk)
        last = tl.minimum(last, (split + 1) * chunk)
        full = tl.minimum(full, last) // BLOCK_S * BLOCK_S
    full = tl.maximum(full, first)
    q += member * q2
    q_tile = _load(q, t, inside, q3, q4, True, WIDE, D, BLOCK_D)
    sums = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    total = tl.zeros([BLOCK_T, 1], tl.float32)
    m = tl.full([BLOCK_T, 1], -float("inf"), tl.float32)
    keys = (k, k3, k4, v, v3, v4)
    dropout = (seed, offset, threshold)
    sums, total, m = _weigh(
        sums, total, m, q_tile, keys, rows, masks, dropout, first, full, S, scale, window,
        CAUSAL, WINDOW, DROPOUT, QUADS, False, WIDE, PRECISION,
        D, E, BLOCK_D, BLOCK_E, BLOCK_T, BLOCK_S,
    )  # fmt: skip
    sums, total, m = _weigh(
        sums, total, m, q_tile, keys, rows, masks, dropout, full, last, S, scale, window,
        CAUSAL, WINDOW, DROPOUT, QUADS, True, WIDE, PRECISION,
        D, E, BLOCK_D, BLOCK_E, BLOCK_T, BLOCK_S,
    )  # fmt: skip
    nothing = total == 0.0
    if DROPOUT:
        sums *= keep_scale
    sums /= tl.where(nothing, 1.0, total)
    # +∞ where nothing is seen: backward's P = 2^(x − L) is 0 there. `_combine` wants its weight, 0.
    unseen = -float("inf") if SPLIT else float("inf")
    tl.store(logs + row, tl.where(nothing, unseen, m + tl.log2(total)), mask=inside)
    _store(y + member * y2, sums, t, inside, y3, y4, E, BLOCK_E)


@triton.jit
def _weigh(
    sums, total, m, q, keys, rows, masks, dropout, start, stop, S, scale, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DROPOUT: tl.constexpr, QUADS: tl.constexpr,
    MASKED, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Σ 2^(x − m) V, Σ 2^(x − m) and m, gone on with over the keys from `start` to `stop`."""
    k, k_step, k_column, v, v_step, v_column = keys
    for first in range(start, stop, BLOCK_S):
        index = first + tl.arange(0, BLOCK_S)[:, None]
        s = first + tl.arange(0, BLOCK_S)[None, :]
        k_tile = _load(k, index, index < S, k_step, k_column, MASKED, WIDE, D, BLOCK_D)
        x = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
        x = _exponents(x, rows, s, rows[3] & (s < S), scale, window, masks, CAUSAL, WINDOW, MASKED)
        m_new = tl.maximum(m, tl.max(x, 1, keep_dims=True))
        # Nothing seen so far: there is nothing to subtract, and −∞ − −∞ would be NaN.
        base = tl.where(m_new == -float("inf"), 0.0, m_new)
        p = tl.exp2(x - base)
        shrink = tl.exp2(m - base)
        total = total * shrink + tl.sum(p, 1, keep_dims=True)
        if DROPOUT:
            p = tl.where(_kept(rows[0], first, S, dropout, QUADS, BLOCK_T, BLOCK_S), p, 0.0)
        v_tile = _load(v, index, index < S, v_step, v_column, MASKED, WIDE, E, BLOCK_E)
        sums = tl.dot(p.to(v_tile.dtype), v_tile, sums * shrink, input_precision=PRECISION)
        m = m_new
    return sums, total, m


@triton.jit
def _store(
    y, value, index, inside, step, column_step, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Write rows `index` of y (…, D)."""
    column = tl.arange(0, BLOCK_D)[None, :].to(index.dtype)
    value = value.to(y.dtype.element_ty)
    tl.store(y + index * step + column * column_step, value, mask=inside & (column < D))


def _launch_combine(
    k: Array, parts: Array, part_logs: Array, y: Array, logs: Array, splits: int
) -> None:
    view = _layout(k, [y])
    t, e = y.shape[-2:]
    config: Config = {"ROWS": 64 if INTERPRETED else 4, "BLOCK_E": next_power_of_2(e)}
    launch(
        _combine,
        cdiv(logs.size, config["ROWS"]),
        *(parts, part_logs, y, logs, logs.size, splits, view.n2, view.group, t, e, *view.steps),
        **config,
    )


@triton.jit
def _combine(
    parts, part_logs, y, logs, queries, splits, n2, group, T, E, y0, y1, y2, y3, y4,
    ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """y = Σ 2^(Lᵢ − m) yᵢ / Σ 2^(Lᵢ − m), L = m + log₂ Σ 2^(Lᵢ − m) over the splits i."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = row < queries
    column = tl.arange(0, BLOCK_E)[None, :]
    both = inside & (column < E)
    sums = tl.zeros([ROWS, BLOCK_E], tl.float32)
    total = tl.zeros([ROWS, 1], tl.float32)
    m = tl.full([ROWS, 1], -float("inf"), tl.float32)
    for _ in range(0, splits):
        found = tl.load(part_logs + row, mask=inside, other=-float("inf"))
        m_new = tl.maximum(m, found)
        base = tl.where(m_new == -float("inf"), 0.0, m_new)
        shrink, weight = tl.exp2(m - base), tl.exp2(found - base)
        part = tl.load(parts + row * E + column, mask=both, other=0.0)
        sums = sums * shrink + part * weight
        total = total * shrink + weight
        m = m_new
        part_logs += queries
        parts += tl.cast(queries, tl.int64) * E
    nothing = total == 0.0
    sums /= tl.where(nothing, 1.0, total)
    tl.store(logs + row, tl.where(nothing, float("inf"), m + tl.log2(total)), mask=inside)
    t, head = row % T, row // T
    member, pair = head % group, head // group
    place = (pair // n2) * y0 + (pair % n2) * y1 + member * y2 + t * y3
    tl.store(y + place + column * y4, sums.to(y.dtype.element_ty), mask=both)


# --- backward -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_DRAWN)
def _backward_queries(
    q, k, v, bias, hidden, lengths, slopes, y, g, dq, logs, delta,
    n2, group, T, S,
    q0, q1, q2, q3, q4, k0, k1, k2, k3, k4, v0, v1, v2, v3, v4,
    bias0, bias1, bias2, bias3, bias4, hidden0, hidden1, hidden2, hidden3, hidden4,
    lengths0, lengths1, lengths2, lengths3, lengths4, slopes0, slopes1, slopes2, slopes3, slopes4,
    y0, y1, y2, y3, y4, g0, g1, g2, g3, g4, dq0, dq1, dq2, dq3, dq4,
    scale, window, seed, offset, threshold, keep_scale,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DROPOUT: tl.constexpr, QUADS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """δ and dQ = s dS K of a tile of queries; the same walk as `_forward`."""
    tiles = (group * T + BLOCK_T - 1) // BLOCK_T
    pair, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if CAUSAL:
        tile = tiles - 1 - tile
    n1, n2 = (pair // n2).to(tl.int64), (pair % n2).to(tl.int64)
    q += n1 * q0 + n2 * q1
    k += n1 * k0 + n2 * k1
    v += n1 * v0 + n2 * v1
    y += n1 * y0 + n2 * y1
    g += n1 * g0 + n2 * g1
    dq += n1 * dq0 + n2 * dq1
    padding = (lengths, n1 * lengths0 + n2 * lengths1, lengths2)
    alibi = (slopes, n1 * slopes0 + n2 * slopes1, slopes2)
    masks = (
        bias, n1 * bias0 + n2 * bias1, bias2, bias3, bias4,
        hidden, n1 * hidden0 + n2 * hidden1, hidden2, hidden3, hidden4, slopes,
    )  # fmt: skip
    first_row = pair.to(tl.int64) * group * T
    rows = _group_rows(tile, first_row, group, T, S, padding, alibi, WIDE, BLOCK_T)
    row, member, t, inside, _, _, _ = rows
    first, full, last = _keys_of(rows, S, window, CAUSAL, WINDOW, BLOCK_S)
    full = tl.maximum(full, first)
    q_tile = _load(q + member * q2, t, inside, q3, q4, True, WIDE, D, BLOCK_D)
    y_tile = _load(y + member * y2, t, inside, y3, y4, True, WIDE, E, BLOCK_E)
    g_tile = _load(g + member * g2, t, inside, g3, g4, True, WIDE, E, BLOCK_E)
    shift = tl.sum(g_tile.to(tl.float32) * y_tile.to(tl.float32), 1, keep_dims=True)
    tl.store(delta + row, shift, mask=inside)
    log = tl.load(logs + row, mask=inside, other=float("inf"))
    mine = (q_tile, g_tile.to(q_tile.dtype), log, shift)
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    keys = (k, k3, k4, v, v3, v4)
    dropout = (seed, offset, threshold, keep_scale)
    total = _add_ds_k(
        total, mine, keys, rows, masks, dropout, first, full, S, scale, window,
        CAUSAL, WINDOW, DROPOUT, QUADS, False, WIDE, PRECISION,
        D, E, BLOCK_D, BLOCK_E, BLOCK_T, BLOCK_S,
    )  # fmt: skip
    total = _add_ds_k(
        total, mine, keys, rows, masks, dropout, full, last, S, scale, window,
        CAUSAL, WINDOW, DROPOUT, QUADS, True, WIDE, PRECISION,
        D, E, BLOCK_D, BLOCK_E, BLOCK_T, BLOCK_S,
    )  # fmt: skip
    _store(dq + member * dq2, total * scale, t, inside, dq3, dq4, D, BLOCK_D)


@triton.jit
def _add_ds_k(
    total, mine, keys, rows, masks, dropout, start, stop, S, scale, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DROPOUT: tl.constexpr, QUADS: tl.constexpr,
    MASKED, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """total + dS K over the keys from `start` to `stop`."""
    k, k_step, k_column, v, v_step, v_column = keys
    for first in range(start, stop, BLOCK_S):
        index = first + tl.arange(0, BLOCK_S)[:, None]
        k_tile = _load(k, index, index < S, k_step, k_column, MASKED, WIDE, D, BLOCK_D)
        v_tile = _load(v, index, index < S, v_step, v_column, MASKED, WIDE, E, BLOCK_E)
        ds = _ds(
            mine, k_tile, v_tile, rows, masks, dropout, first, S, scale, window,
            CAUSAL, WINDOW, DROPOUT, QUADS, MASKED, PRECISION, BLOCK_T, BLOCK_S,
        )  # fmt: skip
        total = tl.dot(ds.to(k_tile.dtype), k_tile, total, input_precision=PRECISION)
    return total


@triton.jit
def _ds(
    mine, k, v, rows, masks, dropout, first, S, scale, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DROPOUT: tl.constexpr, QUADS: tl.constexpr,
    MASKED, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dS = P ⊙ (dP − δ) of a tile, queries by keys."""
    q, g, log, shift = mine
    seed, offset, threshold, keep_scale = dropout
    s = first + tl.arange(0, BLOCK_S)[None, :]
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    x = _exponents(x, rows, s, rows[3] & (s < S), scale, window, masks, CAUSAL, WINDOW, MASKED)
    p = tl.exp2(x - log)
    dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    if DROPOUT:
        kept = _kept(rows[0], first, S, (seed, offset, threshold), QUADS, BLOCK_T, BLOCK_S)
        dp = tl.where(kept, dp * keep_scale, 0.0)
    return p * (dp - shift)


@triton.jit(do_not_specialize=_DRAWN)
def _backward_keys(
    q, k, v, bias, hidden, lengths, slopes, g, dk, dv, logs, delta,
    n2, group, T, S,
    q0, q1, q2, q3, q4, k0, k1, k2, k3, k4, v0, v1, v2, v3, v4,
    bias0, bias1, bias2, bias3, bias4, hidden0, hidden1, hidden2, hidden3, hidden4,
    lengths0, lengths1, lengths2, lengths3, lengths4, slopes0, slopes1, slopes2, slopes3, slopes4,
    g0, g1, g2, g3, g4, dk0, dk1, dk2, dk3, dk4, dv0, dv1, dv2, dv3, dv4,
    scale, window, seed, offset, threshold, keep_scale,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DROPOUT: tl.constexpr, QUADS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dK = s dSᵀ Q and dV = P̃ᵀ g of a block of keys, over the queries that see it, of all heads of
    the group. Its tiles are keys by queries, as the products want them."""
    blocks = (S + BLOCK_S - 1) // BLOCK_S
    pair = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK_S
    n1, n2 = (pair // n2).to(tl.int64), (pair % n2).to(tl.int64)
    q += n1 * q0 + n2 * q1
    k += n1 * k0 + n2 * k1
    v += n1 * v0 + n2 * v1
    g += n1 * g0 + n2 * g1
    dk += n1 * dk0 + n2 * dk1
    dv += n1 * dv0 + n2 * dv1
    padding = (lengths, n1 * lengths0 + n2 * lengths1, lengths2)
    alibi = (slopes, n1 * slopes0 + n2 * slopes1, slopes2)
    masks = (
        bias, n1 * bias0 + n2 * bias1, bias2, bias3, bias4,
        hidden, n1 * hidden0 + n2 * hidden1, hidden2, hidden3, hidden4, slopes,
    )  # fmt: skip
    s = first + tl.arange(0, BLOCK_S)[:, None]
    inside = s < S
    k_tile = _load(k, s, inside, k3, k4, True, WIDE, D, BLOCK_D)
    v_tile = _load(v, s, inside, v3, v4, True, WIDE, E, BLOCK_E)
    dk_total = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    dv_total = tl.zeros([BLOCK_S, BLOCK_E], tl.float32)
    mine = (first, k_tile, v_tile)
    dropout = (seed, offset, threshold, keep_scale)
    for member in range(0, group):
        row = (pair.to(tl.int64) * group + member) * T
        head = tl.zeros([1, 1], tl.int32) + member
        if WIDE:
            head = head.to(tl.int64)
        start, full, stop = _queries_of(
            first, head, T, S, padding, window, CAUSAL, WINDOW, BLOCK_T, BLOCK_S
        )
        theirs = (q + head * q2, q3, q4, g + head * g2, g3, g4, logs, delta)
        numbers = (row, head, padding, alibi)
        dk_total, dv_total = _add_dk_dv(
            dk_total, dv_total, mine, theirs, numbers, masks, dropout, start, full,
            T, S, scale, window, CAUSAL, WINDOW, DROPOUT, QUADS, True, WIDE, PRECISION,
            D, E, BLOCK_D, BLOCK_E, BLOCK_T, BLOCK_S,
        )  # fmt: skip
        dk_total, dv_total = _add_dk_dv(
            dk_total, dv_total, mine, theirs, numbers, masks, dropout, full, stop,
            T, S, scale, window, CAUSAL, WINDOW, DROPOUT, QUADS, False, WIDE, PRECISION,
            D, E, BLOCK_D, BLOCK_E, BLOCK_T, BLOCK_S,
        )  # fmt: skip
    if DROPOUT:
        dv_total *= keep_scale
    if WIDE:
        s = s.to(tl.int64)
    _store(dk, dk_total * scale, s, inside, dk3, dk4, D, BLOCK_D)
    _store(dv, dv_total, s, inside, dv3, dv4, E, BLOCK_E)


@triton.jit
def _queries_of(
    first, head, T, S, padding, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """(start, full, stop): queries of a head that see some key of the block that begins at `first`;
    those from `full` on see, but for masks, all of its keys that exist."""
    lengths, lengths_at, lengths_step = padding
    last = tl.minimum(first + BLOCK_S, S) - 1
    start = first * 0
    stop = start + T
    full = start
    if CAUSAL:
        start = tl.maximum(first - (S - T), 0) // BLOCK_T * BLOCK_T
        full = tl.maximum(last - (S - T), 0)
    if WINDOW:
        if not CAUSAL:
            start = tl.maximum(first - window + 1 - (S - T), 0) // BLOCK_T * BLOCK_T
        stop = tl.minimum(stop, last + window - (S - T))
        full = stop
    if lengths is not None:
        length = tl.max(tl.load(lengths + lengths_at + head * lengths_step).to(tl.int64))
        stop = tl.where(first < length, stop, start)
        full = tl.where(last < length, full, stop)
    full = tl.minimum(full, stop)
    full = start + (tl.maximum(full - start, 0) + BLOCK_T - 1) // BLOCK_T * BLOCK_T
    return start, full, stop


@triton.jit
def _add_dk_dv(
    dk, dv, mine, theirs, numbers, masks, dropout, start, stop, T, S, scale, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DROPOUT: tl.constexpr, QUADS: tl.constexpr,
    MASKED, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """(dk + dSᵀ Q, dv + P̃ᵀ g) over a head's queries from `start` to `stop`."""
    first, k, v = mine
    q, q_step, q_column, g, g_step, g_column, logs, delta = theirs
    row0, head, padding, alibi = numbers
    seed, offset, threshold, keep_scale = dropout
    s = first + tl.arange(0, BLOCK_S)[:, None]
    for t0 in range(start, stop, BLOCK_T):
        index = t0 + tl.arange(0, BLOCK_T)[:, None]
        t = t0 + tl.arange(0, BLOCK_T)[None, :]
        rows = _rows(row0 + t, head + t * 0, t, t < T, T, S, padding, alibi, WIDE)
        row, _, _, inside, _, _, _ = rows
        q_tile = _load(q, index, index < T, q_step, q_column, True, WIDE, D, BLOCK_D)
        x = tl.dot(k, tl.trans(q_tile), input_precision=PRECISION)
        x = _exponents(x, rows, s, inside & (s < S), scale, window, masks, CAUSAL, WINDOW, MASKED)
        # A query that does not exist is like one that sees nothing: L = +∞, P = 0.
        p = tl.exp2(x - tl.load(logs + row, mask=inside, other=float("inf")))
        g_tile = _load(g, index, index < T, g_step, g_column, True, WIDE, E, BLOCK_E).to(k.dtype)
        dp = tl.dot(v, tl.trans(g_tile), input_precision=PRECISION)
        dropped = p
        if DROPOUT:
            words = (seed, offset, threshold)
            kept = tl.trans(_kept(row0 + index, first, S, words, QUADS, BLOCK_T, BLOCK_S))
            dropped = tl.where(kept, p, 0.0)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        dv = tl.dot(dropped.to(k.dtype), g_tile, dv, input_precision=PRECISION)
        ds = p * (dp - tl.load(delta + row, mask=inside, other=0.0))
        dk = tl.dot(ds.to(k.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


def _launch_bias(
    k: Array, inputs: list[Any], dbias: Array, logs: Array, delta: Array, options: _Options,
    config: Config | None,
) -> None:  # fmt: skip
    """dbias, summed over the axes along which the bias was broadcast."""
    xp, q, v, g = namespace(k), inputs[0], inputs[2], inputs[-1]
    t, s = q.shape[-2], k.shape[-2]
    scores = (*q.shape[:-1], s)
    target, inputs = broadcast("attention", dbias, scores, "a bias"), [*inputs[:7], g]
    whole = _leading(k, [*inputs, target]) is None
    if whole:  # leading axes in an order of their own: sum in a second step
        target = xp.empty(scores, dtype=xp.float32)
    view = _layout(k, [*inputs, target])
    # The axes n₁, n₂, group, T, S: how many of each dbias has, the others are summed over.
    sizes = (view.batch // view.n2, view.n2, view.group, t, s)
    own = [n if step else 1 for n, step in zip(sizes, view.steps[-5:], strict=True)]
    keep_t, keep_s = own[3] == t, own[4] == s

    def run(config: Config) -> None:
        tiles = cdiv(t, config["BLOCK_T"]) if keep_t else 1
        tiles *= cdiv(s, config["BLOCK_S"]) if keep_s else 1
        launch(
            _backward_bias,
            math.prod(own[:3]) * tiles,
            *(*inputs, target if whole else dbias, logs, delta, view.n2, view.group, t, s),
            *(own[1], own[2], sizes[0] // own[0], sizes[1] // own[1], sizes[2] // own[2]),
            *(*view.steps, *options.numbers),
            KEEP_T=keep_t,
            KEEP_S=keep_s,
            WIDE=view.wide,
            **options.constants,
            **config,
        )

    kept = {"KEEP_T": keep_t, "KEEP_S": keep_s}
    run(config or _tuned(_backward_bias, _query_candidates, q, k, v, run, options, **kept))
    if whole:
        lead = len(scores) - dbias.ndim
        axes = [i for i, n in enumerate((*(1,) * lead, *dbias.shape)) if n < scores[i]]
        dbias[...] = target.sum(axis=tuple(axes), keepdims=True).reshape(dbias.shape)


@triton.jit(do_not_specialize=_DRAWN)
def _backward_bias(
    q, k, v, bias, hidden, lengths, slopes, g, dbias, logs, delta,
    n2, group, T, S, own2, own_group, sum1, sum2, sum_group,
    q0, q1, q2, q3, q4, k0, k1, k2, k3, k4, v0, v1, v2, v3, v4,
    bias0, bias1, bias2, bias3, bias4, hidden0, hidden1, hidden2, hidden3, hidden4,
    lengths0, lengths1, lengths2, lengths3, lengths4, slopes0, slopes1, slopes2, slopes3, slopes4,
    g0, g1, g2, g3, g4, out0, out1, out2, out3, out4,
    scale, window, seed, offset, threshold, keep_scale,
    KEEP_T: tl.constexpr, KEEP_S: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DROPOUT: tl.constexpr, QUADS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dbias = Σ dS of a tile of the bias, over the batch, heads, queries or keys that share it."""
    tiles_t = (T + BLOCK_T - 1) // BLOCK_T if KEEP_T else 1
    tiles_s = (S + BLOCK_S - 1) // BLOCK_S if KEEP_S else 1
    pid = tl.program_id(0)
    s_start = pid % tiles_s * BLOCK_S
    t_start = pid // tiles_s % tiles_t * BLOCK_T
    s_stop = s_start + 1 if KEEP_S else S
    t_stop = t_start + 1 if KEEP_T else T
    lead = pid // tiles_s // tiles_t
    own_member = lead % own_group
    own_n2, own_n1 = lead // own_group % own2, lead // own_group // own2
    total = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
    dropout = (seed, offset, threshold, keep_scale)
    for i in range(0, sum1 * sum2 * sum_group):
        member = own_member + i % sum_group
        i2 = own_n2 + i // sum_group % sum2
        i1 = own_n1 + i // sum_group // sum2
        row0 = ((i1 * n2 + i2).to(tl.int64) * group + member) * T
        a1, a2, head = i1.to(tl.int64), i2.to(tl.int64), member.to(tl.int64)
        padding = (lengths, a1 * lengths0 + a2 * lengths1, lengths2)
        alibi = (slopes, a1 * slopes0 + a2 * slopes1, slopes2)
        masks = (
            bias, a1 * bias0 + a2 * bias1, bias2, bias3, bias4,
            hidden, a1 * hidden0 + a2 * hidden1, hidden2, hidden3, hidden4, slopes,
        )  # fmt: skip
        q_here = q + (a1 * q0 + a2 * q1 + head * q2)
        k_here = k + (a1 * k0 + a2 * k1)
        v_here = v + (a1 * v0 + a2 * v1)
        g_here = g + (a1 * g0 + a2 * g1 + head * g2)
        for t0 in range(t_start, t_stop, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)[:, None]
            rows = _rows(row0 + t, member + t * 0, t, t < T, T, S, padding, alibi, WIDE)
            q_tile = _load(q_here, t, t < T, q3, q4, True, WIDE, D, BLOCK_D)
            g_tile = _load(g_here, t, t < T, g3, g4, True, WIDE, E, BLOCK_E)
            log = tl.load(logs + row0 + t, mask=t < T, other=float("inf"))
            shift = tl.load(delta + row0 + t, mask=t < T, other=0.0)
            mine = (q_tile, g_tile.to(q_tile.dtype), log, shift)
            stop = t0 * 0 + s_stop
            if CAUSAL:
                stop = tl.minimum(stop, t0 + BLOCK_T + (S - T))
            for first in range(s_start, stop, BLOCK_S):
                s = first + tl.arange(0, BLOCK_S)[:, None]
                k_tile = _load(k_here, s, s < S, k3, k4, True, WIDE, D, BLOCK_D)
                v_tile = _load(v_here, s, s < S, v3, v4, True, WIDE, E, BLOCK_E)
                total += _ds(
                    mine, k_tile, v_tile, rows, masks, dropout, first, S, scale, window,
                    CAUSAL, WINDOW, DROPOUT, QUADS, True, PRECISION, BLOCK_T, BLOCK_S,
                )  # fmt: skip
    t = tl.zeros([1, 1], tl.int32)
    s = tl.zeros([1, 1], tl.int32)
    if KEEP_T:
        t += t_start + tl.arange(0, BLOCK_T)[:, None]
    else:
        total = tl.sum(total, 0, keep_dims=True)
    if KEEP_S:
        s += s_start + tl.arange(0, BLOCK_S)[None, :]
    else:
        total = tl.sum(total, 1, keep_dims=True)
    dbias += own_n1.to(tl.int64) * out0 + own_n2.to(tl.int64) * out1
    at = own_member.to(tl.int64) * out2 + t.to(tl.int64) * out3 + s.to(tl.int64) * out4
    tl.store(dbias + at, total.to(dbias.dtype.element_ty), mask=(t < T) & (s < S))


# --- a bias by distance ---------------------------------------------------------------------------


def relative_bias(table: Array, queries: int) -> Array:
    """b[…, t, s] = table[…, s − t + T − 1]: a number for each distance of query and key, as a view.

    Args:
        table: (…, T + S − 1), in the order of key less query: the first is of the last query with
            the first key, the one at S − 1 of a query with its own key.
        queries: T.

    Returns:
        (…, T, S), a bias for `forward` that takes no memory of its own.
    """
    keys = table.shape[-1] + 1 - queries
    if queries < 1 or keys < 1:
        raise ValueError(f"a table of T + S − 1 numbers for T = {queries}, got {table.shape}")
    step = table.strides[-1]
    return namespace(table).lib.stride_tricks.as_strided(
        table[..., queries - 1 :],
        (*table.shape[:-1], queries, keys),
        (*table.strides[:-1], -step, step),
    )


def relative_gradient(dbias: Array, config: Config | None = None) -> Array:
    """dtable[…, r] = Σ dbias[…, t, s] over s − t + T − 1 = r: the sums of the diagonals.

    Args:
        dbias: (…, T, S), what `backward` gave for a `relative_bias`.
        config: {'BLOCK_T', 'BLOCK_R', 'num_warps'} instead of the tuned one.

    Returns:
        (…, T + S − 1) of dbias's dtype, summed in float32.
    """
    check_floats("relative_gradient", dbias)
    xp, (t, s) = namespace(dbias), dbias.shape[-2:]
    dbias = xp.ascontiguousarray(dbias)
    dtable = xp.empty((*dbias.shape[:-2], t + s - 1), dtype=dbias.dtype)
    heads = math.prod(dbias.shape[:-2])

    def run(config: Config) -> None:
        blocks = cdiv(t + s - 1, config["BLOCK_R"])
        launch(_sum_diagonals, heads * blocks, dbias, dtable, t, s, blocks, **config)

    sizes = [(16, 64, 4), (32, 128, 8), (64, 32, 4)]
    if INTERPRETED:
        sizes = [(min(256, next_power_of_2(t)), min(512, next_power_of_2(t + s)), 4)]
    found = [{"BLOCK_T": a, "BLOCK_R": b, "num_warps": warps} for a, b, warps in sizes]
    run(config or choose(_sum_diagonals, found, dbias, (heads, t, s), run))
    return dtable


@triton.jit
def _sum_diagonals(dbias, dtable, T, S, blocks, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr):
    """Some diagonals of one head: row t of dbias holds that of r in column r + t − (T − 1)."""
    head = (tl.program_id(0) // blocks).to(tl.int64)
    r = tl.program_id(0) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    dbias += head * T * S
    total = tl.zeros([1, BLOCK_R], tl.float32)
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)[:, None]
        s = r + t - (T - 1)
        inside = (t < T) & (s >= 0) & (s < S)
        found = tl.load(dbias + t.to(tl.int64) * S + s, mask=inside, other=0.0)
        total += tl.sum(found.to(tl.float32), 0, keep_dims=True)
    dtable += head * (T + S - 1)
    tl.store(dtable + r, total.to(dtable.dtype.element_ty), mask=r < T + S - 1)


# --- what may be fastest --------------------------------------------------------------------------


_Shape = tuple[int, int, int, int, int]  # heads of keys in all, queries of a group, keys, D, E


def _tuned(
    kernel: Any, candidates: Any, q: Array, k: Array, v: Array, run: Any, options: _Options,
    **also: bool,
) -> Config:  # fmt: skip
    pairs = math.prod(k.shape[:-2])
    queries = math.prod(q.shape[:-1]) // max(1, pairs)
    shape = (pairs, queries, k.shape[-2], q.shape[-1], v.shape[-1])
    found = _large(shape) if INTERPRETED else candidates(options.products, shape)
    return choose(kernel, found, q, shape, run, **options.kind, **also)


# Tiles, warps and stages, by what is multiplied and the head size; the likeliest first. What is
# exact float32 has no tensor cores and takes the registers of many small products.
_FORWARD = {
    ("half", 64): [(128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 4, 3), (128, 128, 8, 3)],
    ("half", 128): [(128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2)],
    ("half", 256): [(64, 64, 8, 2), (64, 32, 8, 2), (128, 64, 8, 2)],
    ("tf32", 64): [(64, 32, 4, 2), (128, 64, 8, 2)],
    ("tf32", 128): [(64, 32, 8, 2), (32, 32, 4, 2)],
    ("tf32", 256): [(32, 32, 8, 2), (16, 32, 4, 2)],
    ("ieee", 64): [(64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 4, 2)],
    ("ieee", 128): [(32, 16, 4, 2), (64, 32, 8, 2), (32, 32, 8, 2)],
    ("ieee", 256): [(32, 32, 8, 2), (16, 32, 4, 2)],
}
_QUERIES = {
    ("half", 64): [(128, 64, 8, 3), (128, 32, 8, 2), (64, 64, 4, 2), (128, 32, 4, 3)],
    ("half", 128): [(128, 32, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2)],
    ("half", 256): [(64, 32, 8, 1), (64, 16, 8, 2)],
    ("tf32", 64): [(64, 32, 4, 2), (32, 32, 8, 1)],
    ("tf32", 128): [(64, 32, 8, 2), (32, 16, 8, 1)],
    ("tf32", 256): [(16, 16, 8, 1)],
    ("ieee", 64): [(32, 32, 8, 1), (32, 16, 4, 1)],
    ("ieee", 128): [(16, 16, 8, 1)],
    ("ieee", 256): [(16, 16, 8, 1)],
}
_KEYS = {
    ("half", 64): [(64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 8, 2), (32, 64, 4, 2)],
    ("half", 128): [(32, 128, 8, 2), (64, 64, 8, 2), (32, 64, 4, 2)],
    ("half", 256): [(32, 32, 8, 1), (16, 64, 8, 1)],
    ("tf32", 64): [(32, 64, 8, 2), (32, 32, 8, 1)],
    ("tf32", 128): [(32, 32, 8, 2), (16, 32, 8, 1)],
    ("tf32", 256): [(16, 16, 8, 1)],
    ("ieee", 64): [(32, 32, 8, 1), (16, 32, 4, 1)],
    ("ieee", 128): [(16, 16, 8, 1)],
    ("ieee", 256): [(16, 16, 8, 1)],
}


def _head(shape: _Shape) -> int:
    return max(64, next_power_of_2(max(shape[3:])))


@functools.lru_cache(1024)
def _forward_candidates(products: str, shape: _Shape) -> list[Config]:
    """Tiles no larger than the queries; and where programs are few, with the keys split."""
    pairs, queries, keys, _, _ = shape
    tiles = _FORWARD[products, _head(shape)]
    if queries <= 16:  # a block of keys of 16 KiB
        block = max(16, min(64, 16384 // _head(shape) // (2 if products == "half" else 4)))
        tiles = [(16, block, 4, 3), (16, 2 * block, 4, 2), (16, block, 4, 2)]
    found = []
    for tile, block, warps, stages in tiles:
        tile = min(tile, max(16, next_power_of_2(queries)))
        programs = pairs * cdiv(queries, tile)
        # Enough to fill 132 multiprocessors twice, of at least 256 keys each.
        splits = max(1, min(cdiv(264, programs), keys // 256)) if programs < 132 else 1
        config = _config(tile, block, warps, stages)
        found += [{**config, "SPLITS": n} for n in sorted({splits, 1}, reverse=True)]
    return [c for i, c in enumerate(found) if c not in found[:i]]


def _query_candidates(products: str, shape: _Shape) -> list[Config]:
    return [_config(*tile) for tile in _QUERIES[products, _head(shape)]]


def _key_candidates(products: str, shape: _Shape) -> list[Config]:
    return [_config(*tile) for tile in _KEYS[products, _head(shape)]]


def _large(shape: _Shape) -> list[Config]:
    """For the interpreter, in which a program costs about the same whatever its size."""
    tile, block = [max(16, min(128, next_power_of_2(n))) for n in shape[1:3]]
    return [{"BLOCK_T": tile, "BLOCK_S": block}]


def _config(tile: int, block: int, warps: int, stages: int) -> Config:
    return {"BLOCK_T": tile, "BLOCK_S": block, "num_warps": warps, "num_stages": stages}


# --- for the x-ray --------------------------------------------------------------------------------

_LENGTH = 1024

# What multiplies with mma.sync needs more registers than with wgmma: there, the second candidate.
_GENERATIONS = ((" (sm_8x)", (80, 86, 89, 120), 1), ("", (90, 100), 0))


def _specimen(
    name: str, dtype: str, kernel: Any, d: int, products: int, config: Config,
    changes: dict[str, Any], archs: tuple[int, ...] = (), known: tuple[Known, ...] = (),
) -> Specimen:  # fmt: skip
    """A launch for 12 causal heads of size d and a batch of 8, laid out (B, T, H, D).

    `products` are those of a tile by half of the other axis, which is what a causal mask leaves.
    """
    config = dict(config)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    steps = (_LENGTH * 12 * d, d, 0, 12 * d, 1)
    arrays = dict.fromkeys(("q", "k", "v", "y", "g", "dq", "dk", "dv"), f"*{dtype}")
    masks = dict.fromkeys(("bias", "hidden", "lengths", "slopes"))
    given: dict[str, Any] = arrays | masks | {"logs": "*fp32", "delta": "*fp32"}
    given |= {f"{array}{i}": steps[i] for array in arrays for i in range(5)}
    given |= {f"{mask}{i}": 0 for mask in masks for i in range(5)}
    given |= {"n2": 12, "group": 1, "T": _LENGTH, "S": _LENGTH, "queries": 96 * _LENGTH}
    given |= {"chunk": _LENGTH, "scale": 0.125, "window": 0, "WIDE": False, "SPLIT": False}
    given |= {"seed": 1234, "offset": 0, "threshold": 429496730, "keep_scale": 1.1}
    given |= {"CAUSAL": True, "WINDOW": False, "DROPOUT": False, "QUADS": True}
    given |= {"D": d, "E": d, "BLOCK_D": next_power_of_2(d), "BLOCK_E": next_power_of_2(d)}
    given |= {"PRECISION": "ieee"} | config | changes
    own = given["BLOCK_T" if kernel in (_forward, _backward_queries) else "BLOCK_S"]
    return Specimen(
        name,
        kernel,
        {name: given[name] for name in kernel.arg_names if name in given},
        **options,
        bytes=2 * (_LENGTH // 2 + own) * d * (4 if dtype == "fp32" else 2),
        flops=2 * products * own * (_LENGTH // 2) * d,
        known=known,
        archs=archs,
    )


def specimens(dtype: str) -> Iterator[Specimen]:
    """What a GPT launches: causal heads of 64 and 128, 1024 queries and keys; and a new token."""
    yield from _passes(dtype, "ieee" if dtype == "fp32" else "half", 64)
    if dtype == "fp32":
        yield from _passes(dtype, "tf32", 64)
    elif dtype == "bf16":
        yield from _passes(dtype, "half", 128)
    products = "ieee" if dtype == "fp32" else "half"
    shape = (96, _LENGTH, _LENGTH, 64, 64)
    drawn = {"DROPOUT": True}
    few = Known("spills", "ptxas keeps exact float32 products to few registers", at_most=64)
    known = (few,) if dtype == "fp32" else ()
    for kind, archs, pick in _GENERATIONS:
        config = _pick(_forward_candidates(products, shape), pick)
        yield _specimen(f"dropout{kind}", dtype, _forward, 64, 2, config, drawn, archs, known)
        config, of_a_graph = _pick(_key_candidates(products, shape), pick), {"offset": "*i64"}
        name, changes = f"dropout, its offset in memory, dK dV{kind}", drawn | of_a_graph
        yield _specimen(name, dtype, _backward_keys, 64, 4, config, changes, archs, known)
    added = {"bias": f"*{dtype}", "bias1": _LENGTH**2, "bias3": _LENGTH, "bias4": 1}
    config = _pick(_forward_candidates(products, shape), 0)
    padded = {"lengths": "*i64", "lengths0": 1}
    changes = added | padded
    yield _specimen("bias and padding", dtype, _forward, 64, 2, config, changes, known=known)
    config = _pick(_query_candidates(products, shape), 1)
    into = {"dbias": f"*{dtype}", "out1": _LENGTH**2, "out3": _LENGTH, "out4": 1}
    many = {"own2": 12, "own_group": 1, "sum1": 8, "sum2": 1, "sum_group": 1}
    kept = {"KEEP_T": True, "KEEP_S": True, "out0": 0, "out2": 0}
    changes = added | into | many | kept
    yield _specimen("dbias", dtype, _backward_bias, 64, 2, config, changes, known=known)
    config = _pick(_forward_candidates(products, (96, 1, 4096, 64, 64)), 0)
    token = {"T": 1, "S": 4096, "SPLIT": True, "queries": 96, "y": "*fp32"}
    found = _specimen("a new token, split", dtype, _forward, 64, 2, config, token)
    size = 4 if dtype == "fp32" else 2
    yield replace(found, bytes=2 * _LENGTH * 64 * size, flops=2 * 2 * 16 * _LENGTH * 64)
    config = {"ROWS": 4, "BLOCK_S": 0, "num_warps": 4, "num_stages": 3}
    parts = {"parts": "*fp32", "part_logs": "*fp32", "splits": 16, "T": 1, "queries": 96}
    found = _specimen("what splits found", dtype, _combine, 64, 0, config, parts)
    yield replace(found, bytes=4 * 64 * (16 * 4 + size), flops=4 * 64 * 16 * 3)
    diagonals = {"dbias": f"*{dtype}", "dtable": f"*{dtype}", "T": _LENGTH, "S": _LENGTH}
    yield Specimen(
        "sums of diagonals",
        _sum_diagonals,
        {**diagonals, "blocks": 32, "BLOCK_T": 16, "BLOCK_R": 64},
        bytes=_LENGTH * 64 * size,
        flops=_LENGTH * 64,
    )


def _passes(dtype: str, products: str, d: int) -> Iterator[Specimen]:
    """All three with the first candidate on new architectures, the second on old ones."""
    shape = (96, _LENGTH, _LENGTH, d, d)
    name = f"{products}, heads of {d}" if products == "tf32" else f"heads of {d}"
    precision = {"PRECISION": "tf32" if products == "tf32" else "ieee"}
    for kind, archs, pick in _GENERATIONS:
        for what, kernel, count, found in (
            ("forward", _forward, 2, _forward_candidates(products, shape)),
            ("dQ", _backward_queries, 3, _query_candidates(products, shape)),
            ("dK dV", _backward_keys, 4, _key_candidates(products, shape)),
        ):
            config = _pick(found, pick)
            words = f"{what}, {name}{kind}"
            yield _specimen(words, dtype, kernel, d, count, config, precision, archs)


def _pick(candidates: list[Config], which: int) -> Config:
    config = dict(candidates[min(which, len(candidates) - 1)])
    config.pop("SPLITS", None)
    return config
