"""What Triton's interpreter needs so that kernels on NumPy arrays give the right numbers, soon.

As shipped (3.6 to 3.9) it multiplies the bit patterns of bfloat16 numbers, raises on a loop bound
known at run time only (3.6 with NumPy 2.4), lets `libdevice` functions return None, reads and
writes outside of arrays, and patches `triton.language` anew at each launch and nested call.
`install()` mends these, once per process; `language.py` calls it.

What the interpreter still does not see: tf32 rounding, limits of shared memory and registers,
races between programs (they run one after the other).
"""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime import interpreter

from tinygrad_llm.backend import Array

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

_installed = False


def install() -> None:
    """Mend the interpreter of this process; a second call does nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    _make_bfloat16_numbers()
    _guard_memory()
    _require_what_a_gpu_requires()
    _take_maxima_in_silence()
    _allow_loop_bounds()
    _give_libdevice_bodies()
    _patch_the_language_once()


# --- bfloat16 -------------------------------------------------------------------------------------


def _make_bfloat16_numbers() -> None:
    """Tiles of bfloat16 are arrays of ml_dtypes: numbers, rounded to nearest even."""
    builder: Any = interpreter.InterpreterBuilder
    stock_dtype, stock_cast = interpreter._get_np_dtype, builder.cast_impl
    stock_convert, stock_dot = builder.create_fp_to_fp, builder.create_dot
    floats = {tl.bfloat16, tl.float16, tl.float32, tl.float64}

    def numpy_dtype(dtype: Any) -> np.dtype:
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return BFLOAT16 if element == tl.bfloat16 else stock_dtype(dtype)

    def cast(self: Any, source: Any, dtype: Any) -> Any:
        target = dtype.scalar
        if tl.bfloat16 not in (source.dtype.scalar, target):
            return stock_cast(self, source, dtype)
        return interpreter.TensorHandle(source.data.astype(numpy_dtype(target)), target)

    def convert(self: Any, source: Any, dtype: Any, rounding: Any) -> Any:
        target = dtype.scalar
        if not {source.dtype.scalar, target} <= floats:
            return stock_convert(self, source, dtype, rounding)
        if rounding == interpreter._ir.ROUNDING_MODE.RTZ:
            raise NotImplementedError("the interpreter rounds to nearest even only, not to zero")
        return interpreter.TensorHandle(source.data.astype(numpy_dtype(target)), target)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        # Exact, and a BLAS product; tensor cores, too, multiply exactly and add in float32.
        halves = (tl.bfloat16, tl.float16)
        a, b = (
            interpreter.TensorHandle(x.data.astype(np.float32), tl.float32)
            if x.dtype.scalar in halves
            else x
            for x in (a, b)
        )
        return stock_dot(self, a, b, *rest)

    interpreter._get_np_dtype = numpy_dtype  # a global, which every method looks up
    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast, convert, dot
    builder.get_bf16 = lambda self, value: interpreter.TensorHandle(
        np.array([value], dtype=BFLOAT16), tl.bfloat16
    )


# --- memory ---------------------------------------------------------------------------------------


class _Extent(NamedTuple):
    """The bytes from the first to behind the last element of an array."""

    start: int
    stop: int
    writeable: bool


_extents: list[_Extent] | None = None


@contextlib.contextmanager
def only_within(arrays: Iterable[Array]) -> Iterator[None]:
    """While this lasts, a kernel that reads or writes outside of the arrays raises IndexError.

    So does one that writes into a read-only array. On a GPU that is a silently wrong number or an
    "illegal memory access" much later; in the unguarded interpreter, a crash of Python.
    """
    global _extents
    before = _extents
    bounds = np.lib.array_utils.byte_bounds
    _extents = [_Extent(*bounds(a), bool(a.flags.writeable)) for a in arrays if a.size]
    try:
        yield
    finally:
        _extents = before


def _check(pointers: Array, mask: Array, itemsize: int, verb: str) -> None:
    mask = np.asarray(mask)  # 3.6 gives the memoryview of a descriptor's mask
    used = pointers if mask.all() else np.broadcast_to(pointers, mask.shape)[mask]
    if _extents is None or used.size == 0:
        return
    extents = [e for e in _extents if e.writeable or verb == "reads"]
    low, high = int(used.min()), int(used.max()) + itemsize
    if any(e.start <= low and high <= e.stop for e in extents):
        return
    inside = np.zeros(used.shape, dtype=bool)
    for e in extents:
        inside |= (used >= e.start) & (used + np.uint64(itemsize) <= e.stop)
    outside = int((~inside).sum())
    if outside:
        x, y, z = interpreter.interpreter_builder.grid_idx
        raise IndexError(
            f"program ({x}, {y}, {z}) {verb} {outside} of {used.size} elements outside of the "
            f"{'' if verb == 'reads' else 'writeable '}arrays it was given: a mask or an offset "
            f"is wrong"
        )


class _GuardedMemory:
    """Triton's C++ reads and writes, with bounds; bfloat16 goes through as 16-bit integers."""

    def __init__(self, stock: Any) -> None:
        self._stock = stock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)

    def load(self, pointers: Array, mask: Array, other: Array, dtype: np.dtype) -> Array:
        _check(pointers, mask, dtype.itemsize, "reads")
        if dtype != BFLOAT16:
            return self._stock.load(pointers, mask, other, dtype)
        bits = np.ascontiguousarray(other).view(np.uint16)
        return self._stock.load(pointers, mask, bits, np.dtype(np.uint16)).view(BFLOAT16)

    def store(self, pointers: Array, value: Array, mask: Array) -> Any:
        _check(pointers, mask, value.dtype.itemsize, "writes")
        if value.dtype == BFLOAT16:
            value = np.ascontiguousarray(value).view(np.uint16)
        return self._stock.store(pointers, value, mask)

    def atomic_rmw(self, op: Any, pointers: Array, value: Array, mask: Array, order: Any) -> Array:
        if value.dtype == BFLOAT16:
            raise NotImplementedError("the interpreter has no bfloat16 atomics: add in float32")
        _check(pointers, mask, value.dtype.itemsize, "changes")
        return self._stock.atomic_rmw(op, pointers, value, mask, order)

    def atomic_cas(self, pointers: Array, expected: Array, value: Array, order: Any) -> Array:
        _check(pointers, np.ones(pointers.shape, dtype=bool), value.dtype.itemsize, "changes")
        return self._stock.atomic_cas(pointers, expected, value, order)


