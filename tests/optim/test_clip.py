"""Clipping against its definition, and where float32 and float16 run out of range."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm import Tensor, backend
from tinygrad_llm.optim import clip_grad_norm_, clip_grad_value_


def with_gradients(*gradients):
    parameters = []
    for g in gradients:
        p = Tensor(np.zeros(np.shape(g), np.asarray(g).dtype), requires_grad=True)
        p.grad = Tensor(np.asarray(g))
        parameters.append(p)
    return parameters


def grad(p):
    assert p.grad is not None
    return p.grad


def gradients_of(parameters):
    return [grad(p).data for p in parameters]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("norm_type", [2, math.inf])
def test_the_norm_of_all_gradients_is_limited(dtype, max_norm, norm_type):
    rng = np.random.default_rng(0)
    gs = [np.asarray(rng.normal(size=s)).astype(dtype) for s in [(3, 4), (50,), (), (0, 2)]]
    long = np.concatenate([g.ravel() for g in gs]).astype(np.float64)
    expected = np.linalg.norm(long, norm_type)
    parameters = with_gradients(*[g.copy() for g in gs])
    arrays = gradients_of(parameters)

    total = clip_grad_norm_(parameters, max_norm, norm_type)

    assert type(total) is float
    assert total == pytest.approx(expected, rel=1e-6)
    share = min(1.0, max_norm / (expected + 1e-6))
    for p, before, array in zip(parameters, gs, arrays, strict=True):
        assert p.grad.data is array  # in place
        assert array.dtype == dtype
        np.testing.assert_allclose(array, before * share, rtol=1e-5)


def test_one_tensor_a_generator_and_missing_gradients():
    p, unreached = *with_gradients([3.0, 4.0]), Tensor([1.0], requires_grad=True)
    assert clip_grad_norm_(p, 100.0) == 5.0
    assert clip_grad_norm_((x for x in (p, unreached)), 2.5) == 5.0
    np.testing.assert_allclose(p.grad.data, [1.5, 2.0], rtol=1e-6)
    assert unreached.grad is None
    assert clip_grad_norm_([unreached], 1.0) == 0.0
    assert clip_grad_norm_([unreached], 1.0, math.inf) == 0.0


@given(
    st.lists(st.floats(-(2.0**110), 2.0**110, width=32), min_size=1, max_size=20),
    st.sampled_from([np.float32, np.float64]),
)
def test_no_finite_gradient_has_an_infinite_norm(values, dtype):
    g = np.array(values, dtype)
    (p,) = with_gradients(g)
    expected = math.hypot(*[float(x) for x in g])
    assert clip_grad_norm_(p, math.inf) == pytest.approx(expected, rel=1e-5, abs=0)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (1e25, np.float32),  # its square overflows
        (1e-25, np.float32),  # its square underflows to 0
        (1e-21, np.float32),  # and here to a number of few bits
        (1e200, np.float64),
        (1e-200, np.float64),
        (300.0, backend.float16),
        (1e-4, backend.float16),
        (1e25, backend.bfloat16),
    ],
)
def test_norms_whose_squares_leave_the_range(value, dtype):
    g = np.full((100,), value).astype(dtype)
    (p,) = with_gradients(g)
    assert clip_grad_norm_(p, math.inf) == pytest.approx(10 * float(g[0]), rel=1e-5, abs=0)
    assert clip_grad_norm_(p, math.inf, math.inf) == float(g[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm_type", [2, math.inf])
def test_a_norm_that_is_not_finite(bad, norm_type):
    parameters = with_gradients(np.array([1.0, 2.0], np.float32), np.array([3.0, bad], np.float32))
    before = [g.copy() for g in gradients_of(parameters)]
    total = clip_grad_norm_(parameters, 1.0, norm_type)
    assert not math.isfinite(total)
    assert math.isnan(total) == math.isnan(bad)
    for g, old in zip(gradients_of(parameters), before, strict=True):
        np.testing.assert_array_equal(g, old)
    with pytest.raises(RuntimeError, match=r"1 of 2 gradients hold NaN or infinity.*shape \(2,\)"):
        clip_grad_norm_(parameters, 1.0, norm_type, error_if_nonfinite=True)


@pytest.mark.parametrize("dtype", [backend.float16, backend.bfloat16, np.float32, np.float64])
def test_values_are_limited_one_by_one(dtype):
    (p,) = with_gradients(np.array([-3.0, -0.5, 0.0, 0.5, 3.0, math.nan]).astype(dtype))
    array = p.grad.data
    clip_grad_value_([p], np.float64(1.0))
    assert p.grad.data is array
    assert array.dtype == dtype
    expected = [-1.0, -0.5, 0.0, 0.5, 1.0, math.nan]
    np.testing.assert_array_equal(array.astype(np.float64), expected)


@pytest.mark.parametrize("dtype", [backend.float16, backend.bfloat16])
def test_halves_are_clipped_in_their_dtype(dtype):
    (p,) = with_gradients(np.array([3.0, 4.0]).astype(dtype))
    assert clip_grad_norm_(p, 1.0) == 5.0
    assert p.grad.dtype == dtype
    np.testing.assert_allclose(p.grad.data.astype(np.float64), [0.6, 0.8], rtol=4e-3)


def share_an_array(a, b):
    a.grad = b.grad = Tensor(np.array([3.0, 4.0]))


def share_memory(a, b):
    array = np.array([3.0, 4.0])
    a.grad, b.grad = Tensor(array), Tensor(array[:])


def are_broadcast(a, b):
    a.grad, b.grad = (Tensor(np.broadcast_to(x, 2)) for x in (3.0, 4.0))


@pytest.mark.parametrize("arrange", [share_an_array, share_memory, are_broadcast])
def test_gradients_that_share_memory_are_clipped_once(arrange):
    a, b = Tensor([1.0, 1.0], requires_grad=True), Tensor([1.0, 1.0], requires_grad=True)
    arrange(a, b)
    before = [g.copy() for g in gradients_of([a, b])]
    total = clip_grad_norm_([a, b], 1.0)
    for p, old in zip((a, b), before, strict=True):
        np.testing.assert_allclose(grad(p).data, old / (total + 1e-6))


def test_gradients_with_a_graph_leave_it_intact():
    a, b = Tensor([1.0, 2.0], requires_grad=True), Tensor([3.0, 4.0], requires_grad=True)
    (a * a + b * b + a * b).sum().backward(create_graph=True)
    before = [grad(a), grad(b)]
    values = [g.data.copy() for g in before]
    clip_grad_value_([a, b], 0.5)
    assert [grad(a).tolist(), grad(b).tolist()] == [[0.5, 0.5], [0.5, 0.5]]
    for g, old in zip(before, values, strict=True):
        np.testing.assert_array_equal(g.data, old)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: clip_grad_norm_(p, -1.0), "max_norm must be at least 0, got -1.0"),
        (lambda p: clip_grad_norm_(p, math.nan), "max_norm must be at least 0, got nan"),
        (lambda p: clip_grad_norm_(p, 1.0, 3), "norm_type must be 2 or inf, got 3"),
        (lambda p: clip_grad_value_(p, -1.0), "clip_value must be at least 0, got -1.0"),
    ],
)
def test_wrong_limits_are_refused(call, message):
    (p,) = with_gradients([1.0])
    with pytest.raises(ValueError, match=message):
        call(p)
