"""lstm: one op over all steps, held against the same in plain ops, step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tinygrad_llm import Tensor, backend, checkpoint, grad, no_grad, ops
from tinygrad_llm.ops import recurrent
from tinygrad_llm.ops.recurrent import LSTM, lstm_reference

CASES: dict[str, dict[str, Any]] = {
    "all steps": {},
    "reverse": {"reverse": True},
    "lengths": {"lengths": np.array([2, 5, 0, 4])},
    "lengths, reverse": {"lengths": np.array([1, 3, 5, 0]), "reverse": True},
    "equal lengths": {"lengths": np.array([3, 3, 3, 3])},
    "nothing real": {"lengths": np.zeros(4, np.int64)},
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CASES[request.param]


def _inputs(
    rng: np.random.Generator, t: int = 5, b: int = 4, i: int = 3, h: int = 2, dtype: Any = float
) -> list[Any]:
    """x, h, c, weight_ih, weight_hh, bias_ih, bias_hh"""
    shapes = ((t, b, i), (b, h), (b, h), (4 * h, i), (4 * h, h), (4 * h,), (4 * h,))
    return [Tensor(rng.normal(size=s).astype(dtype), requires_grad=True) for s in shapes]


def _run(inputs: list[Any], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, h, c, *weights = inputs
    y, (h, c) = ops.lstm(x, (h, c), *weights, **options)
    return y, h, c


def _plain(inputs: list[Any], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, (h, c) = lstm_reference(*inputs, **options)
    return y, h, c


def _seeds(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    rng = np.random.default_rng(7)
    return [Tensor(rng.normal(size=y.shape), dtype=y.dtype) for y in outputs]


def test_one_step_is_the_formula(rng, close) -> None:
    x, h, c, w, u, b, d = (a.numpy() for a in _inputs(rng, t=1))
    i, f, g, o = np.split(x[0] @ w.T + b + h @ u.T + d, 4, axis=1)
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    c_new = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    h_new = sigmoid(o) * np.tanh(c_new)
    got_h, got_c = ops.lstm_cell(x[0], (h, c), w, u, b, d)
    close(got_h, h_new)
    close(got_c, c_new)
    y, (last_h, last_c) = ops.lstm(x, (h, c), w, u, b, d)
    close(y, h_new[None])
    close(last_h, h_new)
    close(last_c, c_new)


def test_all_outputs_equal_those_of_plain_ops(rng, close, case) -> None:
    inputs = _inputs(rng)
    for got, wanted in zip(_run(inputs, **case), _plain(inputs, **case), strict=True):
        close(got, wanted.numpy())


def test_gradients_flow_through_every_output(rng, close, case) -> None:
    """Through y alone, the last h alone, the last c alone, and all together."""
    inputs = _inputs(rng)
    for picked in (slice(0, 1), slice(1, 2), slice(2, 3), slice(0, 3)):
        found = []
        for run in (_run, _plain):
            outputs = run(inputs, **case)[picked]
            start = _seeds(outputs)
            if any(y.requires_grad for y in outputs):
                live = [(y, g) for y, g in zip(outputs, start, strict=True) if y.requires_grad]
                ys, gs = zip(*live, strict=True)
                found.append(grad(ys, inputs, gs, allow_unused=True))
        if len(found) == 2:
            for x, got, wanted in zip(inputs, *found, strict=True):
                zeros = np.zeros(x.shape)
                got = Tensor(zeros) if got is None else got
                close(got, zeros if wanted is None else wanted.numpy(), times=10)


def test_without_state_or_biases_they_are_zeros(rng, close) -> None:
    x, h, c, w, u, *_ = _inputs(rng)
    zeros = np.zeros(h.shape)
    y, (last, _) = ops.lstm(x, None, w, u)
    expected, (expected_last, _) = ops.lstm(
        x, (zeros, zeros), w, u, np.zeros(w.shape[0]), np.zeros(w.shape[0])
    )
    close(y, expected.numpy())
    close(last, expected_last.numpy())
    y.sum().backward()
    assert w.grad is not None
    assert c.grad is None


def test_padding_gives_zeros_keeps_the_state_and_is_never_read(rng) -> None:
    x, h, c, *weights = _inputs(rng)
    poisoned = x.numpy().copy()
    lengths = [2, 5, 0, 4]
    for row, n in enumerate(lengths):
        poisoned[n:, row] = np.nan
    leaf = Tensor(poisoned, requires_grad=True)
    for reverse in (False, True):
        y, (last_h, last_c) = ops.lstm(leaf, (h, c), *weights, lengths=lengths, reverse=reverse)
        for row, n in enumerate(lengths):
            assert (y.numpy()[n:, row] == 0).all()
            assert np.isfinite(y.numpy()[:n, row]).all()
            ends_at = 0 if reverse else n - 1
            if n:
                np.testing.assert_array_equal(last_h.numpy()[row], y.numpy()[ends_at, row])
        np.testing.assert_array_equal(last_h.numpy()[2], h.numpy()[2])
        np.testing.assert_array_equal(last_c.numpy()[2], c.numpy()[2])
        dx = grad([y, last_h, last_c], leaf, _seeds((y, last_h, last_c)))[0].numpy()
        for row, n in enumerate(lengths):
            assert (dx[n:, row] == 0).all()
            assert np.isfinite(dx[:n, row]).all()


def test_reverse_is_the_flipped_sequence(rng, close) -> None:
    inputs = _inputs(rng)
    y, h, c = _run(inputs, reverse=True)
    inputs[0] = ops.flip(inputs[0], 0)
    flipped, h_f, c_f = _run(inputs)
    close(y, flipped.numpy()[::-1])
    close(h, h_f.numpy())
    close(c, c_f.numpy())


def test_a_sequence_in_two_halves_is_the_sequence(rng, close) -> None:
    x, h, c, *weights = _inputs(rng)
    y, (last, _) = ops.lstm(x, (h, c), *weights)
    first, state = ops.lstm(x[:2], (h, c), *weights)
    second, (last_2, _) = ops.lstm(x[2:], state, *weights)
    close(ops.concatenate([first, second]), y.numpy())
    close(last_2, last.numpy())


def test_what_is_not_recorded_is_computed_alike(rng) -> None:
    inputs = _inputs(rng)
    lengths = np.array([4, 1, 5, 2])
    recorded = _run(inputs, lengths=lengths)
    with no_grad():
        plain = _run(inputs, lengths=lengths)
    for a, b in zip(recorded, plain, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
        assert not b.requires_grad


def test_large_pre_activations_do_not_overflow(rng) -> None:
    inputs = [Tensor(a.numpy().astype(np.float32) * 1e4, requires_grad=True) for a in _inputs(rng)]
    y, _, _ = _run(inputs)
    assert np.isfinite(y.numpy()).all()
    y.sum().backward()
    assert all(np.isfinite(a.grad.numpy()).all() for a in inputs if a.grad is not None)


def test_the_second_order_is_that_of_plain_ops(rng, close) -> None:
    inputs = _inputs(rng, t=2, b=3, i=2)
    found = []
    for run in (_run, _plain):
        y, h, c = run(inputs, lengths=np.array([1, 2, 2]))
        (dx,) = grad((y * y).sum() + (h * c).sum(), inputs[0], create_graph=True)
        found.append(grad((dx * dx).sum(), inputs[1:]))
    for got, wanted in zip(*found, strict=True):
        close(got, wanted.numpy(), times=100)


def test_backward_twice_needs_and_gets_retain_graph(rng) -> None:
    inputs = _inputs(rng)
    y, _, _ = _run(inputs)
    loss = y.sum()
    one = grad(loss, inputs[0], retain_graph=True)[0].numpy()
    np.testing.assert_array_equal(grad(loss, inputs[0])[0].numpy(), one)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_an_overwritten_weight_is_noticed(rng) -> None:
    inputs = _inputs(rng)
    y, _, _ = _run(inputs)
    with no_grad():
        inputs[4] += 1.0
    with pytest.raises(RuntimeError, match="overwritten"):
        y.sum().backward()


def test_half_precision_keeps_its_state_in_float32(rng, half) -> None:
    """h and c grow by steps that the dtype cannot hold one by one: 300 times 1/512 … 1."""
    t = 300
    u = np.zeros((4, 1))
    w, b = np.zeros((4, 1)), np.array([20.0, 20.0, 1 / 512, 20.0])  # i = f = o = 1
    args: list[Any] = [Tensor(a, dtype=half) for a in (np.zeros((t, 1, 1)), w, u, b, np.zeros(4))]
    _, (_, c) = ops.lstm(args[0], None, *args[1:])
    assert c.dtype == half
    assert float(c.numpy().astype(float)[0, 0]) == pytest.approx(t * np.tanh(1 / 512), rel=1e-2)


def test_what_does_not_fit_is_refused(rng) -> None:
    x, h, c, w, u, b, d = _inputs(rng)
    with pytest.raises(ValueError, match=r"lstm\(\) takes x \(T, B, I\).*got \(4, 3\)"):
        ops.lstm(x[0], None, w, u)
    with pytest.raises(ValueError, match=r"weight_ih \(4H, I\)"):
        ops.lstm(x, None, w[:, :2], u)
    with pytest.raises(ValueError, match=r"h and c of shape \(4, 2\), got \(3, 2\)"):
        ops.lstm(x, (h[:3], c), w, u)
    with pytest.raises(ValueError, match="or neither: got one of them"):
        ops.lstm(x, None, w, u, b)
    with pytest.raises(ValueError, match=r"biases of shape \(8,\), got \(8,\) and \(7,\)"):
        ops.lstm(x, None, w, u, b, d[:7])
    with pytest.raises(ValueError, match="from 0 to the 5 steps there are, got 6"):
        ops.lstm(x, (h, c), w, u, lengths=[1, 6, 2, 3])
    with pytest.raises(ValueError, match=r"lengths must be \(4,\) integers, got float64"):
        ops.lstm(x, (h, c), w, u, lengths=[1.0, 2.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"lstm_cell\(\) takes x \(B, I\)"):
        ops.lstm_cell(x, None, w, u)


def test_it_is_one_node(rng) -> None:
    y, _, _ = _run(_inputs(rng))
    node = y.node
    assert node is not None
    assert [type(p) for p in node.parents] == [LSTM]


def test_a_checkpointed_layer_gives_the_same_gradients(rng, close) -> None:
    inputs = _inputs(rng)
    plain = grad(_run(inputs)[0].sum(), inputs)
    y = checkpoint(lambda *args: _run(list(args), reverse=False)[0], *inputs)
    for got, wanted in zip(grad(y.sum(), inputs), plain, strict=True):
        close(got, wanted.numpy())


@pytest.mark.parametrize("rows", [2, 8])
def test_products_cut_into_small_ones_are_the_same(rng, close, monkeypatch, rows) -> None:
    inputs = _inputs(rng, t=4, b=5, h=8)
    options = {"lengths": np.array([4, 1, 0, 3, 4])}
    whole = _run(inputs, **options)
    expected = grad(whole, inputs, _seeds(whole))
    monkeypatch.setattr(recurrent, "_rows_at_once", lambda u, height, columns: rows)
    cut = _run(inputs, **options)
    for got, wanted in zip(
        (*cut, *grad(cut, inputs, _seeds(cut))), (*whole, *expected), strict=True
    ):
        close(got, wanted.numpy())


def test_products_are_cut_only_where_that_is_faster(monkeypatch) -> None:
    u = np.zeros((2048, 512), np.float32)
    monkeypatch.setattr(recurrent, "_has_avx512", lambda: True)
    monkeypatch.setattr(backend, "blas_threads", lambda: 1)
    assert recurrent._rows_at_once(u, 2048, 32) == 32
    assert recurrent._rows_at_once(u, 2048, 16) == 64
    assert recurrent._rows_at_once(u, 2048, 500) == 0  # no block is small enough
    assert recurrent._rows_at_once(u[:2040], 2040, 32) == 0
    assert recurrent._rows_at_once(u[:512, :128], 512, 8) == 0  # small as it is
    assert recurrent._rows_at_once(u.astype(np.float64), 2048, 32) == 0
    monkeypatch.setattr(backend, "blas_threads", lambda: 2)
    assert recurrent._rows_at_once(u, 2048, 32) == 0
    monkeypatch.setattr(backend, "blas_threads", lambda: 1)
    monkeypatch.setattr(recurrent, "_has_avx512", lambda: False)
    assert recurrent._rows_at_once(u, 2048, 32) == 0
