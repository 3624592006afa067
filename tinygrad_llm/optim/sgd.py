"""Stochastic gradient descent, with momentum."""

from __future__ import annotations

from typing import Any

from tinygrad_llm.backend import Array, namespace
from tinygrad_llm.optim.groups import Params, non_negative
from tinygrad_llm.optim.optimizer import Optimizer


class SGD(Optimizer):
    """θ ← θ − lr · g

    with weight decay λ, momentum μ and dampening τ:

        g ← g + λ θ
        v ← μ v + (1 − τ) g                the first time v ← g
        θ ← θ − lr · v                     nesterov:  θ ← θ − lr · (g + μ v)

    Momentum is a heavy ball: v averages the past gradients with weights 1, μ, μ², …, so that what
    they agree on adds up, to 1/(1 − μ) gradients, and what they disagree on cancels. Nesterov's
    form adds the gradient to where the ball is going, not to where it has been.

    Sutskever et al. ("On the importance of initialization and momentum in deep learning", 2013)
    put the rate inside: v ← μ v − lr · g, θ ← θ + v. The two are the same while lr is constant; in
    this one, which is PyTorch's, a change of lr acts on the whole step at once.

    Args:
        params: see `Optimizer`.
        lr: the learning rate, ≥ 0.
        momentum: μ ≥ 0; 0 keeps no v at all.
        dampening: τ.
        weight_decay: λ ≥ 0: the gradient of (λ/2)‖θ‖² joins g.
        nesterov: needs momentum > 0 and dampening 0.
        maximize: go up: g ← −g before everything else.

    State per parameter: `momentum_buffer`, the v above.
    """

    state_keys = frozenset({"momentum_buffer"})

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "maximize": maximize,
            },
        )

    def _check(self, options: dict[str, Any]) -> None:
        for name in ("lr", "momentum", "dampening", "weight_decay"):
            options[name] = non_negative(name, options[name])
        if options["nesterov"] and not (options["momentum"] > 0 and options["dampening"] == 0):
            raise ValueError(
                "nesterov needs momentum > 0 and dampening 0, got "
                f"momentum={options['momentum']} and dampening={options['dampening']}"
            )

    def _update(
        self, weights: Array, gradient: Array, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        xp = namespace(weights)
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        mu, new = float(group["momentum"]), 1.0 - float(group["dampening"])
        nesterov, maximize = group["nesterov"], group["maximize"]
        moments = ()
        if mu:
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = xp.zeros_like(weights)
                new = 1.0
            moments = (state["momentum_buffer"],)

        for theta, g, a, b, *moment in self._blocks(weights, gradient, *moments):
            if maximize:
                g = xp.negative(g, out=a)
            if decay:
                xp.multiply(theta, decay, out=b)
                g = xp.add(g, b, out=a)  # g ← g + λ θ
            direction = g
            if mu:
                (v,) = moment
                xp.multiply(g, new, out=b)
                v *= mu
                v += b  # v ← μ v + (1 − τ) g
                direction = v
                if nesterov:
                    xp.multiply(v, mu, out=b)
                    direction = xp.add(g, b, out=b)  # g + μ v
            xp.multiply(direction, lr, out=b)
            theta -= b  # θ ← θ − lr · direction
