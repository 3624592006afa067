"""launch(kernel, grid, *arguments, **constants): arrays to a Triton kernel, without PyTorch.

The arrays are CuPy's on a GPU and NumPy's in the interpreter, passed by address: nothing is copied.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from tinygrad_llm.backend import Array
from tinygrad_llm.kernels.language import INTERPRETED, triton

Grid = int | tuple[int, ...]


def launch(
    kernel: Any, grid: Grid, *args: Any, reaches: Iterable[Array] = (), **constants: Any
) -> None:
    """kernel[grid](*args, **constants), on CuPy's current device and stream.

        launch(_forward, cdiv(rows, 4), x, y, rows, columns, 0.5, ROWS=4, BLOCK=128, num_warps=4)

    Args:
        kernel: a `triton.jit` function: its parameters are those of args, in order, then
            `tl.constexpr`s.
        grid: how many programs: a number, or up to three of them. 0 launches nothing.
        args: arrays (any strides; pass those you need in elements, see `layout.strides`), ints,
            floats, bools or None.
        reaches: further arrays that the kernel reaches through addresses stored in an array;
            the interpreter lets it touch these, too.
        constants: the kernel's `tl.constexpr`s (ints, bools, strings, dtypes, None; no floats:
            each value compiles anew), and Triton's options: num_warps, num_stages …

    The first launch with given dtypes, alignments, constants and device compiles (Triton keeps the
    result on disk); further ones take a few microseconds.

    Raises:
        TypeError: an argument that a kernel cannot take, or a float constant.
        ValueError: an array on another device than the current one.
        IndexError: in the interpreter, a read or write outside of the arrays.
    """
    x, y, z = grid if type(grid) is tuple and len(grid) == 3 else _three(grid)
    if not (0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16):
        _check_grid((x, y, z))
        return  # there is no program
    if INTERPRETED:
        _interpret(kernel, (x, y, z), args, reaches, constants)
        return
    ndarray, current_device, set_device, current_stream = _gpu or _open_gpu()
    device = current_device()
    codes, values = [], []
    for a in args:
        kind = type(a)
        if kind is ndarray:
            memory = a.data
            if memory.device_id != device:
                raise ValueError(_elsewhere(kernel, memory.device_id, device))
            address = memory.ptr
            codes.append(100 + 2 * a.dtype.num + (not address & 15))
            values.append(address)
        elif kind is int:
            # `_code_of_int`, written out for the usual cases: a call costs as much as the rest.
            if a == 1:
                codes.append(1)
            elif -2147483648 <= a < 2147483648:
                codes.append(2 if a & 15 else 3)
            else:
                codes.append(_code_of_int(a))
            values.append(a)
        elif kind is float:
            codes.append(_FLOAT)
            values.append(a)
        elif kind is bool or a is None:
            codes.append(_BOOL if kind is bool else _NONE)
            values.append(a)
        else:
            value, code = _other(kernel, a)
            codes.append(code)
            values.append(value)
    key = (id(kernel), device, *codes, *constants, *constants.values())
    if not hasattr(_this_thread, "bound"):  # a new thread has no CUDA context until it asks
        set_device(device)
        _this_thread.bound = True
    ready = _ready.get(key)
    if ready is None:
        ready = _ready[key] = _prepare(kernel, args, constants)
    run, function, metadata, tail, _ = ready
    stream = current_stream().ptr
    run(x, y, z, stream, function, metadata, None, None, None, *values, *tail)


def cdiv(n: int, d: int) -> int:
    """⌈n / d⌉: how many blocks of d hold n."""
    return -(-n // d)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n: the sizes that `tl.arange` knows."""
    return 1 << max(0, n - 1).bit_length()


def _three(grid: Any) -> tuple[int, int, int]:
    sizes = (grid,) if isinstance(grid, int) else tuple(grid)
    if not 1 <= len(sizes) <= 3:
        raise ValueError(f"a grid is one to three numbers of programs, got {grid!r}")
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z


def _check_grid(grid: tuple[int, int, int]) -> None:
    """CUDA's own limits; the interpreter has none, but would be wrong about the GPU."""
    if min(grid) < 0 or grid[0] >= 2**31 or max(grid[1:]) >= 2**16:
        raise ValueError(f"a grid is 0 to (2³¹ − 1, 65535, 65535) programs, got {grid!r}")


# --- on a GPU -------------------------------------------------------------------------------------


class _Gpu(NamedTuple):
    """CuPy's functions that each launch calls."""

    ndarray: type
    current_device: Any
    set_device: Any
    current_stream: Any


class _Ready(NamedTuple):
    """A compiled and loaded kernel; `tail` fills the places of its constants."""

    run: Any
    function: int
    metadata: Any
    tail: tuple[Any, ...]
    keep: tuple[Any, ...]  # the module, and the kernel whose id is in the key


_gpu: _Gpu | None = None
_ready: dict[tuple[Any, ...], _Ready] = {}
_this_thread = threading.local()
_BOOL, _FLOAT, _NONE = 10, 11, 12


def _open_gpu() -> _Gpu:
    global _gpu
    from tinygrad_llm.kernels import driver

    cupy = driver.activate().cupy
    runtime = cupy.cuda.runtime
    _gpu = _Gpu(cupy.ndarray, runtime.getDevice, runtime.setDevice, cupy.cuda.get_current_stream)
    return _gpu


