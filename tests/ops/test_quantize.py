from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinygrad_llm import Tensor, ops
from tinygrad_llm.ops.quantize import QuantizedLinear

KINDS = pytest.mark.parametrize(
    ("bits", "group", "symmetric"),
    [(8, None, True), (8, 32, True), (4, None, True), (4, 32, True), (4, 16, False)],
)


def step(scales, columns, group) -> np.ndarray:
    """s of each column."""
    scales = scales.numpy().astype(np.float64)
    return scales if group is None else np.repeat(scales, group, axis=1)[:, :columns]


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 70)),
        elements=st.floats(-100, 100, width=32),
    ),
    st.sampled_from([(8, None, True), (8, 16, True), (4, 16, True), (4, 32, False)]),
)
def test_no_weight_moves_by_more_than_half_a_step(w, kind):
    bits, group, symmetric = kind
    q = ops.quantize(w, bits, group, symmetric)
    found = ops.dequantize(*q, columns=w.shape[1], group_size=group)
    assert found.shape == w.shape
    assert found.dtype == np.float32
    # Where the zero point was rounded, the ends of the range lie half a step farther off.
    half = (0.5 if symmetric else 1.0) * step(q.scales, w.shape[1], group)
    assert (abs(found.numpy() - w) <= half * (1 + 1e-5) + 1e-6).all()


def test_eight_bits_by_hand():
    q = ops.quantize(np.array([[1.27, -0.5, 0.004], [0, 0, 0]], np.float32))
    assert q.packed.tolist() == [[127, -50, 0], [0, 0, 0]]
    assert q.packed.dtype == np.int8
    np.testing.assert_allclose(q.scales.numpy(), [[0.01], [1]], rtol=1e-6)
    assert q.zeros is None


def test_four_bits_by_hand():
    """-7 and 7 are 1 and 15; the even element is in the low half, and an odd last one alone."""
    q = ops.quantize(np.array([[0.7, -0.7, 0.1]], np.float32), bits=4)
    assert q.packed.tolist() == [[15 + 16 * 1, 9 + 16 * 8]]
    assert q.packed.dtype == np.uint8
    np.testing.assert_allclose(q.scales.numpy(), [[0.1]], rtol=1e-6)
    np.testing.assert_allclose(ops.dequantize(*q, columns=3).tolist(), [[0.7, -0.7, 0.1]], 1e-6)
    assert ops.dequantize(*q).shape == (1, 4)


def test_zero_points_by_hand():
    q = ops.quantize(np.array([[-0.5, 1.0, 0.0, 0.2]], np.float32), bits=4, symmetric=False)
    assert q.zeros is not None
    assert q.zeros.tolist() == [[5]]
    assert q.packed.tolist() == [[0 + 16 * 15, 5 + 16 * 7]]
    np.testing.assert_allclose(ops.dequantize(*q).tolist(), [[-0.5, 1.0, 0.0, 0.2]], atol=1e-6)


def test_groups_keep_an_outlier_to_themselves(rng):
    w = rng.normal(size=(4, 64)).astype(np.float32)
    w[:, 0] = 100
    errors = []
    for group in (None, 32, 16):
        found = ops.dequantize(*ops.quantize(w, 4, group), group_size=group).numpy()
        errors.append(abs(found - w)[:, 32:].max())
    assert errors[0] > 1 > 0.5 > errors[1] >= errors[2]


def test_zero_points_help_groups_that_are_not_centred(rng):
    w = rng.uniform(0.5, 1, size=(4, 64)).astype(np.float32)
    errors = []
    for symmetric in (True, False):
        found = ops.dequantize(*ops.quantize(w, 4, 32, symmetric), group_size=32).numpy()
        errors.append(abs(found - w).mean())
    assert errors[1] < 0.6 * errors[0]


def test_the_memory_it_takes(rng):
    w = rng.normal(size=(8, 256)).astype(np.float32)
    eight, four = ops.quantize(w), ops.quantize(w, 4, 64)
    assert eight.packed.data.nbytes + eight.scales.data.nbytes == w.nbytes // 4 + 8 * 4
    assert four.packed.data.nbytes + four.scales.data.nbytes == w.nbytes // 8 + 8 * 4 * 4


# --- the product ----------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("shape", [(37,), (3, 37), (2, 3, 37), (0, 37)])
def test_it_is_linear_with_the_rounded_weights(
    shape, bits, group, symmetric, layout, dtype, rng, close
):
    q = ops.quantize(rng.normal(size=(5, 37)), bits, group, symmetric)
    w = ops.dequantize(*q, columns=37, group_size=group).numpy().astype(dtype)
    found = []
    for function in (
        lambda x, b: ops.quantized_linear(x, *q, b, group_size=group),
        lambda x, b: ops.linear(x, w, b),
    ):
        x = Tensor(layout(np.random.default_rng(1).normal(size=shape).astype(dtype)), None, True)
        b = Tensor(layout(np.random.default_rng(2).normal(size=5).astype(dtype)), None, True)
        y = function(x, b)
        y.backward(Tensor(np.random.default_rng(3).normal(size=y.shape).astype(dtype)))
        found.append((y, x.grad, b.grad))
    for got, expected in zip(*found, strict=True):
        assert got.dtype == dtype
        close(got, expected.numpy(), 4)


