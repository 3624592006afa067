from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinygrad_llm import Tensor, ops

INF = math.inf
logits = hnp.arrays(
    np.float64, hnp.array_shapes(max_dims=3, max_side=5), elements=st.floats(-30, 30)
)


def _softmax(x, axis):
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


# --- softmax and its logarithms -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis"), [((3, 4), -1), ((3, 4), 0), ((2, 3, 4), 1), ((5,), 0), ((2, 1), -1)]
)
def test_softmax_and_its_logarithms_are_their_formulas(shape, axis, layout, dtype, rng, close):
    x = layout(rng.normal(size=shape).astype(dtype) * 3)
    want = _softmax(x.astype(np.float64), axis)
    total = np.log(np.exp(x.astype(np.float64)).sum(axis=axis))
    for y in (ops.softmax(x, axis), ops.log_softmax(x, axis), ops.logsumexp(x, axis)):
        assert y.dtype == dtype
    close(ops.softmax(Tensor(x), axis), want)
    close(Tensor(x).softmax(axis), want)
    close(ops.log_softmax(Tensor(x), axis), np.log(want))
    close(ops.logsumexp(Tensor(x), axis), total)
    close(ops.logsumexp(x, axis, keepdims=True), np.expand_dims(total, axis))


def test_logsumexp_takes_several_axes(layout, rng, close):
    x = layout(rng.normal(size=(2, 3, 4)))
    close(ops.logsumexp(x, None), np.log(np.exp(x).sum()))
    close(ops.logsumexp(x, (0, -1)), np.log(np.exp(x).sum((0, 2))))
    close(ops.logsumexp(x, None, keepdims=True), np.log(np.exp(x).sum(keepdims=True)))


