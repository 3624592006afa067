"""A step of training in float32 in which every float64 result is an error."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import tinygrad_llm as tg
from tinygrad_llm import Tensor, optim
from tinygrad_llm.autograd import Function
from tinygrad_llm.models.gpt import GPT, GPTConfig


class Guarded(np.ndarray):
    """An array whose every result may be of any dtype but float64."""

    def __array_finalize__(self, source: Any) -> None:
        if self.dtype == np.float64:
            raise AssertionError("a float64 result in a float32 step")


def guard(x: Any) -> Any:
    return x.view(Guarded) if type(x) is np.ndarray else x


def unguard(x: Any) -> Any:
    return x.view(np.ndarray) if isinstance(x, Guarded) else x


def every_op(base: type[Function] = Function) -> list[type[Function]]:
    here = [base] if base.__module__.startswith("tinygrad_llm.") else []
    return here + [op for child in base.__subclasses__() for op in every_op(child)]


@pytest.fixture
def float64_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op computes, forward and backward, on guarded arrays."""

    def on_guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Function, *arrays: Any, **options: Any) -> Any:
            result = method(self, *map(guard, arrays), **options)
            return tuple(map(unguard, result)) if isinstance(result, tuple) else unguard(result)

        return call

    for op in every_op():
        for name in ("forward", "backward"):
            if name in vars(op):
                monkeypatch.setattr(op, name, on_guarded(vars(op)[name]))


@pytest.mark.usefixtures("float64_is_an_error")
def test_the_guard_notices() -> None:
    x = Tensor(np.ones(3, np.float32), requires_grad=True)
    x.tanh().sum().backward()
    with pytest.raises(AssertionError, match="float64"):
        x.astype(np.float64)
    with pytest.raises(AssertionError, match="float64"):
        Wider.apply(x)


class Wider(Function):
    """y = 2x, carelessly"""

    def forward(self, x: np.ndarray) -> np.ndarray:
        return guard(x) * np.float64(2.0)


@pytest.mark.usefixtures("float64_is_an_error")
def test_a_training_step_of_a_gpt() -> None:
    tg.manual_seed(0)
    sizes = GPTConfig(vocab_size=50, n_positions=16, n_embd=24, n_layer=2, n_head=3)
    model = GPT(replace(sizes, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1))
    optimizer = optim.AdamW(optim.decay_groups(model, 0.1), lr=np.float64(1e-3))
    x, y = tg.randint(0, 50, (4, 16)), tg.randint(0, 50, (4, 16))
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model.loss(x, y)
        loss.backward()
        optim.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        assert {p.dtype for p in model.parameters()} == {tg.float32}
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {tg.float32}
    assert losses[-1] < losses[0]
