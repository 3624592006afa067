"""Module and Parameter: what is registered, in which order, what is refused, what is moved."""

import copy
from typing import Any

import numpy as np
import pytest

from tinygrad_llm import Tensor, no_grad, ops
from tinygrad_llm.nn import Linear, Module, ModuleList, Parameter, ReLU, Sequential


class Net(Module):
    """Two layers, a parameter of its own, a saved buffer and one that is not saved."""

    steps: Tensor
    cache: Tensor

    def __init__(self):
        super().__init__()
        self.first = Linear(2, 3)
        self.scale = Parameter([2.0])
        self.second = Linear(3, 1, bias=False)
        self.register_buffer("steps", Tensor([0]))
        self.register_buffer("cache", Tensor([1.0]), persistent=False)

    def forward(self, x):
        return self.second(ops.relu(self.first(x))) * self.scale


class Tied(Module):
    def __init__(self):
        super().__init__()
        self.embed = Linear(4, 4, bias=False)
        self.head = Linear(4, 4, bias=False)
        self.head.weight = self.embed.weight


def names(pairs):
    return [name for name, _ in pairs]


# --- Parameter ------------------------------------------------------------------------------------


def test_a_parameter_is_a_tensor_that_requires_a_gradient():
    p = Parameter([1.0, 2.0])
    assert isinstance(p, Tensor)
    assert p.requires_grad
    assert p.is_leaf
    (p * p).sum().backward()
    assert p.grad is not None
    assert p.grad.tolist() == [2.0, 4.0]
    assert not Parameter([1.0], requires_grad=False).requires_grad
    assert not hasattr(p, "__dict__")  # slots, as Tensor
    assert type(p.detach()) is Tensor
    assert repr(p) == "Parameter([1., 2.], requires_grad=True)"


def test_a_parameter_takes_an_array_without_copying_it_and_only_floats():
    array = np.ones(2, dtype=np.float32)
    assert Parameter(array).data is array
    with pytest.raises(TypeError, match="only float tensors"):
        Parameter([1, 2])


# --- names and order ------------------------------------------------------------------------------


def test_parameters_come_own_first_and_then_part_by_part():
    net = Net()
    assert names(net.named_parameters()) == [
        "scale",
        "first.weight",
        "first.bias",
        "second.weight",
    ]
    assert names(net.named_parameters(prefix="net")) == [
        "net.scale",
        "net.first.weight",
        "net.first.bias",
        "net.second.weight",
    ]
    assert names(net.named_parameters(recurse=False)) == ["scale"]
    assert names(net.named_buffers()) == ["steps", "cache"]
    assert names(net.named_modules()) == ["", "first", "second"]
    assert names(net.named_children()) == ["first", "second"]
    assert list(net.children()) == [net.first, net.second]
    assert list(net.modules()) == [net, net.first, net.second]
    assert net.num_parameters() == 1 + 6 + 3 + 3


