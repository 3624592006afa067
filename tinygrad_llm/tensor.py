"""Tensor: an array that remembers how it was computed.

The class holds an array, its gradient and its node in the graph. What can be done with it stands
in `tinygrad_llm.ops`, one class per op; the methods here are one-liners onto those functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from sys import getrefcount
from typing import TYPE_CHECKING, Any

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.backend import Array

if TYPE_CHECKING:
    from tinygrad_llm.autograd import Function, Leaf

Axis = int | tuple[int, ...] | None


class Tensor:
    """An n-dimensional array with a gradient.

    `Tensor([[1.0, 2.0]], requires_grad=True)`. An array is taken as it is, without a copy; lists
    and scalars become new arrays (Python floats float32, integers int64).

    Args:
        data: nested lists, scalars, NumPy or CuPy arrays, another Tensor (its values).
        dtype: convert to it; default: the array's own.
        requires_grad: whether `backward()` shall fill `.grad`; only for float dtypes.
        device: 'cpu', 'cuda' or 'cuda:N'; default: where the data is.

    Attributes:
        data: the array. Writing into it by hand is not seen by the graph; see `mark_written`.
        grad: ∂L/∂self after `L.backward()`, or None.
        node: its place in the graph; None when no gradient flows here.
    """

    __slots__ = ("__weakref__", "data", "grad", "node")

    data: Array
    grad: Tensor | None
    node: Function | Leaf | None

    def __init__(
        self,
        data: Any,
        dtype: Any = None,
        requires_grad: bool = False,
        device: str | None = None,
    ) -> None:
        array = _to_array(data, None if dtype is None else backend.as_dtype(dtype))
        self.data = array if device is None else backend.to_device(array, device)
        self.grad = None
        self.node = None
        if requires_grad:
            self.requires_grad = True

    # --- what it is -------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        """How many elements (NumPy's meaning; PyTorch's `size()` is `shape`)."""
        return self.data.size

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    @property
    def device(self) -> str:
        """'cpu' or 'cuda:N'."""
        return backend.device_of(self.data)

    @property
    def requires_grad(self) -> bool:
        """True when a gradient flows to or through this tensor."""
        return self.node is not None

    @requires_grad.setter
    def requires_grad(self, on: bool) -> None:
        if on == (self.node is not None):
            return
        if not on:
            if not self.is_leaf:
                raise RuntimeError(
                    "requires_grad can be switched off only on leaves; use detach() on a result"
                )
            self.node = None
        elif backend.is_float(self.data.dtype):
            self.node = autograd.Leaf(self)
        else:
            raise TypeError(f"only float tensors can require a gradient, got {self.data.dtype}")

    def requires_grad_(self, on: bool = True) -> Tensor:
        """Set `requires_grad`; returns the tensor itself."""
        self.requires_grad = on
        return self

    @property
    def is_leaf(self) -> bool:
        """True unless the tensor is the recorded result of an op."""
        return self.node is None or type(self.node) is autograd.Leaf

    # --- gradients --------------------------------------------------------------------------------

    def backward(
        self,
        gradient: Tensor | None = None,
        retain_graph: bool = False,
        create_graph: bool = False,
    ) -> None:
        """leaf.grad += gradient · ∂self/∂leaf, for every leaf that requires a gradient.

        Args:
            gradient: ∂L/∂self to start from, of self's shape; a scalar starts from 1.
            retain_graph: keep what was saved, for another backward through the same graph.
            create_graph: record this pass too: `.grad` can then be differentiated itself.
        """
        autograd.backward([self], [gradient], retain_graph, create_graph)

    def detach(self) -> Tensor:
        """The same memory outside the graph: no gradient flows back through the result."""
        return Tensor(self.data.view())  # a view: how the graph tells it from this one

    def register_hook(self, hook: Callable[[Tensor], Tensor | None]) -> Callable[[], None]:
        """Call `hook(gradient)` when a backward pass has this tensor's whole gradient.

        The hook may return a Tensor to be used instead. Returns a function that removes it.
        """
        if self.node is None:
            raise RuntimeError("a hook needs a tensor that requires a gradient")
        hooks = self.node.hooks = self.node.hooks or []
        hooks.append(hook)

        def remove() -> None:
            if hook in hooks:
                hooks.remove(hook)

        return remove

    def retain_grad(self) -> None:
        """Fill `.grad` in backward though this tensor is the result of an op."""
        if self.is_leaf or self.node is None:
            return
        if not any(_keeps_for(hook, self) for hook in self.node.hooks or ()):
            self.register_hook(_GradientKeeper(self))

    # --- leaving and entering ---------------------------------------------------------------------

    def numpy(self) -> np.ndarray:
        """The values as a NumPy array: the same memory on the CPU, a copy from a GPU.

        Of a tensor that requires a gradient it is read-only, because a write would go unnoticed.
        """
        if not isinstance(self.data, np.ndarray):
            return self.data.get()
        view = self.data.view()
        if self.node is not None:
            view.flags.writeable = False
        return view

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.numpy(), dtype=dtype, copy=copy)

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return ops

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        function = getattr(ops, ufunc.__name__, None)
        if method != "__call__" or options or function is None:
            raise TypeError(
                f"np.{ufunc.__name__} cannot be applied to a Tensor in this way: use a function of "
                "tinygrad_llm.ops, or NumPy on tensor.numpy()"
            )
        return function(*inputs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func in _SAME_AS_OPS:
            return getattr(ops, func.__name__)(*args, **kwargs)
        return func(*_without_gradient(args, func), **kwargs)  # np.allclose(x, y) and the like

    def __dlpack__(self, **options: Any) -> Any:
        if self.node is not None:
            raise RuntimeError("DLPack cannot carry a gradient: export tensor.detach()")
        return self.data.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.data.__dlpack_device__()

    def item(self) -> Any:
        """The only element, as a Python number."""
        if self.size != 1:
            raise ValueError(f"item() needs exactly one element, got shape {self.shape}")
        return self.data.item()

    def tolist(self) -> Any:
        """The values as nested lists of Python numbers."""
        return self.data.tolist()

    def to(self, target: Any) -> Tensor:
        """On another device ('cpu', 'cuda:1'), or in another dtype; recorded."""
        if isinstance(target, str) and target.partition(":")[0] in ("cpu", "cuda"):
            return ops.to_device(self, target)
        return ops.astype(self, target)

    def cpu(self) -> Tensor:
        return ops.to_device(self, "cpu")

    def cuda(self, index: int = 0) -> Tensor:
        return ops.to_device(self, f"cuda:{index}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if not self.is_leaf:
            raise RuntimeError("only leaves can be copied deeply; use detach() on a result")
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        copy.data, copy.grad, copy.node = self.data.copy(), None, None
        copy.requires_grad = self.requires_grad
        if self.grad is not None:
            copy.grad = Tensor(self.grad.data.copy())
        return copy

    def __reduce__(self) -> Any:
        raise TypeError(
            "tensors are not pickled: save arrays with safetensors (tinygrad_llm.save_file), or "
            "copy.deepcopy them"
        )

    def __repr__(self) -> str:
        values = np.array2string(self.numpy(), separator=", ", prefix="Tensor(", threshold=200)
        notes = [values]
        if self.size > 200 or self.size == 0:
            notes.append(f"shape={self.shape}")
        if self.dtype not in (backend.default_dtype(), backend.int64, backend.bool_):
            notes.append(f"dtype={self.dtype}")
        if self.device != "cpu":
            notes.append(f"device='{self.device}'")
        if not self.is_leaf:
            notes.append(f"node={self.node!r}")
        elif self.requires_grad:
            notes.append("requires_grad=True")
        return f"Tensor({', '.join(notes)})"

    # --- writing in place -------------------------------------------------------------------------

    def copy_(self, source: Any) -> Tensor:
        """self[...] = source, in place and unrecorded: under no_grad(), or without gradients."""
        array = source.data if isinstance(source, Tensor) else source
        self._refuse_recorded_write("copy_()", source)
        self.data[...] = backend.to_device(array, self.device) if backend.is_array(array) else array
        autograd.mark_written(self.data, "copy_()")
        return self

    def fill_(self, value: float) -> Tensor:
        """self[...] = value, in place and unrecorded."""
        return self.copy_(value)

    def zero_(self) -> Tensor:
        """self[...] = 0, in place and unrecorded."""
        return self.copy_(0)

    def __setitem__(self, index: Any, value: Any) -> None:
        if self._is_recorded_write(value):
            self._refuse_shared("x[index] = y")
            self._become(ops.setitem(self, index, value))
        else:
            array = value.data if isinstance(value, Tensor) else value
            self.data[ops.as_index(index)] = array
            autograd.mark_written(self.data, "x[index] = y")

    def __iadd__(self, other: Any) -> Tensor:
        return self._in_place(ops.add, other, "x += y")

    def __isub__(self, other: Any) -> Tensor:
        return self._in_place(ops.subtract, other, "x -= y")

    def __imul__(self, other: Any) -> Tensor:
        return self._in_place(ops.multiply, other, "x *= y")

    def __itruediv__(self, other: Any) -> Tensor:
        return self._in_place(ops.divide, other, "x /= y")

    def _in_place(self, function: Callable[..., Tensor], other: Any, what: str) -> Tensor:
        recorded = self._is_recorded_write(other)
        if recorded:
            self._refuse_shared(what)
        result = function(self, other)
        if result.shape != self.shape or result.dtype != self.dtype:
            raise ValueError(
                f"{what}: the result has shape {result.shape} and dtype {result.dtype}, which does "
                f"not fit into {self.shape} and {self.dtype}; write x = x {what[2]} y"
            )
        if recorded:
            self._become(result)
        else:
            self.data[...] = result.data
            autograd.mark_written(self.data, what)
        return self

    def _is_recorded_write(self, source: Any) -> bool:
        from_graph = isinstance(source, Tensor) and source.node is not None
        return autograd.is_grad_enabled() and (self.node is not None or from_graph)

    def _refuse_recorded_write(self, what: str, source: Any) -> None:
        if self._is_recorded_write(source):
            raise RuntimeError(f"{what} is not recorded: do it under no_grad(), or on a detach()")

    def _become(self, result: Tensor) -> None:
        """Take the place of a recorded result: the graph keeps values, not places."""
        hooks = (self.node.hooks if self.node is not None else None) or []
        keepers = [hook for hook in hooks if _keeps_for(hook, self)]
        for hook in keepers:  # retain_grad() is about this tensor, whatever it holds
            hooks.remove(hook)
        self.data, self.node = result.data, result.node
        if keepers:
            self.retain_grad()

    def _refuse_shared(self, what: str) -> None:
        """Before a recorded write, which makes a new array: does anyone else hold the old one?

        Nobody can tell the difference otherwise, but a view would silently stay behind.
        """
        if self.node is not None and self.is_leaf:
            raise RuntimeError(
                f"{what} would overwrite a leaf that requires a gradient: do it under no_grad()"
            )
        if getrefcount(self.data) > 2 or self._is_view_of_another():  # the slot, the argument
            raise RuntimeError(
                f"{what} cannot be recorded: a view, or an op that saved it for backward, holds "
                f"the same memory; compute a new tensor instead (x = x + y, where(), concatenate())"
            )

    def _is_view_of_another(self) -> bool:
        """True unless the array has memory of its own, or that of one it was reshaped from."""
        if self.data.base is None:
            return False
        reshaped = type(self.data.base) is type(self.data) and self.data.base.flags.owndata
        return not reshaped or getrefcount(self.data.base) > 2  # the view, the argument

    # --- operators --------------------------------------------------------------------------------

    def __add__(self, other: Any) -> Tensor:
        return ops.add(self, other)

    def __radd__(self, other: Any) -> Tensor:
        return ops.add(other, self)

    def __sub__(self, other: Any) -> Tensor:
        return ops.subtract(self, other)

    def __rsub__(self, other: Any) -> Tensor:
        return ops.subtract(other, self)

    def __mul__(self, other: Any) -> Tensor:
        return ops.multiply(self, other)

    def __rmul__(self, other: Any) -> Tensor:
        return ops.multiply(other, self)

    def __truediv__(self, other: Any) -> Tensor:
        return ops.divide(self, other)

    def __rtruediv__(self, other: Any) -> Tensor:
        return ops.divide(other, self)

    def __pow__(self, other: Any) -> Tensor:
        return ops.power(self, other)

    def __rpow__(self, other: Any) -> Tensor:
        return ops.power(other, self)

    def __matmul__(self, other: Any) -> Tensor:
        return ops.matmul(self, other)

    def __rmatmul__(self, other: Any) -> Tensor:
        return ops.matmul(other, self)

    def __neg__(self) -> Tensor:
        return ops.negative(self)

    def __pos__(self) -> Tensor:
        return self

    def __abs__(self) -> Tensor:
        return ops.abs(self)

    def __invert__(self) -> Tensor:
        return Tensor(~self.data)

    def __and__(self, other: Any) -> Tensor:
        return ops.bitwise_and(self, other)

    def __rand__(self, other: Any) -> Tensor:
        return ops.bitwise_and(other, self)

    def __or__(self, other: Any) -> Tensor:
        return ops.bitwise_or(self, other)

    def __ror__(self, other: Any) -> Tensor:
        return ops.bitwise_or(other, self)

    def __eq__(self, other: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return NotImplemented if other is None else ops.equal(self, other)

    def __ne__(self, other: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return NotImplemented if other is None else ops.not_equal(self, other)

    def __lt__(self, other: Any) -> Tensor:
        return ops.less(self, other)

    def __le__(self, other: Any) -> Tensor:
        return ops.less_equal(self, other)

    def __gt__(self, other: Any) -> Tensor:
        return ops.greater(self, other)

    def __ge__(self, other: Any) -> Tensor:
        return ops.greater_equal(self, other)

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        if self.size != 1:
            raise ValueError(
                f"the truth of a tensor of shape {self.shape} is ambiguous: use .any() or .all()"
            )
        return bool(self.data.item())

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __index__(self) -> int:
        if backend.is_float(self.dtype):
            raise TypeError(f"only integer tensors can be an index, got {self.dtype}")
        return int(self.item())

    def __len__(self) -> int:
        if self.ndim == 0:
            raise TypeError("a tensor of zero dimensions has no len()")
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        for i in range(len(self)):
            yield ops.getitem(self, i)

    def __getitem__(self, index: Any) -> Tensor:
        return ops.getitem(self, index)

    # --- elementwise ------------------------------------------------------------------------------

    def exp(self) -> Tensor:
        return ops.exp(self)

    def log(self) -> Tensor:
        return ops.log(self)

    def sqrt(self) -> Tensor:
        return ops.sqrt(self)

    def rsqrt(self) -> Tensor:
        return ops.rsqrt(self)

    def tanh(self) -> Tensor:
        return ops.tanh(self)

    def sigmoid(self) -> Tensor:
        return ops.sigmoid(self)

    def erf(self) -> Tensor:
        return ops.erf(self)

    def relu(self) -> Tensor:
        return ops.relu(self)

    def abs(self) -> Tensor:
        return ops.abs(self)

    def clip(self, min: float | None = None, max: float | None = None) -> Tensor:
        return ops.clip(self, min, max)

    def masked_fill(self, mask: Any, value: float) -> Tensor:
        return ops.masked_fill(self, mask, value)

    def astype(self, dtype: Any, copy: bool = False) -> Tensor:
        return ops.astype(self, dtype, copy)

    def float(self) -> Tensor:
        return ops.astype(self, backend.float32)

    def copy(self) -> Tensor:
        """A recorded copy in new memory."""
        return ops.copy(self)

    # --- reductions -------------------------------------------------------------------------------

    def sum(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return ops.sum(self, axis, keepdims)

    def mean(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return ops.mean(self, axis, keepdims)

    def var(self, axis: Axis = None, ddof: int = 0, keepdims: bool = False) -> Tensor:
        return ops.var(self, axis, ddof, keepdims)

    def std(self, axis: Axis = None, ddof: int = 0, keepdims: bool = False) -> Tensor:
        return ops.std(self, axis, ddof, keepdims)

    def max(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return ops.max(self, axis, keepdims)

    def min(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return ops.min(self, axis, keepdims)

    def prod(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return ops.prod(self, axis, keepdims)

    def argmax(self, axis: int | None = None, keepdims: bool = False) -> Tensor:
        return ops.argmax(self, axis, keepdims)

    def argmin(self, axis: int | None = None, keepdims: bool = False) -> Tensor:
        return ops.argmin(self, axis, keepdims)

    def all(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return Tensor(self.data.all(axis=axis, keepdims=keepdims))

    def any(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return Tensor(self.data.any(axis=axis, keepdims=keepdims))

    def cumsum(self, axis: int = -1) -> Tensor:
        return ops.cumsum(self, axis)

    def logsumexp(self, axis: Axis = -1, keepdims: bool = False) -> Tensor:
        return ops.logsumexp(self, axis, keepdims)

    def norm(self, ord: float = 2, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return ops.norm(self, ord, axis, keepdims)

    def softmax(self, axis: int = -1) -> Tensor:
        return ops.softmax(self, axis)

    def log_softmax(self, axis: int = -1) -> Tensor:
        return ops.log_softmax(self, axis)

    # --- shape ------------------------------------------------------------------------------------

    @property
    def T(self) -> Tensor:
        return ops.transpose(self)

    def reshape(self, *shape: int | Sequence[int]) -> Tensor:
        return ops.reshape(self, flat_shape(shape))

    def flatten(self, start: int = 0, end: int = -1) -> Tensor:
        return ops.flatten(self, start, end)

    def transpose(self, *axes: int | Sequence[int]) -> Tensor:
        """All axes in a new order, as in NumPy; to exchange two, PyTorch's way: swapaxes(a, b)."""
        return ops.transpose(self, flat_shape(axes) or None)

    def permute(self, *axes: int | Sequence[int]) -> Tensor:
        return ops.transpose(self, flat_shape(axes))

    def swapaxes(self, axis1: int, axis2: int) -> Tensor:
        return ops.swapaxes(self, axis1, axis2)

    def broadcast_to(self, shape: Sequence[int]) -> Tensor:
        return ops.broadcast_to(self, shape)

    def expand(self, *shape: int | Sequence[int]) -> Tensor:
        return ops.expand(self, flat_shape(shape))

    def squeeze(self, axis: Axis = None) -> Tensor:
        return ops.squeeze(self, axis)

    def unsqueeze(self, axis: int) -> Tensor:
        return ops.expand_dims(self, axis)

    def split(self, sections: int | Sequence[int], axis: int = 0) -> list[Tensor]:
        return ops.split(self, sections, axis)

    def chunk(self, chunks: int, axis: int = 0) -> list[Tensor]:
        return ops.chunk(self, chunks, axis)

    def flip(self, axis: Axis = None) -> Tensor:
        return ops.flip(self, axis)

    def roll(self, shift: Any, axis: Axis = None) -> Tensor:
        return ops.roll(self, shift, axis)

    def tril(self, k: int = 0) -> Tensor:
        return ops.tril(self, k)

    def triu(self, k: int = 0) -> Tensor:
        return ops.triu(self, k)


