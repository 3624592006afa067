"""Batches: targets follow inputs, nothing is lost, nothing comes twice, resume is exact."""

import itertools
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm.backend import RandomStream
from tinygrad_llm.data import loader
from tinygrad_llm.data.loader import (
    IGNORE_INDEX,
    DocumentWindows,
    EpochBatches,
    OnePass,
    PackedWindows,
    RandomBatches,
    RandomWindows,
    SequentialBatches,
    compact,
    read_through,
    shuffled,
    split,
)
from tinygrad_llm.data.tokens import Tokens

sizes = st.integers(1, 9)


# --- compact --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(257, np.uint16), (65_536, np.uint16), (65_537, np.uint32)]
)
def test_compact_takes_the_narrowest_dtype_that_holds_every_id(vocab_size: int, dtype: type):
    ids = compact([0, vocab_size - 1], vocab_size)
    assert ids.dtype == dtype
    assert ids.tolist() == [0, vocab_size - 1]


@pytest.mark.parametrize("bad", [-1, 300])
def test_compact_refuses_ids_outside_the_vocabulary(bad: int):
    with pytest.raises(ValueError, match=r"from 0 to 299 \(vocab_size 300\), got"):
        compact([5, bad], 300)


def test_compact_of_nothing():
    assert compact([], 300).shape == (0,)


@pytest.mark.parametrize("bad", [[[1, 2]], [0.5, 1.0], 3])
def test_ids_are_integers_in_one_dimension(bad):
    for use in (
        lambda: compact(bad, 10),
        lambda: split(bad, 0.1, 1),
        lambda: RandomBatches(bad, 1, 1, RandomStream(0)),
        lambda: SequentialBatches(bad, 1, 1),
    ):
        with pytest.raises(ValueError, match="expected token ids in one dimension, integers"):
            use()


# --- split ----------------------------------------------------------------------------------------


@given(st.integers(40, 200), st.floats(0.1, 0.5), sizes)
def test_split_parts_are_the_whole_and_the_tail_is_held_out(n: int, fraction: float, context: int):
    ids = np.arange(n)
    train, val = split(ids, fraction, context)
    assert np.concatenate((train, val)).tolist() == ids.tolist()
    assert len(val) == int(fraction * n)
    assert np.shares_memory(train, ids)


def test_split_without_validation():
    train, val = split(np.arange(4), 0, 3)
    assert (len(train), len(val)) == (4, 0)


def test_split_says_what_is_too_short():
    assert len(split(np.arange(20), 0.1, 17)[0]) == 18
    with pytest.raises(ValueError, match=r"training part .* has 18 tokens, .* 18 needs 19"):
        split(np.arange(20), 0.1, 18)
    with pytest.raises(ValueError, match=r"0\.1 of 19 tokens leaves 1 for validation"):
        split(np.arange(19), 0.1, 4)
    with pytest.raises(ValueError, match="has 0 tokens"):
        split([], 0.1, 4)
    for fraction in (-0.1, 1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="val_fraction must be at least 0 and below 1"):
            split(np.arange(20), fraction, 4)
    with pytest.raises(ValueError, match="context must be at least 1, got 0"):
        split(np.arange(20), 0.1, 0)


# --- random batches -------------------------------------------------------------------------------


@given(sizes, sizes, st.integers(0, 20), st.integers(0, 2**64 - 1))
def test_random_batches_are_windows_of_the_ids(batch_size, context, spare, seed):
    ids = compact(1000 + 7 * np.arange(context + 1 + spare), 2000)
    batches = RandomBatches(ids, batch_size, context, RandomStream(seed))
    for x, y in islice(batches, 3):
        for array in (x, y):
            assert array.shape == (batch_size, context)
            assert array.dtype == np.int64
            assert array.flags.c_contiguous
        starts = (x[:, 0] - 1000) // 7
        assert starts.min() >= 0
        assert starts.max() <= spare
        for row, start in enumerate(starts):
            assert x[row].tolist() == ids[start : start + context].tolist()
            assert y[row].tolist() == ids[start + 1 : start + 1 + context].tolist()


def test_random_batches_reach_the_first_and_the_last_id():
    batches = RandomBatches(np.arange(10), 64, 4, RandomStream(0))
    x, y = next(batches)
    assert set(x[:, 0]) == set(range(6))
    assert y.max() == 9


