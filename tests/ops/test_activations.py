"""SwiGLU; the activations of one tensor are in test_elementwise.py."""

from __future__ import annotations

import numpy as np
import pytest

from tinygrad_llm import Tensor, ops


@pytest.mark.parametrize("shape", [(3, 4), (2, 1, 5), (), (0, 4), (300, 300)])
def test_swiglu_is_silu_times_up(shape, layout, dtype, rng, close):
    gate, up, g = (layout(rng.normal(size=shape).astype(dtype)) for _ in range(3))
    found = []
    for function in (ops.swiglu, lambda a, b: ops.silu(a) * b):
        a, b = (Tensor(x, requires_grad=True) for x in (gate, up))
        y = function(a, b)
        y.backward(Tensor(g))
        found.append((y, a.grad, b.grad))
    for got, expected in zip(*found, strict=True):
        assert got.dtype == dtype
        close(got, expected.numpy(), 4)


def test_swiglu_of_half_precision_rounds_once(half, rng):
    gate, up = ((rng.normal(size=(4, 50)) * 4).astype(half) for _ in range(2))
    a, b = (x.astype(np.float64) for x in (gate, up))
    y = ops.swiglu(gate, up)
    assert y.dtype == half
    rounding = 2.0**-8 if half.name == "bfloat16" else 2.0**-11
    np.testing.assert_allclose(
        y.numpy().astype(float), a / (1 + np.exp(-a)) * b, rtol=1.01 * rounding, atol=1e-7
    )
    leaf = Tensor(gate, requires_grad=True)
    ops.swiglu(leaf, up).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == half
    s = 1 / (1 + np.exp(-a))
    np.testing.assert_allclose(
        leaf.grad.numpy().astype(float), (s + a * s * (1 - s)) * b, rtol=1.01 * rounding, atol=1e-5
    )


def test_swiglu_needs_one_shape_and_takes_integers():
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\), \(3,\)"):
        ops.swiglu(np.ones((2, 3)), np.ones(3))
    assert ops.swiglu([1, 2], [3, 4]).dtype == np.float32