def test_a_shared_parameter_and_a_shared_module_come_once():
    tied = Tied()
    assert names(tied.named_parameters()) == ["embed.weight"]
    assert names(tied.named_parameters(remove_duplicate=False)) == ["embed.weight", "head.weight"]
    assert tied.num_parameters() == 16
    layer = Linear(2, 2)
    shared = Sequential(layer, ReLU(), layer)
    assert names(shared.named_modules()) == ["", "0", "1"]
    assert names(shared.named_modules(remove_duplicate=False)) == ["", "0", "1", "2"]
    assert len(list(shared.children())) == 2
    assert list(shared.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_assigning_again_replaces_in_place_and_deleting_removes():
    net: Any = Net()
    net.first = Linear(2, 5)
    assert names(net.named_children()) == ["first", "second"]
    assert net.first.out_features == 5
    net.scale = None
    assert names(net.named_parameters(recurse=False)) == []
    net.scale = Parameter([1.0])
    assert names(net.named_parameters(recurse=False)) == ["scale"]
    del net.second
    assert names(net.named_children()) == ["first"]
    net.steps = Tensor([7])  # a buffer stays one
    assert net.state_dict()["steps"].tolist() == [7]
    net.steps = Parameter([1.0])  # and becomes a parameter when it is one
    assert names(net.named_buffers()) == ["cache"]
    assert "steps" in names(net.named_parameters())


# --- what is refused ------------------------------------------------------------------------------


def test_super_init_must_come_first():
    class Forgetful(Module):
        def __init__(self):
            self.layer = Linear(1, 1)

    class ForgetfulBuffer(Module):
        def __init__(self):
            self.register_buffer("mask", Tensor([1.0]))

    with pytest.raises(RuntimeError, match=r"Forgetful.__init__\(\) must call super\(\)"):
        Forgetful()
    with pytest.raises(RuntimeError, match=r"sets self\.mask"):
        ForgetfulBuffer()


def test_super_init_called_twice_keeps_the_buffers():
    net = Net()
    Module.__init__(net)
    assert names(net.named_buffers()) == ["steps", "cache"]


def test_a_parameter_is_not_lost_by_assignment():
    net: Any = Net()
    with pytest.raises(TypeError, match=r"self\.scale is a Parameter.* got Tensor"):
        net.scale = net.scale * 2
    with pytest.raises(TypeError, match=r"self\.first is a Module.* got int"):
        net.first = 3
    with pytest.raises(TypeError, match=r"self\.steps is a buffer.* got list"):
        net.steps = [1]
    assert net.num_parameters() == 13


@pytest.mark.parametrize("make", [list, lambda parts: {"a": parts[0]}])
def test_a_list_of_modules_is_refused_because_training_would_miss_it(make):
    net = Net()
    with pytest.raises(TypeError, match="use ModuleList or ModuleDict"):
        net.blocks = make([Linear(1, 1)])
    with pytest.raises(TypeError, match="use ModuleList"):
        net.weights = make([Parameter([1.0])])
    net.sizes = make([1])  # any other list is an attribute
    net.hidden = (Linear(1, 1),)  # and this is how to keep a module out
    assert net.num_parameters() == 13


def test_names_that_cannot_be_are_refused():
    net: Any = Net()
    for name in ("", "a.b", 3):
        with pytest.raises(ValueError, match="a name is a string"):
            net.add_module(name, Linear(1, 1))
    for name in ("forward", "training", "_persistent"):
        with pytest.raises(ValueError, match="has an attribute"):
            net.register_buffer(name, Tensor([1.0]))
    with pytest.raises(TypeError, match="expected a Module, got int"):
        net.add_module("part", 3)
    with pytest.raises(TypeError, match="expected a Parameter, got Tensor"):
        net.register_parameter("p", Tensor([1.0]))
    with pytest.raises(TypeError, match="expected a Tensor, got Parameter"):
        net.register_buffer("p", Parameter([1.0]))
    net.register_parameter("p", None)
    net.register_parameter("p", Parameter([1.0]))
    net.register_buffer("nothing", None)
    assert "p" in names(net.named_parameters())
    assert "nothing" not in names(net.named_buffers())


def test_a_module_without_forward_says_so():
    with pytest.raises(NotImplementedError, match=r"Module does not define forward\(\)"):
        Module()(1)


# --- modes and places -----------------------------------------------------------------------------


def test_train_and_eval_reach_every_part():
    net = Sequential(Linear(1, 1), Sequential(Linear(1, 1)))
    assert all(module.training for module in net.modules())
    assert net.eval() is net
    assert not any(module.training for module in net.modules())
    net[1].train()
    assert [module.training for module in net.modules()] == [False, False, True, True]


def test_freezing_and_zeroing_gradients():
    net = Net()
    net.first.requires_grad_(False)
    assert net.num_parameters(only_trainable=True) == 13 - 9
    net(Tensor([[1.0, 2.0]])).sum().backward()
    assert net.first.weight.grad is None
    gradient = net.second.weight.grad
    assert gradient is not None
    net.zero_grad(set_to_none=False)
    assert net.second.weight.grad is not None
    assert net.second.weight.grad.tolist() == [[0.0, 0.0, 0.0]]
    assert net.first.weight.grad is None
    net.zero_grad()
    assert net.second.weight.grad is None


def test_apply_reaches_parts_before_the_whole():
    net = Sequential(Linear(1, 1), Sequential(ReLU()))
    order = []
    assert net.apply(lambda module: order.append(type(module).__name__)) is net
    assert order == ["Linear", "ReLU", "Sequential", "Sequential"]


def test_to_a_dtype_keeps_the_objects_and_leaves_integers():
    net = Net()
    before = list(net.parameters())
    net(Tensor([[1.0, 2.0]])).sum().backward()
    assert net.to("float64") is net
    assert all(a is b for a, b in zip(before, net.parameters(), strict=True))
    assert {p.dtype for p in net.parameters()} == {np.dtype("float64")}
    assert {p.grad.dtype for p in net.parameters() if p.grad is not None} == {np.dtype("float64")}
    assert net.steps.dtype == np.int64
    assert net.cache.dtype == np.float64
    assert all(p.requires_grad and p.is_leaf for p in net.parameters())
    net.zero_grad()
    net(Tensor([[1.0, 2.0]], dtype="float64")).sum().backward()
    assert net.scale.grad is not None
    assert net.scale.grad.dtype == np.float64


def test_to_the_device_it_is_on_changes_nothing_and_to_an_integer_dtype_is_refused():
    net = Net()
    arrays = [p.data for p in net.parameters()]
    net.to("cpu")
    assert all(p.data is a for p, a in zip(net.parameters(), arrays, strict=True))
    with pytest.raises(TypeError, match="need a float dtype, got int32"):
        net.to("int32")


def test_tied_parameters_stay_tied_through_to():
    tied = Tied().to("float64")
    assert tied.head.weight is tied.embed.weight


# --- copying --------------------------------------------------------------------------------------


def test_deepcopy_is_independent_and_keeps_ties():
    tied = Tied()
    mask = Tensor([1.0])
    tied.register_buffer("mask", mask)
    tied.eval()
    twin = copy.deepcopy(tied)
    assert twin.head.weight is twin.embed.weight
    assert twin.head.weight is not tied.head.weight
    assert type(twin.head.weight) is Parameter
    assert twin.head.weight.requires_grad
    assert not twin.training
    with no_grad():
        twin.embed.weight.fill_(0.0)
        twin.state_dict()["mask"].fill_(5.0)
    assert (tied.embed.weight.data != 0).any()
    assert mask.tolist() == [1.0]
    assert list(twin.state_dict()) == list(tied.state_dict())
    (twin.head.weight * 2).sum().backward()
    assert tied.head.weight.grad is None


def test_deepcopy_takes_the_hooks_along_and_each_copy_has_its_own_list():
    calls = []
    layer = Linear(1, 1)
    handle = layer.register_forward_hook(lambda module, args, output: calls.append(module))
    twin = copy.deepcopy(layer)
    handle.remove()
    layer(Tensor([[1.0]]))
    assert calls == []
    twin(Tensor([[1.0]]))
    assert calls == [twin]


# --- hooks ----------------------------------------------------------------------------------------


def test_hooks_see_arguments_and_output_and_can_replace_them():
    layer = Sequential()
    seen = []
    pre = layer.register_forward_pre_hook(lambda module, args: seen.append(("pre", args)))
    double = layer.register_forward_pre_hook(lambda module, args: args[0] * 2)
    post = layer.register_forward_hook(lambda module, args, y: seen.append(("post", args, y)))
    plus = layer.register_forward_hook(lambda module, args, y: y + 1)
    assert layer(5) == 11
    assert seen == [("pre", (5,)), ("post", (10,), 10)]
    double.remove()
    double.remove()
    assert layer(5) == 6
    for handle in (pre, post, plus):
        handle.remove()
    assert layer(5) == 5
    assert len(seen) == 4


def test_a_pre_hook_may_give_several_arguments_and_keywords_pass_through():
    class Add(Module):
        def forward(self, a, b, sign=1):
            return a + sign * b

    add = Add()
    with add.register_forward_pre_hook(lambda module, args: (args[0] + 10, args[1])):
        assert add(1, 2, sign=-1) == 9
    assert add(1, 2, sign=-1) == -1


def test_a_hook_may_remove_itself_while_it_runs():
    layer = Sequential()
    count = []
    handle = layer.register_forward_hook(lambda *_: (count.append("once"), handle.remove())[1])
    layer.register_forward_hook(lambda *_: count.append("always"))
    layer(1)
    layer(1)
    assert count == ["once", "always", "always"]


def test_hooks_of_one_module_are_not_those_of_another():
    a, b = Sequential(), Sequential()
    a.register_forward_hook(lambda module, args, y: y + 1)
    assert (a(1), b(1)) == (2, 1)


# --- looking at it --------------------------------------------------------------------------------


def test_repr_is_pytorchs_tree():
    net = Sequential(Linear(2, 3), ReLU(), ReLU(), Sequential(), Linear(3, 1, bias=False))
    assert repr(net) == (
        "Sequential(\n"
        "  (0): Linear(in_features=2, out_features=3, bias=True)\n"
        "  (1-2): 2 x ReLU()\n"
        "  (3): Sequential()\n"
        "  (4): Linear(in_features=3, out_features=1, bias=False)\n"
        ")"
    )

    class Outer(Module):
        def __init__(self):
            super().__init__()
            self.blocks = ModuleList([Linear(1, 1) for _ in range(2)])

        def extra_repr(self):
            return "width=1"

    assert repr(Outer()) == (
        "Outer(\n"
        "  width=1\n"
        "  (blocks): ModuleList(\n"
        "    (0-1): 2 x Linear(in_features=1, out_features=1, bias=True)\n"
        "  )\n"
        ")"
    )


def test_summary_counts_tied_parameters_once():
    tied = Tied()
    tied.gain = Parameter([1.0], requires_grad=False)
    lines = tied.summary().splitlines()
    assert [line.split() for line in lines if not line.startswith("-")] == [
        ["module", "type", "parameters", "count"],
        ["(itself)", "Tied", "gain", "1", "1"],
        ["embed", "Linear", "weight", "4×4", "16"],
        ["head", "Linear", "weight", "=", "embed.weight", "0"],
        ["total", "Tied", "16", "trainable", "17"],
    ]
    assert len({len(line) for line in lines}) == 1  # columns line up
