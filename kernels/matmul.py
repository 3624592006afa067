"""Products of matrices with what follows them: bias, activation and residual in the same walk.

    y = f(z) + r,  z = A B + bias        A (…, M, K), B (…, K, N), bias (N,), r as y (…, M, N)

    dz = g ⊙ f′(z)     dA = dz Bᵀ     dB = Aᵀ dz     dbias = Σ dz over the rows     dr = g

f is nothing, ReLU, GELU (with erf or tanh) or SiLU. The leading axes broadcast; the gradient of an
operand is summed along those that it lacks, as part of the product. Products of half precision are
added up in float32; those of float32 are exact ("ieee"), or "tf32": their factors rounded to 11
bits, for tensor cores. All of the rest is float32 arithmetic.

2·M·N·K FLOPs. A program makes one tile of y, ROWS × COLUMNS, from strips of A and B that pass
through shared memory INNER at a time: 2·ROWS·COLUMNS·K FLOPs for (ROWS + COLUMNS)·K elements read,
so that large tiles keep a GPU computing. In all A is read N / COLUMNS times and B M / ROWS times,
mostly from the level-2 cache, because programs that run together make the tiles of GROUP rows of
tiles ("grouped order": Triton's tutorial 03; Tillet, Kung and Cox, "Triton", 2019). What follows
the product reads r and writes y, and z where backward needs it, no more: an activation of its own
would read and write all of y once again. Backward reads g and z once for dz and dbias, and then is
two products, of 4·M·N·K FLOPs.

Where y has fewer tiles than the GPU multiprocessors, K is cut into SPLITS parts, whose sums are
written apart in float32 (4·SPLITS·M·N bytes) and then added up in one order, hence without
atomics: the same numbers each time.

The persistent variant (sm_90 and newer) starts one program per multiprocessor, which makes tile
after tile and has them fetched by the tensor memory accelerator through descriptors: Triton's
tutorial 09.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.backend import Array, namespace
from tinygrad_llm.kernels.compile import Specimen
from tinygrad_llm.kernels.language import INTERPRETED, tl, triton
from tinygrad_llm.kernels.launch import cdiv, launch, next_power_of_2
from tinygrad_llm.kernels.layout import as_rows, check_floats, merge_axes, needs_int64, strides
from tinygrad_llm.kernels.tune import Config, choose

ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu")
PRECISIONS = ("ieee", "tf32")
Needs = Sequence[bool]


def forward(
    a: Array,
    b: Array,
    bias: Array | None = None,
    residual: Array | None = None,
    *,
    activation: str | None = None,
    precision: str = "ieee",
    dtype: Any = None,
    needs: Needs = (True, True, True, True),
    config: Config | None = None,
) -> tuple[Array, tuple[Any, ...]]:
    """y = f(a b + bias) + residual over the last two axes, the others broadcast.

    Args:
        a, b: (…, M, K) and (…, K, N) of one dtype, float32, float16 or bfloat16, any strides: a
            transposed operand is a view, `b.swapaxes(-1, -2)`.
        bias: (N,).
        residual: of a shape that broadcasts to y's.
        activation: f: "relu", "gelu" (exact), "gelu_tanh" or "silu".
        precision: of float32 products, "ieee" or "tf32".
        dtype: of y: float32 if not that of a and b.
        needs: of a, b, bias and residual, those that `backward` will be asked for: what the others
            would need is neither stored nor kept alive.
        config: {'ROWS', 'COLUMNS', 'INNER', 'GROUP', 'SPLITS', 'PERSISTENT', 'num_warps',
            'num_stages'} instead of the tuned one.

    Returns:
        (y, saved): y is contiguous. saved holds a, b, z (where f needs it; for "relu" without a
        residual y itself), bias and residual, some as empty stand-ins of the same shape.

    Raises:
        ValueError: shapes that do not fit, an unknown activation, precision or dtype.
        TypeError: other dtypes, or a and b of two.
    """
    _check(a, b, bias, residual, activation, precision)
    bend = activation is not None and any(needs[:3])
    signs = bend and activation == "relu" and residual is None
    y, z = _product(a, b, bias, residual, activation, precision, dtype, bend and not signs, config)
    saved = (
        a if needs[1] else _stand_in(a),
        b if needs[0] else _stand_in(b),
        y if signs else z,
        bias if bias is None else _stand_in(bias),
        residual if residual is None else _stand_in(residual),
    )
    return y, saved


def backward(
    g: Array,
    a: Array,
    b: Array,
    z: Array | None = None,
    bias: Array | None = None,
    residual: Array | None = None,
    *,
    activation: str | None = None,
    precision: str = "ieee",
    dtype: Any = None,
    needs: Needs = (True, True, True, True),
    config: Config | None = None,
) -> tuple[Any, Any, Any, Any]:
    """dz = g ⊙ f′(z), dA = dz Bᵀ, dB = Aᵀ dz, dbias = Σ dz, dresidual = g.

    Args:
        g: the gradient of y, of y's shape, any strides. Where its dtype is not that of a and b, dz
            is rounded to theirs.
        a, b, z, bias, residual: what `forward` saved; the options are those of the forward.

    Returns:
        (da, db, dbias, dresidual), each of the shape and dtype of what it belongs to, None for what
        is absent or not in `needs`. dresidual is g itself where both are alike.
    """
    _check(a, b, bias, residual, activation, precision)
    shape = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    if g.shape != shape:
        raise ValueError(f"matmul needs a gradient of the shape {shape}, got {g.shape}")
    if activation is not None and any(needs[:3]) and (z is None or z.shape != shape):
        found = "none: say in `needs` what to keep" if z is None else z.shape
        raise ValueError(f"the gradient of {activation} needs z of the shape {shape}, got {found}")
    check_floats("matmul", g)
    da = db = dbias = dresidual = None
    if residual is not None and needs[3]:
        dresidual = _sum_to(g, residual)
    wanted = a.dtype if needs[0] or needs[1] else None
    dz, dbias = _before(g, z, activation, wanted, bias if needs[2] else None)
    if dz is not None and needs[0]:
        da = _contract(dz, b.swapaxes(-1, -2), a, precision, config)
    if dz is not None and needs[1]:
        db = _contract(a.swapaxes(-1, -2), dz, b, precision, config)
    return da, db, dbias, dresidual


def matmul(
    a: Array,
    b: Array,
    *,
    precision: str = "ieee",
    dtype: Any = None,
    config: Config | None = None,
) -> Array:
    """y = a b, (…, M, K) times (…, K, N); the arguments are those of `forward`."""
    _check(a, b, None, None, None, precision)
    return _product(a, b, None, None, None, precision, dtype, False, config)[0]


def _check(
    a: Array,
    b: Array,
    bias: Array | None,
    residual: Array | None,
    activation: str | None,
    precision: str,
) -> None:
    check_floats("matmul", a, b, *[x for x in (bias, residual) if x is not None])
    if a.dtype != b.dtype:
        raise TypeError(f"matmul takes two arrays of one dtype, got {a.dtype} and {b.dtype}")
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"matmul takes (…, M, K) and (…, K, N), got {a.shape} and {b.shape}")
    if bias is not None and bias.shape != b.shape[-1:]:
        raise ValueError(f"matmul needs a bias of the shape {b.shape[-1:]}, got {bias.shape}")
    if activation not in ACTIVATIONS:
        known = ", ".join([str(name) for name in ACTIVATIONS])
        raise ValueError(f"an activation of matmul is one of {known}, got {activation!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"matmul's precision is 'ieee' or 'tf32', got {precision!r}")


def _stand_in(x: Array) -> Array:
    """An array of x's shape and dtype, with the memory of one element."""
    xp = namespace(x)
    return xp.broadcast_to(xp.empty((), dtype=x.dtype), x.shape)


