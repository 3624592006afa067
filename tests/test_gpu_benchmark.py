"""`benchmarks/gpu.py` without a GPU: arguments, time, failures, tables; and dry runs."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tinygrad_llm.kernels import mode

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

needs_interpreter = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or mode.choose().name != "interpret",
    reason="a dry run needs Triton's interpreter",
)


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("gpu", monkeypatch)


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("gpu_measure", monkeypatch)


@pytest.fixture
def checking(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("gpu_checks", monkeypatch)


# --- arguments ------------------------------------------------------------------------------------


def test_parts_are_run_in_their_order_and_benchmarks_bring_their_ceilings(gpu: ModuleType) -> None:
    assert gpu.parse(["--parts", "softmax, checks"]).parts == ["checks", "ceilings", "softmax"]
    assert gpu.parse(["--parts", "parity"]).parts == ["parity"]
    assert gpu.parse([]).parts == list(gpu.SHARES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "matmull"], "--parts takes checks, parity, matmul"),
        (["--parts", ","], "got none"),
        (["--minutes", "9"], "below 9"),
        (["--minutes", "0"], "above 0"),
    ],
)
def test_what_it_does_not_take(
    gpu: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu.parse(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_one_sentence_and_status_2(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "why_not", lambda: "CuPy sees no NVIDIA GPU here.")
    assert gpu.main([]) == 2
    said = capsys.readouterr().out
    assert said == (
        "make gpu needs an NVIDIA GPU and what drives it: CuPy sees no NVIDIA GPU here.\n"
    )


def test_what_is_not_installed_is_named(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert "cupy is not installed here; pip install" in gpu.why_not()


# --- time and failures ----------------------------------------------------------------------------


class Clock:
    """Time passes when somebody says so."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def test_time_that_a_part_does_not_use_goes_to_the_later_ones(gpu: ModuleType) -> None:
    clock, given = Clock(), {}

    def run(part: str, seconds: float) -> list[dict[str, Any]]:
        given[part] = seconds
        clock.time += 1.0
        return [{"part": part, "case": "all"}]

    parts = list(gpu.SHARES)
    rows, left_out = gpu.gather(parts, 475.0, run, clock)
    assert [row["part"] for row in rows] == parts
    assert left_out == []
    assert given["checks"] == pytest.approx(475 * gpu.SHARES["checks"] / sum(gpu.SHARES.values()))
    assert given["adamw"] == pytest.approx(475 - (len(parts) - 1))


def test_parts_that_use_all_their_time_leave_the_whole_within_the_limit(gpu: ModuleType) -> None:
    clock = Clock()

    def run(part: str, seconds: float) -> list[dict[str, Any]]:
        clock.time += seconds
        return []

    gpu.gather(list(gpu.SHARES), 475.0, run, clock)
    assert clock.time == pytest.approx(475.0)


def test_parts_without_time_are_named_as_left_out(gpu: ModuleType) -> None:
    clock = Clock()

    def run(part: str, seconds: float) -> list[dict[str, Any]]:
        clock.time += 98.0
        return []

    rows, left_out = gpu.gather(["checks", "matmul", "adamw"], 100.0, run, clock)
    assert rows == []
    assert left_out == ["matmul: 2 s were left", "adamw: 2 s were left"]


def test_a_part_that_fails_stops_no_other_and_is_reported(gpu: ModuleType) -> None:
    def run(part: str, seconds: float) -> list[dict[str, Any]]:
        if part == "matmul":
            raise RuntimeError("the GPU fell off the bus\nand more")
        return [{"part": part, "case": "all"}]

    rows, _ = gpu.gather(["checks", "matmul", "adamw"], 100.0, run, Clock())
    assert [row["part"] for row in rows] == ["checks", "matmul", "adamw"]
    assert gpu.failures(rows) == ["matmul: all: RuntimeError: the GPU fell off the bus"]