def test_many_rows_of_weights_come_in_blocks(rng, close, monkeypatch):
    """Of a hundred here, with one row at the end."""
    monkeypatch.setattr(sys.modules["tinygrad_llm.ops.quantize"], "_BLOCK", 97 * 100)
    w = rng.normal(size=(1501, 97)).astype(np.float32)
    q = ops.quantize(w, 4, 32)
    rounded = ops.dequantize(*q, columns=97, group_size=32)
    x = Tensor(rng.normal(size=(3, 97)).astype(np.float32), requires_grad=True)
    y = ops.quantized_linear(x, *q, group_size=32)
    reshape: Any = y.node
    (op,) = reshape.parents
    assert isinstance(op, QuantizedLinear)
    blocks = list(op._blocks())
    assert (len(blocks), blocks[-1]) == (16, slice(1500, 1600))
    close(y, x.numpy() @ rounded.numpy().T, 20)
    y.sum().backward()
    close(x.grad, np.tile(rounded.numpy().sum(0), (3, 1)), 50)


def test_half_precision_multiplies_with_weights_of_its_own(half, rng):
    q = ops.quantize(rng.normal(size=(5, 40)).astype(half), 4, 16)
    assert q.scales.dtype == half
    x = Tensor(rng.normal(size=(3, 40)).astype(half), requires_grad=True)
    y = ops.quantized_linear(x, *q, group_size=16)
    assert y.dtype == half
    w = ops.dequantize(*q, group_size=16).numpy().astype(half).astype(np.float64)
    rounding = 2.0**-8 if half.name == "bfloat16" else 2.0**-10
    expected = x.numpy().astype(np.float64) @ w.T
    np.testing.assert_allclose(y.numpy().astype(np.float64), expected, rtol=rounding, atol=1e-6)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == half


def test_nothing_of_x_stays(rng):
    x = Tensor(rng.normal(size=(3, 40)), requires_grad=True)
    y = ops.quantized_linear(x, *ops.quantize(rng.normal(size=(5, 40))))
    assert y.node is not None
    assert y.node.saved == ()


# --- what is refused ------------------------------------------------------------------------------


def test_what_cannot_be_quantized():
    with pytest.raises(ValueError, match="8 and 4 bits, got 3"):
        ops.quantize(np.ones((2, 3)), bits=3)
    with pytest.raises(ValueError, match="with 4 bits only"):
        ops.quantize(np.ones((2, 3)), symmetric=False)
    with pytest.raises(ValueError, match=r"a matrix of floats, got int64\(2, 3\)"):
        ops.quantize(np.ones((2, 3), int))
    with pytest.raises(ValueError, match=r"a matrix of floats, got float64\(3,\)"):
        ops.quantize(np.ones(3))
    for group in (0, -16, 8, 48):
        with pytest.raises(
            ValueError, match=f"at least 16, or None for the whole row, got {group}"
        ):
            ops.quantize(np.ones((2, 64)), group_size=group)
    with pytest.raises(ValueError, match="finite weights"):
        ops.quantize(np.array([[1.0, np.nan]]))


def test_what_cannot_be_multiplied(rng):
    q = ops.quantize(rng.normal(size=(5, 40)), 4, 16)
    x = np.ones((2, 40))
    with pytest.raises(ValueError, match=r"20 bytes a row as uint8, got packed weights \(5, 19\)"):
        ops.quantized_linear(x, q.packed[:, 1:], q.scales, group_size=16)
    with pytest.raises(ValueError, match=r"packed weights are .*got int16"):
        ops.quantized_linear(x, q.packed.numpy().astype(np.int16), q.scales, group_size=16)
    with pytest.raises(ValueError, match=r"scales must be \(5, 1\) floats, got float32\(5, 3\)"):
        ops.quantized_linear(x, q.packed, q.scales)
    with pytest.raises(ValueError, match=r"as uint8\(5, 3\); got float32\(5, 3\) with uint8"):
        ops.quantized_linear(x, q.packed, q.scales, q.scales, group_size=16)
    with pytest.raises(ValueError, match=r"bias of shape \(5,\), got \(2,\)"):
        ops.quantized_linear(x, q.packed, q.scales, bias=np.ones(2), group_size=16)
    with pytest.raises(ValueError, match="-1 columns"):
        ops.quantized_linear(np.float64(1), q.packed, q.scales, group_size=16)