# --- one product ----------------------------------------------------------------------------------


def _product(
    a: Array,
    b: Array,
    bias: Array | None,
    residual: Array | None,
    activation: str | None,
    precision: str,
    dtype: Any,
    keep: bool,
    config: Config | None,
) -> tuple[Array, Array | None]:
    """(y, z), z None unless to `keep`."""
    dtype = a.dtype if dtype is None else backend.as_dtype(dtype)
    if dtype not in (a.dtype, backend.float32):
        raise ValueError(f"matmul of {a.dtype} gives {a.dtype} or float32, got dtype={dtype}")
    a, b, residual, plan = _planned(a, b, residual)
    empty = namespace(a).empty
    y = empty(plan.shape, dtype=dtype)
    z = empty(plan.shape, dtype=dtype) if keep else None
    if y.size == 0:
        return y, z
    call = _Call(
        (a, b, y, z, bias, residual),
        plan,
        activation,
        precision if a.dtype == backend.float32 else "ieee",
        needs_int64(a, b, y, *([] if residual is None else [residual])),
        0 if bias is None else strides(bias)[0],
    )
    call.run(config or _chosen(call))
    return y, z


class _Plan(NamedTuple):
    """How a product walks through its arrays: `batch` matrices, counted along three axes.

    `sizes` are those of the inner two of the three, `a`, `b` and `residual` the strides of these
    arrays along the three and along their rows and columns.
    """

    shape: tuple[int, ...]  # of y
    m: int
    n: int
    k: int
    batch: int
    sizes: tuple[int, int]
    a: tuple[int, ...]
    b: tuple[int, ...]
    residual: tuple[int, ...]


def _planned(
    a: Array, b: Array, residual: Array | None
) -> tuple[Array, Array, Array | None, _Plan]:
    """The arrays, copied where their leading axes do not merge into three, and the plan."""
    of_residual = (None, None) if residual is None else (residual.shape, strides(residual))
    plan = _plan(a.shape, strides(a), b.shape, strides(b), *of_residual)
    if plan is not None:
        return a, b, residual, plan
    xp = namespace(a)
    lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a = xp.ascontiguousarray(xp.broadcast_to(a, (*lead, *a.shape[-2:])))
    b = xp.ascontiguousarray(xp.broadcast_to(b, (*lead, *b.shape[-2:])))
    if residual is not None:
        shape = (*lead, a.shape[-2], b.shape[-1])
        residual = xp.ascontiguousarray(xp.broadcast_to(residual, shape))
    return _planned(a, b, residual)


