"""The graph: what is recorded, walked, freed, refused."""

import contextlib
import gc
import threading
import weakref

import numpy as np
import pytest

import tinygrad_llm as tg
from tinygrad_llm import Tensor, autograd, ops
from tinygrad_llm.autograd import Function, mark_written
from tinygrad_llm.ops.elementwise import Exp


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return Tensor(np.random.default_rng(seed).normal(size=shape), requires_grad=True)


def values(x: Tensor | None) -> np.ndarray:
    assert x is not None
    return x.numpy()


# --- backward and grad ----------------------------------------------------------------------------


def test_a_chain_by_hand() -> None:
    x, w = Tensor([[1.0, 2.0]], requires_grad=True), Tensor([[3.0], [4.0]], requires_grad=True)
    y = ((x @ w) ** 2).sum()  # (1·3 + 2·4)² = 121
    y.backward()
    assert y.item() == 121.0
    np.testing.assert_array_equal(values(x.grad), [[66.0, 88.0]])  # 2·11·w
    np.testing.assert_array_equal(values(w.grad), [[22.0], [44.0]])  # 2·11·x


def test_gradients_add_up_over_uses_and_over_calls() -> None:
    x = leaf(3)
    (x * x + x).sum().backward()
    once = values(x.grad).copy()
    np.testing.assert_allclose(once, 2 * x.numpy() + 1)
    (x * x + x).sum().backward()
    np.testing.assert_allclose(values(x.grad), 2 * once)


def test_a_node_waits_for_all_its_users() -> None:
    # h is used by an early and by a late op; its own backward must run once, with the whole sum.
    x = leaf(3)
    h = x.exp()
    early = h * 2.0
    late = (early * h).sum() + h.sum()
    late.backward()
    e = np.exp(x.numpy())
    np.testing.assert_allclose(values(x.grad), 4 * e * e + e)


def test_grad_returns_and_leaves_dot_grad_alone() -> None:
    x, w = leaf(3), leaf(3, seed=1)
    gx, gw = tg.grad((x * w).sum(), [x, w])
    np.testing.assert_array_equal(gx.numpy(), w.numpy())
    np.testing.assert_array_equal(gw.numpy(), x.numpy())
    assert x.grad is None
    assert w.grad is None


def test_grad_of_an_intermediate_and_of_the_output_itself() -> None:
    x = leaf(3)
    h = x * 2.0
    y = (h * h).sum()
    gh, gy, gx = tg.grad(y, [h, y, x])
    np.testing.assert_allclose(gh.numpy(), 2 * h.numpy())
    assert gy.item() == 1.0
    np.testing.assert_allclose(gx.numpy(), 8 * x.numpy())


def test_grad_walks_only_the_way_to_its_inputs() -> None:
    ran: list[str] = []

    class Spy(Function):
        def forward(self, x: np.ndarray) -> np.ndarray:
            return x + 0.0

        def backward(self, g: np.ndarray) -> np.ndarray:
            ran.append("spy")
            return g

    x, w = leaf(3), leaf(3, seed=1)
    y = (Spy.apply(w) * x).sum()
    tg.grad(y, x)
    assert ran == []
    tg.grad((Spy.apply(w) * x).sum(), w)
    assert ran == ["spy"]


def test_several_outputs_with_their_gradients() -> None:
    x = leaf(3)
    a, b = x * 2.0, x * x
    seed = Tensor(np.array([1.0, 0.0, -1.0]))
    (g,) = tg.grad([a, b], x, grad_outputs=[seed, seed])
    np.testing.assert_allclose(g.numpy(), seed.numpy() * (2 + 2 * x.numpy()))


def test_unused_inputs_are_refused_or_none() -> None:
    x, w = leaf(3), leaf(3, seed=1)
    with pytest.raises(RuntimeError, match="no output depends on input 1"):
        tg.grad((x * x).sum(), [x, w])
    assert tg.grad((x * x).sum(), [x, w], allow_unused=True)[1] is None
    with pytest.raises(RuntimeError, match="input 0 does not require a gradient"):
        tg.grad((x * x).sum(), [Tensor(1.0)])


