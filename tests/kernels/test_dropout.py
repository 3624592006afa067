"""The dropout kernel against the op's mask, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from tinygrad_llm import Tensor, backend, ops
from tinygrad_llm.kernels import dropout
from tinygrad_llm.kernels import layout as layouts
from tinygrad_llm.ops.dropout import keep_mask

SMALL = {"BLOCK": 16, "num_warps": 1}  # 64 elements


def kept(shape, p, seed=7, offset=3) -> np.ndarray:
    return keep_mask(shape, p, seed, offset, np)


def check(x, config, close, wide, p=0.3, seed=7, offset=3) -> None:
    y, saved = dropout.forward(x, p=p, seed=seed, offset=offset, config=config)
    assert saved == ()
    assert (y.dtype, y.flags.c_contiguous) == (x.dtype, True)
    close(y, wide(x) * kept(x.shape, p, seed, offset) / (1 - p))


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.5, 0.999, 1 - 1e-12])
def test_the_mask_is_that_of_the_op(p, array, wide) -> None:
    x = array(np.ones((37, 11)), np.float32)
    y, _ = dropout.forward(x, p=p, seed=7, offset=3, config=SMALL)
    np.testing.assert_array_equal(wide(y) != 0, kept(x.shape, p))
    assert set(np.unique(wide(y))) <= {0, float(np.float32(1 / (1 - p)))}


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 5, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("offset", [0, 1, 2**31 - 4, 2**32 - 4, 2**63 - 4, 2**64 - 4])
def test_any_seed_and_any_offset(seed, offset, array, wide) -> None:
    """The counter carries from its low half to the high one, and past its end, inside a block."""
    x = array(np.ones(41), np.float32)
    y, _ = dropout.forward(x, p=0.5, seed=seed, offset=offset, config=SMALL)
    np.testing.assert_array_equal(wide(y) != 0, kept(x.shape, 0.5, seed, offset))


def test_the_words_of_the_stream_decide_at_their_boundary(array, wide) -> None:
    """An element whose word equals p · 2³² is kept, one whose word is less is dropped."""
    words = backend.philox(7, 3, 8)
    for i in range(8):
        for p, keeps in ((int(words[i]) / 2**32, True), ((int(words[i]) + 1) / 2**32, False)):
            y, _ = dropout.forward(array(np.ones(8), np.float32), p=p, seed=7, offset=3)
            assert (wide(y)[i] != 0) == keeps


def test_the_values(dtype, rng, array, close, wide) -> None:
    check(array(rng.normal(size=(5, 29)), dtype), SMALL, close, wide)


@pytest.mark.parametrize("config", [SMALL, None])
def test_forward_and_backward_are_the_op(config, rng, array, wide) -> None:
    x = Tensor(rng.normal(size=(9, 23)).astype(np.float32), requires_grad=True)
    g = Tensor(rng.normal(size=(9, 23)).astype(np.float32))
    stream = backend.RandomStream(99)
    stream.words(13)
    seed, offset = stream.seed, stream.offset
    y = ops.dropout(x, 0.2, stream=stream)
    y.backward(g)
    options = {"p": 0.2, "seed": seed, "offset": offset, "config": config}
    ours, saved = dropout.forward(array(x.numpy()), **options)
    np.testing.assert_array_equal(wide(ours), y.numpy())
    assert x.grad is not None
    dx = dropout.backward(array(g.numpy()), *saved, **options)
    np.testing.assert_array_equal(wide(dx), x.grad.numpy())


def test_the_mask_goes_by_place_not_by_memory(layout, dtype, rng, array, close, wide) -> None:
    check(layout(array(rng.normal(size=(4, 3, 10)), dtype)), SMALL, close, wide)


def test_axes_that_cannot_be_merged_are_copied(rng, array, close, wide) -> None:
    x = array(rng.normal(size=(3, 4, 3, 4, 3, 6)), np.float32)[::2, ::2, ::2, ::2, ::2, ::2]
    assert layouts.merge_axes(x.shape, layouts.strides(x), at_most=4) is None
    check(x, SMALL, close, wide)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 63, 64, 65, 66, 67, 68, 130])
def test_sizes_around_a_block(size, array, close, wide) -> None:
    check(array(np.ones(size), np.float32), SMALL, close, wide, p=0.5)


def test_the_chosen_configuration_serves_any_shape(rng, array, close, wide) -> None:
    for shape in [(), (1, 1), (2, 3, 2, 3, 5), (300_001,)]:
        check(array(rng.normal(size=shape), np.float32), None, close, wide)


def test_an_offset_in_memory(array, wide) -> None:
    """What a captured graph needs: the kernel reads it when it runs."""
    x = array(np.ones(50), np.float32)
    for offset in (0, 5, 2**40, -1):
        there = array(np.array([offset], np.int64))
        y, _ = dropout.forward(x, p=0.5, seed=7, offset=there)
        np.testing.assert_array_equal(wide(y) != 0, kept((50,), 0.5, 7, offset % 2**64))


def test_offsets_of_64_bits(rng, array, close, wide, monkeypatch) -> None:
    x = array(rng.normal(size=(5, 20)), np.float32).T
    monkeypatch.setattr(layouts, "_INT32", 3)
    assert layouts.needs_int64(x)
    check(x, SMALL, close, wide)


def test_infinities_and_nan_are_those_of_the_op(array, wide) -> None:
    """∞ · 0 is NaN: a number that has blown up is not hidden by chance."""
    x = np.full(40, np.inf, np.float32)
    x[::2] = np.nan
    y, _ = dropout.forward(array(x), p=0.5, seed=7, offset=3)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(wide(y), x * kept((40,), 0.5))


def test_empty_arrays(array) -> None:
    x = array(np.zeros((2, 0, 3)), np.float32)
    y, saved = dropout.forward(x, p=0.5, seed=0, offset=0)
    assert y.shape == dropout.backward(x, *saved, p=0.5, seed=0, offset=0).shape == x.shape


def test_what_is_refused(array) -> None:
    x = array(np.zeros((2, 3)), np.float32)
    for p in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="dropout needs 0 ≤ p < 1, got"):
            dropout.forward(x, p=p, seed=0, offset=0)
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match="a seed is an integer from 0 to 2⁶⁴ − 1"):
            dropout.forward(x, p=0.5, seed=seed, offset=0)
    with pytest.raises(TypeError, match="dropout takes float32, float16 or bfloat16 arrays"):
        dropout.forward(x.astype(np.int64), p=0.5, seed=0, offset=0)
    for there in (array(np.zeros(2), np.int64), array(np.zeros(1), np.int32)):
        with pytest.raises(TypeError, match="an int64 array with one element, got int"):
            dropout.forward(x, p=0.5, seed=0, offset=there)
