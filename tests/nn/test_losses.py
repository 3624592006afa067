"""Losses: each module is its formula, with the options it was made with."""

import importlib.util

import numpy as np
import pytest

import tinygrad_llm as tg
from tinygrad_llm import Tensor, dispatch, nn

rng = np.random.default_rng(1)
LOGITS = rng.standard_normal((4, 3)).astype(np.float32)
CLASSES = np.array([0, 2, -100, 1])
LOG_P = LOGITS - np.log(np.exp(LOGITS).sum(axis=1, keepdims=True))
A, B = rng.random((4, 3)).astype(np.float32), rng.random((4, 3)).astype(np.float32)


def value(loss, *inputs):
    return loss(*inputs).numpy()


def test_cross_entropy_with_weights_smoothing_and_ignored_targets():
    kept = CLASSES != -100
    picked = -LOG_P[kept, CLASSES[kept]]
    np.testing.assert_allclose(value(nn.CrossEntropyLoss(), LOGITS, CLASSES), picked.mean(), 1e-5)
    np.testing.assert_allclose(
        value(nn.CrossEntropyLoss(reduction="sum"), LOGITS, CLASSES), picked.sum(), 1e-5
    )
    none = value(nn.CrossEntropyLoss(reduction="none"), LOGITS, CLASSES)
    np.testing.assert_allclose(none[kept], picked, 1e-5)
    assert none[~kept] == 0
    weight = np.array([1.0, 2.0, 3.0])
    w = weight[CLASSES[kept]]
    np.testing.assert_allclose(
        value(nn.CrossEntropyLoss(weight), LOGITS, CLASSES), (w * picked).sum() / w.sum(), 1e-5
    )
    smoothed = 0.9 * picked - 0.1 * LOG_P[kept].mean(axis=1)
    np.testing.assert_allclose(
        value(nn.CrossEntropyLoss(label_smoothing=0.1), LOGITS, CLASSES), smoothed.mean(), 1e-5
    )
    kept0 = CLASSES != 0
    other = nn.CrossEntropyLoss(ignore_index=0)
    with pytest.raises(ValueError, match="a target is -100"):
        other(LOGITS, CLASSES)
    np.testing.assert_allclose(
        value(other, LOGITS[kept], CLASSES[kept]),
        -LOG_P[kept & kept0, CLASSES[kept & kept0]].mean(),
        1e-5,
    )


def test_weights_are_buffers_that_move_and_are_saved():
    loss = nn.CrossEntropyLoss(weight=[1.0, 2.0, 3.0])
    assert list(loss.state_dict()) == ["weight"]
    assert loss.to("float64").weight is not None
    assert loss.weight is not None
    assert loss.weight.dtype == np.float64
    assert list(loss.parameters()) == []
    assert nn.CrossEntropyLoss().state_dict() == {}


def test_binary_cross_entropy_in_both_forms():
    expected = -(B * np.log(A) + (1 - B) * np.log(1 - A))
    np.testing.assert_allclose(value(nn.BCELoss(), A, B), expected.mean(), 1e-5)
    weight = np.array([1.0, 2.0, 3.0], dtype=np.float32)
    np.testing.assert_allclose(
        value(nn.BCELoss(weight, reduction="sum"), A, B), (weight * expected).sum(), 1e-5
    )
    sigma = 1 / (1 + np.exp(-LOGITS))
    positive, negative = B * np.log(sigma), (1 - B) * np.log(1 - sigma)
    np.testing.assert_allclose(
        value(nn.BCEWithLogitsLoss(pos_weight=weight), LOGITS, B),
        -(weight * positive + negative).mean(),
        1e-5,
    )
    np.testing.assert_allclose(
        value(nn.BCEWithLogitsLoss(weight, "none"), LOGITS, B),
        -weight * (positive + negative),
        1e-4,
    )


