"""What the compiler makes of kernels: small ones with known faults, then all of ours."""

import dataclasses
from importlib.metadata import version
from pathlib import Path

import pytest

from tinygrad_llm.kernels import compile
from tinygrad_llm.kernels.compile import Known, Report, find, kernels, occupancy, xray

OWN = str(Path(__file__).with_name("compiled_kernels.py"))


@pytest.fixture(scope="module")
def found():
    """(specimen, dtype, arch) -> its report, whatever mode this process has for its kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("TINYGRAD_LLM_KERNELS", "interpret")
        reports = list(xray([OWN], (75, 80, 90), ("bf16", "fp32")))
    return {(r.specimen, r.dtype, r.arch): r for r in reports}


def test_loads_are_as_wide_as_the_sizes_allow(found):
    for dtype, loads in (("bf16", {16: 1}), ("fp32", {16: 2})):
        for arch in (75, 80, 90):
            report = found["add", dtype, arch]
            assert report.loads == report.stores == loads
            assert report.verdict == "good"
            assert 0 < report.registers < 64
            assert (report.stack, report.spills, report.shared, report.dots) == (0, 0, 0, 0)
            assert report.warps == 4
            assert report.resident_warps == report.max_warps == (32 if arch == 75 else 64)
            assert (report.bytes, report.flops) == (2048, 1024)
    odd = found["add, odd", "bf16", 80]
    assert odd.loads == odd.stores == {2: 8}
    assert odd.notes == ("scalar loads", "scalar stores")
    assert odd.faults == ()


def test_tables_of_the_compiler_are_no_loads(found):
    assert found["sine", "bf16", 80].loads == {16: 1}  # sin reads digits of 2/π


def test_atomics_and_absent_arrays(found):
    assert found["sum", "bf16", 90].atomics == 1
    assert found["sum", "bf16", 90].loads == {16: 1}
    assert found["sum, masked", "bf16", 90].loads == {8: 1, 16: 1}
    assert found["add", "bf16", 90].atomics == 0


def test_tensor_cores_by_kind(found):
    for dtype in ("bf16", "fp32"):
        assert {*found["matmul", dtype, 80].tensor_cores} == {"mma.sync"}
        assert {*found["matmul", dtype, 90].tensor_cores} == {"wgmma"}
        assert found["matmul", dtype, 80].faults == ()
        assert found["matmul", dtype, 80].dots == 1
    small = found["small", "bf16", 90]
    assert {*small.tensor_cores} == {"mma.sync"}
    assert "mma.sync where wgmma is faster" in small.notes
    exact = found["matmul, exact", "fp32", 80]
    assert (exact.dots, exact.tensor_cores, exact.faults) == (0, {}, ())
    (fault,) = found["small", "bf16", 75].faults
    assert fault.startswith("no tensor cores although there is a tl.dot")


def test_spills(found):
    report = found["few registers", "bf16", 80]
    assert report.registers <= 40
    assert report.spills > 0
    assert report.faults == (f"spills {report.spills} bytes a thread",)
    known = found["few, known", "bf16", 80]
    assert known.faults == ()
    assert known.verdict == f"{report.faults[0]} (known: we took its registers away)"
    assert found["few, too few", "bf16", 80].faults == report.faults


def test_shared_memory(found):
    for arch, limit in ((75, 64), (80, 163), (90, 227)):
        report = found["stages", "bf16", arch]
        assert report.shared_limit == limit * 1024
        if arch >= 80:  # the older one has no copies that are waited for later
            assert report.shared > report.shared_limit
            assert report.faults == (
                f"{report.shared} bytes of shared memory, {report.shared_limit} are the limit",
            )
            assert (report.resident_warps, report.limited_by) == (0, "shared memory")


def test_what_does_not_compile(found):
    (fault,) = found["two lengths", "bf16", 80].faults
    assert fault.startswith("does not compile: CompilationError")
    assert "1024 and 2048" in fault
    (fault,) = found["an argument less", "bf16", 80].faults
    assert "BLOCK" in fault


def test_specimens_are_made_for_their_architectures(found):
    assert {arch for name, _, arch in found if name == "small"} == {75, 90}
    assert {arch for name, _, arch in found if name == "few registers"} == {80}


CRASHING = """
import os, sys
from tinygrad_llm.kernels.compile import Known, Specimen
class Crash:
    def warmup(self, **arguments):
        print("nothing that anyone asked for", flush=True)
        print("LLVM ERROR: out of luck", file=sys.stderr, flush=True)
        os.abort()
class Refuse:
    def warmup(self, **arguments):
        raise ValueError("first line\\nno, thank you")
def specimens(dtype):
    yield Specimen("one", Refuse(), {})
    yield Specimen("two", Crash(), {}, known=(Known("does not compile", "never reached"),))
    yield Specimen("three", Refuse(), {}, known=(Known("does not compile", "it refuses"),))
