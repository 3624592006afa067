from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm import Tensor, backend, ops

SHAPES = [(3, 4), (), (0, 3), (2, 1, 3), (5,)]
ERF = np.vectorize(math.erf, otypes=[np.float64])

# function, its formula in float64, and where the values come from
UNARY: dict[str, tuple[Callable[[Any], Tensor], Callable[[Any], Any], tuple[float, float]]] = {
    "exp": (ops.exp, np.exp, (-3, 3)),
    "log": (ops.log, np.log, (0.1, 5)),
    "log1p": (ops.log1p, np.log1p, (-0.8, 5)),
    "sqrt": (ops.sqrt, np.sqrt, (0, 5)),
    "rsqrt": (ops.rsqrt, lambda x: 1 / np.sqrt(x), (0.1, 5)),
    "tanh": (ops.tanh, np.tanh, (-3, 3)),
    "sigmoid": (ops.sigmoid, lambda x: 1 / (1 + np.exp(-x)), (-6, 6)),
    "sin": (ops.sin, np.sin, (-3, 3)),
    "cos": (ops.cos, np.cos, (-3, 3)),
    "erf": (ops.erf, ERF, (-3, 3)),
    "gelu": (ops.gelu, lambda x: x * 0.5 * (1 + ERF(x / math.sqrt(2))), (-4, 4)),
    "gelu_tanh": (
        lambda x: ops.gelu(x, "tanh"),
        lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        (-4, 4),
    ),
    "silu": (ops.silu, lambda x: x / (1 + np.exp(-x)), (-6, 6)),
    "softplus": (ops.softplus, lambda x: np.log1p(np.exp(x)), (-6, 6)),
    "power 2": (lambda x: ops.power(x, 2), lambda x: x**2, (-3, 3)),
    "power 3": (lambda x: ops.power(x, 3), lambda x: x**3, (-3, 3)),
    "power 0.5": (lambda x: ops.power(x, 0.5), np.sqrt, (0.1, 3)),
    "power -1.5": (lambda x: ops.power(x, -1.5), lambda x: x**-1.5, (0.5, 3)),
}
KEEPS_INTEGERS = {
    "abs": (ops.abs, np.abs),
    "negative": (ops.negative, np.negative),
    "relu": (ops.relu, lambda x: np.maximum(x, 0)),
    "sign": (ops.sign, np.sign),
    "square": (lambda x: ops.power(x, 2), np.square),
}
ARITHMETIC = {
    "add": (ops.add, np.add),
    "subtract": (ops.subtract, np.subtract),
    "multiply": (ops.multiply, np.multiply),
    "divide": (ops.divide, np.divide),
    "power": (ops.power, np.power),
    "maximum": (ops.maximum, np.maximum),
    "minimum": (ops.minimum, np.minimum),
}
COMPARISONS = {
    name: (getattr(ops, name), getattr(np, name))
    for name in ("equal", "not_equal", "less", "less_equal", "greater", "greater_equal")
}


@pytest.mark.parametrize("name", UNARY)
def test_a_unary_op_is_its_formula_in_every_layout(name, layout, dtype, rng, close):
    function, formula, bounds = UNARY[name]
    for shape in SHAPES:
        x = layout(rng.uniform(*bounds, size=shape).astype(dtype))
        y = function(Tensor(x))
        assert y.dtype == dtype
        close(y, formula(x.astype(np.float64)))


@pytest.mark.parametrize("name", UNARY)
def test_a_unary_op_keeps_half_precision(name, half, rng, close):
    function, formula, bounds = UNARY[name]
    x = rng.uniform(*bounds, size=(3, 40)).astype(half)
    y = function(Tensor(x))
    assert y.dtype == half
    close(y, formula(x.astype(np.float64)))


@pytest.mark.parametrize("name", [n for n in UNARY if n not in ("power 2", "power 3")])
def test_integers_and_booleans_become_float32(name, close):
    function, formula, bounds = UNARY[name]
    low = max(math.ceil(bounds[0]), 0)
    for x in (np.array([low, 1, 2]) if low == 0 and bounds[0] <= 0 else np.array([1, 2]), True):
        y = function(Tensor(x))
        assert y.dtype == np.float32
        close(y, formula(np.asarray(x, dtype=np.float64)))


