from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm import Tensor, ops


def turned(x, cos, sin, sign=1):
    """Hugging Face's formula: x cos + rotate_half(x) sin, with tables repeated for both halves."""
    half = x.shape[-1] // 2
    cos, sin = (np.concatenate((t, t), axis=-1) for t in (cos, sin))
    return x * cos + sign * np.concatenate((-x[..., half:], x[..., :half]), axis=-1) * sin


# Element 2i of neighbouring pairs is element i of halves, 2i + 1 is i + D/2.
def as_halves(x):
    return np.concatenate((x[..., ::2], x[..., 1::2]), axis=-1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", [0, 5])
@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8), (2, 2, 3, 8), (3, 2), (0, 3, 8), (2, 0, 8)])
def test_the_formula_and_its_gradient(shape, offset, interleaved, layout, dtype, rng, close):
    x = Tensor(layout(rng.normal(size=shape).astype(dtype)), requires_grad=True)
    g = layout(rng.normal(size=shape).astype(dtype))
    cos, sin = ops.rotary_tables(9, shape[-1], dtype=dtype)
    y = ops.rotary_embedding(x, cos, sin, offset, interleaved)
    assert y.dtype == dtype
    y.backward(Tensor(g))
    assert x.grad is not None
    arrange = as_halves if interleaved else np.asarray
    c, s = (t.numpy()[offset : offset + shape[-2]].astype(float) for t in (cos, sin))
    close(Tensor(arrange(y.numpy())), turned(arrange(x.numpy()), c, s), 3)
    close(Tensor(arrange(x.grad.numpy())), turned(arrange(g), c, s, -1), 3)


@given(st.integers(0, 90), st.integers(0, 90), st.booleans())
def test_products_depend_on_the_distance_only(t, s, interleaved):
    q, k = np.random.default_rng(0).normal(size=(2, 1, 8))
    cos, sin = ops.rotary_tables(100, 8, dtype="float64")

    def product(t: int, s: int) -> float:
        a = ops.rotary_embedding(q, cos, sin, t, interleaved)
        b = ops.rotary_embedding(k, cos, sin, s, interleaved)
        return float((a * b).sum().item())

    assert product(t, s) == pytest.approx(product(t + 9, s + 9), abs=1e-12)
    assert product(t, t) == pytest.approx(float((q * k).sum()), abs=1e-12)


def test_steps_of_a_generation_are_the_whole_sequence(rng):
    x = rng.normal(size=(2, 6, 8))
    cos, sin = ops.rotary_tables(6, 8)
    whole = ops.rotary_embedding(x, cos, sin).numpy()
    for t in range(6):
        step = ops.rotary_embedding(x[:, t : t + 1], cos, sin, offset=t).numpy()
        np.testing.assert_array_equal(step[:, 0], whole[:, t])


def test_each_text_may_have_positions_of_its_own(rng, close):
    x, positions = rng.normal(size=(2, 3, 4, 8)), np.array([[0, 1, 2, 3], [5, 5, 6, 0]])
    cos, sin = ops.rotary_tables(7, 8, dtype="float64")
    y = ops.rotary_embedding(x, cos[positions][:, None], sin[positions][:, None])
    for i in range(2):
        for t in range(4):
            at = positions[i, t]
            expected = ops.rotary_embedding(x[i, :, t : t + 1], cos, sin, offset=at)
            close(y[i, :, t : t + 1], expected.numpy())


def test_half_precision_is_turned_in_float32(half, rng):
    x = Tensor((rng.normal(size=(2, 5, 16)) * 10).astype(half), requires_grad=True)
    cos, sin = ops.rotary_tables(5, 16)
    y = ops.rotary_embedding(x, cos, sin)
    assert y.dtype == half
    expected = turned(x.numpy().astype(float), cos.numpy(), sin.numpy()).astype(half)
    np.testing.assert_allclose(y.numpy().astype(float), expected.astype(float), rtol=0.01)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == half


def test_double_precision_tables_do_not_widen_single(rng):
    x = rng.normal(size=(3, 4)).astype(np.float32)
    assert ops.rotary_embedding(x, *ops.rotary_tables(3, 4, dtype="float64")).dtype == np.float32
    assert ops.rotary_embedding(np.ones((3, 4), int), *ops.rotary_tables(3, 4)).dtype == np.float32