def _code_of_int(n: int) -> int:
    """What Triton compiles anew for: the value 1, divisibility by 16, the type that holds it."""
    if n == 1:
        return 1
    width = 2 if -(2**31) <= n < 2**31 else 4 if n < 2**63 else 6
    return width + (not n & 15)


def _other(kernel: Any, a: Any) -> tuple[Any, int]:
    """(value, code) of an argument that is rarely passed: NumPy scalars, subclasses of ndarray."""
    if isinstance(a, np.integer):
        return int(a), _code_of_int(int(a))
    if isinstance(a, np.floating):
        return float(a), _FLOAT
    if isinstance(a, np.ndarray):
        raise ValueError(_elsewhere(kernel, None, _gpu.current_device() if _gpu else 0))
    raise TypeError(
        f"{_name(kernel)}() takes arrays, ints, floats, bools and None, got {type(a).__name__}"
    )


def _elsewhere(kernel: Any, found: int | None, device: int) -> str:
    where = "in the CPU's memory" if found is None else f"on cuda:{found}"
    return (
        f"{_name(kernel)}() runs on cuda:{device}, but an array is {where}: move it, or launch "
        f"inside `with cupy.cuda.Device(…)`"
    )


def _prepare(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> _Ready:
    """Compile the kernel for such arguments, load it on the current device."""
    from tinygrad_llm.kernels import driver

    driver.activate()
    names = kernel.arg_names
    _check_arguments(kernel, names, args, constants)
    pointers = [Pointer(a) if hasattr(a, "strides") and hasattr(a, "data") else a for a in args]
    compiled = kernel.warmup(*pointers, grid=(1,), **constants)
    run = compiled.run
    if compiled.metadata.global_scratch_size:
        run = driver.with_scratch(run)
    tail = tuple(constants[name] for name in names[len(args) :])
    metadata = compiled.packed_metadata
    return _Ready(run, compiled.function, metadata, tail, (compiled, kernel))


def _check_arguments(
    kernel: Any, names: list[str], args: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    missing = [name for name in names[len(args) :] if name not in constants]
    if len(args) > len(names) or missing:
        raise TypeError(
            f"{_name(kernel)}() takes {', '.join(names)}: got {len(args)} arguments and "
            f"{', '.join(constants) or 'no constants'}"
        )
    for name, value in constants.items():
        if isinstance(value, float):
            raise TypeError(
                f"{_name(kernel)}() was given the float {name}={value} as a constant, which would "
                f"compile a kernel per value: pass it as an argument"
            )


def _name(kernel: Any) -> str:
    return getattr(kernel, "__name__", type(kernel).__name__).lstrip("_")


# --- pointers -------------------------------------------------------------------------------------


class Pointer:
    """An array as Triton's pointer argument: something with an address and a dtype.

    The interpreter also wants to copy a tensor from its device and back. An array in the CPU's
    memory needs neither, so it answers all of that with itself.
    """

    __slots__ = ("address", "array", "dtype")

    def __init__(self, array: Array) -> None:
        self.array, self.dtype = array, array.dtype
        # Not `.data`: that raises for bfloat16, which the buffer protocol does not know.
        self.address = array.ctypes.data if isinstance(array, np.ndarray) else int(array.data.ptr)

    def data_ptr(self) -> int:
        return self.address

    def stride(self) -> tuple[int, ...]:
        return tuple(s // self.array.itemsize for s in self.array.strides)

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def storage_offset(self) -> int:
        return 0

    def untyped_storage(self) -> Pointer:
        return self

    def cpu(self) -> Pointer:
        return self

    def new_empty(self, *size: Any, **options: Any) -> Pointer:
        return self

    def set_(self, *storage: Any) -> Pointer:
        return self

    def copy_(self, other: Any) -> Pointer:
        return self


# --- in the interpreter ---------------------------------------------------------------------------


def _interpret(
    kernel: Any,
    grid: tuple[int, int, int],
    args: tuple[Any, ...],
    reaches: Iterable[Array],
    constants: dict[str, Any],
) -> None:
    """Run the programs one after the other, on NumPy arrays."""
    from tinygrad_llm.kernels.interpret import only_within

    _check_arguments(kernel, kernel.arg_names, args, constants)
    arrays, values = list(reaches), []
    for a in args:
        if isinstance(a, np.ndarray):
            arrays.append(a)
            values.append(Pointer(a))
        elif a is None or isinstance(a, bool | int | float):
            values.append(a)
        elif isinstance(a, np.integer | np.floating):
            values.append(a.item())
        else:
            what = "a CuPy array" if hasattr(a, "__cuda_array_interface__") else type(a).__name__
            raise TypeError(
                f"{_name(kernel)}() runs in the interpreter here and takes NumPy arrays, ints, "
                f"floats, bools and None, got {what}"
            )
    # A GPU computes ∞ − ∞ without a word.
    with np.errstate(all="ignore"), only_within(arrays):
        try:
            kernel[grid](*values, **constants)
        except triton.runtime.errors.InterpreterError as error:
            raise _cause(error) from error


def _cause(error: BaseException) -> BaseException:
    """The error inside the wrappers that each nested call puts around it."""
    while isinstance(error, triton.runtime.errors.InterpreterError) and error.__cause__:
        error = error.__cause__
    return error
