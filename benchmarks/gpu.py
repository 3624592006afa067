"""`make gpu`: on a machine with an NVIDIA GPU, are the kernels right, and how fast are they?

    python benchmarks/gpu.py [--parts checks,parity,matmul,…] [--minutes 8]

    checks      tests/kernels on the GPU, against float64, and tests/test_kernels_train.py
    parity      a tiny GPT trained with NumPy, CuPy, cuBLAS and Triton: the same losses; a step as
                a CUDA graph, copies from pinned memory, figures of memory
    matmul, attention, softmax, layer_norm, cross_entropy, adamw
                times beside cuBLAS, PyTorch, flash-attn, Liger, as far as they are installed, and
                beside the copy bandwidth and matrix rate measured before them in the same run

It needs NumPy, ml_dtypes, CuPy, Triton and pytest, and installs nothing. What does not fit into the
time is left out and named. Each part is a process of its own: one that fails, hangs or loses the
GPU stops no other. The first run also tunes the kernels; a second one finds that on disk.

JSON and Markdown go to $OUT if it is set, else to benchmarks/results/. Exit status: 0; 1 where
something failed; 2 without a GPU. `--dry` walks through all of it on a CPU, in Triton's
interpreter, with sizes of a few numbers: its times mean nothing, and it writes only to $OUT.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gpu_checks
import gpu_measure
from gpu_measure import Row

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PACKAGES = ("ml_dtypes", "cupy", "triton", "pytest", "torch", "flash_attn", "liger_kernel")

# The shares of the time; what a part does not use, the later ones get.
SHARES = {
    "checks": 5.0,
    "parity": 2.0,  # little to compute, much to compile
    "ceilings": 0.4,
    "matmul": 3.0,
    "attention": 4.0,
    "softmax": 1.0,
    "layer_norm": 1.0,
    "cross_entropy": 1.0,
    "adamw": 0.6,
}
LEAST = 4.0  # seconds: a part with less is not begun
RESERVE = 5.0  # seconds, for the report

RunPart = Callable[[str, float], list[Row]]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.child:
        return child(options)
    missing = "" if options.dry else why_not()
    if missing:
        print(f"make gpu needs an NVIDIA GPU and what drives it: {missing}")
        return 2
    start = time.monotonic()
    out = os.environ.get("OUT")
    folder = Path(out) if out else None if options.dry else RESULTS
    facts = versions()
    if not options.dry:
        try:
            facts |= device()
        except Exception as error:  # what it is called stops no measurement
            facts["gpu"] = gpu_measure.sentence(error)
    print(", ".join([f"{name} {value}" for name, value in facts.items()]), flush=True)

    def run(part: str, seconds: float) -> list[Row]:
        if part == "checks" and not options.dry:
            return gpu_checks.run_tests(seconds, say, workers())
        return in_process(part, seconds, options.dry)

    rows, left_out = gather(options.parts, 60 * options.minutes - RESERVE, run)
    result = {
        "environment": facts,
        "command": f"gpu.py --parts {','.join(options.parts)} --minutes {options.minutes:g}",
        "seconds": round(time.monotonic() - start, 1),
        "rows": rows,
        "left_out": left_out,
        "tuned": {} if options.dry else tuned(),
    }
    text = report(result)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (folder / "gpu.md").write_text(text + "\n", encoding="utf-8")
        print(f"\nwritten: {folder / 'gpu.json'}, {folder / 'gpu.md'}")
    print("\n" + short(result))
    return 1 if failures(rows) else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Kernels on an NVIDIA GPU: right, and how fast.")
    known = [part for part in SHARES if part != "ceilings"]
    parser.add_argument("--parts", default=",".join(known), help="of %(default)s")
    parser.add_argument("--minutes", type=float, default=8.0, help="in all; %(default)g")
    parser.add_argument("--dry", action="store_true", help="small sizes on a CPU: no measurement")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    wanted = [name for name in options.parts.replace(" ", "").split(",") if name]
    unknown = [name for name in wanted if name not in SHARES]
    if unknown or not wanted:
        parser.error(f"--parts takes {', '.join(known)}; got {', '.join(unknown) or 'none'}")
    if not 0 < options.minutes < 9:
        parser.error(f"--minutes is above 0 and below 9, got {options.minutes:g}")
    if set(wanted) - {"checks", "parity"}:
        wanted.append("ceilings")
    options.parts = [part for part in SHARES if part in wanted]
    return options


def why_not() -> str:
    """What this machine lacks; empty where all is here."""
    extra = "'tinygrad-llm[cuda13]' (or [cuda12])"
    brought_by = {"cupy": extra, "triton": extra, "pytest": "pytest", "ml_dtypes": "ml_dtypes"}
    for package, name in brought_by.items():
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed here; pip install {name} brings it."
    from tinygrad_llm import backend

    try:
        backend.cupy()
    except (ImportError, RuntimeError) as error:
        return f"{error}."
    return ""


# --- parts and their time -------------------------------------------------------------------------


def gather(
    parts: Sequence[str],
    seconds: float,
    run: RunPart,
    now: Callable[[], float] = time.monotonic,
) -> tuple[list[Row], list[str]]:
    """The rows of all parts, and in words what was left out.

    Each part gets its share of what is left. One that raises gives a row with 'failed'.
    """
    end = now() + seconds
    rows: list[Row] = []
    left_out: list[str] = []
    for i, part in enumerate(parts):
        left = end - now()
        share = left * SHARES[part] / sum(SHARES[later] for later in parts[i:])
        if share < LEAST:
            left_out.append(f"{part}: {max(left, 0):.0f} s were left")
            continue
        say(f"--- {part}, at most {share:.0f} s")
        try:
            found = run(part, share)
        except Exception as error:
            found = [{"part": part, "case": "all", "failed": gpu_measure.sentence(error)}]
        rows += found
        left_out += [f"{part}: {r['case']}: {r['left_out']}" for r in found if "left_out" in r]
    return rows, left_out


def in_process(part: str, seconds: float, dry: bool) -> list[Row]:
    """Run a part in a process of its own and end it when its time is over."""
    with tempfile.TemporaryDirectory() as folder:
        rows, errors = Path(folder, "rows"), Path(folder, "errors")
        rows.touch()
        command = [sys.executable, str(HERE / "gpu.py"), "--child", part, "--rows", str(rows)]
        command += ["--seconds", f"{seconds:.1f}", *(["--dry"] if dry else [])]
        environment = {
            **os.environ,
            "TINYGRAD_LLM_KERNELS": "interpret" if dry else "gpu",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # else torch.compile leaves processes behind
        }
        if part == "parity":
            environment["TINYGRAD_LLM_TUNE"] = "0"  # tiny sizes: nobody waits for them
        with errors.open("w") as stream:
            status = gpu_checks.wait(
                subprocess.Popen(command, env=environment, stderr=stream), seconds
            )
        found = [json.loads(line) for line in whole_lines(rows.read_text(encoding="utf-8"))]
        if status is None:
            why = f"what came after {found[-1]['case'] if found else 'the start'}: no time left"
            found.append({"part": part, "case": "the rest", "left_out": why})
        elif status != 0:
            text = errors.read_text(encoding="utf-8", errors="replace")
            last = ([line for line in text.splitlines() if line.strip()] or ["no message"])[-1]
            failed = f"its process ended with status {status}: {last.strip()[:300]}"
            found.append({"part": part, "case": "the rest", "failed": failed})
        return found


def whole_lines(text: str) -> list[str]:
    """The process may have been ended in the middle of a line."""
    return text[: text.rfind("\n") + 1].splitlines()


def child(options: argparse.Namespace) -> int:
    """A part: rows into the file as they come, so that nothing is lost when time is over."""
    part, start = options.child, time.monotonic()
    with options.rows.open("a", encoding="utf-8") as file:

        def add(row: Row) -> None:
            say(line_of(row))
            file.write(json.dumps(row) + "\n")
            file.flush()

        if part == "checks":  # in a dry run only
            add({"part": part, "case": "tests", "left_out": "a dry run has no device"})
        elif part == "parity":
            gpu_checks.parity(options.dry, add)
            if not options.dry:
                gpu_checks.machinery(add)
        else:
            benchmark(part, options.seconds - (time.monotonic() - start), options.dry, add)
    return 0


def benchmark(part: str, seconds: float, dry: bool, add: Callable[[Row], None]) -> None:
    import gpu_cases

    from tinygrad_llm.kernels import tune

    end = time.monotonic() + seconds
    timer: gpu_measure.Timer = gpu_measure.Host() if dry else gpu_measure.Gpu()
    longest = 0.0
    with tune.reporting(lambda line: say(f"  {line}") if line.startswith("tuned") else None):
        for name, build in gpu_cases.cases(part, timer, dry):
            start = time.monotonic()
            if start + longest / 4 > end:  # a first case compiles what later ones only launch
                add({"part": part, "case": name, "left_out": "no time left"})
                continue
            try:
                row = gpu_measure.measure(part, name, build(), timer, 0.02 if dry else 0.7)
            except Exception as error:
                row = {"part": part, "case": name, "failed": gpu_measure.sentence(error)}
            timer.free()
            longest = max(longest, time.monotonic() - start)
            add(row)


# --- the machine ----------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    from machine import environment

    found = environment()
    for package in PACKAGES:
        if importlib.util.find_spec(package) is not None:
            found[package] = _version(package)
    return found


def _version(package: str) -> str:
    names = importlib.metadata.packages_distributions().get(package, [package])
    try:
        return importlib.metadata.version(names[0])
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def device() -> dict[str, str]:
    from tinygrad_llm import backend

    cupy = backend.cupy()
    about = cupy.cuda.Device()
    properties = cupy.cuda.runtime.getDeviceProperties(about.id)
    name, capability = properties["name"], about.compute_capability
    found = {
        "gpu": name.decode() if isinstance(name, bytes) else str(name),
        "capability": f"{capability[:-1]}.{capability[-1]}",
        "multiprocessors": str(properties["multiProcessorCount"]),
        "memory": f"{properties['totalGlobalMem'] / 2**30:.0f} GiB",
        "level-2 cache": f"{properties['l2CacheSize'] / 2**20:.0f} MiB",
        "cuda of the driver": _cuda(cupy.cuda.runtime.driverGetVersion()),
        "cuda of cupy": _cuda(cupy.cuda.runtime.runtimeGetVersion()),
    }
    found.update(_nvidia_smi(about.id))
    return found


def _cuda(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _nvidia_smi(index: int) -> dict[str, str]:
    if shutil.which("nvidia-smi") is None:
        return {}
    wanted = {
        "driver": "driver_version",
        "power limit": "power.limit",
        "largest clock": "clocks.max.sm",
    }
    command = ["nvidia-smi", f"--query-gpu={','.join(wanted.values())}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = done.stdout.strip().splitlines()
    values = [value.strip() for value in lines[min(index, len(lines) - 1)].split(",")]
    return dict(zip(wanted, values, strict=False))


def workers() -> int:
    """Processes for the tests: of the cores all but one, of the free memory a GiB for each."""
    from tinygrad_llm import backend

    free, _ = backend.cupy().cuda.runtime.memGetInfo()
    return max(1, min(16, (os.cpu_count() or 2) - 1, free // 2**30))


def tuned() -> dict[str, Any]:
    """What was chosen on this GPU, for the configurations that others may start from."""
    try:
        from tinygrad_llm.kernels import tune

        return tune.table()
    except Exception as error:
        return {"failed": gpu_measure.sentence(error)}


# --- the report -----------------------------------------------------------------------------------


def failures(rows: Sequence[Row]) -> list[str]:
    return [f"{r['part']}: {r['case']}: {r['failed']}" for r in rows if "failed" in r]


def ceilings(rows: Sequence[Row]) -> dict[str, float]:
    """The best rate of each unit among the ceilings."""
    found: dict[str, float] = {}
    for row in rows:
        if row["part"] == "ceilings" and "times" in row:
            best = max([t["rate"] for t in row["times"].values()], default=0.0)
            found[row["unit"]] = max(found.get(row["unit"], 0.0), best)
    return found


def line_of(row: Row) -> str:
    """A row in one line, while the run goes on."""
    text = f"{row['part']} {row['case']}:"
    for who, t in row.get("times", {}).items():
        text += f" {who} {t['ms']:.4f} ms ({gpu_measure.number(t['rate'])} {row['unit']})"
    if "losses" in row:
        text += f" loss {row['losses'][-1]:.6f}"
    if "difference" in row:
        text += f", difference {row['difference']:.1e}"
    for note in ("left_out", "failed"):
        text += f" {note.replace('_', ' ')}: {row[note]}" if note in row else ""
    return text


def checked(rows: Sequence[Row]) -> str:
    """The tests and the training runs."""
    lines = [
        (r["part"], r["case"], gpu_checks.describe(r)) for r in rows if r["part"] == "checks"
    ] + [
        (r["part"], r["case"], line_of(r).partition(": ")[2]) for r in rows if r["part"] == "parity"
    ]
    return gpu_measure.table(("part", "case", "result"), lines) if lines else ""


def short(result: Mapping[str, Any]) -> str:
    """The tables at the end: what is right, what is fast, what failed or is lacking."""
    rows, parts = result["rows"], []
    if checked(rows):
        parts.append(checked(rows))
    times = [row for row in rows if row.get("times") and row["part"] != "ceilings"]
    found = ceilings(rows)
    if times:
        parts.append(gpu_measure.summary(times, found))
    if found:
        named = {"GB/s": "copy", "TFLOP/s": "matrix rate, bfloat16"}
        rates = ", ".join(
            [f"{named[u]} {gpu_measure.number(rate)} {u}" for u, rate in found.items()]
        )
        parts.append(f"Ceilings of this run: {rates}.")
    notes = [
        f"{row['part']} {row['case']}, {who}: {why}"
        for row in rows
        for who, why in row.get("notes", {}).items()
    ]
    for title, lines in (
        ("Rivals that did not run", notes),
        ("Left out", result["left_out"]),
        ("Failed", failures(rows)),
    ):
        if lines:
            parts.append("\n".join([f"{title}:", "", *[f"- {line}" for line in lines]]))
    if not failures(rows):
        parts.append(f"Nothing failed, in {result['seconds']:.0f} s.")
    return "\n\n".join(parts)


def report(result: Mapping[str, Any]) -> str:
    machine = ", ".join([f"{name} {value}" for name, value in result["environment"].items()])
    measured = [row for row in result["rows"] if row.get("times")]
    parts = ["# The kernels on a GPU", f"`{result['command']}`: {machine}", short(result)]
    if measured:
        parts += [
            (
                "## All times\n\nMedians over runs that took turns, by CUDA events, the level-2 "
                "cache flushed before each. Rates are by the formulas of the work: what a rival "
                "does beyond them counts for nothing."
            ),
            gpu_measure.all_times(measured),
        ]
    return "\n\n".join(parts)


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))  # this source tree, installed or not
    sys.exit(main())