@given(logits, st.floats(-1000, 1000))
def test_softmax_sums_to_one_and_does_not_see_a_shift(x, shift):
    y = ops.softmax(x).numpy()
    np.testing.assert_allclose(y.sum(-1), 1, rtol=1e-12)
    np.testing.assert_allclose(ops.softmax(x + shift).numpy(), y, rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(np.exp(ops.log_softmax(x).numpy()), y, rtol=1e-12)
    np.testing.assert_allclose(
        ops.logsumexp(x + shift).numpy(), ops.logsumexp(x).numpy() + shift, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("offset", [1e4, -1e4, 3e38])
def test_extreme_logits_lose_nothing(offset):
    x = np.array([offset, offset], np.float32)
    assert ops.softmax(x).tolist() == [0.5, 0.5]
    np.testing.assert_allclose(ops.log_softmax(x).numpy(), -math.log(2), rtol=1e-6)
    np.testing.assert_allclose(ops.logsumexp(x).numpy(), offset, rtol=1e-4)
    np.testing.assert_array_equal(ops.softmax(np.array([-1e4, 1e4], np.float32)).numpy(), [0, 1])


def test_rows_of_minus_infinity():
    x = np.array([[-INF, -INF], [-INF, 0.0], [1.0, 1.0]], np.float32)
    assert ops.softmax(x).tolist() == [[0, 0], [0, 1], [0.5, 0.5]]
    assert ops.log_softmax(x).numpy()[:2].tolist() == [[-INF, -INF], [-INF, 0]]
    np.testing.assert_allclose(ops.logsumexp(x).numpy(), [-INF, 0, 1 + math.log(2)], rtol=1e-6)


@pytest.mark.parametrize("function", [ops.softmax, ops.log_softmax, ops.logsumexp])
def test_rows_of_minus_infinity_have_no_nan_in_their_gradient(function):
    x = Tensor(np.array([[-INF, -INF], [-INF, 0.0]]), requires_grad=True)
    ops.where(ops.isfinite(y := function(x)), y, 0.0).sum().backward()
    assert x.grad is not None
    assert np.isfinite(x.grad.numpy()).all()


def test_empty_inputs():
    for shape in ((0, 3), (2, 0), (0, 0)):
        assert ops.softmax(np.zeros(shape)).shape == shape
        assert ops.log_softmax(np.zeros(shape)).shape == shape
    assert ops.logsumexp(np.zeros((0, 3))).shape == (0,)
    assert ops.logsumexp(np.zeros((2, 0))).tolist() == [-INF, -INF]
    assert ops.logsumexp(np.zeros((2, 0)), None).item() == -INF


def test_half_precision_is_kept_and_summed_in_float32(half):
    x = np.zeros(1024, half)
    assert ops.softmax(x).dtype == half
    np.testing.assert_allclose(ops.softmax(x).numpy().astype(float), 1 / 1024, rtol=1e-2)
    np.testing.assert_allclose(ops.log_softmax(x).numpy().astype(float), -math.log(1024), rtol=1e-2)
    assert ops.logsumexp(x).dtype == half
    assert abs(float(ops.logsumexp(x).item()) - math.log(1024)) < 0.05


def test_half_precision_adds_more_than_float16_holds(half):
    x = Tensor(np.zeros(70_000, half), requires_grad=True)
    y = ops.softmax(x)
    np.testing.assert_allclose(y.numpy().astype(float), 1 / 70_000, rtol=0.05)
    y.backward(Tensor(np.ones(70_000, half)))  # Σ g ⊙ y = 1
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy().astype(float), 0, atol=1e-6)


def test_integers_become_float32():
    for function in (ops.softmax, ops.log_softmax, ops.logsumexp):
        assert function(Tensor([1, 2, 3])).dtype == np.float32


def test_an_axis_that_is_not_there_is_refused():
    for function in (ops.softmax, ops.log_softmax, ops.logsumexp):
        with pytest.raises(ValueError, match="axis 2"):
            function(np.ones((2, 3)), 2)


# --- cross-entropy against PyTorch's documentation ------------------------------------------------


def _documented(x, target, weight, ignore_index, reduction, smoothing) -> Any:
    """torch.nn.CrossEntropyLoss, class indices, element by element in float64."""
    n, classes = x.shape
    w = np.ones(classes) if weight is None else weight
    log_p = np.log(_softmax(x, 1))
    losses, total = np.zeros(n), 0.0
    for i, t in enumerate(target):
        if t == ignore_index:
            continue
        hit = -w[t] * log_p[i, t]
        spread = -sum(w[c] * log_p[i, c] for c in range(classes)) / classes
        losses[i] = (1 - smoothing) * hit + smoothing * spread
        total += w[t]
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / total if total else 0.0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_is_pytorchs(
    reduction, ignore_index, weighted, smoothing, layout, dtype, rng, close
):
    x = layout(rng.normal(size=(6, 4)).astype(dtype))
    target = layout(np.array([0, 2, 3, -100, 1, 2]) if ignore_index == -100 else
                    np.array([0, 2, 3, 3, 1, 2]))  # fmt: skip
    weight = np.array([0.5, 2.0, 0.0, 1.5]) if weighted else None
    y = ops.cross_entropy(
        Tensor(x), target, weight, ignore_index, reduction, label_smoothing=smoothing
    )
    assert y.dtype == dtype
    want = _documented(x.astype(np.float64), target, weight, ignore_index, reduction, smoothing)
    close(y, want)


def test_cross_entropy_takes_leading_axes(rng, close):
    x, target = rng.normal(size=(2, 3, 4)), rng.integers(0, 4, size=(2, 3))
    each = _documented(x.reshape(6, 4), target.reshape(6), None, -100, "none", 0.0)
    close(ops.cross_entropy(x, target, reduction="none"), each.reshape(2, 3))
    close(ops.cross_entropy(x, target), each.mean())
    close(ops.cross_entropy(x[0, 0], target[0, 0]), each[0])
    for kind in (np.uint8, np.int32):
        close(ops.cross_entropy(x, Tensor(target.astype(kind))), each.mean())
    close(ops.cross_entropy(x, target.tolist()), each.mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_soft_targets_are_pytorchs(reduction, weighted, smoothing, layout, dtype, rng, close):
    x = layout(rng.normal(size=(5, 4)).astype(dtype))
    q = layout(_softmax(rng.normal(size=(5, 4)), 1))
    weight = np.array([0.5, 2.0, 0.0, 1.5])
    y = ops.cross_entropy(x, q, weight if weighted else None, -100, reduction, smoothing)
    assert y.dtype == dtype
    smooth = (1 - smoothing) * q + smoothing / 4
    terms = smooth * np.log(_softmax(x.astype(np.float64), 1)) * (weight if weighted else 1)
    losses = -terms.sum(1)
    close(y, {"mean": losses.mean(), "sum": losses.sum(), "none": losses}[reduction])


def test_a_one_hot_distribution_is_a_class(rng, close):
    x, target = rng.normal(size=(5, 4)), np.array([0, 3, 1, 1, 2])
    close(ops.cross_entropy(x, np.eye(4)[target]), ops.cross_entropy(x, target).numpy())


def test_nothing_counted_costs_nothing():
    x = Tensor(np.ones((3, 4), np.float32), requires_grad=True)
    y = ops.cross_entropy(x, [-100] * 3)
    assert y.item() == 0
    y.backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0] * 4] * 3
    assert ops.cross_entropy(x, [0, 0, 1], weight=[0.0, 0.0, 1.0, 1.0]).item() == 0
    assert ops.cross_entropy(np.zeros((0, 4)), np.zeros(0, int)).item() == 0
    assert ops.cross_entropy(np.zeros((0, 4)), np.zeros((0, 4))).item() == 0
    assert ops.cross_entropy(np.zeros((0, 4)), np.zeros(0, int), reduction="none").shape == (0,)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_extreme_logits_give_finite_losses_and_exact_gradients(offset):
    x = Tensor(np.array([[0, 0], [1e4, -1e4]], np.float32) + np.float32(offset), requires_grad=True)
    y = ops.cross_entropy(x, [0, 1], reduction="none")
    np.testing.assert_allclose(y.numpy(), [math.log(2), 2e4], rtol=1e-6)
    y.sum().backward()
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), [[-0.5, 0.5], [1, -1]], rtol=1e-6)


