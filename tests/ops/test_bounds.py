"""Ids that are out of range are found without asking the GPU; and are never let through."""

import numpy as np
import pytest

from tinygrad_llm import Tensor, backend, ops
from tinygrad_llm.autograd import mark_written
from tinygrad_llm.ops import bounds


@pytest.fixture
def gpu(fake_cupy, monkeypatch):
    """The stand-in's module, and a list of what was asked of the GPU."""
    asked, get = [], fake_cupy.ndarray.get

    def noted(self, *args, **kwargs):
        asked.append(self.shape)
        return get(self, *args, **kwargs)

    monkeypatch.setattr(fake_cupy.ndarray, "get", noted)
    return backend.cupy(), asked


def uploaded(cupy, values):
    array = cupy.asarray(values)
    bounds.remember(array, values)
    return array


def test_what_was_looked_at_on_the_host_is_not_asked_of_the_gpu(gpu):
    cupy, asked = gpu
    w = Tensor(cupy.ones((5, 3), dtype=np.float32), requires_grad=True)
    ids, targets = np.array([[0, 4], [2, 2]]), np.array([[1, -100], [0, 2]])
    x = ops.embedding(uploaded(cupy, ids), w)
    loss = ops.cross_entropy(x, uploaded(cupy, targets))
    loss.backward()
    assert asked == []
    expected = ops.cross_entropy(ops.embedding(ids, w.to("cpu").detach()), targets)
    assert loss.item() == expected.item()


def test_what_comes_from_the_host_is_looked_at_there(gpu):
    cupy, asked = gpu
    w = Tensor(cupy.ones((5, 3), dtype=np.float32))
    x = ops.embedding(np.array([0, 4]), w)
    ops.cross_entropy(x, [2, 0])
    with pytest.raises(IndexError, match="id 5 is outside the table's rows 0 to 4"):
        ops.embedding([1, 5], w)
    assert asked == []


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("wrong", "ignored"), [(5, 0), (-1, 0), (-100, 0), (5, -100)])
def test_an_id_out_of_range_is_named(gpu, known, wrong, ignored):
    cupy, asked = gpu
    values = np.array([0, wrong, 4])
    ids = uploaded(cupy, values) if known else cupy.asarray(values)
    with pytest.raises(IndexError, match=f"id {wrong} is outside the table's rows 0 to 4"):
        ops.embedding(ids, Tensor(cupy.ones((5, 3), dtype=np.float32)))
    logits = Tensor(cupy.ones((3, 5), dtype=np.float32))
    with pytest.raises(ValueError, match=f"a target is {wrong}, but the logits have classes 0 to"):
        ops.cross_entropy(logits, ids[:], ignore_index=ignored or -7)
    assert known or asked


def test_a_view_is_known_and_what_is_computed_is_not(gpu):
    cupy, asked = gpu
    w = Tensor(cupy.ones((5, 3), dtype=np.float32))
    ids = uploaded(cupy, np.array([[0, 4], [2, 2]]))
    ops.embedding(ids.reshape(-1)[1:], w)
    assert asked == []
    with pytest.raises(IndexError, match="id 5"):
        ops.embedding(ids + 1, w)


def test_memory_that_was_overwritten_is_looked_at_again(gpu):
    cupy, asked = gpu
    w, ids = Tensor(cupy.ones((5, 3), dtype=np.float32)), uploaded(cupy, np.array([0, 4]))
    ids[0] = 7
    mark_written(ids, "the test")
    with pytest.raises(IndexError, match="id 7"):
        ops.embedding(ids, w)
    assert asked


def test_nothing_is_remembered_longer_than_the_array(gpu):
    cupy, _ = gpu
    before = len(bounds._known)
    ids = uploaded(cupy, np.array([0, 4]))
    assert len(bounds._known) == before + 1
    del ids
    assert len(bounds._known) == before


def test_no_ids_and_only_ignored_ones_fit_every_table(gpu):
    cupy, asked = gpu
    ops.embedding(uploaded(cupy, np.empty(0, np.int64)), Tensor(cupy.ones((0, 3))))
    logits = Tensor(cupy.ones((2, 3), dtype=np.float32))
    loss = ops.cross_entropy(logits, uploaded(cupy, np.array([-100, -100])))
    assert asked == []
    assert loss.item() == 0.0
