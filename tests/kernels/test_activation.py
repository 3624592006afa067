"""The activation kernels against float64, alone and as gates."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tinygrad_llm import Tensor, ops
from tinygrad_llm.kernels import activation, tiles
from tinygrad_llm.kernels import layout as layouts

SMALL = {"BLOCK": 32, "num_warps": 1}
KIND = pytest.mark.parametrize("kind", activation.KINDS)

erf = np.vectorize(math.erf)


def reference(kind: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a(x), a′(x)) in float64."""
    if kind == "relu":
        return np.maximum(x, 0), (x > 0).astype(np.float64)
    if kind == "gelu":
        cdf = 0.5 * (1 + erf(x / math.sqrt(2)))
        return x * cdf, cdf + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    if kind == "silu":
        s = 0.5 * (1 + np.tanh(x / 2))
        return x * s, s + x * s * (1 - s)
    c = math.sqrt(2 / math.pi)
    t = np.tanh(c * (x + 0.044715 * x**3))
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 0.134145 * x * x)


def check(kind, x, g, config, close, wide, up=None) -> None:
    y, saved = activation.forward(x, up, kind=kind, config=config)
    got = activation.backward(g, *saved, kind=kind, config=config)
    a, slope = reference(kind, wide(x))
    u = 1 if up is None else wide(up)
    close(y, a * u)
    want = (wide(g) * u * slope, wide(g) * a)
    for actual, expected in zip([got] if up is None else got, want, strict=up is not None):
        close(actual, expected, times=2)
    for out in (y, got) if up is None else (y, *got):
        assert (out.dtype, out.flags.c_contiguous) == (x.dtype, True)


@KIND
def test_the_formula_and_its_gradient(kind, dtype, rng, array, close, wide) -> None:
    x, up, g = (array(rng.normal(size=(3, 37)) * s, dtype) for s in (3, 1, 1))
    check(kind, x, g, SMALL, close, wide)
    check(kind, x, g, SMALL, close, wide, up)


@KIND
def test_from_one_end_to_the_other(kind, dtype, array, close, wide) -> None:
    """Dense around 0, and far out, where a(x) is 0 or x."""
    x = np.concatenate([np.linspace(-12, 12, 801), [-3e4, -100, -1e-3, -0.0, 1e-3, 100, 3e4]])
    x = array(x, dtype)
    check(kind, x, array(np.ones(len(x)), dtype), None, close, wide)


@KIND
def test_it_is_the_op(kind, rng, array, wide) -> None:
    x = Tensor(rng.normal(size=(5, 7)).astype(np.float32), requires_grad=True)
    g = Tensor(rng.normal(size=(5, 7)).astype(np.float32))
    y = {
        "relu": ops.relu,
        "gelu": ops.gelu,
        "gelu_tanh": lambda x: ops.gelu(x, approximate="tanh"),
        "silu": ops.silu,
    }[kind](x)
    y.backward(g)
    ours, saved = activation.forward(array(x.numpy()), kind=kind)
    dx = activation.backward(array(g.numpy()), *saved, kind=kind)
    assert x.grad is not None
    np.testing.assert_allclose(wide(ours), y.numpy(), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(wide(dx), x.grad.numpy(), rtol=2e-6, atol=1e-6)


@KIND
def test_infinities_and_nan(kind, array, wide) -> None:
    """NaN stays NaN, ∞ stays ∞, and neither touches its neighbours."""
    x = array(np.array([1, np.nan, 2, np.inf, 3]), np.float32)
    y, _ = activation.forward(x, kind=kind, config=SMALL)
    np.testing.assert_array_equal(np.isnan(wide(y)), np.isnan(wide(x)))
    np.testing.assert_array_equal(np.isinf(wide(y)), np.isinf(wide(x)))


def test_the_gradient_of_relu_at_zero_is_zero(array, wide) -> None:
    x = array(np.array([-0.0, 0.0, 1e-38, -1.0]), np.float32)
    dx = activation.backward(array(np.full(4, 5), np.float32), x, kind="relu")
    assert wide(dx).tolist() == [0, 0, 5, 0]


@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 64, 97])
def test_sizes_around_a_block(size, rng, array, close, wide) -> None:
    x, up, g = (array(rng.normal(size=size), np.float32) for _ in range(3))
    check("silu", x, g, SMALL, close, wide, up)


def test_the_chosen_configuration_serves_any_shape(rng, array, close, wide) -> None:
    for shape in [(), (1, 1), (2, 3, 2, 3, 5), (300_001,)]:
        x, up, g = (array(rng.normal(size=shape), np.float32) for _ in range(3))
        check("silu", x, g, None, close, wide, up)


