"""AdamW for all parameters in one launch, and the norm that their gradients are clipped by.

    g ← c · g                              c = scale · min(1, max_norm / (‖scale · g‖ + 10⁻⁶))
    m ← β₁ m + (1 − β₁) g                  v ← β₂ v + (1 − β₂) g²
    θ ← (1 − lr λ) θ − rate · m / (√v + ε̂)
        rate = lr √(1 − β₂ᵗ) / (1 − β₁ᵗ)     ε̂ = ε √(1 − β₂ᵗ)

as optim/adam.py and optim/clip.py have it, in float32, whatever the parameters and gradients hold.

A model has hundreds of parameters, most of them small: launched one by one, the launches cost more
than the work. Here the kernel gets a table of addresses and sizes, and a list that gives each
program its parameter and its block of it. The table is uploaded once and found again as long as
nothing moves. NVIDIA Apex, `multi_tensor_apply`, 2019.

A step moves 28 bytes per float32 parameter; with bfloat16 parameters and gradients, 28 with a
float32 master weight and 22 without. About 15 FLOPs each. The norm reads the gradients once more.

The norm is a sum of squares in two stages, each in an order that never changes: a program per block
of gradients, then one for their sums. It is added in float64, where no float32 gradient is too
large or too small to be squared. It stays on the GPU: AdamW reads it there, clips by it, and does
nothing when it is infinite or NaN. So the host never waits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tinygrad_llm.backend import (
    Array,
    device_namespace,
    device_of,
    float32,
    float64,
    keep_table,
    namespace,
)
from tinygrad_llm.kernels.compile import Specimen
from tinygrad_llm.kernels.language import INTERPRETED, tl, triton
from tinygrad_llm.kernels.launch import Pointer, cdiv, launch
from tinygrad_llm.kernels.layout import check_floats
from tinygrad_llm.kernels.tune import Config


def adamw(
    parameters: Sequence[Array],
    gradients: Sequence[Array],
    first: Sequence[Array],
    second: Sequence[Array],
    masters: Sequence[Array | None] | None = None,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Sequence[float] = 0.01,
    scale: float = 1.0,
    max_norm: float | None = None,
    norm: Array | None = None,
    numbers: Array | None = None,
    config: Config | None = None,
) -> None:
    """θ ← (1 − lr λ) θ − lr · m̂ / (√v̂ + ε), in place, for every parameter θ.

    Args:
        parameters: θ, float32, float16 or bfloat16 arrays of any shapes. None shares memory with
            another.
        gradients: g, one of the same shape each; the dtypes may differ from the parameters'.
        first, second: m and v, float32, of the same shapes; zeros before the first step.
        masters: θ in float32, or None for a parameter that has none: where there is one, it is
            updated and θ becomes its rounded copy. A float16 or bfloat16 θ without one forgets
            changes below its last digit.
        step: t = 1, 2, …
        lr, betas, eps: as in `optim.AdamW`.
        weight_decay: λ, for all or one for each.
        scale: a factor on the gradients, as 1 over the loss scale of float16.
        max_norm: the largest norm of all gradients together; it needs `norm`.
        norm: what `gradient_norm` gave for the same scale. Where it is infinite or NaN, nothing is
            written.
        numbers: `step_numbers(…)` in the GPU's memory, which are then used instead of step, lr and
            eps: a captured CUDA graph repeats its arguments, but reads this memory anew.
        config: {'BLOCK', 'num_warps'} instead of the usual one.

    There is one launch for each mix of dtypes, and one more for sizes that 16 does not divide:
    these keep loads narrow. Arrays that are not C-contiguous are copied, and copied back.

    Raises:
        TypeError, ValueError: arrays that do not fit each other; the first one is named.
    """
    if step < 1:
        raise ValueError(f"adamw counts its steps from 1, got step={step}")
    if max_norm is not None and norm is None:
        raise ValueError("adamw clips by the norm that gradient_norm() gives: pass it as norm")
    masters = [None] * len(parameters) if masters is None else masters
    decays = _each(weight_decay, len(parameters))
    _check(parameters, gradients, first, second, masters, decays)
    beta1, beta2 = map(float, betas)
    lr, rate, eps_hat = step_numbers(step, lr, betas, eps).tolist()
    config = config or {"BLOCK": 65536 if INTERPRETED else 2048, "num_warps": 8}
    limit = math.inf if max_norm is None else float(max_norm)

    groups: dict[tuple[object, ...], list[int]] = {}
    for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
        if p.size:
            kind = (p.dtype, g.dtype, masters[i] is None, p.size % 16 == 0)
            groups.setdefault(kind, []).append(i)
    for members in groups.values():
        columns = [[of[i] for i in members] for of in (parameters, first, second, gradients)]
        if masters[members[0]] is not None:
            columns.insert(3, [masters[i] for i in members])
        flat = [[_contiguous(a) for a in column] for column in columns]
        table = _table(flat, [decays[i] for i in members], config["BLOCK"])
        launch(
            _adamw,
            table.programs,
            *(table.addresses, table.blocks, table.decays, norm, numbers),
            *(flat[0][0], flat[-1][0], lr, rate, eps_hat),
            *(beta1, 1.0 - beta1, beta2, 1.0 - beta2, float(scale), limit),
            reaches=[a for column in flat for a in column],
            MASTERS=len(columns) == 5,
            ALIGNED=table.aligned,
            **config,
        )
        for column, copies in zip(columns[:-1], flat[:-1], strict=True):
            for a, copy in zip(column, copies, strict=True):
                if copy is not a:
                    a[...] = copy


def gradient_norm(
    gradients: Sequence[Array], *, scale: float = 1.0, config: Config | None = None
) -> Array:
    """‖scale · g‖₂ of all gradients as one long vector: a float32 array (1,), where they are.

    It is infinite or NaN only if a gradient is (or beyond float32's 3·10³⁸), and the same to the
    bit for the same gradients.
    """
    if not gradients:
        raise ValueError("gradient_norm needs at least one gradient, got none")
    check_floats("gradient_norm", *gradients)
    config = config or {"BLOCK": 65536 if INTERPRETED else 8192, "num_warps": 8}
    groups: dict[object, list[Array]] = {}
    for g in gradients:
        if g.size:
            groups.setdefault((g.dtype, g.size % 16 == 0), []).append(_contiguous(g))
    xp = namespace(gradients[0])
    tables = [_table([group], [0.0] * len(group), config["BLOCK"]) for group in groups.values()]
    programs = sum(table.programs for table in tables)
    partial, norm = xp.empty(max(1, programs), dtype=float64), xp.empty(1, dtype=float32)
    done = 0
    for group, table in zip(groups.values(), tables, strict=True):
        launch(
            _squares,
            table.programs,
            *(table.addresses, table.blocks, group[0], partial[done:]),
            reaches=group,
            ALIGNED=table.aligned,
            **config,
        )
        done += table.programs
    launch(_root, 1, partial, norm, programs, abs(float(scale)), BLOCK=4096, num_warps=8)
    return norm


def step_numbers(
    step: int, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> np.ndarray:
    """(lr, rate, ε̂) of step t as float32: what changes from step to step."""
    root = math.sqrt(1.0 - betas[1] ** step)
    return np.array([lr, lr * root / (1.0 - betas[0] ** step), eps * root], dtype=float32)


def _each(weight_decay: float | Sequence[float], count: int) -> list[float]:
    if isinstance(weight_decay, Sequence):
        return [float(decay) for decay in weight_decay]
    return [float(weight_decay)] * count


def _check(
    parameters: Sequence[Array],
    gradients: Sequence[Array],
    first: Sequence[Array],
    second: Sequence[Array],
    masters: Sequence[Array | None],
    decays: Sequence[float],
) -> None:
    counts = [len(x) for x in (parameters, gradients, first, second, masters, decays)]
    if len(set(counts)) > 1:
        raise ValueError(
            f"adamw needs a gradient, two moments, a master and a decay for each of the "
            f"{counts[0]} parameters, got {', '.join(map(str, counts[1:]))}"
        )
    check_floats("adamw", *parameters, *gradients)
    for i, (p, *others) in enumerate(
        zip(parameters, gradients, first, second, masters, strict=True)
    ):
        given = [a for a in others if a is not None]
        if any(a.shape != p.shape for a in given):
            shapes = ", ".join([str(a.shape) for a in given])
            raise ValueError(f"adamw: parameter {i} has the shape {p.shape}, its arrays {shapes}")
        if any(a.dtype != float32 for a in given[1:]):
            dtypes = ", ".join([str(a.dtype) for a in given[1:]])
            raise TypeError(
                f"adamw needs moments and masters in float32, got {dtypes} for parameter {i}"
            )


def _contiguous(a: Array) -> Array:
    """Itself where its elements stand in memory one after the other, else a copy."""
    return a if a.flags.c_contiguous else namespace(a).ascontiguousarray(a)


# --- the table ------------------------------------------------------------------------------------


class _Table(NamedTuple):
    """What a launch over many arrays reads first.

    addresses: int64, (tensors, 1 + columns): the size of each tensor, then where its arrays are.
    blocks: int64, (programs, 2): the tensor of a program, and which block of it.
    aligned: whether all addresses and sizes are multiples of 16, as wide loads need.
    """

    addresses: Array
    blocks: Array
    decays: Array
    programs: int
    aligned: bool


def _table(columns: Sequence[Sequence[Array]], decays: Sequence[float], block: int) -> _Table:
    sizes = tuple([a.size for a in columns[0]])
    addresses = tuple([Pointer(a).address for column in columns for a in column])
    device = device_of(columns[0][0])
    blocks = _blocks(sizes, block, device)
    aligned = all(n % 16 == 0 for n in (*sizes, *addresses))
    where, shares = _addresses(sizes, addresses, tuple(decays), device)
    table = _Table(where, blocks, shares, len(blocks), aligned)
    keep_table(table)
    return table


@functools.lru_cache(16)
def _blocks(sizes: tuple[int, ...], block: int, device: str) -> Array:
    counts = np.array([cdiv(n, block) for n in sizes], dtype=np.int64)
    tensor = np.repeat(np.arange(len(sizes)), counts)
    within = np.arange(tensor.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return _upload(np.stack([tensor, within], axis=1), device)


@functools.lru_cache(64)
def _addresses(
    sizes: tuple[int, ...], addresses: tuple[int, ...], decays: tuple[float, ...], device: str
) -> tuple[Array, Array]:
    """It holds numbers, not arrays: what moves has other addresses, and another table."""
    columns = np.array([*sizes, *addresses], dtype=np.int64).reshape(-1, len(sizes))
    shares = np.array(decays, dtype=float32)
    return _upload(np.ascontiguousarray(columns.T), device), _upload(shares, device)


def _upload(values: np.ndarray, device: str) -> Array:
    """On a stream of its own, and waited for: it is there for all streams that find it in a cache.

    Nor is the copy part of a CUDA graph that is being captured.
    """
    if device == "cpu":
        return values
    cupy = device_namespace(device)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        there = cupy.asarray(values)
        stream.synchronize()
    return there


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _size(row, ALIGNED: tl.constexpr):
    """The number of elements in a row of the table."""
    n = tl.load(row)
    if ALIGNED:  # so that a mask, too, is the same for all that a wide load takes
        n = tl.multiple_of(n, 16)
    return n


@triton.jit
def _array(row, column, like, ALIGNED: tl.constexpr):
    """The pointer in a column of the table, to what `like` points to."""
    pointer = tl.load(row + column).to(tl.pointer_type(like.dtype.element_ty))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _adamw(
    addresses, blocks, decays, norm, numbers, p_like, g_like, lr, rate, eps_hat,
    beta1, rest1, beta2, rest2, scale, max_norm,
    MASTERS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one parameter, product by product as optim/adam.py; √ and / are rounded right."""
    if numbers is not None:
        lr = tl.load(numbers)
        rate = tl.load(numbers + 1)
        eps_hat = tl.load(numbers + 2)
    finite = True
    if norm is not None:
        total = tl.load(norm)
        finite = total < float("inf")
        scale *= tl.minimum(1.0, max_norm / (total + 1e-6))
    if finite:
        program = tl.program_id(0).to(tl.int64)
        tensor = tl.load(blocks + 2 * program)
        row = addresses + tensor * (6 if MASTERS else 5)
        i = tl.load(blocks + 2 * program + 1) * BLOCK + tl.arange(0, BLOCK)
        inside = i < _size(row, ALIGNED)
        p = _array(row, 1, p_like, ALIGNED)
        m = _array(row, 2, decays, ALIGNED)
        v = _array(row, 3, decays, ALIGNED)
        theta = _array(row, 4, decays, ALIGNED) if MASTERS else p
        g = _array(row, 5 if MASTERS else 4, g_like, ALIGNED)
        gradient = tl.load(g + i, mask=inside, other=0.0).to(tl.float32) * scale
        mean = beta1 * tl.load(m + i, mask=inside, other=0.0) + rest1 * gradient
        square = beta2 * tl.load(v + i, mask=inside, other=0.0) + rest2 * (gradient * gradient)
        weight = tl.load(theta + i, mask=inside, other=0.0).to(tl.float32)
        weight *= 1.0 - lr * tl.load(decays + tensor)
        weight -= rate * tl.div_rn(mean, tl.sqrt_rn(square) + eps_hat)
        tl.store(m + i, mean, mask=inside)
        tl.store(v + i, square, mask=inside)
        if MASTERS:
            tl.store(theta + i, weight, mask=inside)
        tl.store(p + i, weight.to(p.dtype.element_ty), mask=inside)


@triton.jit
def _squares(addresses, blocks, g_like, partial, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Σ g² of a block of one gradient, in float64."""
    program = tl.program_id(0).to(tl.int64)
    row = addresses + 2 * tl.load(blocks + 2 * program)
    i = tl.load(blocks + 2 * program + 1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < _size(row, ALIGNED)
    g = tl.load(_array(row, 1, g_like, ALIGNED) + i, mask=inside, other=0.0).to(tl.float64)
    tl.store(partial + program, tl.sum(g * g, 0))


@triton.jit
def _root(partial, norm, n, scale, BLOCK: tl.constexpr):
    """√ Σ of the partial sums, by one program."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(partial + i, mask=i < n, other=0.0)
    tl.store(norm, (tl.sqrt(tl.sum(total, 0)) * scale).to(tl.float32))


# --- for the x-ray --------------------------------------------------------------------------------


def specimens(dtype: str) -> Iterator[Specimen]:
    """A step with clipping; the halves with and without master weights."""
    size = 4 if dtype == "fp32" else 2
    arrays = {"addresses": "*i64", "blocks": "*i64", "decays": "*fp32", "norm": "*fp32"}
    likes = {"numbers": None, "p_like": f"*{dtype}", "g_like": f"*{dtype}"}
    names = ("lr", "rate", "eps_hat", "beta1", "rest1", "beta2", "rest2", "scale", "max_norm")
    floats = dict.fromkeys(names, 0.5)
    options = {"ALIGNED": True, "BLOCK": 2048}
    for masters in [False] if dtype == "fp32" else [True, False]:
        yield Specimen(
            f"adamw{', master weights' if masters else ''}",
            _adamw,
            {**arrays, **likes, **floats, **options, "MASTERS": masters},
            num_warps=8,
            bytes=2048 * (16 + 8 * masters + size * (2 if masters else 3)),
            flops=15 * 2048,
        )
    bare = {"norm": None, "numbers": "*fp32", "ALIGNED": False, "MASTERS": False}
    yield Specimen(
        "adamw, a graph's, odd sizes",
        _adamw,
        {**arrays, **likes, **floats, **options, **bare},
        num_warps=8,
        bytes=2048 * (16 + 3 * size),
        flops=15 * 2048,
    )
    g = {"addresses": "*i64", "blocks": "*i64", "g_like": f"*{dtype}", "partial": "*fp64"}
    yield Specimen(
        "norm, a block",
        _squares,
        {**g, "ALIGNED": True, "BLOCK": 8192},
        num_warps=8,
        bytes=8192 * size,
        flops=2 * 8192,
    )
    if dtype == "fp32":
        yield Specimen(
            "norm, the sum",
            _root,
            {"partial": "*fp64", "norm": "*fp32", "n": 16384, "scale": 0.5, "BLOCK": 4096},
            num_warps=8,
            bytes=16384 * 8,
            flops=16384,
        )