def test_where_a_gradient_cannot_start() -> None:
    x = leaf(3)
    with pytest.raises(RuntimeError, match=r"only from a scalar, got shape \(3,\)"):
        (x * x).backward()
    with pytest.raises(ValueError, match=r"expected the output's shape \(3,\), got \(2,\)"):
        (x * x).backward(Tensor(np.ones(2)))
    with pytest.raises(RuntimeError, match="does not require a gradient"):
        Tensor([1.0]).sum().backward()


@pytest.mark.parametrize("again", [False, True])
def test_retain_graph(again: bool) -> None:
    x = leaf(3)
    y = (x * x).sum()
    y.backward(retain_graph=again)
    if again:
        y.backward()
        np.testing.assert_allclose(values(x.grad), 4 * x.numpy())
    else:
        with pytest.raises(RuntimeError, match=r"Multiply a second time.*retain_graph=True"):
            y.backward()


def test_second_order_equals_the_formula() -> None:
    x = leaf(4)
    (g,) = tg.grad((x**3).sum(), x, create_graph=True)
    (gg,) = tg.grad(g.sum(), x)
    np.testing.assert_allclose(gg.numpy(), 6 * x.numpy())


def test_third_order() -> None:
    x = leaf(4)
    y = x.tanh().sum()
    for _ in range(2):
        (y,) = tg.grad(y, x, create_graph=True)
        y = y.sum()
    (g3,) = tg.grad(y, x)
    t = np.tanh(x.numpy())
    np.testing.assert_allclose(g3.numpy(), -2 * (1 - t * t) * (1 - 3 * t * t), rtol=1e-12)


def test_create_graph_through_backward_fills_a_differentiable_grad() -> None:
    x = leaf(3)
    (x**3).sum().backward(create_graph=True)
    first = x.grad
    assert first is not None
    (gg,) = tg.grad(first.sum(), x)
    np.testing.assert_allclose(gg.numpy(), 6 * x.numpy())


def test_an_op_may_refuse_the_second_order_by_name() -> None:
    class Once(Function):
        second_order = False

        def forward(self, x: np.ndarray) -> np.ndarray:
            return x * 2.0

        def backward(self, g: np.ndarray) -> np.ndarray:
            return g * 2.0

    class Secret(Function):
        def forward(self, x: np.ndarray) -> np.ndarray:
            self.save(x * x)  # neither input nor output
            return x * x * x

        def backward(self, g: np.ndarray, square: np.ndarray) -> np.ndarray:
            return 3.0 * g * square

    for op in (Once, Secret):
        x = leaf(3)
        y = op.apply(x).sum()
        with pytest.raises(RuntimeError, match=f"{op.__name__} has no second-order gradient"):
            tg.grad(y, x, create_graph=True)
        op.apply(x).sum().backward()  # the first order is no trouble


def test_apply_takes_tensors() -> None:
    for recording in (tg.enable_grad, tg.no_grad):
        with recording(), pytest.raises(TypeError, match=r"takes Tensors, got ndarray"):
            Exp.apply(np.ones(3))  # pyright: ignore[reportArgumentType]


def test_errors_from_within_say_in_which_op() -> None:
    class Forgetful(Function):
        def forward(self, x: np.ndarray) -> np.ndarray:
            return x * x

        def backward(self, g: np.ndarray, x: np.ndarray) -> np.ndarray:
            return g * x

    x = leaf(3)
    with pytest.raises(ValueError, match="broadcast") as caught:
        x + leaf(2)  # pyright: ignore[reportUnusedExpression]
    assert caught.value.__notes__ == ["in Add of float64(3,), float64(2,)"]
    with pytest.raises(TypeError) as error:
        Forgetful.apply(x).sum().backward()
    assert error.value.__notes__ == ["in the backward of Forgetful, with 0 saved"]


