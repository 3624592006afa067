"""Which mode kernels get, and that it is settled before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tinygrad_llm.kernels import mode

SETTINGS = ("TINYGRAD_LLM_KERNELS", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """machine(gpu, **environment): one with or without a GPU, and with these variables only."""

    def set_up(gpu: bool, **environment: str) -> mode.Mode:
        for name in SETTINGS:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(mode.glob, "glob", lambda pattern: ["/dev/nvidia0"] if gpu else [])
        monkeypatch.setattr(mode.os.path, "exists", lambda path: False)
        return mode.choose()

    return set_up


def test_the_first_that_decides(machine) -> None:
    assert machine(gpu=True).name == "gpu"
    assert machine(gpu=False).name == "interpret"
    assert "no NVIDIA GPU" in machine(gpu=False).why
    assert machine(gpu=True, CUDA_VISIBLE_DEVICES="").name == "interpret"
    assert machine(gpu=True, CUDA_VISIBLE_DEVICES="1").name == "gpu"
    assert machine(gpu=True, TRITON_INTERPRET="1").name == "interpret"
    assert machine(gpu=False, TRITON_INTERPRET="0").name == "gpu"
    both = machine(gpu=True, TRITON_INTERPRET="0", TINYGRAD_LLM_KERNELS="interpret")
    assert both == ("interpret", "TINYGRAD_LLM_KERNELS=interpret")
    assert machine(gpu=False, TRITON_INTERPRET="1", TINYGRAD_LLM_KERNELS="GPU").name == "gpu"
    assert machine(gpu=True, TINYGRAD_LLM_KERNELS="auto").name == "gpu"
    with pytest.raises(ValueError, match="'gpu', 'interpret' or 'auto', got 'cpu'"):
        machine(gpu=True, TINYGRAD_LLM_KERNELS="cpu")


def test_doctor_is_told_mode_and_reason(machine, monkeypatch) -> None:
    machine(gpu=False)
    assert "interpreter" in mode.describe()
    assert "no NVIDIA GPU" in mode.describe()
    machine(gpu=True)
    assert "on the GPU" in mode.describe()
    monkeypatch.setattr(mode.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in mode.describe()


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True
    )  # fmt: skip


@pytest.mark.parametrize("wanted", ["gpu", "interpret"])
def test_triton_is_imported_in_that_mode_and_nothing_else_with_it(wanted) -> None:
    done = run(
        "import sys; from tinygrad_llm.kernels import mode; assert 'triton' not in sys.modules\n"
        "from tinygrad_llm.kernels.language import INTERPRETED, tl\n"
        "from tinygrad_llm.kernels import softmax\n"
        "print(INTERPRETED, type(tl.sum).__name__, type(softmax._forward_online).__name__)\n"
        "print({'torch', 'cupy'} & set(sys.modules))",
        TINYGRAD_LLM_KERNELS=wanted,
        TRITON_INTERPRET="1",  # inherited, as from a test
    )
    assert done.returncode == 0, done.stderr
    kind = "InterpretedFunction" if wanted == "interpret" else "JITFunction"
    assert done.stdout.split() == [str(wanted == "interpret"), kind, kind, "set()"]


def test_a_triton_that_was_imported_earlier_in_another_mode_is_refused() -> None:
    late = "import triton; import tinygrad_llm.kernels.language"
    done = run(late, TINYGRAD_LLM_KERNELS="interpret")
    assert "RuntimeError: Triton was imported before" in done.stderr
    assert "TINYGRAD_LLM_KERNELS to gpu" in done.stderr
    assert run(late, TINYGRAD_LLM_KERNELS="gpu").returncode == 0
    assert run(late, TINYGRAD_LLM_KERNELS="interpret", TRITON_INTERPRET="1").returncode == 0
