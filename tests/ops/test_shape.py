from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinygrad_llm import Tensor, ops
from tinygrad_llm.ops.shape import sum_to

arrays = hnp.arrays(
    np.float64, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    elements=st.integers(-50, 50),
)  # fmt: skip
SHAPES = [(2, 3, 4), (3, 4), (5,), (), (0, 3), (2, 0, 1)]
KINDS = ["float32", "float64", "float16", "bfloat16", "int64", "int8", "bool"]


@pytest.fixture(params=KINDS)
def kind(request):
    return np.dtype(getattr(ml_dtypes, request.param, request.param))


def _numbers(shape, kind):
    return np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(kind)


def _same(y, expected):
    assert isinstance(y, Tensor)
    assert y.dtype == expected.dtype
    assert y.shape == expected.shape
    np.testing.assert_array_equal(y.numpy(), expected)


# --- one array in another shape -------------------------------------------------------------------


def test_ops_that_move_elements_keep_every_dtype(kind, layout):
    x = layout(_numbers((2, 3, 4), kind))
    _same(ops.reshape(x, (4, -1)), x.reshape(4, -1))
    _same(ops.transpose(x), x.T)
    _same(ops.swapaxes(x, 0, -1), x.swapaxes(0, -1))
    _same(ops.broadcast_to(x, (5, 2, 3, 4)), np.broadcast_to(x, (5, 2, 3, 4)))
    _same(ops.concatenate([x, x], 1), np.concatenate([x, x], 1))
    _same(ops.stack([x, x], -1), np.stack([x, x], -1))
    _same(ops.flip(x, 1), np.flip(x, 1))
    _same(ops.roll(x, 1, 2), np.roll(x, 1, 2))
    _same(ops.tril(x), np.tril(x))
    _same(ops.triu(x, 1), np.triu(x, 1))
    _same(ops.pad(x, 1), np.pad(x, 1))
    _same(ops.copy(x), x.copy())
    _same(ops.split(x, 2, -1)[1], np.split(x, 2, -1)[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_reshape_equals_numpy(shape, layout):
    x = layout(_numbers(shape, np.float32))
    for target in ((x.size,), (1, x.size), (x.size, 1, 1)):
        _same(ops.reshape(x, target), x.reshape(target))
        _same(Tensor(x).reshape(*target), x.reshape(target))
        _same(Tensor(x).reshape(target), x.reshape(target))
    _same(ops.reshape(x, -1), x.reshape(-1))
    _same(Tensor(x).reshape(-1), x.reshape(-1))


@pytest.mark.parametrize("six", [np.prod((2, 3)), np.int32(6)])
def test_reshape_takes_numpy_integers(six):
    x = Tensor(np.ones((2, 3)))
    assert x.reshape(six).shape == (6,)
    assert x.reshape(six // 2, -1).shape == (3, 2)
    assert ops.reshape(x, six).shape == (6,)


def test_reshape_is_a_view_where_there_can_be_one():
    x = np.zeros((2, 6))
    assert np.shares_memory(ops.reshape(x, (3, 4)).data, x)
    assert not np.shares_memory(ops.reshape(x.T, (3, 4)).data, x)


def test_flatten_merges_a_range_of_axes():
    x = Tensor(_numbers((2, 3, 4), np.float32))
    assert x.flatten().shape == (24,)
    assert x.flatten(1).shape == (2, 12)
    assert x.flatten(0, 1).shape == (6, 4)
    assert x.flatten(-2, -1).shape == (2, 12)
    assert x.flatten(1, 1).shape == (2, 3, 4)
    assert Tensor(1.0).flatten().shape == (1,)
    assert Tensor(np.ones((0, 3))).flatten().shape == (0,)
    with pytest.raises(ValueError, match="axis 3"):
        x.flatten(3)
    with pytest.raises(ValueError, match="axis -4"):
        x.flatten(0, -4)
    with pytest.raises(ValueError, match=r"start.*end"):
        x.flatten(2, 1)


@pytest.mark.parametrize("axes", [*itertools.permutations(range(3)), None, (-1, 0, 1)])
def test_transpose_equals_numpy(axes, layout):
    x = layout(_numbers((2, 3, 4), np.float32))
    _same(ops.transpose(x, axes), x.transpose(axes))
    if axes is not None:
        _same(ops.permute(x, axes), x.transpose(axes))
        _same(Tensor(x).permute(*axes), x.transpose(axes))
        _same(Tensor(x).transpose(axes), x.transpose(axes))


def test_transposing_is_a_view():
    x = np.zeros((2, 3))
    for y in (ops.transpose(x), ops.swapaxes(x, 0, 1), ops.moveaxis(x, 0, 1), Tensor(x).T):
        assert np.shares_memory(y.data, x)


def test_transpose_of_few_dimensions():
    assert ops.transpose(Tensor(1.0)).shape == ()
    assert ops.transpose(np.ones(3)).shape == (3,)
    assert ops.transpose(np.ones((0, 2))).shape == (2, 0)


@given(arrays.filter(lambda x: x.ndim > 0), st.data())
def test_swapping_and_moving_axes_equals_numpy(x, data):
    a, b = (data.draw(st.integers(-x.ndim, x.ndim - 1)) for _ in range(2))
    _same(ops.swapaxes(x, a, b), np.swapaxes(x, a, b))
    _same(ops.moveaxis(x, a, b), np.moveaxis(x, a, b))


def test_wrong_axes_are_refused():
    x = Tensor(np.ones((2, 3, 4)))
    with pytest.raises(ValueError, match=r"all 3 axes of \(2, 3, 4\).*\(0, 1\).*swapaxes"):
        x.transpose(0, 1)
    with pytest.raises(ValueError, match="all 3 axes"):
        x.transpose(0, 0, 1)
    with pytest.raises(ValueError, match="all 3 axes"):
        x.transpose(0, 1, 3)
    for call in (
        lambda: ops.swapaxes(x, 0, 3),
        lambda: ops.moveaxis(x, -4, 0),
        lambda: ops.squeeze(x, 3),
        lambda: ops.expand_dims(x, 5),
        lambda: ops.concatenate([x, x], 3),
        lambda: ops.stack([x, x], 4),
        lambda: ops.split(x, 1, 3),
        lambda: ops.chunk(x, 1, 3),
    ):
        with pytest.raises(ValueError, match=r"axis -?\d is out of range for [34] dimensions"):
            call()
    for call in (lambda: ops.flip(x, 3), lambda: ops.roll(x, 1, 3)):
        with pytest.raises(ValueError, match="axis 3"):
            call()


def test_a_shape_of_another_size_is_refused_with_both():
    with pytest.raises(ValueError, match=r"size 6 into shape \(4,\)"):
        ops.reshape(np.ones((2, 3)), (4,))


# --- broadcasting ---------------------------------------------------------------------------------


@given(hnp.mutually_broadcastable_shapes(num_shapes=1, base_shape=(2, 3, 4), min_dims=0))
def test_broadcast_to_equals_numpy_and_sum_to_is_its_adjoint(shapes):
    """⟨broadcast(x), g⟩ = ⟨x, sum_to(g)⟩"""
    small, big = shapes.input_shapes[0], shapes.result_shape
    rng = np.random.default_rng(0)
    x, g = (rng.integers(-9, 9, size=s).astype(np.float64) for s in (small, big))
    y = ops.broadcast_to(x, big)
    _same(y, np.broadcast_to(x, big))
    back = sum_to(g, small)
    assert back.shape == small
    assert (y.numpy() * g).sum() == (x * back).sum()
    assert sum_to(Tensor(g), small).tolist() == back.tolist()


def test_sum_to_by_example():
    g = np.ones((2, 3, 4))
    np.testing.assert_array_equal(sum_to(g, (3, 1)), np.full((3, 1), 8.0))
    np.testing.assert_array_equal(sum_to(g, ()), 24.0)
    assert sum_to(g, (2, 3, 4)) is g
    assert sum_to(np.ones((0, 3)), (1, 3)).tolist() == [[0.0] * 3]


def test_broadcasting_costs_no_memory_and_is_read_only():
    y = ops.broadcast_to(np.ones(3, np.float32), (1000, 3))
    assert y.data.strides == (0, 4)
    with pytest.raises(ValueError, match="read-only"):
        y[0] = 1.0


def test_expand_keeps_sizes_of_minus_one():
    x = Tensor(_numbers((3, 1), np.float32))
    assert x.expand(2, -1, 4).shape == (2, 3, 4)
    assert x.expand((-1, 5)).shape == (3, 5)
    assert x.broadcast_to((2, 3, 1)).shape == (2, 3, 1)
    assert ops.broadcast_to(Tensor(1.0), 3).shape == (3,)
    with pytest.raises(ValueError, match=r"\(3,1\).*\(2,4\)"):
        ops.broadcast_to(x, (2, 4))
    with pytest.raises(ValueError, match=r"-1|negative"):
        x.expand(-1, 3, 1)


def test_size_one_axes_come_and_go():
    x = Tensor(_numbers((2, 1, 3, 1), np.float32))
    assert x.squeeze().shape == (2, 3)
    assert x.squeeze(1).shape == (2, 3, 1)
    assert x.squeeze((1, -1)).shape == (2, 3)
    assert Tensor(np.ones((1, 1))).squeeze().shape == ()
    for axis in range(-5, 5):
        assert x.unsqueeze(axis).shape == np.expand_dims(x.numpy(), axis).shape
    assert ops.expand_dims(Tensor(1.0), 0).shape == (1,)
    with pytest.raises(ValueError, match=r"axis 0 of \(2, 1, 3, 1\)"):
        x.squeeze(0)


# --- joining and cutting --------------------------------------------------------------------------


@given(arrays.filter(lambda x: x.ndim > 0), st.data())
def test_cutting_and_joining_are_inverse(x, data):
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    size = x.shape[axis]
    cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=3)))
    pieces = ops.split(x, cuts, axis)
    for piece, expected in zip(pieces, np.split(x, cuts, axis), strict=True):
        _same(piece, expected)
    _same(ops.concatenate(pieces, axis), x)
    n = data.draw(st.integers(1, 5))
    chunks = ops.chunk(x, n, axis)
    assert 1 <= len(chunks) <= n
    assert len({c.shape for c in chunks[:-1]}) <= 1
    _same(ops.concatenate(chunks, axis), x)