class _GradientKeeper:
    """A hook that stores the gradient on its tensor, held weakly so that no cycle arises."""

    def __init__(self, tensor: Tensor) -> None:
        import weakref

        self.tensor = weakref.ref(tensor)

    def __call__(self, gradient: Tensor) -> None:
        tensor = self.tensor()
        if tensor is None:
            return
        if gradient.node is None:  # memory that others may hold, or read-only
            gradient = Tensor(gradient.data.copy())
        tensor.grad = gradient if tensor.grad is None else tensor.grad + gradient


def _keeps_for(hook: Any, tensor: Tensor) -> bool:
    return isinstance(hook, _GradientKeeper) and hook.tensor() is tensor


# NumPy's functions whose defaults are those of the op of the same name: np.sum(x) is ops.sum(x).
_SAME_AS_OPS = frozenset(
    {
        *(np.sum, np.mean, np.var, np.std, np.max, np.min, np.prod, np.argmax, np.argmin),
        *(np.where, np.concatenate, np.stack, np.split, np.reshape, np.transpose, np.swapaxes),
        *(np.moveaxis, np.broadcast_to, np.expand_dims, np.squeeze, np.flip, np.roll, np.tril),
        *(np.triu, np.copy, np.clip, np.zeros_like, np.ones_like, np.take_along_axis, np.argsort),
        *(np.einsum,),
    }
)


