"""A stand-in for CuPy on NumPy's memory: enough of it for a training step, streams and graphs.

It is as strict as CuPy where a mistake would only show on a GPU:

- its arrays are no NumPy arrays, and become none but by `get()`;
- asynchronous copies happen when somebody waits for them, and not before;
- while a graph is captured nothing is computed, and whatever needs the host to wait, cuBLAS, a sort
  or memory of the host is refused; a replay does what was recorded, on memory that must still live;
- a pool has a limit, and says so as CuPy does.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np

_thread = threading.local()

# --- memory ---------------------------------------------------------------------------------------


class OutOfMemoryError(MemoryError):
    def __init__(self, size: int, total: int, limit: int = 0) -> None:
        self._size, self._total, self._limit = size, total, limit
        super().__init__(
            f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes)."
        )


class MemoryPool:
    """Counts; what is allocated for a graph lives as long as the pool, as the freed blocks do."""

    def __init__(self) -> None:
        self.used, self.total, self.limit = 0, 0, 0
        self.captured: list[np.ndarray] = []

    def malloc(self, size: int) -> np.ndarray:
        rounded = max(512, -(-size // 512) * 512)
        if self.limit and self.used + rounded > self.limit:
            raise OutOfMemoryError(rounded, self.total)
        self.used += rounded
        self.total = max(self.total, self.used)
        raw = np.empty(rounded + 512, np.uint8)
        for hook in _hooks():
            hook.malloc_postprocess(device_id=0, size=size, mem_size=rounded, mem_ptr=0, pmem_id=0)
        weakref.finalize(raw, self._free, rounded)
        if _capture() is not None:
            self.captured.append(raw)
        return raw

    def _free(self, rounded: int) -> None:
        self.used -= rounded
        for hook in _hooks():
            hook.free_postprocess(device_id=0, mem_size=rounded, mem_ptr=0, pmem_id=0)

    def used_bytes(self) -> int:
        return self.used

    def total_bytes(self) -> int:
        return self.total

    def free_all_blocks(self) -> None:
        self.total = self.used

    def get_limit(self) -> int:
        return self.limit

    def set_limit(self, size: int) -> None:
        self.limit = size


class MemoryHook:
    def malloc_postprocess(self, **kwargs: int) -> None: ...

    def free_postprocess(self, **kwargs: int) -> None: ...

    def __enter__(self) -> MemoryHook:
        _hooks().append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _hooks().remove(self)


def _hooks() -> list[Any]:
    return _thread.__dict__.setdefault("hooks", [])


_default_pool = MemoryPool()


@contextlib.contextmanager
def using_allocator(malloc: Any) -> Iterator[None]:
    before = getattr(_thread, "pool", None)
    _thread.pool = malloc.__self__
    try:
        yield
    finally:
        _thread.pool = before


def _fresh(like: np.ndarray) -> np.ndarray:
    """Memory of the current pool, contiguous and aligned, of an array's shape and dtype."""
    raw = (getattr(_thread, "pool", None) or _default_pool).malloc(like.nbytes)
    start = -raw.ctypes.data % 512
    return raw[start : start + like.nbytes].view(like.dtype).reshape(like.shape)


class _Place:
    """Where an array lies, without keeping its memory alive."""

    def __init__(self, host: np.ndarray) -> None:
        raw = host if host.base is None else host.base
        assert isinstance(raw, np.ndarray)
        self.raw = weakref.ref(raw)
        self.offset = host.ctypes.data - raw.ctypes.data
        self.shape, self.strides, self.dtype = host.shape, host.strides, host.dtype

    def open(self) -> np.ndarray:
        raw = self.raw()
        if raw is None:
            raise AssertionError("a graph reads memory that was freed after its capture")
        return np.ndarray(self.shape, self.dtype, raw, self.offset, self.strides)


# --- streams, events, graphs ----------------------------------------------------------------------