def test_split_into_equal_parts():
    x = _numbers((6, 2), np.float32)
    for n in (1, 2, 3, 6):
        for piece, expected in zip(ops.split(x, n), np.split(x, n), strict=True):
            _same(piece, expected)
    assert [p.shape for p in ops.split(np.ones((0, 2)), 3)] == [(0, 2)] * 3
    for wrong in (4, 0, -1):
        with pytest.raises(ValueError, match=f"into {wrong} equal parts: axis 0 has size 6"):
            ops.split(x, wrong)


def test_chunk_is_pytorchs():
    assert [c.shape[0] for c in ops.chunk(np.ones(7), 3)] == [3, 3, 1]
    assert [c.shape[0] for c in ops.chunk(np.ones(4), 3)] == [2, 2]
    assert [c.shape[0] for c in ops.chunk(np.ones(2), 5)] == [1, 1]
    with pytest.raises(ValueError, match="at least one part, got 0"):
        ops.chunk(np.ones(2), 0)


def test_pieces_are_views():
    x = np.zeros((4, 2))
    assert all(np.shares_memory(piece.data, x) for piece in ops.split(x, 2))


@given(st.lists(arrays, min_size=1, max_size=3), st.data())
def test_stack_equals_numpy(xs, data):
    xs = [xs[0] + i for i in range(len(xs))]
    axis = data.draw(st.integers(-xs[0].ndim - 1, xs[0].ndim))
    _same(ops.stack([Tensor(x) for x in xs], axis), np.stack(xs, axis))


