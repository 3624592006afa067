"""Which parameters decay."""

import numpy as np
import pytest

from tinygrad_llm import Tensor
from tinygrad_llm.optim import AdamW, LRScheduler, decay_groups, lr_groups
from tinygrad_llm.optim.groups import matches


def named(frozen=()):
    shapes = {
        "wte.weight": (10, 4),
        "h.0.ln.weight": (4,),
        "h.0.fc.weight": (4, 4),
        "h.0.fc.bias": (4,),
    }
    return [
        (name, Tensor(np.ones(shape), requires_grad=name not in frozen))
        for name, shape in shapes.items()
    ]


class Model:
    def __init__(self, pairs):
        self.pairs = pairs

    def named_parameters(self):
        yield from self.pairs


def names(groups):
    return {group["name"]: [name for name, _ in group["params"]] for group in groups}


@pytest.mark.parametrize("form", [list, iter, Model])
def test_matrices_decay_and_vectors_do_not(form):
    groups = decay_groups(form(named()), 0.1)
    assert names(groups) == {
        "decay": ["wte.weight", "h.0.fc.weight"],
        "no_decay": ["h.0.ln.weight", "h.0.fc.bias"],
    }
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


@pytest.mark.parametrize("no_decay", ["wte", ("wte",)])
def test_exceptions_go_by_name(no_decay):
    assert names(decay_groups(named(), 0.1, no_decay))["decay"] == ["h.0.fc.weight"]


def test_frozen_parameters_and_empty_groups_are_left_out():
    groups = decay_groups(named(frozen=("h.0.ln.weight", "h.0.fc.bias", "wte.weight")), 0.1)
    assert names(groups) == {"decay": ["h.0.fc.weight"]}


def test_the_optimizer_takes_the_groups():
    pairs = named()
    optimizer = AdamW(decay_groups(pairs, 0.1), lr=0.01)
    for _, p in pairs:
        p.grad = Tensor(np.zeros(p.shape))
    optimizer.step()
    shrunk = {name: bool((p.data < 1).all()) for name, p in pairs}
    assert shrunk == {
        "wte.weight": True, "h.0.ln.weight": False, "h.0.fc.weight": True, "h.0.fc.bias": False,
    }  # fmt: skip


def test_a_name_that_is_nowhere_is_refused():
    with pytest.raises(ValueError, match="'LayerNorm' is in the name of no parameter"):
        decay_groups(named(), 0.1, no_decay=("LayerNorm",))


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        decay_groups([("w", Tensor([1.0]))], 0.1)


# --- rates by group -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("wte", ["wte.weight"]),
        ("h.0", ["h.0.ln.weight", "h.0.fc.weight", "h.0.fc.bias"]),
        ("h.0.*", ["h.0.ln.weight", "h.0.fc.weight", "h.0.fc.bias"]),
        ("bias", ["h.0.fc.bias"]),
        ("h.[0-3].fc", ["h.0.fc.weight", "h.0.fc.bias"]),
        ("h.*.bias", ["h.0.fc.bias"]),
        ("*", ["wte.weight", "h.0.ln.weight", "h.0.fc.weight", "h.0.fc.bias"]),
        ("wt", []),
        ("h.1", []),
        ("0.f", []),
        ("WTE", []),
    ],
)
def test_a_pattern_is_whole_parts_of_a_name(pattern, found):
    assert [name for name, _ in named() if matches(pattern, name)] == found


def test_h_1_is_not_h_10():
    assert not matches("h.1", "h.10.fc.bias")


def test_each_parameter_has_the_product_of_its_factors():
    factors = {"wte": 0.1, "h.0": 0.5, "bias": 4.0, "ln": 0.0}
    for order in (list(factors), list(factors)[::-1]):
        groups = lr_groups(decay_groups(named(), 0.1), 1e-2, {k: factors[k] for k in order})
        optimizer = AdamW(groups, lr=1e-2)
        rates = {
            name: (group["lr"], group["weight_decay"])
            for group in optimizer.param_groups
            for name in group["param_names"]
        }
        assert rates == {
            "wte.weight": (pytest.approx(1e-3), 0.1),
            "h.0.ln.weight": (0.0, 0.0),
            "h.0.fc.weight": (pytest.approx(5e-3), 0.1),
            "h.0.fc.bias": (pytest.approx(2e-2), 0.0),
        }


def test_groups_that_nothing_matches_stay_as_they_are():
    groups = decay_groups(named(), 0.1)
    assert lr_groups(groups, 1e-2, {}) == groups
    cut = lr_groups(groups, 1e-2, {"wte": 0.1})
    assert names(cut) == {
        "decay × 0.1": ["wte.weight"],
        "decay": ["h.0.fc.weight"],
        "no_decay": ["h.0.ln.weight", "h.0.fc.bias"],
    }
    assert ["lr" in group for group in cut] == [True, False, False]


def test_a_schedule_scales_each_group_from_its_own_base():
    optimizer = AdamW(lr_groups(decay_groups(named(), 0.1), 1.0, {"wte": 0.25}), lr=1.0)
    scheduler = LRScheduler(optimizer, lambda step: 1 / (1 + step))
    assert scheduler.get_last_lr() == [0.25, 1.0, 1.0]
    scheduler.step()
    assert scheduler.get_last_lr() == [0.125, 0.5, 0.5]
    again = AdamW(lr_groups(decay_groups(named(), 0.1), 1.0, {"wte": 0.25}), lr=1.0)
    resumed = LRScheduler(again, scheduler.schedule)
    resumed.load_state_dict(scheduler.state_dict())
    resumed.step()
    assert resumed.get_last_lr() == pytest.approx([0.25 / 3, 1 / 3, 1 / 3])


def test_a_factor_is_the_step_that_is_taken():
    """SGD-like: AdamW's first step has the length lr in every element."""
    pairs = named()
    optimizer = AdamW(lr_groups(decay_groups(pairs, 0.0), 0.01, {"wte": 0.1, "ln": 0.0}), lr=0.01)
    for _, p in pairs:
        p.grad = Tensor(np.full(p.shape, 7.0))
    optimizer.step()
    moved = {name: round(float(1 - p.data.reshape(-1)[0]), 6) for name, p in pairs}
    assert moved == {
        "wte.weight": 0.001, "h.0.ln.weight": 0.0, "h.0.fc.weight": 0.01, "h.0.fc.bias": 0.01,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"wtee": 0.1}, r"lr_groups: 'wtee' matches no parameter; the nearest is 'wte'"),
        ({"h.1.fc": 0.1}, r"'h\.1\.fc' matches no parameter; the nearest is 'h\.0\.fc'"),
        ({"zzz": 0.1}, r"'zzz' matches no parameter; the nearest is '"),
        ({"wte": -0.1}, r"factor of 'wte' must be at least 0, got -0\.1"),
        ({"wte": float("inf")}, r"factor of 'wte' must be at least 0"),
        ({"wte": float("nan")}, r"factor of 'wte' must be at least 0"),
    ],
)
def test_factors_that_mean_nothing_are_refused(factors, message):
    with pytest.raises(ValueError, match=message):
        lr_groups(decay_groups(named(), 0.1), 1e-2, factors)
