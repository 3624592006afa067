"""What all optimisers share: groups, state, resuming, the walk in blocks, refusals."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygrad_llm import Tensor, backend
from tinygrad_llm.optim import SGD, Adam, AdamW
from tinygrad_llm.optim.optimizer import BLOCK

EVERY = [
    lambda params: SGD(params, lr=0.1, weight_decay=0.1, maximize=True),
    lambda params: SGD(params, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1),
    lambda params: SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    lambda params: Adam(params, lr=0.1, weight_decay=0.1),
    lambda params: AdamW(params, lr=0.1, weight_decay=0.1),
]
every_optimizer = pytest.mark.parametrize(
    "make", EVERY, ids=["sgd", "momentum", "nesterov", "adam", "adamw"]
)
FLOATS = [backend.float16, backend.bfloat16, backend.float32, backend.float64]


def leaf(array):
    return Tensor(array, requires_grad=True)


def random_leaves(dtype, shapes=((3, 4), (5,), ())):
    rng = np.random.default_rng(0)
    return [leaf(np.asarray(rng.normal(size=shape)).astype(dtype)) for shape in shapes]


def give_gradients(parameters, step):
    rng = np.random.default_rng(step)
    for p in parameters:
        p.grad = Tensor(np.asarray(rng.normal(size=p.shape)).astype(p.dtype))


def train(optimizer, parameters, steps):
    for step in steps:
        give_gradients(parameters, step)
        optimizer.step()


# --- dtypes and memory ----------------------------------------------------------------------------


class Watched(np.ndarray):
    """An array that refuses to meet anything but float32 arrays and Python scalars."""

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **options):
        for x in (*inputs, *out):
            weak = type(x) in (int, float)
            assert weak or (isinstance(x, np.ndarray) and x.dtype == np.float32), (ufunc, x)
        bare = [x.view(np.ndarray) if isinstance(x, Watched) else x for x in inputs]
        if out:
            options["out"] = tuple(x.view(np.ndarray) for x in out)
        result = getattr(ufunc, method)(*bare, **options)
        assert result.dtype == np.float32
        return out[0] if out else result.view(Watched)


@every_optimizer
def test_float32_is_never_computed_in_float64(make):
    p = leaf(np.ones((3, 4), np.float32))
    p.data = p.data.view(Watched)
    optimizer = make([p])
    # What a schedule written with NumPy would put there: a strong float64 scalar.
    optimizer.param_groups[0]["lr"] = np.float64(0.01)
    for _ in range(3):
        p.grad = Tensor(np.full((3, 4), 0.5, np.float32))
        p.grad.data = p.grad.data.view(Watched)
        optimizer.step()
    assert type(p.data) is Watched
    assert p.data[0, 0] != 1


def test_the_watch_above_can_bark():
    with pytest.raises(AssertionError):
        np.multiply(np.ones(2, np.float32).view(Watched), np.float64(2))


@every_optimizer
def test_the_step_writes_where_the_parameter_lies_and_only_reads_the_gradient(make):
    p = leaf(np.ones((2, 3), np.float32))
    p.grad = Tensor(np.full((2, 3), 2.0, np.float32))
    array, gradient = p.data, p.grad.data
    make([p]).step()
    assert p.data is array
    assert (array != 1).all()
    np.testing.assert_array_equal(gradient, 2.0)


@every_optimizer
@settings(max_examples=25, deadline=None)
@given(
    size=st.sampled_from([0, 1, 2, 7, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 5]),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 2**32 - 1),
)
def test_blocks_and_the_whole_array_give_the_same_bits(make, size, dtype, seed):
    start = np.random.default_rng(seed).normal(size=size).astype(dtype)
    blocked, strided = leaf(start.copy()), leaf(np.repeat(start, 2)[::2])
    assert size < 2 or not strided.data.flags.c_contiguous
    for p in (blocked, strided):
        train(make([p]), [p], range(3))
    np.testing.assert_array_equal(blocked.data, strided.data)


@every_optimizer
def test_transposed_parameters_and_gradients_are_ordinary(make):
    rng = np.random.default_rng(3)
    start, g = rng.normal(size=(4, 6)), rng.normal(size=(4, 6))
    results = []
    for start_, g_ in [(start, g), (start.T.copy().T, g), (start, g.T.copy().T)]:
        p = leaf(start_.copy(order="K"))
        optimizer = make([p])
        for _ in range(2):
            p.grad = Tensor(g_)
            optimizer.step()
        results.append(p.data)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@every_optimizer
def test_a_broadcast_gradient_is_ordinary(make):
    dense, broadcast = leaf(np.ones((3, 4))), leaf(np.ones((3, 4)))
    dense.grad = Tensor(np.ones((3, 4)))
    broadcast.grad = Tensor(np.broadcast_to(1.0, (3, 4)))
    for p in (dense, broadcast):
        make([p]).step()
    np.testing.assert_array_equal(dense.data, broadcast.data)


def test_a_gradient_of_another_shape_is_refused():
    p = leaf(np.ones((3, 4)))
    p.grad = Tensor(np.ones(4))
    with pytest.raises(ValueError, match=r"shape \(3, 4\) has a gradient of shape \(4,\)"):
        AdamW([p]).step()


# --- with the engine ------------------------------------------------------------------------------


@every_optimizer
def test_a_backward_that_needs_overwritten_weights_names_the_optimizer(make):
    p = leaf(np.ones(3, np.float32))
    loss = (p * p).sum()
    p.grad = Tensor(np.ones(3, np.float32))
    optimizer = make([p])
    optimizer.step()
    with pytest.raises(RuntimeError, match=type(optimizer).__name__):
        loss.backward()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_least_squares_are_solved(dtype):
    rng = np.random.default_rng(0)
    x, true = rng.normal(size=(50, 3)).astype(dtype), np.array([1.0, -2.0, 0.5], dtype)
    for make in (
        lambda p: SGD(p, lr=0.1, momentum=0.9),
        lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: Adam(p, lr=0.05),
        lambda p: AdamW(p, lr=0.05, weight_decay=0.0),
    ):
        w = Tensor(np.zeros(3, dtype), requires_grad=True)
        optimizer = make([w])
        for _ in range(400):
            optimizer.zero_grad()
            error = Tensor(x) @ w - Tensor(x @ true)
            (error * error).mean().backward()
            optimizer.step()
        np.testing.assert_allclose(w.data, true, atol=1e-3)
        assert w.dtype == dtype


def test_parameters_without_a_gradient_are_left_alone():
    reached, unreached = leaf([1.0]), leaf([1.0])
    optimizer = AdamW([reached, unreached], weight_decay=0.5)
    reached.grad = Tensor([1.0])
    optimizer.step()
    assert unreached.tolist() == [1.0]
    assert reached.tolist() != [1.0]
    assert set(optimizer.state_dict()["state"]) == {0}


def test_zero_grad():
    p, unreached = leaf([1.0, 2.0]), leaf([1.0])
    optimizer = SGD([p, unreached])
    p.grad = held = Tensor([3.0, 4.0])
    optimizer.zero_grad(set_to_none=False)
    assert p.grad.tolist() == [0.0, 0.0]
    assert p.grad.dtype == p.dtype
    assert unreached.grad is None
    assert held.tolist() == [3.0, 4.0]
    optimizer.zero_grad()
    assert p.grad is None


# --- groups ---------------------------------------------------------------------------------------


def test_groups_take_their_own_options_and_the_defaults():
    a, b, c = leaf([1.0]), leaf([1.0]), leaf([1.0])
    optimizer = SGD([{"params": [a], "lr": 0.1}, {"params": b, "name": "slow"}], lr=0.01)
    optimizer.add_param_group({"params": [c], "lr": 1.0, "weight_decay": 1.0})
    for p in (a, b, c):
        p.grad = Tensor([1.0])
    optimizer.step()
    np.testing.assert_allclose([a.item(), b.item(), c.item()], [0.9, 0.99, -1.0], rtol=1e-6)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01, 1.0]
    assert optimizer.param_groups[1]["name"] == "slow"


def test_named_parameters_keep_their_names():
    pairs = [("w", leaf([1.0])), ("b", leaf([1.0]))]
    optimizer = AdamW(iter(pairs))
    assert optimizer.param_groups[0]["param_names"] == ["w", "b"]
    assert optimizer.param_groups[0]["params"] == [p for _, p in pairs]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["w", "b"]
    with pytest.raises(ValueError, match="either all parameters come with names or none"):
        optimizer.add_param_group({"params": [leaf([1.0])]})


def test_repr_shows_groups_and_options():
    text = repr(AdamW([leaf(np.ones((20, 100)))], lr=3e-4))
    assert "AdamW" in text
    assert "1 arrays, 2,000 numbers" in text
    assert "lr=0.0003" in text


ONE = leaf([1.0])


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([], ValueError, "list of parameters is empty"),
        (iter(()), ValueError, "list of parameters is empty"),
        ([{"params": []}], ValueError, "list of parameters is empty"),
        (leaf([1.0]), TypeError, r"got one Tensor: write \[p\]"),
        ({"params": [leaf([1.0])]}, TypeError, r"got one dict: write \[\{…\}\]"),
        (3, TypeError, "params must be an iterable of Tensors"),
        ([np.ones(3)], TypeError, "parameter 0: expected a Tensor"),
        ([ONE, ONE], ValueError, r"parameter 1 of shape \(1,\) is here twice"),
        ([{"params": [ONE]}, {"params": [ONE]}], ValueError, "is here twice"),
        ([Tensor([1.0])], ValueError, "requires_grad=False"),
        ([("w", Tensor([1.0]))], ValueError, "parameter 'w' of shape"),
        ([("w", ONE), leaf([1.0])], TypeError, "are \\(name, Tensor\\) pairs, or none is"),
        ([{"parameters": [ONE]}], TypeError, "a dict with the key 'params'"),
        ([{"params": [ONE], "weight_deacy": 0.1}], ValueError, "did you mean 'weight_decay'"),
        ([{"params": [ONE], "zzz": 0.1}], ValueError, "no option 'zzz': it has lr, betas"),
        ([{"params": [ONE], "lr": -1.0}], ValueError, "lr must be at least 0"),
    ],
)
def test_wrong_parameters_are_refused(params, error, message):
    with pytest.raises(error, match=message):
        AdamW(params)


def test_the_result_of_an_op_is_refused():
    with pytest.raises(ValueError, match="the result of an op, not a leaf"):
        AdamW([leaf([1.0]) * 2.0])


def test_a_refused_group_is_not_added():
    optimizer = AdamW([ONE])
    with pytest.raises(ValueError, match="lr must be"):
        optimizer.add_param_group({"params": [leaf([1.0])], "lr": -1})
    assert len(optimizer.param_groups) == 1


# --- saving and resuming --------------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_resumed_optimizer_goes_on_bit_for_bit(make, dtype):
    through = random_leaves(dtype)
    optimizer = make(through)
    train(optimizer, through, range(5))
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = [leaf(p.data.copy()) for p in through]
    train(optimizer, through, range(5, 10))

    again = make(resumed)
    again.load_state_dict(saved)
    train(again, resumed, range(5, 10))
    for p, q in zip(through, resumed, strict=True):
        np.testing.assert_array_equal(p.data, q.data)
    assert all(
        np.array_equal(value, again.state[q][key])
        for p, q in zip(through, resumed, strict=True)
        for key, value in optimizer.state[p].items()
    )


def test_the_layout_of_the_state_is_pytorchs():
    a, b, c = random_leaves(np.float32)
    optimizer = AdamW([{"params": [a, b]}, {"params": [c], "lr": 0.5}], lr=0.1)
    train(optimizer, [a, c], range(2))
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups"}
    assert list(state["state"]) == [0, 2]
    assert state["state"][0]["step"] == 2
    assert type(state["state"][0]["exp_avg"]) is np.ndarray
    assert state["state"][0]["exp_avg"].shape == a.shape
    assert set(state["state"][2]) == {"step", "exp_avg", "exp_avg_sq"}
    assert state["param_groups"] == [
        {"params": [0, 1], "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
        {"params": [2], "lr": 0.5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    ]


def test_a_state_that_was_text_in_between_loads():
    """JSON makes strings of integer keys and lists of tuples; PyTorch counts steps in an array."""
    a, b = random_leaves(np.float32, ((2, 3), (4,)))
    optimizer = AdamW([a, b], betas=(0.8, 0.9))
    train(optimizer, [a, b], range(3))
    saved = optimizer.state_dict()
    saved["state"] = {str(i): dict(kept, step=np.array(3.0)) for i, kept in saved["state"].items()}
    saved["param_groups"][0]["betas"] = [0.8, 0.9]
    again = AdamW([leaf(a.data.copy()), leaf(b.data.copy())])
    again.load_state_dict(saved)
    assert again.param_groups[0]["betas"] == (0.8, 0.9)
    assert [kept["step"] for kept in again.state.values()] == [3, 3]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_loading_copies_the_arrays_and_takes_the_parameters_dtype(dtype):
    p, q = leaf(np.ones(3, dtype)), leaf(np.ones(3, np.float32))
    first, second = AdamW([p]), AdamW([q])
    train(first, [p], range(1))
    second.load_state_dict(first.state_dict())
    assert second.state[q]["exp_avg"].dtype == np.float32
    before = second.state[q]["exp_avg"].copy()
    train(first, [p], range(1))
    np.testing.assert_array_equal(second.state[q]["exp_avg"], before)


def test_halves_resume_from_a_state_without_a_master():
    full, half = leaf(np.ones(3, np.float32)), leaf(np.ones(3, backend.bfloat16))
    first, second = AdamW([full]), AdamW([half])
    train(first, [full], range(1))
    second.load_state_dict(first.state_dict())
    train(second, [half], range(1))
    assert second.state[half]["master"].dtype == np.float32


def trained_state(shapes=((3, 4), (5,)), names=None, dtype="float32"):
    parameters = random_leaves(backend.as_dtype(dtype), shapes)
    optimizer = AdamW(list(zip(names, parameters, strict=True)) if names else parameters)
    train(optimizer, parameters, range(1))
    return optimizer.state_dict()


def misfit(change):
    state = trained_state()
    change(state)
    return state


@pytest.mark.parametrize(
    ("state", "messages"),
    [
        (trained_state(((4, 3), (6,))), [
            r"'exp_avg' of parameter 0 has shape \(4, 3\), expected \(3, 4\)",
            r"'exp_avg_sq' of parameter 1 has shape \(6,\), expected \(5,\)",
        ]),
        (trained_state(((3, 4),)), ["group 0 has 1 parameters, expected 2"]),
        (trained_state(dtype="bfloat16"), [r"0 \(float32\) has an unexpected 'master'"]),
        (misfit(lambda s: s["param_groups"].append({})), ["2 parameter groups, expected 1"]),
        (misfit(lambda s: s["param_groups"][0].update(amsgrad=True)), ["options amsgrad"]),
        (misfit(lambda s: s["param_groups"][0].update(lr=-1.0)), ["lr must be at least 0"]),
        (misfit(lambda s: s["state"][0].pop("exp_avg")), ["parameter 0 has no 'exp_avg'"]),
        (misfit(lambda s: s["state"].update({7: {}})), ["a parameter 7, expected at most 1"]),
        (misfit(lambda s: s["state"][1].update(step=np.ones(2))), [r"'step' .* shape \(2,\)"]),
        (misfit(lambda s: s.pop("state")), ["with 'state' and 'param_groups' .* 'param_groups'"]),
    ],
)  # fmt: skip
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(state, messages):
    parameters = random_leaves(np.float32, ((3, 4), (5,)))
    optimizer = AdamW(parameters, lr=0.25)
    train(optimizer, parameters, range(1))
    before = copy.deepcopy(optimizer.state_dict())
    for message in messages:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for i, kept in before["state"].items():
        assert all(np.array_equal(value, after["state"][i][key]) for key, value in kept.items())


def test_names_in_another_order_are_refused():
    parameters = random_leaves(np.float32, ((3,), (3,)))
    optimizer = AdamW(list(zip(["a", "b"], parameters, strict=True)))
    optimizer.load_state_dict(trained_state(((3,), (3,)), ["a", "b"]))
    with pytest.raises(ValueError, match="group 0 has 'b', expected 'a'"):
        optimizer.load_state_dict(trained_state(((3,), (3,)), ["b", "a"]))
