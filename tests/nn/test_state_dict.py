"""state_dict and load_state_dict: shared memory, strictness, and never half a load."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm import Tensor, no_grad
from tinygrad_llm.nn import Linear, Module, Parameter, Sequential, init


class Tied(Module):
    def __init__(self):
        super().__init__()
        self.embed = Linear(3, 3, bias=False)
        self.head = Linear(3, 3)
        self.head.weight = self.embed.weight
        self.register_buffer("count", Tensor([0]))
        self.register_buffer("cache", Tensor([1.0]), persistent=False)


def test_state_dict_names_everything_that_is_saved_and_shares_memory():
    model = Tied()
    state = model.state_dict()
    assert list(state) == ["count", "embed.weight", "head.weight", "head.bias"]
    assert not any(tensor.requires_grad for tensor in state.values())
    assert all(type(tensor) is Tensor for tensor in state.values())
    assert np.shares_memory(state["embed.weight"].data, model.embed.weight.data)
    assert np.shares_memory(state["head.weight"].data, model.embed.weight.data)
    assert list(model.state_dict(prefix="m.")) == [f"m.{name}" for name in state]


def test_loading_copies_into_the_memory_that_is_there():
    source, target = Tied(), Tied()
    places = [p.data for p in target.parameters()]
    result = target.load_state_dict(source.state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    for mine, theirs, place in zip(target.parameters(), source.parameters(), places, strict=True):
        assert mine.data is place
        np.testing.assert_array_equal(mine.numpy(), theirs.numpy())
        assert mine.requires_grad
    assert target.head.weight is target.embed.weight


def test_arrays_are_converted_to_the_dtype_of_the_parameter():
    layer = Linear(2, 1)
    layer.load_state_dict({"weight": np.array([[1, 2]]), "bias": np.array([0.5])})
    assert layer.weight.dtype == np.float32
    assert layer.weight.tolist() == [[1.0, 2.0]]
    assert layer.bias is not None
    assert layer.bias.tolist() == [0.5]


def test_a_shared_parameter_needs_only_one_of_its_names():
    source, target = Tied(), Tied()
    state = source.state_dict()
    del state["head.weight"]
    target.load_state_dict(state)
    np.testing.assert_array_equal(target.head.weight.numpy(), source.head.weight.numpy())


def test_one_error_lists_all_that_does_not_fit_and_nothing_is_loaded():
    model = Tied()
    before = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    state = {
        "embed.weight": np.zeros((3, 3)),
        "head.bias": np.zeros(4),
        "count": np.zeros(1),
        "extra.one": np.zeros(1),
        "extra.two": np.zeros(1),
    }
    with pytest.raises(ValueError, match="does not fit this Tied") as caught:
        model.load_state_dict(state)
    message = str(caught.value)
    assert "unexpected: extra.one, extra.two" in message
    assert "head.bias: expected shape (3,), got (4,)" in message
    assert "count: expected int64, got float64" in message
    assert "missing" not in message
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), before[name])
    with pytest.raises(
        ValueError, match=r"missing: count, embed\.weight, head\.weight, head\.bias"
    ):
        model.load_state_dict({})
    with pytest.raises(ValueError, match=r"head\.bias: expected an array, got list"):
        model.load_state_dict(model.state_dict() | {"head.bias": [1.0, 2.0, 3.0]})


def test_not_strict_reports_names_but_still_refuses_shapes():
    model = Tied()
    result = model.load_state_dict({"head.bias": np.ones(3), "extra": np.zeros(1)}, strict=False)
    assert result.missing_keys == ["count", "embed.weight", "head.weight"]
    assert result.unexpected_keys == ["extra"]
    assert model.head.bias is not None
    assert model.head.bias.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="misshapen"):
        model.load_state_dict({"head.bias": np.ones(4)}, strict=False)


def test_assign_takes_the_arrays_themselves():
    model = Tied()
    weight = model.embed.weight
    array = np.arange(9.0).reshape(3, 3)
    bias = np.arange(3)
    model.load_state_dict({"embed.weight": array, "head.bias": bias}, strict=False, assign=True)
    assert model.embed.weight is weight
    assert weight.data is array
    assert weight.dtype == np.float64
    assert model.head.bias is not None
    assert model.head.bias.dtype == np.float32  # a parameter stays a float
    (model.head.weight * 2).sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == np.float64


def test_loading_between_forward_and_backward_is_noticed():
    layer = Linear(2, 2)
    x = Tensor([[1.0, 2.0]], requires_grad=True)
    y = layer(x).sum()
    layer.load_state_dict(Linear(2, 2).state_dict())
    with pytest.raises(RuntimeError, match="overwritten since the forward pass"):
        y.backward()


def test_placeholders_take_no_memory_until_arrays_are_assigned():
    with init.placeholders():
        model = Sequential(Linear(10**6, 10**6), Linear(10**6, 1))  # 4 TB if it were real
    assert model[0].weight.shape == (10**6, 10**6)
    assert model[0].weight.data.strides == (0, 0)
    with init.placeholders():
        small = Linear(2, 1)
    small.load_state_dict(Linear(2, 1).state_dict(), assign=True)
    small(Tensor([[1.0, 2.0]])).sum().backward()
    with no_grad():
        small.weight.fill_(1.0)


sizes = st.lists(st.integers(1, 4), min_size=2, max_size=5)


@given(sizes, st.integers(0, 2**32))
def test_a_round_trip_gives_the_same_module(widths, seed):
    layers = [Linear(a, b) for a, b in itertools.pairwise(widths)]
    source = Sequential(*layers)
    target = Sequential(*[Linear(m.in_features, m.out_features) for m in layers])
    target.load_state_dict({name: t.numpy() for name, t in source.state_dict().items()})
    x = np.random.default_rng(seed).standard_normal((2, widths[0])).astype(np.float32)
    np.testing.assert_array_equal(source(x).numpy(), target(x).numpy())


def test_parameters_may_be_zero_dimensional():
    class Scale(Module):
        def __init__(self):
            super().__init__()
            self.s = Parameter(3.0)

    scale = Scale()
    scale.load_state_dict({"s": np.array(4.0)})
    assert scale.s.item() == 4.0