def test_random_batches_go_on_from_their_state():
    ids = np.arange(1000)
    batches = RandomBatches(ids, 4, 8, RandomStream(7))
    for _ in range(3):
        next(batches)
    state = json.loads(json.dumps(batches.state()))
    expected = [next(batches) for _ in range(3)]
    resumed = RandomBatches(ids, 4, 8, RandomStream(0))
    resumed.load_state(state)
    for (x, y), (x_expected, y_expected) in zip(islice(resumed, 3), expected, strict=True):
        assert np.array_equal(x, x_expected)
        assert np.array_equal(y, y_expected)


def test_random_batches_differ_by_seed_and_by_step():
    batches = RandomBatches(np.arange(1000), 4, 8, RandomStream(0))
    first, second = next(batches)[0], next(batches)[0]
    other = next(RandomBatches(np.arange(1000), 4, 8, RandomStream(1)))[0]
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_random_batches_read_a_memory_map(tmp_path: Path):
    ids = np.arange(100, dtype=np.uint16)
    ids.tofile(tmp_path / "ids")
    mapped = np.memmap(tmp_path / "ids", dtype=np.uint16, mode="r")
    batches = RandomBatches(mapped, 3, 5, RandomStream(0))
    assert isinstance(batches.ids, np.memmap)
    x, y = next(batches)
    assert type(x) is np.ndarray
    assert np.array_equal(x + 1, y)


def test_random_batches_say_what_is_wrong():
    stream = RandomStream(0)
    assert next(RandomBatches(np.arange(5), 1, 4, stream))[1].tolist() == [[1, 2, 3, 4]]
    with pytest.raises(ValueError, match="the text has 4 tokens, but a context of 4 needs 5"):
        RandomBatches(np.arange(4), 1, 4, stream)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        RandomBatches(np.arange(5), 0, 4, stream)
    with pytest.raises(ValueError, match="context must be at least 1, got -1"):
        RandomBatches(np.arange(5), 1, -1, stream)


# --- sequential batches ---------------------------------------------------------------------------


@given(st.integers(2, 200), sizes, sizes)
def test_sequential_batches_predict_every_id_but_the_first_once(n, batch_size, context):
    ids = compact(np.arange(n), n)
    batches = SequentialBatches(ids, batch_size, context)
    xs, ys = zip(*batches, strict=True)
    assert len(batches) == len(xs)
    assert batches.predictions == n - 1
    for x, y in zip(xs, ys, strict=True):
        assert x.shape == y.shape
        assert x.shape[1] == context
        assert x.dtype == y.dtype == np.int64
    assert all(len(x) == batch_size for x in xs[:-1])
    assert 1 <= len(xs[-1]) <= batch_size
    x, y = np.concatenate(xs).ravel(), np.concatenate(ys).ravel()
    counted = y != IGNORE_INDEX
    assert y[counted].tolist() == list(range(1, n))
    assert x[counted].tolist() == list(range(n - 1))
    assert not x[~counted].any()
    assert (~counted).sum() < context


@given(st.integers(2, 60), sizes, sizes)
def test_the_mean_over_the_split_is_exact(n, batch_size, context):
    loss = np.random.default_rng(n).random(n)  # the loss of each id as a target
    total = count = 0.0
    for _, y in SequentialBatches(np.arange(n), batch_size, context):
        counted = y != IGNORE_INDEX
        total += loss[y[counted]].mean() * counted.sum()
        count += counted.sum()
    assert total / count == pytest.approx(loss[1:].mean(), rel=1e-12)


def test_sequential_batches_begin_anew():
    batches = SequentialBatches(np.arange(30), 2, 4)
    first, again = [x.tolist() for x, _ in batches], [x.tolist() for x, _ in batches]
    assert first == again
    assert first[0] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("n", [0, 1])
def test_sequential_batches_need_something_to_predict(n: int):
    with pytest.raises(ValueError, match=f"at least 2 tokens to predict one, got {n}"):
        SequentialBatches(np.arange(n), 1, 4)


def test_sequential_batches_say_what_is_wrong():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        SequentialBatches(np.arange(5), 0, 4)
    with pytest.raises(ValueError, match="context must be at least 1, got 0"):
        SequentialBatches(np.arange(5), 1, 0)


