"""What every floor above stands on: NumPy or CuPy arrays, dtypes, devices, randomness, memory.

Nothing here knows of gradients. The same op code runs on both array libraries because it asks an
array for its namespace (`namespace(x)` is `numpy` or `cupy`) and calls NumPy's names in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

Result = TypeVar("Result")

# An array of either library; CuPy is optional, so the type cannot name it.
Array = Any

# --- arrays and devices ---------------------------------------------------------------------------


def namespace(x: Any) -> Any:
    """xp = the library of x: `numpy`, `cupy`, or `tinygrad_llm.ops` when x is a Tensor.

    All three answer to NumPy's names, so `namespace(x).exp(x)` is right for whatever x is. That is
    how one `backward` serves the first order (arrays) and the second (Tensors).
    """
    if type(x) is np.ndarray:
        return np
    if _is_cupy(x):  # whose arrays do not know their namespace
        return sys.modules["cupy"]
    return x.__array_namespace__()


def is_array(x: Any) -> bool:
    """True for a NumPy or CuPy array (not for a NumPy scalar or a Tensor)."""
    return isinstance(x, np.ndarray) or _is_cupy(x)


def _is_cupy(x: Any) -> bool:
    return type(x).__module__.partition(".")[0] == "cupy"


def cupy() -> ModuleType:
    """The CuPy module; says what to install, or what is missing, where there is none to use."""
    try:
        import cupy  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RuntimeError(
            "device 'cuda' needs CuPy: pip install 'tinygrad-llm[cuda13]' (or [cuda12])"
        ) from error
    if not cupy.is_available():
        raise RuntimeError("device 'cuda' was asked for, but CuPy sees no NVIDIA GPU here")
    return cupy


def device_of(array: Array) -> str:
    """'cpu' for a NumPy array, 'cuda:0', 'cuda:1' … for a CuPy array."""
    return "cpu" if isinstance(array, np.ndarray) else f"cuda:{array.device.id}"


def to_device(array: Array, device: str) -> Array:
    """The array on `device` ('cpu', 'cuda', 'cuda:1'); itself when it is there already."""
    index = _gpu_index(device)
    if index is None:
        return array if isinstance(array, np.ndarray | np.generic) else array.get()
    with cupy().cuda.Device(index):
        return cupy().asarray(array)


def device_namespace(device: str) -> Any:
    """The library that makes arrays on `device`."""
    return np if _gpu_index(device) is None else cupy()


def on_device(device: str) -> Any:
    """`with on_device('cuda:1'):` what is launched and allocated within is that GPU's."""
    index = _gpu_index(device)
    return contextlib.nullcontext() if index is None else cupy().cuda.Device(index)


