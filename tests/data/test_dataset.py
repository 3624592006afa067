"""DataLoader and TensorDataset."""

from typing import Any, NamedTuple

import numpy as np
import pytest

from tinygrad_llm import Tensor, manual_seed
from tinygrad_llm.backend import RandomStream
from tinygrad_llm.data.dataset import DataLoader, TensorDataset, default_collate


def numbers(loader: DataLoader) -> list[list[int]]:
    return [batch.numpy().tolist() for batch in loader]


def test_batches_come_in_order_and_the_last_is_smaller():
    loader = DataLoader(list(range(7)), batch_size=3)
    assert numbers(loader) == [[0, 1, 2], [3, 4, 5], [6]]
    assert len(loader) == 3
    dropping = DataLoader(list(range(7)), batch_size=3, drop_last=True)
    assert numbers(dropping) == [[0, 1, 2], [3, 4, 5]]
    assert len(dropping) == 2
    assert numbers(DataLoader([], batch_size=2)) == []


def test_shuffled_epochs_have_all_examples_once_each_in_another_order():
    loader = DataLoader(list(range(50)), 8, shuffle=True, generator=RandomStream(1))
    one, two = ([i for batch in numbers(loader) for i in batch] for _ in range(2))
    assert sorted(one) == sorted(two) == list(range(50))
    assert one != two
    again = DataLoader(list(range(50)), 8, shuffle=True, generator=RandomStream(1))
    assert [i for batch in numbers(again) for i in batch] == one


def test_the_default_stream_is_that_of_manual_seed():
    loader = DataLoader(list(range(20)), 20, shuffle=True)
    manual_seed(5)
    one = numbers(loader)
    manual_seed(5)
    assert numbers(loader) == one


@pytest.mark.parametrize("shuffle", [False, True])
def test_tensors_give_pairs_of_batches(shuffle):
    x, y = np.arange(12.0, dtype=np.float32).reshape(6, 2), np.arange(6)
    loader = DataLoader(TensorDataset(Tensor(x), y), batch_size=4, shuffle=shuffle)
    seen = []
    for inputs, targets in loader:
        np.testing.assert_array_equal(inputs.numpy(), x[targets.numpy()])
        assert inputs.dtype == np.float32
        seen += targets.numpy().tolist()
    assert sorted(seen) == list(range(6))


def test_batches_taken_at_once_are_those_that_are_collated():
    data = TensorDataset(np.arange(10).reshape(5, 2), np.arange(5))
    fast = list(DataLoader(data, 2))
    slow = list(DataLoader([data[i] for i in range(5)], 2))
    for one, two in zip(fast, slow, strict=True):
        assert type(one) is type(two)
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a.numpy(), b.numpy())


class Example(NamedTuple):
    x: Any
    name: str


def test_collating_keeps_the_form():
    batch = default_collate([Example(np.zeros(2), "a"), Example(np.ones(2), "b")])
    assert isinstance(batch, Example)
    assert batch.x.numpy().tolist() == [[0, 0], [1, 1]]
    assert batch.name == ["a", "b"]
    batch = default_collate([{"n": 1, "f": 0.5}, {"n": 2, "f": 1.5}])
    assert batch["n"].numpy().tolist() == [1, 2]
    assert batch["f"].dtype == np.float32


def test_a_collate_fn_of_ones_own():
    loader = DataLoader([[1], [2, 3]], 2, collate_fn=lambda rows: [n for row in rows for n in row])
    assert list(loader) == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("examples", "error", "match"),
    [
        ([np.zeros(2), np.zeros(3)], ValueError, r"got \(2,\) and \(3,\): fill them up"),
        ([(1, 2), (1,)], ValueError, "as many parts"),
        ([object()], TypeError, "got a object"),
    ],
)
def test_what_cannot_be_collated_is_refused(examples, error, match):
    with pytest.raises(error, match=match):
        default_collate(examples)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        DataLoader([1], 0)
    with pytest.raises(ValueError, match="num_workers must be 0"):
        DataLoader([1], num_workers=4)
    with pytest.raises(ValueError, match=r"of one length, got \[2, 3\]"):
        TensorDataset(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match=r"of one length, got \[\]"):
        TensorDataset()