def test_distances():
    d = np.abs(A - B)
    np.testing.assert_allclose(value(nn.MSELoss(), A, B), (d * d).mean(), 1e-5)
    np.testing.assert_allclose(value(nn.L1Loss("sum"), A, B), d.sum(), 1e-5)
    smooth = np.where(d < 0.3, d * d / 0.6, d - 0.15)
    np.testing.assert_allclose(
        value(nn.SmoothL1Loss("none", beta=0.3), A, B), smooth, rtol=1e-5, atol=1e-7
    )


def test_kl_divergence():
    p = np.exp(LOG_P)[::-1]
    expected = (p * (np.log(p) - LOG_P)).sum()
    np.testing.assert_allclose(value(nn.KLDivLoss(), LOG_P, p), expected / 4, 1e-5)
    np.testing.assert_allclose(value(nn.KLDivLoss("mean"), LOG_P, p), expected / 12, 1e-5)
    np.testing.assert_allclose(
        value(nn.KLDivLoss("sum", log_target=True), LOG_P, np.log(p)), expected, 1e-5
    )


def test_gradients_flow_to_the_prediction_only():
    x = Tensor(A, requires_grad=True)
    nn.MSELoss()(x, B).backward()
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), 2 * (A - B) / 12, rtol=1e-5)


def test_options_are_checked_when_the_loss_is_made():
    with pytest.raises(ValueError, match="'mean', 'sum' or 'none', got 'average'"):
        nn.MSELoss("average")
    with pytest.raises(ValueError, match="'batchmean', 'mean', 'sum' or 'none'"):
        nn.KLDivLoss("batch")
    with pytest.raises(ValueError, match="beta > 0"):
        nn.SmoothL1Loss(beta=0.0)
    assert repr(nn.SmoothL1Loss()) == "SmoothL1Loss(reduction='mean', beta=1.0)"


# --- of a language model --------------------------------------------------------------------------


def head_and_hidden():
    tg.manual_seed(0)
    head = nn.Linear(5, 3, bias=True)
    values = np.random.default_rng(0).normal(size=(2, 2, 5)).astype(np.float32)
    hidden = Tensor(values, requires_grad=True)
    return head, hidden, CLASSES.reshape(2, 2)


def test_the_loss_of_a_last_layer_multiplies_only_rows_that_count():
    head, hidden, targets = head_and_hidden()
    seen = []
    head.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    loss = nn.head_cross_entropy(head, hidden, targets, label_smoothing=0.1)
    assert seen == [(3, 3)]
    expected = nn.CrossEntropyLoss(label_smoothing=0.1)(head(hidden), targets)
    np.testing.assert_allclose(loss.item(), expected.item(), rtol=1e-6)
    loss.backward()
    assert hidden.grad is not None
    assert not hidden.grad.numpy()[1, 0].any()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_loss_of_a_last_layer_on_its_kernel():
    """As one op where the head is a plain Linear; with a hook, say, its logits are wanted."""
    device = "cuda" if dispatch._home() == "gpu" else "cpu"
    found = []
    for kernels in ("reference", "triton"):
        head, hidden, targets = head_and_hidden()
        head, hidden = head.to(device), hidden.detach().to(device).requires_grad_()
        with tg.use_kernels(kernels):
            loss = nn.head_cross_entropy(head, hidden, Tensor(targets).to(device))
        loss.backward()
        assert (type(loss.node).__name__ == "LinearCrossEntropy") == (kernels == "triton")
        assert hidden.grad is not None
        assert head.weight.grad is not None
        found.append([t.to("cpu").numpy() for t in (loss.detach(), hidden.grad, head.weight.grad)])
    for got, expected in zip(*found, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    head.register_forward_hook(lambda module, args, y: None)
    with tg.use_kernels("triton"):
        loss = nn.head_cross_entropy(head, hidden, Tensor(targets).to(device))
    assert type(loss.node).__name__ != "LinearCrossEntropy"