# --- windows that are numbered --------------------------------------------------------------------


def everything(windows, batch_size: int = 3) -> tuple[np.ndarray, np.ndarray]:
    xs, ys = zip(*OnePass(windows, batch_size), strict=True)
    return np.concatenate(xs), np.concatenate(ys)


@given(st.integers(2, 60), sizes, sizes)
def test_packed_windows_are_the_sequential_batches(n, batch_size, context):
    ids = compact(np.arange(n), n)
    windows = PackedWindows(ids, context)
    passes = OnePass(windows, batch_size)
    expected = list(SequentialBatches(ids, batch_size, context))
    assert len(passes) == len(expected)
    for (x, y), (x_expected, y_expected) in zip(passes, expected, strict=True):
        assert np.array_equal(x, x_expected)
        assert np.array_equal(y, y_expected)


def tokens_of(lengths: list[int], marked: bool) -> Tokens:
    """Documents of so many ids, 1, 2, 3 …, with the mark 0 between them or nothing."""
    ids: list[int] = []
    ends = []
    for i, length in enumerate(lengths):
        ids += [0] if marked and i else []
        ids += range(10 * i + 1, 10 * i + 1 + length)
        ends.append(len(ids))
    return Tokens(np.array(ids, np.uint16), np.array(ends, np.int64), marked)


lengths = st.lists(st.integers(0, 9), min_size=1, max_size=30)


