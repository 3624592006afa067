"""nn.LSTM and nn.LSTMCell: PyTorch's arguments, names, outputs and gradients."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinygrad_llm import Tensor, manual_seed, nn, ops

GOLDEN = Path(__file__).parent / "golden" / "lstm.npz"
TIME, BATCH, INPUTS, HIDDEN = 6, 4, 3, 5
LENGTHS = [6, 2, 5, 1]
OPTIONS: dict[str, Any] = {"num_layers": 2, "bidirectional": True}


def _loss(y: Any, h: Any, c: Any) -> Any:
    """Something that every output has its own weight in."""
    return (y * y).sum() + (h * 2.0).sum() + (c * c * c).sum()


def _torch_results(lengths: list[int] | None, bias: bool) -> dict[str, np.ndarray]:
    """Inputs, weights, outputs and gradients of torch.nn.LSTM: also what the golden file holds."""
    torch = pytest.importorskip("torch")
    rnn = torch.nn.utils.rnn
    torch.manual_seed(0)
    layer = torch.nn.LSTM(INPUTS, HIDDEN, bias=bias, **OPTIONS)
    shapes = {"x": (TIME, BATCH, INPUTS), "h0": (4, BATCH, HIDDEN), "c0": (4, BATCH, HIDDEN)}
    leaves = {name: torch.randn(shape).requires_grad_() for name, shape in shapes.items()}
    x, state = leaves["x"], (leaves["h0"], leaves["c0"])
    if lengths is None:
        y, (h, c) = layer(x, state)
    else:
        packed = rnn.pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
        y, (h, c) = layer(packed, state)
        y, _ = rnn.pad_packed_sequence(y, total_length=TIME)
    _loss(y, h, c).backward()
    found = leaves | {"y": y, "h": h, "c": c} | {f"weights.{n}": p for n, p in _named(layer)}
    found |= {f"grad.{n}": leaf.grad for n, leaf in leaves.items()}
    found |= {f"grad.weights.{n}": p.grad for n, p in _named(layer)}
    return {name: value.detach().numpy() for name, value in found.items()}


def _named(layer: Any) -> list[tuple[str, Any]]:
    return list(layer.named_parameters())


def _assert_same(expected: dict[str, np.ndarray], lengths: list[int] | None, bias: bool) -> None:
    layer = nn.LSTM(INPUTS, HIDDEN, bias=bias, **OPTIONS)
    weights = {
        n.removeprefix("weights."): a for n, a in expected.items() if n.startswith("weights.")
    }
    assert list(layer.state_dict()) == list(weights)
    layer.load_state_dict(weights)
    leaves = {n: Tensor(expected[n].copy(), requires_grad=True) for n in ("x", "h0", "c0")}
    y, (h, c) = layer(leaves["x"], (leaves["h0"], leaves["c0"]), lengths=lengths)
    _loss(y, h, c).backward()
    got = {"y": y, "h": h, "c": c} | {f"grad.{n}": leaf.grad for n, leaf in leaves.items()}
    got |= {f"grad.weights.{n}": p.grad for n, p in _named(layer)}
    for name, value in got.items():
        assert value is not None, name
        scale = max(1.0, float(np.abs(expected[name]).max()))
        np.testing.assert_allclose(
            value.numpy(), expected[name], rtol=1e-5, atol=1e-5 * scale, err_msg=name
        )


# --- PyTorch --------------------------------------------------------------------------------------


def test_outputs_and_gradients_are_those_that_torch_gave() -> None:
    """2 layers, bidirectional, variable lengths; stored from `_torch_results` of torch 2.13."""
    with np.load(GOLDEN) as golden:
        _assert_same(dict(golden), LENGTHS, bias=True)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["all steps", "lengths"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_outputs_and_gradients_are_torchs(lengths: list[int] | None, bias: bool) -> None:
    _assert_same(_torch_results(lengths, bias), lengths, bias)


def test_torch_loads_our_state_dict() -> None:
    torch = pytest.importorskip("torch")
    for make in (
        lambda lib: lib.LSTM(INPUTS, HIDDEN, batch_first=True, **OPTIONS),
        lambda lib: lib.LSTM(INPUTS, HIDDEN, bias=False),
        lambda lib: lib.LSTMCell(INPUTS, HIDDEN),
    ):
        ours, theirs = make(nn), make(torch.nn)
        theirs.load_state_dict({n: torch.tensor(p.numpy()) for n, p in ours.state_dict().items()})
        x = np.random.default_rng(0).normal(size=(BATCH, 2, INPUTS)).astype(np.float32)
        x = x[:, 0] if isinstance(ours, nn.LSTMCell) else x
        got, wanted = ours(x)[0], theirs(torch.tensor(x))[0]
        got, wanted = (a[0] if isinstance(a, tuple) else a for a in (got, wanted))
        np.testing.assert_allclose(got.numpy(), wanted.detach().numpy(), rtol=1e-5, atol=1e-6)


# --- shapes and arguments -------------------------------------------------------------------------


def _x(*shape: int) -> Tensor:
    return Tensor(np.random.default_rng(1).normal(size=shape).astype(np.float32))


def test_batch_first_swaps_the_input_and_the_output_but_not_the_states() -> None:
    layer = nn.LSTM(INPUTS, HIDDEN, **OPTIONS)
    x = _x(TIME, BATCH, INPUTS)
    y, (h, c) = layer(x, lengths=LENGTHS)
    assert y.shape == (TIME, BATCH, 2 * HIDDEN)
    assert h.shape == c.shape == (4, BATCH, HIDDEN)
    layer.batch_first = True
    y_b, (h_b, _) = layer(x.swapaxes(0, 1), lengths=LENGTHS)
    np.testing.assert_allclose(y_b.numpy().swapaxes(0, 1), y.numpy(), atol=1e-6)
    np.testing.assert_allclose(h_b.numpy(), h.numpy(), atol=1e-6)


@pytest.mark.parametrize("batch_first", [False, True])
def test_one_sequence_needs_no_batch_axis(batch_first: bool) -> None:
    layer = nn.LSTM(INPUTS, HIDDEN, batch_first=batch_first, **OPTIONS)
    x, h0, c0 = _x(TIME, INPUTS), _x(4, HIDDEN), _x(4, HIDDEN)
    y, (h, c) = layer(x, (h0, c0))
    assert y.shape == (TIME, 2 * HIDDEN)
    assert h.shape == c.shape == (4, HIDDEN)
    batch = x.unsqueeze(0 if batch_first else 1)
    y_b, (h_b, _) = layer(batch, (h0.unsqueeze(1), c0.unsqueeze(1)))
    np.testing.assert_allclose(y_b.squeeze(0 if batch_first else 1).numpy(), y.numpy(), atol=1e-6)
    np.testing.assert_allclose(h_b.squeeze(1).numpy(), h.numpy(), atol=1e-6)


def test_the_output_ends_in_the_last_layers_state() -> None:
    layer = nn.LSTM(INPUTS, HIDDEN, **OPTIONS)
    y, (h, _) = layer(_x(TIME, BATCH, INPUTS))
    np.testing.assert_array_equal(y.numpy()[-1, :, :HIDDEN], h.numpy()[2])
    np.testing.assert_array_equal(y.numpy()[0, :, HIDDEN:], h.numpy()[3])


def test_padding_does_not_matter() -> None:
    layer = nn.LSTM(INPUTS, HIDDEN, **OPTIONS)
    x = _x(TIME, BATCH, INPUTS)
    y, (h, _) = layer(x, lengths=LENGTHS)
    for row, n in enumerate(LENGTHS):
        alone, (h_alone, _) = layer(x[:n, row])
        np.testing.assert_allclose(y.numpy()[:n, row], alone.numpy(), atol=1e-6)
        np.testing.assert_allclose(h.numpy()[:, row], h_alone.numpy(), atol=1e-6)


def test_dropout_acts_between_layers_in_training_only() -> None:
    layer = nn.LSTM(INPUTS, HIDDEN, num_layers=2, dropout=0.5)
    x = _x(TIME, BATCH, INPUTS)
    manual_seed(0)
    one, two = layer(x)[0].numpy(), layer(x)[0].numpy()
    assert (one != two).any()
    assert (one != 0).all(), "the last layer's output is not dropped"
    layer.eval()
    np.testing.assert_array_equal(layer(x)[0].numpy(), layer(x)[0].numpy())
    with pytest.warns(UserWarning, match="acts between layers, and num_layers=1"):
        nn.LSTM(INPUTS, HIDDEN, dropout=0.5)


def test_weights_begin_uniform_within_one_over_root_h() -> None:
    manual_seed(0)
    layer = nn.LSTM(40, 64, num_layers=2)
    names = [f"{kind}_l{n}" for n in (0, 1) for kind in ("weight_ih", "weight_hh")]
    for name in names:
        values = layer.state_dict()[name].numpy()
        assert np.abs(values).max() <= 1 / 8
        assert values.std() == pytest.approx(1 / 8 / np.sqrt(3), rel=0.05)
    before = layer.weight_ih_l0.numpy().copy()  # pyright: ignore[reportAttributeAccessIssue]
    layer.reset_parameters()
    assert (layer.state_dict()["weight_ih_l0"].numpy() != before).any()


def test_a_cell_in_a_loop_is_the_layer() -> None:
    cell, layer = nn.LSTMCell(INPUTS, HIDDEN), nn.LSTM(INPUTS, HIDDEN)
    layer.load_state_dict({f"{n}_l0": p for n, p in cell.state_dict().items()})
    x = _x(TIME, BATCH, INPUTS)
    state, outputs = None, []
    for t in range(TIME):
        state = cell(x[t], state)
        outputs.append(state[0])
    y, (h, c) = layer(x)
    np.testing.assert_allclose(ops.stack(outputs).numpy(), y.numpy(), atol=1e-6)
    assert state is not None
    np.testing.assert_allclose(state[1].numpy(), c[0].numpy(), atol=1e-6)
    h_one, c_one = cell(x[0, 0], (h[0, 0], c[0, 0]))
    assert h_one.shape == c_one.shape == (HIDDEN,)
    h_all, _ = cell(x[0], (h[0], c[0]))
    np.testing.assert_allclose(h_one.numpy(), h_all.numpy()[0], atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="proj_size must be 0, got 2"):
        nn.LSTM(INPUTS, HIDDEN, proj_size=2)
    with pytest.raises(ValueError, match="at least 1, got 3, 0 and 1"):
        nn.LSTM(3, 0)
    with pytest.raises(ValueError, match="dropout must be at least 0"):
        nn.LSTM(INPUTS, HIDDEN, num_layers=2, dropout=1.0)
    layer = nn.LSTM(INPUTS, HIDDEN, batch_first=True)
    with pytest.raises(ValueError, match=r"x \(B, T, I\) with I = 3, or \(T, I\), got \(4, 6, 2\)"):
        layer(_x(4, 6, 2))
    with pytest.raises(ValueError, match=r"h and c of shape \(1, 4, 5\), got \(4, 5\)"):
        layer(_x(4, 6, 3), (_x(4, 5), _x(4, 5)))
    with pytest.raises(ValueError, match=r"lengths must be \(4,\) integers"):
        layer(_x(4, 6, 3), lengths=[1, 2])
    with pytest.raises(ValueError, match=r"LSTMCell needs x \(B, 3\)"):
        nn.LSTMCell(INPUTS, HIDDEN)(_x(2, 4))
    with pytest.raises(ValueError, match="at least 1, got 0 and 5"):
        nn.LSTMCell(0, 5)


def test_it_says_what_it_is() -> None:
    layer = nn.LSTM(8, 16, num_layers=2, batch_first=True, dropout=0.1)
    assert repr(layer) == "LSTM(8, 16, num_layers=2, batch_first=True, dropout=0.1)"
    assert repr(nn.LSTMCell(8, 16, bias=False)) == "LSTMCell(8, 16, bias=False)"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.flatten_parameters()
