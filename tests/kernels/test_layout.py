from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm.kernels import layout


def test_strides_are_in_elements_and_0_where_nothing_is_stepped_over() -> None:
    x = np.zeros((4, 1, 6), np.float16)
    assert layout.strides(x) == (6, 0, 1)
    assert layout.strides(x[::2, :, ::-3]) == (12, 0, -3)
    assert layout.strides(np.broadcast_to(x[0], x.shape)) == (0, 0, 1)


@given(st.data())
def test_merged_axes_visit_the_same_elements_in_the_same_order(data) -> None:
    """Two views of one shape, of up to five axes, walked through by the merged axes."""
    shape = data.draw(st.lists(st.integers(1, 3), min_size=0, max_size=5))
    order = data.draw(st.permutations(range(len(shape))))
    base = np.arange(np.prod(shape, dtype=int) * 2).reshape(2, -1)[0]
    first = base.reshape([shape[i] for i in order]).transpose(np.argsort(order))
    zero = data.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    second = np.broadcast_to(first[tuple([slice(0, 1) if z else slice(None) for z in zero])], shape)
    views = [first, second]
    at_most = data.draw(st.integers(1, 5))
    found = layout.merge_axes(shape, *[layout.strides(v) for v in views], at_most=at_most)
    if found is None:
        assert len(shape) > at_most
        return
    sizes, steps = found
    assert len(sizes) == at_most
    assert np.prod(sizes, dtype=int) == first.size
    for view, step in zip(views, steps, strict=True):
        places = np.indices(sizes).reshape(at_most, -1).T @ np.array(step)
        start = view.reshape(-1)[0]
        np.testing.assert_array_equal(start + places, view.reshape(-1))


def test_contiguous_arrays_become_one_axis() -> None:
    assert layout.merge_axes((2, 3, 4), (12, 4, 1), at_most=3) == ((24, 1, 1), [(1, 0, 0)])
    merged = layout.merge_axes((2, 3, 4), (12, 4, 1), (0, 0, 1), at_most=3)
    assert merged == ((6, 4, 1), [(4, 1, 0), (0, 1, 0)])
    assert layout.merge_axes((2, 3, 4), (12, 4, 1), (0, 4, 1), at_most=1) is None


def test_an_absent_array_has_strides_of_0() -> None:
    x = np.zeros((2, 3, 4), np.float32)
    (seen, nothing), sizes, steps = layout.as_rows(x, None)
    assert seen is x
    assert nothing is None
    assert sizes == (1, 1)
    assert steps == [(4, 0, 0, 1), (0, 0, 0, 0)]


@pytest.mark.parametrize(("farthest", "needed"), [(2**31 - 1, False), (2**31, True)])
def test_64_bits_are_needed_from_two_to_the_31_on(farthest, needed) -> None:
    memory = np.zeros(1, np.int8)
    for step in (farthest, -farthest):
        view = np.lib.stride_tricks.as_strided(memory, (2, 1), (step, 1))  # never read
        assert layout.needs_int64(np.zeros(3), view) is needed
    assert not layout.needs_int64(np.zeros((0, 5)))
