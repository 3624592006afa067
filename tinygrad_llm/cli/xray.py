"""`tinygrad-llm xray KERNEL`: what the compiler makes of a GPU kernel, on any machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from tinygrad_llm.cli.arguments import parse
from tinygrad_llm.cli.errors import UsageError, user_input
from tinygrad_llm.cli.output import Json, show_json, show_table
from tinygrad_llm.train.log import printable

if TYPE_CHECKING:
    from tinygrad_llm.kernels.compile import Report

HELP = """\
Compile a GPU kernel, with Triton but without a GPU, and show what became of it: registers and what
did not fit into them, shared memory, tensor-core instructions, the width of loads and stores, how
many warps a multiprocessor (SM) can hold, and a verdict in words. Registers, stack and spills are
those of a thread, warps, bytes and FLOPs those of a program.

Without a KERNEL: the list of them. A path of a .py file with kernels of your own works, too, where
it has a function specimens(dtype), as those in kernels/ do. The exit status is 1 where a kernel has
a fault: it does not compile, spills, leaves the tensor cores idle or asks for too much memory.

examples:
  tinygrad-llm xray
  tinygrad-llm xray softmax
  tinygrad-llm xray softmax --arch 75,80,90,100 --dtype fp32,bf16
  tinygrad-llm xray softmax --arch 90 --ptx softmax.ptx --sass softmax.sass
