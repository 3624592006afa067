"""Is the gradient right? One random projection against central differences.

A gradient of n elements would cost 2n evaluations to check one by one. Projected on one random
direction d it costs four: with L(x) = Σ r ⊙ f(x),

    Σ ∇L ⊙ d  =  (8 [L(x+hd) − L(x−hd)] − [L(x+2hd) − L(x−2hd)]) / 12h  +  O(h⁴)

A wrong gradient meets a random direction with probability 0. The second order is the same check,
made of the function x ↦ Σ ∇L(x) ⊙ v. Only when a check fails are the elements tried one by one,
to say which is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinygrad_llm import autograd, backend
from tinygrad_llm.autograd import Function
from tinygrad_llm.tensor import Tensor

STEP = 1e-4
TOLERANCE = 1e-6  # relative, in float64


class GradcheckError(AssertionError):
    """A gradient is not the derivative; says of which argument and element."""


def gradcheck(
    function: Callable[..., Tensor],
    *inputs: Any,
    order: int = 2,
    tolerance: float = TOLERANCE,
    name: str = "the function",
    seed: int = 0,
) -> float:
    """The worst relative error of f's gradients, first and (order=2) second; raises when too large.

    `gradcheck(lambda x, w: (x @ w).tanh(), x, w)`

    Args:
        function: of Tensors, returns one Tensor; must compute the same thing at each call, so
            seed the random stream inside it if it draws.
        inputs: arrays or Tensors; the float ones are differentiated, as float64.
        order: 1, or 2 to check the gradient of the gradient too.
        tolerance: the largest relative error allowed.
        name: what the message calls the function.
        seed: of the random projections.

    Raises:
        GradcheckError: names the argument, the index, the value got and the one expected.
    """
    return max(_errors_by_order(function, inputs, order, tolerance, name, seed))


def _errors_by_order(
    function: Callable[..., Tensor],
    inputs: Sequence[Any],
    order: int,
    tolerance: float,
    name: str,
    seed: int,
) -> list[float]:
    """The worst relative error of the first order and, when it is asked for, of the second."""
    arrays = [_as_float64(x) for x in inputs]
    if not any(a.dtype == np.float64 for a in arrays):
        raise ValueError(f"gradcheck of {name}: none of the {len(arrays)} inputs is of floats")
    rng = np.random.default_rng(seed)
    objective = _projected(function, rng)
    try:
        errors = [_check(objective, arrays, rng, tolerance, f"{name}, first order")]
    except GradcheckError as error:
        raise _in_terms_of_y(function, arrays, tolerance, name) or error from None
    if order > 1:
        gradient = _directional_gradient(objective, arrays, rng)
        errors.append(_check(gradient, arrays, rng, tolerance, f"{name}, second order"))
    return errors


def _as_float64(x: Any) -> np.ndarray:
    array = x.numpy() if isinstance(x, Tensor) else np.asarray(x)
    return array.astype(np.float64) if backend.is_float(array.dtype) else array


Objective = Callable[[Sequence[Tensor]], Tensor]


def _projected(function: Callable[..., Tensor], rng: np.random.Generator) -> Objective:
    """L(x) = Σ r ⊙ y + ¼ y², y = f(x): the square lets the gradient that arrives depend on x."""
    weights: list[np.ndarray] = []

    def objective(inputs: Sequence[Tensor]) -> Tensor:
        y = function(*inputs)
        if not isinstance(y, Tensor):
            raise TypeError(f"gradcheck needs a function that returns a Tensor, got {y!r}")
        if not weights:
            weights.append(rng.normal(size=y.shape))
        return (y * weights[0] + 0.25 * (y * y)).sum()

    return objective


def _directional_gradient(
    objective: Objective, arrays: Sequence[np.ndarray], rng: np.random.Generator
) -> Objective:
    """x ↦ Σ ∇L(x) ⊙ v, itself a recorded function of x."""
    directions = [rng.normal(size=a.shape) for a in arrays]

    def gradient(inputs: Sequence[Tensor]) -> Tensor:
        total = Tensor(np.zeros(()))
        for g, v in zip(_gradients(objective, inputs, create_graph=True), directions, strict=True):
            if g is not None:
                total = total + (g * v).sum()
        return total

    return gradient


def _gradients(
    objective: Objective, inputs: Sequence[Tensor], create_graph: bool = False
) -> list[Tensor | None]:
    """∂L/∂x for each float input; None for the others and for those that L does not depend on."""
    y = objective(inputs)
    wanted = [x for x in inputs if x.requires_grad]
    if y.node is None or not wanted:
        return [None] * len(inputs)
    found = iter(autograd.grad(y, wanted, create_graph=create_graph, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in inputs]


def _check(
    objective: Objective,
    arrays: Sequence[np.ndarray],
    rng: np.random.Generator,
    tolerance: float,
    name: str,
) -> float:
    """Compare each argument's gradient with central differences along one random direction."""
    inputs = _leaves(arrays)
    gradients = _gradients(objective, inputs)
    worst = 0.0
    for i, (array, g) in enumerate(zip(arrays, gradients, strict=True)):
        if array.dtype != np.float64:
            continue
        got_array = np.zeros(array.shape) if g is None else np.asarray(g.numpy())
        if got_array.shape != array.shape:
            raise GradcheckError(
                f"{name}: the gradient of argument {i} has shape {got_array.shape}, expected "
                f"{array.shape}"
            )
        d = rng.normal(size=array.shape)
        got = float((got_array * d).sum())
        expected = _central_difference(objective, arrays, i, d)
        scale = float(np.sqrt(((got_array * d) ** 2).sum()))
        error = abs(got - expected) / max(abs(got), abs(expected), scale, 1e-3)
        if not error <= tolerance:  # also when it is NaN
            raise GradcheckError(_locate(objective, arrays, i, got_array, name, error))
        worst = max(worst, error)
    return worst


