"""Triton's CUDA driver on top of CuPy: no PyTorch, CuPy's device, CuPy's current stream.

Triton asks its active driver for the device, its capability and a launcher. Its own driver wants
PyTorch for that (3.6), or knows no stream but the default one (3.9).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import _allocation
from triton.runtime import driver as active_driver

from tinygrad_llm import backend
from tinygrad_llm.kernels.language import triton

_lock = threading.Lock()


def activate() -> CupyDriver:
    """Make ours Triton's driver; a second call returns the one of the first."""
    with _lock:
        current = active_driver._active
        if not isinstance(current, CupyDriver):
            current = CupyDriver()
            active_driver.set_active(current)
        return current


class CupyDriver(nvidia.CudaDriver):
    """What `JITFunction` and `CompiledKernel` ask of a driver, answered by CuPy.

    `launch()` hands CuPy's stream to each kernel itself. Kernels of others, launched as
    `kernel[grid](…)`, get PyTorch's stream and device where PyTorch is in use in this process (it
    is never imported from here): theirs go on working beside ours.
    """

    def __init__(self) -> None:
        # CudaDriver's own __init__ imports PyTorch (3.6), or uses it where it is loaded (3.9).
        self.cupy = backend.cupy()
        runtime = self.cupy.cuda.runtime
        _assemble_for(runtime.driverGetVersion())
        self.utils, self.launcher_cls = _utilities()
        self.get_current_device: Callable[[], int] = runtime.getDevice
        self.set_current_device: Callable[[int], None] = runtime.setDevice
        self._capabilities: dict[int, tuple[int, int]] = {}

    def get_current_stream(self, device: int | None = None) -> int:
        torch = _torch()
        if torch is not None:
            return torch.cuda.current_stream(device).cuda_stream
        return self.cupy.cuda.get_current_stream().ptr

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        device = self.get_current_device() if device is None else device
        if device not in self._capabilities:
            digits = self.cupy.cuda.Device(device).compute_capability  # '90', '100'
            self._capabilities[device] = (int(digits[:-1]), int(digits[-1]))
        return self._capabilities[device]

    def get_current_target(self) -> GPUTarget:
        major, minor = self.get_device_capability()
        return GPUTarget("cuda", 10 * major + minor, 32)

    @staticmethod
    def is_active() -> bool:
        return True

    def get_active_torch_device(self) -> Any:
        return self._torchs().device("cuda", self.get_current_device())

    def get_device_interface(self) -> Any:
        return self._torchs().cuda

    def get_empty_cache_for_benchmark(self) -> Any:
        return self._torchs().empty(2**26, dtype=self._torchs().int, device="cuda")

    def allocate_default_profile_scratch(self, size: int, alignment: int, stream: Any) -> Any:
        return Scratch(self.cupy.zeros(size, np.uint8))

    @staticmethod
    def _torchs() -> Any:
        torch = _torch()
        if torch is None:
            raise RuntimeError("triton.testing needs PyTorch: time kernels with kernels.tune")
        return torch


def _assemble_for(driver_version: int) -> None:
    """Let a CUDA 12 driver have programs that it can load.

    Triton 3.9 brings two assemblers, CUDA 12.9's and 13.4's, and takes the newer from sm_90 on.
    """
    if driver_version < 13000:
        older = knobs.nvidia.ptxas.path
        os.environ.setdefault("TRITON_PTXAS_BLACKWELL_PATH", older)


def _torch() -> Any:
    """PyTorch, if somebody else uses it on the GPU in this process."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_initialized() else None


def _utilities() -> tuple[Any, Any]:
    """(what loads kernels, what launches them): Triton's own, which need a C compiler, or ours."""
    if _can_build():
        try:
            return nvidia.CudaUtils(), nvidia.CudaLauncher
        except (OSError, RuntimeError, ImportError, subprocess.CalledProcessError) as error:
            warnings.warn(
                f"Triton's launcher could not be built ({error}): kernels are launched through "
                f"ctypes, which costs some microseconds more each time",
                RuntimeWarning,
                stacklevel=4,
            )
    return CtypesUtilities(), CtypesLauncher


def _can_build() -> bool:
    """A C compiler and Python's header are there."""
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    compiler = os.environ.get("CC") or "gcc"
    return header.exists() and bool(shutil.which(compiler) or shutil.which("clang"))


# --- scratch memory -------------------------------------------------------------------------------


