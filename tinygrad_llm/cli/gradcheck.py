"""`tinygrad-llm gradcheck`: is the gradient of every op right?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Annotated

from tyro.conf import Positional, arg

from tinygrad_llm.cli.arguments import parse
from tinygrad_llm.cli.errors import user_input

HELP = """\
Check the gradient of every op against central differences in float64.

The table gives the worst relative error over the op's samples, first and second order.

examples:
  tinygrad-llm gradcheck
  tinygrad-llm gradcheck Softmax MatMul
"""


@dataclass(frozen=True)
class Options:
    """Which ops."""

    ops: Annotated[Positional[tuple[str, ...]], arg(metavar="[OP ...]", help_behavior_hint="")] = ()
    """Names of ops; all when none is given."""


def run(arguments: Sequence[str]) -> int:
    """Print a line per op; 1 when one of them is wrong."""
    options = parse(Options, arguments, "gradcheck", HELP)

    from tinygrad_llm.gradcheck import check_all

    reports = iter(check_all(options.ops or None))
    with user_input():  # the names are looked at before the first op is checked
        first = [*islice(reports, 1)]
    print(f"{'op':<20} {'samples':>7}  {'first':>8}  second")
    failures = []
    for report in chain(first, reports):
        second = report.refusal or ("" if report.second is None else f"{report.second:8.1e}")
        mark = "" if report.ok else "  FAILED"
        print(f"{report.name:<20} {report.samples:>7}  {report.first:8.1e}  {second}{mark}")
        if not report.ok:
            failures.append(report.message)
    for message in failures:
        print(f"\n{message}")
    return 1 if failures else 0
