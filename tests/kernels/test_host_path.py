"""The way from arrays to CUDA's launch call, with no GPU: real Triton, real compilation for sm_90,
and a CUDA library and a CuPy of our own that record what they are asked (fakes/)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import triton

FAKES = Path(__file__).parent / "fakes"
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None or not sys.platform.startswith("linux"),
    reason="the recording CUDA library is compiled with gcc",
)

PRELUDE = """
import ctypes, os, sys, threading
import numpy as np, ml_dtypes, cupy
from tinygrad_llm.kernels import launch as launching
from tinygrad_llm.kernels.language import tl, triton
from tinygrad_llm.kernels.launch import launch
import kernel_of_the_test as kernels

cuda = cupy.libcuda
cuda.fake_parameter.restype = ctypes.c_ulonglong

def parameters(n):
    return [cuda.fake_parameter(i) for i in range(n)]

def last_launch():
    out = (ctypes.c_ulonglong * 6)()
    cuda.fake_last_launch(out)
    return dict(zip(("x", "y", "z", "threads", "shared", "stream"), out))

def refused(error, *args, **constants):
    try:
        launch(*args, **constants)
    except error as found:
        return str(found)
    raise AssertionError("not refused")
"""

# In a file: Triton reads a kernel's source.
KERNEL = """
from tinygrad_llm.kernels.language import tl, triton

@triton.jit
def add(x, y, n, alpha, flag, nothing, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + i, mask=i < n)
    tl.store(y + i, (a * alpha).to(y.dtype.element_ty), mask=(i < n) & flag)

@triton.jit
def described(x, y, n, BLOCK: tl.constexpr):
    # A tensor descriptor made in the kernel takes scratch memory.
    source = tl.make_tensor_descriptor(x, [n, n], [n, 1], [BLOCK, BLOCK])
    target = tl.make_tensor_descriptor(y, [n, n], [n, 1], [BLOCK, BLOCK])
    target.store([0, 0], source.load([0, 0]))
"""


@pytest.fixture(scope="session")
def libcuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the recording libcuda.so.1."""
    folder = tmp_path_factory.mktemp("cuda")
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    command = ["gcc", "-shared", "-fPIC", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
    command += ["-o", str(folder / "libcuda.so.1"), str(FAKES / "libcuda.c")]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture(scope="session")
def run(libcuda: Path, tmp_path_factory: pytest.TempPathFactory):
    """run(script, **environment): its standard output, from a process with the fakes."""
    folder = tmp_path_factory.mktemp("host-path")
    (folder / "kernel_of_the_test.py").write_text(KERNEL)
    common = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(FAKES), str(folder), str(ROOT)]),
        "FAKE_LIBCUDA": str(libcuda / "libcuda.so.1"),
        "TRITON_LIBCUDA_PATH": str(libcuda),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TINYGRAD_LLM_CACHE": str(folder / "cache"),
        "TINYGRAD_LLM_KERNELS": "gpu",
    }

    def in_process(script: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(script)],
            env=common | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return in_process


LAUNCHERS = {"Triton's launcher": {}, "ctypes": {"CC": "/no/compiler"}}


@pytest.mark.parametrize("environment", LAUNCHERS.values(), ids=LAUNCHERS)
def test_arguments_grid_and_stream_arrive(run, environment) -> None:
    out = run(
        """
        x, y = cupy.empty(4096, ml_dtypes.bfloat16), cupy.empty(4096)
        cuda.fake_expect_parameters(7)
        with cupy.cuda.Stream(77):
            launch(kernels.add, (2, 3), x, y, 4096, 0.5, True, None,
                   WIDE=False, BLOCK=1024, num_warps=8)
        px, py, n, alpha, flag, scratch, profile = parameters(7)
        assert (px, py) == (x.data.ptr, y.data.ptr)
        assert n & 0xFFFFFFFF == 4096 and flag & 1 == 1 and scratch == profile == 0
        assert np.uint32(alpha & 0xFFFFFFFF).view(np.float32) == 0.5
        assert last_launch() | {"shared": 0} == dict(
            x=2, y=3, z=1, threads=256, shared=0, stream=77)
        launch(kernels.add, 0, x, y, 4096, 0.5, True, None, WIDE=False, BLOCK=1024, num_warps=8)
        assert cuda.fake_launches() == 1  # no program, no launch
        from triton.runtime import driver
        print(type(driver.active.utils).__name__, "torch" in sys.modules)
        """,
        **environment,
    )
    assert out.split() == ["CtypesUtilities" if environment else "CudaUtils", "False"]


