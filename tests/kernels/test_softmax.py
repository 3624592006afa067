"""The softmax kernels against float64, on both sides of every branch."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tinygrad_llm import Tensor, ops
from tinygrad_llm.kernels import layout as layouts
from tinygrad_llm.kernels import softmax
from tinygrad_llm.kernels.language import INTERPRETED

INF = math.inf

# Tiles that hold whole rows of up to 32 columns, and tiles that walk along them; the grids have
# several programs, the last of which is not full.
WHOLE = {"ROWS": 4, "BLOCK": 32, "num_warps": 1}
ONLINE = {"ROWS": 2, "BLOCK": 16, "num_warps": 1}
CONFIGS = pytest.mark.parametrize("config", [WHOLE, ONLINE], ids=["whole rows", "online"])


def hidden_by_causality(shape) -> np.ndarray:
    queries, columns = shape[-2:]
    later = np.arange(columns) > np.arange(queries)[:, None] + columns - queries
    return np.broadcast_to(later, shape)


def reference(x, mask=None, scale=1.0, causal=False, log=False) -> np.ndarray:
    """The formula in float64."""
    with np.errstate(all="ignore"):
        z = scale * x + (0 if mask is None else mask)
        if causal:
            z = np.where(hidden_by_causality(x.shape), -INF, z)
        m = z.max(axis=-1, keepdims=True)
        z = z - np.where(m == -INF, 0, m)
        s = np.exp(z).sum(axis=-1, keepdims=True)
        s[s == 0] = 1
        return z - np.log(s) if log else np.exp(z) / s


def gradient(g, y, scale=1.0, causal=False, log=False) -> np.ndarray:
    """The formula in float64, for the y that the forward gave."""
    if log:
        dx = scale * (g - np.exp(y) * g.sum(axis=-1, keepdims=True))
    else:
        dx = scale * y * (g - (g * y).sum(axis=-1, keepdims=True))
    return np.where(hidden_by_causality(y.shape), 0, dx) if causal else dx


def check(x, g, config, close, wide, mask=None, **options) -> None:
    y, saved = softmax.forward(x, mask, config=config, **options)
    assert y.dtype == x.dtype
    assert y.flags.c_contiguous
    close(y, reference(wide(x), None if mask is None else wide(mask), **options))
    dx = softmax.backward(g, *saved, config=config, **options)
    assert dx.dtype == x.dtype
    assert dx.flags.c_contiguous
    close(dx, gradient(wide(g), wide(y), **options), times=4)


OPTIONS = {
    "softmax": {},
    "log": {"log": True},
    "causal, scaled": {"causal": True, "scale": 0.3},
    "causal log": {"causal": True, "log": True, "scale": -2.0},
}


@CONFIGS
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_formula_and_its_gradient(config, options, dtype, rng, array, close, wide) -> None:
    x, g = (array(rng.normal(size=(2, 5, 29)) * s, dtype) for s in (3, 1))
    check(x, g, config, close, wide, **options)


@pytest.mark.parametrize("columns", [1, 2, 7, 15, 16, 17, 31, 32, 33, 48, 67])
@pytest.mark.parametrize("rows", [1, 5])
def test_sizes_around_a_tile(rows, columns, rng, array, close, wide) -> None:
    """BLOCK holds the row, holds it exactly, does not; a last block is full or has one column."""
    x, g = (array(rng.normal(size=(rows, columns)), np.float32) for _ in range(2))
    for config in (WHOLE, ONLINE):
        check(x, g, config, close, wide)


def test_the_chosen_configuration_serves_any_shape(rng, array, close, wide) -> None:
    for shape in [(3,), (1, 1), (2, 3, 2, 3, 5), (3, 5000), (700, 3)]:
        x, g = (array(rng.normal(size=shape), np.float32) for _ in range(2))
        check(x, g, None, close, wide, scale=2)


@CONFIGS
def test_any_strides(config, layout, dtype, rng, array, close, wide) -> None:
    x, g = (layout(array(rng.normal(size=(4, 3, 20)), dtype)) for _ in range(2))
    check(x, g, config, close, wide, log=True)


def test_leading_axes_that_cannot_be_merged_are_copied(rng, array, close, wide) -> None:
    big = array(rng.normal(size=(3, 4, 3, 4, 3, 10)), np.float32)
    x, g = big[::2, ::2, ::2, ::2, ::2], big[1:, 1:3, 1:, 2:, 1:]
    assert layouts.merge_axes(x.shape, layouts.strides(x), at_most=4) is None
    check(x, g, WHOLE, close, wide)


def test_views_of_three_axes_are_not_copied(rng, array, monkeypatch) -> None:
    x = array(rng.normal(size=(2, 3, 4, 5)), np.float32).swapaxes(1, 2)
    (seen,), sizes, _ = layouts.as_rows(x)
    assert seen is x
    assert sizes == (4, 3)


@CONFIGS
@pytest.mark.parametrize("shape", [(4, 6, 20), (6, 20), (20,), (4, 1, 20), (1, 6, 1), (1,)])
def test_masks_broadcast(config, shape, rng, array, close, wide) -> None:
    x, g = (array(rng.normal(size=(4, 6, 20)), np.float32) for _ in range(2))
    mask = array(rng.normal(size=shape), np.float16)
    check(x, g, config, close, wide, mask=mask, causal=True)


@CONFIGS
@pytest.mark.parametrize("log", [False, True])
def test_rows_hidden_everywhere(config, log, dtype, rng, array, close, wide) -> None:
    """By x itself, by a mask, by causality with more queries than keys, and only in some blocks."""
    x = rng.normal(size=(7, 24))
    x[0], x[1, :17], x[2, 3:] = -INF, -INF, -INF
    mask = np.zeros((7, 24))
    mask[4], mask[5, 2:21] = -INF, -INF
    x, mask = array(x, dtype), array(mask, dtype)
    y, _ = softmax.forward(x, mask, log=log, config=config)
    close(y, reference(wide(x), wide(mask), log=log))
    for row in (0, 4):
        np.testing.assert_array_equal(wide(y)[row], -INF if log else 0)

    x, g = (array(rng.normal(size=(6, 3)), dtype) for _ in range(2))
    check(x, g, config, close, wide, causal=True, log=log)
    y, saved = softmax.forward(x, causal=True, config=config, log=log)
    dx = softmax.backward(g, *saved, causal=True, config=config, log=log)
    np.testing.assert_array_equal(wide(y)[:3], -INF if log else 0)
    np.testing.assert_array_equal(wide(dx)[:3], 0)


@CONFIGS
@pytest.mark.parametrize("log", [False, True])
def test_infinities_and_nan_are_those_of_the_op(config, log, array, wide) -> None:
    x = np.zeros((6, 20), np.float32)
    x[0, 3], x[1, 18], x[2, [2, 17]] = INF, INF, INF
    x[3, 5], x[4, 19], x[5] = np.nan, np.nan, np.nan
    op = ops.log_softmax if log else ops.softmax
    with np.errstate(all="ignore"):
        want = op(Tensor(x)).numpy()
    y, _ = softmax.forward(array(x), log=log, config=config)
    np.testing.assert_array_equal(wide(y), want)


@CONFIGS
def test_extreme_scores_lose_nothing(config, array, wide) -> None:
    """Maxima that rise and fall from block to block, up to where float32 ends."""
    x = np.full((3, 40), -1e4, np.float32)
    x[0, 39], x[1, 0], x[2, [1, 20]] = 1e4, 3e38, 3e38
    y, _ = softmax.forward(array(x), config=config)
    assert wide(y)[0, 39] == wide(y)[1, 0] == 1
    assert wide(y)[2, [1, 20]].tolist() == [0.5, 0.5]
    assert wide(y).sum() == 3
    large = array(np.full((1, 40), 60000), np.float16)  # whose sum float16 does not hold
    np.testing.assert_allclose(wide(softmax.forward(large, config=config)[0]), 1 / 40, rtol=1e-3)


@CONFIGS
def test_offsets_of_64_bits(config, rng, array, close, wide, monkeypatch) -> None:
    """The wide kernels give the same; and they are chosen where a view spans 2³¹ elements."""
    x, g = (array(rng.normal(size=(5, 20)), np.float32).T.copy().T for _ in range(2))
    monkeypatch.setattr(layouts, "_INT32", 3)
    assert layouts.needs_int64(x)
    check(x, g, config, close, wide, causal=True)


@pytest.mark.skipif(not INTERPRETED, reason="the array is in the CPU's memory")
@pytest.mark.skipif(not INTERPRETED, reason="the array is in the CPU's memory")
@pytest.mark.parametrize("config", [WHOLE, {"ROWS": 2, "BLOCK": 2, "num_warps": 1}])
def test_elements_and_rows_that_lie_gigabytes_apart(config, wide) -> None:
    try:
        memory = np.empty(2**31 + 2, np.float16)  # of which a few pages are touched
    except MemoryError:
        pytest.skip("no 4 GiB of address space")
    x = np.lib.stride_tricks.as_strided(memory, (2, 3), (2, 2**31))
    x[...] = [[1, 2, 3], [6, 5, 4]]
    assert layouts.needs_int64(x)
    for view in (x, x.T):
        y, saved = softmax.forward(view, config=config)
        np.testing.assert_allclose(wide(y), reference(wide(view)), rtol=1e-3)
        dx = softmax.backward(view, *saved, config=config)
        np.testing.assert_allclose(wide(dx), gradient(wide(view), wide(y)), rtol=0.1, atol=1e-3)


def test_empty_arrays(array) -> None:
    for shape in [(0, 3), (3, 0), (2, 0, 4)]:
        x = array(np.zeros(shape), np.float32)
        y, saved = softmax.forward(x)
        assert y.shape == softmax.backward(x, *saved).shape == shape


def test_what_is_refused(array) -> None:
    x = array(np.zeros((2, 3)), np.float32)
    with pytest.raises(TypeError, match="float32, float16 or bfloat16 arrays, got float64"):
        softmax.forward(x.astype(np.float64))
    with pytest.raises(TypeError, match="got bool"):
        softmax.forward(x, x > 0)
    with pytest.raises(ValueError, match=r"broadcasts to \(2, 3\), got \(3, 3\)"):
        softmax.forward(x, array(np.zeros((3, 3)), np.float32))
    with pytest.raises(ValueError, match=r"gradient of the shape \(2, 3\), got \(3,\)"):
        softmax.backward(x[0], x)
    with pytest.raises(ValueError, match=r"\(…, C\)"):
        softmax.forward(x[0, 0].reshape(()))
    with pytest.raises(ValueError, match=r"\(…, T, C\)"):
        softmax.forward(x[0], causal=True)
