"""`tinygrad-llm doctor`: what this machine has and what would be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tinygrad_llm.cli.arguments import parse
from tinygrad_llm.cli.output import Json, show_json
from tinygrad_llm.train.machine import facts

HELP = """\
Say what this machine has, which device would be used, and why.

examples:
  tinygrad-llm doctor
  tinygrad-llm doctor --json
"""


@dataclass(frozen=True)
class Options:
    """How to say it."""

    json: Json = False


def run(arguments: Sequence[str]) -> int:
    """Print the facts, one a line."""
    options = parse(Options, arguments, "doctor", HELP)
    if options.json:
        show_json(dict(facts()))
        return 0
    for what, how in facts():
        print(f"{what:<14} {how}")
    return 0
