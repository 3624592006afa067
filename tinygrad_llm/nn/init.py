"""First values of parameters, written in place under PyTorch's names.

    init.normal_(layer.weight, std=0.02)

Each function draws from `backend.random`, which `manual_seed` sets, or from the stream it is given,
and returns the tensor. fan_in and fan_out are how many inputs and outputs one unit has: the sizes
of axis 1 and axis 0 of a weight (out, in), each times the sizes of any further axes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.autograd import no_grad
from tinygrad_llm.backend import Array, RandomStream
from tinygrad_llm.tensor import Tensor

_T = TypeVar("_T", bound=Tensor)

_skipping = ContextVar("skipping", default=False)
_placeholding = ContextVar("placeholding", default=False)


@contextlib.contextmanager
def skip_init() -> Iterator[None]:
    """Within the block the functions of this module do nothing and draw nothing.

    For a model whose values are written right afterwards, all of them: from a file, or by a rule
    of its own. Until then they are whatever the memory held.
    """
    token = _skipping.set(True)
    try:
        yield
    finally:
        _skipping.reset(token)


@contextlib.contextmanager
def placeholders() -> Iterator[None]:
    """As `skip_init`, and parameters made within the block take no memory, however large.

    They have their shape and dtype and cannot be written. `load_state_dict(…, assign=True)` then
    checks a file against the whole model and puts the arrays in their place.
    """
    token = _placeholding.set(True)
    try:
        with skip_init():
            yield
    finally:
        _placeholding.reset(token)


def allocate(shape: tuple[int, ...]) -> Array:
    """The memory of a new parameter in the default dtype, its values still to be written."""
    dtype = backend.default_dtype()
    if _placeholding.get():
        return np.broadcast_to(np.zeros((), dtype), shape)
    return np.empty(shape, dtype)


def constant_(tensor: _T, value: float) -> _T:
    """x ← value"""
    if not _skipping.get():
        with no_grad():
            tensor.fill_(value)
    return tensor


def zeros_(tensor: _T) -> _T:
    """x ← 0"""
    return constant_(tensor, 0.0)


def ones_(tensor: _T) -> _T:
    """x ← 1"""
    return constant_(tensor, 1.0)


def normal_(
    tensor: _T, mean: float = 0.0, std: float = 1.0, stream: RandomStream | None = None
) -> _T:
    """x ~ N(mean, std²)"""
    _require(std >= 0, "normal_", "std ≥ 0", std)
    return _fill(tensor, stream, lambda s, n, xp: mean + std * s.normal(n, _work(tensor), xp))


def uniform_(tensor: _T, a: float = 0.0, b: float = 1.0, stream: RandomStream | None = None) -> _T:
    """x ~ uniform on [a, b)"""
    _require(a <= b, "uniform_", "a ≤ b", (a, b))
    return _fill(tensor, stream, lambda s, n, xp: a + (b - a) * s.uniform(n, _work(tensor), xp))


def trunc_normal_(
    tensor: _T,
    mean: float = 0.0,
    std: float = 1.0,
    a: float = -2.0,
    b: float = 2.0,
    stream: RandomStream | None = None,
) -> _T:
    """x ~ N(mean, std²) given a ≤ x ≤ b: what falls outside is drawn again.

    a and b are values, not multiples of std. [a, b] must hold at least 1 % of the distribution.
    """
    _require(std > 0, "trunc_normal_", "std > 0", std)
    inside = _normal_cdf((b - mean) / std) - _normal_cdf((a - mean) / std)
    _require(inside >= 0.01, "trunc_normal_", "[a, b] with 1 % of the distribution", (a, b))

    def draw(s: RandomStream, n: int, xp: Any) -> Array:
        x = mean + std * s.normal(n, _work(tensor), xp)
        while (outside := ((x < a) | (x > b)).nonzero()[0]).size:
            x[outside] = mean + std * s.normal(int(outside.size), _work(tensor), xp)
        return x

    return _fill(tensor, stream, draw)


def xavier_uniform_(tensor: _T, gain: float = 1.0, stream: RandomStream | None = None) -> _T:
    """x ~ uniform(±gain · √(6 / (fan_in + fan_out)))

    Keeps the variance of values forward and of gradients backward. Glorot and Bengio,
    "Understanding the difficulty of training deep feedforward neural networks", 2010.
    """
    bound = gain * math.sqrt(6.0 / max(1, sum(_fans(tensor, "xavier_uniform_"))))
    return uniform_(tensor, -bound, bound, stream)


def xavier_normal_(tensor: _T, gain: float = 1.0, stream: RandomStream | None = None) -> _T:
    """x ~ N(0, gain² · 2 / (fan_in + fan_out)); see `xavier_uniform_`."""
    std = gain * math.sqrt(2.0 / max(1, sum(_fans(tensor, "xavier_normal_"))))
    return normal_(tensor, 0.0, std, stream)


def kaiming_uniform_(
    tensor: _T,
    a: float = 0.0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    stream: RandomStream | None = None,
) -> _T:
    """x ~ uniform(±gain · √(3 / fan)), with the gain of the nonlinearity that follows

    Args:
        a: slope of the leaky ReLU on its negative side (0: ReLU)
        mode: 'fan_in' keeps the variance forward, 'fan_out' backward
        nonlinearity: a name that `calculate_gain` knows

    He et al., "Delving deep into rectifiers", 2015.
    """
    bound = math.sqrt(3.0) * _kaiming_std(tensor, a, mode, nonlinearity)
    return uniform_(tensor, -bound, bound, stream)


def kaiming_normal_(
    tensor: _T,
    a: float = 0.0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    stream: RandomStream | None = None,
) -> _T:
    """x ~ N(0, gain² / fan); the arguments are those of `kaiming_uniform_`."""
    return normal_(tensor, 0.0, _kaiming_std(tensor, a, mode, nonlinearity), stream)


def calculate_gain(nonlinearity: str, param: float = 0.0) -> float:
    """How much larger weights are drawn before this nonlinearity, to make up for its shrinking.

    linear and sigmoid 1, tanh 5/3, relu √2, leaky_relu √(2 / (1 + slope²)), with `param` the slope.
    """
    gains = {
        "linear": 1.0,
        "sigmoid": 1.0,
        "tanh": 5.0 / 3.0,
        "relu": math.sqrt(2.0),
        "leaky_relu": math.sqrt(2.0 / (1.0 + param * param)),
    }
    if nonlinearity not in gains:
        raise ValueError(f"nonlinearity is one of {', '.join(gains)}, got {nonlinearity!r}")
    return gains[nonlinearity]


def _kaiming_std(tensor: Tensor, a: float, mode: str, nonlinearity: str) -> float:
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"mode is 'fan_in' or 'fan_out', got {mode!r}")
    fan = _fans(tensor, "kaiming initialisation")[mode == "fan_out"]
    return calculate_gain(nonlinearity, a) / math.sqrt(max(1, fan))


def _fans(tensor: Tensor, name: str) -> tuple[int, int]:
    """(fan_in, fan_out)"""
    if tensor.ndim < 2:
        raise ValueError(f"{name} needs a weight of two or more axes, got shape {tensor.shape}")
    field = math.prod(tensor.shape[2:])
    return tensor.shape[1] * field, tensor.shape[0] * field


def _normal_cdf(x: float) -> float:
    return 0.5 * (1.0 + math.erf(x / math.sqrt(2.0)))


def _require(ok: bool, name: str, wanted: str, got: Any) -> None:
    if not ok:
        raise ValueError(f"{name}() needs {wanted}, got {got}")


def _work(tensor: Tensor) -> Any:
    """What is drawn in: float64 for float64, float32 for all others, rounded once at the end."""
    return backend.float64 if tensor.dtype == backend.float64 else backend.float32


_PIECE = 1 << 20  # values at a time: the work arrays of a draw are several times its size


def _fill(
    tensor: _T, stream: RandomStream | None, draw: Callable[[RandomStream, int, Any], Array]
) -> _T:
    """x ← draw(stream, how many, array library), piece by piece in C order."""
    if _skipping.get():
        return tensor
    xp = backend.namespace(tensor.data)
    values = xp.empty(tensor.size, dtype=tensor.dtype)
    for start in range(0, tensor.size, _PIECE):
        count = min(_PIECE, tensor.size - start)
        values[start : start + count] = draw(stream or backend.random, count, xp)
    with no_grad():
        tensor.copy_(values.reshape(tensor.shape))
    return tensor
