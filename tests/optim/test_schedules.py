"""Schedules against their formulas; LRScheduler on groups, and resumed."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm import Tensor
from tinygrad_llm.optim import SGD, LRScheduler
from tinygrad_llm.optim.schedules import (
    WSD,
    Constant,
    Cosine,
    Linear,
    OneCycle,
    StepDecay,
    Warmup,
)


def values(schedule, steps):
    return [schedule(t) for t in steps]


def test_constant():
    assert values(Constant(), (0, 5, 10**9)) == [1.0, 1.0, 1.0]
    assert Constant(0.5)(3) == 0.5


def test_linear():
    assert values(Linear(4), range(7)) == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]
    assert values(Linear(2, start=0.0, end=1.0), range(4)) == [0.0, 0.5, 1.0, 1.0]


def test_cosine_goes_down_to_its_smallest_rate():
    schedule = Cosine(100, end=0.1)
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * t / 100)) for t in range(101)]
    np.testing.assert_allclose(values(schedule, range(101)), expected, rtol=1e-14)
    assert (schedule(0), schedule(100), schedule(500)) == (1.0, 0.1, 0.1)
    assert schedule(50) == pytest.approx(0.55)


def test_warmup_goes_up_to_what_it_wraps():
    schedule = Warmup(4, Linear(10))
    np.testing.assert_allclose(values(schedule, range(5)), [0.2, 0.4, 0.6, 0.8, 1.0])
    assert values(schedule, (5, 14, 20)) == [0.9, 0.0, 0.0]
    assert values(Warmup(2), (0, 1, 2, 50)) == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])
    assert Warmup(0, Linear(10))(1) == 0.9
    assert Warmup(1, Constant(0.5))(0) == 0.25


def test_warmup_takes_any_function():
    assert Warmup(3, lambda t: 2.0 ** (-t))(5) == 0.25


@pytest.mark.parametrize(
    ("shape", "middle"),
    [("linear", 0.55), ("sqrt", 1 - 0.9 * math.sqrt(0.5)), ("cosine", 0.55)],
)
def test_wsd(shape, middle):
    schedule = WSD(warmup=4, stable=10, decay=20, end=0.1, shape=shape)
    np.testing.assert_allclose(values(schedule, range(4)), [0.2, 0.4, 0.6, 0.8])
    assert set(values(schedule, range(4, 15))) == {1.0}
    assert schedule(24) == pytest.approx(middle)
    assert values(schedule, (34, 99)) == pytest.approx([0.1, 0.1])
    assert WSD(0, 0, 2)(0) == 1.0


def test_one_cycle_has_pytorchs_numbers():
    """steps=10, pct_start=0.5: up over t = 0 … 4, down over t = 4 … 9, written out by hand."""
    schedule = OneCycle(10, pct_start=0.5, div_factor=10, final_div_factor=100)
    up = [1.0 + (0.1 - 1.0) / 2 * (1 + math.cos(math.pi * t / 4)) for t in range(5)]
    down = [0.001 + (1.0 - 0.001) / 2 * (1 + math.cos(math.pi * t / 5)) for t in range(6)]
    np.testing.assert_allclose(values(schedule, range(10)), up + down[1:], rtol=1e-12)
    assert schedule(0) == pytest.approx(0.1)
    assert (schedule(4), schedule(9), schedule(50)) == (1.0, 0.001, 0.001)


def test_one_cycle_in_lines():
    schedule = OneCycle(11, pct_start=6 / 11, div_factor=2, final_div_factor=2, anneal="linear")
    np.testing.assert_allclose(values(schedule, (0, 1, 5, 6, 10)), [0.5, 0.6, 1.0, 0.85, 0.25])


@pytest.mark.parametrize("pct_start", [0.0, 0.05, 1.0])
def test_one_cycle_without_a_rise_or_a_fall(pct_start):
    assert max(values(OneCycle(10, pct_start=pct_start), range(10))) == 1.0
    assert OneCycle(1)(0) <= 1.0


def test_step_decay():
    assert values(StepDecay(2, gamma=0.5), range(7)) == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125]


SCHEDULES = [
    Constant(0.3),
    Linear(50, end=0.1),
    Cosine(50, end=0.1),
    Warmup(10, Cosine(40)),
    WSD(10, 20, 20, shape="sqrt"),
    WSD(10, 20, 20, shape="cosine"),
    OneCycle(50),
    OneCycle(50, anneal="linear"),
    StepDecay(7, 0.5),
]


@given(schedule=st.sampled_from(SCHEDULES), steps=st.lists(st.integers(-5, 200), min_size=1))
def test_a_schedule_is_a_pure_function_with_values_from_0_to_1(schedule, steps):
    first = values(schedule, steps)
    assert values(schedule, reversed(steps)) == first[::-1]
    assert all(type(factor) is float and 0.0 <= factor <= 1.0 for factor in first)


def test_schedules_compare_and_print_as_what_they_are():
    assert Warmup(10, Cosine(90, end=0.1)) == Warmup(10, Cosine(90, end=0.1))
    text = repr(Warmup(10, Cosine(90, end=0.1)))
    assert text == "Warmup(steps=10, then=Cosine(steps=90, end=0.1))"


def bad(value: Any) -> Any:
    """What no type checker would let through."""
    return value


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cosine(0), "steps must be an integer of at least 1, got 0"),
        (lambda: Linear(bad(2.5)), "steps must be an integer of at least 1, got 2.5"),
        (lambda: Warmup(-1), "steps must be an integer of at least 0, got -1"),
        (lambda: Cosine(10, end=-0.1), "end is a factor of the learning rate"),
        (lambda: Constant(math.inf), "value is a factor"),
        (lambda: WSD(1, 1, 0), "decay must be an integer of at least 1"),
        (lambda: WSD(1, 1, 1, shape=bad("exp")), "shape must be 'linear', 'sqrt' or 'cosine'"),
        (lambda: OneCycle(10, pct_start=1.5), "pct_start must be from 0 to 1"),
        (lambda: OneCycle(10, div_factor=0.5), "div_factor and final_div_factor"),
        (lambda: OneCycle(10, anneal=bad("sin")), "anneal must be 'cos' or 'linear'"),
        (lambda: StepDecay(0), "step_size must be an integer of at least 1"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- LRScheduler ----------------------------------------------------------------------------------


def leaf():
    return Tensor([1.0], requires_grad=True)


def two_groups():
    return SGD([{"params": [leaf()]}, {"params": [leaf()], "lr": 0.01}], lr=1.0)


def test_each_group_keeps_its_base_rate():
    optimizer = two_groups()
    scheduler = LRScheduler(optimizer, Linear(4))
    seen = [scheduler.get_last_lr()]
    for _ in range(4):
        optimizer.step()
        scheduler.step()
        seen.append(scheduler.get_last_lr())
    np.testing.assert_allclose(seen, [[f, 0.01 * f] for f in (1.0, 0.75, 0.5, 0.25, 0.0)])
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1.0, 0.01]


def test_the_first_rate_is_in_force_from_the_start():
    optimizer = two_groups()
    LRScheduler(optimizer, Warmup(9))
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_group_added_later_joins_in():
    optimizer = two_groups()
    scheduler = LRScheduler(optimizer, Linear(4))
    scheduler.step()
    optimizer.add_param_group({"params": [leaf()], "lr": 8.0})
    scheduler.step()
    assert scheduler.get_last_lr() == [0.5, 0.005, 4.0]


def test_a_numpy_factor_does_not_leak_into_the_groups():
    optimizer = two_groups()
    LRScheduler(optimizer, lambda step: np.float64(0.5))
    assert type(optimizer.param_groups[0]["lr"]) is float


@pytest.mark.parametrize("optimizer_first", [True, False])
def test_resuming_goes_on_with_the_same_rates(optimizer_first):
    schedule = Warmup(3, Cosine(10, end=0.1))
    optimizer = two_groups()
    scheduler = LRScheduler(optimizer, schedule)
    for _ in range(5):
        scheduler.step()
    saved = scheduler.state_dict(), optimizer.state_dict()

    again = two_groups()
    resumed = LRScheduler(again, schedule)
    if optimizer_first:
        again.load_state_dict(saved[1])
        resumed.load_state_dict(saved[0])
    else:
        resumed.load_state_dict(saved[0])
        again.load_state_dict(saved[1])
    for _ in range(8):
        assert resumed.get_last_lr() == scheduler.get_last_lr()
        scheduler.step()
        resumed.step()
    assert (
        resumed.state_dict()
        == scheduler.state_dict()
        == {
            "last_step": 13,
            "base_lrs": [1.0, 0.01],
        }
    )


def test_a_scheduler_built_after_the_optimizer_was_resumed_knows_the_base():
    optimizer = two_groups()
    scheduler = LRScheduler(optimizer, Linear(4))
    scheduler.step()
    again = two_groups()
    again.load_state_dict(optimizer.state_dict())
    resumed = LRScheduler(again, Linear(4))
    resumed.load_state_dict(scheduler.state_dict())
    assert resumed.get_last_lr() == [0.75, 0.0075]


def test_what_is_refused():
    with pytest.raises(TypeError, match="a schedule is a function"):
        LRScheduler(two_groups(), bad(0.5))
    state = {"last_step": 1, "base_lrs": [0.1]}
    with pytest.raises(ValueError, match="for 1 parameter groups, expected 2"):
        LRScheduler(two_groups(), Constant()).load_state_dict(state)
