"""A stand-in for CuPy: NumPy arrays pose as the memory of two GPUs, libcuda.c as the driver.

As much of CuPy's interface as the kernels' host path uses, under CuPy's names.
"""

from __future__ import annotations

import ctypes
import os
import threading
from typing import Any, ClassVar

import numpy as np

libcuda = ctypes.CDLL(os.environ["FAKE_LIBCUDA"], mode=ctypes.RTLD_GLOBAL)
libcuda.fake_clock.restype = ctypes.c_ulonglong
_thread = threading.local()


class _Memory:
    def __init__(self, pointer: int, device_id: int) -> None:
        self.ptr, self.device_id = pointer, device_id

    def memset_async(self, value: int, size: int) -> None: ...


class ndarray:
    def __init__(self, host: np.ndarray, device_id: int = 0) -> None:
        self.host = host
        self.dtype, self.shape, self.strides = host.dtype, host.shape, host.strides
        self.size, self.ndim, self.nbytes = host.size, host.ndim, host.nbytes
        self.itemsize = host.itemsize
        self.data = _Memory(host.ctypes.data, device_id)
        self.device = cuda.Device(device_id)


ndarray.__module__ = "cupy"


def is_available() -> bool:
    return True


def _aligned(shape: Any, dtype: Any) -> np.ndarray:
    """CuPy's pool gives multiples of 512; NumPy's memory begins where it likes."""
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(nbytes + 512, np.uint8)
    start = -raw.ctypes.data % 512
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def empty(shape: Any, dtype: Any = np.float32) -> ndarray:
    return ndarray(_aligned(shape, dtype), cuda.runtime.getDevice())


zeros = empty


class cuda:
    class runtime:
        @staticmethod
        def getDevice() -> int:
            return getattr(_thread, "device", 0)

        @staticmethod
        def setDevice(device: int) -> None:
            _thread.device = device
            libcuda.cuCtxSetCurrent(ctypes.c_void_p(1))

        @staticmethod
        def driverGetVersion() -> int:
            return int(os.environ.get("FAKE_DRIVER_VERSION", "13000"))

        @staticmethod
        def getDeviceProperties(device: int) -> dict[str, Any]:
            return {"name": b"Fake GPU (90)"}

    class Device:
        compute_capability = "90"
        attributes: ClassVar = {"L2CacheSize": 1024}

        def __init__(self, device: int | None = None) -> None:
            self.id = cuda.runtime.getDevice() if device is None else device

    class Stream:
        capturing = False

        def __init__(self, pointer: int = 0) -> None:
            self.ptr = pointer

        def is_capturing(self) -> bool:
            return self.capturing

        def __enter__(self) -> cuda.Stream:
            _thread.stream = self
            return self

        def __exit__(self, *exception: Any) -> None:
            _thread.stream = cuda.Stream()

    @staticmethod
    def get_current_stream() -> cuda.Stream:
        return getattr(_thread, "stream", None) or cuda.Stream()

    class Event:
        time = 0

        def record(self) -> None:
            self.time = libcuda.fake_clock()

        def synchronize(self) -> None: ...

    @staticmethod
    def get_elapsed_time(start: cuda.Event, stop: cuda.Event) -> float:
        return float(stop.time - start.time)