class CUDARuntimeError(RuntimeError):
    pass


def _capture() -> list[Callable[[], None]] | None:
    """What the current stream has recorded so far; None where it does not capture."""
    return get_current_stream().recorded


def _must_not_wait(what: str) -> None:
    if _capture() is not None:
        raise CUDARuntimeError(f"cudaErrorStreamCaptureUnsupported: {what} during stream capture")


class Stream:
    def __init__(self, null: bool = False, non_blocking: bool = False) -> None:
        self.ptr = 0 if null else id(self)
        self.queue: list[Callable[[], None]] = []
        self.done_until = 0
        self.recorded: list[Callable[[], None]] | None = None

    def later(self, work: Callable[[], None]) -> None:
        self.queue.append(work)

    def run_until(self, end: int) -> None:
        while self.done_until < end:
            work, self.queue[self.done_until] = self.queue[self.done_until], lambda: None
            self.done_until += 1
            work()

    def synchronize(self) -> None:
        _must_not_wait("synchronize")
        self.run_until(len(self.queue))

    def record(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        if self.recorded is not None:
            raise CUDARuntimeError("cudaErrorStreamCaptureIsolation: an event of another stream")
        self.later(event.run)
        if self is get_current_stream():  # on which all that is computed is computed at once
            self.run_until(len(self.queue))

    def is_capturing(self) -> bool:
        return self.recorded is not None

    def begin_capture(self, mode: Any = None) -> None:
        if self.ptr == 0:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        self.recorded = []

    def end_capture(self) -> Graph:
        assert self.recorded is not None
        work, self.recorded = self.recorded, None
        return Graph(work)

    def __enter__(self) -> Stream:
        _streams().append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _streams().pop()


class Event:
    def __init__(self, block: bool = False, disable_timing: bool = False) -> None:
        self.stream: Stream | None = None
        self.position = 0

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or get_current_stream()
        self.position = len(self.stream.queue)

    def run(self) -> None:
        if self.stream is not None:
            self.stream.run_until(self.position)

    def synchronize(self) -> None:
        _must_not_wait("waiting for an event")
        self.run()

    @property
    def done(self) -> bool:
        return self.stream is None or self.stream.done_until >= self.position


class Graph:
    def __init__(self, work: list[Callable[[], None]]) -> None:
        self.work = work

    def launch(self, stream: Stream | None = None) -> None:
        stream = stream or get_current_stream()
        stream.run_until(len(stream.queue))
        with np.errstate(all="ignore"):
            for step in self.work:
                step()

    def upload(self, stream: Stream | None = None) -> None: ...


_null = Stream(null=True)


def _streams() -> list[Stream]:
    return _thread.__dict__.setdefault("streams", [_null])


def get_current_stream() -> Stream:
    return _streams()[-1]


# --- arrays ---------------------------------------------------------------------------------------


class MemoryPointer:
    def __init__(self, host: np.ndarray) -> None:
        self.ptr, self.device_id, self._host = host.ctypes.data, 0, host

    def copy_from_host_async(self, source: int, size: int, stream: Stream | None = None) -> None:
        target, keep = self.ptr, self._host
        assert size <= keep.nbytes
        stream = stream or get_current_stream()
        assert stream.recorded is None, "a graph would read the host's memory at each replay"

        def copy() -> None:
            ctypes.memmove(target, source, size)
            assert keep.nbytes >= size  # the memory lives until then

        stream.later(copy)

    def copy_to_host_async(self, target: int, size: int, stream: Stream | None = None) -> None:
        now = ctypes.string_at(self.ptr, size)
        stream = stream or get_current_stream()
        assert stream.recorded is None

        def copy() -> None:
            ctypes.memmove(target, now, size)

        stream.later(copy)


class ndarray:
    """A wrapper of NumPy's; see the top of the file."""

    def __init__(self, host: np.ndarray, base: ndarray | None = None) -> None:
        self.host, self.base = host, base

    dtype = property(lambda self: self.host.dtype)
    shape = property(lambda self: self.host.shape)
    strides = property(lambda self: self.host.strides)
    size = property(lambda self: self.host.size)
    ndim = property(lambda self: self.host.ndim)
    nbytes = property(lambda self: self.host.nbytes)
    itemsize = property(lambda self: self.host.itemsize)
    flags = property(lambda self: self.host.flags)
    data = property(lambda self: MemoryPointer(self.host))
    device = property(lambda self: Device(0))
    T = property(lambda self: self.transpose())

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if method != "__call__":
            return NotImplemented
        if "out" in kwargs and isinstance(kwargs["out"], tuple):
            kwargs["out"] = kwargs["out"][0]
        return _call(ufunc, inputs, kwargs)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return _call(function, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(np.ndarray, name):
            raise AttributeError(name)
        function = getattr(np.ndarray, name)
        if not callable(function):
            raise AttributeError(name)
        return lambda *args, **kwargs: _call(function, (self, *args), kwargs)

    def get(
        self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True
    ) -> np.ndarray:
        _must_not_wait("get()")
        if out is None:
            return self.host.copy()
        out[...] = self.host
        return out

    def set(self, values: np.ndarray, stream: Any = None) -> None:
        _must_not_wait("set()")
        assert (values.dtype, values.shape) == (self.dtype, self.shape)
        self.host[...] = values

    def item(self) -> Any:
        return self.get().item()

    def tolist(self) -> Any:
        return self.get().tolist()

    def __bool__(self) -> bool:
        return bool(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __float__(self) -> float:
        return float(self.get())

    def __len__(self) -> int:
        return len(self.host)

    def __iter__(self) -> Iterator[ndarray]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        if _has_mask(index):
            _must_not_wait("indexing with a mask")
        return _call(np.ndarray.__getitem__, (self, index), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        _call(np.ndarray.__setitem__, (self, index, value), {}, written=self)

    def fill(self, value: Any) -> None:
        _call(np.ndarray.fill, (self, value), {}, written=self)


ndarray.__module__ = "cupy"


def _operator(name: str) -> Any:
    function = getattr(np.ndarray, name)
    in_place = name.startswith("__i") and name != "__invert__"

    def method(self: ndarray, *others: Any) -> Any:
        if any(isinstance(o, np.ndarray) and o.ndim for o in others):
            raise TypeError("Unsupported type <class 'numpy.ndarray'>")
        return _call(function, (self, *others), {}, written=self if in_place else None)

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"):
    for _form in (f"__{_name}__", f"__r{_name}__", f"__i{_name}__"):
        setattr(ndarray, _form, _operator(_form))
for _name in ("matmul", "rmatmul", "lshift", "rshift", "neg", "abs", "invert"):
    setattr(ndarray, f"__{_name}__", _operator(f"__{_name}__"))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(ndarray, f"__{_name}__", _operator(f"__{_name}__"))


def _has_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(p, ndarray) and p.dtype == bool for p in parts)


_REFUSED = {"matmul", "dot", "vdot", "vecdot", "tensordot", "__matmul__", "__rmatmul__"}
_WAITS = {"argsort", "sort", "nonzero", "unique", "flatnonzero"}


def _call(function: Any, args: Any, kwargs: Any, written: ndarray | None = None) -> Any:
    """function of the arrays' memory; while a graph is captured, it is only noted down."""
    name = getattr(function, "__name__", "")
    sources: list[ndarray] = []
    _collect((args, kwargs), sources)
    out = kwargs.get("out")
    written = out if written is None else written
    capture = _capture()
    if capture is not None:
        if name in _REFUSED:
            raise NotImplementedError("cuBLAS is not supported during stream capture")
        if name in _WAITS:
            _must_not_wait(name)
    if capture is not None and written is not None:
        again = _later(function, args, kwargs)
        capture.append(lambda: (again(), None)[1])
        return written
    with np.errstate(all="ignore") if capture is not None else contextlib.nullcontext():
        found = function(*_open(args), **_open(kwargs))
    if written is not None:
        return written
    wrapped = _wrap(found, sources)
    if capture is not None:
        _note(capture, _later(function, args, kwargs), found, wrapped)
    return wrapped


def _collect(value: Any, found: list[ndarray]) -> None:
    if isinstance(value, ndarray):
        found.append(value)
    elif isinstance(value, tuple | list):
        for v in value:
            _collect(v, found)
    elif isinstance(value, dict):
        _collect(list(value.values()), found)


def _open(value: Any) -> Any:
    if isinstance(value, ndarray):
        return value.host
    if isinstance(value, _Place):
        return value.open()
    if isinstance(value, tuple | list):
        return type(value)([_open(v) for v in value])
    if isinstance(value, dict):
        return {key: _open(v) for key, v in value.items()}
    return value


def _placed(value: Any) -> Any:
    """Arrays as places: what a graph knows of them."""
    if isinstance(value, ndarray):
        return _Place(value.host)
    if isinstance(value, np.ndarray) and value.ndim:
        return _Place(value)
    if isinstance(value, tuple | list):
        return type(value)([_placed(v) for v in value])
    if isinstance(value, dict):
        return {key: _placed(v) for key, v in value.items()}
    return value


def _later(function: Any, args: Any, kwargs: Any) -> Callable[[], Any]:
    args, kwargs = _placed(args), _placed(kwargs)
    return lambda: function(*_open(args), **_open(kwargs))


def _wrap(found: Any, sources: list[ndarray]) -> Any:
    if isinstance(found, tuple | list):
        return type(found)([_wrap(f, sources) for f in found])
    if isinstance(found, np.generic):
        found = np.asarray(found)
    if not isinstance(found, np.ndarray):
        return found
    for source in sources:
        if found is source.host:
            return source
        if found.size and np.may_share_memory(found, source.host):
            return ndarray(found, source if source.base is None else source.base)
    fresh = _fresh(found)
    fresh[...] = found
    return ndarray(fresh)


def _note(capture: list[Any], again: Any, found: Any, wrapped: Any) -> None:
    """Note how to fill a result that is new memory; until then it holds rubbish."""
    if isinstance(wrapped, tuple | list):
        raise NotImplementedError("a graph of functions with several results")
    if not isinstance(wrapped, ndarray) or wrapped.base is not None:
        return
    if isinstance(found, np.ndarray) and found is wrapped.host:
        return
    wrapped.host.fill(np.nan if wrapped.dtype.kind in "fV" else 0)
    place = _Place(wrapped.host)

    def fill() -> None:
        place.open()[...] = again()

    capture.append(fill)


def run_kernel(work: Callable[..., None], args: tuple[Any, ...], reaches: Any) -> None:
    """Launch a kernel that is a function of NumPy arrays, or note it down."""
    capture = _capture()
    if capture is None:
        work(_open(args), _open(list(reaches)))
        return
    args, reaches = _placed(args), _placed(list(reaches))
    capture.append(lambda: work(_open(args), _open(reaches)))


# --- the modules ----------------------------------------------------------------------------------


class Device:
    def __init__(self, device: int = 0) -> None:
        self.id = device

    compute_capability = "90"
    attributes: ClassVar = {"L2CacheSize": 1024}

    @property
    def mem_info(self) -> tuple[int, int]:
        return runtime.memGetInfo()

    def synchronize(self) -> None:
        for stream in _streams():
            stream.run_until(len(stream.queue))

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *error: object) -> None: ...


class runtime:
    CUDARuntimeError = CUDARuntimeError
    memory = 8 << 30

    @staticmethod
    def getDevice() -> int:
        return 0

    @staticmethod
    def setDevice(device: int) -> None: ...

    @staticmethod
    def getDeviceCount() -> int:
        return 1

    @staticmethod
    def driverGetVersion() -> int:
        return 13000

    @staticmethod
    def runtimeGetVersion() -> int:
        return 13000

    @staticmethod
    def memGetInfo() -> tuple[int, int]:
        return runtime.memory - _default_pool.total, runtime.memory

    @staticmethod
    def getDeviceProperties(device: int) -> dict[str, Any]:
        return {"name": b"Fake GPU", "totalGlobalMem": runtime.memory, "major": 9, "minor": 0}


def _asarray(x: Any, dtype: Any = None, **kwargs: Any) -> ndarray:
    if isinstance(x, ndarray):
        return x if dtype is None or x.dtype == dtype else x.astype(dtype)
    _must_not_wait("a copy from the host")
    return _wrap(np.array(x, dtype=dtype), [])


def _array(x: Any, dtype: Any = None, copy: bool = True, order: str = "K") -> ndarray:
    if not isinstance(x, ndarray):
        return _asarray(x, dtype)
    return _call(np.array, (x,), {"dtype": dtype or x.dtype, "copy": True, "order": order})


def _lookup(name: str) -> Any:
    value = getattr(np, name)
    if not callable(value) or isinstance(value, type):
        return value

    def function(*args: Any, **kwargs: Any) -> Any:
        hosts = [a for a in (*args, *kwargs.values()) if isinstance(a, np.ndarray) and a.ndim]
        if hosts:
            raise TypeError("Unsupported type <class 'numpy.ndarray'>")
        return _call(value, args, kwargs)

    if isinstance(value, np.ufunc):
        add: Any = function
        add.at = lambda a, *rest: _call(value.at, (a, *rest), {}, written=a)
    return function


def modules() -> tuple[ModuleType, ModuleType]:
    """(cupy, cupyx)"""
    cupy: Any = ModuleType("cupy")
    cupyx: Any = ModuleType("cupyx")
    cupy.__getattr__ = _lookup
    cupy.__spec__ = ModuleSpec("cupy", None)
    cupy.__version__ = "14.2.0"
    cupy.ndarray, cupy.asarray, cupy.array = ndarray, _asarray, _array
    cupy.is_available = lambda: True
    cupy.get_default_memory_pool = lambda: _default_pool
    memory = SimpleNamespace(OutOfMemoryError=OutOfMemoryError)
    cupy.cuda = SimpleNamespace(
        Stream=Stream,
        Event=Event,
        Graph=Graph,
        Device=Device,
        MemoryPool=MemoryPool,
        MemoryHook=MemoryHook,
        memory=memory,
        runtime=runtime,
        using_allocator=using_allocator,
        get_current_stream=get_current_stream,
    )
    cupyx.empty_pinned = lambda shape, dtype=float: np.empty(shape, dtype)
    return cupy, cupyx


def install(monkeypatch: Any) -> Any:
    """`import cupy` finds the stand-in, and Triton's interpreter works on its memory."""
    global _default_pool
    _default_pool = MemoryPool()
    _thread.__dict__.clear()
    cupy, cupyx = modules()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupyx", cupyx)
    return cupy


def install_kernels(monkeypatch: Any) -> None:
    """Kernels of CuPy's arrays run in Triton's interpreter."""
    from tinygrad_llm import dispatch
    from tinygrad_llm.kernels import launch

    interpret = launch._interpret

    def on_either(kernel: Any, grid: Any, args: Any, reaches: Any, constants: Any) -> None:
        found: list[ndarray] = []
        _collect(args, found)
        if not found:
            interpret(kernel, grid, args, reaches, constants)
            return

        def work(args: Any, reaches: Any) -> None:
            interpret(kernel, grid, args, reaches, constants)

        run_kernel(work, args, reaches)

    monkeypatch.setattr(launch, "_interpret", on_either)
    monkeypatch.setattr(dispatch, "_home", lambda: "gpu")