def test_a_process_that_dies_keeps_its_rows(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = process_of(
        gpu, tmp_path, monkeypatch, 'row({"case": 1}); sys.exit("CUDA_ERROR_ILLEGAL_ADDRESS")'
    )
    assert rows[0] == {"case": 1}
    assert rows[1]["failed"] == ("its process ended with status 1: CUDA_ERROR_ILLEGAL_ADDRESS")


def test_a_process_that_hangs_is_ended_and_keeps_its_rows(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = 'row({"case": "a"}); row({"case": "b"}); file.write("{"); file.flush(); time.sleep(60)'
    rows = process_of(gpu, tmp_path, monkeypatch, code, seconds=1.0)
    assert rows[:2] == [{"case": "a"}, {"case": "b"}]
    assert rows[2]["left_out"] == "what came after b: no time left"


def process_of(
    gpu: ModuleType,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    seconds: float = 30.0,
) -> list[dict[str, Any]]:
    """The rows of a script in the place of gpu.py."""
    (folder / "gpu.py").write_text(
        "import json, sys, time\n"
        "file = open(sys.argv[sys.argv.index('--rows') + 1], 'a')\n"
        "def row(x):\n"
        "    file.write(json.dumps(x) + '\\n'); file.flush()\n" + code + "\n"
    )
    monkeypatch.setattr(gpu, "HERE", folder)
    return gpu.in_process("matmul", seconds, dry=True)


# --- the device ---------------------------------------------------------------------------------


class FakeEvent:
    """Each event is recorded 2 ms after the one before."""

    recorded = 0.0

    def record(self) -> None:
        FakeEvent.recorded += 2.0
        self.time = FakeEvent.recorded

    def synchronize(self) -> None:
        pass


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """As much of CuPy as the timer and `device` ask for; `calls` says what was launched."""
    calls: list[str] = []
    device = SimpleNamespace(id=0, compute_capability="90", attributes={"L2CacheSize": 50 * 2**20})
    properties = {
        "name": b"NVIDIA H100 80GB HBM3",
        "multiProcessorCount": 132,
        "totalGlobalMem": 80 * 2**30,
        "l2CacheSize": 50 * 2**20,
    }
    runtime = SimpleNamespace(
        getDeviceProperties=lambda index: properties,
        driverGetVersion=lambda: 12080,
        runtimeGetVersion=lambda: 12090,
        memGetInfo=lambda: (3 * 2**30, 80 * 2**30),
    )

    def empty(size: int, dtype: str) -> SimpleNamespace:
        data = SimpleNamespace(memset_async=lambda value, size: calls.append(f"set {size}"))
        return SimpleNamespace(data=data, nbytes=4 * size, max=lambda: calls.append("read"))

    cuda = SimpleNamespace(
        Device=lambda: device,
        Event=FakeEvent,
        get_elapsed_time=lambda start, stop: stop.time - start.time,
        runtime=runtime,
    )
    fake = SimpleNamespace(cuda=cuda, empty=empty, calls=calls)
    monkeypatch.setattr("tinygrad_llm.backend.cupy", lambda: fake)
    return fake


def test_runs_take_turns_from_cold_caches(measuring: ModuleType, cupy: SimpleNamespace) -> None:
    calls, names = cupy.calls, ("a", "b")
    timer = measuring.Gpu()
    found = timer.milliseconds([lambda name=name: calls.append(name) for name in names], 3)
    assert found == [[2.0] * 3, [2.0] * 3]
    flush = [f"set {2**28}"] * 4 + ["read"]
    assert calls == [*flush, "a", *flush, "b"] * 3


def test_the_device_in_words(
    gpu: ModuleType, cupy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert gpu.device() == {
        "gpu": "NVIDIA H100 80GB HBM3",
        "capability": "9.0",
        "multiprocessors": "132",
        "memory": "80 GiB",
        "level-2 cache": "50 MiB",
        "cuda of the driver": "12.8",
        "cuda of cupy": "12.9",
    }


def test_a_gibibyte_for_each_process_of_tests(
    gpu: ModuleType, cupy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 16)
    assert gpu.workers() == 3
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 1)
    assert gpu.workers() == 1


# --- measuring ------------------------------------------------------------------------------------


class Turns:
    """A timer that counts: run i takes i + 1 ms, and a tenth more each round."""

    xp = np

    def __init__(self) -> None:
        self.rounds: list[int] = []

    def milliseconds(self, runs: list[Callable[[], Any]], rounds: int) -> list[list[float]]:
        self.rounds.append(rounds)
        return [[i + 1 + round / 10 for round in range(rounds)] for i in range(len(runs))]

    def free(self) -> None:
        pass


def test_medians_quartiles_and_rates(measuring: ModuleType) -> None:
    runs = {"ours": lambda: np.ones(3), "torch": lambda: np.ones(3)}
    case = measuring.Case(2e9, "GB/s", runs, 1e-3)
    row = measuring.measure("softmax", "forward", case, Turns(), seconds=0.021)
    assert row["difference"] == 0.0
    assert "failed" not in row
    assert row["times"]["ours"]["rounds"] == 7  # of 3 ms, in 21
    assert row["times"]["ours"]["ms"] == pytest.approx(1.3)
    assert row["times"]["torch"]["low"] < row["times"]["torch"]["ms"] == pytest.approx(2.3)
    assert row["times"]["ours"]["rate"] == pytest.approx(2000 / 1.3)


def test_other_numbers_than_the_rivals_are_a_failure(measuring: ModuleType) -> None:
    runs = {"ours": lambda: np.array([1.0, 2.0]), "torch": lambda: np.array([1.0, 4.0])}
    row = measuring.measure("p", "c", measuring.Case(1, "GB/s", runs, 0.1), Turns())
    assert row["failed"].startswith("ours differs from torch by 0.5")
    assert set(row["times"]) == {"ours", "torch"}


@pytest.mark.parametrize("wrong", [np.array([np.nan, 1.0]), np.ones(3)])
def test_nan_and_other_shapes_differ(measuring: ModuleType, wrong: np.ndarray) -> None:
    assert measuring.difference(wrong, np.ones(2)) == float("inf")


def test_a_rival_that_fails_is_a_note_and_ours_a_failure(measuring: ModuleType) -> None:
    def refuse() -> None:
        raise NotImplementedError("not for such arrays")

    runs = {"ours": lambda: np.ones(2), "Liger": refuse}
    row = measuring.measure("p", "c", measuring.Case(1, "GB/s", runs, 0.1), Turns())
    assert row["notes"] == {"Liger": "NotImplementedError: not for such arrays"}
    assert "failed" not in row
    runs = {"ours": refuse, "torch": lambda: np.ones(2)}
    row = measuring.measure("p", "c", measuring.Case(1, "GB/s", runs, 0.1), Turns())
    assert row["failed"] == "NotImplementedError: not for such arrays"
    assert set(row["times"]) == {"torch"}


def time_of(ms: float, rate: float) -> dict[str, float]:
    return {"ms": ms, "low": ms, "high": ms, "rounds": 5, "rate": rate}


def test_the_short_table(gpu: ModuleType) -> None:
    rows = [
        {"part": "ceilings", "case": "copy", "unit": "GB/s", "times": {"copy": time_of(1, 3000)}},
        {
            "part": "softmax",
            "case": "forward",
            "unit": "GB/s",
            "times": {
                "ours": time_of(1.0, 2700),
                "torch": time_of(2.0, 1350),
                "Liger": time_of(1.5, 1800),
            },
        },
        {"part": "adamw", "case": "float32", "failed": "ours differs"},
    ]
    result = {"rows": rows, "left_out": ["matmul: 2 s were left"], "seconds": 10.0}
    text = gpu.short(result)
    assert "| softmax | forward | 2700 GB/s | 1800 (Liger) | 1.50             | 0.90 " in text
    assert "Ceilings of this run: copy 3000 GB/s." in text
    assert "Left out:\n\n- matmul: 2 s were left" in text
    assert text.endswith("Failed:\n\n- adamw: float32: ours differs")


def test_a_table_is_straight(measuring: ModuleType) -> None:
    lines = measuring.table(("a", "bb"), [("ccc", "d")]).splitlines()
    assert lines == ["| a   | bb |", "|-----|----|", "| ccc | d  |"]


# --- the tests of the kernels, the training run ---------------------------------------------------


def test_what_pytest_printed_becomes_a_row(checking: ModuleType) -> None:
    printed = (
        "tests/kernels/test_x.py::test_a[float32 - odd] PASSED  [ 20%]\n"
        "tests/kernels/test_x.py::test_b FAILED                 [ 40%]\n"
        "tests/kernels/test_x.py::test_c SKIPPED (no GPU)       [ 60%]\n"
        "E   AssertionError: 1 is not 2\n"
        "FAILED tests/kernels/test_x.py::test_b - AssertionError\n"
    )
    cut = "tests/kernels/test_x.py::test_d PASSED\ntests/kernels/test_x.py::test_e "
    row = checking._row("test_x.py", [(printed, 1), (cut, None)])
    assert (row["passed"], row["skipped"], row["broken"]) == (2, 1, ["test_b"])
    assert row["failed"] == "test_b"
    assert row["details"] == ["E   AssertionError: 1 is not 2"]
    assert row["left_out"] == "1 of 2 processes did not finish in the time"
    assert checking.describe(row).startswith("2 passed, 1 skipped, 1 failed; test_b; 1 of 2")


def test_a_pytest_that_breaks_down_is_a_failure(checking: ModuleType) -> None:
    row = checking._row("test_x.py", [("CUDA error\n", -11), ("", 5)])
    assert row["failed"] == "pytest ended with status -11: CUDA error"


def test_files_that_need_hypothesis_are_left_out_without_it(
    checking: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking.importlib.util, "find_spec", lambda name: None)
    files, lacking = checking.test_files()
    wanted = {"test_softmax.py", "test_matmul.py", "test_attention.py", "test_kernels_train.py"}
    assert wanted <= {file.name for file in files}
    assert [file.name for file in lacking] == ["test_layout.py"]


@pytest.fixture
def folder(checking: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tests in the place of tests/kernels: two files, of two shards the larger."""
    (tmp_path / "test_one.py").write_text(
        "import os\n"
        "import pytest\n"
        "@pytest.mark.parametrize('name', ['a b', 'c::d', 'e'])\n"
        "def test_names(name):\n"
        "    pass\n"
        "def test_environment():\n"
        "    assert os.environ['TINYGRAD_LLM_KERNELS'] == 'gpu'\n"
        "    assert os.environ['TINYGRAD_LLM_TUNE'] == '0'\n" + "#" * 10_000 + "\n"
    )
    (tmp_path / "test_two.py").write_text("def test_wrong():\n    assert 1 == 2\n")
    monkeypatch.setattr(checking, "FOLDER", tmp_path)
    monkeypatch.setattr(checking, "TRAINING", tmp_path / "none.py")
    monkeypatch.setattr(checking, "SHARDS", 2)
    return tmp_path


def test_shards_together_are_the_file(checking: ModuleType, folder: Path) -> None:
    said: list[str] = []
    one, two = checking.run_tests(100.0, said.append)
    assert one == {"part": "checks", "case": "test_one.py", "passed": 4, "skipped": 0}
    assert two["failed"] == "test_wrong"
    assert two["broken"] == ["test_wrong"]
    assert any("assert 1 == 2" in line for line in two["details"])
    assert said[0] == "checks test_one.py: 4 passed, 0 skipped"


def test_tests_without_time_are_left_out(checking: ModuleType, folder: Path) -> None:
    rows = checking.run_tests(0.0, str)
    assert [row["passed"] for row in rows] == [0, 0]
    assert rows[0]["left_out"] == "2 of 2 processes did not finish in the time"


def test_a_test_that_hangs_is_ended(checking: ModuleType, folder: Path) -> None:
    (folder / "test_one.py").unlink()
    (folder / "test_two.py").write_text("import time\ndef test_slow():\n    time.sleep(60)\n")
    [row] = checking.run_tests(1.5, str)
    assert row["left_out"] == "1 of 1 processes did not finish in the time"
    assert "failed" not in row


def test_losses_are_judged(checking: ModuleType) -> None:
    row = {"losses": [4.0, 3.0001], "tolerance": 5e-5}
    checking.judge(row, [4.0, 3.0])
    assert row["difference"] == pytest.approx(1e-4 / 3)
    assert "failed" not in row
    row = {"losses": [4.0, float("nan")], "tolerance": 5e-5}
    checking.judge(row, [4.0, 3.0])
    assert "more than 5e-05" in row["failed"]


def test_every_way_to_compute_is_compared_with_numpy(
    checking: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(kernels: str, device: str, dtype: str, steps: int) -> list[float]:
        if kernels == "cublas":
            raise RuntimeError("no cuBLAS")
        wrong = kernels == "triton" and dtype == "float32"
        return [4.0, 3.01 if wrong else 3.0]

    monkeypatch.setattr(checking, "losses", losses)
    rows: list[dict[str, Any]] = []
    checking.parity(False, rows.append)
    ways = [f"{dtype} {who}" for dtype in checking.LOSSES for who in ("CuPy", "cuBLAS", "Triton")]
    assert [row["case"] for row in rows] == ["float32 NumPy", *ways]
    assert [row["case"] for row in rows if "failed" in row] == [
        "float32 cuBLAS",
        "float32 Triton",
        "bfloat16 cuBLAS",
    ]
    assert rows[2]["failed"] == "RuntimeError: no cuBLAS"


@needs_interpreter
def test_a_step_agrees_in_the_interpreter(checking: ModuleType) -> None:
    row = {"losses": checking.losses("triton", "cpu", "float32", 1), "tolerance": 2e-6}
    checking.judge(row, checking.losses("reference", "cpu", "float32", 1))
    assert "failed" not in row


@needs_interpreter
def test_a_dry_run_of_every_benchmark(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process; the whole script is `python benchmarks/gpu.py --dry`."""
    load("gpu_cases", monkeypatch)
    rows: list[dict[str, Any]] = []
    for part in gpu.SHARES:
        if part not in ("checks", "parity"):
            gpu.benchmark(part, 100.0, True, rows.append)
    assert not [row for row in rows if "failed" in row or "left_out" in row]
    assert {row["part"] for row in rows} == set(gpu.SHARES) - {"checks", "parity"}
    assert all("ours" in row["times"] for row in rows if row["part"] != "ceilings")
    json.dumps(rows)
    assert gpu.ceilings(rows).keys() == {"GB/s", "TFLOP/s"}


@needs_interpreter
def test_a_dry_run_of_the_script_writes_both_files(
    gpu: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert gpu.main(["--dry", "--parts", "adamw", "--minutes", "2"]) == 0
    result = json.loads((tmp_path / "out" / "gpu.json").read_text(encoding="utf-8"))
    assert {row["part"] for row in result["rows"]} == {"ceilings", "adamw"}
    text = (tmp_path / "out" / "gpu.md").read_text(encoding="utf-8")
    assert text.startswith("# The kernels on a GPU")
    assert "## All times" in text
    assert "Nothing failed" in capsys.readouterr().out


@needs_interpreter
def test_what_only_a_device_can_prove_on_a_stand_in(
    checking: ModuleType, fake_cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_cupy.install_kernels(monkeypatch)
    rows: list[dict[str, Any]] = []
    checking.machinery(rows.append, steps=3)
    assert [row["case"] for row in rows] == ["CUDA graph", "pinned copies", "memory figures"]
    assert not [row for row in rows if "failed" in row]


def test_what_is_wrong_on_a_device_is_said(
    checking: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {False: ([(4.0, 1.0), (3.0, 1.0)], []), True: ([(4.0, 1.0), (3.5, 1.0)], [])}
    monkeypatch.setattr(checking, "tiny_run", lambda steps, graphed: runs[graphed])
    monkeypatch.setattr(checking, "copies_differ", lambda: "copies [3] arrived otherwise")

    def fails() -> str:
        raise RuntimeError("an illegal address")

    monkeypatch.setattr(checking, "memory_is_wrong", fails)
    rows: list[dict[str, Any]] = []
    checking.machinery(rows.append, steps=2)
    assert [row["failed"] for row in rows] == [
        "step 2: (loss, norm) (3.0, 1.0) launched, (3.5, 1.0) replayed",
        "copies [3] arrived otherwise",
        "RuntimeError: an illegal address",
    ]
