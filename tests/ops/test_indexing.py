from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinygrad_llm import Tensor, no_grad, ops


def _numbers(*shape: int) -> np.ndarray:
    return np.arange(float(np.prod(shape, dtype=int))).reshape(shape)


def _same(y, expected):
    expected = np.asarray(expected)
    assert isinstance(y, Tensor)
    assert y.dtype == expected.dtype
    assert y.shape == expected.shape
    np.testing.assert_array_equal(y.numpy(), expected)


# --- every kind of NumPy index --------------------------------------------------------------------


@st.composite
def indexed_arrays(draw: st.DrawFn) -> tuple[np.ndarray, Any]:
    """An array and an index of mixed kinds: ints, slices, ..., None, masks, integer arrays."""
    shape = draw(hnp.array_shapes(max_dims=4, max_side=4))
    x = _numbers(*shape)
    items: list[Any] = []
    common = draw(hnp.array_shapes(min_dims=0, max_dims=2, max_side=3))
    axis, dots = 0, False
    while axis < len(shape):
        kind = draw(st.sampled_from(["int", "slice", "none", "mask", "array", "dots", "stop"]))
        n = shape[axis]
        if kind == "stop":
            break
        if kind == "none":
            items.append(None)
            continue
        if kind == "dots":
            if dots:
                break
            dots = True
            items.append(Ellipsis)
            axis += draw(st.integers(0, len(shape) - axis))
            continue
        if kind == "int":
            number = draw(st.integers(-n, n - 1))
            items.append(draw(st.sampled_from([number, np.int64(number), np.array(number)])))
        elif kind == "slice":
            items.append(draw(st.slices(n)))
        elif kind == "mask":
            items.append(draw(hnp.arrays(bool, n)))
        else:
            array = draw(hnp.arrays(np.int64, common, elements=st.integers(-n, n - 1)))
            items.append(draw(st.sampled_from([array, array.tolist()])) if array.ndim else array)
        axis += 1
    return x, items[0] if len(items) == 1 and draw(st.booleans()) else tuple(items)


def _with_tensors(index: Any) -> Any:
    """The same index, its arrays as Tensors."""
    items = index if isinstance(index, tuple) else (index,)
    wrapped = tuple([Tensor(i) if isinstance(i, np.ndarray) else i for i in items])
    return wrapped if isinstance(index, tuple) else wrapped[0]


@given(indexed_arrays())
def test_reading_equals_numpy(case):
    x, index = case
    try:
        expected = x[index]
    except IndexError:  # masks and arrays whose sizes do not go together
        with pytest.raises(IndexError, match="the tensor has shape"):
            Tensor(x)[index]
        return
    _same(Tensor(x)[index], expected)
    _same(Tensor(x)[_with_tensors(index)], expected)


@given(indexed_arrays(), st.booleans())
def test_the_gradient_of_reading_counts_how_often_an_element_is_read(case, second_order):
    x, index = case
    try:
        expected = np.zeros(x.shape)
        np.add.at(expected, index, 1.0)
    except IndexError:
        assume(False)
    leaf = Tensor(x, requires_grad=True)
    leaf[index].sum().backward(create_graph=second_order)
    assert leaf.grad is not None
    np.testing.assert_array_equal(leaf.grad.numpy(), expected)


@given(indexed_arrays())
def test_writing_equals_numpy(case):
    x, index = case
    try:
        values = -1.0 - _numbers(*x[index].shape)
    except IndexError:
        assume(False)
    expected = x.copy()
    expected[index] = values
    _same(ops.setitem(x, index, values), expected)
    y = Tensor(x.copy())
    y[_with_tensors(index)] = Tensor(values)
    _same(y, expected)


@given(indexed_arrays())
def test_the_gradient_of_writing_goes_to_the_values_that_stay(case):
    x, index = case
    try:
        values = _numbers(*x[index].shape)
    except IndexError:
        assume(False)
    place = np.full(x.shape, -1.0)
    place[index] = values
    leaf, value = Tensor(x, requires_grad=True), Tensor(values, requires_grad=True)
    weight = _numbers(*x.shape) + 1.0
    (ops.setitem(leaf, index, value) * weight).sum().backward()
    assert leaf.grad is not None
    assert value.grad is not None
    np.testing.assert_array_equal(leaf.grad.numpy(), np.where(place < 0, weight, 0))
    expected = np.zeros(values.size)
    np.add.at(expected, place[place >= 0].astype(int), weight[place >= 0])
    np.testing.assert_array_equal(value.grad.numpy(), expected.reshape(values.shape))


