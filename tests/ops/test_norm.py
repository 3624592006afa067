from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinygrad_llm import Tensor, ops


def _layer_norm(x, w, b, eps, axes):
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    y = (x - mean) / np.sqrt(var + eps)
    return y * (1 if w is None else w) + (0 if b is None else b)


def _rms_norm(x, w, eps, axes):
    y = x / np.sqrt((x * x).mean(axes, keepdims=True) + eps)
    return y * (1 if w is None else w)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(3, 4), (4,), (2, 3, 4), (0, 4)])
def test_layer_norm_is_its_formula(shape, weighted, biased, layout, dtype, rng, close):
    x = layout(rng.normal(size=shape).astype(dtype))
    w = layout(rng.normal(size=4).astype(dtype)) if weighted else None
    b = layout(rng.normal(size=4).astype(dtype)) if biased else None
    y = ops.layer_norm(Tensor(x), w, b, eps=1e-3)
    assert y.dtype == dtype
    close(y, _layer_norm(x.astype(np.float64), w, b, 1e-3, (-1,)), times=3)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(3, 4), (4,), (2, 3, 4), (0, 4)])
def test_rms_norm_is_its_formula(shape, weighted, layout, dtype, rng, close):
    x = layout(rng.normal(size=shape).astype(dtype))
    w = layout(rng.normal(size=4).astype(dtype)) if weighted else None
    y = ops.rms_norm(Tensor(x), w, eps=1e-3)
    assert y.dtype == dtype
    close(y, _rms_norm(x.astype(np.float64), w, 1e-3, (-1,)), times=3)


def test_as_many_axes_as_the_weight_has_are_normalised(layout, rng, close):
    x, w = layout(rng.normal(size=(5, 2, 3))), layout(rng.normal(size=(2, 3)))
    close(ops.layer_norm(x, w, w), _layer_norm(x, w, w, 1e-5, (-2, -1)))
    close(ops.layer_norm(x, None, w), _layer_norm(x, None, w, 1e-5, (-2, -1)))
    close(ops.rms_norm(x, w), _rms_norm(x, w, 1e-6, (-2, -1)))


@given(
    hnp.arrays(np.float64, (3, 5), elements=st.floats(-10, 10)).filter(
        lambda x: x.std(1).min() > 1e-2
    ),
    st.floats(-100, 100),
    st.floats(0.1, 10),
)
def test_layer_norm_does_not_see_shift_and_scale(x, shift, scale):
    y = ops.layer_norm(x, eps=0.0).numpy()
    np.testing.assert_allclose(y.mean(1), 0, atol=1e-10)
    np.testing.assert_allclose(y.var(1), 1, rtol=1e-9)
    np.testing.assert_allclose(ops.layer_norm(x * scale + shift, eps=0.0).numpy(), y, atol=1e-7)
    z = ops.rms_norm(x, eps=0.0).numpy()
    np.testing.assert_allclose(ops.rms_norm(x * scale, eps=0.0).numpy(), z, atol=1e-9)


@pytest.mark.parametrize("offset", [0.0, 3.0, 100.0, 1e4, -1e6])
def test_a_large_mean_costs_no_digits(offset, rng):
    """mean(x²) − μ² alone would have none left: 1e12 + 1 is 1e12 in float32."""
    x = (rng.integers(-8, 9, (4, 64)) / 8.0 + offset).astype(np.float32)  # exact in float32
    g = rng.normal(size=x.shape).astype(np.float32)
    found = []
    for dtype in (np.float32, np.float64):
        t = Tensor(x.astype(dtype), requires_grad=True)
        w = Tensor(np.linspace(0.5, 2, 64).astype(dtype), requires_grad=True)
        y = ops.layer_norm(t, w)
        y.backward(Tensor(g.astype(dtype)))
        assert t.grad is not None
        assert w.grad is not None
        found.append([y.numpy(), t.grad.numpy(), w.grad.numpy()])
    for got, want in zip(*found, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


def test_equal_elements_are_held_by_eps(dtype):
    x = Tensor(np.full((2, 3), 5, dtype), requires_grad=True)
    y = ops.layer_norm(x)
    assert y.tolist() == [[0.0] * 3] * 2
    y.sum().backward()
    assert x.grad is not None
    assert np.isfinite(x.grad.numpy()).all()
    assert ops.rms_norm(np.zeros((2, 3), dtype)).tolist() == [[0.0] * 3] * 2


def test_half_precision_is_kept_and_normalised_in_float32(half, rng):
    x = Tensor((rng.normal(size=(4, 768)) * 3 + 300).astype(half), requires_grad=True)
    w, b = Tensor(np.ones(768, half), requires_grad=True), np.zeros(768, half)
    wide = x.numpy().astype(np.float64)
    y = ops.layer_norm(x, w, b)
    assert y.dtype == half
    np.testing.assert_allclose(
        y.numpy().astype(float), _layer_norm(wide, None, None, 1e-5, (-1,)), atol=0.03
    )
    z = ops.rms_norm(x, w)
    assert z.dtype == half
    np.testing.assert_allclose(
        z.numpy().astype(float), _rms_norm(wide, None, 1e-6, (-1,)), rtol=0.01
    )
    (y.sum() + z.sum()).backward()
    for leaf in (x, w):
        assert leaf.grad is not None
        assert leaf.grad.dtype == half
        assert np.isfinite(leaf.grad.numpy().astype(float)).all()


def test_the_parameters_take_the_dtype_of_x():
    x = np.ones((2, 3), np.float32)
    assert ops.layer_norm(x, np.ones(3), np.ones(3)).dtype == np.float32
    assert ops.rms_norm(x, [1, 2, 3]).dtype == np.float32
    assert ops.layer_norm(Tensor([1, 2, 3])).dtype == np.float32


def test_nothing_to_normalise():
    for shape in ((2, 0), (0, 0)):
        assert ops.layer_norm(np.zeros(shape), np.zeros(0), np.zeros(0)).shape == shape
        assert ops.rms_norm(np.zeros(shape), np.zeros(0)).shape == shape


@pytest.mark.parametrize("function", [ops.layer_norm, ops.rms_norm])
def test_what_does_not_fit_is_refused(function):
    with pytest.raises(ValueError, match=r"\(4,\).*got \(2, 3\)"):
        function(np.ones((2, 3)), np.ones(4))
    with pytest.raises(ValueError, match=r"\(5, 2, 3\).*got \(2, 3\)"):
        function(np.ones((2, 3)), np.ones((5, 2, 3)))
    with pytest.raises(ValueError, match=r"got \(\)"):
        function(1.0)


def test_weight_and_bias_have_one_shape():
    with pytest.raises(ValueError, match=r"\(3,\) and \(4,\)"):
        ops.layer_norm(np.ones((2, 3)), np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(6,\)"):
        ops.layer_norm(np.ones((2, 3)), np.ones((2, 3)), np.ones(6))
