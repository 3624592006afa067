"""Adam and AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from tinygrad_llm import dispatch
from tinygrad_llm.autograd import mark_written
from tinygrad_llm.backend import Array, namespace
from tinygrad_llm.optim.groups import Params, non_negative
from tinygrad_llm.optim.optimizer import Optimizer
from tinygrad_llm.tensor import Tensor


class Adam(Optimizer):
    """θ ← θ − lr · m̂ / (√v̂ + ε)

    where, at step t = 1, 2, …, with everything starting at 0 and weight decay λ:

        g ← g + λ θ
        m ← β₁ m + (1 − β₁) g              m̂ = m / (1 − β₁ᵗ)
        v ← β₂ v + (1 − β₂) g²             v̂ = v / (1 − β₂ᵗ)

    m is a running mean of the gradient and v of its square, so m̂/√v̂ is the gradient measured in
    its own typical size: each number of θ moves by about lr where its gradients agree, and by less
    where they are noise. m and v start at 0 and are therefore too small at first: by exactly the
    factors that the hats divide out.

    Kingma & Ba, "Adam: a method for stochastic optimization", ICLR 2015, algorithm 1. λ is the
    gradient of (λ/2)‖θ‖², which m̂/√v̂ then rescales like any gradient: `AdamW` is what one wants.

    Args:
        params: see `Optimizer`.
        lr: the learning rate, ≥ 0; about the largest change of a number per step.
        betas: (β₁, β₂), each in [0, 1).
        eps: ε ≥ 0, in the units of the gradient: where √v̂ is far below it, steps shrink.
        weight_decay: λ ≥ 0.

    State per parameter: `step` (t, an int), `exp_avg` (m), `exp_avg_sq` (v).
    """

    state_keys = frozenset({"step", "exp_avg", "exp_avg_sq"})
    decoupled: ClassVar[bool] = False  # does λ act on θ directly, past m and v?
    # (parameters, t, lr, betas, eps) -> what a CUDA graph reads instead of t, lr and ε, or None.
    numbers: Callable[..., Any] | None = None

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def _check(self, options: dict[str, Any]) -> None:
        for name in ("lr", "eps", "weight_decay"):
            options[name] = non_negative(name, options[name])
        if not isinstance(options["betas"], tuple | list) or len(options["betas"]) != 2:
            raise ValueError(f"betas must be two numbers (β₁, β₂), got {options['betas']!r}")
        beta1, beta2 = options["betas"]
        options["betas"] = (non_negative("β₁", beta1, below=1), non_negative("β₂", beta2, below=1))

    def _update(
        self, weights: Array, gradient: Array, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        xp = namespace(weights)
        self._begin(weights, state)
        lr, eps, decay = float(group["lr"]), float(group["eps"]), float(group["weight_decay"])
        beta1, beta2 = map(float, group["betas"])
        t = state["step"]
        # lr·m̂/(√v̂ + ε) = rate·m/(√v + ε̂): the hats as two numbers instead of two arrays (the
        # paper says so at the end of its section 2; with ε̂ it is algorithm 1 exactly).
        root = math.sqrt(1.0 - beta2**t)
        rate, eps_hat = lr * root / (1.0 - beta1**t), eps * root
        moments = (state["exp_avg"], state["exp_avg_sq"])

        for theta, g, a, b, m, v in self._blocks(weights, gradient, *moments):
            if decay and self.decoupled:
                theta *= 1.0 - lr * decay  # θ ← θ − lr λ θ
            elif decay:
                xp.multiply(theta, decay, out=a)
                g = xp.add(g, a, out=b)  # g ← g + λ θ
            xp.multiply(g, 1.0 - beta1, out=a)
            m *= beta1
            m += a  # m ← β₁ m + (1 − β₁) g
            xp.multiply(g, g, out=a)
            a *= 1.0 - beta2
            v *= beta2
            v += a  # v ← β₂ v + (1 − β₂) g²
            xp.sqrt(v, out=a)
            a += eps_hat
            xp.divide(m, a, out=a)
            a *= rate
            theta -= a  # θ ← θ − rate · m / (√v + ε̂)

    def _begin(self, weights: Array, state: dict[str, Any]) -> None:
        """t ← t + 1; before the first step, m and v are 0."""
        if "step" not in state:
            state["step"] = 0
            state["exp_avg"] = namespace(weights).zeros_like(weights)
            state["exp_avg_sq"] = namespace(weights).zeros_like(weights)
        state["step"] += 1

    # --- the same by a kernel ---------------------------------------------------------------------

    def step(self, factor: float = 1.0) -> None:
        self._step_all(float(factor))

    def step_clipped(
        self,
        max_norm: float = math.inf,
        factor: float = 1.0,
        loss: Array | None = None,
        wait: bool = False,
    ) -> Any:
        reached = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        kernels = {self._kernel(group) for group in self.param_groups}
        if not reached or None in kernels:
            return super().step_clipped(max_norm, factor, loss, wait)
        (kernel,) = kernels - {_NOTHING}
        norm = guard = kernel.gradient_norm([_gradient(p) for p in reached], scale=float(factor))
        if loss is not None:
            with np.errstate(invalid="ignore"):
                guard = norm + loss.reshape(1) * 0  # NaN where one of them is not finite
        if wait:
            norm = float(norm[0])
            if not math.isfinite(float(guard[0])):
                return norm
        self._step_all(float(factor), max_norm=float(max_norm), norm=guard)
        return norm

    def _step_all(self, factor: float, **clip: Any) -> None:
        """A launch for all parameters that share options and t; `_update` where no kernel runs."""
        launches: dict[tuple[Any, ...], list[tuple[Tensor, float]]] = {}
        for group in self.param_groups:
            kernel = self._kernel(group)
            if kernel is None:
                self._step_group(group["params"], group, factor)
                continue
            for p in group["params"]:
                if p.grad is not None:
                    state = self._state_of(p, p.grad.data)
                    self._begin(state.get("master", p.data), state)
                    kind = (kernel, state["step"], group["lr"], tuple(group["betas"]), group["eps"])
                    launches.setdefault(kind, []).append((p, float(group["weight_decay"])))
        for (kernel, t, lr, betas, eps), members in launches.items():
            parameters = [p for p, _ in members]
            states = [self.state[p] for p in parameters]
            kernel.adamw(
                [p.data for p in parameters],
                [_gradient(p) for p in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state.get("master") for state in states],
                step=t,
                lr=float(lr),
                betas=betas,
                eps=float(eps),
                weight_decay=[decay for _, decay in members],
                scale=factor,
                numbers=self.numbers and self.numbers(parameters, t, float(lr), betas, float(eps)),
                **clip,
            )
            for p in parameters:
                mark_written(p.data, by=type(self).__name__)

    def _kernel(self, group: dict[str, Any]) -> Any:
        """The kernel file that steps this group, None for `_update`."""
        reached = [p for p in group["params"] if p.grad is not None]
        if not reached:
            return _NOTHING
        if type(reached[0].data) is np.ndarray and not dispatch.forced:
            return None
        arrays = [p.data for p in reached] + [_gradient(p) for p in reached]
        options = {"decoupled": self.decoupled, "weight_decay": group["weight_decay"]}
        return dispatch.select("adamw", arrays, options).module


_NOTHING = object()  # the kernel of a group that no gradient has reached


def _gradient(p: Tensor) -> Array:
    assert p.grad is not None
    return p.grad.data


class AdamW(Adam):
    """θ ← θ − lr · λ θ − lr · m̂ / (√v̂ + ε)

    Adam with weight decay λ beside the gradient instead of inside it: m̂ and v̂ are Adam's, of the
    bare gradient. In Adam a number with large gradients has a large √v̂ and so hardly decays; here
    all shrink by the same share lr · λ per step.

    Loshchilov & Hutter, "Decoupled weight decay regularization", ICLR 2019, algorithm 2. As in
    PyTorch the decay is multiplied by lr, so a schedule of lr is the paper's schedule multiplier
    η and the paper's λ is lr · weight_decay here.

    Args:
        params: see `Optimizer`; `decay_groups(model, 0.1)` spares biases and gains of norms.
        lr: the learning rate, ≥ 0; about the largest change of a number per step.
        betas: (β₁, β₂), each in [0, 1); (0.9, 0.95) is usual for language models.
        eps: ε ≥ 0, in the units of the gradient.
        weight_decay: λ ≥ 0.

    State per parameter: `step` (t, an int), `exp_avg` (m), `exp_avg_sq` (v).
    """

    decoupled = True

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)
