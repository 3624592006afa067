"""Training in half precision: weights and activations of 16 bits, and what must be wider than that.

    θ₁₆ = round(θ₃₂)        L, g from θ₁₆        θ₃₂ ← θ₃₂ − update(g)

An update is often smaller than the distance from a weight in bfloat16 (8 bits of mantissa) or
float16 (11) to the next, so the weights are kept in float32, too: the masters, which the optimiser
steps and of which the network computes with a rounded copy. Sums, norms, softmax and losses are
added up in float32 inside of their ops.

float16 has few exponents: gradients below 6·10⁻⁸ are 0 in it. `LossScaler` keeps them out of there.
bfloat16 has those of float32 and needs no scale.

What is validated and sampled on the way are the half weights, the network that is trained. What is
saved are the masters, in float32: a checkpoint opens everywhere, and nothing is lost to a resume.

Micikevicius et al., "Mixed precision training", ICLR 2018.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tinygrad_llm.backend import as_dtype, float32
from tinygrad_llm.optim import Optimizer
from tinygrad_llm.storage import Damaged
from tinygrad_llm.tensor import Tensor


class HalfWeights:
    """The parameters in half precision from here on, and their masters in float32.

    The masters are exactly what the parameters were. The optimiser finds those of its parameters in
    its state and steps them; the others keep their values, to be saved unrounded.

    Args:
        parameters: of the model, in float32.
        optimizer: whose `state[p]["master"]` the masters become.
        dtype: 'bfloat16' or 'float16'.
    """

    def __init__(self, parameters: Iterable[Tensor], optimizer: Optimizer, dtype: str) -> None:
        self.parameters, self.optimizer = list(parameters), optimizer
        self.masters = [p.data.astype(float32) for p in self.parameters]
        for p in self.parameters:
            p.data = p.data.astype(as_dtype(dtype))
        self.give_masters()

    def give_masters(self) -> None:
        """Let the optimiser step the masters; anew, after a state without them was loaded."""
        stepped = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for p, master in zip(self.parameters, self.masters, strict=True):
            if id(p) in stepped:
                self.optimizer.state.setdefault(p, {})["master"] = master

    def widen_gradients(self) -> None:
        """The gradients so far in float32, which those of further parts of a batch are added to."""
        for p in self.parameters:
            if p.grad is not None and p.grad.dtype != float32:
                p.grad = Tensor(p.grad.data.astype(float32))

    @contextmanager
    def masters_in_place(self) -> Iterator[None]:
        """Within: the masters in the place of the weights, to be saved or averaged."""
        halves = [p.data for p in self.parameters]
        for p, master in zip(self.parameters, self.masters, strict=True):
            p.data = master
        try:
            yield
        finally:
            for p, half in zip(self.parameters, halves, strict=True):
                p.data = half


class LossScaler:
    """L′ = s · L,  g = g′ / s;   s ← 2 s after 2000 good steps in a row,  s ← s / 2 after a bad one

    The gradient g′ of the scaled loss is s times as large, so that little of it is below what
    float16 holds; what is too large is infinite, and the step is bad: it is skipped, and the next
    one has half the scale. s begins at 2¹⁶ and is always a power of two, so that scaling rounds
    nothing. These are the numbers of PyTorch's GradScaler.

    `update(good)` after each step; one that was skipped counts like any other, towards the steps of
    the run and its schedule. Where s falls below 2⁻¹⁴ the gradients are infinite whatever
    the scale is, and `exhausted` is true: that is no matter of precision any more.
    """

    FIRST: float = 2.0**16
    LEAST: float = 2.0**-14
    GROWTH_INTERVAL: int = 2000

    def __init__(self) -> None:
        self.scale = self.FIRST
        self.good_steps = 0  # since the last bad one, or the last growth
        self.skipped = 0  # all bad ones

    @property
    def exhausted(self) -> bool:
        """Whether halving has not helped, down to the smallest scale that is tried."""
        return self.scale < self.LEAST

    def update(self, good: bool) -> None:
        """Take in whether the last step's gradient was finite."""
        if not good:
            self.scale, self.good_steps, self.skipped = self.scale / 2, 0, self.skipped + 1
            return
        self.good_steps += 1
        if self.good_steps == self.GROWTH_INTERVAL and self.scale < _LARGEST:
            self.scale, self.good_steps = self.scale * 2, 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {"scale": self.scale, "good_steps": self.good_steps, "skipped": self.skipped}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`; Damaged for what no scaler has."""
        scale, good_steps, skipped = state["scale"], state["good_steps"], state["skipped"]
        whole = [n for n in (good_steps, skipped) if type(n) is int and n >= 0]
        power = type(scale) is float and 0 < scale <= _LARGEST and math.frexp(scale)[0] == 0.5
        if not power or len(whole) < 2:
            raise Damaged(f"no loss scaler can be in the state {state}")
        self.scale, self.good_steps, self.skipped = scale, good_steps, skipped


_LARGEST = 2.0**126  # the largest whose product with a loss is still float32


def slow_on_cpu(dtype: str, device: str) -> str:
    """What to say before training in `dtype` on `device`; nothing where all is well."""
    if dtype == "float32" or device != "cpu":
        return ""
    return (
        f"{dtype} on the CPU is slower than float32: NumPy has no matrix products in half "
        "precision, so it converts to float32 and back for each"
    )