@pytest.mark.parametrize(
    "index",
    [0, -1, slice(1, None), (slice(None), 0), ..., None, (..., None, 0), True, False, np.True_,
     [0, 2], [], [True, False, True], ([0, 2], slice(None), [1, 0]), np.array([[0, 1], [2, 0]]),
     (slice(None, None, -1), [[1], [0]]), np.array(1), np.array([2, 0], np.uint8), (0, 1, 2), ()],
)  # fmt: skip
def test_kinds_of_index(index, layout):
    x = layout(_numbers(3, 4, 5))
    expected_index = index if not (isinstance(index, list) and not index) else np.zeros(0, int)
    _same(Tensor(x)[index], x[expected_index])


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32", "int8", "bool"])
def test_indexing_keeps_the_dtype(kind):
    x = _numbers(3, 4).astype(getattr(ml_dtypes, kind, kind))
    for index in (0, (0, 0), [0, 1], x > 0, slice(1)):
        _same(Tensor(x)[index], x[index])


def test_a_basic_index_is_a_view_and_others_are_copies():
    x = Tensor(_numbers(3, 4))
    assert np.shares_memory(x[1:, 0].data, x.data)
    assert np.shares_memory(x[..., None].data, x.data)
    assert not np.shares_memory(x[[0, 1]].data, x.data)
    assert not np.shares_memory(x[x > 0].data, x.data)


def test_zero_dimensional_and_empty_tensors():
    _same(Tensor(np.float64(3))[()], np.array(3.0))
    _same(Tensor(np.float64(3))[...], np.array(3.0))
    _same(Tensor(np.float64(3))[None], np.array([3.0]))
    _same(Tensor(np.zeros((0, 3)))[:, 1], np.zeros(0))
    _same(Tensor(np.zeros((0, 3)))[np.zeros(0, int)], np.zeros((0, 3)))


def test_tensors_inside_slices():
    x = Tensor(_numbers(5))
    assert x[Tensor(1) : Tensor(3)].tolist() == [1.0, 2.0]


def test_a_wrong_index_is_refused_with_the_shape():
    x = Tensor(_numbers(2, 3))
    with pytest.raises(IndexError, match=r"index 2 is out of bounds.*\(2, 3\)"):
        x[2]
    with pytest.raises(IndexError, match=r"index 5 is out of bounds.*\(2, 3\)"):
        x[[0, 5]]
    with pytest.raises(IndexError, match=r"too many indices.*\(2, 3\)"):
        x[0, 0, 0]
    with pytest.raises(IndexError, match=r"boolean.*\(2, 3\)"):
        x[np.ones(3, bool)]
    with pytest.raises(TypeError, match="integers or booleans, got float"):
        x[np.zeros(1)]
    with pytest.raises(TypeError, match="integers or booleans, got float"):
        x[[0.5]]
    with pytest.raises(TypeError, match="integers or booleans, got float32"):
        x[Tensor([1.0])]


def test_values_that_do_not_fit_are_refused_with_both_shapes():
    x = Tensor(_numbers(2, 3))
    with pytest.raises(ValueError, match=r"\(4,\).*\(3,\)"):
        ops.setitem(x, 0, np.ones(4))


def test_a_value_is_broadcast_and_converted():
    x = Tensor(np.zeros((2, 3), np.float32))
    y = ops.setitem(x, (slice(None), 1), np.float64(2.5))
    assert y.dtype == np.float32
    assert y.tolist() == [[0.0, 2.5, 0.0]] * 2
    assert x.tolist() == [[0.0] * 3] * 2
    value = Tensor(np.ones((1, 1, 3), np.float32), requires_grad=True)
    ops.setitem(x, 0, value).sum().backward()  # NumPy drops leading axes of size 1
    assert value.grad is not None
    assert value.grad.tolist() == [[[1.0] * 3]]


@pytest.mark.parametrize("read", [
    lambda x, i: x[i],
    lambda x, i: x[:, i],
    lambda x, i: ops.index_select(x, 0, i),
    lambda x, i: ops.embedding(i, x),
    lambda x, i: ops.gather(x, 0, i[:, None]),
    lambda x, i: ops.setitem(x, i, 1.0),
    lambda x, i: ops.scatter_add(x, 0, i[:, None], x),
])  # fmt: skip
def test_an_index_that_was_overwritten_before_backward_is_not_used(read):
    x, index = Tensor(np.ones((3, 3)), requires_grad=True), Tensor([0, 1])
    y = read(x, index).sum()
    index += 1
    with pytest.raises(RuntimeError, match=r"\+= y has overwritten"):
        y.backward()


# --- along an axis --------------------------------------------------------------------------------


@given(hnp.array_shapes(min_dims=1, max_dims=3, max_side=4), st.data())
def test_take_along_axis_equals_numpy(shape, data):
    x = _numbers(*shape)
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    length = data.draw(st.integers(0, 4))
    wanted = tuple([length if i == axis % x.ndim else n for i, n in enumerate(shape)])
    index = data.draw(
        hnp.arrays(np.int64, wanted, elements=st.integers(-shape[axis], shape[axis] - 1))
    )
    _same(ops.take_along_axis(x, index, axis), np.take_along_axis(x, index, axis))
    _same(ops.take_along_axis(x, Tensor(index), axis), np.take_along_axis(x, index, axis))


def test_take_along_axis_broadcasts():
    x = _numbers(2, 3)
    index = np.array([[2, 0]])
    _same(ops.take_along_axis(x, index, 1), np.take_along_axis(x, np.repeat(index, 2, 0), 1))


