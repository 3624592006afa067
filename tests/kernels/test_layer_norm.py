"""The layer norm and RMS norm kernels against float64, on both sides of every branch."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from tinygrad_llm import Tensor, ops
from tinygrad_llm.kernels import layer_norm
from tinygrad_llm.kernels import layout as layouts

# Tiles that hold whole rows of up to 32 columns, and tiles that walk along them; the grids have
# several programs, the last tile is not full, and strips have several tiles.
WHOLE = {"ROWS": 2, "BLOCK": 32, "num_warps": 1}
BLOCKS = {"ROWS": 2, "BLOCK": 16, "num_warps": 1}
CONFIGS = pytest.mark.parametrize("config", [WHOLE, BLOCKS], ids=["whole rows", "blocks"])
RMS = pytest.mark.parametrize("rms", [False, True], ids=["layer norm", "rms norm"])


def strips(config, n=4):
    return None if config is None else {**config, "STRIPS": n}


def normed(s, eps=1e-5, rms=False) -> tuple[np.ndarray, np.ndarray]:
    """(x̂, ρ) in float64."""
    d = s if rms else s - s.mean(axis=-1, keepdims=True)
    with np.errstate(all="ignore"):
        rstd = 1 / np.sqrt((d * d).mean(axis=-1, keepdims=True) + eps)
        return d * rstd, rstd


def gradients(g, s, weight, g_sum=None, eps=1e-5, rms=False) -> tuple[np.ndarray, ...]:
    """(ds, dw, db) in float64."""
    xhat, rstd = normed(s, eps, rms)
    gw = g if weight is None else g * weight
    ds = gw - xhat * (gw * xhat).mean(axis=-1, keepdims=True)
    ds = rstd * (ds if rms else ds - gw.mean(axis=-1, keepdims=True))
    over = tuple(range(s.ndim - 1))
    return ds if g_sum is None else ds + g_sum, (g * xhat).sum(axis=over), g.sum(axis=over)


def check(
    x, g, config, close, wide, weight=None, bias=None, residual=None, g_sum=None, times=1, **options
) -> None:
    out, saved = layer_norm.forward(x, weight, bias, residual, config=config, **options)
    y, s = out if residual is not None else (out, x)
    if residual is not None:
        np.testing.assert_array_equal(wide(s), wide(x + residual))  # rounded as the add alone would
        assert (s.dtype, s.flags.c_contiguous) == (x.dtype, True)
    assert (y.dtype, y.flags.c_contiguous) == (x.dtype, True)
    expected, _ = normed(wide(s), **options)
    expected = expected if weight is None else expected * wide(weight)
    close(y, expected if bias is None else expected + wide(bias), times=times)
    got = layer_norm.backward(
        g if residual is None else (g, g_sum), *saved, config=strips(config), **options
    )
    w = None if weight is None else wide(weight)
    g_sum = None if g_sum is None else wide(g_sum)
    want = gradients(wide(g), wide(s), w, g_sum, **options)
    assert (got[0].dtype, got[0].flags.c_contiguous) == (x.dtype, True)
    close(got[0], want[0], times=2 * times)
    rows = max(1, x.size // x.shape[-1])
    for parameter, actual, reference in zip((weight, bias), got[1:], want[1:], strict=True):
        if parameter is None:
            assert actual is None
        else:
            assert actual.dtype == parameter.dtype
            close(actual, reference, times=2 * times * math.sqrt(rows))


@CONFIGS
@RMS
def test_the_formula_and_its_gradient(config, rms, dtype, rng, array, close, wide) -> None:
    x, g, residual, g_sum = (array(rng.normal(size=(3, 3, 29)), dtype) for _ in range(4))
    weight, bias = (array(rng.normal(size=29), dtype) for _ in range(2))
    check(x, g, config, close, wide, weight, bias, rms=rms, eps=0.1)
    check(x, g, config, close, wide, weight, bias, residual, g_sum, rms=rms)


@CONFIGS
@RMS
def test_what_is_absent(config, rms, rng, array, close, wide) -> None:
    x, g, residual, g_sum = (array(rng.normal(size=(2, 21)), np.float32) for _ in range(4))
    weight, bias = (array(rng.normal(size=21), np.float32) for _ in range(2))
    for w, b in itertools.product((None, weight), (None, bias)):
        check(x, g, config, close, wide, w, b, rms=rms)
    check(x, g, config, close, wide, weight, None, residual, None, rms=rms)
    check(x, g, config, close, wide, None, None, residual, g_sum, rms=rms)


@RMS
@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 31, 32, 33, 67])
def test_sizes_around_a_tile(columns, rms, rng, array, close, wide) -> None:
    """BLOCK holds the row, holds it exactly, does not; a last block is full or has one column."""
    x, g = (array(rng.normal(size=(5, columns)), np.float32) for _ in range(2))
    weight, bias = (array(rng.normal(size=columns), np.float32) for _ in range(2))
    for config in (WHOLE, BLOCKS):
        # Of two columns x̂ is ±1 but for ε: the gradient is a small difference of large numbers.
        check(x, g, config, close, wide, weight, bias, rms=rms, times=20 if columns == 2 else 2)


def test_the_chosen_configuration_serves_any_shape(rng, array, close, wide) -> None:
    for shape in [(3,), (1, 1), (2, 3, 2, 3, 5), (3, 5000), (700, 3)]:
        x, g = (array(rng.normal(size=shape), np.float32) for _ in range(2))
        weight, bias = (array(rng.normal(size=shape[-1]), np.float32) for _ in range(2))
        check(x, g, None, close, wide, weight, bias, times=8)


@pytest.mark.parametrize("columns", [1, 40, 1024, 8192, 8193, 16384, 16385, 100_000])
def test_the_configurations_for_a_gpu(columns, monkeypatch) -> None:
    """Tiles of powers of two with 1 to 32 warps, whole rows only where registers hold them."""
    monkeypatch.setattr(layer_norm, "INTERPRETED", False)
    for candidates, most in (
        (layer_norm._forward_candidates.__wrapped__(4096, columns), 16384),
        (layer_norm._backward_candidates.__wrapped__(4096, columns), 8192),
    ):
        assert len(candidates) >= 2
        for c in candidates:
            assert all((n & (n - 1)) == 0 for n in (c["ROWS"], c["BLOCK"], c["num_warps"]))
            assert c["num_warps"] <= 32
            assert c["ROWS"] * c["BLOCK"] <= most
            assert c["BLOCK"] >= columns or columns > 4096


@CONFIGS
def test_any_strides(config, layout, rng, array, close, wide) -> None:
    shape = (4, 3, 20)
    x, g, residual, g_sum = (layout(array(rng.normal(size=shape), np.float32)) for _ in range(4))
    weight, bias = layout(array(rng.normal(size=(2, 20)), np.float32))
    check(x, g, config, close, wide, weight, bias, residual, g_sum, times=4)


def test_leading_axes_that_cannot_be_merged_are_copied(rng, array, close, wide) -> None:
    big = array(rng.normal(size=(3, 4, 3, 4, 3, 10)), np.float32)
    x, g = big[::2, ::2, ::2, ::2, ::2], big[1:, 1:3, 1:, 2:, 1:]
    assert layouts.merge_axes(x.shape, layouts.strides(x), at_most=4) is None
    check(x, g, WHOLE, close, wide, big[0, 0, 0, 0, 0], g[0, 0, 0, 0, 0], times=2)


def test_parameters_keep_their_dtype(array, rng, close, wide) -> None:
    """Half-precision activations with float32 weights: dw is added up and given in float32."""
    x, g = (array(rng.normal(size=(9, 20)), t) for t in (np.float16, np.float32))
    weight, bias = (array(rng.normal(size=20), np.float32) for _ in range(2))
    y, saved = layer_norm.forward(x, weight, bias, config=WHOLE)
    ds, dw, db = layer_norm.backward(g, *saved, config=strips(WHOLE))
    assert (y.dtype, ds.dtype, dw.dtype, db.dtype) == ("f2", "f2", "f4", "f4")
    _, want_dw, want_db = gradients(wide(g), wide(x), wide(weight))
    close(dw, want_dw, times=5)
    close(db, want_db, times=5)


@CONFIGS
@pytest.mark.parametrize(("mean", "std"), [(1e4, 1e-2), (-3e5, 1.0), (1e6, 0.2), (1e-3, 1e-5)])
def test_a_large_mean_costs_no_digits(config, mean, std, rng, array, close, wide) -> None:
    """Where E[x²] − μ² has none left, and where μ itself is no float32 number."""
    x = array(mean + std * rng.normal(size=(4, 32 if config is WHOLE else 75)), np.float32)
    g = array(rng.normal(size=x.shape), np.float32)
    y, saved = layer_norm.forward(x, eps=1e-12, config=config)
    expected, rstd = normed(wide(x), 1e-12)
    close(y, expected, times=3)
    ds, _, _ = layer_norm.backward(g, *saved, config=strips(config))
    want, _, _ = gradients(wide(g), wide(x), None, eps=1e-12)
    np.testing.assert_allclose(wide(ds) / rstd, want / rstd, rtol=1e-5, atol=1e-5)


def test_blocks_that_are_unlike_each_other(array, close, wide) -> None:
    x = np.zeros((3, 75), np.float32)
    x[0, :16], x[1, 70:], x[2] = 1e4, -1e4, np.arange(75) * 1e3 + 1e6
    y, _ = layer_norm.forward(array(x), config=BLOCKS)
    close(y, normed(x.astype(np.float64))[0], times=3)


@CONFIGS
@RMS
def test_constant_rows_and_rows_that_overflow_a_half(config, rms, array, close, wide) -> None:
    x = np.full((3, 20), 0.1, np.float32)
    x[1] = 0
    y, saved = layer_norm.forward(array(x), rms=rms, config=config)
    close(y, normed(x.astype(np.float64), rms=rms)[0])
    ds, _, _ = layer_norm.backward(y, *saved, rms=rms, config=strips(config))
    assert np.isfinite(wide(ds)).all()
    large = array(np.linspace(-6e4, 6e4, 40).reshape(2, 20), np.float16)  # squares: 3.6e9
    y, _ = layer_norm.forward(large, rms=rms, config=config)
    close(y, normed(wide(large), rms=rms)[0])


@CONFIGS
@RMS
def test_infinities_and_nan_stay_in_their_row(config, rms, array, wide) -> None:
    x = np.arange(60, dtype=np.float32).reshape(3, 20)
    x[0, 3], x[2, 18] = np.nan, np.inf
    y, saved = layer_norm.forward(array(x), rms=rms, config=config)
    op = ops.rms_norm if rms else ops.layer_norm
    with np.errstate(all="ignore"):
        want = op(Tensor(x), eps=1e-5).numpy()
    np.testing.assert_array_equal(np.isnan(wide(y))[:2], np.isnan(want)[:2])
    assert np.isnan(wide(y)).any(axis=1).tolist() == [True, False, True]
    assert np.isnan(wide(y)[0]).all()
    assert np.isnan(wide(y)[2, 18])
    ds, _, _ = layer_norm.backward(y, *saved, rms=rms, config=strips(config))
    assert np.isnan(wide(ds)).any(axis=1).tolist() == [True, False, True]
    assert np.isnan(wide(ds)[0]).all()


@RMS
def test_it_is_the_op(rms, rng, array, wide) -> None:
    x, weight, bias, g = (
        Tensor(rng.normal(size=s).astype(np.float32), requires_grad=True)
        for s in ((6, 20), (20,), (20,), (6, 20))
    )
    y = ops.rms_norm(x, weight, eps=1e-5) if rms else ops.layer_norm(x, weight, bias)
    y.backward(g)
    arrays = [array(t.numpy()) for t in (x, weight, bias)[: 2 if rms else 3]]
    ours, saved = layer_norm.forward(*arrays, rms=rms)
    np.testing.assert_allclose(wide(ours), y.numpy(), rtol=2e-6, atol=2e-6)
    got = layer_norm.backward(array(g.numpy()), *saved, rms=rms)
    for actual, t in zip(got, (x, weight, bias), strict=True):
        if actual is not None:
            assert t.grad is not None
            np.testing.assert_allclose(wide(actual), t.grad.numpy(), rtol=1e-5, atol=1e-5)


@CONFIGS
def test_the_sum_is_normalised_as_it_is_rounded(config, dtype, rng, array, wide) -> None:
    """norm(x, residual) is bit for bit norm(x + residual), gradients included."""
    x, residual, g = (array(rng.normal(size=(5, 24)), dtype) for _ in range(3))
    weight = array(rng.normal(size=24), dtype)
    (y, s), saved = layer_norm.forward(x, weight, None, residual, config=config)
    alone, saved_alone = layer_norm.forward(s, weight, config=config)
    np.testing.assert_array_equal(wide(y), wide(alone))
    fused = layer_norm.backward((g, None), *saved, config=strips(config))
    plain = layer_norm.backward(g, *saved_alone, config=strips(config))
    for a, b in zip(fused[:2], plain[:2], strict=True):
        np.testing.assert_array_equal(wide(a), wide(b))


@CONFIGS
@pytest.mark.parametrize("n", [1, 3, 100])
def test_strips_share_the_rows(config, n, rng, array, close, wide) -> None:
    """One strip for all rows, strips of unequal lengths, more strips than tiles."""
    x, g = (array(rng.normal(size=(9, 20)), np.float32) for _ in range(2))
    weight, bias = (array(rng.normal(size=20), np.float32) for _ in range(2))
    _, saved = layer_norm.forward(x, weight, bias, config=config)
    got = layer_norm.backward(g, *saved, config=strips(config, n))
    again = layer_norm.backward(g, *saved, config=strips(config, n))
    for actual, twice, want in zip(
        got, again, gradients(wide(g), wide(x), wide(weight)), strict=True
    ):
        close(actual, want, times=4)
        np.testing.assert_array_equal(wide(actual), wide(twice))


@CONFIGS
@RMS
def test_offsets_of_64_bits(config, rms, rng, array, close, wide, monkeypatch) -> None:
    x, g = (array(rng.normal(size=(5, 20)), np.float32).T.copy().T for _ in range(2))
    weight = array(rng.normal(size=20), np.float32)
    monkeypatch.setattr(layouts, "_INT32", 3)
    assert layouts.needs_int64(x)
    check(x, g, config, close, wide, weight, rms=rms, times=2)


def test_rows_whose_elements_lie_four_gigabytes_apart(wide) -> None:
    if not layer_norm.INTERPRETED:
        pytest.skip("the array is in the CPU's memory")
    try:
        memory = np.empty(2**31 + 2**20, np.float16)  # of which four pages are touched
    except MemoryError:
        pytest.skip("no 4 GiB of address space")
    x = np.lib.stride_tricks.as_strided(memory, (2, 3), (2, 2**31))
    x[...] = [[1, 2, 4], [6, 5, 4]]
    assert layouts.needs_int64(x)
    for config in (WHOLE, {**BLOCKS, "BLOCK": 2}):
        y, saved = layer_norm.forward(x, config=config)
        np.testing.assert_allclose(wide(y), normed(wide(x))[0], rtol=1e-3)
        ds, _, _ = layer_norm.backward(x, *saved, config=strips(config))
        np.testing.assert_allclose(wide(ds), gradients(wide(x), wide(x), None)[0], atol=1e-3)


@RMS
def test_empty_arrays(rms, array, wide) -> None:
    for shape in [(0, 3), (3, 0), (2, 0, 4)]:
        x, weight = array(np.zeros(shape), np.float32), array(np.ones(shape[-1]), np.float32)
        (y, s), saved = layer_norm.forward(x, weight, weight, x, rms=rms)
        ds, dw, db = layer_norm.backward((x, x), *saved, rms=rms)
        assert y.shape == s.shape == ds.shape == shape
        assert dw.shape == db.shape == shape[-1:]
        assert not wide(dw).any()
        assert not wide(db).any()


def test_what_is_refused(array) -> None:
    x, w = array(np.zeros((2, 3)), np.float32), array(np.zeros(2), np.float32)
    with pytest.raises(TypeError, match="layer_norm takes float32, float16 or bfloat16 arrays"):
        layer_norm.forward(x.astype(np.float64))
    with pytest.raises(TypeError, match="got int64"):
        layer_norm.forward(x, w.astype(np.int64))
    with pytest.raises(
        ValueError, match=r"rms_norm needs a weight of the shape \(3,\), got \(2,\)"
    ):
        layer_norm.forward(x, w, rms=True)
    with pytest.raises(ValueError, match=r"bias of the shape \(3,\), got \(2, 3\)"):
        layer_norm.forward(x, None, x)
    with pytest.raises(ValueError, match=r"residual of x's shape and dtype.*got \(3,\)"):
        layer_norm.forward(x, residual=x[0])
    with pytest.raises(ValueError, match=r"\(2, 3\) float32, got \(2, 3\) float16"):
        layer_norm.forward(x, residual=x.astype(np.float16))
    with pytest.raises(ValueError, match=r"\(…, C\)"):
        layer_norm.forward(x[0, 0].reshape(()))
    _, saved = layer_norm.forward(x)
    with pytest.raises(ValueError, match=r"gradient of the shape \(2, 3\), got \(3,\)"):
        layer_norm.backward(x[0], *saved)
    with pytest.raises(ValueError, match=r"gradient of the shape \(2, 3\), got \(3,\)"):
        layer_norm.backward((x, x[0]), *saved)
    with pytest.raises(TypeError, match="got float64"):
        layer_norm.backward(x.astype(np.float64), *saved)
