"""Adam, AdamW and clipping by kernels/optimizer.py, as `dispatch` chooses it, against `_update`."""

from __future__ import annotations

import copy
import importlib.util
import math
from typing import Any

import numpy as np
import pytest

import tinygrad_llm as tg
from tinygrad_llm import Tensor, backend, dispatch
from tinygrad_llm.optim import SGD, Adam, AdamW, Optimizer, clip_grad_norm_

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

SHAPES = ((7, 5), (5,), (), (48,), (0, 2))
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
HALVES = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


@pytest.fixture
def device() -> str:
    return "cuda" if dispatch._home() == "gpu" else "cpu"


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every call of `adamw`, which runs."""
    from tinygrad_llm.kernels import optimizer

    seen: list[dict[str, Any]] = []
    launched = optimizer.adamw

    def adamw(parameters: Any, *arrays: Any, **options: Any) -> None:
        seen.append({"count": len(parameters), **options})
        launched(parameters, *arrays, **options)

    monkeypatch.setattr(optimizer, "adamw", adamw)
    return seen


def leaves(dtype: Any, device: str, shapes: Any = SHAPES) -> list[Tensor]:
    rng = np.random.default_rng(0)
    values = [np.asarray(rng.normal(size=shape)).astype(np.float32) for shape in shapes]
    return [Tensor(v).to(dtype).to(device).detach().requires_grad_() for v in values]


def give_gradients(parameters: list[Tensor], seed: int, scale: float = 1.0) -> None:
    rng = np.random.default_rng(seed)
    for p in parameters:
        values = np.asarray(rng.normal(size=p.shape) * scale).astype(np.float32)
        p.grad = Tensor(values).to(p.dtype).to(p.device)


def host(x: Any) -> np.ndarray:
    return backend.to_device(x, "cpu").astype(np.float64)


def same(a: Optimizer, b: Optimizer, rtol: float = 2e-6) -> None:
    pairs = zip(a._parameters(), b._parameters(), strict=True)
    for p, q in pairs:
        np.testing.assert_array_equal(p.dtype, q.dtype)
        ours, theirs = a.state.get(p, {}), b.state.get(q, {})
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            if key == "step":
                assert value == theirs[key]
            else:
                assert value.dtype == np.float32
                np.testing.assert_allclose(host(value), host(theirs[key]), rtol=rtol, atol=1e-7)
        half = p.dtype.itemsize < 4  # rounded from masters that differ in their last digit
        np.testing.assert_allclose(
            host(p.data), host(q.data), rtol=0.01 if half else rtol, atol=1e-7
        )


def two_groups(parameters: list[Tensor]) -> list[dict[str, Any]]:
    return [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:]}]


@DTYPES
def test_steps_are_those_of_the_reference(dtype: str, device: str, launches: Any) -> None:
    ours, theirs = leaves(dtype, device), leaves(dtype, device)
    optimizers = [
        AdamW(two_groups(p), lr=0.1, betas=(0.9, 0.95), weight_decay=0.0) for p in (ours, theirs)
    ]
    for t in range(4):
        for kernels, parameters, optimizer in zip(
            ("triton", "reference"), (ours, theirs), optimizers, strict=True
        ):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (t + 1)
            give_gradients(parameters, t)
            with tg.use_kernels(kernels):
                optimizer.step()
    same(optimizers[0], optimizers[1])
    # One launch a step: groups that differ in nothing but the decay share it.
    assert [call["count"] for call in launches] == [len(SHAPES)] * 4
    assert launches[0]["weight_decay"] == [0.1, 0.0, 0.0, 0.0, 0.0]


def test_another_rate_or_another_step_is_another_launch(device: str, launches: Any) -> None:
    a, b, c = leaves("float32", device, [(3,)] * 3)
    optimizer = AdamW([{"params": [a, b]}, {"params": [c], "lr": 0.5}], lr=0.1)
    with tg.use_kernels("triton"):
        give_gradients([a], 0)
        optimizer.step()
        give_gradients([a, b, c], 1)
        optimizer.step()
    assert [(call["count"], call["step"], call["lr"]) for call in launches] == [
        (1, 1, 0.1),
        (1, 2, 0.1),
        (1, 1, 0.1),
        (1, 1, 0.5),
    ]
    assert [optimizer.state[p]["step"] for p in (a, b, c)] == [2, 1, 1]


@DTYPES
def test_a_state_goes_from_one_to_the_other(dtype: str, device: str) -> None:
    """Its layout is the same, so a run can be resumed on either; on the same one bit for bit."""
    parameters = leaves(dtype, device)
    optimizer = AdamW(parameters, lr=0.1)
    with tg.use_kernels("triton"):
        for t in range(2):
            give_gradients(parameters, t)
            optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        weights = [p.data.copy() for p in parameters]
        give_gradients(parameters, 2)
        optimizer.step()
    for kernels, bits in (("triton", True), ("reference", False)):
        again = [Tensor(w.copy(), requires_grad=True) for w in weights]
        resumed = AdamW(again, lr=0.1)
        resumed.load_state_dict(saved)
        with tg.use_kernels(kernels):
            give_gradients(again, 2)
            resumed.step()
        same(resumed, optimizer)
        if bits:
            for p, q in zip(again, parameters, strict=True):
                np.testing.assert_array_equal(host(p.data), host(q.data))


def test_a_backward_that_needs_overwritten_weights_names_the_optimizer(device: str) -> None:
    (p,) = leaves("float32", device, [(3,)])
    loss = (p * p).sum()
    give_gradients([p], 0)
    with tg.use_kernels("triton"):
        AdamW([p]).step()
    with pytest.raises(RuntimeError, match="AdamW"):
        loss.backward()


def test_a_gradient_of_another_shape_is_refused(device: str) -> None:
    (p,) = leaves("float32", device, [(3, 4)])
    p.grad = Tensor(np.ones(4, np.float32)).to(device)
    with tg.use_kernels("triton"), pytest.raises(ValueError, match=r"gradient of shape \(4,\)"):
        AdamW([p]).step()


def test_what_the_kernel_does_not_do_runs_on_the_reference(device: str, launches: Any) -> None:
    """float64, and Adam's decay inside of the gradient."""
    for make, dtype in (
        (lambda p: Adam(p, lr=0.1, weight_decay=0.1), "float32"),
        (lambda p: AdamW(p, lr=0.1), "float64"),
        (lambda p: SGD(p, lr=0.1), "float32"),
    ):
        parameters, wanted = leaves(dtype, device), leaves(dtype, device)
        for kernels, these in (("triton", parameters), ("reference", wanted)):
            give_gradients(these, 0)
            with tg.use_kernels(kernels):
                make(these).step()
        for p, q in zip(parameters, wanted, strict=True):
            np.testing.assert_array_equal(host(p.data), host(q.data))
    assert launches == []
    parameters = leaves("float32", device)
    give_gradients(parameters, 0)
    with tg.use_kernels("triton"):
        Adam(parameters, lr=0.1).step()
    assert len(launches) == 1