@pytest.mark.parametrize("name", KEEPS_INTEGERS)
@pytest.mark.parametrize("kind", ["int8", "int64", "float32", "float64", "float16"])
def test_ops_that_need_no_fractions_keep_the_dtype(name, kind, layout):
    function, formula = KEEPS_INTEGERS[name]
    for x in (np.array([[-3, 0, 2], [1, -1, 5]], dtype=kind), np.zeros((0, 2), kind)):
        x = layout(x)
        y = function(Tensor(x))
        assert y.dtype == np.dtype(kind)
        np.testing.assert_array_equal(y.numpy(), formula(x))


# --- two operands ---------------------------------------------------------------------------------

PAIRS = [((3, 4), (3, 4)), ((3, 4), (4,)), ((3, 1, 2), (4, 1)), ((2, 3), ()), ((), ()),
         ((0, 3), (3,)), ((1, 3), (0, 3)), ((2, 0), (2, 1))]  # fmt: skip


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_equals_numpy_under_broadcasting(name, layout, dtype, rng):
    function, reference = ARITHMETIC[name]
    for left, right in PAIRS:
        a = layout(rng.uniform(0.5, 2, size=left).astype(dtype))
        b = layout(rng.uniform(0.5, 2, size=right).astype(dtype))
        y = function(Tensor(a), Tensor(b))
        assert y.dtype == dtype
        np.testing.assert_array_equal(y.numpy(), reference(a, b))


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_are_boolean_and_equal_numpy(name, layout, rng):
    function, reference = COMPARISONS[name]
    for left, right in PAIRS:
        a, b = (layout(rng.integers(0, 3, size=s).astype(np.float32)) for s in (left, right))
        y = function(Tensor(a, requires_grad=True), b)
        assert y.dtype == np.bool_
        assert not y.requires_grad
        np.testing.assert_array_equal(y.numpy(), reference(a, b))


@pytest.mark.parametrize(
    ("function", "operate"),
    [
        (ops.add, operator.add),
        (ops.subtract, operator.sub),
        (ops.multiply, operator.mul),
        (ops.divide, operator.truediv),
        (ops.power, operator.pow),
        (ops.equal, operator.eq),
        (ops.not_equal, operator.ne),
        (ops.less, operator.lt),
        (ops.less_equal, operator.le),
        (ops.greater, operator.gt),
        (ops.greater_equal, operator.ge),
    ],
)
def test_operators_are_the_functions_from_either_side(function, operate):
    a, b = Tensor([1.5, 2.0, 4.0]), Tensor([2.0, 2.0, 0.5])
    np.testing.assert_array_equal(operate(a, b).numpy(), function(a, b).numpy())
    np.testing.assert_array_equal(operate(2, b).numpy(), function(2, b).numpy())
    np.testing.assert_array_equal(operate(a, 2).numpy(), function(a, 2).numpy())
    np.testing.assert_array_equal(operate(a.numpy(), b).numpy(), function(a, b).numpy())
    np.testing.assert_array_equal(operate(a, b.numpy()).numpy(), function(a, b).numpy())
    np.testing.assert_array_equal(operate(np.float64(2), b).numpy(), function(2, b).numpy())
    for result in (operate(a.numpy(), b), operate(np.float64(2), b), operate(2, b)):
        assert isinstance(result, Tensor)


def test_unary_operators():
    x = Tensor([-1.0, 2.0])
    assert (-x).tolist() == [1.0, -2.0]
    assert (+x).tolist() == [-1.0, 2.0]
    assert abs(x).tolist() == [1.0, 2.0]
    assert (~Tensor([True, False])).tolist() == [False, True]


# --- dtypes ---------------------------------------------------------------------------------------

DTYPES = [np.dtype(t) for t in ("bool", "uint8", "int8", "int16", "int32", "int64",
          "float16", ml_dtypes.bfloat16, "float32", "float64")]  # fmt: skip
dtypes = st.sampled_from(DTYPES)


@given(st.sampled_from(sorted(ARITHMETIC)), dtypes, dtypes)
def test_the_result_has_the_promoted_dtype(name, left, right):
    a, b = np.ones((2, 1), dtype=left), np.ones(3, dtype=right)
    wanted = backend.promote(left, right)
    if wanted == np.bool_ and name == "subtract":
        return  # NumPy and PyTorch both refuse True − True
    y = ARITHMETIC[name][0](Tensor(a), Tensor(b))
    if name == "divide" and not backend.is_float(wanted):
        wanted = backend.float32
    elif name == "power" and wanted == np.bool_:
        wanted = np.dtype(np.int8)  # NumPy's
    assert y.dtype == wanted
    assert y.shape == (2, 3)