def test_backward_must_return_a_gradient_per_input() -> None:
    class Short(Function):
        def forward(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return a + b

        def backward(self, g: np.ndarray) -> np.ndarray:
            return g

    with pytest.raises(TypeError, match="backward of Short returned 1 gradients for 2 inputs"):
        Short.apply(leaf(3), leaf(3)).sum().backward()


# --- recording ------------------------------------------------------------------------------------


def test_no_grad_as_block_and_decorator() -> None:
    x = leaf(3)

    @tg.no_grad()
    def evaluate() -> Tensor:
        assert not tg.is_grad_enabled()
        with tg.enable_grad():
            assert (x * x).requires_grad
        return x * x

    assert not evaluate().requires_grad
    assert tg.is_grad_enabled()
    with pytest.raises(KeyError), tg.no_grad():
        raise KeyError
    assert tg.is_grad_enabled()


def test_recording_is_per_thread() -> None:
    seen: list[bool] = []
    with tg.no_grad():
        thread = threading.Thread(target=lambda: seen.append(tg.is_grad_enabled()))
        thread.start()
        thread.join()
    assert seen == [True]


def test_constants_are_not_recorded() -> None:
    assert (Tensor([1.0]) * 2.0).node is None
    assert (leaf(2) > 0.0).node is None
    assert leaf(2).detach().node is None


def test_hooks_see_and_replace_the_whole_gradient() -> None:
    x = leaf(3)
    h = x * 2.0
    seen: list[np.ndarray] = []
    remove = h.register_hook(lambda g: seen.append(g.numpy().copy()))
    h.register_hook(lambda g: g * 10.0)
    (h + h).sum().backward()
    np.testing.assert_array_equal(seen, [[2.0, 2.0, 2.0]])
    np.testing.assert_array_equal(values(x.grad), [40.0] * 3)
    remove()
    remove()
    assert len(seen) == 1


def test_a_leaf_hook_runs_once_with_the_sum() -> None:
    x = leaf(3)
    seen: list[np.ndarray] = []
    x.register_hook(lambda g: seen.append(g.numpy().copy()))
    (x * 2.0 + x * 3.0).sum().backward()
    np.testing.assert_array_equal(seen, [[5.0] * 3])


def test_a_hook_of_another_shape_is_refused() -> None:
    x = leaf(3)
    x.register_hook(lambda g: g.sum())
    with pytest.raises(ValueError, match=r"gradient's shape \(3,\), got \(\)"):
        (x * x).sum().backward()


def test_retain_grad() -> None:
    x = leaf(3)
    h = x * 2.0
    h.retain_grad()
    (h * h).sum().backward()
    np.testing.assert_allclose(values(h.grad), 2 * h.numpy())


# --- memory ---------------------------------------------------------------------------------------


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("walk", ["none", "backward", "grad", "second order", "error"])
def test_a_graph_is_freed_by_reference_count(walk: str) -> None:
    x = leaf(3)
    y = ops.layer_norm((x * x).tanh()[1:]).exp().sum()
    node = weakref.ref(y.node)
    if walk == "backward":
        y.backward()
    elif walk == "grad":
        tg.grad(y, x)
    elif walk == "second order":
        (g,) = tg.grad(y, x, create_graph=True)
        tg.grad(g.sum(), x)
        del g
    elif walk == "error":
        y.backward()
        with contextlib.suppress(RuntimeError):
            y.backward()
    del y
    assert node() is None


@pytest.mark.usefixtures("no_collector")
def test_saved_arrays_go_as_the_walk_passes() -> None:
    x = leaf(3)
    h = x.exp()
    array = weakref.ref(h.data)
    y = (h * 2.0).sum()
    del h
    assert array() is not None  # saved by Exp
    y.backward()
    assert array() is None  # though y still stands


def test_an_unneeded_input_is_not_kept() -> None:
    x = leaf(3)
    activation = x * 2.0
    array = weakref.ref(activation.data)
    y = (activation * 3.0).sum()  # d/dactivation needs the 3, not the activation
    del activation
    assert array() is None
    y.backward()


def test_a_very_deep_graph() -> None:
    x = Tensor(1.0, requires_grad=True)
    y = x
    for _ in range(50_000):
        y = y + 1.0
    y.backward()
    assert values(x.grad) == 1.0
    del y


@pytest.mark.usefixtures("no_collector")
def test_two_hundred_training_steps_do_not_grow_memory() -> None:
    from tinygrad_llm import nn, optim

    tg.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4))
    optimiser = optim.AdamW(model.parameters(), lr=1e-3)
    x, target = tg.randn(32, 8), tg.randint(0, 4, (32,))

    def step() -> None:
        optimiser.zero_grad()
        loss = ops.cross_entropy(ops.dropout(model(x), 0.1), target)
        loss.backward()
        optim.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()

    def steps(n: int) -> int:
        for _ in range(n):
            step()
        return len(gc.get_objects())

    before = steps(10)
    assert steps(200) <= before + 5


