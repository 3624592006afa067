from __future__ import annotations

import numpy as np
import pytest

from tinygrad_llm import Tensor, backend, manual_seed, ops, set_default_dtype


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 2), 4])
def test_zeros_ones_and_full(shape):
    for y, value in (
        (ops.zeros(shape), 0),
        (ops.ones(shape), 1),
        (ops.full(shape, 2.5), 2.5),
    ):
        assert y.dtype == np.float32
        np.testing.assert_array_equal(y.numpy(), np.full(shape, value))


def test_full_takes_the_dtype_of_its_value():
    assert ops.full((2,), 3).dtype == np.int64
    assert ops.full((2,), True).dtype == np.bool_
    assert ops.full((2,), 3, dtype="float16").dtype == np.float16
    assert ops.zeros(2, dtype="int32").dtype == np.int32
    assert ops.ones(2, dtype="bfloat16").dtype == backend.bfloat16


def test_like_takes_shape_and_dtype(layout, dtype):
    x = layout(np.arange(6, dtype=dtype).reshape(2, 3))
    for y, value in ((ops.zeros_like(x), 0), (ops.ones_like(Tensor(x)), 1)):
        assert y.dtype == dtype
        np.testing.assert_array_equal(y.numpy(), np.full((2, 3), value))
        y.data[0, 0] = 7  # memory of its own, also when x is stride 0
        assert (y.numpy() == 7).sum() == 1


@pytest.mark.parametrize(
    "span",
    [(5,), (2, 5), (0, 10, 3), (5, 0, -2), (0,), (3, 3), (0.0, 1.0, 0.25), (2.5,)],
)
def test_arange_counts_as_numpy_does(span):
    y = ops.arange(*span)
    assert y.dtype == (np.int64 if all(isinstance(n, int) for n in span) else np.float32)
    np.testing.assert_array_equal(y.numpy(), np.arange(*span))


@pytest.mark.parametrize("n", [np.int64(3), np.prod((3, 1)), np.uint8(3)])
def test_arange_of_numpy_integers_is_of_integers(n):
    y = ops.arange(n)
    assert y.dtype == np.int64
    assert y.tolist() == [0, 1, 2]
    assert ops.arange(3, dtype="float64").dtype == np.float64


@pytest.mark.parametrize("sizes", [(3,), (2, 3), (3, 2), (0,)])
def test_eye(sizes):
    y = ops.eye(*sizes)
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y.numpy(), np.eye(*sizes))


def test_random_numbers_come_from_the_default_stream():
    manual_seed(3)
    drawn = [ops.randn(2, 3), ops.rand(4), ops.randint(0, 10, (5,)), ops.randn()]
    stream = backend.RandomStream(3)
    np.testing.assert_array_equal(drawn[0].numpy(), stream.normal((2, 3)))
    np.testing.assert_array_equal(drawn[1].numpy(), stream.uniform(4))
    np.testing.assert_array_equal(drawn[2].numpy(), stream.integers(0, 10, 5))
    np.testing.assert_array_equal(drawn[3].numpy(), stream.normal())
    assert [x.dtype for x in drawn] == [np.float32, np.float32, np.int64, np.float32]


def test_random_shapes_may_be_a_tuple():
    assert ops.randn((2, 3)).shape == (2, 3)
    assert ops.rand((2, 3), dtype="float64").shape == (2, 3)
    assert ops.randint(5, 6, 3).tolist() == [5, 5, 5]
    assert ops.randint(0, 2).shape == ()


def test_requires_grad_can_be_asked_for():
    for x in (ops.zeros(2, requires_grad=True), ops.randn(2, requires_grad=True)):
        assert x.requires_grad
        assert x.is_leaf
    with pytest.raises(TypeError, match="int64"):
        ops.full((2,), 1, requires_grad=True)


def test_the_default_dtype_is_that_of_what_is_made():
    set_default_dtype("float64")
    try:
        made = [ops.zeros(1), ops.eye(1), ops.randn(1), ops.arange(0.5), ops.full((), 1.5)]
        assert {x.dtype for x in made} == {backend.float64}
        assert (Tensor([1]) / 2).dtype == np.float64
    finally:
        set_default_dtype("float32")


def test_an_unknown_device_is_refused():
    for make in (ops.zeros, ops.ones, ops.randn, ops.arange, ops.eye):
        with pytest.raises(ValueError, match="'tpu'"):
            make(2, device="tpu")


def test_a_random_range_must_not_be_empty():
    with pytest.raises(ValueError, match="low=3, high=3"):
        ops.randint(3, 3)
