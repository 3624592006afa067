"""What this machine has, and where a run would compute."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tinygrad_llm import backend, dispatch
from tinygrad_llm.data import cache
from tinygrad_llm.kernels import mode
from tinygrad_llm.train.memory import readable


def choose_device(wanted: str = "auto") -> tuple[str, str]:
    """(device, why): 'auto' is the GPU where CuPy sees one, the CPU otherwise.

    A device asked for by name that is not there is an error, never a silent change to another:
    ValueError says what is missing.
    """
    if wanted == "auto":
        if importlib.util.find_spec("cupy") is None:
            return "cpu", "CuPy is not installed, so no GPU is looked for"
        try:
            backend.cupy()
        except RuntimeError as error:
            return "cpu", str(error)
        return "cuda", "CuPy sees a GPU"
    kind, _, index = wanted.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {wanted!r}")
    if kind == "cuda":
        try:
            backend.cupy()
        except RuntimeError as error:
            raise ValueError(str(error)) from error
    return wanted, "asked for"


def facts() -> Iterator[tuple[str, str]]:
    """(what, how it is) pairs about Python, the arrays, the GPU and the engine's own state."""
    yield "tinygrad-llm", f"{_version('tinygrad-llm')} in {Path(__file__).parents[1]}"
    yield "Python", f"{platform.python_version()} ({sys.executable})"
    yield "system", f"{platform.system()} {platform.machine()}, {_cores()} CPU cores usable"
    yield "NumPy", np.__version__
    yield "BLAS", _blas()
    yield "ml_dtypes", _version("ml_dtypes")
    for name in ("tokenizers", "safetensors", "rich", "tyro", "matplotlib"):
        yield name, _version(name)
    yield "CuPy", _distribution("cupy")
    yield "Triton", _distribution("triton")
    yield "kernels", _kernels()
    yield "GPU", _gpus()
    yield from _about_gpus()
    device, why = choose_device()
    yield "device", f"{device} ({why})"
    yield "default dtype", str(backend.default_dtype())
    yield "memory", _memory()
    yield "random stream", f"Philox4x32-10, {backend.random.state()}"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _distribution(module: str) -> str:
    """cupy-cuda13x 14.2.0: the distribution that holds a module, without importing it."""
    if importlib.util.find_spec(module) is None:
        return "not installed"
    names = importlib.metadata.packages_distributions().get(module, [])
    return ", ".join(f"{name} {_version(name)}" for name in sorted(set(names))) or "installed"


def _blas() -> str:
    """openblas 0.3.29, 2 threads"""
    info = np.show_config(mode="dicts")["Build Dependencies"]["blas"]  # pyright: ignore[reportOptionalSubscript]
    threads = backend.blas_threads()
    known = f"{threads} threads" if threads else "threads: as its environment variables say"
    return f"{info.get('name', 'unknown')} {info.get('version', '')}, {known}"


def _gpus() -> str:
    if importlib.util.find_spec("cupy") is None:
        found = sorted(Path("/dev").glob("nvidia[0-9]*"))
        if found:
            return (
                f"{len(found)} NVIDIA, not usable without CuPy: "
                "pip install 'tinygrad-llm[cuda13]' (or [cuda12])"
            )
        return "none seen"
    try:
        runtime = backend.cupy().cuda.runtime
    except RuntimeError as error:
        return str(error)
    names = [
        runtime.getDeviceProperties(i)["name"].decode() for i in range(runtime.getDeviceCount())
    ]
    return ", ".join(names)


def _about_gpus() -> Iterator[tuple[str, str]]:
    """What each GPU has, what drives it, and what runs there; nothing where there is none."""
    if importlib.util.find_spec("cupy") is None:
        return
    try:
        cupy = backend.cupy()
    except RuntimeError:
        return
    runtime = cupy.cuda.runtime
    for i in range(runtime.getDeviceCount()):
        yield f"cuda:{i}", _about(cupy, i)
    driver, own = (_cuda(f()) for f in (runtime.driverGetVersion, runtime.runtimeGetVersion))
    older = "" if driver >= own else ": the driver is too old for this CuPy, install a newer one"
    yield "CUDA", f"{_dotted(driver)} by the driver, {_dotted(own)} by CuPy{older}"
    yield "on the GPU", _what_runs()
    yield "tuned", _tuned()


def _about(cupy: Any, index: int) -> str:
    """NVIDIA H100 80GB HBM3: 85.0 GB, 84.1 GB free; compute capability 9.0, 132 processors"""
    found = cupy.cuda.runtime.getDeviceProperties(index)
    with cupy.cuda.Device(index):
        free, total = cupy.cuda.runtime.memGetInfo()
    processors = found.get("multiProcessorCount")
    return (
        f"{found['name'].decode()}: {readable(total)}, {readable(free)} free; compute capability "
        f"{found['major']}.{found['minor']}" + (f", {processors} processors" if processors else "")
    )


def _cuda(version: int) -> tuple[int, int]:
    """13010 -> (13, 1)"""
    return version // 1000, version % 1000 // 10


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _what_runs() -> str:
    """The ops with kernels of ours, where they run on a GPU in this process."""
    if importlib.util.find_spec("triton") is None:
        return "CuPy and cuBLAS; kernels need Triton: pip install 'tinygrad-llm[cuda13]'"
    try:
        if mode.choose().name != "gpu":
            return "CuPy and cuBLAS: kernels do not run on the GPU in this process (see kernels)"
    except ValueError:
        return "CuPy and cuBLAS"
    ours = [rule.op for rule in dispatch.TABLE if rule.op not in dispatch.PRODUCTS]
    products = " and ".join(sorted(dispatch.PRODUCTS))
    return f"Triton for {', '.join(ours)}; for {products} cuBLAS, or Triton where it was faster"


def _tuned() -> str:
    """How many kernels were measured here before; Triton is not imported for that."""
    folder = cache.folder() / "kernels"
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if not files:
        return f"nothing yet: each kernel is measured at its first use, and kept in {folder}"
    counts = []
    for file in files:
        try:
            counts.append(f"{len(json.loads(file.read_text(encoding='utf-8')))} in {file.name}")
        except (OSError, ValueError):
            counts.append(f"{file.name} cannot be read")
    return f"{', '.join(counts)}, in {folder}"


def _kernels() -> str:
    """Where Triton kernels would run, and why; Triton is not imported for that."""
    try:
        return mode.describe()
    except ValueError as error:  # the variable that chooses says something else
        return str(error)


def physical_memory() -> int | None:
    """The bytes of memory of this machine, where the system says."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows; a system that does not know them
        return None


def _memory() -> str:
    if backend.memory_is_kept:
        return "freed blocks are kept for the next op (TINYGRAD_LLM_MALLOC=system turns that off)"
    return "freed blocks go back as the system's allocator likes"