def test_the_choice_can_be_printed() -> None:
    p = np.ones(3, np.float32)
    with tg.use_kernels("triton"):
        assert "adamw of" in dispatch.explain("adamw", p, p, decoupled=True, weight_decay=0.1)
        said = dispatch.explain("adamw", p, p, decoupled=False, weight_decay=0.1)
    assert "the kernel needs: weight decay beside the gradient, or none" in said
    assert "kernels/optimizer.py" in dispatch.table()


# --- clipping -------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_by_a_kernel(dtype: str, max_norm: float, device: str) -> None:
    ours, theirs = leaves(dtype, device), leaves(dtype, device)
    for parameters in (ours, theirs):
        give_gradients(parameters, 0)
    with tg.use_kernels("triton"):
        total = clip_grad_norm_(ours, max_norm)
    assert type(total) is float
    assert total == pytest.approx(clip_grad_norm_(theirs, max_norm), rel=1e-6)
    for p, q in zip(ours, theirs, strict=True):
        assert p.grad is not None
        assert q.grad is not None
        np.testing.assert_allclose(host(p.grad.data), host(q.grad.data), rtol=0.01)


@DTYPES
@pytest.mark.parametrize("kernels", ["triton", "reference"])
@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("max_norm", [0.5, math.inf])
def test_a_clipped_step_is_clipping_and_a_step(
    dtype: str, kernels: str, wait: bool, max_norm: float, device: str
) -> None:
    """Also of gradients that were scaled up; they are only read."""
    ours, theirs = leaves(dtype, device), leaves("float32", device)
    for p, q in zip(ours, theirs, strict=True):
        q.data[...] = p.data.astype(np.float32)
    optimizers = [AdamW(two_groups(p), lr=0.1) for p in (ours, theirs)]
    for t in range(3):
        give_gradients(ours, t, 256.0)
        for p, q in zip(ours, theirs, strict=True):
            assert p.grad is not None
            q.grad = Tensor(p.grad.data.astype(np.float32) / np.float32(256))
        before = [p.grad.data.copy() for p in ours if p.grad is not None]
        with tg.use_kernels(kernels):
            norm = optimizers[0].step_clipped(max_norm, 1 / 256, wait=wait)
        with tg.use_kernels("reference"):
            total = clip_grad_norm_(theirs, max_norm)
            optimizers[1].step()
        assert (type(norm) is float) == (wait or kernels == "reference")
        assert float(norm if type(norm) is float else norm[0]) == pytest.approx(total, rel=1e-6)
        for p, g in zip(ours, before, strict=True):
            assert p.grad is not None
            np.testing.assert_array_equal(host(p.grad.data), host(g))
    for p, q in zip(ours, theirs, strict=True):
        weights = optimizers[0].state[p].get("master", p.data)
        np.testing.assert_allclose(host(weights), host(q.data), rtol=1e-5, atol=1e-6)