def _guard_memory() -> None:
    interpreter._interpreter = _GuardedMemory(interpreter._interpreter)


# --- the rest -------------------------------------------------------------------------------------


def _require_what_a_gpu_requires() -> None:
    """A `tl.dot` over fewer than 16 elements would not compile on a GPU: nor does it run here."""

    def smallest(a: Any, b: Any) -> tuple[int, int, int]:
        return (1, 1, 32 if a.scalar.primitive_bitwidth == 8 else 16)

    interpreter.interpreter_builder.codegen_fns["min_dot_size"] = smallest


def _take_maxima_in_silence() -> None:
    """max and min that pass over NaN, as on a GPU, but without NumPy's warning where all are."""
    reduction: Any = interpreter.ReduceOps
    stock = reduction.apply_impl
    quiet = {tl.standard._elementwise_max: np.fmax, tl.standard._elementwise_min: np.fmin}

    def apply(self: Any, inputs: Any) -> Any:
        ufunc = next((u for f, u in quiet.items() if self.combine_fn is f), None)
        if ufunc is None:
            return stock(self, inputs)
        (x,) = inputs
        y = ufunc.reduce(x.handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(y, x.dtype)

    reduction.apply_impl = apply


def _allow_loop_bounds() -> None:
    """range(n) with n a kernel argument: `int()` of an array with one axis raises in NumPy 2.4."""
    stock = interpreter._patch_lang_tensor

    def patch(tensor: Any, *scope: Any) -> None:
        stock(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch


_BODIES: dict[str, Callable[..., Any]] = {
    **{name: getattr(np, name) for name in ("tanh", "log1p", "expm1", "exp", "exp2", "log")},
    **{name: getattr(np, name) for name in ("log2", "log10", "sqrt", "cbrt", "sin", "cos", "tan")},
    **{name: getattr(np, name) for name in ("sinh", "cosh", "ceil", "floor", "trunc", "rint")},
    **{name: getattr(np, name) for name in ("copysign", "fmod", "hypot")},
    "abs": np.abs,
    "fabs": np.abs,
    "pow": np.power,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "erf": np.vectorize(math.erf, otypes=[np.float64]),
    "erfc": np.vectorize(math.erfc, otypes=[np.float64]),
}


def _give_libdevice_bodies() -> None:
    """NumPy's functions for CUDA's; one that is missing says so, where the stub returns None."""
    for name, stub in list(vars(libdevice).items()):
        if isinstance(stub, types.FunctionType) and not name.startswith("_"):
            setattr(libdevice, name, _libdevice_function(name, _BODIES.get(name)))


def _libdevice_function(name: str, body: Callable[..., Any] | None) -> Callable[..., Any]:
    def function(*inputs: Any, _semantic: Any = None) -> Any:
        if body is None:
            raise NotImplementedError(f"the interpreter has no libdevice.{name}: add it to _BODIES")
        x = inputs[0]
        if not all(isinstance(i, tl.tensor) and i.dtype == x.dtype for i in inputs):
            raise TypeError(f"libdevice.{name} takes tensors of one dtype, got {inputs}")
        if x.dtype not in (tl.float32, tl.float64):
            raise TypeError(f"libdevice.{name} takes float32 or float64, got {x.dtype}")
        y = np.asarray(body(*[i.handle.data for i in inputs]))
        y = y.astype(x.handle.data.dtype)
        shape = tl.block_type(x.dtype, list(y.shape)) if x.type.is_block() else x.type
        return tl.tensor(interpreter.TensorHandle(y, x.dtype), shape)

    return function


def _patch_the_language_once() -> None:
    """Replace `tl`'s functions by NumPy ones for good: 1.5 to 4 times faster than at each call."""

    def sample() -> None: ...

    sees_triton = types.FunctionType(sample.__code__, {"tl": tl, "core": tl.core})
    interpreter._patch_lang(sees_triton)

    class Nothing:
        def restore(self) -> None: ...

    nothing = Nothing()
    interpreter._patch_lang = lambda function: nothing