# --- ownership of gradients -----------------------------------------------------------------------


def test_leaves_never_share_the_memory_of_a_gradient() -> None:
    a, b = leaf(3), leaf(3, seed=1)
    seed = Tensor(np.ones(3))
    (a + b).backward(seed)
    assert a.grad is not None
    assert b.grad is not None
    a.grad.data[:] = 7.0
    np.testing.assert_array_equal(values(b.grad), [1.0] * 3)
    np.testing.assert_array_equal(seed.numpy(), [1.0] * 3)


def test_broadcast_and_transposed_gradients_become_ordinary_ones() -> None:
    x = leaf(2, 3)
    x.sum().backward()
    assert x.grad is not None
    x.grad.data[0, 0] = 5.0  # stride 0 would write everywhere
    assert values(x.grad).sum() == 10.0
    y = leaf(2, 3)
    (y.T @ leaf(2, 2)).sum().backward()
    assert y.grad is not None
    assert y.grad.data.flags.c_contiguous


def test_adding_up_does_not_write_into_what_others_hold() -> None:
    x = leaf(3)
    h = x * 1.0
    kept: list[Tensor] = []
    h.register_hook(lambda g: kept.append(g))
    a, b = h * 2.0, h * 3.0
    a.register_hook(lambda g: kept.append(g))
    (a + b + a).sum().backward()
    np.testing.assert_array_equal(kept[0].numpy(), [2.0] * 3)  # of a
    np.testing.assert_array_equal(kept[1].numpy(), [7.0] * 3)  # of h


def test_a_gradient_comes_in_the_dtype_of_its_leaf() -> None:
    x = Tensor(np.ones(3, np.float32), requires_grad=True)
    (x * Tensor(np.ones(3))).sum().backward()  # float64 beyond the cast
    assert x.grad is not None
    assert x.grad.dtype == tg.float32


def test_a_wrong_gradient_shape_is_refused() -> None:
    class Wrong(Function):
        def forward(self, x: np.ndarray) -> np.ndarray:
            return x.sum(axis=0)

        def backward(self, g: np.ndarray) -> np.ndarray:
            return g

    x = leaf(2, 3)
    with pytest.raises(RuntimeError, match=r"shape \(3,\) came for a tensor of shape \(2, 3\)"):
        Wrong.apply(x).sum().backward()


def test_slices_in_a_loop_add_into_one_array() -> None:
    x = leaf(50, 3)
    total = Tensor(np.zeros(3))
    for t in range(50):
        total = total + x[t] * float(t)
    total.sum().backward()
    np.testing.assert_array_equal(values(x.grad), np.arange(50.0)[:, None] * np.ones(3))


def test_tied_embedding_gets_both_gradients() -> None:
    w = leaf(5, 3)
    ids = np.array([0, 2, 2])
    h = ops.embedding(ids, w)
    logits = ops.linear(h, w)
    logits.sum().backward()
    onehot = np.eye(5)[ids]
    # y = onehot W Wᵀ, summed: both places of W
    expected = onehot.T @ (np.ones((3, 5)) @ w.numpy()) + np.ones((5, 3)) @ (onehot @ w.numpy())
    np.testing.assert_allclose(values(w.grad), expected)


# --- writes in place ------------------------------------------------------------------------------


def test_a_saved_array_that_was_overwritten_is_refused_with_both_names() -> None:
    x, w = leaf(3), leaf(3, seed=1)
    y = (x * w).sum()
    with tg.no_grad():
        w += 1.0
    with pytest.raises(RuntimeError, match=r"backward of Multiply .* x \+= y has overwritten"):
        y.backward()


