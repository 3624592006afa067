"""The embedding kernels against NumPy, on both sides of every branch."""

from __future__ import annotations

import numpy as np
import pytest

from tinygrad_llm import Tensor, ops
from tinygrad_llm.backend import rehearsal, to_device
from tinygrad_llm.kernels import embedding

# Tiles that hold a whole row of up to 16 numbers, and blocks that share one among programs.
WHOLE = {"ROWS": 4, "BLOCK": 16, "num_warps": 1}
BLOCKS = {"ROWS": 2, "BLOCK": 8, "num_warps": 1}
CONFIGS = pytest.mark.parametrize("config", [WHOLE, BLOCKS], ids=["whole rows", "blocks"])


def summed(g, ids, shape, padding_idx=None) -> np.ndarray:
    dw = np.zeros(shape)
    np.add.at(dw, ids.reshape(-1), g.reshape(ids.size, shape[1]))
    if padding_idx is not None:
        dw[padding_idx] = 0
    return dw


def check(w, ids, g, config, close, wide, padding_idx=None) -> None:
    options = {"padding_idx": padding_idx, "config": config}
    y, saved = embedding.forward(w, ids, **options)
    places = to_device(ids, "cpu")
    assert y.dtype == w.dtype
    assert y.flags.c_contiguous
    np.testing.assert_array_equal(wide(y), wide(w)[places])
    dw = embedding.backward(g, *saved, **options)
    assert dw.dtype == w.dtype
    close(dw, summed(wide(g), places, w.shape, padding_idx))


@CONFIGS
@pytest.mark.parametrize("padding_idx", [None, 2, -1])
def test_rows_and_their_gradient(config, padding_idx, dtype, rng, array, close, wide) -> None:
    w, g = (array(rng.normal(size=shape), dtype) for shape in [(7, 13), (3, 5, 13)])
    ids = array(rng.integers(0, 7, size=(3, 5)))
    check(w, ids, g, config, close, wide, padding_idx)


@CONFIGS
@pytest.mark.parametrize("times", [1, 2, 3, 4, 5, 8, 9])
def test_ids_that_occur_often(config, times, rng, array, close, wide) -> None:
    """Fewer than a tile's rows, just as many, more; at the end of the ids and before others."""
    for others in ([], [4], [0]):
        ids = np.array([2] * times + others)
        w, g = (array(rng.normal(size=(n, 5)), np.float32) for n in (6, ids.size))
        check(w, array(rng.permutation(ids)), g, config, close, wide)


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 15, 16, 17])
@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_sizes_around_a_tile(count, columns, rng, array, close, wide) -> None:
    for config in (WHOLE, BLOCKS):
        w, g = (array(rng.normal(size=(n, columns)), np.float32) for n in (3, count))
        check(w, array(rng.integers(0, 3, size=count)), g, config, close, wide)


def test_the_chosen_configuration_serves_any_shape(rng, array, close, wide) -> None:
    for size, columns, shape in [(1, 1, (1,)), (9, 5000, (3,)), (2, 3, (5, 1, 4)), (3, 4, ())]:
        w = array(rng.normal(size=(size, columns)), np.float32)
        g = array(rng.normal(size=(*shape, columns)), np.float32)
        check(w, array(rng.integers(0, size, size=shape)), g, None, close, wide)


@CONFIGS
def test_any_strides(config, layout, dtype, rng, array, close, wide) -> None:
    w = layout(array(rng.normal(size=(6, 10)), dtype))
    ids = layout(array(rng.integers(0, 6, size=(3, 4))))
    g = layout(array(rng.normal(size=(3, 4, 10)), dtype))
    check(w, ids, g, config, close, wide)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.uint32, np.int64])
def test_any_integers_are_ids(kind, rng, array, close, wide) -> None:
    w, g = (array(rng.normal(size=(n, 10)), np.float32) for n in (6, 7))
    check(w, array(rng.integers(0, 6, size=7), kind), g, BLOCKS, close, wide)


def test_offsets_of_64_bits(rng, array, close, wide, monkeypatch) -> None:
    monkeypatch.setattr(embedding, "needs_int64", lambda *arrays: True)
    w, g = (array(rng.normal(size=(n, 13)), np.float32) for n in (6, 7))
    check(w, array(rng.integers(0, 6, size=7)), g, BLOCKS, close, wide)


def test_the_same_as_the_op(rng, array) -> None:
    w, g = (rng.normal(size=shape).astype(np.float32) for shape in [(7, 5), (3, 4, 5)])
    ids = rng.integers(0, 7, size=(3, 4))
    table = Tensor(w, requires_grad=True)
    expected = ops.embedding(ids, table, padding_idx=3)
    expected.backward(Tensor(g))
    y, saved = embedding.forward(array(w), array(ids), padding_idx=3)
    dw = embedding.backward(array(g), *saved, padding_idx=3)
    assert table.grad is not None
    np.testing.assert_array_equal(to_device(y, "cpu"), expected.data)
    np.testing.assert_allclose(to_device(dw, "cpu"), table.grad.data, rtol=2e-6, atol=1e-6)