def test_joining_promotes():
    half, single = Tensor(np.ones(1, np.float16)), Tensor([2.0])
    assert ops.concatenate([half, single]).dtype == np.float32
    assert ops.concatenate([Tensor([1]), half]).dtype == np.float16
    assert ops.stack([half, half.astype("bfloat16")]).dtype == np.float32
    assert ops.concatenate([[1, 2], np.array([3])]).tolist() == [1, 2, 3]
    assert ops.stack([1.0, 2.0]).tolist() == [1.0, 2.0]


def test_what_does_not_join_is_refused():
    x = Tensor(np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"tensor 0 has shape \(2, 3\).*tensor 2 has \(2, 4\)"):
        ops.concatenate([x, x, Tensor(np.ones((2, 4)))])
    with pytest.raises(ValueError, match=r"tensor 1 has \(3,\)"):
        ops.concatenate([x, Tensor(np.ones(3))])
    with pytest.raises(ValueError, match=r"equal shapes.*\(2, 3\).*\(3, 2\)"):
        ops.stack([x, x.T])
    with pytest.raises(ValueError, match="stack"):
        ops.concatenate([Tensor(1.0), Tensor(2.0)])
    for empty in (ops.concatenate, ops.stack):
        with pytest.raises(ValueError, match="at least one tensor"):
            empty([])