@given(st.sampled_from(["add", "multiply", "maximum", "equal"]), dtypes, dtypes)
def test_promotion_is_symmetric(name, left, right):
    function = {**ARITHMETIC, **COMPARISONS}[name][0]
    a, b = Tensor(np.ones(2, dtype=left)), Tensor(np.zeros(2, dtype=right))
    assert function(a, b).dtype == function(b, a).dtype


SCALARS = st.one_of(
    st.sampled_from([2, 2.0, np.float64(2.0), np.float32(2.0), np.float16(2.0), np.int64(2),
                     np.int32(2), np.uint8(2), ml_dtypes.bfloat16(2.0)]),
    st.sampled_from([True, np.True_]),
)  # fmt: skip


@given(st.sampled_from(sorted(ARITHMETIC)), dtypes, SCALARS, st.booleans(), st.booleans())
def test_scalars_are_weak(name, dtype, scalar, scalar_first, as_tensor):
    """A scalar takes the dtype it meets; only a fraction makes an integer a float: float32."""
    x = np.ones(3, dtype=dtype)
    operand = Tensor(x) if as_tensor else x
    is_bool = isinstance(scalar, bool | np.bool_)
    is_fraction = not is_bool and not isinstance(scalar, int | np.integer)
    wanted = dtype
    if not backend.is_float(dtype):
        if is_fraction or name == "divide":
            wanted = backend.float32
        elif dtype == np.bool_ and not is_bool:
            wanted = backend.int64
    if wanted == np.bool_ and name in ("subtract", "power"):
        return
    function = ARITHMETIC[name][0]
    y = function(scalar, operand) if scalar_first else function(operand, scalar)
    assert y.dtype == wanted


@pytest.mark.parametrize(
    "call",
    [
        lambda x, one: ops.power(x, one * 2.5),
        lambda x, one: ops.clip(x, one * 0.5, one * 2),
        lambda x, one: ops.where(x > 0, x, one),
        lambda x, one: ops.masked_fill(x, x > 0, one),
    ],
)
def test_numpy_scalars_as_options_are_weak_too(call, dtype):
    assert call(Tensor(np.ones(3, dtype)), np.float64(1)).dtype == dtype


def test_a_scalar_must_be_a_real_number():
    x = Tensor([1.0, 2.0])
    for wrong in (1j, np.complex64(1j), np.str_("2"), np.timedelta64(3, "s")):
        with pytest.raises(TypeError, match="number"):
            ops.multiply(x, wrong)
    for wrong in (None, "two", object()):
        with pytest.raises(TypeError, match="numbers"):
            ops.multiply(x, wrong)


def test_half_precisions_together_are_float32():
    a, b = Tensor(np.ones(2, np.float16)), Tensor(np.ones(2, ml_dtypes.bfloat16))
    assert (a + b).dtype == np.float32


def test_integers_divide_to_the_default_float_dtype():
    y = Tensor([1, 2, 3]) / 2
    assert y.dtype == np.float32
    assert y.tolist() == [0.5, 1.0, 1.5]
    assert (Tensor([True]) / Tensor([2])).dtype == np.float32


def test_integers_stay_integers_where_the_result_is_one():
    x = Tensor([1, 2, 3])
    for y in (x + 1, x * 2, x - 1, x**2, ops.maximum(x, 2), -x, abs(x), x + True):
        assert y.dtype == np.int64
    assert (x**-1).tolist() == [1.0, 0.5, np.float32(1 / 3)]
    assert (x**0.5).dtype == np.float32


def test_a_shape_that_does_not_fit_is_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"\(2,3\).*\(2,4\)"):
        ops.add(np.ones((2, 3)), np.ones((2, 4)))


def test_no_integer_dtype_holds_uint64_and_int64():
    with pytest.raises(TypeError, match=r"uint64.*int64"):
        ops.add(Tensor(np.ones(1, np.uint64)), Tensor([1]))


# --- logic ----------------------------------------------------------------------------------------