@pytest.mark.parametrize("unit", [1, 4])
def test_the_configurations_for_a_gpu(unit, monkeypatch) -> None:
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    for c in tiles.stretches.__wrapped__(10**6, unit):
        elements = c["BLOCK"] * unit
        assert elements & (elements - 1) == 0
        assert 4 <= elements / (32 * c["num_warps"]) <= 16


def test_any_strides(layout, dtype, rng, array, close, wide) -> None:
    x, up, g = (layout(array(rng.normal(size=(4, 3, 10)), dtype)) for _ in range(3))
    check("silu", x, g, SMALL, close, wide, up)


def test_strides_unlike_each_other(rng, array, close, wide) -> None:
    x = array(rng.normal(size=(4, 3, 10)), np.float32).transpose(1, 2, 0)
    up = array(rng.normal(size=(3, 20, 4)), np.float32)[:, ::-2]
    g = np.broadcast_to(array(rng.normal(size=(10, 1)), np.float32), (3, 10, 4))
    check("gelu", x, g, SMALL, close, wide, up)


def test_four_axes_are_not_copied(rng, array, close, wide) -> None:
    x = array(rng.normal(size=(4, 10, 6, 8)), np.float32)[::2, ::2, ::2, ::2].transpose(3, 0, 2, 1)
    (seen,), sizes, _ = tiles.flattened(x)
    assert seen is x
    assert sizes == (2, 3, 5)
    check("silu", x, x[::-1], SMALL, close, wide)


def test_gate_and_up_are_halves_of_one_array(rng, array, close, wide) -> None:
    """As one matmul gives both: neither is copied."""
    both = array(rng.normal(size=(7, 2 * 24)), np.float32)
    gate, up, g = both[:, :24], both[:, 24:], array(rng.normal(size=(7, 24)), np.float32)
    (x, u), sizes, steps = tiles.flattened(gate, up)
    assert x is gate
    assert u is up
    assert (sizes, steps) == ((24, 1, 1), [(48, 1, 0, 0), (48, 1, 0, 0)])
    check("silu", gate, g, SMALL, close, wide, up)


def test_axes_that_cannot_be_merged_are_copied(rng, array, close, wide) -> None:
    big = array(rng.normal(size=(3, 4, 3, 4, 3, 6)), np.float32)
    x, g = big[::2, ::2, ::2, ::2, ::2, ::2], big[1:, 1:3, 1:, 2:, 1:, ::2]
    assert layouts.merge_axes(x.shape, layouts.strides(x), at_most=4) is None
    check("silu", x, g, None, close, wide)


def test_offsets_of_64_bits(rng, array, close, wide, monkeypatch) -> None:
    x, up, g = (array(rng.normal(size=(5, 20)), np.float32).T for _ in range(3))
    monkeypatch.setattr(layouts, "_INT32", 3)
    assert layouts.needs_int64(x)
    check("gelu_tanh", x, g, SMALL, close, wide, up)


def test_elements_that_lie_four_gigabytes_apart(wide) -> None:
    if not tiles.INTERPRETED:
        pytest.skip("the array is in the CPU's memory")
    try:
        memory = np.empty(2**31 + 2**20, np.float16)  # of which four pages are touched
    except MemoryError:
        pytest.skip("no 4 GiB of address space")
    x = np.lib.stride_tricks.as_strided(memory, (2, 3), (2, 2**31))
    x[...] = [[1, 2, 3], [6, 5, 4]]
    assert layouts.needs_int64(x)
    y, _ = activation.forward(x, x, kind="relu")
    assert wide(y).tolist() == [[1, 4, 9], [36, 25, 16]]


def test_empty_arrays(array) -> None:
    x = array(np.zeros((2, 0, 3)), np.float32)
    y, saved = activation.forward(x, x)
    dx, dup = activation.backward(x, *saved)
    assert y.shape == dx.shape == dup.shape == x.shape


def test_what_is_refused(array) -> None:
    x = array(np.zeros((2, 3)), np.float32)
    with pytest.raises(ValueError, match="one of relu, gelu, gelu_tanh, silu, got 'swish'"):
        activation.forward(x, kind="swish")
    with pytest.raises(TypeError, match="gelu takes float32, float16 or bfloat16 arrays"):
        activation.forward(x.astype(np.int64))
    with pytest.raises(ValueError, match=r"gated silu.*\(2, 3\) float32 and \(3,\) float32"):
        activation.forward(x, x[0], kind="silu")
    with pytest.raises(ValueError, match=r"\(2, 3\) float32 and \(2, 3\) float16"):
        activation.forward(x, x.astype(np.float16))
    with pytest.raises(ValueError, match=r"gradient of the shape \(2, 3\), got \(3,\)"):
        activation.backward(x[0], x)
    with pytest.raises(TypeError, match="got float64"):
        activation.backward(x.astype(np.float64), x)
