"""`tinygrad-llm gradcheck`: is the gradient of every op right?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from tinygrad_llm.cli.arguments import parse
from tinygrad_llm.cli.errors import user_input
from tinygrad_llm.cli.output import Json, Quiet, show_json

if TYPE_CHECKING:
    from tinygrad_llm.gradcheck import Report

HELP = """\
Check the gradient of every op against central differences in float64.

The table gives the worst relative error over the op's samples, first and second order.

examples:
  tinygrad-llm gradcheck
  tinygrad-llm gradcheck Softmax MatMul
  tinygrad-llm gradcheck --quiet
"""


@dataclass(frozen=True)
class Options:
    """Which ops."""

    ops: Annotated[Positional[tuple[str, ...]], arg(metavar="[OP ...]", help_behavior_hint="")] = ()
    """Names of ops; all when none is given."""
    quiet: Quiet = False
    json: Json = False


def run(arguments: Sequence[str]) -> int:
    """Print a line per op; 1 when one of them is wrong."""
    options = parse(Options, arguments, "gradcheck", HELP)

    from tinygrad_llm.gradcheck import check_all

    reports = iter(check_all(options.ops or None))
    with user_input():  # the names are looked at before the first op is checked
        first = [*islice(reports, 1)]
    if not (options.quiet or options.json):
        print(f"{'op':<20} {'samples':>7}  {'first':>8}  second")
    count, failed = 0, []
    for report in chain(first, reports):
        count += 1
        if not report.ok:
            failed.append(report)
        if not options.quiet:
            show_json(asdict(report)) if options.json else print(_row(report))
    _show_result(count, failed, options)
    return 1 if failed else 0


def _show_result(count: int, failed: list[Report], options: Options) -> None:
    if options.json:
        if options.quiet:
            show_json({"ops": count, "failed": [asdict(report) for report in failed]})
        return
    for report in failed:
        print(f"\n{report.message}")
    if options.quiet:
        print(f"{count - len(failed)} of {count} ops have the right gradient")


def _row(report: Report) -> str:
    second = report.refusal or ("" if report.second is None else f"{report.second:8.1e}")
    mark = "" if report.ok else "  FAILED"
    return f"{report.name:<20} {report.samples:>7}  {report.first:8.1e}  {second}{mark}"
