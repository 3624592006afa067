from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tinygrad_llm import Tensor, ops
from tinygrad_llm.ops.linear_cross_entropy import LinearCrossEntropy

OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "smoothed": {"label_smoothing": 0.1},
    "weighted": {"weight": np.linspace(0.5, 2, 11)},
    "all": {"weight": np.linspace(0.5, 2, 11), "label_smoothing": 0.2, "reduction": "sum"},
}


def two_ops(x, w, target, b=None, *, chunk=None, **options):
    return ops.cross_entropy(ops.linear(x, w, b), target, **options)


def run(function: Callable[..., Tensor], arrays, target, **options) -> list[Tensor]:
    leaves = [Tensor(a, requires_grad=True) for a in arrays]
    x, w, *b = leaves
    y = function(x, w, target, *b, **options)
    (y * 0.5).backward()
    found = [y]
    for leaf in leaves:
        assert leaf.grad is not None
        found.append(leaf.grad)
    return found


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("chunk", [None, 1, 3, 6, 7])
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_the_two_ops(name, chunk, biased, layout, dtype, rng, close):
    shapes = [(2, 3, 5), (11, 5), (11,)][: 2 + biased]
    arrays = [layout(rng.normal(size=s).astype(dtype)) for s in shapes]
    target = rng.integers(0, 11, (2, 3))
    target[0, 1] = -100
    found = run(ops.linear_cross_entropy, arrays, target, chunk=chunk, **OPTIONS[name])
    expected = run(two_ops, arrays, target, **OPTIONS[name])
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == dtype
        close(got, wanted.numpy(), 8)


def test_no_more_logits_than_a_chunk(rng, monkeypatch):
    seen = []
    losses = LinearCrossEntropy.losses

    def counted(self, z, target):
        seen.append(z.shape)
        return losses(self, z, target)

    monkeypatch.setattr(LinearCrossEntropy, "losses", counted)
    x, w = rng.normal(size=(7, 2)), rng.normal(size=(5, 2))
    ops.linear_cross_entropy(x, w, np.zeros(7, int), chunk=3)
    assert seen == [(3, 5), (3, 5), (1, 5)]
    seen.clear()
    monkeypatch.setattr(sys.modules[LinearCrossEntropy.__module__], "_LOGITS", 5 * 4)
    ops.linear_cross_entropy(rng.normal(size=(150, 2)), w, np.zeros(150, int))
    assert seen == [(64, 5), (64, 5), (22, 5)]


def test_only_what_is_needed_is_computed(rng):
    x, w, b = rng.normal(size=(4, 2)), rng.normal(size=(3, 2)), rng.normal(size=3)
    target = np.array([0, 1, 2, 0])
    for i in range(3):
        inputs = [Tensor(a, requires_grad=i == j) for j, a in enumerate((x, w, b))]
        y = ops.linear_cross_entropy(inputs[0], inputs[1], target, inputs[2])
        assert y.node is not None
        assert [d is not None for d in y.node.kept] == [i == j for j in range(3)]  # pyright: ignore
        y.backward()
        assert inputs[i].grad is not None
    y = ops.linear_cross_entropy(x, w, target, b)
    assert y.node is None


def test_a_graph_that_is_kept_gives_the_same_twice(rng):
    x, w = (Tensor(rng.normal(size=s), requires_grad=True) for s in ((4, 2), (3, 2)))
    y = ops.linear_cross_entropy(x, w, np.array([0, 1, 2, 0]))
    y.backward(retain_graph=True)
    assert x.grad is not None
    first = x.grad.numpy().copy()
    y.backward()
    np.testing.assert_allclose(x.grad.numpy(), 2 * first)


def test_half_precision_adds_up_in_float32(half, rng):
    """300 equal rows: a sum in bfloat16 would stop growing, a mean's shares in float16 vanish."""
    x, w = np.ones((300, 4), half), (rng.normal(size=(50, 4)) / 8).astype(half)
    target = np.zeros(300, int)
    found = run(ops.linear_cross_entropy, (x, w), target, chunk=7)
    expected = run(two_ops, (x.astype(float), w.astype(float)), target)
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == half
        np.testing.assert_allclose(got.numpy().astype(float), wanted.numpy(), rtol=0.01, atol=1e-6)


def test_a_loss_of_half_precision_in_float32(half, rng):
    """Its gradient, scaled up by 2¹⁷, would be infinite in float16."""
    x, w = rng.normal(size=(300, 4)).astype(half), rng.normal(size=(50, 4)).astype(half)
    leaf = Tensor(x, requires_grad=True)
    y = ops.linear_cross_entropy(leaf, w, np.zeros(300, int), chunk=7, dtype="float32")
    assert y.dtype == np.float32
    (y * 2.0**17).backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == half
    wide = Tensor(x.astype(float), requires_grad=True)
    expected = ops.cross_entropy(wide @ Tensor(w.astype(float)).T, np.zeros(300, int))
    (expected * 2.0**17).backward()
    assert wide.grad is not None
    np.testing.assert_allclose(y.item(), expected.item(), rtol=1e-5)
    got, wanted = leaf.grad.numpy().astype(float), wide.grad.numpy()
    np.testing.assert_allclose(got, wanted, rtol=0.02, atol=0.01 * abs(wanted).max())


def test_nothing_counts():
    found = run(ops.linear_cross_entropy, (np.ones((3, 2)), np.ones((4, 2))), np.full(3, -100))
    assert [float(abs(a.numpy()).sum()) for a in found] == [0, 0, 0]


def test_what_does_not_fit_is_refused():
    x, w, t = np.ones((3, 2)), np.ones((4, 2)), np.zeros(3, int)
    with pytest.raises(ValueError, match=r"'mean' or 'sum'.*got 'none'; cross_entropy\(linear"):
        ops.linear_cross_entropy(x, w, t, reduction="none")
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got 1"):
        ops.linear_cross_entropy(x, w, t, label_smoothing=1)
    with pytest.raises(ValueError, match="at least one row, got 0"):
        ops.linear_cross_entropy(x, w, t, chunk=0)
    with pytest.raises(ValueError, match=r"got \(3, 2\) and \(2, 4\)"):
        ops.linear_cross_entropy(x, w.T, t)
    with pytest.raises(ValueError, match=r"integer targets \(3,\), got float64\(3,\)"):
        ops.linear_cross_entropy(x, w, t * 1.0)
    with pytest.raises(ValueError, match=r"integer targets \(3,\), got int64\(2,\)"):
        ops.linear_cross_entropy(x, w, t[:2])
    with pytest.raises(ValueError, match=r"bias of shape \(4,\), got \(3,\)"):
        ops.linear_cross_entropy(x, w, t, np.ones(3))
    with pytest.raises(ValueError, match="a target is 4, but the logits have classes 0 to 3"):
        ops.linear_cross_entropy(x, w, t + 4)
    with pytest.raises(ValueError, match=r"needs weight \(4,\), got \(3,\)"):
        ops.linear_cross_entropy(x, w, t, weight=np.ones(3))
