"""Sequential, ModuleList, ModuleDict: they behave as list and dict, and register all they hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm import Tensor
from tinygrad_llm.nn import Linear, Module, ModuleDict, ModuleList, ReLU, Sequential


def test_sequential_composes_in_order():
    net = Sequential(Linear(2, 3), ReLU(), Linear(3, 1))
    x = Tensor([[1.0, -2.0]])
    assert net(x).tolist() == net[2](net[1](net[0](x))).tolist()
    assert len(net) == 3
    assert [type(m).__name__ for m in net] == ["Linear", "ReLU", "Linear"]
    assert net[-1] is net[2]
    assert list(net.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert Sequential()(x) is x


def test_sequential_by_names():
    net = Sequential({"hidden": Linear(2, 3), "out": Linear(3, 1)})
    assert list(net.state_dict()) == ["hidden.weight", "hidden.bias", "out.weight", "out.bias"]
    assert dict(net.named_children())["hidden"] is net[0]
    net[0] = Linear(2, 3, bias=False)
    assert list(net.state_dict()) == ["hidden.weight", "out.weight", "out.bias"]


def test_slices_share_the_modules():
    net = Sequential(Linear(1, 2), ReLU(), Linear(2, 1))
    head = net[:2]
    assert isinstance(head, Sequential)
    assert list(head) == list(net)[:2]
    blocks = ModuleList(net)
    assert isinstance(blocks[1:], ModuleList)
    assert list(blocks[1:]) == list(net)[1:]


def test_only_modules_go_in():
    with pytest.raises(TypeError, match="module '0': expected a Module, got int"):
        Sequential(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="expected a Module"):
        ModuleList([None])  # pyright: ignore[reportArgumentType]
    with pytest.raises(IndexError):
        ModuleList()[0]


operations = st.lists(
    st.tuples(
        st.sampled_from(["append", "insert", "set", "del", "del slice", "extend"]),
        st.integers(-5, 5),
    ),
    max_size=12,
)


@given(operations)
def test_a_module_list_is_a_list(steps):
    ours, theirs = ModuleList(), []
    for what, i in steps:
        module = Module()
        if what == "append":
            ours.append(module)
            theirs.append(module)
        elif what == "insert":
            ours.insert(i, module)
            theirs.insert(i, module)
        elif what == "extend":
            ours += [module, Module()]
            theirs += list(ours)[-2:]
        elif what == "del slice":
            del ours[i:], theirs[i:]
        elif -len(theirs) <= i < len(theirs):
            if what == "set":
                ours[i] = theirs[i] = module
            else:
                del ours[i], theirs[i]
        assert list(ours) == theirs
        assert len(ours) == len(theirs)
        assert [name for name, _ in ours.named_children()] == [str(n) for n in range(len(theirs))]


def test_a_module_dict_is_a_dict():
    a, b = Linear(1, 1), ReLU()
    parts = ModuleDict({"a": a})
    parts["b"] = b
    assert list(parts) == parts.keys() == ["a", "b"]
    assert parts.values() == [a, b]
    assert parts.items() == [("a", a), ("b", b)]
    assert "a" in parts
    assert "training" not in parts
    assert len(parts) == 2
    assert list(parts.state_dict()) == ["a.weight", "a.bias"]
    assert parts.pop("a") is a
    del parts["b"]
    assert len(parts) == 0
    with pytest.raises(KeyError, match="'a'; the keys are none"):
        parts["a"]
    with pytest.raises(ValueError, match="has an attribute 'keys' already"):
        parts["keys"] = a
    with pytest.raises(KeyError):
        parts["training"]