def test_what_does_not_fit_is_refused():
    x, (cos, sin) = np.zeros((2, 3, 6)), ops.rotary_tables(4, 6)
    with pytest.raises(ValueError, match=r"an even D, got \(2, 3, 5\)"):
        ops.rotary_embedding(x[..., :5], cos, sin)
    with pytest.raises(ValueError, match=r"an even D, got \(6,\)"):
        ops.rotary_embedding(x[0, 0], cos, sin)
    with pytest.raises(ValueError, match=r"cos and sin \(…, P, 3\), got \(4, 2\) and \(4, 2\)"):
        ops.rotary_embedding(x, cos[:, :2], sin[:, :2])
    with pytest.raises(ValueError, match=r"got \(4, 3\) and \(3, 3\)"):
        ops.rotary_embedding(x, cos, sin[:3])
    with pytest.raises(ValueError, match="positions 2 to 4, but the tables hold 0 to 3"):
        ops.rotary_embedding(x, cos, sin, offset=2)
    with pytest.raises(ValueError, match="positions -1 to 1"):
        ops.rotary_embedding(x, cos, sin, offset=-1)
    three = ops.stack([cos] * 3)
    with pytest.raises(ValueError, match=r"broadcast to x's, \(2,\), got \(3,\)"):
        ops.rotary_embedding(x, three, three)
    with pytest.raises(ValueError, match=r"broadcast to x's, \(2,\), got \(1, 1\)"):
        ops.rotary_embedding(x, cos[None, None], sin[None, None])


# --- tables ---------------------------------------------------------------------------------------


def test_the_tables_are_right_however_far_out():
    """One million positions on, where a float32 angle would be wrong in the second digit."""
    cos, sin = (t.numpy() for t in ops.rotary_tables(10**6 + 1, 8, base=500000.0))
    assert cos.shape == sin.shape == (10**6 + 1, 4)
    assert cos.dtype == sin.dtype == np.float32
    for i in range(4):
        angle = 10**6 * 500000.0 ** (-2 * i / 8)
        assert cos[-1, i] == pytest.approx(math.cos(angle), abs=1e-6)
        assert sin[-1, i] == pytest.approx(math.sin(angle), abs=1e-6)
    assert cos[0].tolist() == [1] * 4
    assert not sin[0].any()


SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 4096},
    "llama3": {
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


def frequencies(size: int, **scaling) -> np.ndarray:
    """θ(1), where no pair turns far."""
    cos, sin = ops.rotary_tables(2, size, scaling=scaling, dtype="float64")
    return np.arctan2(sin.numpy()[1], cos.numpy()[1])


@pytest.mark.parametrize("kind", SCALINGS)
def test_slow_pairs_are_slowed(kind):
    plain, found = (
        10000.0 ** (-np.arange(16) / 16),
        frequencies(32, rope_type=kind, **SCALINGS[kind]),
    )
    if kind in ("default", "dynamic"):  # the latter waits until the context is longer
        np.testing.assert_allclose(found, plain, rtol=1e-12)
    elif kind == "linear":
        np.testing.assert_allclose(found, plain / 4, rtol=1e-12)
    else:
        factor = SCALINGS[kind]["factor"]
        np.testing.assert_allclose(found[0], plain[0], rtol=1e-12)
        np.testing.assert_allclose(found[-1], plain[-1] / factor, rtol=1e-12)
        assert (np.diff(plain / found) >= -1e-12).all()


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_stretched_contexts_are_those_of_transformers(kind):
    """Its frequencies for heads of 32, base 10000 and 200 positions, and last its amplitude."""
    with np.load(Path(__file__).parent / "golden" / "rotary.npz") as golden:
        *theirs, amplitude = golden[kind].astype(np.float64)
    scaling = {"rope_type": kind, **SCALINGS[kind]}
    cos, sin = ops.rotary_tables(200, 32, scaling=scaling, dtype="float64")
    angles = np.arange(200)[:, None] * np.array(theirs)
    np.testing.assert_allclose(cos.numpy(), amplitude * np.cos(angles), atol=3e-5)
    np.testing.assert_allclose(sin.numpy(), amplitude * np.sin(angles), atol=3e-5)


def test_the_base_may_come_with_the_scaling():
    found = ops.rotary_tables(3, 4, scaling={"rope_type": "default", "rope_theta": 7.0})
    expected = ops.rotary_tables(3, 4, base=7.0)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_tables_that_cannot_be():
    with pytest.raises(ValueError, match="an even head size, got 5"):
        ops.rotary_tables(3, 5)
    with pytest.raises(ValueError, match="default, linear, dynamic, yarn, llama3, got 'longrope'"):
        ops.rotary_tables(3, 4, scaling={"rope_type": "longrope"})
    with pytest.raises(ValueError, match="type 'linear' needs factor"):
        ops.rotary_tables(3, 4, scaling={"type": "linear"})
    with pytest.raises(ValueError, match="type 'linear' has no mscale"):
        ops.rotary_tables(3, 4, scaling={"type": "linear", "factor": 2.0, "mscale": 1.0})