def test_masked_classes_are_classes_of_probability_zero():
    x = Tensor(np.array([[1.0, -INF, 1.0]]), requires_grad=True)
    y = ops.cross_entropy(x, [0])
    assert math.isclose(y.item(), math.log(2))
    y.backward()
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), [[-0.5, 0, 0.5]])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_half_precision_losses(smoothing, half):
    x = Tensor(np.zeros((4, 1024), half), requires_grad=True)
    y = ops.cross_entropy(x, [0, 1, 2, -100], label_smoothing=smoothing)
    assert y.dtype == half
    assert abs(float(y.item()) - math.log(1024)) < 0.05
    y.backward()
    assert x.grad is not None
    assert x.grad.dtype == half
    total = x.grad.numpy().astype(float).sum(1)
    np.testing.assert_allclose(total, 0, atol=5e-3)


@pytest.mark.parametrize("soft", [False, True])
def test_a_mean_in_half_precision_is_there_where_its_sum_is_too_large(soft, half):
    x = np.zeros((30_000, 20), half)
    target = np.full(x.shape, 1 / 20, half) if soft else np.zeros(30_000, int)
    mean = ops.cross_entropy(x, target)
    assert mean.dtype == half
    assert float(mean.item()) == pytest.approx(math.log(20), rel=0.02)
    with np.errstate(over="ignore"):
        total = ops.cross_entropy(x, target, reduction="sum")
    assert total.dtype == half
    assert np.isinf(float(total.item())) == (half == np.float16)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("soft", [False, True])
def test_losses_of_half_precision_in_float32(reduction, soft, half, rng):
    """Their sum may leave float16; their gradient, scaled up by 2¹⁶, need not."""
    values, target = rng.normal(size=(7, 5)).astype(half), rng.integers(0, 5, 7)
    x = Tensor(values, requires_grad=True)
    wide = Tensor(values.astype(np.float32), requires_grad=True)
    found = []
    for logits in (x, wide):
        t = np.eye(5, dtype=logits.dtype)[target] if soft else target
        y = ops.cross_entropy(logits, t, reduction=reduction, dtype="float32")
        assert y.dtype == np.float32
        y.backward(Tensor(np.full(y.shape, 2.0**14, np.float32)))
        assert logits.grad is not None
        found.append((y.numpy(), logits.grad.numpy().astype(np.float64)))
    assert x.grad is not None
    assert x.grad.dtype == half
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-6)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=0.02, atol=10)
    y = ops.cross_entropy(
        np.zeros((30_000, 20), half), np.zeros(30_000, int), reduction="sum", dtype="float32"
    )
    assert y.item() == pytest.approx(30_000 * math.log(20), rel=1e-5)


def test_cross_entropy_refuses_what_does_not_fit():
    x = Tensor(np.ones((2, 3)))
    with pytest.raises(ValueError, match="target is 3, but the logits have classes 0 to 2"):
        ops.cross_entropy(x, [0, 3])
    with pytest.raises(ValueError, match="target is -1"):
        ops.cross_entropy(x, [-1, 0])
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3,\)"):
        ops.cross_entropy(x, [0, 1, 2])
    with pytest.raises(ValueError, match=r"distribution.*\(2, 3\) and target \(2, 2\)"):
        ops.cross_entropy(x, np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"weight \(3,\), got \(2,\)"):
        ops.cross_entropy(x, [0, 1], weight=[1.0, 2.0])
    with pytest.raises(ValueError, match="'mean', 'sum' or 'none', got 'avg'"):
        ops.cross_entropy(x, [0, 1], reduction="avg")
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1"):
        ops.cross_entropy(x, [0, 1], label_smoothing=1)
    with pytest.raises(ValueError, match=r"\(\) and \(\)"):
        ops.cross_entropy(1.0, 0)


