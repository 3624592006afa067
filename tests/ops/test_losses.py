from __future__ import annotations

import math

import numpy as np
import pytest

from tinygrad_llm import Tensor, ops

LOSSES = {
    "mse_loss": (ops.mse_loss, lambda d: d * d),
    "l1_loss": (ops.l1_loss, np.abs),
    "smooth_l1_loss": (
        ops.smooth_l1_loss,
        lambda d: np.where(np.abs(d) < 1, 0.5 * d * d, np.abs(d) - 0.5),
    ),
    "smooth_l1_loss, beta 0.3": (
        lambda x, t, reduction="mean": ops.smooth_l1_loss(x, t, 0.3, reduction),
        lambda d: np.where(np.abs(d) < 0.3, d * d / 0.6, np.abs(d) - 0.15),
    ),
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_distances_are_their_formulas(name, reduction, layout, dtype, rng, close):
    function, formula = LOSSES[name]
    for shape in ((3, 4), (5,), ()):
        x = layout(rng.normal(size=shape).astype(dtype))
        target = layout(rng.normal(size=shape))
        y = function(x, target, reduction=reduction)
        assert y.dtype == dtype
        losses = formula(x.astype(np.float64) - target)
        close(y, {"mean": losses.mean(), "sum": losses.sum(), "none": losses}[reduction])


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
@pytest.mark.parametrize("log_target", [False, True])
def test_divergence_is_its_formula(reduction, log_target, layout, dtype, rng, close):
    p, q = (rng.dirichlet(np.ones(4), size=3) for _ in range(2))
    p, q = layout(p), layout(q)
    y = ops.kl_div(np.log(q).astype(dtype), np.log(p) if log_target else p, reduction, log_target)
    assert y.dtype == dtype
    losses = p * (np.log(p) - np.log(q))
    want = {
        "batchmean": losses.sum() / 3,
        "mean": losses.mean(),
        "sum": losses.sum(),
        "none": losses,
    }
    close(y, want[reduction])


def test_an_impossible_class_costs_nothing(half):
    for dtype in (np.dtype(np.float32), np.dtype(np.float64), half):
        log_q = Tensor(np.log([0.25, 0.25, 0.5]).astype(dtype), requires_grad=True)
        y = ops.kl_div(log_q, np.array([0, 0.5, 0.5]), "sum")
        assert y.dtype == dtype
        np.testing.assert_allclose(float(y.item()), 0.5 * math.log(2), rtol=2e-2)
        y.backward()
        assert log_q.grad is not None
        np.testing.assert_allclose(log_q.grad.numpy().astype(float), [0, -0.5, -0.5])


def test_a_distribution_does_not_diverge_from_itself(rng, close):
    log_p = ops.log_softmax(rng.normal(size=(3, 4)))
    close(ops.kl_div(log_p, log_p.exp()), 0.0)
    close(ops.kl_div(log_p, log_p, log_target=True), 0.0)


def test_integers_become_float32():
    for name in LOSSES:
        y = LOSSES[name][0](Tensor([1, 2]), Tensor([3, 4]))
        assert y.dtype == np.float32
    assert ops.mse_loss([1, 2], [1.5, 2.5]).item() == 0.25


def test_both_sides_get_a_gradient():
    x, t = Tensor([1.0, 2.0], requires_grad=True), Tensor([3.0, 5.0], requires_grad=True)
    ops.mse_loss(x, t, "sum").backward()
    assert x.grad is not None
    assert t.grad is not None
    assert x.grad.tolist() == [-4.0, -6.0]
    assert t.grad.tolist() == [4.0, 6.0]


@pytest.mark.parametrize("function", [ops.mse_loss, ops.l1_loss, ops.smooth_l1_loss, ops.kl_div])
def test_what_does_not_fit_is_refused(function):
    with pytest.raises(ValueError, match=r"equal shapes, got \(2, 1\) and \(2,\)"):
        function(np.ones((2, 1)), np.ones(2))
    with pytest.raises(ValueError, match=r"'sum'.*got 'avg'"):
        function(np.ones(2), np.ones(2), reduction="avg")


def test_smooth_l1_refuses_a_width_of_zero():
    with pytest.raises(ValueError, match=r"beta > 0, got 0.*l1_loss"):
        ops.smooth_l1_loss([1.0], [2.0], beta=0)