@CONFIGS
def test_ids_outside_of_the_table(config, rng, array, wide) -> None:
    """NaN in the forward, which is not to be overlooked; nothing is read or written outside."""
    w, g = (array(rng.normal(size=(n, 13)), np.float32) for n in (6, 5))
    ids = array([-1, 5, 6, 0, -6])
    y, saved = embedding.forward(w, ids, config=config)
    assert np.isnan(wide(y)).all(axis=1).tolist() == [True, False, True, False, True]
    dw = wide(embedding.backward(g, *saved, config=config))
    assert (dw != 0).any(axis=1).tolist() == [True, False, False, False, False, True]


@CONFIGS
def test_adding_to_a_gradient_that_is_there(config, layout, dtype, rng, array, close, wide) -> None:
    table, ids = layout(array(rng.normal(size=(6, 10)), dtype)), array([3, 1, 3, 5, 3])
    g = array(rng.normal(size=(5, 10)), dtype)
    if table.strides[0] == 0:
        with pytest.raises(ValueError, match="broadcast"):
            embedding.add_rows(table, ids, g, config=config)
        return
    expected = wide(table) + summed(wide(g), np.array([3, 1, 3, 5, 3]), (6, 10), 1)
    embedding.add_rows(table, ids, g, padding_idx=1, config=config)
    close(table, expected)


def test_halves_are_added_in_float32(array, wide) -> None:
    """1 + 2⁻¹¹ is 1 in float16: of any number of such steps nothing would come."""
    g = np.full((33, 1), 2.0**-11)
    g[0] = 1
    _, saved = embedding.forward(array(np.zeros((1, 1)), np.float16), array(np.zeros(33, int)))
    assert wide(embedding.backward(array(g, np.float16), *saved)) == 1 + 2.0**-6


def test_rows_are_added_in_the_order_of_their_ids(rng, array, wide) -> None:
    """Row by row as NumPy would, to the bit, in float32: another order gives other roundings."""
    ids, g = rng.integers(0, 2, size=80), rng.normal(size=(80, 5)).astype(np.float32)
    _, saved = embedding.forward(array(np.zeros((2, 5)), np.float32), array(ids))
    one_by_one = {"ROWS": 1, "BLOCK": 8, "num_warps": 1}
    expected = np.zeros((2, 5), np.float32)
    for id, row in zip(ids, g, strict=True):
        expected[id] += row
    dw = embedding.backward(array(g), *saved, config=one_by_one)
    np.testing.assert_array_equal(wide(dw), expected)


def test_twice_is_the_same_to_the_bit(rng, array, wide) -> None:
    w, g = (array(rng.normal(size=(n, 5)), np.float32) for n in (3, 60))
    _, saved = embedding.forward(w, array(rng.integers(0, 3, size=60)))
    first, second = (wide(embedding.backward(g, *saved)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_nothing(array) -> None:
    for table, shape in [((3, 4), (0,)), ((3, 4), (2, 0)), ((3, 0), (2,)), ((0, 4), (0,))]:
        w, ids = array(np.ones(table), np.float32), array(np.zeros(shape, int))
        y, saved = embedding.forward(w, ids)
        assert y.shape == (*shape, table[1])
        dw = embedding.backward(y, *saved)
        assert dw.shape == table
        assert not dw.any()


def test_a_table_without_rows(array, wide) -> None:
    w, ids = array(np.ones((0, 4)), np.float32), array(np.zeros(2, int))
    y, saved = embedding.forward(w, ids)
    assert np.isnan(wide(y)).all()
    assert embedding.backward(y, *saved).shape == (0, 4)


def test_what_is_refused(array) -> None:
    w, ids = array(np.ones((3, 4)), np.float32), array([0, 1])
    with pytest.raises(TypeError, match="got float64"):
        embedding.forward(w.astype(np.float64), ids)
    with pytest.raises(ValueError, match=r"table \(V, C\)"):
        embedding.forward(w[0], ids)
    with pytest.raises(TypeError, match="integer ids, got bool"):
        embedding.forward(w, ids == 1)
    with pytest.raises(ValueError, match=r"gradient of shape \(2, 4\)"):
        embedding.backward(w, w, ids)


@pytest.mark.parametrize("n", [1, 7, 1024, 1500])
def test_the_order_of_ids_without_a_sort(array, rng, n) -> None:
    """What a CUDA graph uses: the same permutation as a stable sort, equal ids in their order."""
    ids = rng.integers(0, 9, 2 * n)[::2]
    order = to_device(embedding.ranked(array(ids)[:]), "cpu")
    np.testing.assert_array_equal(order, np.argsort(ids, kind="stable"))


def test_the_gradient_is_the_same_by_either_order(array, rng) -> None:
    ids, g = array(rng.integers(0, 5, (3, 7))), array(rng.normal(size=(3, 7, 4)), "float32")
    w = array(rng.normal(size=(6, 4)), "float32")
    sorted_by_cupy = embedding.backward(g, w, ids)
    with rehearsal():
        counted = embedding.backward(g, w, ids)
    np.testing.assert_array_equal(to_device(counted, "cpu"), to_device(sorted_by_cupy, "cpu"))