"""


@dataclass(frozen=True)
class Options:
    """Which kernel, compiled for what."""

    kernel: Annotated[
        Positional[str],
        arg(metavar="[KERNEL|FILE]", help="A kernel's name, or a .py file.", help_behavior_hint=""),
    ] = ""
    arch: Annotated[str, arg(metavar="{75,80,86,89,90,100,120}")] = "80,90"
    """One or more, with commas: 80 is A100, 90 H100, 100 B200, 86, 89 and 120 RTX 30, 40 and 50."""
    dtype: Annotated[str, arg(metavar="{fp32,fp16,bf16}")] = "bf16"
    """One or more, with commas."""
    ptx: Annotated[Path | None, arg(metavar="FILE")] = None
    """Write the PTX there, that of all specimens below each other."""
    sass: Annotated[Path | None, arg(metavar="FILE")] = None
    """Write the machine code there."""
    json: Json = False


def run(arguments: Sequence[str]) -> int:
    """Print the tables; 1 when a specimen has a fault."""
    options = parse(Options, arguments, "xray", HELP)

    from tinygrad_llm.kernels import compile
    from tinygrad_llm.kernels.compile import ARCHITECTURES, DTYPES

    if not options.kernel:
        return _list(compile.kernels(), options.json)
    if not compile.available():
        raise UsageError(compile.MISSING)
    with ExitStack() as stack:
        with user_input():
            compile.find(options.kernel)
            archs = _chosen(options.arch.replace("sm_", ""), map(str, ARCHITECTURES), "arch")
            dtypes = _chosen(options.dtype, DTYPES, "dtype")
            wanted = (("ptx", options.ptx), ("sass", options.sass))
            code = {
                k: stack.enter_context(path.open("w", encoding="utf-8"))
                for k, path in wanted
                if path
            }
        reports = []
        made = compile.xray([options.kernel], [*map(int, archs)], dtypes, [*code])
        for report in _announced(made):
            reports.append(report)
            for kind, file in code.items():
                print(f"// {_title(report)}\n{getattr(report, kind)}", file=file)
            if options.json:
                show_json(_values(report))
    if not reports:
        raise UsageError(f"{options.kernel} has no specimens in {options.dtype} for {options.arch}")
    if not options.json:
        _show(reports)
    return 1 if any(report.faults for report in reports) else 0


def _values(report: Report) -> dict[str, Any]:
    """For programs: all but the code, and the verdict."""
    values = {k: v for k, v in asdict(report).items() if k not in ("ptx", "sass")}
    return {**values, "verdict": report.verdict}


def _list(kernels: Mapping[str, str], json: bool) -> int:
    if json:
        for name, summary in kernels.items():
            show_json({"kernel": name, "summary": summary})
    elif kernels:
        show_table(("kernel", "what it does"), [*kernels.items()], right=())
    else:
        print("there are no kernels yet")
    return 0


def _chosen(words: str, known: Iterable[str], what: str) -> list[str]:
    """'80,90' -> ['80', '90'], each of them once and known."""
    from tinygrad_llm.kernels.compile import nearest

    known = list(known)
    chosen = list(dict.fromkeys(word.strip() for word in words.split(",")))
    for word in chosen:
        if word not in known:
            raise UsageError(f"unknown --{what} {word!r}: {nearest(word, known)}")
    return chosen


def _announced(reports: Iterable[Report]) -> Iterator[Report]:
    """The same, while a terminal shows how many there were: each takes about a second."""
    live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    count = 0
    for count, report in enumerate(reports, 1):
        if live:
            print(f"\r\x1b[K{count} compiled", end="", file=sys.stderr, flush=True)
        yield report
    if live and count:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


# --- the tables -----------------------------------------------------------------------------------

COLUMNS = 3  # of a table: more would not fit a terminal


def _show(reports: Sequence[Report]) -> None:
    """A table for every specimen and dtype, its columns the architectures, verdicts below it."""
    for (specimen, dtype), group in groupby(reports, key=lambda r: (r.specimen, r.dtype)):
        columns = list(group)
        print(printable(f"{columns[0].kernel}: {specimen}, {dtype}"))
        for start in range(0, len(columns), COLUMNS):
            _show_columns(columns[start : start + COLUMNS])


def _show_columns(columns: Sequence[Report]) -> None:
    compiled = [report for report in columns if not report.error]
    if compiled:
        head = ["", *(f"sm_{report.arch}" for report in compiled)]
        rows = [[what, *map(say, compiled)] for what, say in ROWS.items()]
        rows = [row for row in rows if any(row[1:])]
        show_table(head, rows, right=range(1, len(head)))
    for report in columns:
        print(printable(f"sm_{report.arch}: {report.verdict}"))
    print()


def _title(report: Report) -> str:
    return f"{report.kernel}: {report.specimen}, {report.dtype}, sm_{report.arch}"


def _shared(report: Report) -> str:
    limit = f"{report.shared_limit // 1024} KiB"
    if report.shared < 1024:
        return f"{report.shared} bytes of {limit}"
    return f"{report.shared / 1024:.4g} of {limit}"


def _tensor_cores(report: Report) -> str:
    found = ", ".join(f"{count} {kind}" for kind, count in report.tensor_cores.items())
    return found or ("none" if report.dots else "")


def _widths(counts: Mapping[int, int]) -> str:
    """{4: 2, 16: 8} -> '8×16 2×4': the widest first."""
    return " ".join(f"{count}×{width}" for width, count in sorted(counts.items(), reverse=True))


def _occupancy(report: Report) -> str:
    return f"{report.resident_warps} of {report.max_warps} ({report.limited_by})"


def _intensity(report: Report) -> str:
    return f"{report.flops / report.bytes:.3g}" if report.flops and report.bytes else ""


# What stands at the left -> what the column of a report says there; a row of nothing is left out.
ROWS: dict[str, Callable[[Report], str]] = {
    "registers": lambda r: str(r.registers),
    "stack, bytes": lambda r: str(r.stack),
    "spills, bytes": lambda r: str(r.spills),
    "shared memory": _shared,
    "tensor cores": _tensor_cores,
    "loads × bytes": lambda r: _widths(r.loads),
    "stores × bytes": lambda r: _widths(r.stores),
    "TMA copies": lambda r: str(r.bulk_copies or ""),
    "atomics": lambda r: str(r.atomics or ""),
    "warps": lambda r: str(r.warps),
    "warps per SM": _occupancy,
    "bytes": lambda r: f"{r.bytes:,}" if r.bytes else "",
    "FLOPs": lambda r: f"{r.flops:,}" if r.flops else "",
    "FLOPs per byte": _intensity,
}
