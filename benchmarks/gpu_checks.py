"""Is what the GPU computes right? The tests of the kernels on it, and a training run beside NumPy.

Tests run in several processes: most of their time goes into compiling, which needs cores; and an
illegal access to memory ends all CUDA work of its process, but not that of others.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Row = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "kernels"
TRAINING = ROOT / "tests" / "test_kernels_train.py"  # which also holds which kernels ran

# These concern compiling, the interpreter and a recording CUDA library, not the device.
WITHOUT_DEVICE = {"test_compile.py", "test_host_path.py", "test_interpret.py", "test_mode.py"}
SHARDS = 4  # of a file of more than 10 kB

# --- the tests of the kernels ---------------------------------------------------------------------


class Job(NamedTuple):
    file: Path
    shard: int
    shards: int


def run_tests(
    seconds: float,
    say: Callable[[str], object] = print,
    workers: int = 2,
) -> list[Row]:
    """A row per file: how many tests passed, which failed, what did not finish in the time."""
    end = time.monotonic() + seconds
    files, lacking = test_files()
    jobs = [
        Job(file, shard, shards)
        for file in files
        for shards in [SHARDS if file.stat().st_size > 10_000 else 1]
        for shard in range(1, shards + 1)
    ]
    with ThreadPoolExecutor(workers) as pool:
        outputs = list(pool.map(lambda job: _run(job, end), jobs))
    rows = []
    for file in files:
        own = [output for job, output in zip(jobs, outputs, strict=True) if job.file == file]
        row = _row(file.name, own)
        say(f"checks {file.name}: {describe(row)}")
        for line in row.get("details", [])[:8]:
            say(f"  {line}")
        rows.append(row)
    for file in lacking:
        why = "its tests use hypothesis, which is not installed"
        rows.append({"part": "checks", "case": file.name, "left_out": why})
    return rows


def test_files() -> tuple[list[Path], list[Path]]:
    """(to run, the largest first; those that need a package that is not here)"""
    files = [file for file in FOLDER.glob("test_*.py") if file.name not in WITHOUT_DEVICE]
    files += [TRAINING] if TRAINING.exists() else []
    files.sort(key=lambda file: (-file.stat().st_size, file.name))
    if importlib.util.find_spec("hypothesis") is not None:
        return files, []
    needs = [file for file in files if "hypothesis" in file.read_text(encoding="utf-8")]
    return [file for file in files if file not in needs], needs


def _run(job: Job, end: float) -> tuple[str, int | None]:
    """What pytest printed, and its exit status: None where its time ran out."""
    left = end - time.monotonic()
    if left <= 1:
        return "", None
    environment = {
        **os.environ,
        "TINYGRAD_LLM_KERNELS": "gpu",
        "TINYGRAD_LLM_TUNE": "0",  # tests name the configurations that they want
        "TINYGRAD_LLM_SHARD": f"{job.shard}/{job.shards}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
    }
    # tests/conftest.py, above of --confcutdir, needs hypothesis; a warning of CuPy's is no error.
    command = [sys.executable, "-m", "pytest", "-vv", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-p", "gpu_shard", "-W", "default", f"--confcutdir={FOLDER}", str(job.file)]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        status = wait(process, left)
        output.seek(0)
        return output.read(), status


def wait(process: subprocess.Popen[Any], seconds: float) -> int | None:
    """Its exit status; None where it did not end in time, and was ended."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