@functools.lru_cache(4096)
def _plan(
    a_shape: tuple[int, ...],
    a_steps: tuple[int, ...],
    b_shape: tuple[int, ...],
    b_steps: tuple[int, ...],
    r_shape: tuple[int, ...] | None,
    r_steps: tuple[int, ...] | None,
) -> _Plan | None:
    try:
        lead = np.broadcast_shapes(a_shape[:-2], b_shape[:-2])
    except ValueError:
        raise ValueError(
            f"matmul needs leading axes that broadcast, got {a_shape} and {b_shape}"
        ) from None
    m, k, n = a_shape[-2], a_shape[-1], b_shape[-1]
    shape = (*lead, m, n)
    if r_shape is not None and not _broadcasts(r_shape, shape):
        raise ValueError(f"matmul needs a residual that broadcasts to {shape}, got {r_shape}")
    a, b, r = (_right_aligned(s, len(shape)) for s in (a_steps, b_steps, r_steps or ()))
    # One matrix b for all of a's: they are one larger matrix, if their rows lie evenly.
    if lead and not any(b[:-2]):
        merged = merge_axes(shape[:-1], a[:-1], r[:-1], at_most=1)
        if merged is not None:
            (rows,), ((am,), (rm,)) = merged
            return _Plan(
                shape, rows, n, k, 1, (1, 1), (0, 0, 0, am, a[-1]), (0, 0, 0, *b[-2:]),
                (0, 0, 0, rm, r[-1]),
            )  # fmt: skip
    merged = merge_axes(lead, a[:-2], b[:-2], r[:-2], at_most=3)
    if merged is None:
        return None
    (_, *sizes), (a_lead, b_lead, r_lead) = merged
    return _Plan(
        shape, m, n, k, math.prod(lead), (sizes[0], sizes[1]), (*a_lead, *a[-2:]),
        (*b_lead, *b[-2:]), (*r_lead, *r[-2:]),
    )  # fmt: skip