class Scratch:
    """An array as the buffer that Triton's launchers want: something with `data_ptr()`."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def data_ptr(self) -> int:
        return self.array.data.ptr


def with_scratch(run: Callable[..., None]) -> Callable[..., None]:
    """The launcher `run`, for a kernel that wants scratch memory (tensor descriptors, say).

    Triton finds its allocator in a context variable, which a new thread sees empty: ours is set
    around each launch, and what was there before is put back. A block comes from CuPy's pool of
    the current stream, which gives it to nobody before the kernel has ended on that stream.
    """

    def allocate(size: int, alignment: int, stream: int | None) -> Scratch:
        return Scratch(backend.cupy().empty(size, np.uint8))

    def launch(*args: Any) -> None:
        before = _allocation._allocator.get()
        triton.set_allocator(allocate)
        try:
            run(*args)
        finally:
            triton.set_allocator(before)

    return launch


# --- without a C compiler -------------------------------------------------------------------------


class CtypesUtilities:
    """Triton's `CudaUtils`, as far as it is used, in ctypes."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        """The limits that Triton checks, under its names; numbers are `CUdevice_attribute`s."""
        attributes = {
            "max_shared_mem": 97,
            "max_num_regs": 12,
            "multiprocessor_count": 16,
            "warpSize": 10,
            "sm_clock_rate": 13,
            "mem_clock_rate": 36,
            "mem_bus_width": 37,
        }
        handle, value = ctypes.c_int(), ctypes.c_int()
        _cuda("cuDeviceGet", ctypes.byref(handle), device)
        properties = {}
        for name, attribute in attributes.items():
            _cuda("cuDeviceGetAttribute", ctypes.byref(value), attribute, handle)
            properties[name] = value.value
        return properties

    def load_binary(
        self, name: str, kernel: bytes, shared: int, device: int
    ) -> tuple[int | None, int | None, int, int, int]:
        """(module, function, registers, spilled words, threads a block may have)"""
        module, function, value = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()
        _cuda("cuModuleLoadData", ctypes.byref(module), kernel)
        _cuda("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        if shared > 48 * 1024:
            max_dynamic_shared_size_bytes = 8
            _cuda("cuFuncSetAttribute", function, max_dynamic_shared_size_bytes, shared)
        found = []
        for attribute in (4, 3, 0):  # registers, bytes of local memory, most threads per block
            _cuda("cuFuncGetAttribute", ctypes.byref(value), attribute, function)
            found.append(value.value)
        registers, local, threads = found
        return module.value, function.value, registers, local // 4, threads

    def unload_module(self, module: int) -> None:
        _cuda("cuModuleUnload", ctypes.c_void_p(module))


_CTYPES = {
    "i1": ctypes.c_int8,
    "u1": ctypes.c_uint8,
    "i32": ctypes.c_int32,
    "u32": ctypes.c_uint32,
    "i64": ctypes.c_int64,
    "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float,
    "f32": ctypes.c_float,
    "fp64": ctypes.c_double,
}


class CtypesLauncher:
    """Triton's `CudaLauncher` in ctypes: packs the arguments, calls `cuLaunchKernel`."""

    def __init__(self, source: Any, metadata: Any) -> None:
        types = list(source.signature.values())
        special = ("launch_cooperative_grid", "launch_pdl")
        if metadata.num_ctas != 1 or any(getattr(metadata, name, False) for name in special):
            raise RuntimeError(
                f"{metadata.name} needs clusters or another special launch, which takes Triton's "
                f"own launcher: install gcc and Python's headers"
            )
        self.places = [(i, t) for i, t in enumerate(types) if t != "constexpr"]
        # Two hidden arguments follow: memory for the kernel and for a profiler.
        self.cells = [ctypes.c_uint64() if t[0] == "*" else _CTYPES[t]() for _, t in self.places]
        self.scratch, profile = ctypes.c_uint64(), ctypes.c_uint64()
        cells = [*self.cells, self.scratch, profile]
        self.parameters = (ctypes.c_void_p * len(cells))(*map(ctypes.addressof, cells))
        self.keep = profile
        self.slots = list(zip([i for i, _ in self.places], self.cells, strict=True))
        self.threads, self.shared = 32 * metadata.num_warps, metadata.shared
        self.scratch_size = metadata.global_scratch_size
        self.scratch_alignment = metadata.global_scratch_align
        self.lock = threading.Lock()  # the cells are one set for all threads
        self.call = _function("cuLaunchKernel")
        unsigned, pointer = ctypes.c_uint, ctypes.c_void_p
        self.call.argtypes = [pointer, *[unsigned] * 7, pointer, pointer, pointer]

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        args = rest[4:]  # behind the metadata and the hooks, which only profilers use
        with self.lock:
            for i, cell in self.slots:
                value = args[i]
                cell.value = 0 if value is None else value
            block = None
            if self.scratch_size:
                allocator = _allocation._allocator.get()
                block = allocator(self.scratch_size * x * y * z, self.scratch_alignment, stream)
                self.scratch.value = block.data_ptr()
            status = self.call(
                function, x, y, z, self.threads, 1, 1, self.shared, stream, self.parameters, None
            )
        _raise_if(status)


def _cuda(name: str, *args: Any) -> None:
    _raise_if(_function(name)(*args))


def _function(name: str) -> Any:
    return getattr(ctypes.CDLL("libcuda.so.1"), name)


def _raise_if(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _function("cuGetErrorString")(status, ctypes.byref(text))
        what = text.value.decode() if text.value else "unknown error"
        raise RuntimeError(f"CUDA refused the call: {what} (error {status})")
