"""kernels/quantize.py against NumPy in float64: both widths, groups, the ways to go along a row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tinygrad_llm import ops
from tinygrad_llm.backend import to_device
from tinygrad_llm.kernels import quantize as module
from tinygrad_llm.kernels.quantize import backward, forward

TILE = {"ROWS": 16, "COLUMNS": 16, "num_warps": 4, "num_stages": 2}
LESS = {**TILE, "VECTOR": False, "INNER": 16}  # than a group of 32
MORE = {**TILE, "VECTOR": False, "INNER": 64}
VECTOR = {**TILE, "VECTOR": True, "ROWS": 1, "INNER": 64}
VECTOR_LESS = {**VECTOR, "INNER": 16}
CONFIGS = pytest.mark.parametrize(
    "config",
    [None, LESS, MORE, VECTOR, VECTOR_LESS],
    ids=["chosen", "less", "more", "vector", "vector, less"],
)
KINDS = pytest.mark.parametrize(
    ("bits", "group", "zeros"),
    [(8, 0, False), (8, 32, False), (4, 0, False), (4, 32, False), (4, 32, True), (4, 16, True)],
    ids=["8", "8 in groups", "4, rows", "4", "4, zeros", "4, zeros, small groups"],
)


class Weights:
    """Random integers, packed by hand, and the matrix that they stand for."""

    def __init__(self, array, rng, n, k, bits, group, zeros=False) -> None:
        most, groups = (127, 15)[bits == 4], -(-k // group) if group else 1
        q = rng.integers(-127 if bits == 8 else 0, most + 1, (n, k))
        self.s = (rng.random((n, groups)) + 0.5).astype(np.float32) / (64 if bits == 8 else 8)
        self.z = (
            rng.integers(0, 16, (n, groups)) if zeros else np.full((n, groups), 8 * (bits == 4))
        )
        which = np.arange(k) // group if group else np.zeros(k, int)
        self.w = (q - self.z[:, which]).astype(np.float32) * self.s[:, which]
        if bits == 4:
            q = np.pad(q, ((0, 0), (0, k % 2)))
            q = q[:, ::2] + 16 * q[:, 1::2]
        self.packed = array(q, np.int8 if bits == 8 else np.uint8)
        self.scales = array(self.s)
        self.zeros = array(self.z, np.uint8) if zeros else None
        self.options = {"group_size": group}

    def arrays(self) -> tuple[Any, Any, Any]:
        return self.packed, self.scales, self.zeros

    def as_(self, dtype) -> np.ndarray:
        """The matrix as products in that dtype see it."""
        return self.w.astype(dtype).astype(np.float64)


def normal(rng, *shape) -> np.ndarray:
    return 0.3 * rng.standard_normal(shape)


def check(weights: Weights, x, g, close, wide, config=None, bias=None) -> None:
    y, saved = forward(x, *weights.arrays(), bias, **weights.options, config=config)
    w = weights.as_(x.dtype)
    close(y, wide(x) @ w.T + (0 if bias is None else wide(bias)), 2)
    assert y.dtype == x.dtype
    assert y.flags.c_contiguous
    if config is not None:
        config = {name: config[name] for name in config if name != "VECTOR"} | {"ROWS": 16}
    dx = backward(g, *saved, **weights.options, config=config)
    close(dx, wide(g) @ w, 2)
    assert dx.dtype == x.dtype


@KINDS
@CONFIGS
def test_every_kind_on_every_way(config, bits, group, zeros, dtype, array, rng, close, wide):
    weights = Weights(array, rng, 18, 70, bits, group, zeros)
    x, g = array(normal(rng, 3, 70), dtype), array(normal(rng, 3, 18), dtype)
    check(weights, x, g, close, wide, config, array(normal(rng, 18), dtype))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 1, 1), (1, 40, 33), (4, 16, 64), (5, 17, 63), (16, 15, 65), (17, 1, 31), (33, 18, 32)],
)
@pytest.mark.parametrize("config", [None, LESS, VECTOR])
def test_sizes_around_the_tiles(m, n, k, bits, config, array, rng, close, wide):
    weights = Weights(array, rng, n, k, bits, 32)
    x, g = array(normal(rng, m, k), np.float32), array(normal(rng, m, n), np.float32)
    check(weights, x, g, close, wide, config)


def test_sizes_beyond_the_interpreters_blocks(array, rng, close, wide):
    """The loop over K or N comes round again."""
    weights = Weights(array, rng, 520, 521, 4, 64)
    x, g = array(normal(rng, 6, 521), np.float32), array(normal(rng, 6, 520), np.float32)
    check(weights, x, g, close, wide)


@pytest.mark.parametrize("config", [MORE, VECTOR])
def test_any_strides(config, layout, dtype, array, rng, close, wide):
    weights = Weights(array, rng, 17, 40, 4, 32)
    x, g = layout(array(normal(rng, 5, 40), dtype)), layout(array(normal(rng, 5, 17), dtype))
    bias = layout(array(normal(rng, 17, 1), dtype))[:, 0]
    check(weights, x, g, close, wide, config, bias)


def test_weights_of_any_strides(layout, array, rng, close, wide):
    weights = Weights(array, rng, 6, 40, 4, 16, zeros=True)
    x = array(normal(rng, 3, 40), np.float32)
    placed = [layout(a) for a in weights.arrays()]
    y, saved = forward(x, *placed, group_size=16)
    copies = [a.copy() for a in placed]
    expected, kept = forward(x, *copies, group_size=16)
    np.testing.assert_array_equal(wide(y), wide(expected))
    np.testing.assert_array_equal(
        wide(backward(y, *saved, group_size=16)), wide(backward(y, *kept, group_size=16))
    )


def test_offsets_of_64_bits(array, rng, close, wide, monkeypatch):
    monkeypatch.setattr(module, "needs_int64", lambda x: True)
    weights = Weights(array, rng, 17, 40, 4, 32)
    x, g = array(normal(rng, 5, 40), np.float32).T.copy().T, array(normal(rng, 5, 17), np.float32)
    for config in (LESS, MORE, VECTOR):
        check(weights, x, g, close, wide, config)


def test_scales_of_half_precision(dtype, array, rng, close, wide):
    weights = Weights(array, rng, 6, 40, 8, 0)
    weights.scales = array(weights.s, dtype)
    x = array(normal(rng, 3, 40), np.float32)
    y, _ = forward(x, *weights.arrays())
    q = wide(weights.packed)
    close(y, wide(x) @ (q * wide(weights.scales)).T, 2)


def test_a_gradient_of_another_dtype(array, rng, close, wide):
    weights = Weights(array, rng, 6, 40, 8, 0)
    x, g = array(normal(rng, 3, 40), np.float16), array(normal(rng, 3, 6), np.float32)
    _, saved = forward(x, *weights.arrays())
    dx = backward(g, *saved)
    assert dx.dtype == np.float16
    close(dx, wide(g) @ weights.as_(np.float16), 2)


def test_nothing_of_x_is_kept(array, rng):
    weights = Weights(array, rng, 6, 40, 4, 32)
    x = array(normal(rng, 3, 40), np.float32)
    _, saved = forward(x, *weights.arrays(), group_size=32)
    assert saved[0].shape == x.shape
    assert saved[0].strides == (0, 0)
    assert saved[1] is weights.packed


@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 40), (3, 0, 40), (3, 5, 0)])
@pytest.mark.parametrize("bits", [8, 4])
def test_nothing_to_do(m, n, k, bits, array, rng, wide):
    weights = Weights(array, rng, n, k, bits, 0)
    x, g = array(np.ones((m, k)), np.float32), array(np.ones((m, n)), np.float32)
    bias = array(np.arange(n), np.float32)
    y, saved = forward(x, *weights.arrays(), bias)
    assert y.shape == (m, n)
    if k == 0:
        assert (wide(y) == np.arange(n)).all()
    dx = backward(g, *saved)
    assert dx.shape == (m, k)
    assert not wide(dx).any()


@pytest.mark.parametrize("bits", [8, 4])
def test_the_same_as_the_op(bits, dtype, array, rng, wide):
    """ops/quantize.py packs as the kernels read, and multiplies with the very same matrix."""
    w = normal(rng, 20, 37).astype(np.float32)
    for symmetric in (True, False)[: 3 - bits // 4]:
        q = ops.quantize(w, bits, 16, symmetric)
        arrays = [a if a is None else array(a.numpy()) for a in q]
        for m in (1, 7):
            x = array(normal(rng, m, 37), dtype)
            y, _ = forward(x, *arrays, group_size=16)
            expected = ops.quantized_linear(to_device(x, "cpu"), *q, group_size=16)
            assert expected.dtype == dtype
            rounding = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}[str(y.dtype)]
            np.testing.assert_allclose(
                wide(y), expected.numpy().astype(np.float64), rtol=rounding, atol=rounding
            )


def test_the_configurations_for_a_gpu(monkeypatch):
    monkeypatch.setattr(module, "INTERPRETED", False)
    forward_ones, back_ones = module._candidates.__wrapped__, module._back_candidates.__wrapped__
    for kind in ("half", "tf32", "ieee"):
        one = forward_ones(1, 4096, 4096, kind)
        assert one[0]["VECTOR"]
        assert not all(c["VECTOR"] for c in one)
        for m in (5, 16, 17, 64, 4096):
            found = forward_ones(m, 4096, 4096, kind)
            assert not any(c["VECTOR"] for c in found)
            assert (found[0]["ROWS"] == 16) == (m <= 32)
            assert any(c["ROWS"] > 16 for c in found) == (m > 16)
        assert forward_ones(4096, 4096, 4096, kind)[0]["ROWS"] == module._TILES[kind][0][0]
        assert forward_ones(4096, 4096, 4095, kind)[0]["ROWS"] == module._TILES[kind][1][0]
        for m in (1, 100, 4096):
            back = back_ones(m, 4096, 4096, kind)
            assert back
            assert not any("VECTOR" in c for c in back)
        for c in forward_ones(1, 64, 64, kind) + forward_ones(500, 64, 64, kind):
            assert all((c[name] & (c[name] - 1)) == 0 for name in ("ROWS", "COLUMNS", "INNER"))


def test_what_is_refused(array, rng):
    weights = Weights(array, rng, 6, 40, 4, 16, zeros=True)
    packed, scales, zeros = weights.arrays()
    eight = Weights(array, rng, 6, 40, 8, 0)
    x = array(np.zeros((3, 40)), np.float32)
    with pytest.raises(TypeError, match="got float64"):
        forward(x.astype(np.float64), packed, scales, group_size=16)
    with pytest.raises(TypeError, match=r"int8, or .* uint8 for 4 bits, got int16\(6, 20\)"):
        forward(x, packed.astype(np.int16), scales, group_size=16)
    with pytest.raises(ValueError, match="power of two of at least 16, or 0 for the row, got 24"):
        forward(x, packed, scales, group_size=24)
    with pytest.raises(ValueError, match=r"20 in memory, got \(3, 40\) and \(6, 19\)"):
        forward(x, packed[:, 1:], scales, group_size=16)
    with pytest.raises(ValueError, match=r"scales of the shape \(6, 2\), got \(6, 3\)"):
        forward(x, packed, scales, group_size=32)
    with pytest.raises(ValueError, match=r"as uint8\(6, 3\), got int8\(6, 3\) with uint8"):
        forward(x, packed, scales, zeros.astype(np.int8), group_size=16)
    with pytest.raises(ValueError, match="zero points with 4 bits only"):
        forward(x, eight.packed, eight.scales, zeros[:, :1])
    with pytest.raises(ValueError, match=r"a bias \(6,\), got \(3,\)"):
        forward(x, packed, scales, bias=x[:, 0], group_size=16)
    with pytest.raises(ValueError, match="'exact'"):
        forward(x, packed, scales, group_size=16, precision="exact")
    _, saved = forward(x, packed, scales, group_size=16)
    with pytest.raises(ValueError, match=r"gradient of the shape \(3, 6\), got \(3, 5\)"):
        backward(x[:, :5], *saved, group_size=16)
