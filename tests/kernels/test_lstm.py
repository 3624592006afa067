"""The LSTM kernels against float64, all steps in one launch and a launch a step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tinygrad_llm.kernels import lstm

LAYER = {"LAYER": True, "ROWS": 16, "BLOCK": 16, "INNER": 16, "num_warps": 1, "num_stages": 1}
STEP = {"LAYER": False, "ROWS": 2, "BLOCK": 4, "num_warps": 1}
NAMES = ("x", "h0", "c0", "w", "u", "b", "b2")


def made(array, rng, t=3, b=4, i=3, h=5, dtype: Any = np.float32, bias=True) -> list[Any]:
    shapes = [(t, b, i), (b, h), (b, h), (4 * h, i), (4 * h, h), (4 * h,), (4 * h,)]
    return [array(rng.normal(size=s) * 0.7, dtype) for s in shapes[: 7 if bias else 5]]


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-z))


def reference(inputs: list[np.ndarray], g: np.ndarray, lengths: Any, reverse: bool) -> list[Any]:
    """y and the gradients of all inputs, sequence by sequence and step by step."""
    x, h0, c0, w, u, *biases = inputs
    time, batch, _ = x.shape
    y = np.zeros(g.shape)
    found = [np.zeros(a.shape) for a in inputs]
    for row in range(batch):
        n = time if lengths is None else int(lengths[row])
        steps = range(n)[::-1] if reverse else range(n)
        h, c, tape = h0[row], c0[row], []
        for t in steps:
            z = w @ x[t, row] + u @ h + (biases[0] + biases[1] if biases else 0.0)
            zi, zf, zg, zo = np.split(z, 4)
            i, f, v, o = sigmoid(zi), sigmoid(zf), np.tanh(zg), sigmoid(zo)
            before, c_before = h, c
            c = f * c + i * v
            h = o * np.tanh(c)
            tape.append((t, i, f, v, o, c, before, c_before))
            y[t, row] = h
        y[time, row], y[time + 1, row] = h, c
        dh, dc = g[time, row], g[time + 1, row]
        for t, i, f, v, o, c, before, c_before in reversed(tape):
            dh = dh + g[t, row]
            th = np.tanh(c)
            dc = dc + dh * o * (1 - th**2)
            dz = [dc * v * i * (1 - i), dc * c_before * f * (1 - f)]
            dz = np.concatenate([*dz, dc * i * (1 - v**2), dh * th * o * (1 - o)])
            found[0][t, row] = dz @ w
            found[3] += np.outer(dz, x[t, row])
            found[4] += np.outer(dz, before)
            for bias in found[5:]:
                bias += dz
            dh, dc = dz @ u, dc * f
        found[1][row], found[2][row] = dh, dc
    return [y, *found]


def check(inputs, array, rng, close, wide, config, lengths=None, reverse=False, times=2.0) -> None:
    """Forward and backward; a gradient's error is measured against its largest element."""
    time, (batch, hidden) = len(inputs[0]), inputs[1].shape
    counts = None if lengths is None else np.asarray(lengths, np.int64)
    options = {"lengths": counts, "reverse": reverse, "config": config}
    g = array(rng.normal(size=(time + 2, batch, hidden)), inputs[0].dtype)
    expected = reference([wide(a) for a in inputs], wide(g), counts, reverse)
    y, saved = lstm.forward(*inputs, **options)
    gradients = lstm.backward(g, *saved, **options)
    assert len(gradients) == 7
    assert all(a is None for a in gradients[len(inputs) :])
    for got, wanted, like in zip((y, *gradients), expected, (y, *inputs), strict=False):
        assert got is not None
        assert (got.dtype, got.shape) == (like.dtype, like.shape)
        scale = max(1.0, np.abs(wanted).max()) if wanted.size else 1.0
        close(got / got.dtype.type(scale), wanted / scale, times)


@pytest.fixture(params=["layer", "step"])
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return LAYER if request.param == "layer" else STEP


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [None, [2, 0, 3, 1]], ids=["all", "lengths"])
def test_the_formula_and_its_gradient(
    config, lengths, reverse, dtype, rng, array, close, wide
) -> None:
    inputs = made(array, rng, dtype=dtype)
    check(inputs, array, rng, close, wide, config, lengths, reverse)


def test_any_strides(config, layout, rng, array, close, wide) -> None:
    inputs = [layout(a) for a in made(array, rng)]
    check(inputs, array, rng, close, wide, config, [3, 1, 2, 3])


@pytest.mark.parametrize("hidden", [1, 15, 16, 17, 33])
@pytest.mark.parametrize("batch", [1, 16, 17])
def test_sizes_around_a_tile(batch, hidden, rng, array, close, wide) -> None:
    inputs = made(array, rng, 2, batch, 2, hidden)
    check(inputs, array, rng, close, wide, LAYER, rng.integers(0, 3, size=batch))


@pytest.mark.parametrize("hidden", [1, 4, 5, 9])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_sizes_around_the_tile_of_a_step(batch, hidden, rng, array, close, wide) -> None:
    inputs = made(array, rng, 2, batch, 3, hidden)
    check(inputs, array, rng, close, wide, STEP, rng.integers(0, 3, size=batch), True)


def test_without_biases(config, rng, array, close, wide) -> None:
    check(made(array, rng, bias=False), array, rng, close, wide, config)


