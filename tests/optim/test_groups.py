"""Which parameters decay."""

import numpy as np
import pytest

from tinygrad_llm import Tensor
from tinygrad_llm.optim import AdamW, decay_groups


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
