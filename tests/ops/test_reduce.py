from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinygrad_llm import Tensor, ops

REDUCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Any]]] = {
    "sum": (ops.sum, np.sum),
    "mean": (ops.mean, np.mean),
    "var": (ops.var, np.var),
    "std": (ops.std, np.std),
    "max": (ops.max, np.max),
    "min": (ops.min, np.min),
    "prod": (ops.prod, np.prod),
    "norm": (ops.norm, lambda x, axis, keepdims: np.sqrt((x * x).sum(axis, keepdims=keepdims))),
    "norm 1": (
        lambda x, axis, keepdims: ops.norm(x, 1, axis, keepdims),
        lambda x, axis, keepdims: np.abs(x).sum(axis, keepdims=keepdims),
    ),
    "norm 3": (
        lambda x, axis, keepdims: ops.norm(x, 3, axis, keepdims),
        lambda x, axis, keepdims: (np.abs(x) ** 3).sum(axis, keepdims=keepdims) ** (1 / 3),
    ),
    "norm inf": (
        lambda x, axis, keepdims: ops.norm(x, math.inf, axis, keepdims),
        lambda x, axis, keepdims: np.abs(x).max(axis, keepdims=keepdims),
    ),
}
NEEDS_ELEMENTS = ("mean", "var", "std", "max", "min", "norm inf")
CASES = [((3, 4), None), ((3, 4), 0), ((3, 4), -1), ((2, 3, 4), (0, 2)), ((2, 3, 4), (-1, 0)),
         ((2, 1, 3), 1), ((), None), ((5,), 0), ((2, 3), ()), ((0, 3), 1), ((0, 3), None),
         ((0, 3), 0)]  # fmt: skip


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_equal_numpy(name, keepdims, layout, dtype, rng, close):
    function, reference = REDUCTIONS[name]
    for shape, axis in CASES:
        if 0 in shape and axis != 1 and name in NEEDS_ELEMENTS:
            continue
        x = layout(rng.normal(size=shape).astype(dtype))
        y = function(Tensor(x), axis=axis, keepdims=keepdims)
        assert y.dtype == dtype
        close(y, reference(x.astype(np.float64), axis=axis, keepdims=keepdims))


@pytest.mark.parametrize("name", REDUCTIONS)
def test_half_precisions_are_kept_and_accumulated_in_float32(name, half, rng, close):
    function, reference = REDUCTIONS[name]
    x = rng.uniform(0.5, 1.5, size=(2, 300)).astype(half)
    y = function(Tensor(x), axis=1, keepdims=False)
    assert y.dtype == half
    if name != "prod":
        close(y, reference(x.astype(np.float64), axis=1, keepdims=False))


def test_half_precision_does_not_overflow_inside():
    big = Tensor(np.full(4096, 300, np.float16), requires_grad=True)
    assert big.mean().item() == 300
    assert big.var().item() == 0
    assert ops.norm(big).item() == 300 * 64
    assert ops.norm(Tensor(np.full(4, 300, ml_dtypes.bfloat16))).item() == 600
    ones = Tensor(np.ones(60000, np.float16))
    assert ones.sum().item() == 60000
    assert ones.mean().item() == 1
    assert ops.cumsum(Tensor(np.ones(3000, np.float16))).tolist()[-1] == 3000
    assert ops.cumsum(Tensor(np.ones(1024, ml_dtypes.bfloat16))).tolist()[-1] == 1024


@pytest.mark.parametrize("ddof", [0, 1, 2])
def test_variance_takes_degrees_of_freedom(ddof, layout, dtype, rng, close):
    x = layout(rng.normal(size=(3, 4)).astype(dtype))
    for axis in (None, 0, 1):
        close(ops.var(x, axis, ddof), np.var(x.astype(np.float64), axis=axis, ddof=ddof))
        close(ops.std(x, axis, ddof), np.std(x.astype(np.float64), axis=axis, ddof=ddof))


def test_variance_is_exact_far_from_zero():
    x = np.array([1e4, 1e4 + 1, 1e4 + 2], np.float32)
    assert abs(ops.var(x).item() - 2 / 3) < 1e-3


@pytest.mark.parametrize(
    "kind", ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"]
)
def test_integers_and_booleans_add_up_as_int64(kind):
    x = np.array([[1, 0, 1], [1, 1, 0]], dtype=kind)
    for function, reference in ((ops.sum, np.sum), (ops.prod, np.prod), (ops.cumsum, np.cumsum)):
        y = function(Tensor(x), axis=1)
        assert y.dtype == np.int64
        np.testing.assert_array_equal(y.numpy(), reference(x, axis=1))
    assert ops.sum(Tensor(np.full(1000, 1, dtype=kind))).item() == 1000


