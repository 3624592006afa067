from __future__ import annotations

import numpy as np
import pytest

from tinygrad_llm import Tensor, backend, manual_seed, ops
from tinygrad_llm.ops.dropout import keep_mask


def test_the_mask_is_the_words_of_the_stream_in_c_order(layout, dtype):
    x = layout(np.arange(1.0, 25.0, dtype=dtype).reshape(4, 6))
    stream = backend.RandomStream(11)
    stream.offset = 5
    y = ops.dropout(x, 0.3, stream=stream)
    words = backend.philox(11, 5, 24).reshape(4, 6)
    assert y.dtype == dtype
    np.testing.assert_allclose(y.numpy(), np.where(words >= 0.3 * 2**32, x / 0.7, 0), rtol=1e-6)
    assert stream.offset == 5 + 6  # four words to a counter


def test_the_mean_is_preserved_and_p_is_dropped():
    manual_seed(0)
    y = ops.dropout(np.ones(100_000, np.float32), 0.25).numpy()
    assert abs(y.mean() - 1) < 0.01
    assert abs((y == 0).mean() - 0.25) < 0.01
    np.testing.assert_allclose(y[y != 0], 1 / 0.75, rtol=1e-6)


def test_the_same_seed_draws_the_same_mask_and_the_next_call_another():
    x = np.ones(1000, np.float32)
    manual_seed(7)
    first, second = ops.dropout(x).numpy(), ops.dropout(x).numpy()
    manual_seed(7)
    np.testing.assert_array_equal(ops.dropout(x).numpy(), first)
    assert (first != second).any()


def test_nothing_happens_out_of_training_or_with_p_zero():
    state = backend.random.state()
    x = Tensor([1.0, 2.0])
    assert ops.dropout(x, 0.9, training=False) is x
    assert ops.dropout(x, 0.0) is x
    assert backend.random.state() == state


def test_zero_size_zero_dimensions_and_integers():
    assert ops.dropout(np.zeros((0, 3), np.float32)).shape == (0, 3)
    assert ops.dropout(Tensor(2.0)).item() in (0.0, 4.0)
    y = ops.dropout(Tensor([1, 1, 1]), 0.5)
    assert y.dtype == np.float32
    assert set(y.tolist()) <= {0.0, 2.0}


def test_half_precision_is_kept(half):
    assert ops.dropout(np.ones(8, half), 0.5).dtype == half


def test_p_close_to_one_drops_all():
    assert ops.dropout(np.ones(100), 1 - 1e-15).numpy().sum() == 0


@pytest.mark.parametrize("p", [-0.1, 1.0, 2.0, float("nan")])
def test_p_must_be_a_probability_below_one(p):
    with pytest.raises(ValueError, match=r"0 ≤ p < 1, got"):
        ops.dropout([1.0], p)


def test_a_mask_in_pieces_is_the_mask_as_a_whole():
    whole = keep_mask((40, 100), 0.4, 9, 3, np)
    piece = keep_mask((10, 100), 0.4, 9, 3 + 25 * 10, np)  # rows 10 to 19 start 1000 words later
    np.testing.assert_array_equal(whole[10:20], piece)
