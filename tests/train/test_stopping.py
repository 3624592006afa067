"""When a run is over."""

import pytest

from tinygrad_llm.train.config import TrainConfig
from tinygrad_llm.train.stopping import Limits


@pytest.mark.parametrize(
    ("limits", "at", "flag"),
    [
        ({}, (9, 10**9, 1e9), None),
        ({}, (10, 0, 0.0), "--steps"),
        ({"max_tokens": 50}, (9, 49, 1e9), None),
        ({"max_tokens": 50}, (9, 50, 0.0), "--max-tokens"),
        ({"max_seconds": 5.0}, (9, 10**9, 4.9), None),
        ({"max_seconds": 5.0}, (9, 0, 5.0), "--max-seconds"),
    ],
)
def test_each_limit_ends_the_run_where_it_says(limits, at, flag):
    end = Limits(TrainConfig(steps=10, **limits)).over(*at)
    assert (end and end.flag) == flag


def test_patience_counts_validations_without_a_better_loss():
    limits = Limits(TrainConfig(patience=2))
    ended = []
    for loss in (3.0, 4.0, 2.0, 2.0, 1.0, float("nan"), 1.5):
        limits.validated(loss)
        ended.append(limits.over(1, 0, 0.0) is not None)
    assert ended == [False] * 6 + [True]
    end = limits.over(1, 0, 0.0)
    assert end is not None
    assert (end.reason, end.flag) == (
        "had 2 validations without a better loss than 1.0000",
        "--patience",
    )


def test_the_count_goes_on_from_a_state():
    one, two = (Limits(TrainConfig(patience=2)) for _ in range(2))
    for loss in (1.0, 2.0):
        one.validated(loss)
    two.load_state(one.state())
    two.validated(1.0)
    assert two.over(1, 0, 0.0) is not None


def test_another_score_is_the_better_the_higher():
    limits = Limits(TrainConfig(patience=2), "val_f1")
    ended = []
    for f1 in (0.0, 0.5, 0.4, 0.6, 0.6, float("nan")):
        limits.validated(f1)
        ended.append(limits.over(1, 0, 0.0) is not None)
    assert ended == [False] * 5 + [True]
    end = limits.over(1, 0, 0.0)
    assert end is not None
    assert end.reason == "had 2 validations without a better f1 than 0.6000"