@pytest.mark.parametrize("t", [0, 1, 7])
def test_any_number_of_steps(config, t, rng, array, close, wide) -> None:
    check(made(array, rng, t, 2), array, rng, close, wide, config)


@pytest.mark.parametrize("lengths", [[0, 0, 0, 0], [3, 3, 3, 3], [1, 1, 1, 1]])
def test_equal_lengths(config, lengths, rng, array, close, wide) -> None:
    for reverse in (False, True):
        check(made(array, rng), array, rng, close, wide, config, lengths, reverse)


def test_nothing_to_do(rng, array) -> None:
    for t, b, i, h in ((3, 0, 2, 4), (3, 2, 2, 0), (0, 2, 2, 4), (2, 3, 0, 4)):
        y, saved = lstm.forward(*made(array, rng, t, b, i, h))
        assert y.shape == (t + 2, b, h)
        gradients = lstm.backward(y, *saved)
        assert [a.shape for a in gradients if a is not None] == [
            (t, b, i), (b, h), (b, h), (4 * h, i), (4 * h, h), (4 * h,), (4 * h,)
        ]  # fmt: skip


def test_padding_gives_zeros_and_is_never_read(config, rng, array, wide) -> None:
    inputs = made(array, rng)
    lengths = np.array([2, 0, 3, 1])
    padding = np.arange(3)[:, None] >= lengths
    inputs[0] = array(np.where(padding[..., None], np.nan, wide(inputs[0])), np.float32)
    y, saved = lstm.forward(*inputs, lengths=lengths, config=config)
    assert (wide(y)[:3][padding] == 0).all()
    gradients = lstm.backward(y, *saved, lengths=lengths, config=config)
    assert all(np.isfinite(wide(a)).all() for a in (y, *gradients) if a is not None)
    assert (wide(gradients[0])[padding] == 0).all()


def test_saturated_gates_do_not_overflow(config, rng, array) -> None:
    inputs = [a * np.float32(1e3) for a in made(array, rng)]
    y, saved = lstm.forward(*inputs, config=config)
    assert np.isfinite(y).all()
    assert all(
        np.isfinite(a).all() for a in lstm.backward(y, *saved, config=config) if a is not None
    )


def test_the_state_is_float32_whatever_the_arrays_hold(config, array, wide) -> None:
    """c grows by steps that half precision would lose: 0.01 at a time, from 8."""
    t = 40
    b = np.array([20.0, 20.0, np.arctanh(0.01), 20.0])  # i = f = o = 1
    args = [np.zeros((t, 1, 1)), np.zeros((1, 1)), np.full((1, 1), 8.0)]
    args += [np.zeros((4, 1)), np.zeros((4, 1)), b, np.zeros(4)]
    y, _ = lstm.forward(*[array(a, np.float16) for a in args], config=config)
    assert float(wide(y)[-1, 0, 0]) == pytest.approx(8.0 + 0.01 * t, abs=0.01)


def test_both_ways_and_again_give_the_same(rng, array, wide) -> None:
    inputs = made(array, rng, 4, 5, 3, 20)
    lengths = np.array([4, 2, 0, 1, 3])
    found = []
    for config in (LAYER, STEP, None, LAYER):
        y, saved = lstm.forward(*inputs, lengths=lengths, config=config)
        found.append([y, *lstm.backward(y, *saved, lengths=lengths, config=config)])
    for first, *others in zip(*found, strict=True):
        np.testing.assert_array_equal(wide(first), wide(others[-1]))
        for other in others:
            np.testing.assert_allclose(wide(other), wide(first), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden", [1, 20, 100, 128, 129, 512, 513, 1024])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_configurations_for_a_gpu(hidden, itemsize, monkeypatch) -> None:
    monkeypatch.setattr(lstm, "INTERPRETED", False)
    found = lstm._candidates.__wrapped__(64, hidden, itemsize)
    assert found[0]["LAYER"] == (hidden <= 128)
    assert any(c["LAYER"] for c in found) == (hidden <= 512)
    assert sum(not c["LAYER"] for c in found) == 1
    for c in found:
        sizes = [n for name, n in c.items() if name not in ("LAYER", "num_stages")]
        assert all((n & (n - 1)) == 0 for n in sizes)
        if c["LAYER"]:
            assert min(c["ROWS"], c["BLOCK"], c["INNER"]) >= 16


def test_what_does_not_fit_is_refused(rng, array) -> None:
    x, h0, c0, w, u, b, b2 = made(array, rng)
    with pytest.raises(ValueError, match=r"lstm takes x \(T, B, I\)"):
        lstm.forward(x, h0[:2], c0, w, u, b, b2)
    with pytest.raises(ValueError, match="or none, got"):
        lstm.forward(x, h0, c0, w, u, b)
    with pytest.raises(TypeError, match="one dtype, got float32, float16"):
        lstm.forward(x, h0.astype(np.float16), c0, w, u)
    with pytest.raises(TypeError, match="float64"):
        lstm.forward(x.astype(np.float64), h0, c0, w, u)
    y, saved = lstm.forward(x, h0, c0, w, u, b, b2)
    with pytest.raises(ValueError, match=r"a gradient of the shape \(5, 4, 5\), got \(4, 4, 5\)"):
        lstm.backward(y[:4], *saved)
