from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinygrad_llm import Tensor, grad, ops
from tinygrad_llm.ops.embedding import add_rows


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,), (2, 0, 3)])
def test_embedding_reads_rows(shape, layout, dtype, rng):
    weight = layout(rng.normal(size=(5, 4)).astype(dtype))
    ids = layout(rng.integers(0, 5, size=shape))
    for given_ids in (ids, Tensor(ids), ids.tolist() if ids.size else ids, ids.astype(np.uint8)):
        y = ops.embedding(given_ids, Tensor(weight))
        assert y.dtype == dtype
        assert y.shape == (*shape, 4)
        np.testing.assert_array_equal(y.numpy(), weight[ids])


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_precision_is_kept_in_the_rows_and_their_gradient(kind):
    weight = Tensor(np.ones((4, 2)).astype(getattr(ml_dtypes, kind, kind)), requires_grad=True)
    y = ops.embedding([[1, 1], [3, 1]], weight)
    assert y.dtype == weight.dtype
    y.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == weight.dtype
    assert weight.grad.tolist() == [[0, 0], [3, 3], [0, 0], [1, 1]]


@given(
    hnp.arrays(np.int64, st.integers(0, 20), elements=st.integers(0, 4)),
    st.sampled_from([0, 1, 3]),
)
def test_add_rows_equals_add_at(ids, width):
    rng = np.random.default_rng(0)
    table, rows = rng.normal(size=(5, width)), rng.normal(size=(ids.size, width))
    expected = table.copy()
    np.add.at(expected, ids, rows)
    add_rows(table, ids, rows)
    np.testing.assert_allclose(table, expected, rtol=1e-12)


def test_the_gradient_of_a_padding_row_is_zero():
    ids = np.array([[0, 2, 2], [1, 0, 3]])
    for padding in (0, -4):
        weight = Tensor(np.ones((4, 2)), requires_grad=True)
        y = ops.embedding(ids, weight, padding_idx=padding)
        np.testing.assert_array_equal(y.numpy(), np.ones((2, 3, 2)))  # the row itself is read
        y.sum().backward()
        assert weight.grad is not None
        assert weight.grad.tolist() == [[0, 0], [1, 1], [2, 2], [1, 1]]
    weight = Tensor(np.ones((4, 2)), requires_grad=True)
    (g,) = grad(ops.embedding(ids, weight, padding_idx=0).sum(), weight, create_graph=True)
    assert g.tolist() == [[0, 0], [1, 1], [2, 2], [1, 1]]


def test_the_gradient_of_a_row_read_by_nobody_is_zero():
    weight = Tensor(np.ones((3, 2)), requires_grad=True)
    ops.embedding(np.zeros(0, np.int64), weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[0.0, 0.0]] * 3


def test_a_tied_table_collects_both_gradients():
    weight = Tensor(np.arange(6.0).reshape(3, 2), requires_grad=True)
    h = ops.embedding([0, 2], weight)
    ops.linear(h, weight).sum().backward()
    expected = np.zeros((3, 2))
    expected[[0, 2]] += weight.numpy().sum(0)
    expected += weight.numpy()[[0, 2]].sum(0)
    assert weight.grad is not None
    np.testing.assert_array_equal(weight.grad.numpy(), expected)


def test_an_id_outside_the_table_is_named():
    weight = Tensor(np.ones((4, 2)))
    with pytest.raises(IndexError, match="id 4 is outside the table's rows 0 to 3"):
        ops.embedding([1, 4], weight)
    with pytest.raises(IndexError, match="id -1"):
        ops.embedding([[-1]], weight)
    with pytest.raises(ValueError, match="padding_idx 4 is outside the table of 4 rows"):
        ops.embedding([0], weight, padding_idx=4)


def test_wrong_dtypes_and_shapes_are_refused():
    with pytest.raises(TypeError, match="integer ids, got float64"):
        ops.embedding(np.zeros(2), np.ones((4, 2)))
    with pytest.raises(TypeError, match="integer ids, got bool"):
        ops.embedding([True], np.ones((4, 2)))
    with pytest.raises(ValueError, match=r"\(V, C\), got \(4,\)"):
        ops.embedding([0], np.ones(4))