def test_logic_equals_numpy():
    a, b = np.array([0.0, 1.0, -2.0, np.nan]), np.array([0.0, 0.0, 3.0, 1.0])
    np.testing.assert_array_equal(ops.logical_and(a, b).numpy(), np.logical_and(a, b))
    np.testing.assert_array_equal(ops.logical_or(a, b).numpy(), np.logical_or(a, b))
    np.testing.assert_array_equal(ops.logical_not(a).numpy(), np.logical_not(a))
    for function, reference in ((ops.bitwise_and, np.bitwise_and), (ops.bitwise_or, np.bitwise_or)):
        for dtype in (np.bool_, np.uint8, np.int64):
            i, j = np.array([0, 1, 2, 3], dtype), np.array([1, 3, 0, 2], dtype)
            y = function(i, j)
            assert y.dtype == dtype
            np.testing.assert_array_equal(y.numpy(), reference(i, j))
    mask = Tensor([True, False])
    assert (mask & [True, True]).tolist() == [True, False]
    assert (np.array([False, False]) | mask).tolist() == [True, False]


def test_nan_and_infinity_are_found():
    x = np.array([1.0, np.nan, np.inf, -np.inf], np.float32)
    assert ops.isnan(x).tolist() == [False, True, False, False]
    assert ops.isfinite(x).tolist() == [True, False, False, False]
    assert ops.isfinite(Tensor([1, 2])).tolist() == [True, True]
    assert ops.isnan(x.astype(ml_dtypes.bfloat16)).tolist() == [False, True, False, False]


# --- accuracy and extremes ------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "units"), [("float64", 4), ("float32", 8)])
def test_erf_is_within_a_few_units_in_the_last_place(kind, units):
    x = np.concatenate(
        [np.linspace(-7, 7, 20001), np.geomspace(1e-30, 1, 2000), np.array([0.46875, 0.5, 4.0])]
    ).astype(kind)
    want = ERF(x.astype(np.float64))
    error = np.abs(ops.erf(x).numpy().astype(np.float64) - want)
    assert (error <= units * np.spacing(np.abs(want).astype(kind)).astype(np.float64)).all()


def test_erf_at_the_ends():
    for dtype in (np.float32, np.float64):
        y = ops.erf(np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 40.0], dtype)).numpy()
        np.testing.assert_array_equal(y, [0.0, 0.0, 1.0, -1.0, np.nan, 1.0])
        assert np.signbit(y[1])
        assert (np.abs(ops.erf(np.linspace(3, 7, 9999, dtype=dtype)).numpy()) <= 1).all()


def test_sigmoid_is_accurate_in_its_tails(dtype):
    x = np.array([-80.0, -40, -20, -5, 0, 5, 20, 40], dtype)
    want = np.array([math.exp(v) / (1 + math.exp(v)) for v in x])
    precision = 1e-6 if dtype == np.float32 else 1e-14
    np.testing.assert_allclose(ops.sigmoid(x).numpy(), want, rtol=precision)


def test_activations_stay_finite_far_out(dtype):
    x = np.array([-1e4, -200.0, 200.0, 1e4], dtype)
    assert ops.sigmoid(x).tolist() == [0, 0, 1, 1] or dtype == np.float64
    np.testing.assert_allclose(ops.sigmoid(x).numpy(), [0, 0, 1, 1], atol=1e-80)
    for activation in (ops.relu, ops.softplus, ops.silu, ops.gelu, lambda v: ops.gelu(v, "tanh")):
        np.testing.assert_allclose(activation(x).numpy(), [0, 0, 200, 1e4], atol=1e-80)
    assert ops.tanh(x).tolist() == [-1, -1, 1, 1]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_half_precision_gelu_does_not_overflow_inside(half, approximate):
    x = Tensor(np.array([-400, -3, 3, 400], half), requires_grad=True)
    y = ops.gelu(x, approximate)
    np.testing.assert_allclose(y.numpy().astype(float), [0, -0.004, 2.996, 400], atol=2e-2)
    y.sum().backward()
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy().astype(float), [0, -0.012, 1.012, 1], atol=1e-2)


def test_poles_warn_as_numpy_does_and_give_infinity():
    with pytest.warns(RuntimeWarning, match="divide by zero"):
        assert ops.log([0.0]).tolist() == [-math.inf]
    with pytest.warns(RuntimeWarning, match="divide by zero"):
        assert ops.rsqrt([0.0]).tolist() == [math.inf]
    with pytest.warns(RuntimeWarning, match="overflow"):
        assert ops.exp([1000.0]).tolist() == [math.inf]
    with pytest.warns(RuntimeWarning, match="invalid"):
        assert math.isnan(ops.sqrt([-1.0]).tolist()[0])


