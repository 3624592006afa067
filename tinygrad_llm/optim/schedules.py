"""Learning-rate schedules: pure functions of the step, and the object that applies one.

A schedule is anything that maps a step 0, 1, 2, … to a factor. The learning rate of a group at that
step is factor · (the group's own lr), so groups keep their proportions. The ones here are frozen
dataclasses: they print as what they are, compare, and are built into one another:

```python
schedule = Warmup(100, Cosine(900, end=0.1))
schedule(0), schedule(100), schedule(1000)        # 0.0099…, 1.0, 0.1
scheduler = LRScheduler(optimizer, schedule)      # then scheduler.step() after optimizer.step()
```

`end` is always a fraction: a cosine from 6e-4 down to a smallest rate of 6e-5 has end=0.1. Past its
last step a schedule stays where it ended.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from tinygrad_llm.optim.optimizer import Optimizer

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Constant:
    """factor(t) = value"""

    value: float = 1.0

    def __post_init__(self) -> None:
        _require_fraction("value", self.value)

    def __call__(self, step: int) -> float:
        return float(self.value)


@dataclass(frozen=True)
class Linear:
    """factor(t) = start + (end − start) · t/T        T = steps; end from then on"""

    steps: int
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        _require_steps("steps", self.steps)
        _require_fraction("start", self.start)
        _require_fraction("end", self.end)

    def __call__(self, step: int) -> float:
        return _line(self.start, self.end, _progress(step, self.steps))


@dataclass(frozen=True)
class Cosine:
    """factor(t) = end + (1 − end) · ½(1 + cos(π t/T))        T = steps; end from then on

    Half a period of a cosine: slow at both ends. Loshchilov & Hutter, "SGDR", ICLR 2017, eq. 5,
    without restarts.
    """

    steps: int
    end: float = 0.0

    def __post_init__(self) -> None:
        _require_steps("steps", self.steps)
        _require_fraction("end", self.end)

    def __call__(self, step: int) -> float:
        return _half_cosine(1.0, self.end, _progress(step, self.steps))


@dataclass(frozen=True)
class Warmup:
    """factor(t) = then(0) · (t + 1)/(W + 1) for t < W, afterwards then(t − W)        W = steps

    The first updates are small, while Adam's moments are estimates from few gradients and the
    loss is steep. `then` has a clock of its own: W + T updates in all for Warmup(W, Cosine(T)).
    The first step is not wasted on a rate of 0, and the peak is reached at t = W.
    """

    steps: int
    then: Schedule = field(default_factory=Constant)

    def __post_init__(self) -> None:
        _require_steps("steps", self.steps, least=0)

    def __call__(self, step: int) -> float:
        if step < self.steps:
            return self.then(0) * (max(step, 0) + 1) / (self.steps + 1)
        return self.then(step - self.steps)


@dataclass(frozen=True)
class WSD:
    """Warm-up, stable, decay: up as in Warmup, 1 for `stable` steps, then down to `end`.

        factor = end + (1 − end) · fall(x)        x = (t − warmup − stable)/decay
        fall(x) = 1 − x | 1 − √x | ½(1 + cos πx)  for shape "linear", "sqrt", "cosine"

    Unlike a cosine it needs no end fixed beforehand: train on at the stable rate, and branch off
    a decay from any checkpoint. Hu et al., "MiniCPM", 2024; the square root is from Hägele et al.,
    "Scaling laws and compute-optimal training beyond fixed training durations", 2024.
    """

    warmup: int
    stable: int
    decay: int
    end: float = 0.0
    shape: Literal["linear", "sqrt", "cosine"] = "linear"

    def __post_init__(self) -> None:
        _require_steps("warmup", self.warmup, least=0)
        _require_steps("stable", self.stable, least=0)
        _require_steps("decay", self.decay)
        _require_fraction("end", self.end)
        if self.shape not in ("linear", "sqrt", "cosine"):
            raise ValueError(f"shape must be 'linear', 'sqrt' or 'cosine', got {self.shape!r}")

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (max(step, 0) + 1) / (self.warmup + 1)
        x = _progress(step - self.warmup - self.stable, self.decay)
        if self.shape == "cosine":
            return _half_cosine(1.0, self.end, x)
        return _line(1.0, self.end, x if self.shape == "linear" else math.sqrt(x))


@dataclass(frozen=True)
class OneCycle:
    """Up from 1/div_factor to 1 in a fraction pct_start of the steps, then down to almost nothing.

        1/div_factor ⟶ 1 ⟶ 1/(div_factor · final_div_factor)      along half cosines, or lines

    The group's lr is the peak (PyTorch's max_lr). The numbers are those of PyTorch's OneCycleLR:
    the peak is at t = pct_start · steps − 1, the end at t = steps − 1. Momentum is not cycled.
    Smith & Topin, "Super-convergence", 2018.
    """

    steps: int
    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    anneal: Literal["cos", "linear"] = "cos"

    def __post_init__(self) -> None:
        _require_steps("steps", self.steps)
        if not 0 <= self.pct_start <= 1:
            raise ValueError(f"pct_start must be from 0 to 1, got {self.pct_start}")
        if not (self.div_factor >= 1 and self.final_div_factor >= 1):
            raise ValueError(
                "div_factor and final_div_factor must be at least 1, got "
                f"{self.div_factor} and {self.final_div_factor}"
            )
        if self.anneal not in ("cos", "linear"):
            raise ValueError(f"anneal must be 'cos' or 'linear', got {self.anneal!r}")

    def __call__(self, step: int) -> float:
        first = 1.0 / self.div_factor
        peak, last = max(self.pct_start * self.steps - 1, 0.0), self.steps - 1
        between = _half_cosine if self.anneal == "cos" else _line
        if step <= peak:
            return between(first, 1.0, _progress(step, peak))
        return between(1.0, first / self.final_div_factor, _progress(step - peak, last - peak))


@dataclass(frozen=True)
class StepDecay:
    """factor(t) = γ^⌊t / step_size⌋        PyTorch's StepLR"""

    step_size: int
    gamma: float = 0.1

    def __post_init__(self) -> None:
        _require_steps("step_size", self.step_size)
        _require_fraction("gamma", self.gamma)

    def __call__(self, step: int) -> float:
        return float(self.gamma) ** (max(step, 0) // self.step_size)


def _progress(step: float, steps: float) -> float:
    """How far through: 0 before the first step, 1 from the last on."""
    return min(max(step / steps, 0.0), 1.0) if steps > 0 else 1.0


def _line(start: float, end: float, x: float) -> float:
    return start + (end - start) * x


def _half_cosine(start: float, end: float, x: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * x))