def _leaves(arrays: Sequence[np.ndarray]) -> list[Tensor]:
    return [Tensor(a, requires_grad=a.dtype == np.float64) for a in arrays]


def _central_difference(
    objective: Objective, arrays: Sequence[np.ndarray], i: int, d: np.ndarray
) -> float:
    """dL/dt at x + t d, t = 0, by the five-point rule."""

    def at(t: float) -> float:
        moved = [_moved(a, d, t) if j == i else a for j, a in enumerate(arrays)]
        return float(objective(_leaves(moved)))

    near, far = at(STEP) - at(-STEP), at(2 * STEP) - at(-2 * STEP)
    return (8 * near - far) / (12 * STEP)


def _moved(array: np.ndarray, d: np.ndarray, t: float) -> np.ndarray:
    """array + t d with the strides of array: a transposed input stays transposed."""
    out = like_layout(array)
    np.add(array, t * d, out=out)
    return out


def like_layout(array: np.ndarray) -> np.ndarray:
    """An uninitialised array with the very strides of `array`, negative and gapped ones too."""
    if array.size == 0 or array.flags.c_contiguous:
        return np.empty(array.shape, array.dtype)
    reach = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)]
    low = sum(r for r in reach if r < 0)
    high = sum(r for r in reach if r > 0)
    buffer = np.zeros(high - low + array.itemsize, np.uint8)
    return np.ndarray(array.shape, array.dtype, buffer, -low, array.strides)


def _locate(
    objective: Objective,
    arrays: Sequence[np.ndarray],
    i: int,
    got: np.ndarray,
    name: str,
    error: float,
) -> str:
    """Try the elements one by one (the first thousand) and name the worst."""
    worst, message = -1.0, ""
    for index in list(np.ndindex(arrays[i].shape))[:1000]:
        d = np.zeros(arrays[i].shape)
        d[index] = 1.0
        expected = _central_difference(objective, arrays, i, d)
        off = abs(got[index] - expected)
        if not off <= worst:
            worst = off
            message = f"index {index}, got {got[index]:.9g}, expected {expected:.9g}"
    return (
        f"{name}: argument {i} of shape {arrays[i].shape}, {message}, for L = Σ r ⊙ y + ¼ y² with "
        f"random r (relative error along a random direction {error:.2e})"
    )