"""


def test_a_crash_of_the_compiler_is_one_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "json.py"  # called as a module of Python's is
    path.write_text("import beside\n" + CRASHING)
    (tmp_path / "beside.py").touch()
    one, two, three = xray([str(path)], (80,), ("fp16",))
    assert one.faults == ("does not compile: ValueError: no, thank you",)
    assert two.faults == ("does not compile: the compiler crashed (LLVM ERROR: out of luck)",)
    assert three.faults == ()
    assert three.verdict == "does not compile: ValueError: no, thank you (known: it refuses)"


def test_a_file_that_cannot_be_used(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def specimens(dtype):\n    raise KeyError('all wrong')\n")
    with pytest.raises(RuntimeError, match=r"(?s)cannot be compiled.*KeyError: 'all wrong'"):
        list(xray([str(path)], (80,), ("fp16",)))
    twice = CRASHING.replace('"two"', '"one"').replace("Crash()", "Refuse()")
    path.write_text(twice)
    with pytest.raises(RuntimeError, match="two specimens are called"):
        list(xray([str(path)], (80,), ("fp16",)))


def test_stopping_half_way_ends_the_worker():
    reports = xray([OWN], (80,), ("fp16",))
    assert next(reports).specimen == "add"
    reports.close()  # a process left behind would warn: it is an error here


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "expected"),
    [
        (80, 32, 0, 4, (64, "warps")),
        (80, 255, 0, 4, (8, "registers")),
        (80, 168, 0, 8, (8, "registers")),  # 12 warps' worth of registers: one program of 8
        (80, 33, 0, 4, (48, "registers")),  # 1280 a warp: 51 warps, by fours 48
        (90, 32, 96 * 1024, 8, (16, "shared memory")),
        (90, 32, 227 * 1024, 8, (8, "shared memory")),
        (90, 32, 227 * 1024 + 1, 8, (0, "shared memory")),
        (80, 16, 0, 1, (32, "programs")),
        (75, 64, 64 * 1024, 4, (4, "shared memory")),
        (89, 40, 0, 8, (48, "warps")),
    ],
)
def test_occupancy(arch, registers, shared, warps, expected):
    assert occupancy(arch, registers, shared, warps) == expected


def test_what_is_asked_for_must_exist(tmp_path, monkeypatch):
    monkeypatch.setattr(compile, "kernels", lambda: {"softmax": "", "matmul": ""})
    with pytest.raises(ValueError, match="unknown kernel 'sofmax': did you mean 'softmax'"):
        xray(["sofmax"])
    with pytest.raises(ValueError, match="there is softmax, matmul"):
        find("zzz")
    with pytest.raises(ValueError, match="unknown architecture 91: there is 75, 80"):
        xray([OWN], archs=(91,))
    with pytest.raises(ValueError, match="unknown dtype 'bfloat16': did you mean 'bf16'"):
        xray([OWN], dtypes=("bfloat16",))
    with pytest.raises(ValueError, match="there is no file"):
        find(str(tmp_path / "none.py"))
    path = tmp_path / "mine.py"
    path.write_text("x = 1\n")
    with pytest.raises(ValueError, match="no function specimens"):
        find(str(path))
    path.write_text("def specimens(:\n")
    with pytest.raises(ValueError, match="is not Python"):
        find(str(path))
    monkeypatch.setattr(compile, "available", lambda: False)
    with pytest.raises(RuntimeError, match="pip install triton"):
        xray([OWN])


def test_a_known_fault_is_one_of_ours_and_has_a_reason():
    with pytest.raises(ValueError, match="'spilling'"):
        Known("spilling", "it does")
    with pytest.raises(ValueError, match="reason"):
        Known("spills", "")
    assert Known("spills", "why", archs=(80,)).covers("spills", 80, 4)
    assert not Known("spills", "why", archs=(80,)).covers("spills", 90, 4)
    assert not Known("spills", "why").covers("shared memory", 80, 4)


def test_the_verdict():
    report = Report("k", "s", "bf16", 80)
    assert report.verdict == "good"
    assert dataclasses.replace(report, faults=("a",), notes=("b",)).verdict == "a; b"


@pytest.mark.parametrize("kernel", kernels())
def test_every_kernel_compiles_well(kernel):
    """For sm_80 and sm_90, in all dtypes: no spills, tensor cores used, memory within the limit."""
    reports = list(xray([kernel], (80, 90)))
    assert {report.arch for report in reports} == {80, 90}
    faults = {(r.specimen, r.dtype, r.arch): r.faults for r in reports if r.faults}
    if tuple(map(int, version("triton").split(".")[:2])) < (3, 9):
        # Its ptxas spills a little where the newest does not.
        spills = {(r.specimen, r.dtype, r.arch): r.spills for r in reports}
        faults = {key: found for key, found in faults.items() if not 0 < spills[key] <= 64}
    assert not faults
