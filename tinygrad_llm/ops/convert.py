"""What ops accept: Tensors, arrays, lists and Python scalars, brought to one dtype and device.

Python scalars are weak: they take the dtype of the tensor they meet, so nothing becomes float64 by
accident. NumPy scalars count as Python scalars here, as in PyTorch: `x * np.sqrt(2.0)` keeps x's
dtype.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.autograd import Function
from tinygrad_llm.backend import Array, is_float, namespace, promote
from tinygrad_llm.tensor import Tensor


def as_tensor(x: Any, like: Tensor | None = None) -> Tensor:
    """x itself when it is a Tensor; otherwise a constant, scalars in the dtype of `like`."""
    if isinstance(x, Tensor):
        return x
    if like is None or not is_scalar(x):
        return Tensor(x)
    dtype = like.data.dtype
    if not is_float(dtype):
        if not isinstance(x, _WHOLE):
            dtype = backend.default_dtype()
        elif dtype == backend.bool_ and not isinstance(x, _TRUTH):
            dtype = backend.int64
    return Tensor(_scalar(x, dtype, like.data))


def _scalar(x: Any, dtype: np.dtype, like: Array) -> Array:
    """x as an array of no dimensions, of `like`'s library.

    On a GPU as the argument of a launch, not as a copy from the host's memory: that would wait for
    a transfer, and a CUDA graph could not repeat it.
    """
    if type(like) is np.ndarray:
        return np.asarray(x, dtype=dtype)
    filled = np.dtype(np.float32) if dtype == backend.bfloat16 else dtype
    return namespace(like).full((), x, dtype=filled).astype(dtype, copy=False)


def is_scalar(x: Any) -> bool:
    """True for the real numbers and booleans of Python and NumPy, which are weak."""
    if isinstance(x, np.generic):
        return x.dtype.kind in "biu" or is_float(x.dtype)
    return isinstance(x, _NUMBER)


_TRUTH = (bool, np.bool_)
_WHOLE = (int, np.integer, np.bool_)
_NUMBER = (int, float)


def pair(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Two operands as Tensors of one dtype, the one that `backend.promote` says."""
    if not isinstance(a, Tensor):
        if is_scalar(a) and not isinstance(b, Tensor):
            b = as_tensor(b)
        a = as_tensor(a, b if isinstance(b, Tensor) else None)
    if not isinstance(b, Tensor):
        b = as_tensor(b, a)
    if a.data.dtype != b.data.dtype:
        dtype = promote(a.data.dtype, b.data.dtype)
        a, b = astype(a, dtype), astype(b, dtype)
    if type(a.data) is not type(b.data):
        raise ValueError(
            f"operands are on different devices, {a.device} and {b.device}: move one with to()"
        )
    return a, b


def float_pair(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """As `pair`, integers becoming the default float dtype."""
    a, b = pair(a, b)
    return as_float(a), as_float(b)


def as_float(x: Any) -> Tensor:
    """x as a Tensor of a float dtype: integers and booleans become the default dtype."""
    if not isinstance(x, Tensor):
        x = Tensor(x)
    if x.node is not None or is_float(x.data.dtype):
        return x
    return Tensor(x.data.astype(backend.default_dtype()))


def widened(x: Any) -> Any:
    """x in float32 when it is of half precision: for formulas whose steps half cannot hold.

    Squares overflow float16 above 256, and bfloat16 counts no further than 256.
    """
    return x.astype(np.float32) if x.dtype.itemsize == 2 else x


def narrowed(y: Any, x: Any) -> Any:
    """y in the dtype of x, from which it was computed in a wider one."""
    return y if y.dtype == x.dtype else y.astype(x.dtype)


def as_array(x: Any, like: Array) -> Array:
    """A constant (mask, index, weight) as an array of `like`'s library."""
    if isinstance(x, Tensor):
        x = x.data
    return x if type(x) is type(like) else namespace(like).asarray(x)


def asarray(x: Any, dtype: Any = None) -> Tensor:
    """y = x as a Tensor, of `dtype` if one is given; x itself when it is one already."""
    x = as_tensor(x)
    return x if dtype is None else astype(x, dtype)


class Cast(Function):
    """y = x in another float dtype        dx = g in x's dtype"""

    def forward(self, x: Array, dtype: np.dtype, copy: bool) -> Array:
        self.dtype = x.dtype
        return x.astype(dtype, copy=copy)

    def backward(self, g: Any) -> Any:
        return g.astype(self.dtype)


def astype(x: Any, dtype: Any, copy: bool = False) -> Tensor:
    """y = x converted to `dtype`. A gradient flows through float dtypes only."""
    x, dtype = as_tensor(x), backend.as_dtype(dtype)
    if x.data.dtype == dtype and not copy:
        return x
    if not is_float(dtype):
        return Tensor(x.data.astype(dtype))
    return Cast.apply(x, dtype=dtype, copy=copy)


class ToDevice(Function):
    """y = x on another device        dx = g on x's device"""

    def forward(self, x: Array, device: str) -> Array:
        self.device = backend.device_of(x)
        return backend.to_device(x, device)

    def backward(self, g: Any) -> Any:
        return g.to(self.device) if isinstance(g, Tensor) else backend.to_device(g, self.device)


def to_device(x: Any, device: str) -> Tensor:
    """y = x on `device`: 'cpu', 'cuda' or 'cuda:N'; recorded, so gradients come back."""
    x = as_tensor(x)
    return x if x.device == device else ToDevice.apply(x, device=device)