def _in_terms_of_y(
    function: Callable[..., Tensor], arrays: Sequence[np.ndarray], tolerance: float, name: str
) -> GradcheckError | None:
    """The error said of the function itself: the first ∂y[j]/∂x[i] which is wrong.

    None when there are too many elements to look, or each is right by itself.
    """
    size = function(*_leaves(arrays)).size
    if size * sum(a.size for a in arrays if a.dtype == np.float64) > 10_000:
        return None
    for j in range(size):

        def element(inputs: Sequence[Tensor], j: int = j) -> Tensor:
            return function(*inputs).reshape(-1)[j]

        gradients = _gradients(element, _leaves(arrays))
        for i, (array, g) in enumerate(zip(arrays, gradients, strict=True)):
            if array.dtype != np.float64:
                continue
            got = np.zeros(array.shape) if g is None else g.numpy()
            if got.shape != array.shape:
                return None
            for index in np.ndindex(array.shape):
                d = np.zeros(array.shape)
                d[index] = 1.0
                expected = _central_difference(element, arrays, i, d)
                if not abs(got[index] - expected) <= tolerance * max(1.0, abs(expected)):
                    at = np.unravel_index(j, function(*_leaves(arrays)).shape)
                    return GradcheckError(
                        f"{name}, first order: argument {i} of shape {array.shape}, index {index}, "
                        f"got {got[index]:.9g}, expected {expected:.9g}, for the derivative of the "
                        f"output's element {tuple(map(int, at))}"
                    )
    return None


# --- every op of the engine -----------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What the check of one op found: worst relative errors in float64, over all its samples."""

    name: str
    samples: int
    first: float
    second: float | None
    refusal: str | None
    ok: bool
    message: str


def check_all(ops: Sequence[str] | None = None) -> Iterator[Report]:
    """Check every op of the engine, or those named, on its samples in three memory layouts.

    Raises:
        ValueError: a name that no op has.
    """
    from tinygrad_llm.ops.samples import samples

    by_name = {op.__name__: (op, found) for op, found in samples().items()}
    unknown = [name for name in ops or () if name not in by_name]
    if unknown:
        raise ValueError(f"no op is called {', '.join(unknown)}; there are {', '.join(by_name)}")
    for name in ops or by_name:
        yield check_op(*by_name[name])


def check_op(op: type[Function], samples: Sequence[Any]) -> Report:
    """Gradients of one op, first and second order, over its samples."""
    name, order = op.__name__, 2 if op.second_order else 1
    worst = [0.0] * order
    refusal = None if op.second_order else "no second order: it saves an intermediate"
    message = ""
    try:
        for sample in samples:
            for layout, arrays in layouts(sample.arrays):
                what = f"{name} ({sample.note}, {layout})"
                errors = _errors_by_order(sample.function, arrays, order, TOLERANCE, what, seed=0)
                worst = [max(pair) for pair in zip(worst, errors, strict=True)]
    except GradcheckError as error:
        message = str(error)
    second = worst[1] if order > 1 else None
    return Report(name, len(samples), worst[0], second, refusal, not message, message)


def layouts(arrays: Sequence[np.ndarray]) -> Iterator[tuple[str, list[np.ndarray]]]:
    """The same values in C order, with axes transposed in memory, and backwards with gaps."""
    yield "contiguous", [np.ascontiguousarray(a) if a.ndim else a for a in arrays]
    yield "transposed", [np.asarray(a, order="F") for a in arrays]
    yield "strided", [_with_gaps(a) for a in arrays]


def _with_gaps(a: np.ndarray) -> np.ndarray:
    if a.ndim == 0:
        return a
    wide = np.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)
    wide[..., ::2] = a[..., ::-1]
    return wide[..., ::2][..., ::-1]
