"""`tinygrad-llm doctor`: what this machine has and what would be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinygrad_llm.cli.arguments import parse
from tinygrad_llm.train.machine import facts

HELP = """\
Say what this machine has, which device would be used, and why.

example:
  tinygrad-llm doctor
"""


@dataclass(frozen=True)
class Options:
    """None so far."""


def run(arguments: Sequence[str]) -> int:
    """Print the facts, one a line."""
    parse(Options, arguments, "doctor", HELP)
    for what, how in facts():
        print(f"{what:<14} {how}")
    return 0