def test_it_compiles_for_what_triton_specialises_on_and_for_nothing_else(run) -> None:
    run(
        """
        x, y = cupy.empty(4096), cupy.empty(4096)
        off = cupy.ndarray(x.host[1:])
        def add(x=x, y=y, n=4096, alpha=0.5, flag=True, nothing=None, **constants):
            constants = dict(WIDE=False, BLOCK=128, num_warps=1) | constants
            before = len(launching._ready)
            launch(kernels.add, 1, x, y, n, alpha, flag, nothing, **constants)
            return len(launching._ready) - before

        assert add() == 1
        for same in (dict(), dict(n=32), dict(alpha=2.0), dict(flag=False), dict(y=cupy.empty(9)),
                     dict(n=np.int64(64)), dict(alpha=np.float32(1))):
            assert add(**same) == 0, same
        half = cupy.empty(4096, np.float16)
        for new in (dict(x=off), dict(n=33), dict(n=1), dict(n=2**31), dict(n=2**33 + 1),
                    dict(x=half), dict(x=cupy.empty(9, ml_dtypes.bfloat16)), dict(nothing=3),
                    dict(BLOCK=256), dict(WIDE=True), dict(num_warps=2), dict(alpha=2)):
            assert add(**new) == 1, new
            assert add(**new) == 0, new
        # An offset array must not be read as if 16 divided its address.
        attributes = [ready.keep[0].src.attrs for ready in launching._ready.values()]
        assert attributes[0][0,] == [["tt.divisibility", 16]] and not attributes[1][0,]
        cupy.cuda.runtime.setDevice(1)
        assert add(x=cupy.empty(8), y=cupy.empty(8)) == 1
        """
    )


def test_what_cannot_be_launched_is_refused_in_a_sentence(run) -> None:
    run(
        """
        x, y = cupy.empty(64), cupy.empty(64)
        args, constants = (64, 0.5, True, None), dict(WIDE=False, BLOCK=64)
        host = refused(ValueError, kernels.add, 1, np.zeros(64, np.float32), y, *args, **constants)
        assert "add() runs on cuda:0, but an array is in the CPU's memory" in host
        other = cupy.ndarray(np.zeros(64, np.float32), device_id=1)
        assert "is on cuda:1" in refused(ValueError, kernels.add, 1, other, y, *args, **constants)
        assert "got list" in refused(TypeError, kernels.add, 1, [1, 2], y, *args, **constants)
        assert "got 5 arguments" in refused(TypeError, kernels.add, 1, x, y, 1, 2, 3, **constants)
        assert "float BLOCK=64.0" in refused(
            TypeError, kernels.add, 1, x, y, *args, WIDE=False, BLOCK=64.0)
        assert "65535" in refused(ValueError, kernels.add, (1, 2**16), x, y, *args, **constants)
        assert "grid" in refused(ValueError, kernels.add, (1, 2, 3, 4), x, y, *args, **constants)
        assert "grid" in refused(ValueError, kernels.add, -1, x, y, *args, **constants)
        assert cuda.fake_launches() == 0
        """
    )


@pytest.mark.parametrize("environment", LAUNCHERS.values(), ids=LAUNCHERS)
def test_threads_have_a_context_and_scratch_memory(run, environment) -> None:
    """A new thread has no CUDA context, and does not see the allocator that another one set."""
    run(
        """
        x, y = cupy.empty((64, 64)), cupy.empty((64, 64))
        cuda.fake_expect_parameters(5)
        scratch, errors = [], []
        def work():
            try:
                launch(kernels.described, 1, x, y, 64, BLOCK=32)
                scratch.append(parameters(4)[3])
            except BaseException as error:
                errors.append(error)
        for _ in range(3):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        work()
        assert not errors, errors
        assert cuda.fake_launches() == 4 and all(p and p % 128 == 0 for p in scratch), scratch
        from triton.runtime import _allocation
        assert isinstance(_allocation._allocator.get(), _allocation.NullAllocator)
        """,
        **environment,
    )