def test_a_write_through_a_view_is_seen() -> None:
    x, w = leaf(3), leaf(3, seed=1)
    y = (x * w).sum()
    view = w.detach()[1:]
    view[0] = 5.0
    with pytest.raises(RuntimeError, match="overwritten"):
        y.backward()


def test_writes_before_the_forward_or_elsewhere_are_no_trouble() -> None:
    x, w = leaf(3), leaf(3, seed=1)
    with tg.no_grad():
        w += 1.0
    y = (x * w).sum()
    other = Tensor(np.zeros(3))
    other += 1.0
    y.backward()
    np.testing.assert_array_equal(values(x.grad), w.numpy())


def test_a_write_to_what_nobody_saved_is_no_trouble() -> None:
    x, b = leaf(3), leaf(3, seed=1)
    y = (x + b).sum()
    with tg.no_grad():
        b += 1.0
    y.backward()


def test_an_optimiser_step_between_forward_and_backward_is_refused() -> None:
    from tinygrad_llm import optim

    w = leaf(3)
    optimiser = optim.SGD([w], lr=0.1)
    w.grad = Tensor(np.ones(3))
    y = (w * w).sum()
    optimiser.step()
    with pytest.raises(RuntimeError, match="SGD has overwritten"):
        y.backward()


def test_the_log_of_writes_forgets_the_dead() -> None:
    before = len(autograd._writes)
    for _ in range(100):
        mark_written(np.zeros(3), "test")
    assert len(autograd._writes) <= before + 1


# --- checkpoint -----------------------------------------------------------------------------------


def test_checkpoint_gives_the_same_gradients_with_the_same_dropout() -> None:
    w = leaf(6, 6)

    def block(x: Tensor) -> Tensor:
        return ops.dropout((x @ w).tanh(), 0.5) @ w

    results = []
    for run in (lambda x: block(block(x)), lambda x: tg.checkpoint(block, tg.checkpoint(block, x))):
        tg.manual_seed(3)
        x = leaf(4, 6, seed=1)
        w.grad = None
        y = run(x)
        draws = tg.rand(2).numpy()  # the stream goes on as if nothing had been replayed
        (y * y).sum().backward()
        results.append((y.numpy(), values(x.grad), values(w.grad), draws, tg.rand(2).numpy()))
    for plain, replayed in zip(*results, strict=True):
        np.testing.assert_array_equal(plain, replayed)


def test_checkpoint_keeps_no_intermediate() -> None:
    x = leaf(3)
    arrays: list[weakref.ref[np.ndarray]] = []

    def block(x: Tensor) -> Tensor:
        h = x.exp()
        arrays.append(weakref.ref(h.data))
        return h.tanh() * 2.0

    y = tg.checkpoint(block, x)
    assert arrays[0]() is None
    y.sum().backward()
    assert len(arrays) == 2
    assert arrays[1]() is None


def test_checkpoint_second_order_and_grad() -> None:
    x = leaf(3)
    y = tg.checkpoint(lambda x: (x**3).tanh(), x).sum()
    z = (x**3).tanh().sum()
    (g1,), (g2,) = tg.grad(y, x, create_graph=True), tg.grad(z, x, create_graph=True)
    np.testing.assert_array_equal(g1.numpy(), g2.numpy())
    np.testing.assert_allclose(
        tg.grad(g1.sum(), x)[0].numpy(), tg.grad(g2.sum(), x)[0].numpy(), rtol=1e-12
    )


def test_checkpoint_inside_checkpoint_and_without_recording() -> None:
    x = leaf(3)
    inner = lambda x: x.exp()  # noqa: E731
    y = tg.checkpoint(lambda x: tg.checkpoint(inner, x).tanh(), x)
    (g,) = tg.grad(y.sum(), x)
    (expected,) = tg.grad(x.exp().tanh().sum(), x)
    np.testing.assert_array_equal(g.numpy(), expected.numpy())
    with tg.no_grad():
        assert not tg.checkpoint(inner, x).requires_grad