def _without_gradient(value: Any, func: Any) -> Any:
    """The arguments of a NumPy function with arrays for Tensors; none may require a gradient."""
    if isinstance(value, Tensor):
        if value.node is not None:
            raise TypeError(
                f"np.{func.__name__} is not recorded, and an argument requires a gradient: use "
                "detach() on it where none shall flow"
            )
        return value.numpy()
    if isinstance(value, tuple | list):
        return type(value)([_without_gradient(v, func) for v in value])
    return value


def from_dlpack(source: Any) -> Tensor:
    """A Tensor on the memory of any array that speaks DLPack (NumPy, CuPy, PyTorch …), no copy."""
    device_type = int(source.__dlpack_device__()[0])
    library = np if device_type == 1 else backend.cupy()  # 1: CPU, 2: CUDA
    return Tensor(library.from_dlpack(source))


def _to_array(data: Any, dtype: np.dtype | None) -> Array:
    if isinstance(data, Tensor):
        data = data.data
    if not backend.is_array(data):
        weak = not isinstance(data, np.generic)
        data = _from_lists(data)
        if dtype is None and weak and data.dtype == backend.float64:
            dtype = backend.default_dtype()
    elif type(data) is not np.ndarray and isinstance(data, np.ndarray):
        data = np.asarray(data)  # a subclass (memmap, matrix) has operators of its own
    if data.dtype not in _DTYPES:
        data = _native(data)
    return data if dtype is None or data.dtype == dtype else data.astype(dtype)