# --- borders, reversal, triangles -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "widths"),
    [((2, 3), 1), ((2, 3), (1, 2)), ((2, 3), ((0, 1), (2, 0))), ((0, 2), 1), ((), 2), ((3,), 0),
     ((2, 2, 2), ((1, 0), (0, 0), (0, 3)))],
)  # fmt: skip
def test_pad_equals_numpy(shape, widths, layout, dtype):
    x = layout(_numbers(shape, dtype))
    expected = np.pad(x, widths, constant_values=-1.5) if shape else x
    _same(ops.pad(x, widths, -1.5), expected)


def test_pad_refuses_what_would_cut():
    with pytest.raises(ValueError, match="widths ≥ 0"):
        ops.pad(np.ones(3), -1)
    with pytest.raises(ValueError, match=r"\(3, ?2\).*\(1, ?2\)"):
        ops.pad(np.ones(3), ((1, 1), (1, 1), (1, 1)))


@given(arrays, st.data())
def test_flip_and_roll_equal_numpy(x, data):
    axes = data.draw(
        st.none() | st.lists(st.integers(0, x.ndim - 1), unique=True).map(tuple)
        if x.ndim
        else st.none()
    )
    _same(ops.flip(x, axes), np.flip(x, axes))
    shift = data.draw(st.integers(-9, 9))
    _same(ops.roll(x, shift, axes), np.roll(x, shift, axes))


def test_roll_takes_a_shift_per_axis():
    x = _numbers((3, 4), np.float32)
    for shift in ((1, 2), [1, 2]):
        leaf = Tensor(x, requires_grad=True)
        y = ops.roll(leaf, shift, (0, 1))
        np.testing.assert_array_equal(y.numpy(), np.roll(x, shift, (0, 1)))
        y[0, 0].backward()
        assert leaf.grad is not None
        assert leaf.grad[2, 2].item() == 1


@pytest.mark.parametrize("k", [-5, -1, 0, 1, 5])
@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (2, 3, 3), (0, 3), (2, 0)])
def test_triangles_equal_numpy(shape, k, layout):
    x = layout(_numbers(shape, np.float32) + 1)
    _same(ops.tril(x, k), np.tril(x, k))
    _same(ops.triu(x, k), np.triu(x, k))


def test_a_triangle_needs_two_dimensions():
    with pytest.raises(ValueError, match=r"two dimensions, got shape \(3,\)"):
        ops.tril(np.ones(3))


def test_a_copy_has_memory_of_its_own(layout):
    x = layout(_numbers((2, 3), np.float32))
    y = ops.copy(Tensor(x))
    assert not np.shares_memory(x, y.data)
    assert y.data.flags.c_contiguous
    assert y.data.flags.writeable