def test_checkpoint_of_what_changes_is_refused() -> None:
    x, calls = leaf(3), []

    def fickle(x: Tensor) -> Tensor:
        calls.append(1)
        return x.exp() if len(calls) == 1 else x.tanh()

    y = tg.checkpoint(fickle, x).sum()
    with pytest.raises(RuntimeError, match=r"did 1 things .* must compute the same twice"):
        y.backward()


@pytest.mark.usefixtures("no_collector")
def test_checkpoint_is_freed_by_reference_count() -> None:
    x = leaf(3)
    y = tg.checkpoint(lambda x: x.exp().tanh(), x).sum()
    node = weakref.ref(y.node)
    y.backward()
    del y
    assert node() is None


# --- anomaly mode ---------------------------------------------------------------------------------


def test_anomaly_names_the_op_and_the_line_of_a_forward() -> None:
    x = Tensor([1.0, -1.0], requires_grad=True)
    message = r"Log made NaN in 1 of 2 .*first at \(1,\), at test_autograd.py:.* # guilty"
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(FloatingPointError, match=message),
        tg.detect_anomaly(),
    ):
        x.log()  # guilty


def test_anomaly_names_the_forward_line_of_a_backward() -> None:
    x = Tensor([0.0, 4.0], requires_grad=True)
    with tg.detect_anomaly():
        y = x.sqrt()  # guilty
        loss = y.sum()
        with (
            np.errstate(divide="ignore"),
            pytest.raises(FloatingPointError, match=r"backward of Sqrt made infinity .*# guilty"),
        ):
            loss.backward()


def test_anomaly_excuses_infinities_that_came_in() -> None:
    x = Tensor([0.0, 1.0], requires_grad=True)
    with tg.detect_anomaly():
        masked = x.masked_fill(np.array([True, False]), -np.inf)
        y = masked.softmax()
        y.sum().backward()
        with (
            pytest.raises(FloatingPointError, match="Subtract made NaN"),
            np.errstate(all="ignore"),
        ):
            ops.subtract(masked, masked)


def test_anomaly_mode_ends() -> None:
    with tg.detect_anomaly():
        pass
    with np.errstate(invalid="ignore"):
        assert np.isnan(Tensor([-1.0]).log().numpy()).all()


# --- cases that a review found --------------------------------------------------------------------


def test_checkpoint_survives_what_becomes_of_its_input() -> None:
    w = leaf(3)
    x = w * 1.0
    with pytest.raises(RuntimeError, match="holds the same memory"):
        x += tg.checkpoint(lambda x: x.exp(), x)


def test_checkpoint_refuses_a_loop_variable_that_went_on() -> None:
    weights = [leaf(3, seed=i) for i in range(2)]
    h = leaf(3, seed=9)
    for w in weights:
        h = tg.checkpoint(lambda h: (h * w).tanh(), h)  # noqa: B023 (the mistake in question)
    with pytest.raises(RuntimeError, match="a loop variable"):
        h.sum().backward()
    h = leaf(3, seed=9)
    for w in weights:
        h = tg.checkpoint(lambda h, w=w: (h * w).tanh(), h)
    h.sum().backward()
    assert all(w.grad is not None for w in weights)


@pytest.mark.parametrize("which", ["input", "parameter"])
def test_checkpoint_refuses_an_overwritten_start(which: str) -> None:
    x, w = leaf(3), leaf(3, seed=1)
    y = tg.checkpoint(lambda x: (x * 2.0 + w).exp(), x)
    with tg.no_grad():
        (x if which == "input" else w).copy_(np.zeros(3))
    with pytest.raises(RuntimeError, match=r"copy_\(\) has overwritten"):
        y.sum().backward()


def test_checkpoint_refuses_a_stream_of_ones_own() -> None:
    from tinygrad_llm.backend import RandomStream

    x, stream = leaf(12), RandomStream(1)
    y = tg.checkpoint(lambda x: ops.dropout(x * 1.0, 0.5, stream=stream), x)
    with pytest.raises(RuntimeError, match="a random stream of its own"):
        y.sum().backward()