_RESULT = re.compile(r"^(\S*::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)


def _row(name: str, outputs: Sequence[tuple[str, int | None]]) -> Row:
    row: Row = {"part": "checks", "case": name, "passed": 0, "skipped": 0}
    broken, details, unfinished, crashes = [], [], 0, []
    for output, status in outputs:
        results = _RESULT.findall(output)
        row["passed"] += sum(result in ("PASSED", "XFAIL") for _, result in results)
        row["skipped"] += sum(result == "SKIPPED" for _, result in results)
        failed = [test for test, result in results if result in ("FAILED", "ERROR", "XPASS")]
        broken += failed
        unfinished += status is None
        if status not in (0, 5, None) and not failed:  # 5: a shard without tests
            last = next((line for line in reversed(output.splitlines()) if line.strip()), "")
            crashes.append(f"pytest ended with status {status}: {last.strip()[:200]}")
        details += [line for line in output.splitlines() if line.startswith("E  ")][:20]
    if unfinished:
        row["left_out"] = f"{unfinished} of {len(outputs)} processes did not finish in the time"
    if broken or crashes:
        names = [test.partition("::")[2] for test in broken]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        listed = [", ".join(names[:3]) + more] if names else []
        row["failed"] = "; ".join([*listed, *crashes])
        row["broken"], row["details"] = names, details[:60]
    return row


def describe(row: Row) -> str:
    counted = f"{row['passed']} passed, {row['skipped']} skipped" if "passed" in row else ""
    if "broken" in row:
        counted += f", {len(row['broken'])} failed"
    return "; ".join([text for text in (counted, row.get("failed"), row.get("left_out")) if text])


# --- a training run -------------------------------------------------------------------------------

STEPS = 5
# Of the losses, relative to NumPy's in float32: sums in another order, amplified by each step; and
# roundings to 8 bits, which are other roundings, but not of other sizes.
LOSSES = {"float32": 5e-5, "bfloat16": 2e-2}
RUNS = {
    "CuPy": "reference",  # the formulas of the ops, on the GPU
    "cuBLAS": "cublas",  # products by cuBLAS, the rest by our kernels
    "Triton": "triton",  # all by our kernels
}


def parity(dry: bool, add: Callable[[Row], object]) -> None:
    """A row per dtype and way to compute: the losses, and how far they are from NumPy's."""
    expected = losses("reference", "cpu", "float32", STEPS)
    add({"part": "parity", "case": "float32 NumPy", "losses": expected})
    runs = {"Triton": "triton"} if dry else RUNS
    for dtype, tolerance in LOSSES.items():
        for who, kernels in runs.items():
            row: Row = {"part": "parity", "case": f"{dtype} {who}", "tolerance": tolerance}
            try:
                row["losses"] = losses(kernels, "cpu" if dry else "cuda", dtype, STEPS)
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {str(error).strip()[:300]}"
            else:
                judge(row, expected)
            add(row)


def machinery(add: Callable[[Row], object], steps: int = 6) -> None:
    """A row for each thing around a training step that only a device can prove."""
    checks: dict[str, Callable[[], str]] = {
        "CUDA graph": lambda: graph_differs(steps),
        "pinned copies": copies_differ,
        "memory figures": memory_is_wrong,
    }
    for name, check in checks.items():
        row: Row = {"part": "parity", "case": name}
        try:
            wrong = check()
        except Exception as error:
            wrong = f"{type(error).__name__}: {str(error).strip()[:300]}"
        if wrong:
            row["failed"] = wrong
        add(row)


def graph_differs(steps: int) -> str:
    """How a step replayed as a CUDA graph differs from its launches one by one; '' to the bit."""
    (launched, by_launches), (replayed, by_replays) = (tiny_run(steps, g) for g in (False, True))
    if launched != replayed:
        step = next(i for i in range(steps) if launched[i] != replayed[i])
        return f"step {step + 1}: (loss, norm) {launched[step]} launched, {replayed[step]} replayed"
    pairs = zip(by_launches, by_replays, strict=True)
    wrong = sum(not np.array_equal(a, b) for a, b in pairs)
    return f"{wrong} of {len(by_launches)} parameters differ after {steps} steps" if wrong else ""


def tiny_run(steps: int, graphed: bool) -> tuple[list[tuple[float, float]], list[np.ndarray]]:
    """((loss, norm) of each step, the weights after them) of a GPT with dropout on Triton."""
    import tinygrad_llm as tg
    from tinygrad_llm import backend, optim
    from tinygrad_llm.models.gpt import GPT, GPTConfig
    from tinygrad_llm.train.graph import GraphedStep
    from tinygrad_llm.train.parallel import Part
    from tinygrad_llm.train.transfer import UploadedTask

    sizes = GPTConfig(
        vocab_size=97, n_positions=16, n_embd=16, n_layer=1, n_head=2,
        resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1,
    )  # fmt: skip
    tg.manual_seed(0)
    model = GPT(sizes).to("cuda")
    optimizer = optim.AdamW(optim.decay_groups(model, 0.1), lr=1e-2)
    tokens: Any = TokenTask()
    task = UploadedTask(tokens, "cuda")

    def compute(parts: Sequence[Any]) -> tuple[Any, Any]:
        optimizer.zero_grad()
        loss = task.loss(model, parts[0].batch)
        loss.backward()
        norm = optimizer.step_clipped(1.0, 1.0, loss.data)
        optimizer.zero_grad()
        return loss.data, norm

    graph = GraphedStep(compute, optimizer, task, lambda: None, []) if graphed else compute
    found = []
    with tg.use_kernels("triton"):
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            loss, norm = graph([Part(task.next_batch(), 1.0)])
            found.append((float(loss), float(norm[0])))
    return found, [backend.to_device(p.data, "cpu") for p in model.parameters()]


class TokenTask:
    """Random tokens, other ones at each step."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def next_batch(self) -> tuple[np.ndarray, np.ndarray]:
        x, y = self.rng.integers(0, 97, (2, 2, 11))
        return x, y

    def loss(self, model: Any, batch: Any) -> Any:
        return model.loss(*batch)

    def state(self) -> dict[str, Any]:
        return {}


def copies_differ() -> str:
    """Which of many copies, made while the GPU computes, arrived otherwise; '' if none."""
    from tinygrad_llm import backend
    from tinygrad_llm.train.transfer import Uploader

    cupy = backend.cupy()
    uploader, rng = Uploader("cuda"), np.random.default_rng(0)
    work = cupy.ones((1024, 1024), dtype=np.float32)
    sent = [rng.integers(0, 2**31, 1 + 4099 * n) for n in range(40)]
    sums, wrong = [], []
    for values in sent:
        there = uploader.upload([values])
        for _ in range(3):
            work = work * 0.5 + 0.5  # in memory that the copies may want
        sums.append(there.wait()[0].sum())
        del there
    for n, (values, total) in enumerate(zip(sent, sums, strict=True)):
        if int(total) != int(values.sum()):
            wrong.append(n)
    return f"copies {wrong} of {len(sent)} arrived otherwise than they were sent" if wrong else ""


def memory_is_wrong() -> str:
    """What is wrong with the figures of 64 MiB that come and go; '' if nothing."""
    from tinygrad_llm import backend
    from tinygrad_llm.train.memory import GpuMemory, peak_of

    cupy, size = backend.cupy(), 64 << 20
    meter = GpuMemory()
    before = meter.record()
    with peak_of("cuda") as peak:
        array = cupy.zeros(size, dtype=np.uint8)
        held = meter.record()
        del array
    after = meter.record()
    grown = held["memory_used"] - before["memory_used"]
    free, total = cupy.cuda.runtime.memGetInfo()
    for words, right in (
        (f"{grown} bytes more in use than before", grown == size),
        (f"a peak of {peak.bytes} bytes", peak.bytes == size),
        (f"{after['memory_used']} in use after it", after["memory_used"] == before["memory_used"]),
        (f"{held['memory']} bytes in the pool", size <= held["memory"] <= total),
        (f"{free} of {total} bytes free", 0 <= free <= total),
    ):
        if not right:
            return f"with an array of {size} bytes, {words}"
    return ""


def judge(row: Row, expected: Sequence[float]) -> None:
    found, wanted = np.asarray(row["losses"]), np.asarray(expected)
    row["difference"] = float(np.max(np.abs(found - wanted) / np.abs(wanted)))
    if not row["difference"] <= row["tolerance"]:
        row["failed"] = (
            f"its losses differ from NumPy's by {row['difference']:.2g}, "
            f"more than {row['tolerance']:g}"
        )


def losses(kernels: str, device: str, dtype: str, steps: int) -> list[float]:
    """A tiny GPT with dropout learns one batch: the same random numbers on every device."""
    import tinygrad_llm as tg
    from tinygrad_llm import Tensor, optim
    from tinygrad_llm.models.gpt import GPT, GPTConfig

    sizes = GPTConfig(
        vocab_size=97, n_positions=24, n_embd=48, n_layer=2, n_head=3,
        resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1,
    )  # fmt: skip
    tg.manual_seed(0)
    model = GPT(sizes).to(device).to(getattr(tg, dtype))
    # ε above rounding errors: the gradient of the keys' bias is nothing but these.
    optimizer = optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    tokens = np.random.default_rng(0).integers(0, 97, (2, 4, 23))
    x, y = (Tensor(part).to(device) for part in tokens)
    found = []
    with tg.use_kernels(kernels):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model.loss(x, y)
            loss.backward()
            optimizer.step()
            found.append(float(loss.item()))
    return found