def test_argmax_and_argsort_are_read_back(rng):
    x = rng.normal(size=(3, 5))
    best = ops.take_along_axis(x, ops.argmax(x, 1, keepdims=True), 1)
    np.testing.assert_array_equal(best.numpy(), x.max(1, keepdims=True))
    np.testing.assert_array_equal(
        ops.take_along_axis(x, ops.argsort(x, 1), 1).numpy(), np.sort(x, 1)
    )


@st.composite
def gathers(draw: st.DrawFn) -> tuple[np.ndarray, int, np.ndarray]:
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=4))
    axis = draw(st.integers(0, len(shape) - 1))
    sizes = tuple([draw(st.integers(0, 4 if i == axis else n)) for i, n in enumerate(shape)])
    index = draw(hnp.arrays(np.int64, sizes, elements=st.integers(0, shape[axis] - 1)))
    return _numbers(*shape), axis, index


def _places(axis: int, index: np.ndarray) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(place in index, place in x) by PyTorch's definition, element by element."""
    return [
        (place, (*place[:axis], int(index[place]), *place[axis + 1 :]))
        for place in itertools.product(*map(range, index.shape))
    ]


@given(gathers())
def test_gather_is_its_definition(case):
    x, axis, index = case
    expected = np.zeros(index.shape)
    for place, source in _places(axis, index):
        expected[place] = x[source]
    _same(ops.gather(x, axis, index), expected)
    _same(ops.gather(x, axis - x.ndim, Tensor(index)), expected)


@given(gathers(), st.integers(0, 2))
def test_scatter_add_is_its_definition(case, larger):
    x, axis, index = case
    source = _numbers(*[n + larger for n in index.shape]) + 0.5
    expected = x.copy()
    for place, target in _places(axis, index):
        expected[target] += source[place]
    _same(ops.scatter_add(x, axis, index, source), expected)


def test_scatter_add_takes_the_dtype_of_x():
    y = ops.scatter_add(np.zeros(3, np.float32), 0, np.array([1, 1]), np.ones(2))
    assert y.dtype == np.float32
    assert y.tolist() == [0.0, 2.0, 0.0]
    half = ops.scatter_add(np.zeros(3, ml_dtypes.bfloat16), 0, np.array([1, 1]), np.ones(2))
    assert half.dtype == ml_dtypes.bfloat16
    assert half.tolist() == [0.0, 2.0, 0.0]


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_index_select_equals_take(axis, layout):
    x = layout(_numbers(3, 4))
    for index in ([2, 0, 2], [], [-1]):
        places = np.array(index, dtype=np.int64)
        _same(ops.index_select(x, axis, places), np.take(x, places, axis))
        _same(ops.index_select(x, axis, Tensor(places)), np.take(x, places, axis))
    _same(ops.index_select(x, 0, [1]), x[[1]])


def test_wrong_places_are_refused():
    x = Tensor(_numbers(2, 3))
    for function in (ops.take_along_axis, lambda x, i, axis: ops.gather(x, axis, i)):
        with pytest.raises(ValueError, match=r"as many axes.*\(2,\).*axis 0.*\(2, 3\)"):
            function(x, np.array([0, 1]), 0)
        with pytest.raises(ValueError, match="axis 2"):
            function(x, np.array([[0]]), 2)
        with pytest.raises(TypeError, match="integers, got float64"):
            function(x, np.zeros((2, 3)), 0)
        with pytest.raises(IndexError, match=r"7 is out of bounds.*\(2, 3\)"):
            function(x, np.array([[7], [0]]), 1)
    with pytest.raises(ValueError, match=r"\(3, 1\) exceeds \(2, 3\) on axis 0"):
        ops.gather(x, 1, np.zeros((3, 1), int))
    with pytest.raises(ValueError, match=r"source of at least \(2, 2\), got \(2, 1\)"):
        ops.scatter_add(x, 1, np.zeros((2, 2), int), np.ones((2, 1)))
    with pytest.raises(ValueError, match=r"source of at least \(2, 2\), got \(4,\)"):
        ops.scatter_add(x, 1, np.zeros((2, 2), int), np.ones(4))
    with pytest.raises(ValueError, match=r"1-D index.*\(1, 1\)"):
        ops.index_select(x, 0, [[0]])
    with pytest.raises(ValueError, match=r"axis 3"):
        ops.index_select(x, 3, [0])
    with pytest.raises(TypeError, match="integers"):
        ops.index_select(x, 0, [True, False])


# --- writing in place -----------------------------------------------------------------------------


def test_an_unrecorded_write_goes_into_the_array():
    array = _numbers(2, 3)
    x = Tensor(array)
    x[0] = 7
    x[1, x[1] > 4] = np.array([9.0])
    assert array.tolist() == [[7.0, 7.0, 7.0], [3.0, 4.0, 9.0]]
    with no_grad():
        leaf = Tensor(array, requires_grad=True)
        leaf[:] = 0
    assert array.sum() == 0