@given(lengths, sizes, st.booleans(), st.integers(1, 4), st.data())
def test_document_windows_stay_in_one_document_and_have_every_target_once(
    lengths, context, marked, stride, data
):
    tokens = tokens_of(lengths, marked)
    begin = data.draw(st.integers(0, len(tokens)))
    part = tokens.part(begin, data.draw(st.integers(begin, len(tokens))))
    ids = part.ids.astype(int).tolist()
    document = [(i - 1) // 10 if i else None for i in ids]  # None: a mark
    expected = [
        (a, b)
        for (a, b), (of_a, of_b) in zip(
            itertools.pairwise(ids), itertools.pairwise(document), strict=True
        )
        if of_a == of_b or None in (of_a, of_b)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "_STRIDE", stride)
        if not expected:
            with pytest.raises(ValueError, match="documents of at least 2 tokens"):
                DocumentWindows(part, context)
            return
        windows = DocumentWindows(part, context)
        x, y = everything(windows)
        # one by one and in any order they are the same
        order = np.array(data.draw(st.permutations(range(len(windows)))))
        again = windows.take(order)
    assert np.array_equal(again[0], x[order])
    assert np.array_equal(again[1], y[order])
    counted = y != IGNORE_INDEX
    assert counted.any(axis=1).all()
    assert [*zip(x[counted].tolist(), y[counted].tolist(), strict=True)] == expected
    assert not x[~counted].any()
    for row, targets in zip(x, y, strict=True):
        owners = {(i - 1) // 10 for i in [*row, *targets] if i > 0}
        assert len(owners) <= 1


def test_document_windows_begin_with_the_mark_before_and_end_with_the_one_behind():
    windows = DocumentWindows(tokens_of([2, 3], marked=True), 4)
    x, y = everything(windows)
    assert x.tolist() == [[1, 2, 0, 0], [0, 11, 12, 0]]
    assert y.tolist() == [[2, 0, -100, -100], [11, 12, 13, -100]]


# --- epochs ---------------------------------------------------------------------------------------


class Numbers:
    """Windows that are their own numbers."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def take(self, numbers: np.ndarray):
        return numbers, numbers


@given(st.integers(1, 40), sizes, st.none() | st.integers(0, 2**64 - 1))
def test_every_epoch_has_every_window_once(n, batch_size, shuffle):
    batches = EpochBatches(Numbers(n), batch_size, shuffle)
    seen: list[int] = []
    while len(seen) < 3 * n:
        numbers, _ = next(batches)
        assert len(numbers) == batch_size
        seen += numbers.tolist()
    epochs = [seen[i * n : (i + 1) * n] for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))
    assert (epochs[0] == list(range(n))) or shuffle is not None
    assert batches.epoch == len(seen) // n


@given(st.integers(1, 40), sizes, st.none() | st.integers(0, 9), st.integers(0, 30))
def test_epochs_go_on_from_their_state(n, batch_size, shuffle, steps):
    batches = EpochBatches(Numbers(n), batch_size, shuffle)
    for _ in range(steps):
        next(batches)
    resumed = EpochBatches(Numbers(n), batch_size, shuffle)
    resumed.load_state(json.loads(json.dumps(batches.state())))
    for _ in range(3):
        assert np.array_equal(next(resumed)[0], next(batches)[0])


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 1000, 65_536, 70_001])
def test_shuffled_is_a_permutation_another_one_for_each_epoch_and_seed(n: int):
    numbers = np.arange(n)
    found = [shuffled(numbers, n, seed, epoch) for seed in (0, 2**64 - 1) for epoch in (0, 1)]
    for permutation in found:
        assert permutation.dtype == np.int64
        assert np.array_equal(np.sort(permutation), numbers)
    if n >= 1000:
        for a, b in itertools.combinations([numbers, *found], 2):
            assert (a == b).mean() < 0.02


def test_shuffled_looks_like_chance():
    """Neighbours end up far apart, and each number equally often in each quarter."""
    n = 1000
    places = np.array([shuffled(np.arange(n), n, 7, epoch) for epoch in range(200)])
    distance = np.abs(np.diff(places, axis=1)).mean()
    assert distance == pytest.approx(n / 3, rel=0.02)
    quarters = (places < n // 4).mean(axis=0)
    assert quarters.mean() == pytest.approx(0.25, abs=1e-9)
    assert quarters.std() == pytest.approx((0.25 * 0.75 / 200) ** 0.5, rel=0.15)
    assert np.corrcoef(places.mean(axis=0), np.arange(n))[0, 1] == pytest.approx(0, abs=0.15)


def test_shuffling_is_the_same_for_ever():
    """A run is resumed by another version, too."""
    assert shuffled(np.arange(8), 8, seed=1, epoch=0).tolist() == [1, 4, 7, 6, 5, 0, 3, 2]


def test_random_windows_go_on_from_their_state():
    batches = RandomWindows(Numbers(50), 8, RandomStream(3))
    first = next(batches)[0]
    assert set(first) <= set(range(50))
    state = json.loads(json.dumps(batches.state()))
    expected = next(batches)[0]
    resumed = RandomWindows(Numbers(50), 8, RandomStream(0))
    resumed.load_state(state)
    assert np.array_equal(next(resumed)[0], expected)


def test_windows_say_what_is_wrong():
    for wrong in (
        lambda: PackedWindows(np.arange(5), 0),
        lambda: DocumentWindows(tokens_of([5], True), 0),
    ):
        with pytest.raises(ValueError, match="context must be at least 1, got 0"):
            wrong()
    with pytest.raises(ValueError, match="at least 2 tokens to predict one, got 1"):
        PackedWindows(np.arange(1), 4)
    for kind in (EpochBatches, OnePass):
        with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
            kind(Numbers(5), 0)


# --- memory maps ----------------------------------------------------------------------------------


def test_batches_of_a_memory_map_are_those_of_the_array(tmp_path: Path, monkeypatch):
    """Also when pages are given back all the time."""
    monkeypatch.setattr(loader, "_KEPT", 1)
    monkeypatch.setattr(loader, "_AT_ONCE", 3)
    ids = np.arange(5000, dtype=np.uint16)
    ids.tofile(tmp_path / "ids")
    mapped = np.memmap(tmp_path / "ids", dtype=np.uint16, mode="r")[7:4000]
    plain = ids[7:4000]
    for make in (
        lambda ids: RandomBatches(ids, 10, 5, RandomStream(0)),
        lambda ids: EpochBatches(PackedWindows(ids, 5), 10, 4),
        lambda ids: iter(SequentialBatches(ids, 10, 5)),
        lambda ids: iter(OnePass(PackedWindows(ids, 5), 10)),
    ):
        first = [islice(make(ids), 50) for ids in (mapped, plain)]
        for (x, y), (x_expected, y_expected) in zip(*first, strict=True):
            assert type(x) is np.ndarray
            assert np.array_equal(x, x_expected)
            assert np.array_equal(y, y_expected)
    assert np.concatenate(list(read_through(mapped, 100))).tolist() == plain.tolist()