def test_checkpoint_runs_again_after_an_error_in_the_second_run() -> None:
    x, calls = leaf(3), []

    def sometimes(x: Tensor) -> Tensor:
        calls.append(1)
        h = x.exp()
        if len(calls) == 2:
            raise MemoryError
        return h.tanh()

    y = tg.checkpoint(sometimes, x).sum()
    with pytest.raises(MemoryError):
        y.backward(retain_graph=True)
    y.backward()
    np.testing.assert_allclose(
        values(x.grad), tg.grad(x.exp().tanh().sum(), x)[0].numpy(), rtol=1e-15
    )


def test_second_order_with_a_detached_twin() -> None:
    x = Tensor([3.0], requires_grad=True)
    (g,) = tg.grad((x * x.detach()).sum(), x, create_graph=True)
    assert g.item() == 3.0
    assert not g.requires_grad  # a constant


def test_second_order_of_two_tensors_on_one_array_is_refused() -> None:
    array = np.array([3.0])
    p, q = Tensor(array, requires_grad=True), Tensor(array, requires_grad=True)
    with pytest.raises(RuntimeError, match="different tensors on one array"):
        tg.grad((p * q).sum(), p, create_graph=True)
    p.grad = q.grad = None
    (p * q).sum().backward()
    assert values(p.grad) == values(q.grad) == 3.0


def test_gradients_with_a_graph_are_not_shared_between_leaves() -> None:
    a, b, seed = leaf(3), leaf(3, seed=1), Tensor(np.ones(3))
    (a + b).backward(seed, create_graph=True)
    (a * 1.0 + b * 1.0).backward(Tensor(np.ones(3)))
    for x in (a, b):
        np.testing.assert_array_equal(values(x.grad), [2.0] * 3)
    np.testing.assert_array_equal(seed.numpy(), [1.0] * 3)
    c = leaf(3)
    c.sum().backward(create_graph=True)
    c.sum().backward()
    np.testing.assert_array_equal(values(c.grad), [2.0] * 3)


def test_returned_gradients_are_the_callers_own() -> None:
    a, b, seed = leaf(3), leaf(3, seed=1), Tensor(np.ones(3))
    ga, gb = tg.grad((a + b) * 1.0, [a, b], grad_outputs=seed)
    ga *= 10.0
    np.testing.assert_array_equal(gb.numpy(), [1.0] * 3)
    (g,) = tg.grad(a.copy(), a, grad_outputs=seed)
    g *= 2.0
    np.testing.assert_array_equal(seed.numpy(), [1.0] * 3)
    (g,) = tg.grad(a.sum(), a)
    g *= 2.0  # not a read-only view of one number


def test_no_grad_may_be_entered_again_while_open() -> None:
    block = tg.no_grad()
    with block, block:
        assert not tg.is_grad_enabled()
    assert tg.is_grad_enabled()


def test_no_grad_refuses_to_decorate_what_runs_in_parts() -> None:
    def numbers():
        yield 1

    with pytest.raises(TypeError, match="runs in parts"):
        tg.no_grad()(numbers)


def test_retain_grad_twice_and_after_a_write() -> None:
    x = leaf(3)
    h = x * 1.0
    h.retain_grad()
    h.retain_grad()
    h *= 3.0
    h.sum().backward()
    np.testing.assert_array_equal(values(h.grad), [1.0] * 3)
    assert h.grad is not None
    h.grad.zero_()


def test_a_leaf_frozen_before_backward_receives_nothing() -> None:
    x, w = leaf(3), leaf(3, seed=1)
    y = (x * w).sum()
    w.requires_grad = False
    y.backward()
    assert w.grad is None
    assert x.grad is not None


def test_infinite_gradients_of_overwritten_places_do_not_spread() -> None:
    x = leaf(2)
    h = x * 1.0
    h[0] = 5.0
    h.backward(Tensor([np.inf, 1.0], dtype=np.float64))
    np.testing.assert_array_equal(values(x.grad), [0.0, 1.0])


def test_weights_of_a_loss_may_be_reused() -> None:
    logits, weight = Tensor([[0.0, 0.0]], requires_grad=True), Tensor([1.0, 2.0])
    loss = ops.cross_entropy(logits, np.array([1]), weight=weight, reduction="sum")
    weight.fill_(0.0)
    loss.backward()
    np.testing.assert_array_equal(values(logits.grad), [[1.0, -1.0]])