def test_powers_at_zero_and_one():
    x = Tensor([0.0, 1.0, -2.0])
    assert (x**0).tolist() == [1.0, 1.0, 1.0]
    assert (x**1).tolist() == x.tolist()
    assert (x**1) is not x
    assert (2**x).tolist() == [1.0, 2.0, 0.25]
    assert (x ** Tensor(3.0)).tolist() == [0.0, 1.0, -8.0]


def test_gelu_refuses_an_unknown_approximation():
    with pytest.raises(ValueError, match=r"'none' or 'tanh'.*'erf'"):
        ops.gelu([1.0], "erf")


# --- piecewise ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [(-1, 2), (None, 0.5), (0.5, None), (None, None), (1, 1)])
def test_clip_equals_numpy(bounds, layout, dtype, rng):
    for shape in SHAPES:
        x = layout(rng.normal(size=shape).astype(dtype))
        y = ops.clip(x, *bounds)
        assert y.dtype == dtype
        np.testing.assert_array_equal(y.numpy(), np.clip(x, *bounds))


def test_clip_of_integers_keeps_them_unless_a_bound_is_a_fraction():
    x = Tensor([1, 5, 9])
    assert ops.clip(x, 2, 6).dtype == np.int64
    y = ops.clip(x, 1.5, None)
    assert y.dtype == np.float32
    assert y.tolist() == [1.5, 5.0, 9.0]


def test_clip_passes_nan_and_refuses_crossed_bounds():
    assert math.isnan(ops.clip([math.nan], 0, 1).tolist()[0])
    with pytest.raises(ValueError, match=r"min=2.*max=1"):
        ops.clip([1.0], 2, 1)


def test_nan_wins_in_maximum_and_minimum():
    a, b = np.array([math.nan, 1.0]), np.array([1.0, math.nan])
    assert np.isnan(ops.maximum(a, b).numpy()).all()
    assert np.isnan(ops.minimum(a, b).numpy()).all()


def test_where_equals_numpy_under_broadcasting(layout, dtype, rng):
    for mask, left, right in [((3, 4), (3, 4), (3, 4)), ((3, 1), (4,), ()), ((), (2,), (2, 1)),
                              ((0, 1), (3,), ()), ((2, 3), (), ())]:  # fmt: skip
        m = layout(rng.random(mask) > 0.5)
        a, b = (layout(rng.normal(size=s).astype(dtype)) for s in (left, right))
        for condition in (m, Tensor(m)):
            y = ops.where(condition, a, b)
            assert y.dtype == dtype
            np.testing.assert_array_equal(y.numpy(), np.where(m, a, b))


def test_where_promotes_and_takes_scalars():
    mask = Tensor([True, False])
    assert ops.where(mask, 1, Tensor([2.5, 3.5])).tolist() == [1.0, 3.5]
    assert ops.where(mask, Tensor([1, 2]), Tensor(np.ones(2, np.float16))).dtype == np.float16
    assert ops.where(mask, 1.0, 0.0).dtype == np.float32
    assert ops.where([True, False], [1, 2], [3, 4]).tolist() == [1, 4]


def test_masked_fill_equals_its_definition(layout, dtype, rng):
    for shape, hidden in [((3, 4), (3, 4)), ((3, 4), (4,)), ((2, 3), ()), ((), ()), ((0, 2), (2,))]:
        x, m = layout(rng.normal(size=shape).astype(dtype)), layout(rng.random(hidden) > 0.5)
        y = ops.masked_fill(x, m, -math.inf)
        assert y.dtype == dtype
        np.testing.assert_array_equal(y.numpy(), np.where(m, dtype.type(-math.inf), x))


def test_masks_must_be_boolean_and_fit():
    x = Tensor([1.0, 2.0])
    with pytest.raises(TypeError, match=r"boolean.*int64"):
        ops.where(Tensor([1, 0]), x, x)
    with pytest.raises(TypeError, match=r"boolean.*float32"):
        ops.masked_fill(x, x, 0.0)
    with pytest.raises(ValueError, match=r"\(2,3\)|\(2, 3\)"):
        ops.masked_fill(x, np.ones((2, 3), bool), 0.0)