@pytest.mark.parametrize("kind", ["bool", "int8", "uint8", "int64"])
def test_extrema_keep_integers_and_means_become_float32(kind, close):
    x = np.array([[1, 0], [1, 1]], dtype=kind)
    for function, reference in ((ops.max, np.max), (ops.min, np.min)):
        y = function(Tensor(x), axis=0)
        assert y.dtype == np.dtype(kind)
        np.testing.assert_array_equal(y.numpy(), reference(x, axis=0))
    for function, reference in ((ops.mean, np.mean), (ops.var, np.var), (ops.std, np.std)):
        y = function(Tensor(x), axis=0)
        assert y.dtype == np.float32
        close(y, reference(x, axis=0))
    assert ops.norm(Tensor(x)).dtype == np.float32


@given(hnp.arrays(np.float64, hnp.array_shapes(min_side=0, max_dims=4, max_side=4),
                  elements=st.integers(-8, 8)), st.data())  # fmt: skip
def test_sum_equals_numpy_over_any_axes(x, data):
    axes = data.draw(st.lists(st.integers(0, x.ndim - 1), unique=True).map(tuple) | st.none())
    keepdims = data.draw(st.booleans())
    y = ops.sum(x, axes, keepdims)
    np.testing.assert_array_equal(y.numpy(), x.sum(axis=axes, keepdims=keepdims))


@pytest.mark.parametrize("name", ["sum", "mean", "max", "var", "std", "prod", "norm"])
def test_numpy_integers_are_axes(name):
    function, reference = REDUCTIONS[name]
    x = np.arange(6.0).reshape(2, 3)
    y = function(Tensor(x), axis=np.int64(1), keepdims=False)
    np.testing.assert_allclose(y.numpy(), reference(x, axis=1, keepdims=False))
    y = function(Tensor(x, requires_grad=True), axis=(np.int64(1),), keepdims=False)
    y.sum().backward()


# --- where the extreme is -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["argmax", "argmin"])
def test_the_place_of_the_extreme_equals_numpy(name, layout, rng):
    function, reference = getattr(ops, name), getattr(np, name)
    for kind in ("float32", "float64", "float16", "int64", "bool"):
        x = layout(rng.integers(0, 5, size=(3, 4, 2)).astype(kind))
        for axis in (None, 0, -1):
            for keepdims in (False, True):
                y = function(Tensor(x), axis=axis, keepdims=keepdims)
                assert y.dtype == np.int64
                np.testing.assert_array_equal(y.numpy(), reference(x, axis, keepdims=keepdims))
    assert function(Tensor(3.0)).item() == 0
    assert function(np.array([1, 3, 2]).astype(ml_dtypes.bfloat16)).item() == (
        1 if name == "argmax" else 0
    )


def test_argsort_is_stable_and_equals_numpy(layout, rng):
    x = layout(rng.integers(0, 3, size=(4, 6)).astype(np.float32))
    for axis in (0, 1, -1):
        y = ops.argsort(x, axis)
        assert y.dtype == np.int64
        np.testing.assert_array_equal(y.numpy(), np.argsort(x, axis=axis, kind="stable"))


def test_nan_is_the_extreme():
    x = np.array([1.0, math.nan, 2.0])
    assert math.isnan(ops.max(x).item())
    assert math.isnan(ops.min(x).item())
    assert ops.argmax(x).item() == 1


# --- running sums ---------------------------------------------------------------------------------


def test_cumsum_equals_numpy(layout, dtype, rng, close):
    for shape in ((3, 4), (2, 3, 2), (5,), (0, 3), (3, 0)):
        x = layout(rng.normal(size=shape).astype(dtype))
        for axis in range(-len(shape), len(shape)):
            y = ops.cumsum(x, axis)
            assert y.dtype == dtype
            close(y, np.cumsum(x.astype(np.float64), axis=axis), times=3)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*REDUCTIONS, "cumsum", "argmax", "argmin", "argsort"])
def test_an_axis_that_is_not_there_is_refused(name):
    function = REDUCTIONS[name][0] if name in REDUCTIONS else getattr(ops, name)
    options = {"keepdims": False} if name in REDUCTIONS else {}
    with pytest.raises(ValueError, match=r"axis 2.*\(2, 3\)"):
        function(Tensor(np.ones((2, 3))), axis=2, **options)


def test_an_axis_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        ops.sum(np.ones((2, 3)), axis=(0, -2))


@pytest.mark.parametrize("name", NEEDS_ELEMENTS)
def test_what_needs_elements_refuses_none(name):
    with pytest.raises(ValueError, match=r"\(0, 3\)|of 0 elements"):
        REDUCTIONS[name][0](np.ones((0, 3)), axis=0, keepdims=False)


def test_variance_needs_more_elements_than_ddof():
    with pytest.raises(ValueError, match="3 elements"):
        ops.var([1.0, 2.0, 3.0], ddof=3)


@pytest.mark.parametrize("order", [0, -1, -math.inf, math.nan])
def test_norm_refuses_an_order_that_is_none(order):
    with pytest.raises(ValueError, match="ord > 0"):
        ops.norm([1.0], order)
