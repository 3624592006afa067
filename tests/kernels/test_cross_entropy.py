"""The cross-entropy kernels against float64, on both sides of every branch."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from tinygrad_llm import Tensor, ops
from tinygrad_llm.backend import namespace, to_device
from tinygrad_llm.kernels import cross_entropy, matmul

INF = math.inf

# Blocks that hold whole rows of up to 32 classes, and blocks that walk along them.
WHOLE = {"ROWS": 4, "BLOCK": 32, "num_warps": 1}
ONLINE = {"ROWS": 2, "BLOCK": 16, "num_warps": 1}
CONFIGS = pytest.mark.parametrize("config", [WHOLE, ONLINE], ids=["whole rows", "online"])


def soft_target(target, classes, weight, smoothing) -> np.ndarray:
    """q, a row per example."""
    q = np.full((target.size, classes), smoothing / classes)
    q[np.arange(target.size), target] += 1 - smoothing
    return q if weight is None else q * weight


def log_softmax(x) -> np.ndarray:
    with np.errstate(all="ignore"):
        z = x - x.max(axis=1, keepdims=True)
        return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def reference(x, target, counted, weight=None, smoothing=0.0) -> np.ndarray:
    """The losses in float64."""
    q = soft_target(np.where(counted, target, 0), x.shape[1], weight, smoothing)
    with np.errstate(all="ignore"):
        terms = np.where(q == 0, 0, q * log_softmax(x))
    return np.where(counted, -terms.sum(axis=1), 0)


def gradient(g, x, target, counted, weight=None, smoothing=0.0) -> np.ndarray:
    q = soft_target(np.where(counted, target, 0), x.shape[1], weight, smoothing)
    dx = g[:, None] * (q.sum(axis=1, keepdims=True) * np.exp(log_softmax(x)) - q)
    return np.where(counted[:, None], dx, 0)


class Rows:
    """Logits, targets and what else a call takes: as arrays for the kernel, wide for NumPy."""

    def __init__(
        self, array, rng, rows, classes, dtype: Any = np.float32, weighted=False, place=None
    ):
        place = place or (lambda a: a)
        self.x = place(array(3 * rng.normal(size=(rows, classes)), dtype))
        self.g = place(array(rng.normal(size=rows), dtype))
        self.target = place(array(rng.integers(0, classes, size=rows), np.int64))
        self.counted = place(array(rng.random(rows) < 0.7))
        self.weight: Any = place(array(rng.random(classes), dtype)) if weighted else None

    def check(self, close, wide, config=None, smoothing=0.0) -> None:
        options = {"smoothing": smoothing, "config": config}
        inputs = (self.x, self.target, self.counted, self.weight)
        x, target, counted = wide(self.x), *(to_device(a, "cpu") for a in inputs[1:3])
        rest = (target, counted, None if self.weight is None else wide(self.weight), smoothing)
        y, saved = cross_entropy.forward(*inputs, **options)
        assert y.dtype == self.x.dtype
        close(y, reference(x, *rest), times=2)
        dx = cross_entropy.backward(self.g, *saved, **options)
        assert dx.dtype == self.x.dtype
        assert dx.flags.c_contiguous
        close(dx, gradient(wide(self.g), x, *rest), times=2)


@CONFIGS
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_formula_and_its_gradient(
    config, smoothing, weighted, dtype, rng, array, close, wide
) -> None:
    Rows(array, rng, 7, 29, dtype, weighted).check(close, wide, config, smoothing)


@pytest.mark.parametrize("half", [np.float16, "bfloat16"])
def test_losses_of_half_precision_in_float32(half, rng, array, wide) -> None:
    """Whose gradient may be larger than float16 holds."""
    dtype = array([0.0]).astype(half).dtype
    case = Rows(array, rng, 7, 29, dtype)
    y, saved = cross_entropy.forward(case.x, case.target, case.counted, dtype=np.float32)
    rest = [to_device(a, "cpu") for a in (case.target, case.counted)]
    assert y.dtype == np.float32
    np.testing.assert_allclose(wide(y), reference(wide(case.x), *rest), rtol=1e-5)
    g = array(np.full(7, 1e5), np.float32)
    expected = gradient(np.full(7, 1e5), wide(case.x), *rest)
    dx = cross_entropy.backward(g, *saved)
    assert dx.dtype == dtype
    fits = np.abs(expected) < 6e4
    np.testing.assert_allclose(wide(dx)[fits], expected[fits], rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("classes", [1, 2, 15, 16, 17, 31, 32, 33, 67])
@pytest.mark.parametrize("rows", [1, 5])
def test_sizes_around_a_block(rows, classes, rng, array, close, wide) -> None:
    for config in (WHOLE, ONLINE):
        Rows(array, rng, rows, classes, weighted=True).check(close, wide, config, 0.1)


def test_the_chosen_configuration_serves_any_shape(rng, array, close, wide) -> None:
    for rows, classes in [(1, 1), (3, 70001), (700, 3), (2, 4097)]:
        Rows(array, rng, rows, classes).check(close, wide)


@CONFIGS
def test_any_strides(config, layout, dtype, rng, array, close, wide) -> None:
    Rows(array, rng, 6, 20, dtype, True, layout).check(close, wide, config, 0.1)


@CONFIGS
def test_the_same_as_the_op(config, rng, array) -> None:
    """The class in ops/ and the kernels are two implementations of one thing."""
    rows = Rows(array, rng, 9, 40)
    target = np.where(to_device(rows.counted, "cpu"), to_device(rows.target, "cpu"), -100)
    weight = rng.random(40).astype(np.float32)
    x = Tensor(to_device(rows.x, "cpu"), requires_grad=True)
    expected = ops.cross_entropy(x, target, weight, reduction="none", label_smoothing=0.1)
    expected.backward(Tensor(to_device(rows.g, "cpu")))
    inputs = (rows.x, rows.target, rows.counted, array(weight))
    y, saved = cross_entropy.forward(*inputs, smoothing=0.1, config=config)
    dx = cross_entropy.backward(rows.g, *saved, smoothing=0.1, config=config)
    np.testing.assert_allclose(to_device(y, "cpu"), expected.data, rtol=2e-6)
    assert x.grad is not None
    np.testing.assert_allclose(to_device(dx, "cpu"), x.grad.data, rtol=1e-5, atol=1e-7)


@CONFIGS
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_rows_that_do_not_count_are_not_read(config, smoothing, rng, array, wide) -> None:
    """Neither their logits nor their targets, which may be any number."""
    rows = Rows(array, rng, 5, 20)
    rows.x[::2] = math.nan
    rows.target[::2] = -100
    rows.counted[:] = array([False, True, False, True, False])
    inputs = (rows.x, rows.target, rows.counted)
    y, saved = cross_entropy.forward(*inputs, smoothing=smoothing, config=config)
    dx = cross_entropy.backward(rows.g, *saved, smoothing=smoothing, config=config)
    assert (wide(y)[::2] == 0).all()
    assert (wide(y)[1::2] > 0).all()
    assert (wide(dx)[::2] == 0).all()
    assert (wide(dx)[1::2] != 0).all()


@CONFIGS
def test_infinities(config, dtype, rng, array, close, wide) -> None:
    rows = Rows(array, rng, 6, 20, dtype)
    rows.counted[:] = True
    rows.target[:] = 3
    rows.x[0, 5:] = -INF  # impossible classes, whole blocks of them
    rows.x[1, :18] = -INF  # with the target among them: an infinite loss, a finite gradient
    rows.x[2, 7] = INF
    rows.x[3] = -INF  # no class is possible
    rows.x[4, 9] = math.nan
    y, saved = cross_entropy.forward(rows.x, rows.target, rows.counted, config=config)
    dx = cross_entropy.backward(rows.g, *saved, config=config)
    rest = (to_device(rows.target, "cpu"), to_device(rows.counted, "cpu"))
    close(y, reference(wide(rows.x), *rest))
    close(dx, gradient(wide(rows.g), wide(rows.x), *rest))
    assert wide(y)[1] == INF
    assert np.isfinite(wide(dx)[:2]).all()
    assert np.isnan(wide(y)[2:5]).all()
    assert np.isnan(wide(dx)[2:5]).all()
    assert np.isfinite(wide(y)[[0, 5]]).all()


@CONFIGS
def test_smoothing_gives_impossible_classes_an_infinite_loss(config, rng, array, wide) -> None:
    rows = Rows(array, rng, 2, 20)
    rows.counted[:] = True
    rows.target[:] = array([3, 4])
    rows.x[0, 3] = -INF
    rows.x[1, 3] = -INF
    y, _ = cross_entropy.forward(rows.x, rows.target, rows.counted, smoothing=0.1, config=config)
    assert (wide(y) == INF).all()


@CONFIGS
def test_logits_far_from_zero_keep_the_loss_exact(config, rng, array, close, wide) -> None:
    rows = Rows(array, rng, 4, 40)
    rows.x += 4096
    y, _ = cross_entropy.forward(rows.x, rows.target, rows.counted, smoothing=0.1, config=config)
    rest = (to_device(rows.target, "cpu"), to_device(rows.counted, "cpu"))
    close(y, reference(wide(rows.x), *rest, smoothing=0.1))


def test_a_class_that_there_is_not_makes_nan(rng, array, wide) -> None:
    rows = Rows(array, rng, 3, 20)
    rows.counted[:] = True
    rows.target[:] = array([-1, 5, 20])
    y, _ = cross_entropy.forward(rows.x, rows.target, rows.counted, config=WHOLE)
    assert np.isnan(wide(y)).tolist() == [True, False, True]


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.int64])
def test_any_integers_are_targets(kind, rng, array, close, wide) -> None:
    rows = Rows(array, rng, 5, 20)
    rows.target = array(to_device(rows.target, "cpu"), kind)
    rows.check(close, wide, WHOLE)


@CONFIGS
def test_the_gradient_over_the_logits(config, layout, dtype, rng, array, wide) -> None:
    rows = Rows(array, rng, 5, 20, dtype, place=layout)
    inputs = (rows.x, rows.target, rows.counted)
    _, saved = cross_entropy.forward(*inputs, smoothing=0.1, config=config)
    expected = wide(cross_entropy.backward(rows.g, *saved, smoothing=0.1, config=config))
    options = {"smoothing": 0.1, "config": config, "in_place": True}
    if rows.x.strides[0] == 0:
        with pytest.raises(ValueError, match="leave in_place out"):
            cross_entropy.backward(rows.g, *saved, **options)
        return
    dx = cross_entropy.backward(rows.g, *saved, **options)
    assert dx is rows.x
    np.testing.assert_array_equal(wide(dx), expected)


def test_the_neighbours_of_a_view_stay_as_they_are(rng, array, wide) -> None:
    whole = array(np.full((7, 23), 5.0), np.float32)
    rows = Rows(array, rng, 5, 20)
    view = whole[1:6, 2:22]
    view[...] = rows.x
    _, saved = cross_entropy.forward(view, rows.target, rows.counted, config=ONLINE)
    cross_entropy.backward(rows.g, *saved, in_place=True, config=ONLINE)
    view[...] = 5
    assert (wide(whole) == 5).all()


def test_offsets_of_64_bits(rng, array, close, wide, monkeypatch) -> None:
    monkeypatch.setattr(cross_entropy, "needs_int64", lambda *arrays: True)
    Rows(array, rng, 5, 35, weighted=True).check(close, wide, ONLINE, 0.1)


def test_no_rows(rng, array) -> None:
    rows = Rows(array, rng, 0, 5)
    y, saved = cross_entropy.forward(rows.x, rows.target, rows.counted)
    assert y.shape == (0,)
    assert cross_entropy.backward(rows.g, *saved).shape == (0, 5)
    assert cross_entropy.backward(rows.g, *saved, in_place=True) is rows.x


def test_what_is_refused(rng, array) -> None:
    rows = Rows(array, rng, 4, 5)
    x, target, counted = rows.x, rows.target, rows.counted
    with pytest.raises(TypeError, match="got float64"):
        cross_entropy.forward(x.astype(np.float64), target, counted)
    with pytest.raises(ValueError, match="at least one class"):
        cross_entropy.forward(x[:, :0], target, counted)
    with pytest.raises(TypeError, match="integer targets"):
        cross_entropy.forward(x, target.astype(np.float32), counted)
    with pytest.raises(TypeError, match="as bool"):
        cross_entropy.forward(x, target, target)
    with pytest.raises(ValueError, match="each of 4 rows"):
        cross_entropy.forward(x, target[:3], counted)
    with pytest.raises(ValueError, match=r"class weights \(5,\)"):
        cross_entropy.forward(x, target, counted, rows.g)
    _, saved = cross_entropy.forward(x, target, counted)
    with pytest.raises(ValueError, match=r"gradient of shape \(4,\)"):
        cross_entropy.backward(rows.g[:2], *saved)


# --- linear + cross-entropy -----------------------------------------------------------------------


class Linear(Rows):
    """A last layer: hidden states and the weight beside the targets."""

    def __init__(self, array, rng, rows, classes, size, dtype, biased=False, weighted=False):
        super().__init__(array, rng, rows, classes, dtype, weighted)
        self.hidden = array(rng.normal(size=(rows, size)), dtype)
        self.matrix = array(rng.normal(size=(classes, size)), dtype)
        self.bias = array(rng.normal(size=classes), dtype) if biased else None

    def run(self, **options) -> Any:
        return cross_entropy.linear_forward(
            *(self.hidden, self.matrix, self.target, self.counted, self.bias, self.weight),
            **options,
        )

    def expected(self, wide, smoothing, reduction):
        h, w = wide(self.hidden), wide(self.matrix)
        z = h @ w.T + (0 if self.bias is None else wide(self.bias))
        target, counted = (to_device(a, "cpu") for a in (self.target, self.counted))
        weight = None if self.weight is None else wide(self.weight)
        rest = (target, counted, weight, smoothing)
        total = (counted * (1 if weight is None else weight[target])).sum()
        share = (1 / total if total else 0) if reduction == "mean" else 1
        dz = gradient(np.full(len(z), share), z, *rest)
        return share * reference(z, *rest).sum(), dz @ w, dz.T @ h, dz.sum(axis=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk", [None, 9, 4, 1])
def test_linear(chunk, reduction, dtype, rng, array, close, wide) -> None:
    """In one chunk, in one that is just full, in several with a short last one, row by row."""
    for biased, smoothing in itertools.product([False, True], [0.0, 0.1]):
        case = Linear(array, rng, 9, 20, 5, dtype, biased, weighted=biased)
        options = {"smoothing": smoothing, "reduction": reduction}
        y, saved = case.run(chunk=chunk, **options)
        expected = case.expected(wide, **options)
        assert y.shape == ()
        assert y.dtype == np.float32
        # Logits near 8 are rounded to the dtype: that is the loss's error.
        times = 1 if dtype == np.float32 else 4
        tolerance = times * (3e-6 if dtype == np.float32 else 1e-2)
        np.testing.assert_allclose(wide(y), expected[0], rtol=tolerance)
        found = cross_entropy.linear_backward(array([0.5], np.float32), *saved)
        for actual, wanted in zip(found, expected[1:], strict=True):
            if actual is not None:
                assert actual.dtype == dtype
                close(actual, 0.5 * wanted, times=2 * times)
        assert (found[2] is None) == (not biased)


@pytest.mark.parametrize("biased", [False, True])
def test_linear_with_our_own_products(biased, dtype, rng, array, close, wide) -> None:
    case = Linear(array, rng, 9, 20, 5, dtype, biased)
    y, saved = case.run(chunk=5, product=matmul.matmul)
    expected = case.expected(wide, 0.0, "mean")
    tolerance = 3e-6 if dtype == np.float32 else 4e-2
    np.testing.assert_allclose(wide(y), expected[0], rtol=tolerance)
    found = cross_entropy.linear_backward(array([1.0], np.float32), *saved)
    for actual, wanted in zip(found[: 2 + biased], expected[1:], strict=False):
        close(actual, wanted, times=1 if dtype == np.float32 else 8)


def test_linear_never_makes_all_the_logits(rng, array) -> None:
    case = Linear(array, rng, 10, 20, 3, np.float32)
    shapes = []

    def product(a, b, dtype=None):
        shapes.append((a.shape[0], b.shape[1]))
        return a @ b

    case.run(chunk=4, product=product)
    logits = [shape for shape in shapes if shape[1] == 20]
    assert logits == [(4, 20), (4, 20), (2, 20)]
    assert [shape for shape in shapes if shape[0] == 20] == [(20, 3)] * 3


def test_linear_without_gradients_gives_the_loss_alone(rng, array, wide) -> None:
    case = Linear(array, rng, 5, 20, 3, np.float32, biased=True)
    y, saved = case.run(gradients=False, chunk=2)
    assert saved == ()
    assert wide(y) == wide(case.run(chunk=2)[0])


def test_linear_where_nothing_counts(rng, array, wide) -> None:
    case = Linear(array, rng, 4, 20, 3, np.float32, weighted=True)
    case.counted[:] = False
    case.target[:] = -100
    y, saved = case.run()
    assert wide(y) == 0
    dhidden, dweight, _ = cross_entropy.linear_backward(array([1.0], np.float32), *saved)
    assert (wide(dhidden) == 0).all()
    assert (wide(dweight) == 0).all()


def test_linear_of_no_rows(rng, array, wide) -> None:
    case = Linear(array, rng, 0, 20, 3, np.float32)
    y, saved = case.run()
    assert wide(y) == 0
    assert saved[1].shape == (20, 3)


def test_linear_keeps_small_gradients_of_float16(rng, array, close, wide) -> None:
    """Of a mean over many, scaled up before the backward: each would be 0 in float16."""
    case = Linear(array, rng, 6, 20, 3, np.float16)
    _, (*sums, _, weight) = case.run(reduction="sum")
    saved: Any = (*sums, array([2.0**-30], np.float32), weight)
    _, dhidden, dweight, _ = case.expected(wide, 0.0, "sum")
    found = cross_entropy.linear_backward(array([2.0**30], np.float32), *saved)
    close(found[0], dhidden, times=2)
    close(found[1], dweight, times=2)


def test_linear_twice_is_the_same_to_the_bit(rng, array, wide) -> None:
    case = Linear(array, rng, 9, 40, 5, np.float32)
    first, second = (case.run(chunk=4)[1] for _ in range(2))
    for a, b in zip(first[:2], second[:2], strict=True):
        assert namespace(a).array_equal(a, b)


def test_what_linear_refuses(rng, array) -> None:
    case = Linear(array, rng, 4, 5, 3, np.float32)
    with pytest.raises(ValueError, match="'mean' or 'sum'"):
        case.run(reduction="none")
    with pytest.raises(ValueError, match="at least one row"):
        case.run(chunk=0)
    case.bias = case.g
    with pytest.raises(ValueError, match=r"bias \(5,\)"):
        case.run()
    case.bias, case.matrix = None, case.matrix[:, :2]
    with pytest.raises(ValueError, match=r"hidden \(N, D\) and weight \(C, D\)"):
        case.run()
    case.matrix = case.hidden.astype(np.float16)
    with pytest.raises(TypeError, match="one dtype"):
        case.run()
