"""The average of the weights."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm import Tensor
from tinygrad_llm.train.ema import WeightAverage


@given(
    decay=st.floats(0.01, 0.999),
    weights=st.lists(st.floats(-100, 100), min_size=1, max_size=30),
)
def test_it_is_the_recurrence_in_its_docstring(decay, weights):
    p = Tensor(np.array([weights[0]]), requires_grad=True)
    average, expected = WeightAverage([p], decay), weights[0]
    for step, w in enumerate(weights, start=1):
        p.data[...] = w
        average.update(step)
        d = min(decay, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * w
    assert average.arrays[0][0] == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_the_weights_come_back_also_after_an_error():
    p = Tensor([1.0, 2.0], requires_grad=True)
    average = WeightAverage([p], 0.9)
    p.data[...] = 5.0
    weights = p.data

    def fails():
        with average.in_place():
            seen.extend(p.tolist())
            raise KeyError

    seen = []
    with pytest.raises(KeyError):
        fails()
    assert seen == [1.0, 2.0]
    assert p.data is weights
    assert p.tolist() == [5.0, 5.0]


def test_half_precision_is_averaged_in_float32():
    p = Tensor(np.zeros(1, "float16"), requires_grad=True)
    average = WeightAverage([p], 0.999)
    for step in range(10_000, 10_010):  # each takes in 0.001, and float16 would stop at 0.01
        p.data[...] = 10.0
        average.update(step)
    assert average.arrays[0].dtype == np.float32
    assert average.arrays[0][0] == pytest.approx(10 * (1 - 0.999**10), rel=1e-5)


def test_another_model_is_refused():
    average = WeightAverage([Tensor([1.0, 2.0])], 0.9)
    with pytest.raises(ValueError, match="of another model"):
        average.load([Tensor([1.0])])
    average.load([Tensor([3.0, 4.0])])
    assert average.arrays[0].tolist() == [3.0, 4.0]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_weights_stay_where_they_lie(dtype):
    """Other processes may share their memory."""
    p = Tensor(np.array([1.0, 2.0]), dtype=dtype, requires_grad=True)
    memory = p.data
    average = WeightAverage([p], 0.9)
    average.arrays[0][...] = 1.0001  # which float16 has not
    with average.in_place():
        np.testing.assert_array_equal(p.data, average.arrays[0])
    assert p.data is memory
    assert p.tolist() == [1.0, 2.0]
