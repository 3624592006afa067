"""Activations of any array, alone or as the gate of a second one, forward and backward.

    y = a(x)              dx = g a′(x)
    y = a(x) ⊙ u          dx = g ⊙ u ⊙ a′(x),  du = g ⊙ a(x)        a gated unit; of SiLU: SwiGLU

    kind         a(x)                                     a′(x)
    relu         max(x, 0)                                1 where x > 0, else 0
    gelu         x Φ(x), Φ(x) = ½ (1 + erf(x/√2))         Φ + x φ, φ = e^(−x²/2) / √2π
    gelu_tanh    x σ(v), v = 2 √(2/π) (x + 0.044715 x³)   σ + x σ (1 − σ) v′
    silu         x σ(x)                                   σ + x σ (1 − σ)

½ (1 + tanh t) is σ(2t), so the tanh form of GELU is a SiLU with a bent argument. The arithmetic is
float32, whatever the arrays hold. Nothing but the inputs is saved: what is recomputed costs a few
instructions, what is read costs time. Bytes: forward 2·|x| (gated 3·|x|), backward 3·|x| (5·|x|);
about 10 to 40 FLOPs an element.

Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016. Shazeer, "GLU variants improve
Transformer", 2020.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tinygrad_llm.backend import Array, namespace
from tinygrad_llm.kernels.compile import Specimen
from tinygrad_llm.kernels.language import tl, triton
from tinygrad_llm.kernels.launch import cdiv, launch
from tinygrad_llm.kernels.layout import check_floats, needs_int64
from tinygrad_llm.kernels.tiles import element_offset, first_of, flattened, stretches
from tinygrad_llm.kernels.tune import Config, choose

KINDS = ("relu", "gelu", "gelu_tanh", "silu")


def forward(
    x: Array, up: Array | None = None, *, kind: str = "gelu", config: Config | None = None
) -> tuple[Array, tuple[Array, Array | None]]:
    """y = a(x), or a(x) ⊙ up: SwiGLU is kind="silu" of the gate, with up.

    Args:
        x: any shape, float32, float16 or bfloat16, any strides; of a gated unit the gate.
        up: what the gate lets through, of x's shape and dtype; halves of one array will do.
        kind: one of KINDS.
        config: {'BLOCK', 'num_warps'} instead of the tuned one.

    Returns:
        (y, saved): y is contiguous, of x's dtype and shape; saved are the inputs.
    """
    arrays = [x] if up is None else [x, up]
    _check(kind, *arrays)
    y = namespace(x).empty(x.shape, dtype=x.dtype)
    if x.size:
        _launch(_forward, kind, arrays, [None] * (up is None), [y], config)
    return y, (x, up)


def backward(
    g: Array,
    x: Array,
    up: Array | None = None,
    *,
    kind: str = "gelu",
    config: Config | None = None,
) -> Any:
    """dx, or where the forward had `up` the pair (dx, dup): contiguous, of x's dtype.

    Args:
        g: the gradient of y, of x's shape, any strides.
        x, up: what `forward` saved; `kind` is that of the forward.
    """
    arrays = [x] if up is None else [x, up]
    _check(kind, *arrays, g=g)
    outputs = [namespace(x).empty(x.shape, dtype=x.dtype) for _ in arrays]
    if x.size:
        absent = [None] * (up is None)
        _launch(_backward, kind, [g, *arrays], absent, [*outputs, *absent], config)
    return outputs[0] if up is None else tuple(outputs)


def _check(kind: str, x: Array, up: Array | None = None, g: Array | None = None) -> None:
    if kind not in KINDS:
        raise ValueError(f"an activation is one of {', '.join(KINDS)}, got {kind!r}")
    check_floats(kind, *[a for a in (x, up, g) if a is not None])
    if up is not None and (up.shape != x.shape or up.dtype != x.dtype):
        raise ValueError(
            f"a gated {kind} needs two arrays of one shape and dtype, got {x.shape} {x.dtype} and "
            f"{up.shape} {up.dtype}"
        )
    if g is not None and g.shape != x.shape:
        raise ValueError(f"{kind} needs a gradient of the shape {x.shape}, got {g.shape}")


def _launch(
    kernel: Any,
    kind: str,
    inputs: list[Array],
    absent: list[None],
    outputs: list[Any],
    config: Config | None,
) -> None:
    size, sample = inputs[0].size, outputs[0]
    wide = needs_int64(*inputs, sample)
    arrays, sizes, steps = flattened(*inputs)
    places = [s for four in (*steps, *[(0, 0, 0, 0) for _ in absent]) for s in four]

    def run(config: Config) -> None:
        launch(
            kernel,
            cdiv(size, config["BLOCK"]),
            *(*arrays, *absent, *outputs, size, *sizes, *places),
            KIND=kind,
            WIDE=wide,
            **config,
        )

    gated = not absent
    run(config or choose(kernel, stretches(size), sample, (size,), run, kind=kind, gated=gated))


# --- the formulas, which other kernels may call, too ----------------------------------------------


@triton.jit
def activated(x, KIND: tl.constexpr):
    """a(x) of float32 numbers."""
    if KIND == "relu":
        return tl.where(x <= 0.0, 0.0, x)  # NaN stays NaN
    elif KIND == "gelu":
        return x * _normal_cdf(x)
    else:
        return x * tl.sigmoid(_argument(x, KIND))


@triton.jit
def slope(x, KIND: tl.constexpr):
    """a′(x) of float32 numbers."""
    if KIND == "relu":
        return tl.where(x > 0.0, 1.0, 0.0)
    elif KIND == "gelu":
        return _normal_cdf(x) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327  # 1 / √2π
    else:
        s = tl.sigmoid(_argument(x, KIND))
        return s + x * s * (1.0 - s) * _argument_slope(x, KIND)


@triton.jit
def _normal_cdf(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _argument(x, KIND: tl.constexpr):
    """What σ is taken of: x, or 2 √(2/π) (x + 0.044715 x³)."""
    if KIND == "silu":
        return x
    else:
        return x * (1.5957691216057308 + 0.07135481282052325 * x * x)


@triton.jit
def _argument_slope(x, KIND: tl.constexpr):
    if KIND == "silu":
        return 1.0
    else:
        return 1.5957691216057308 + 0.21406443846156975 * x * x


# --- over arrays ----------------------------------------------------------------------------------


@triton.jit
def _forward(
    x, up, y, size, n1, n2, n3, x0, x1, x2, x3, u0, u1, u2, u3,
    KIND: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = first_of(BLOCK, WIDE) + tl.arange(0, BLOCK)
    inside = i < size
    value = tl.load(x + element_offset(i, n1, n2, n3, x0, x1, x2, x3), mask=inside, other=0.0)
    out = activated(value.to(tl.float32), KIND)
    if up is not None:
        u = tl.load(up + element_offset(i, n1, n2, n3, u0, u1, u2, u3), mask=inside, other=0.0)
        out *= u.to(tl.float32)
    tl.store(y + i, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    g, x, up, dx, dup, size, n1, n2, n3,
    g0, g1, g2, g3, x0, x1, x2, x3, u0, u1, u2, u3,
    KIND: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = first_of(BLOCK, WIDE) + tl.arange(0, BLOCK)
    inside = i < size
    dy = tl.load(g + element_offset(i, n1, n2, n3, g0, g1, g2, g3), mask=inside, other=0.0)
    value = tl.load(x + element_offset(i, n1, n2, n3, x0, x1, x2, x3), mask=inside, other=0.0)
    dy, value = dy.to(tl.float32), value.to(tl.float32)
    if up is not None:
        u = tl.load(up + element_offset(i, n1, n2, n3, u0, u1, u2, u3), mask=inside, other=0.0)
        d = dy * activated(value, KIND)
        tl.store(dup + i, d.to(dup.dtype.element_ty), mask=inside)
        dy *= u.to(tl.float32)
    d = dy * slope(value, KIND)
    tl.store(dx + i, d.to(dx.dtype.element_ty), mask=inside)


# --- for the x-ray --------------------------------------------------------------------------------


def specimens(dtype: str) -> Iterator[Specimen]:
    """Every kind on a contiguous array; SwiGLU on the two halves of one; a transposed array."""
    size, x, block = (4 if dtype == "fp32" else 2), f"*{dtype}", 1024
    axes = {"n1": 1, "n2": 1, "n3": 1}

    def steps(names: str, *values: int) -> dict[str, int]:
        return {f"{name}{i}": values[i] for name in names for i in range(4)}

    tile = {"size": 8192 * 3072, "WIDE": False, "BLOCK": block}
    for kind in KINDS:
        alone = {"up": None, "KIND": kind, **steps("u", 0, 0, 0, 0), **axes, **tile}
        yield Specimen(
            f"{kind}, forward",
            _forward,
            {"x": x, "y": x, **alone, **steps("x", 1, 0, 0, 0)},
            bytes=2 * block * size,
            flops=20 * block,
        )
        yield Specimen(
            f"{kind}, backward",
            _backward,
            {"g": x, "x": x, "dx": x, "dup": None, **alone, **steps("gx", 1, 0, 0, 0)},
            bytes=3 * block * size,
            flops=30 * block,
        )
    # gate and up side by side in the (8192, 2 · 3072) output of one matmul
    halves = {"up": x, "KIND": "silu", **axes, **tile, "n1": 3072, **steps("xu", 6144, 1, 0, 0)}
    yield Specimen(
        "swiglu, forward, halves of an array",
        _forward,
        {"x": x, "y": x, **halves},
        bytes=3 * block * size,
        flops=15 * block,
    )
    yield Specimen(
        "swiglu, backward, halves of an array",
        _backward,
        {"g": x, "x": x, "dx": x, "dup": x, **halves, **steps("g", 3072, 1, 0, 0)},
        bytes=5 * block * size,
        flops=25 * block,
    )
    alone = {"up": None, "KIND": "silu", **steps("u", 0, 0, 0, 0), **axes, **tile}
    yield Specimen(
        "silu, forward, transposed, 64 bits",
        _forward,
        {"x": x, "y": x, **alone, "n1": 8192, "WIDE": True, **steps("x", 1, 3072, 0, 0)},
        bytes=2 * block * size,
        flops=20 * block,
    )
