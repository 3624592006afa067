"""What every config refuses: values that make no network, each in one sentence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from tinygrad_llm.nn import ACTIVATIONS

# What no machine holds: a config.json with a digit too many should not be tried out.
MOST_PARAMETERS = 10**12


def check_sizes(**sizes: Any) -> None:
    """Raise ValueError unless each is an integer of at least 1."""
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {short(value)}")


def check_total(number: int, **sizes: Any) -> None:
    """Raise ValueError where these sizes would make more parameters than any machine has."""
    if number > MOST_PARAMETERS:
        listed = ", ".join(f"{name} {short(value)}" for name, value in sizes.items())
        raise ValueError(f"{listed} would make over 10¹² parameters, more than any machine has")


def check_number(name: str, value: Any, low: float = 0.0, below: float = math.inf) -> None:
    """Raise ValueError unless low ≤ value < below."""
    # An integer may be too large for any float: 1e300 is beyond every sensible number, too.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value < min(below, 1e300):
        raise ValueError(
            f"{name} must be a number from {low:g} to below {below:g}, got {short(value)}"
        )


def check_token_id(name: str, value: Any) -> None:
    """Raise ValueError unless it is an integer from 0, or None."""
    if value is not None and (type(value) is not int or value < 0):
        raise ValueError(f"{name} must be an integer from 0, or none, got {short(value)}")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise ValueError unless it is one of them."""
    choices = list(choices)  # a list: the value may not be hashable
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(map(str, choices))}, got {short(value)}"
        )


def check_activation(name: str, value: Any) -> None:
    """Raise ValueError unless `nn.activation` knows it."""
    check_choice(name, value, ACTIVATIONS)


def check_fixed(config: Mapping[str, Any], model: str, fixed: Mapping[str, Any]) -> None:
    """Raise ValueError where an option of Hugging Face's, which is none here, has another value."""
    for key, ours in fixed.items():
        if config.get(key, ours) != ours:
            raise ValueError(f"{key} must be {ours} for this {model}, got {short(config[key])}")


def short(value: Any) -> str:
    """The value as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}… ({len(text)} characters)"