def is_capturing() -> bool:
    """True while CuPy's current stream records a CUDA graph, when nothing is computed."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and bool(cupy.cuda.get_current_stream().is_capturing())


_rehearsing = False


@contextlib.contextmanager
def rehearsal() -> Iterator[None]:
    """Within: what has a way for CUDA graphs takes it, so that all of it is compiled before one."""
    global _rehearsing
    before, _rehearsing = _rehearsing, True
    try:
        yield
    finally:
        _rehearsing = before


_kept: list[Any] | None = None


@contextlib.contextmanager
def keeping_tables() -> Iterator[list[Any]]:
    """Within: what kernels are given of a cache is also put into this list, and so lives with it.

    A captured CUDA graph reads a table for as long as it lives, long after a cache has dropped it.
    """
    global _kept
    before, _kept = _kept, []
    try:
        yield _kept
    finally:
        _kept = before


def keep_table(table: Any) -> None:
    """Called with what comes of a cache for a kernel; nothing happens outside `keeping_tables`."""
    if _kept is not None:
        _kept.append(table)


def must_not_wait() -> bool:
    """True while a CUDA graph is captured or rehearsed: the GPU can be asked nothing."""
    return _rehearsing or is_capturing()


def _gpu_index(device: str) -> int | None:
    """'cpu' -> None, 'cuda' -> 0, 'cuda:1' -> 1"""
    kind, colon, index = device.partition(":")
    if device == "cpu":
        return None
    if kind != "cuda" or (colon and not index.isdecimal()):
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}")
    return int(index or 0)


# A formula of ten NumPy calls walks ten times through memory. In blocks it walks through the cache
# instead: with what a formula makes of it, a block of so many elements fits an L2 cache.
BLOCK = 65536


def blockwise(formula: Callable[..., Array], *arrays: Array) -> Array:
    """y = formula(*arrays), for a formula on each element by itself, a block at a time.

    The arrays have one shape and the result the dtype of the first. Arrays that are small, strided
    or on a GPU are computed whole.
    """
    x = arrays[0]
    if x.ndim == 0:  # of which NumPy makes scalars, which no formula can write into
        return formula(*[a.reshape(1) for a in arrays]).reshape(())
    if x.size <= BLOCK or not all(type(a) is np.ndarray and a.flags.c_contiguous for a in arrays):
        return formula(*arrays)
    y = np.empty_like(x)
    out, flat = y.reshape(-1), [a.reshape(-1) for a in arrays]

    def compute(block: slice) -> None:
        out[block] = formula(*[a[block] for a in flat])

    _in_blocks(compute, x.size, 1)
    return y


def over_rows(function: Callable[[slice], Result], x: Array) -> list[Result]:
    """[function(rows) for blocks of the rows of the matrix x], from the first to the last.

    For an op on each row by itself: a block's rows, and what becomes of them, stay in the cache.
    """
    if type(x) is not np.ndarray:  # on a GPU, blocks would only cost launches
        return [function(slice(None))]
    return _in_blocks(function, len(x), max(1, x.shape[1]))


def _in_blocks(function: Callable[[slice], Result], n: int, width: int) -> list[Result]:
    """Call the function with slices of 0 … n, where each of the n has `width` elements."""
    step = max(1, BLOCK // width)
    return [function(slice(start, start + step)) for start in range(0, max(n, 1), step)]


# --- dtypes ---------------------------------------------------------------------------------------

float16 = np.dtype(np.float16)
bfloat16 = np.dtype(ml_dtypes.bfloat16)
float32 = np.dtype(np.float32)
float64 = np.dtype(np.float64)
int8 = np.dtype(np.int8)
int16 = np.dtype(np.int16)
int32 = np.dtype(np.int32)
int64 = np.dtype(np.int64)
uint8 = np.dtype(np.uint8)
bool_ = np.dtype(np.bool_)

_FLOATS = frozenset({float16, bfloat16, float32, float64})
_BY_NAME = {"bfloat16": bfloat16, "bool": bool_}
_default_float = float32


def as_dtype(dtype: Any) -> np.dtype:
    """np.dtype(dtype), which also knows 'bfloat16'."""
    return _BY_NAME[dtype] if isinstance(dtype, str) and dtype in _BY_NAME else np.dtype(dtype)


def is_float(dtype: np.dtype) -> bool:
    """True for the dtypes that can carry a gradient: float16, bfloat16, float32, float64."""
    return dtype in _FLOATS


def default_dtype() -> np.dtype:
    """The dtype of Python floats, of new parameters, and of integers divided: float32 at first."""
    return _default_float


def set_default_dtype(dtype: Any) -> None:
    """Make `dtype` (a float dtype) the default for what is made from now on."""
    global _default_float
    wanted = as_dtype(dtype)
    if not is_float(wanted):
        raise TypeError(f"the default dtype must be a float dtype, got {wanted}")
    _default_float = wanted


def promote(a: np.dtype, b: np.dtype) -> np.dtype:
    """The dtype of a ∘ b, by PyTorch's rule: a float beats every integer, the wider float wins.

    NumPy would make float64 of int32 + float32; here that is float32. float16 + bfloat16, which
    NumPy refuses, is float32.
    """
    if a == b:
        return a
    if is_float(a) != is_float(b):
        return a if is_float(a) else b
    if {a, b} == {float16, bfloat16}:
        return float32
    wider = np.promote_types(a, b)
    if is_float(wider) and not is_float(a):
        raise TypeError(f"no integer dtype holds both {a} and {b}; convert one with astype()")
    return wider


# --- randomness -----------------------------------------------------------------------------------

_MASK32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)
_ROUND_A, _ROUND_B = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_BLOCK = 8192  # counters at a time, so that the work arrays of a block stay in the cache


def philox(seed: int, offset: int, count: int, xp: Any = np) -> Array:
    """word[i] = Philox4x32-10(key = seed, counter = offset + i // 4)[i % 4], as uint32.

    A pure function of (seed, offset, i): whoever computes word i, in whatever order, on whatever
    device, gets the same bits. It equals Triton's `tl.philox(seed, lo, hi, 0, 0)`, where lo and hi
    are the halves of the 64-bit counter. Salmon et al., "Parallel random numbers: as easy as
    1, 2, 3", SC 2011.
    """
    if not isinstance(offset, int | np.integer):
        raise TypeError(f"philox() draws from an offset that is an integer, got {type(offset)}")
    blocks = -(-count // 4)
    words = xp.empty((blocks, 4), dtype=xp.uint32)
    for start in range(0, blocks, _BLOCK):
        stop = min(start + _BLOCK, blocks)
        words[start:stop] = _philox_block(seed, offset + start, stop - start, xp)
    return words.reshape(-1)[:count]


def _philox_block(seed: int, offset: int, n: int, xp: Any) -> Array:
    # 32-bit values live in uint64 arrays, so that a product keeps its high half.
    counter = xp.arange(n, dtype=xp.uint64) + np.uint64(offset % 2**64)
    c0, c1 = counter & _MASK32, counter >> _SHIFT32
    c2, c3 = xp.zeros_like(c0), xp.zeros_like(c0)
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        a, b = c0 * _ROUND_A, c2 * _ROUND_B
        xp.right_shift(b, _SHIFT32, out=c0)
        c0 ^= c1
        c0 ^= np.uint64(k0)
        xp.right_shift(a, _SHIFT32, out=c2)
        c2 ^= c3
        c2 ^= np.uint64(k1)
        b &= _MASK32
        a &= _MASK32
        c1, c3 = b, a
        k0, k1 = (k0 + _KEY_A) & 0xFFFFFFFF, (k1 + _KEY_B) & 0xFFFFFFFF
    return xp.stack((c0, c1, c2, c3), axis=1)


class RandomStream:
    """A position in one endless sequence of random words, fixed by its seed.

    The whole state is two integers, `seed` and `offset` (how many counters were used), so a
    checkpoint holds it and a resumed run draws what the uninterrupted run would have drawn.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = _valid_seed(seed)
        self.offset = 0

    def reserve(self, count: int) -> tuple[int, int]:
        """(seed, offset) of the next `count` words, which the stream then steps over.

        For ops that draw their words later, or twice: `philox(*stream.reserve(n), n)`.
        """
        start = self.offset
        self.offset += -(-int(count) // 4)
        return self.seed, start

    def words(self, count: int, xp: Any = np) -> Array:
        """The next `count` random uint32 words."""
        return philox(*self.reserve(count), count, xp)

    def uniform(self, size: int | Sequence[int] = (), dtype: Any = None, xp: Any = np) -> Array:
        """u ∈ [0, 1): as many random bits as the dtype holds, so that none rounds up to 1."""
        shape, dtype = _shape(size), as_dtype(dtype or _default_float)
        count = math.prod(shape)
        if dtype == float64:
            pairs = self.words(2 * count, xp).astype(xp.uint64).reshape(-1, 2)
            bits = (pairs[:, 0] << np.uint64(21)) | (pairs[:, 1] >> np.uint64(11))
            return (bits * 2.0**-53).reshape(shape)
        n = {float16: 11, bfloat16: 8}.get(dtype, 24)
        bits = self.words(count, xp) >> np.uint32(32 - n)
        return (bits.astype(xp.float32) * np.float32(2.0**-n)).astype(dtype).reshape(shape)

    def normal(self, size: int | Sequence[int] = (), dtype: Any = None, xp: Any = np) -> Array:
        """z = √(−2 ln u₁) · (cos 2πu₂, sin 2πu₂), by Box and Muller: mean 0, variance 1."""
        shape, dtype = _shape(size), as_dtype(dtype or _default_float)
        count = math.prod(shape)
        pairs = -(-count // 2)
        work = float64 if dtype == float64 else float32
        u = self.uniform((2, pairs), work, xp)
        radius = xp.sqrt(-2.0 * xp.log1p(-u[0]))  # 1 − u₁ ∈ (0, 1]: never log(0)
        angle = u[1] * work.type(2 * math.pi)
        z = xp.concatenate((radius * xp.cos(angle), radius * xp.sin(angle)))[:count]
        return z.astype(dtype, copy=False).reshape(shape)

    def integers(self, low: int, high: int, size: int | Sequence[int] = (), xp: Any = np) -> Array:
        """k ∈ {low, …, high − 1} as int64; the bias is below (high − low) / 2⁶⁴."""
        if high <= low:
            raise ValueError(f"integers() needs low < high, got low={low}, high={high}")
        shape = _shape(size)
        draws = self._words64(math.prod(shape), xp) % np.uint64(high - low)
        return (draws.astype(xp.int64) + low).reshape(shape)

    def permutation(self, n: int, xp: Any = np) -> Array:
        """The numbers 0 … n − 1 in random order, as int64."""
        return xp.argsort(self._words64(n, xp), kind="stable")

    def _words64(self, count: int, xp: Any) -> Array:
        pairs = self.words(2 * count, xp).astype(xp.uint64).reshape(-1, 2)
        return (pairs[:, 0] << _SHIFT32) | pairs[:, 1]

    def state(self) -> dict[str, int]:
        """{'seed': …, 'offset': …}: all there is to save."""
        return {"seed": self.seed, "offset": self.offset}

    def load_state(self, state: dict[str, int]) -> None:
        """Go on from `state()`."""
        self.seed, self.offset = _valid_seed(state["seed"]), int(state["offset"])


def _valid_seed(seed: int) -> int:
    if not 0 <= int(seed) < 2**64:
        raise ValueError(f"a seed is an integer from 0 to 2⁶⁴ − 1, got {seed}")
    return int(seed)


def _shape(size: int | Sequence[int]) -> tuple[int, ...]:
    return (int(size),) if isinstance(size, int | np.integer) else tuple([int(n) for n in size])


random = RandomStream(0)  # what dropout, initialisers and sampling draw from unless told otherwise


def manual_seed(seed: int) -> None:
    """Start the default random stream anew at `seed`."""
    random.seed, random.offset = _valid_seed(seed), 0


# --- memory ---------------------------------------------------------------------------------------


def keep_freed_memory() -> bool:
    """Tell glibc to keep large freed blocks for the next op; True where it took the advice.

    By default glibc returns a block of more than 128 KiB to the system when it is freed, and the
    next op of that size pays a page fault for every 4 KiB. Training frees and asks for the same
    sizes at every step: keeping them made a step of a small GPT a third faster (1.53 → 1.04 of
    PyTorch's time). TINYGRAD_LLM_MALLOC=system leaves the process as it is.
    """
    if not sys.platform.startswith("linux") or os.environ.get("TINYGRAD_LLM_MALLOC") == "system":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another libc (musl): nothing to tune
        return False
    m_trim_threshold, m_mmap_threshold = -1, -3
    # glibc before 2.35 refuses an mmap threshold above 32 MiB.
    mmap_set = mallopt(m_mmap_threshold, 1 << 30) or mallopt(m_mmap_threshold, 1 << 25)
    return bool(mmap_set and mallopt(m_trim_threshold, 2**31 - 1))


memory_is_kept = keep_freed_memory()


# --- BLAS -----------------------------------------------------------------------------------------


def blas_threads() -> int | None:
    """On how many cores a matrix product runs; None for another BLAS than NumPy's own OpenBLAS."""
    library = _openblas()
    return None if library is None else library.scipy_openblas_get_num_threads64_()


def set_blas_threads(count: int) -> int | None:
    """Let matrix products run on `count` cores; how many it were, None where BLAS is another."""
    library, before = _openblas(), blas_threads()
    if library is not None:
        library.scipy_openblas_set_num_threads64_(count)
    return before


@functools.cache
def _openblas() -> Any:
    package = Path(np.__file__).parent
    for folder in (package.parent / "numpy.libs", package / ".dylibs"):
        for path in folder.glob("*openblas*"):
            try:
                library = ctypes.CDLL(str(path))
                library.scipy_openblas_get_num_threads64_()
            except (OSError, AttributeError):
                continue
            return library
    return None