# --- binary cross-entropy -------------------------------------------------------------------------


def _binary(p, z):
    return -z * np.log(p) - (1 - z) * np.log(1 - p)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_binary_cross_entropy_is_its_formula(reduction, weighted, layout, dtype, rng, close):
    x = layout(rng.normal(size=(3, 4)).astype(dtype))
    z = layout(rng.uniform(size=(3, 4)))
    weight = rng.uniform(size=(4,)) if weighted else None
    p = 1 / (1 + np.exp(-x.astype(np.float64)))
    losses = _binary(p, z) * (1 if weight is None else weight)
    want = {"mean": losses.mean(), "sum": losses.sum(), "none": losses}[reduction]
    for y in (
        ops.binary_cross_entropy(p.astype(dtype), z, weight, reduction),
        ops.binary_cross_entropy_with_logits(x, z, weight, reduction=reduction),
    ):
        assert y.dtype == dtype
        close(y, want, times=4)


def test_positive_weights_count_positive_examples_more(layout, dtype, rng, close):
    x, z = layout(rng.normal(size=(3, 4)).astype(dtype)), layout(rng.uniform(size=(3, 4)))
    wide = x.astype(np.float64)
    log_p, log_q = -np.log1p(np.exp(-wide)), -np.log1p(np.exp(wide))
    for positive in (3.0, np.array([0.5, 1, 2, 3]), [0.5, 1.0, 2.0, 3.0]):
        y = ops.binary_cross_entropy_with_logits(x, z, pos_weight=positive, reduction="none")
        assert y.dtype == dtype
        close(y, -np.asarray(positive) * z * log_p - (1 - z) * log_q)


def test_extreme_binary_logits_are_exact(dtype):
    x = Tensor(np.array([-1e4, -1e4, 0, 1e4, 1e4], dtype), requires_grad=True)
    y = ops.binary_cross_entropy_with_logits(x, [0.0, 1.0, 1.0, 0.0, 1.0], reduction="none")
    np.testing.assert_allclose(y.numpy(), [0, 1e4, math.log(2), 1e4, 0], rtol=1e-6)
    y.sum().backward()
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), [0, -1, -0.5, 1, 0], atol=1e-6)


def test_certain_probabilities_are_held_at_100(dtype):
    p = Tensor(np.array([0, 0, 1, 1], dtype), requires_grad=True)
    y = ops.binary_cross_entropy(p, [0.0, 1.0, 0.0, 1.0], reduction="none")
    np.testing.assert_array_equal(y.numpy(), [0, 100, 100, 0])
    y.sum().backward()
    assert p.grad is not None
    assert np.isfinite(p.grad.numpy()).all()


def test_binary_targets_may_be_integers_or_booleans(close):
    for target in ([0, 1], [False, True], Tensor([0, 1])):
        close(ops.binary_cross_entropy([0.25, 0.25], target, reduction="sum"),
              -math.log(0.75) - math.log(0.25))  # fmt: skip
        assert ops.binary_cross_entropy_with_logits([1.0, 1.0], target).dtype == np.float32


def test_binary_cross_entropy_refuses_what_does_not_fit():
    for function in (ops.binary_cross_entropy, ops.binary_cross_entropy_with_logits):
        with pytest.raises(ValueError, match=r"shape \(2,\), got \(3,\)"):
            function([0.5, 0.5], [0.0, 1.0, 1.0])
        with pytest.raises(ValueError, match="'mean', 'sum' or 'none', got 'avg'"):
            function([0.5], [1.0], reduction="avg")
        with pytest.raises(ValueError, match=r"\(3, 1\).*\(3,\)"):
            function([0.5] * 3, [1.0] * 3, weight=np.ones((3, 1)))
    with pytest.raises(ValueError, match=r"\(3, 1\).*\(3,\)"):
        ops.binary_cross_entropy_with_logits([0.5] * 3, [1.0] * 3, pos_weight=np.ones((3, 1)))
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="between 0 and 1"):
            ops.binary_cross_entropy([wrong], [1.0])
