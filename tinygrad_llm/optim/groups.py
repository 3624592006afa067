"""Parameter groups: how parameters are given, which of them decay, which learn at another rate."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol

import numpy as np

from tinygrad_llm.tensor import Tensor

# Tensors, (name, Tensor) pairs, or dicts {"params": …, "lr": …} with options of their own.
Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class HasNamedParameters(Protocol):
    """A model: `nn.Module`, or whatever names its parameters."""

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]: ...


def decay_groups(
    model: HasNamedParameters | Iterable[tuple[str, Tensor]],
    weight_decay: float,
    no_decay: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Two groups for an optimiser: matrices decay, vectors (biases, gains of norms) do not.

    ```python
    AdamW(decay_groups(model, weight_decay=0.1), lr=3e-4)
    ```

    Decay keeps the weights of a linear map from growing without need. A bias or a gain of a norm
    is one number per channel, which sets an offset or a scale: pulling it to zero fights what it
    is for. So a parameter decays when it has two dimensions or more, as in GPT-2's and nanoGPT's
    training.

    Embeddings are matrices and therefore decay, token and position alike; where the token
    embedding is tied to the output layer it is that layer's weight matrix too. `no_decay` makes
    exceptions: `no_decay=("wte", "wpe")` spares GPT-2's embeddings.

    Args:
        model: a Module, or (name, parameter) pairs. Those that do not require a gradient are left
            out, so a partly frozen model can be passed as it is.
        weight_decay: for the first group; the second has 0.
        no_decay: a parameter whose name contains one of these strings does not decay either.

    Returns:
        Up to two dicts with "params" as (name, parameter) pairs, "weight_decay" and "name"
        ("decay", "no_decay"); a group that would be empty is left out.

    Raises:
        ValueError: an entry of `no_decay` occurs in no parameter's name; nothing requires a
            gradient.
    """
    if isinstance(no_decay, str):
        no_decay = (no_decay,)
    pairs = model if isinstance(model, Iterable) else model.named_parameters()
    trained = [(name, p) for name, p in pairs if p.requires_grad]
    if not trained:
        raise ValueError("decay_groups() got no parameter that requires a gradient")
    for part in no_decay:
        if not any(part in name for name, _ in trained):
            raise ValueError(
                f"no_decay: '{part}' is in the name of no parameter; they are "
                + ", ".join(name for name, _ in trained)
            )

    def decays(name: str, p: Tensor) -> bool:
        return p.ndim >= 2 and not any(part in name for part in no_decay)

    decayed = [(name, p) for name, p in trained if decays(name, p)]
    spared = [(name, p) for name, p in trained if not decays(name, p)]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay, "name": "decay"},
        {"params": spared, "weight_decay": 0.0, "name": "no_decay"},
    ]
    return [group for group in groups if group["params"]]


def lr_groups(
    groups: Iterable[dict[str, Any]], lr: float, factors: Mapping[str, float]
) -> list[dict[str, Any]]:
    """lr(p) = lr · Π f  over the patterns that match the name of p

    ```python
    groups = decay_groups(model, weight_decay=0.1)
    AdamW(lr_groups(groups, 3e-4, {"wte": 0.1, "h.0": 0.5}), lr=3e-4)
    ```

    A pattern is whole parts of a name, with the shell's `*`, `?` and `[…]`: of
    `transformer.h.0.mlp.c_fc.bias` match `h.0`, `mlp`, `bias`, `h.*.bias` and `h.[0-3]`, but not
    `c_f`. A parameter that several match gets the product of their factors, so their order does
    not matter; 0 leaves it as it is. A scheduler multiplies each group's rate, so the ratios stay.

    Args:
        groups: dicts with "params" as (name, parameter) pairs, such as `decay_groups` returns.
        lr: the rate of parameters that nothing matches.
        factors: pattern -> what lr is multiplied with.

    Returns:
        The groups, each cut in as many as it has rates; those with a factor have their own "lr".

    Raises:
        ValueError: a pattern matches no parameter (the nearest name is given), or a factor is
            negative or not finite.
    """
    groups = list(groups)
    names = [name for group in groups for name, _ in group["params"]]
    for pattern, factor in factors.items():
        non_negative(f"lr_groups: the factor of '{pattern}'", factor)
        if not any(matches(pattern, name) for name in names):
            raise ValueError(
                f"lr_groups: '{pattern}' matches no parameter{_nearest(pattern, names)}"
            )
    return [part for group in groups for part in _by_rate(group, lr, factors)]