def _broadcasts(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    pairs = zip(reversed(shape), reversed(full), strict=False)
    return len(shape) <= len(full) and all(n in (1, m) for n, m in pairs)


def _right_aligned(steps: tuple[int, ...], axes: int) -> tuple[int, ...]:
    """The strides of an array with stride 0 along the axes in front that it lacks."""
    return (0,) * (axes - len(steps)) + steps


class _Call(NamedTuple):
    """All of a product but its configuration."""

    arrays: tuple[Any, ...]  # a, b, y, z, bias, residual
    plan: _Plan
    activation: str | None
    precision: str
    wide: bool
    bias_step: int

    def run(self, config: Config) -> None:
        """Launch the kernel, or the two, that the configuration asks for."""
        config = dict(config)
        splits, persistent = config.pop("SPLITS", 1), config.pop("PERSISTENT", False)
        if persistent:
            self._run_persistent(config)
        elif splits == 1:
            self._run_tiles(config, 1, self.arrays, self.bias_step, self.activation)
        else:
            self._run_splits(config, splits)

    def _run_tiles(
        self,
        config: Config,
        splits: int,
        arrays: tuple[Any, ...],
        bias_step: int,
        activation: str | None,
    ) -> None:
        _, m, n, k, batch, sizes, a, b, r = self.plan
        launch(
            _multiply,
            cdiv(m, config["ROWS"]) * cdiv(n, config["COLUMNS"]) * splits * batch,
            *arrays,
            *(m, n, k, *sizes, *a, *b, bias_step, *(r if arrays[5] is not None else (0,) * 5)),
            ACTIVATION=activation,
            PRECISION=self.precision,
            EVEN=k % config["INNER"] == 0,
            WIDE=self.wide,
            HALVES=_in_halves(config),
            SPLITS=splits,
            **config,
        )

    def _run_splits(self, config: Config, splits: int) -> None:
        a, b, y, z, bias, residual = self.arrays
        _, m, n, _, batch, sizes, _, _, r = self.plan
        parts = namespace(a).empty((batch, splits, m, n), dtype=backend.float32)
        self._run_tiles(config, splits, (a, b, parts, None, None, None), 0, None)
        tile = _reduce_tile(m, n)
        launch(
            _reduce,
            cdiv(m, tile["ROWS"]) * cdiv(n, tile["COLUMNS"]) * batch,
            *(parts, y, z, bias, residual, splits, m, n, *sizes, self.bias_step, *r),
            ACTIVATION=self.activation,
            WIDE=self.wide,
            **tile,
        )

    def _run_persistent(self, config: Config) -> None:
        a, b, *_ = self.arrays
        _, m, n, k, _, _, (*_, am, ak), (*_, bk, bn), (*_, rm, rn) = self.plan
        if not _fits_descriptors(self.arrays, self.plan):
            raise ValueError(
                f"the persistent matmul takes one matrix each, contiguous along an axis and with "
                f"rows at multiples of 16 bytes; got {a.shape} and {b.shape} with strides of "
                f"{a.strides} and {b.strides} bytes"
            )
        tiles = cdiv(m, config["ROWS"]) * cdiv(n, config["COLUMNS"])
        launch(
            _multiply_persistent,
            min(tiles, _multiprocessors(_device(a))),
            *self.arrays,
            *(m, n, k, am if ak == 1 else ak, bk if bn == 1 else bn, self.bias_step, rm, rn),
            ACTIVATION=self.activation,
            PRECISION=self.precision,
            TURNED_A=ak != 1,
            TURNED_B=bn != 1,
            WIDE=self.wide,
            HALVES=_in_halves(config),
            **config,
        )


def _in_halves(config: Config) -> bool:
    """Whether a thread holds more than 64 numbers of a tile of y."""
    return config["ROWS"] * config["COLUMNS"] > 64 * 32 * config["num_warps"]


# --- which configuration --------------------------------------------------------------------------


def _chosen(call: _Call) -> Config:
    """The tuned configuration; whatever changes the kernel or the order of loads is in its key."""
    a, _, y, z, *_ = call.arrays
    plan = call.plan
    kind = "half" if a.dtype.itemsize == 2 else call.precision
    described = (
        not INTERPRETED and _fits_descriptors(call.arrays, plan) and _capability(_device(a)) >= 90
    )
    found = _candidates(plan.m, plan.n, plan.k, plan.batch, kind, described)
    if len(found) == 1:
        return found[0]
    layouts = "".join([_layout(*steps[-2:]) for steps in (plan.a, plan.b)])
    return choose(
        _multiply,
        found,
        a,
        (plan.batch, plan.m, plan.n, plan.k),
        call.run,
        layouts=layouts,
        kind=kind,
        y=str(y.dtype),
        follows=f"{call.activation} {z is not None} {call.arrays[5] is not None}",
        described=described,
    )


def _layout(row: int, column: int) -> str:
    """rows, columns or scattered; a capital where vectors of 8 can be loaded."""
    letter, step = ("r", row) if column == 1 else ("c", column) if row == 1 else ("s", 1)
    return letter if step % 8 else letter.upper()


def _fits_descriptors(arrays: tuple[Any, ...], plan: _Plan) -> bool:
    """Whether the tensor memory accelerator can fetch a and b."""
    a, b, *_ = arrays
    pairs = ((a, plan.a, plan.m, plan.k), (b, plan.b, plan.k, plan.n))
    return plan.batch == 1 and all(
        _is_described(x.itemsize, _address(x), steps[-2:], (rows, columns))
        for x, steps, rows, columns in pairs
    )


def _is_described(
    itemsize: int, address: int, steps: tuple[int, ...], sizes: tuple[int, int]
) -> bool:
    (row, column), (rows, columns) = steps, sizes
    step, least = (row, columns) if column == 1 else (column, rows)
    return 1 in steps and step >= least and not step * itemsize & 15 and not address & 15


def _address(x: Array) -> int:
    return x.ctypes.data if isinstance(x, np.ndarray) else int(x.data.ptr)


def _device(x: Array) -> int:
    return -1 if isinstance(x, np.ndarray) else x.data.device_id


@functools.cache
def _multiprocessors(device: int) -> int:
    if device < 0:
        return 2
    return int(backend.cupy().cuda.Device(device).attributes["MultiProcessorCount"])


@functools.cache
def _capability(device: int) -> int:
    return int(backend.cupy().cuda.Device(device).compute_capability)


# (ROWS, COLUMNS, INNER, num_warps, num_stages)
_TILES = {
    "half": (
        (128, 256, 64, 8, 3),
        (256, 128, 64, 8, 3),
        (128, 128, 64, 8, 3),
        (128, 128, 64, 4, 4),
        (128, 64, 64, 4, 4),
        (64, 128, 64, 4, 4),
        (64, 64, 64, 4, 4),
        (64, 32, 64, 4, 5),
        (32, 64, 64, 4, 5),
        (16, 128, 64, 4, 4),
        (16, 64, 64, 4, 5),
        (128, 16, 64, 4, 4),
        (64, 16, 128, 4, 4),
        (16, 16, 128, 4, 4),
    ),
    "tf32": (
        (128, 256, 32, 8, 3),
        (128, 128, 32, 8, 3),
        (128, 128, 32, 4, 4),
        (128, 64, 32, 4, 4),
        (64, 128, 32, 4, 4),
        (64, 64, 32, 4, 4),
        (64, 32, 32, 4, 5),
        (32, 64, 32, 4, 5),
        (16, 64, 32, 4, 5),
        (64, 16, 64, 4, 4),
        (16, 16, 64, 4, 4),
    ),
    "ieee": (
        (128, 128, 16, 8, 3),
        (128, 64, 16, 4, 3),
        (64, 128, 16, 4, 3),
        (64, 64, 16, 4, 3),
        (32, 64, 32, 4, 3),
        (64, 32, 16, 4, 3),
        (16, 64, 32, 4, 3),
        (64, 16, 32, 4, 3),
        (16, 16, 64, 4, 3),
    ),
}
_PERSISTENT = {
    "half": ((128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (256, 128, 64, 8, 3)),
    "tf32": ((128, 128, 32, 8, 4), (128, 256, 32, 8, 3)),
    "ieee": (),
}
_MEASURED = 12  # of the plain candidates: each costs a compilation
_MULTIPROCESSORS = 132  # an H100's, for the estimate


@functools.lru_cache(1024)
def _candidates(
    m: int, n: int, k: int, batch: int, kind: str, described: bool
) -> tuple[Config, ...]:
    """What may be fastest, by the estimate; in the interpreter few large programs."""
    if INTERPRETED:
        rows, columns = (max(16, min(512, next_power_of_2(size))) for size in (m, n))
        inner = max(16, min(1024, next_power_of_2(k)))
        return (_config(rows, columns, inner, 4, 1),)
    found = []
    for tile in _TILES[kind]:
        tiles = batch * cdiv(m, tile[0]) * cdiv(n, tile[1])
        splits = 1
        while True:
            found.append(_config(*tile, splits=splits))
            splits *= 2
            if tiles * splits > 2 * _MULTIPROCESSORS or k < 4 * tile[2] * splits:
                break
    found.sort(key=lambda config: _estimate(config, m, n, k, batch))
    found = found[:_MEASURED]
    if described and m * n >= 512 * 512:
        found[1:1] = [_config(*tile, persistent=True) for tile in _PERSISTENT[kind]]
    return tuple(found)


def _config(
    rows: int,
    columns: int,
    inner: int,
    warps: int,
    stages: int,
    splits: int = 1,
    persistent: bool = False,
) -> Config:
    return {
        "ROWS": rows,
        "COLUMNS": columns,
        "INNER": inner,
        "GROUP": 8,
        "SPLITS": splits,
        "PERSISTENT": persistent,
        "num_warps": warps,
        "num_stages": stages,
    }


def _estimate(config: Config, m: int, n: int, k: int, batch: int) -> float:
    """Time in some unit: waves of programs, each of which multiplies, loads and writes.

    Only the order matters, and only for what is tried first. A multiprocessor multiplies about a
    hundred numbers while it loads one, whence the weights.
    """
    rows, columns, splits = config["ROWS"], config["COLUMNS"], config["SPLITS"]
    programs = batch * cdiv(m, rows) * cdiv(n, columns) * splits
    depth = cdiv(cdiv(k, config["INNER"]), splits) * config["INNER"]
    program = depth * (rows * columns + 100 * (rows + columns)) + 100 * rows * columns
    waves = max(1.0, programs / _MULTIPROCESSORS)
    if waves < 4:  # a last wave that is half empty takes as long as a full one
        waves = math.ceil(waves)
    apart = 200 * batch * m * n * splits / _MULTIPROCESSORS if splits > 1 else 0
    return waves * program + apart + 500_000 * (splits > 1)  # the second launch


def _reduce_tile(m: int, n: int) -> Config:
    if INTERPRETED:
        return {"ROWS": min(512, next_power_of_2(m)), "COLUMNS": min(512, next_power_of_2(n))}
    columns = min(256, next_power_of_2(n))
    return {"ROWS": min(1024 // columns, next_power_of_2(m)), "COLUMNS": columns, "num_warps": 4}


# --- what backward adds ---------------------------------------------------------------------------


def _contract(
    left: Array, right: Array, like: Array, precision: str, config: Config | None
) -> Array:
    """left · right, of the shape and dtype of `like`: summed over the leading axes that it lacks.

    To sum products is to multiply once along a longer inner axis: the axes that are summed move
    beside it. Where strides do not allow this as a view, the operand is copied.
    """
    lead = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    axes = len(lead)
    own = (1,) * (axes + 2 - like.ndim) + like.shape[:-2]
    summed = [i for i in range(axes) if own[i] == 1 and lead[i] != 1]
    if summed:
        xp = namespace(left)
        kept = [i for i in range(axes) if i not in summed]
        sizes = [lead[i] for i in kept]
        rows, inner, columns = left.shape[-2], left.shape[-1], right.shape[-1]
        left = xp.broadcast_to(left, (*lead, rows, inner))
        left = left.transpose(*kept, axes, *summed, axes + 1)
        right = xp.broadcast_to(right, (*lead, inner, columns))
        right = right.transpose(*kept, *summed, axes, axes + 1)
        inner *= math.prod([lead[i] for i in summed])
        left = left.reshape(*sizes, rows, inner)
        right = right.reshape(*sizes, inner, columns)
    product = _product(left, right, None, None, None, precision, None, False, config)[0]
    return product.reshape(like.shape)


def _before(
    g: Array, z: Array | None, activation: str | None, dtype: Any, bias: Array | None
) -> tuple[Array | None, Array | None]:
    """(dz = g ⊙ f′(z) in `dtype`, its sum over the rows as `bias` is), each None if not asked for.

    g is read once for both. Where f is nothing, dz is g.
    """
    z = None if z is None or activation is None else namespace(z).ascontiguousarray(z)
    same = activation is None and dtype in (None, g.dtype)
    dz = None if same or dtype is None else namespace(g).empty(g.shape, dtype=dtype)
    dbias = None if bias is None else namespace(g).empty(bias.shape, dtype=bias.dtype)
    if dz is not None or dbias is not None:
        _walk(g, z, activation, dz, dbias)
    return g if same and dtype is not None else dz, dbias


def _sum_to(g: Array, like: Array) -> Array:
    """The gradient of broadcasting `like`: g summed along the axes that it lacks."""
    own = (1,) * (g.ndim - like.ndim) + like.shape
    summed = [i for i in range(g.ndim) if own[i] == 1 and g.shape[i] != 1]
    if not summed:
        g = _cast(g, like.dtype)
        return g if g.shape == like.shape else g.reshape(like.shape)
    kept = [i for i in range(g.ndim) if i not in summed]
    rows = math.prod([g.shape[i] for i in summed])
    out = namespace(g).empty(math.prod(like.shape), dtype=like.dtype)
    _walk(g.transpose(*summed, *kept).reshape(rows, out.size), None, None, None, out)
    return out.reshape(like.shape)


def _cast(g: Array, dtype: Any) -> Array:
    if g.dtype == dtype:
        return g
    out = namespace(g).empty(g.shape, dtype=dtype)
    _walk(g, None, None, out, None)
    return out


def _walk(
    g: Array,
    z: Array | None,
    activation: str | None,
    dz: Array | None,
    sums: Array | None,
    chunk: int | None = None,
) -> None:
    """Fill dz = g ⊙ f′(z) and its sums over the rows; all but g contiguous.

    Rows are summed in chunks, in float32, and the chunks in a second walk.
    """
    columns = g.shape[-1]
    rows = math.prod(g.shape[:-1])
    if columns == 0 or (sums is None and rows == 0):
        return
    tile = _walk_tile(rows, columns)
    chunk = chunk or _chunk(rows, columns, tile)
    chunks = max(1, cdiv(rows, chunk))  # one also of no rows: their sum is 0
    parts = sums
    if sums is not None and chunks > 1:
        parts = namespace(g).empty((chunks, columns), dtype=backend.float32)
    (by_row,), sizes, (steps,) = as_rows(g)
    launch(
        _slope_and_sums,
        (cdiv(columns, tile["COLUMNS"]), chunks, 1),
        *(by_row, z, dz, parts, rows, columns, chunk, *sizes, *steps),
        ACTIVATION=activation,
        WIDE=needs_int64(by_row),
        **tile,
    )
    if sums is not None and parts is not sums:
        _walk(parts, None, None, None, sums, chunk=chunks)


def _walk_tile(rows: int, columns: int) -> Config:
    if INTERPRETED:
        return {
            "ROWS": min(512, next_power_of_2(rows)),
            "COLUMNS": min(512, next_power_of_2(columns)),
        }
    across = min(128, next_power_of_2(columns))
    return {"ROWS": 2048 // across, "COLUMNS": across, "num_warps": 4}


def _chunk(rows: int, columns: int, tile: Config) -> int:
    """Rows of a program: enough programs to fill a GPU several times over."""
    most = max(1, 8 * _MULTIPROCESSORS // cdiv(columns, tile["COLUMNS"]))
    return cdiv(cdiv(max(1, rows), tile["ROWS"]), most) * tile["ROWS"]


# --- a tile of y ----------------------------------------------------------------------------------


@triton.jit
def _wide(index, WIDE: tl.constexpr):
    """The index in 64 bits where its product with a stride needs them."""
    if WIDE:
        return index.to(tl.int64)
    else:
        return index


@triton.jit
def _place(batch, n1, n2, s0, s1, s2):
    """The offset of a matrix: the batch counts through three axes."""
    batch = batch.to(tl.int64)
    return (batch // n2 // n1) * s0 + (batch // n2 % n1) * s1 + (batch % n2) * s2


@triton.jit
def _tile(index, M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """(first row, first column) of a tile: the index walks down GROUP tiles, then a tile right.

    So neighbours in time share what they read: 64 programs make 8 × 8 tiles from 16 strips of A
    and B; row by row, 64 tiles of one row of tiles take 65 strips.
    """
    across, down = tl.cdiv(N, COLUMNS), tl.cdiv(M, ROWS)
    first = index // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    inside = index % (GROUP * across)
    return (first + inside % height) * ROWS, inside // height * COLUMNS


@triton.jit
def _activated(z, ACTIVATION: tl.constexpr):
    """f(z)"""
    if ACTIVATION == "relu":
        return tl.where(z < 0.0, 0.0, z)  # NaN stays
    elif ACTIVATION == "gelu":
        return z * _normal_cdf(z)
    elif ACTIVATION == "gelu_tanh":
        return z * _tanh_gate(z)
    elif ACTIVATION == "silu":
        return z * _sigmoid(z)
    else:
        return z


@triton.jit
def _slope(z, ACTIVATION: tl.constexpr):
    """f′(z)"""
    if ACTIVATION == "relu":
        return tl.where(z > 0.0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        return _normal_cdf(z) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        s = _tanh_gate(z)  # = σ(2 u), with √(2/π) = 0.79788…
        slope = 0.7978845608028654 + 3.0 * 0.035677408136300125 * z * z
        return s * (1.0 + 2.0 * z * slope * (1.0 - s))
    else:
        s = _sigmoid(z)
        return s * (1.0 + z * (1.0 - s))


@triton.jit
def _normal_cdf(z):
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def _tanh_gate(z):
    """½ (1 + tanh u), u = √(2/π) (z + 0.044715 z³)"""
    return _sigmoid(2.0 * z * (0.7978845608028654 + 0.035677408136300125 * z * z))


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _finish(
    total, y, z, bias, residual, row, column, M, N, bias_step, rm, rn,
    ACTIVATION: tl.constexpr, WIDE: tl.constexpr, HALVES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Bias, activation and residual on a tile of A B; then it is written.

    In HALVES, first the left, then the right: for all at once there are not enough registers.
    """
    rows = row + tl.arange(0, ROWS)
    if HALVES:
        HALF: tl.constexpr = COLUMNS // 2
        halves = tl.permute(tl.reshape(total, [ROWS, 2, HALF]), [0, 2, 1])
        left, right = tl.split(halves)
        columns = column + tl.arange(0, HALF)
        _write(left, y, z, bias, residual, rows, columns, M, N, bias_step, rm, rn, ACTIVATION, WIDE)
        columns += HALF
        _write(
            right, y, z, bias, residual, rows, columns, M, N, bias_step, rm, rn, ACTIVATION, WIDE
        )
    else:
        columns = column + tl.arange(0, COLUMNS)
        _write(
            total, y, z, bias, residual, rows, columns, M, N, bias_step, rm, rn, ACTIVATION, WIDE
        )


@triton.jit
def _write(
    total, y, z, bias, residual, rows, columns, M, N, bias_step, rm, rn,
    ACTIVATION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    place = _wide(rows, WIDE)[:, None] * N + columns[None, :]
    if bias is not None:
        seen = tl.load(bias + _wide(columns, WIDE) * bias_step, mask=columns < N, other=0.0)
        total += seen.to(tl.float32)[None, :]
    if z is not None:
        tl.store(z + place, total.to(z.dtype.element_ty), mask=inside)
    total = _activated(total, ACTIVATION)
    if residual is not None:
        residual += _wide(rows, WIDE)[:, None] * rm + _wide(columns, WIDE)[None, :] * rn
        total += tl.load(residual, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _multiply(
    a, b, y, z, bias, residual, M, N, K, n1, n2,
    a0, a1, a2, am, ak, b0, b1, b2, bk, bn, bias_step, r0, r1, r2, rm, rn,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    HALVES: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of y, or of one of SPLITS partial sums: y is then (batch, SPLITS, M, N)."""
    tiles = tl.cdiv(M, ROWS) * tl.cdiv(N, COLUMNS)
    plane = tl.program_id(0) // tiles
    row, column = _tile(tl.program_id(0) % tiles, M, N, ROWS, COLUMNS, GROUP)
    batch = plane // SPLITS
    part = tl.cdiv(tl.cdiv(K, INNER), SPLITS) * INNER
    start = plane % SPLITS * part
    stop = tl.minimum(K, start + part)
    inner = tl.arange(0, INNER)
    # In place of rows and columns that there are not, others are read: the loop needs no mask.
    rows = (row + tl.arange(0, ROWS)) % M
    columns = (column + tl.arange(0, COLUMNS)) % N
    left = a + _place(batch, n1, n2, a0, a1, a2) + start.to(tl.int64) * ak
    at_left = _wide(rows, WIDE)[:, None] * am + _wide(inner, WIDE)[None, :] * ak
    right = b + _place(batch, n1, n2, b0, b1, b2) + start.to(tl.int64) * bk
    at_right = _wide(inner, WIDE)[:, None] * bk + _wide(columns, WIDE)[None, :] * bn
    step = _wide(tl.full([], INNER, tl.int32), WIDE)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(start, stop, INNER):
        if EVEN:
            x, w = tl.load(left + at_left), tl.load(right + at_right)
        else:
            x = tl.load(left + at_left, mask=inner[None, :] < stop - k, other=0.0)
            w = tl.load(right + at_right, mask=inner[:, None] < stop - k, other=0.0)
        total = tl.dot(x, w, total, input_precision=PRECISION)
        left += step * ak
        right += step * bk
    y += plane.to(tl.int64) * M * N
    if z is not None:
        z += plane.to(tl.int64) * M * N
    if residual is not None:
        residual += _place(batch, n1, n2, r0, r1, r2)
    _finish(
        total, y, z, bias, residual, row, column, M, N, bias_step, rm, rn,
        ACTIVATION, WIDE, HALVES, ROWS, COLUMNS,
    )  # fmt: skip


@triton.jit
def _reduce(
    parts, y, z, bias, residual, splits, M, N, n1, n2, bias_step, r0, r1, r2, rm, rn,
    ACTIVATION: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of y from the partial sums (batch, splits, M, N), added up in their order."""
    tiles = tl.cdiv(M, ROWS) * tl.cdiv(N, COLUMNS)
    batch = tl.program_id(0) // tiles
    row, column = _tile(tl.program_id(0) % tiles, M, N, ROWS, COLUMNS, tl.constexpr(1))
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    plane = batch.to(tl.int64) * M * N
    parts += plane * splits + rows.to(tl.int64)[:, None] * N + columns[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for _ in range(splits):
        total += tl.load(parts, mask=inside, other=0.0)
        parts += tl.full([], 1, tl.int64) * M * N  # M.to(…) fails where M is 1, a constant
    y += plane
    if z is not None:
        z += plane
    if residual is not None:
        residual += _place(batch, n1, n2, r0, r1, r2)
    _finish(
        total, y, z, bias, residual, row, column, M, N, bias_step, rm, rn,
        ACTIVATION, WIDE, tl.constexpr(False), ROWS, COLUMNS,
    )  # fmt: skip


_described: Any = tl.make_tensor_descriptor  # `Any`: in Python's eyes a kernel mixes up types
_range: Any = tl.range


@triton.jit
def _multiply_persistent(
    a, b, y, z, bias, residual, M, N, K, a_step, b_step, bias_step, rm, rn,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    TURNED_A: tl.constexpr, TURNED_B: tl.constexpr, WIDE: tl.constexpr, HALVES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Tile after tile of one product; what lies outside of A and B arrives as 0.

    TURNED: the operand's columns are contiguous, so that its transpose is what can be described.
    """
    if TURNED_A:
        left = _described(a, [K, M], [a_step, 1], [INNER, ROWS])
    else:
        left = _described(a, [M, K], [a_step, 1], [ROWS, INNER])
    if TURNED_B:
        right = _described(b, [N, K], [b_step, 1], [COLUMNS, INNER])
    else:
        right = _described(b, [K, N], [b_step, 1], [INNER, COLUMNS])
    tiles = tl.cdiv(M, ROWS) * tl.cdiv(N, COLUMNS)
    for index in _range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row, column = _tile(index, M, N, ROWS, COLUMNS, GROUP)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, K, INNER):
            if TURNED_A:
                x = left.load([k, row]).T
            else:
                x = left.load([row, k])
            if TURNED_B:
                w = right.load([column, k]).T
            else:
                w = right.load([k, column])
            total = tl.dot(x, w, total, input_precision=PRECISION)
        _finish(
            total, y, z, bias, residual, row, column, M, N, bias_step, rm, rn,
            ACTIVATION, WIDE, HALVES, ROWS, COLUMNS,
        )  # fmt: skip


# --- backward -------------------------------------------------------------------------------------


@triton.jit
def _slope_and_sums(
    g, z, dz, sums, rows, columns, chunk, n1, n2, g0, g1, g2, g3,
    ACTIVATION: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dz = g ⊙ f′(z) in `chunk` rows of some columns, and its sum over them."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1).to(tl.int64) * chunk
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, chunk, ROWS):
        row = first + start + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < columns)[None, :]
        place = _place(row, n1, n2, g0, g1, g2) + _wide(column, WIDE)[None, :] * g3
        value = tl.load(g + place, mask=inside, other=0.0).to(tl.float32)
        if z is not None:
            bent = tl.load(z + row * columns + column[None, :], mask=inside, other=0.0)
            value *= _slope(bent.to(tl.float32), ACTIVATION)
        if dz is not None:
            tl.store(dz + row * columns + column[None, :], value.to(dz.dtype.element_ty), inside)
        total += value
    if sums is not None:
        sums += tl.program_id(1).to(tl.int64) * columns
        out = tl.sum(total, 0).to(sums.dtype.element_ty)
        tl.store(sums + column, out, mask=column < columns)


# --- for the x-ray --------------------------------------------------------------------------------


def specimens(dtype: str) -> Iterator[Specimen]:
    """A layer of GPT-2's and its gradients, thin and odd products, in all that there is to launch.

    The layer: 8192 tokens, (8192, 768) times the transpose of (3072, 768), bias, GELU, z kept.
    """
    size = 4 if dtype == "fp32" else 2
    kind = "tf32" if dtype == "fp32" else "half"
    tiles = {tile[:2]: tile for tile in reversed(_TILES[kind])}

    def product(
        name: str,
        tile: tuple[int, ...],
        sizes: tuple[int, int, int],
        a: tuple[int, int],
        b: tuple[int, int],
        precision: str = "tf32",
        splits: int = 1,
        even: bool = True,
        wide: bool = False,
        **further: Any,
    ) -> Specimen:
        (m, n, k), (rows, columns, inner, warps, stages) = sizes, tile
        lead = dict.fromkeys(("a0", "a1", "a2", "b0", "b1", "b2", *_RESIDUAL), 0)
        return Specimen(
            name,
            _multiply,
            {"a": f"*{dtype}", "b": f"*{dtype}", "y": "*fp32" if splits > 1 else f"*{dtype}"}
            | {"z": None, "bias": None, "residual": None, "bias_step": 0}
            | {"M": m, "N": n, "K": k, "n1": 1, "n2": 1}
            | lead
            | {"am": a[0], "ak": a[1], "bk": b[0], "bn": b[1]}
            | {"ACTIVATION": None, "PRECISION": precision, "EVEN": even, "WIDE": wide}
            | {"HALVES": rows * columns > 64 * 32 * warps}
            | {"SPLITS": splits, "ROWS": rows, "COLUMNS": columns, "INNER": inner, "GROUP": 8}
            | further,
            num_warps=warps,
            num_stages=stages,
            bytes=((rows + columns) * k // splits + rows * columns) * size,
            flops=2 * rows * columns * k // splits,
        )

    follows: dict[str, Any] = {
        "bias": f"*{dtype}",
        "z": f"*{dtype}",
        "bias_step": 1,
        "ACTIVATION": "gelu",
    }
    layer = (8192, 3072, 768)
    turned: dict[str, Any] = {"a": (768, 1), "b": (1, 768)}
    for rows, columns in ((128, 256), (128, 128)):
        name = f"layer, tiles of {rows} × {columns}"
        yield product(name, tiles[rows, columns], layer, **turned, **follows)
    yield product(
        "layer's second half with residual",
        tiles[128, 128],
        (8192, 768, 3072),
        (3072, 1),
        (1, 3072),
        **(follows | {"z": None, "ACTIVATION": None}),
        **{"residual": f"*{dtype}", "rm": 768, "rn": 1},
    )
    yield product("gradient of x", tiles[128, 128], (8192, 768, 3072), (3072, 1), (768, 1))
    yield product(
        "gradient of the weights", tiles[128, 128], (3072, 768, 8192), (1, 3072), (768, 1)
    )
    thin = (1, 768, 3072)
    yield product("thin, in parts", tiles[16, 64], thin, (0, 1), (1, 3072), splits=8)
    logits = (65536, 50304, 768)
    yield product("logits, 64-bit offsets", tiles[128, 128], logits, **turned, wide=True)
    odd = (1001, 1003, 1005)
    yield product("odd sizes", tiles[64, 64], odd, (1005, 1), (1003, 1), even=False)
    if dtype == "fp32":
        exact = _TILES["ieee"][0]
        yield product("layer, exact", exact, layer, **turned, **follows, precision="ieee")
    yield from _others(dtype, size, kind)


def _others(dtype: str, size: int, kind: str) -> Iterator[Specimen]:
    """The kernels around the product, and the persistent one."""
    any_, plain = f"*{dtype}", {"ACTIVATION": "gelu", "WIDE": False}
    yield Specimen(
        "sum of the parts",
        _reduce,
        {"parts": "*fp32", "y": any_, "z": any_, "bias": any_, "residual": None, "splits": 8}
        | {"M": 1, "N": 768, "n1": 1, "n2": 1, "bias_step": 1, **dict.fromkeys(_RESIDUAL, 0)}
        | {**plain, "ROWS": 1, "COLUMNS": 256},
        bytes=256 * (8 * 4 + 2 * size),
        flops=256 * 20,
    )
    yield Specimen(
        "before the activation, and bias",
        _slope_and_sums,
        {"g": any_, "z": any_, "dz": any_, "sums": "*fp32", "rows": 8192, "columns": 3072}
        | {"chunk": 192, "n1": 1, "n2": 1, "g0": 3072, "g1": 0, "g2": 0, "g3": 1}
        | {**plain, "ROWS": 16, "COLUMNS": 128},
        bytes=192 * 128 * 3 * size,
        flops=192 * 128 * 20,
    )
    for tile in _PERSISTENT[kind]:
        rows, columns, inner, warps, stages = tile
        yield Specimen(
            f"layer, persistent, tiles of {rows} × {columns}",
            _multiply_persistent,
            {"a": any_, "b": any_, "y": any_, "z": any_, "bias": any_, "residual": None}
            | {"M": 8192, "N": 3072, "K": 768, "a_step": 768, "b_step": 768, "bias_step": 1}
            | {"rm": 0, "rn": 0, "PRECISION": "tf32", "TURNED_A": False, "TURNED_B": True}
            | {**plain, "ROWS": rows, "COLUMNS": columns, "INNER": inner, "GROUP": 8}
            | {"HALVES": rows * columns > 64 * 32 * warps},
            num_warps=warps,
            num_stages=stages,
            archs=(90,),
        )


_RESIDUAL = ("r0", "r1", "r2", "rm", "rn")