def test_a_compiler_that_fails_is_said_and_made_do_without(run, tmp_path) -> None:
    run(
        """
        import warnings
        from tinygrad_llm.kernels import driver
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            ours = driver.activate()
        assert type(ours.utils).__name__ == "CtypesUtilities"
        assert "launcher could not be built" in str(said[0].message)
        """,
        CC="false",
        TRITON_CACHE_DIR=str(tmp_path),  # where none was built before
    )


def test_a_driver_of_cuda_12_gets_programs_of_cuda_12(run) -> None:
    run(
        """
        from tinygrad_llm.kernels import driver
        from triton.backends.nvidia.compiler import get_ptxas
        driver.activate()
        assert all(get_ptxas(arch).version.startswith("12.") for arch in (80, 90, 100))
        """,
        FAKE_DRIVER_VERSION="12040",
    )


def test_a_torch_in_the_same_process_changes_nothing_for_us(run) -> None:
    """Ours go to CuPy's stream, kernels of others to PyTorch's, under one driver."""
    run(
        """
        import types
        torch = types.ModuleType("torch")
        torch.Tensor = type("Tensor", (), {})
        torch.cuda = types.SimpleNamespace(
            is_initialized=lambda: True,
            current_stream=lambda device: types.SimpleNamespace(cuda_stream=55))
        sys.modules["torch"] = torch
        x, y = cupy.empty(64), cupy.empty(64)
        with cupy.cuda.Stream(66):
            launch(kernels.add, 1, x, y, 64, 0.5, True, None, WIDE=False, BLOCK=64)
            assert last_launch()["stream"] == 66
            theirs = [launching.Pointer(x), launching.Pointer(y)]
            kernels.add[(1,)](*theirs, 64, 0.5, True, None, WIDE=False, BLOCK=64)
            assert last_launch()["stream"] == 55
        """
    )


def test_softmax_goes_the_whole_way(run) -> None:
    """Forward and backward launch, after tuning, what their grids say."""
    out = run(
        """
        from tinygrad_llm.kernels import softmax, tune
        lines = []
        with tune.reporting(lines.append):
            y, saved = softmax.forward(cupy.empty((8, 100), ml_dtypes.bfloat16), causal=True)
            tuned = len(lines)
            launches = cuda.fake_launches()
            softmax.forward(cupy.empty((7, 99), ml_dtypes.bfloat16), causal=True)
            assert cuda.fake_launches() == launches + 1 and len(lines) == tuned  # the same bucket
        with tune.tuning(False):
            launches = cuda.fake_launches()
            softmax.backward(cupy.empty((8, 100)), *saved, causal=True)
            assert cuda.fake_launches() == launches + 1
        assert y.dtype == ml_dtypes.bfloat16 and y.shape == (8, 100)
        print(lines[0])
        print(lines[-1])
        """
    )
    first, last = out.splitlines()
    assert "tuning softmax._forward_online bfloat16 (8, 128): 1 of" in first
    assert last.startswith("tuned softmax._forward_online")


def test_a_captured_launch_gets_the_address_of_what_will_change(run) -> None:
    run(
        """
        from tinygrad_llm.kernels import dropout, embedding, tune
        x, where, ids = cupy.empty(4096), cupy.empty(1, np.int64), cupy.empty(300, np.int64)
        stream = cupy.cuda.Stream(88)
        stream.capturing = True
        cuda.fake_expect_parameters(9)
        with stream, tune.tuning(False):
            y, _ = dropout.forward(x, p=0.5, seed=3, offset=where)
            assert last_launch()["stream"] == 88
            assert {x.data.ptr, y.data.ptr, where.data.ptr} <= set(parameters(9))
            cuda.fake_expect_parameters(0)  # the next kernels have fewer
            before = cuda.fake_launches()
            embedding._order(ids)  # CuPy's own sort would wait
            assert cuda.fake_launches() == before + 1 and last_launch()["x"] == 3
        made = len(launching._ready)
        for offset in (1, 16, 7):  # numbers as they come: one kernel for all of them
            dropout.forward(x, p=0.5, seed=3, offset=offset)
        compiled = {id(r.keep[0]) for r in list(launching._ready.values())[made:]}
        assert len(compiled) == 1, compiled
        """,
        TINYGRAD_LLM_TUNE="0",
    )