_DTYPES = frozenset([backend.bfloat16, *[np.dtype(code) for code in "?bhilqBHILQefd"]])


def _native(array: Array) -> Array:
    """The array in this machine's byte order; refuses what does not hold numbers."""
    dtype = array.dtype.newbyteorder("=")
    if dtype not in _DTYPES:
        raise TypeError(
            f"a Tensor is made from numbers (integers, booleans, floats of 16 to 64 bits) in an "
            f"array or in nested lists, got data of dtype {dtype}"
        )
    return array.astype(dtype)


def _from_lists(data: Any) -> np.ndarray:
    if isinstance(data, list | tuple):
        data = _unwrap(data)
    try:
        return np.asarray(data)
    except ValueError as error:
        raise ValueError(
            f"a Tensor is made from nested lists of equal lengths at each level: {error}"
        ) from None


def _unwrap(data: Any) -> Any:
    """Nested lists with the Tensors in them as lists of numbers."""
    if isinstance(data, Tensor):
        return data.tolist()
    return [_unwrap(x) for x in data] if isinstance(data, list | tuple) else data


def flat_shape(shape: tuple[Any, ...]) -> tuple[int, ...]:
    """reshape(2, 3) and reshape((2, 3)) are the same."""
    if len(shape) == 1 and not isinstance(shape[0], int | np.integer):
        return tuple(shape[0])
    return shape


# The one knot in the house: methods call ops, ops make Tensors.
from tinygrad_llm import autograd, ops  # noqa: E402