@DTYPES
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kernels", ["triton", "reference"])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_norm_that_is_not_finite_leaves_the_weights(
    dtype: str, bad: float, kernels: str, where: str, device: str
) -> None:
    parameters = leaves(dtype, device)
    optimizer = AdamW(parameters, lr=0.1)
    with tg.use_kernels(kernels):
        give_gradients(parameters, 0)
        optimizer.step()
        kept = copy.deepcopy(optimizer.state_dict()["state"])
        weights = [p.data.copy() for p in parameters]
        give_gradients(parameters, 1)
        loss = Tensor(np.float32(1.0)).to(device).data
        if where == "gradient":
            assert parameters[0].grad is not None
            parameters[0].grad.data[2, 3] = bad
        else:
            loss[...] = bad
        for wait in (False, True):
            norm = optimizer.step_clipped(1.0, loss=loss, wait=wait)
            found = float(norm if type(norm) is float else norm[0])
            assert math.isfinite(found) == (where == "loss")
            for i, p in enumerate(parameters):
                np.testing.assert_array_equal(host(p.data), host(weights[i]))
                for key in ("exp_avg", "exp_avg_sq"):
                    np.testing.assert_array_equal(host(optimizer.state[p][key]), host(kept[i][key]))
            if wait or kernels == "reference":  # no count goes on
                assert optimizer.state[parameters[0]]["step"] == 1 + (kernels == "triton")


@HALVES
def test_a_factor_keeps_gradients_that_half_would_lose(dtype: str, device: str) -> None:
    (p,) = leaves(dtype, device, [(4,)])
    p.grad = Tensor(np.full(4, 2.0**-10, np.float32)).to(dtype).to(device)
    optimizer = SGD([p], lr=1.0)
    p.data[...] = 0
    optimizer.step(2.0**-16)  # 2⁻²⁶ is 0 in float16
    np.testing.assert_array_equal(host(optimizer.state[p]["master"]), -(2.0**-26))
    with tg.use_kernels("triton"):
        adam = AdamW([p], lr=1.0)
        adam.step(2.0**-16)
    np.testing.assert_allclose(host(adam.state[p]["exp_avg"]), 0.1 * 2.0**-26, rtol=1e-6)


def test_nothing_to_step(device: str) -> None:
    parameters = leaves("float32", device)
    optimizer = AdamW(parameters)
    with tg.use_kernels("triton"):
        optimizer.step()
        assert optimizer.step_clipped(1.0) == 0.0
    assert optimizer.state == {}
