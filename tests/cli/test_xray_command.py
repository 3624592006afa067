"""`tinygrad-llm xray`: the list, the tables, the files, bad input."""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest

from tinygrad_llm.cli import main
from tinygrad_llm.kernels import compile
from tinygrad_llm.kernels.compile import Report

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")

GOOD = Report(
    "softmax",
    "a row [at] once",
    "bf16",
    80,
    registers=32,
    shared=96 * 1024,
    shared_limit=163 * 1024,
    warps=4,
    resident_warps=4,
    max_warps=64,
    limited_by="shared memory",
    dots=1,
    tensor_cores={"mma.sync": 64},
    loads={4: 2, 16: 8},
    stores={16: 1},
    bytes=4096,
    flops=65536,
)
BAD = Report("softmax", "a row [at] once", "bf16", 90, error="No: no", faults=("it is No: no",))

KERNEL = '''
"""One kernel."""
from tinygrad_llm.kernels.compile import Specimen
from tinygrad_llm.kernels.language import tl, triton

@triton.jit
def _double(x, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + i, 2 * tl.load(x + i))

def specimens(dtype):
    if dtype != "fp16":
        yield Specimen("double", _double, {"x": f"*{dtype}", "BLOCK": 1024})
'''


@pytest.fixture
def pretend(monkeypatch):
    """The compiler gives these reports, whatever is asked for."""

    def pretend(*reports):
        monkeypatch.setattr(compile, "kernels", lambda: {"softmax": "e^x / Σ e^x"})
        monkeypatch.setattr(compile, "available", lambda: True)
        monkeypatch.setattr(compile, "xray", lambda *request: iter(reports))

    return pretend


def test_the_list(pretend, capsys, monkeypatch):
    pretend()
    assert main(["xray"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["softmax  e^x / Σ e^x"]
    assert main(["xray", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernel"] == "softmax"
    monkeypatch.setattr(compile, "kernels", dict)
    assert main(["xray"]) == 0
    assert capsys.readouterr().out == "there are no kernels yet\n"


def test_the_table(pretend, capsys):
    pretend(GOOD)
    assert main(["xray", "softmax"]) == 0
    out = capsys.readouterr().out
    assert not CONTROL.search(out)
    title, head, *rows, verdict, _ = out.splitlines()
    assert title == "softmax: a row [at] once, bf16"
    assert head.split() == ["sm_80"]
    table = dict(re.split(r" {2,}", row, maxsplit=1) for row in rows)
    assert table == {
        "registers": "32",
        "stack, bytes": "0",
        "spills, bytes": "0",
        "shared memory": "96 of 163 KiB",
        "tensor cores": "64 mma.sync",
        "loads × bytes": "8×16 2×4",
        "stores × bytes": "1×16",
        "warps": "4",
        "warps per SM": "4 of 64 (shared memory)",
        "bytes": "4,096",
        "FLOPs": "65,536",
        "FLOPs per byte": "16",
    }
    assert verdict == "sm_80: good"


def test_a_fault_is_exit_status_1(pretend, capsys):
    pretend(dataclasses.replace(GOOD, shared=32), BAD)
    assert main(["xray", "softmax"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == ["sm_80: good", "sm_90: it is No: no", ""]
    assert lines[1].split() == ["sm_80"]
    assert re.split(r" {2,}", lines[5]) == ["shared memory", "32 bytes of 163 KiB"]


def test_json_is_an_object_a_specimen(pretend, capsys):
    pretend(GOOD, BAD)
    assert main(["xray", "softmax", "--json"]) == 1
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["tensor_cores"] == {"mma.sync": 64}
    assert first["loads"] == {"4": 2, "16": 8}
    assert first["verdict"] == "good"
    assert second["verdict"] == "it is No: no"
    assert "ptx" not in first


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sofmax"], "unknown kernel 'sofmax': did you mean 'softmax'?"),
        (["softmax", "--arch", "80,91"], "unknown --arch '91': there is 75, 80, 86"),
        (["softmax", "--dtype", "bfloat16"], "unknown --dtype 'bfloat16': did you mean 'bf16'?"),
        (["softmax", "--ptx", "no/where.ptx"], "no/where.ptx: No such file or directory"),
        (["mine.py"], "there is no file mine.py"),
        (["softmax", "--arhc", "80"], "did you mean --arch?"),
        (["softmax"], "softmax has no specimens in bf16 for 80,90"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words, pretend, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pretend()
    assert main(["xray", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_triton_the_install_command(pretend, capsys, monkeypatch):
    pretend(GOOD)
    monkeypatch.setattr(compile, "available", lambda: False)
    assert main(["xray", "softmax"]) == 2
    assert "pip install triton" in capsys.readouterr().err
    assert main(["xray"]) == 0  # the list needs none


@pytest.mark.skipif(not compile.available(), reason="Triton is not installed")
def test_a_kernel_of_ones_own(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(KERNEL)
    files = ["--ptx", "out.ptx", "--sass", "out.sass"]
    assert main(["xray", "mine.py", "--arch", "sm_80", "--dtype", "fp32,bf16", *files]) == 0
    out = capsys.readouterr().out
    assert "mine.py: double, fp32" in out
    assert "mine.py: double, bf16" in out
    assert out.count("sm_80: good") == 2
    ptx, sass = (Path(file).read_text() for file in ("out.ptx", "out.sass"))
    assert ptx.count("// mine.py: double, ") == sass.count("// mine.py: double, ") == 2
    assert ptx.count(".target sm_80") == 2
    assert "EXIT" in sass
    assert main(["xray", "mine.py", "--dtype", "fp16"]) == 2
    assert "no specimens in fp16" in capsys.readouterr().err


def test_doctor_says_where_kernels_would_run(capsys, monkeypatch):
    def line():
        assert main(["doctor"]) == 0
        return next(line for line in capsys.readouterr().out.split("\n") if line[:7] == "kernels")

    for name in [name for name in os.environ if name.startswith("TINYGRAD_LLM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TINYGRAD_LLM_KERNELS", "interpret")
    if compile.available():
        assert "interpreter" in line()
        assert "TINYGRAD_LLM_KERNELS=interpret" in line()
        monkeypatch.setenv("TINYGRAD_LLM_KERNELS", "sometimes")
        assert "'sometimes'" in line()
    else:
        assert "not installed" in line()