TUNING = """
from tinygrad_llm.kernels import tune
x, y = cupy.empty(64), cupy.empty(64)
candidates = [dict(BLOCK=64, num_warps=w) for w in (32, 4, 2, 8)]
runs = []
def run(config):
    runs.append(config["num_warps"])
    launch(kernels.add, 1, x, y, 64, 0.5, True, None, WIDE=False, **config)
"""


def test_tuning_takes_the_fastest_and_remembers_it(run, tmp_path) -> None:
    """Here a launch takes as long as it has threads, and 32 warps are more than there may be."""
    cache = {"TINYGRAD_LLM_CACHE": str(tmp_path)}
    run(
        TUNING
        + """
with tune.tuning(False):
    assert tune.choose(kernels.add, candidates, x, (100,), run)["num_warps"] == 32 and not runs
stream = cupy.cuda.Stream()
stream.capturing = True
with stream:
    assert tune.choose(kernels.add, candidates, x, (100,), run)["num_warps"] == 32 and not runs
assert tune.choose(kernels.add, candidates, x, (100,), run) == dict(BLOCK=64, num_warps=2)
measured = len(runs)
for again in (65, 128):
    assert tune.choose(kernels.add, candidates, x, (again,), run)["num_warps"] == 2
assert len(runs) == measured
try:
    tune.choose(kernels.add, [dict(BLOCK=64, num_warps=32)] * 2, x, (1,), run)
except RuntimeError as error:
    assert "none of the 2 configurations" in str(error)
else:
    raise AssertionError
""",
        **cache,
    )
    (file,) = (tmp_path / "kernels").iterdir()
    assert file.name == f"Fake-GPU-90-triton-{triton.__version__}.json"
    (key,) = entries = json.loads(file.read_text())
    assert key.startswith("kernel_of_the_test.add float32 (128,) @ ")
    assert entries[key] == {"config": {"BLOCK": 64, "num_warps": 2}, "ms": 64.0}

    # Another process reads it, also with tuning off; another dtype and option are other keys.
    run(
        TUNING
        + """
with tune.tuning(False):
    assert tune.choose(kernels.add, candidates, x, (100,), run)["num_warps"] == 2 and not runs
assert list(tune.table()) and len(tune.table()) == 1
half = cupy.empty(64, np.float16)
tune.choose(kernels.add, candidates, half, (100,), run, causal=True)
assert runs and len(tune.table()) == 2
""",
        **cache,
    )

    # A file that is broken is said so, and mended; a key that fits no candidate is measured anew.
    for broken in ("{", "[]", '{"a": {"config": 3, "ms": 1}}'):
        file.write_text(broken)
        run(
            TUNING
            + """
import warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    tune.choose(kernels.add, candidates, x, (100,), run)
assert "cannot be used" in str(said[0].message) and len(said) == 1 and len(tune.table()) == 1
""",
            **cache,
        )
    entries[key]["config"] = {"BLOCK": 3}
    file.write_text(json.dumps(entries))
    run(TUNING + "assert tune.choose(kernels.add, candidates, x, (100,), run)['num_warps'] == 2")


def test_tuning_is_switched_off_by_the_environment(run, tmp_path) -> None:
    run(
        TUNING
        + "assert tune.choose(kernels.add, candidates, x, (100,), run)['num_warps'] == 32\n"
        + "assert not runs",
        TINYGRAD_LLM_TUNE="0",
        TINYGRAD_LLM_CACHE=str(tmp_path),
    )