def _require_steps(name: str, value: Any, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _require_fraction(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is a factor of the learning rate, at least 0, got {value!r}")


class LRScheduler:
    """lr ← schedule(t) · initial_lr, in every group of an optimiser.

    ```python
    scheduler = LRScheduler(optimizer, Warmup(100, Cosine(900)))   # sets the rate of update 0
    for batch in batches:
        ...
        optimizer.step()
        scheduler.step()                                           # sets that of the next one
    ```

    A group's lr when the scheduler first meets it becomes its `initial_lr`, the base that factors
    multiply; groups may be added later. The schedule is not saved: it is code or configuration.
    To resume, build both again, then load both states in either order.

    Args:
        optimizer: whose groups to set.
        schedule: any function from a step to a factor.
    """

    def __init__(self, optimizer: Optimizer, schedule: Schedule) -> None:
        if not callable(schedule):
            raise TypeError(
                f"a schedule is a function from a step to a factor, got {schedule!r}: for example "
                "Cosine(1000)"
            )
        self.optimizer = optimizer
        self.schedule = schedule
        self.last_step = 0
        self._apply()

    def step(self) -> None:
        """Set the rates of the next update: after `optimizer.step()`."""
        self.last_step += 1
        self._apply()

    def get_last_lr(self) -> list[float]:
        """The rates in force, one per group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """{"last_step": 7, "base_lrs": [0.001]}"""
        bases = [group["initial_lr"] for group in self.optimizer.param_groups]
        return {"last_step": self.last_step, "base_lrs": bases}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict()`: the rates are set at once.

        Raises:
            ValueError: made for another number of groups.
        """
        bases, groups = state_dict["base_lrs"], self.optimizer.param_groups
        if len(bases) != len(groups):
            raise ValueError(
                f"this scheduler state is for {len(bases)} parameter groups, expected {len(groups)}"
            )
        for group, base in zip(groups, bases, strict=True):
            group["initial_lr"] = float(base)
        self.last_step = int(state_dict["last_step"])
        self._apply()

    def _apply(self) -> None:
        factor = float(self.schedule(self.last_step))
        for group in self.optimizer.param_groups:
            group["lr"] = factor * float(group.setdefault("initial_lr", group["lr"]))

    def __repr__(self) -> str:
        return f"LRScheduler({self.schedule!r}, last_step={self.last_step})"