def matches(pattern: str, name: str) -> bool:
    """Whether the pattern is whole parts of the dotted name: ("h.*.bias", "h.0.ln.bias") -> True"""
    return fnmatchcase(f".{name}.", f"*.{pattern}.*")


def _by_rate(
    group: dict[str, Any], lr: float, factors: Mapping[str, float]
) -> list[dict[str, Any]]:
    parts: dict[float, list[tuple[str, Tensor]]] = {}
    for name, p in group["params"]:
        found = (float(f) for pattern, f in factors.items() if matches(pattern, name))
        parts.setdefault(math.prod(found, start=1.0), []).append((name, p))
    label = group.get("name", "lr")
    return [
        {**group, "params": pairs}
        if factor == 1
        else {**group, "params": pairs, "lr": lr * factor, "name": f"{label} × {factor:g}"}
        for factor, pairs in parts.items()
    ]


def _nearest(pattern: str, names: Sequence[str]) -> str:
    """; the nearest is 'wte': the run of parts of a name that is most like the pattern."""
    runs = {
        ".".join(parts[i:j])
        for parts in (name.split(".") for name in names)
        for i in range(len(parts))
        for j in range(i + 1, len(parts) + 1)
    }
    return f"; the nearest is '{difflib.get_close_matches(pattern, sorted(runs), 1, 0.0)[0]}'"


# --- reading what the caller gave -----------------------------------------------------------------

_EMPTY = "the list of parameters is empty: is it a generator that was used up before?"


def as_groups(params: Any) -> list[dict[str, Any]]:
    """A list of group dicts, in whichever of the accepted forms `params` came."""
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise TypeError(
            "params must be an iterable of Tensors, of (name, Tensor) pairs or of group dicts, "
            f"got {describe(params)}: write [p], or model.parameters()"
        )
    if isinstance(params, Mapping):
        raise TypeError("params must be an iterable of group dicts, got one dict: write [{…}]")
    items = list(params)
    if not items:
        raise ValueError(_EMPTY)
    return items if isinstance(items[0], dict) else [{"params": items}]


def names_and_parameters(params: Any, taken: set[int]) -> tuple[list[str], list[Tensor]]:
    """(names, parameters) of one group; the names are empty where none were given.

    `taken` holds the ids of the parameters of other groups.
    """
    items = [params] if isinstance(params, Tensor) else list(params)
    if not items:
        raise ValueError(_EMPTY)
    names = [item[0] for item in items if isinstance(item, tuple) and len(item) == 2]
    if names and len(names) < len(items):
        raise TypeError("either all parameters of a group are (name, Tensor) pairs, or none is")
    parameters = [item[1] for item in items] if names else items
    taken = set(taken)
    for i, p in enumerate(parameters):
        _refuse_unfit(p, f"'{names[i]}'" if names else str(i), taken)
        taken.add(id(p))
    return names, parameters


def _refuse_unfit(p: Any, which: str, taken: set[int]) -> None:
    if not isinstance(p, Tensor):
        raise TypeError(f"parameter {which}: expected a Tensor, got {describe(p)}")
    if not p.requires_grad:
        raise ValueError(
            f"parameter {which} of shape {p.shape} has requires_grad=False, so it never gets a "
            "gradient: leave it out, or set requires_grad=True"
        )
    if not p.is_leaf:
        raise ValueError(
            f"parameter {which} of shape {p.shape} is the result of an op, not a leaf: optimise "
            "the Tensors that it was computed from"
        )
    if id(p) in taken:
        raise ValueError(
            f"parameter {which} of shape {p.shape} is here twice: an optimiser updates each "
            "parameter once, in one group"
        )


def non_negative(name: str, value: Any, below: float = float("inf")) -> float:
    """float(value), refused unless 0 ≤ value < below.

    A Python float and never a NumPy scalar: float32_array * np.float64(2) would be float64.
    """
    if not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    if not 0 <= value < below:
        limit = f" and below {below:g}" if below < float("inf") else ""
        raise ValueError(f"{name} must be at least 0{limit}, got {value}")
    return float(value)


def describe(value: Any) -> str:
    """What an error says it got; of a Tensor not its numbers."""
    return f"one {type(value).__name__}" if isinstance(value, Tensor) else repr(value)
