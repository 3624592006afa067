"""`tinygrad-llm runs`: what runs there are and how they stand; several of them side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from tinygrad_llm.cli.arguments import parse
from tinygrad_llm.cli.errors import UsageError, user_input
from tinygrad_llm.cli.output import Json, Quiet, show_json, show_table

if TYPE_CHECKING:
    from tinygrad_llm.train.report import RunReport

HELP = """\
List the runs in a folder: how they stand, how far they are, how good.

  running    a process works on it
  finished   it has reached a limit of its configuration: its steps, time, tokens or patience
  stopped    it ended before that, and can go on
  crashed    it was killed, and can go on from its last checkpoint
  damaged    something in it cannot be read

Nothing is written. `tinygrad-llm runs compare --help` is about several runs side by side.

examples:
  tinygrad-llm runs
  tinygrad-llm runs runs --sort best
  tinygrad-llm runs compare runs/book runs/book-2 --out compare.png
"""

COMPARE_HELP = """\
Draw the curves of several runs into one picture, and list where their configurations differ.

Solid lines are validation losses, faint ones the training losses, smoothed.

examples:
  tinygrad-llm runs compare runs/book runs/book-2
  tinygrad-llm runs compare runs/book runs/book-2 --out both.png --quiet
"""


@dataclass(frozen=True)
class Options:
    """Which runs."""

    folder: Annotated[Positional[str], arg(metavar="[FOLDER]", help_behavior_hint="")] = "runs"
    """Where to look, also some levels below; runs, if none is given."""
    sort: Literal["age", "name", "best"] = "age"
    """age: what changed last comes first; name; best: by the score of each, the better first."""
    quiet: Quiet = False
    json: Json = False


@dataclass(frozen=True)
class CompareOptions:
    """Which runs."""

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN RUN ...", help_behavior_hint="")]
    """Run folders, two or more."""
    out: Annotated[str, arg(metavar="FILE")] = "compare.png"
    """The picture, a .png; an older one of that name is replaced."""
    quiet: Quiet = False
    json: Json = False


def run(arguments: Sequence[str]) -> int:
    """List, or compare where that is the first word; a folder of that name is `./compare`."""
    if arguments and arguments[0] == "compare":
        return _compare(arguments[1:])
    return _list(arguments)


# --- the list -------------------------------------------------------------------------------------


def _list(arguments: Sequence[str]) -> int:
    options = parse(Options, arguments, "runs", HELP)

    from tinygrad_llm.train import report

    with user_input():
        reports = [report.look(folder) for folder in report.find_runs(options.folder)]
    orders: dict[str, Callable[[RunReport], Any]] = {
        "age": lambda r: -(r.changed or 0.0),
        "name": lambda r: r.folder,
        "best": _by_score,
    }
    reports.sort(key=orders[options.sort])
    if options.json:
        show_json({"folder": options.folder, "runs": [r.as_dict() for r in reports]})
        return 0
    if not reports:
        if not options.quiet:
            print(f"no runs in {options.folder}: tinygrad-llm pretrain gpt begins one")
        return 0
    head = ["run", "state", "step", "best", "at step", "loss", "speed", "changed"]
    show_table(head, [_row(r, _name(r, options.folder)) for r in reports], right=(2, 3, 4, 5, 6, 7))
    for r in reports:
        if r.why:
            print(f"{r.folder} is damaged: {r.why}", file=sys.stderr)
    return 0


def _by_score(report: RunReport) -> Any:
    """Those with one score side by side; a loss is the better the lower, others the higher."""
    best = report.best or 0.0
    lower = report.score.endswith("loss")
    return report.best is None, report.score != "val_loss", report.score, best if lower else -best


def _name(report: RunReport, top: str) -> str:
    """Its path from where it was looked for."""
    inside = report.folder.relative_to(top)
    return str(inside if inside.parts else report.folder)


def _row(report: RunReport, name: str) -> list[str]:
    from tinygrad_llm.train.report import ago

    return [
        name,
        report.state,
        "" if report.steps is None else f"{report.step}/{report.steps}",
        _best(report),
        _number(report.best_step, "{}"),
        _number(report.loss, "{:.4f}"),
        _number(report.speed, f"{{:,.0f}} {report.unit}/s"),
        "" if report.changed is None else f"{ago(report.changed)} ago",
    ]


def _best(report: RunReport) -> str:
    """'val loss 3.4567', 'val f1 0.8123'"""
    return _number(report.best, f"{report.score.replace('_', ' ')} {{:.4f}}")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


# --- side by side ---------------------------------------------------------------------------------


def _compare(arguments: Sequence[str]) -> int:
    options = parse(CompareOptions, arguments, "runs compare", COMPARE_HELP)
    if len(options.runs) < 2:
        raise UsageError(f"compare what? Expected two run folders or more, got {len(options.runs)}")
    if len(set(options.runs)) < len(options.runs):
        raise UsageError("expected each run once")
    out = Path(options.out).expanduser()
    if out.suffix != ".png":
        raise UsageError(f"--out is a picture and ends in .png, got {options.out!r}")

    from tinygrad_llm.train import plot, report

    with user_input():
        reports = [report.look(folder, curves=True) for folder in options.runs]
        for r in reports:
            if r.config is None:
                raise UsageError(f"{r.folder} is damaged: {r.why}")
        differing = report.differing(reports)
        why_not = plot.draw_runs({str(r.folder): r.curves for r in reports}, out)
    if why_not:
        why_not = why_not.replace("loss.png", str(out))
    if options.json:
        picture = None if why_not else str(out)
        found = [r.as_dict() for r in reports]
        show_json({"runs": found, "differences": differing, "picture": picture})
    else:
        scores = {
            "state": [r.state for r in reports],
            "step": [f"{r.step}/{r.steps}" for r in reports],
            "best val loss": [_number(r.best_val_loss, "{:.4f}") for r in reports],
            **({"best": list(map(_best, reports))} if any(map(_is_own, reports)) else {}),
            "at step": [_number(r.best_step, "{}") for r in reports],
        }
        different = {k: ["" if v is None else v for v in row] for k, row in differing.items()}
        rows = [[key, *map(str, values)] for key, values in (scores | different).items()]
        columns = range(1, len(reports) + 1)
        show_table(["", *map(str, options.runs)], rows, right=tuple(columns))
    if why_not:
        print(why_not, file=sys.stderr)
    elif not (options.json or options.quiet):
        print(f"\npicture: {out}")
    return 0


def _is_own(report: RunReport) -> bool:
    """Whether it has a score of its own beside the loss."""
    return report.score != "val_loss"
