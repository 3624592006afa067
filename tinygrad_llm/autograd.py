"""The graph of a computation and the walk back through it.

An op is a class: `forward` computes on arrays, `backward` gives the chain rule, side by side.
Calling it makes one node, an instance of the class, which points at the nodes of its inputs:

        x ──► Mul ──► Tanh ──► loss            edges in the code run right to left:
        w ──┘                                  loss.node → Tanh → Mul → Leaf(x), Leaf(w)

A node never points at a Tensor, and a leaf only weakly, so the graph has no cycle and is freed by
reference count the moment its last Tensor goes: training needs no garbage collector.

`backward()` is one loop over the nodes, latest first: hand each node the gradient of the loss with
respect to its output, get back the gradients with respect to its inputs, add them up per input.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from sys import getrefcount
from typing import Any, ClassVar, NamedTuple

import numpy as np

from tinygrad_llm import dispatch, watch
from tinygrad_llm.backend import Array, is_float, namespace
from tinygrad_llm.tensor import Tensor

_clock = watch.clock

# --- recording ------------------------------------------------------------------------------------

mode = watch.mode  # thread-local: what this thread does beside computing
RECORD = watch.RECORD


class _SetRecording(contextlib.ContextDecorator):
    """Sets whether ops are recorded, for a `with` block or for each call of a function."""

    on: ClassVar[bool]

    def __init__(self) -> None:
        self._before: list[int] = []  # a stack: one object may be entered again while it is open

    def __enter__(self) -> None:
        self._before.append(mode.level)
        mode.level = (mode.level | RECORD) if self.on else (mode.level & ~RECORD)

    def __exit__(self, *error: object) -> None:
        mode.level = self._before.pop()

    def _recreate_cm(self) -> _SetRecording:
        return type(self)()  # each decorated call has its own, whatever its thread

    def __call__(self, func: Any) -> Any:
        if inspect.isgeneratorfunction(func) or inspect.iscoroutinefunction(func):
            raise TypeError(
                f"@{type(self).__name__}() cannot decorate {func.__name__}, which runs in parts: "
                f"use `with {type(self).__name__}():` around each computation in it"
            )
        return super().__call__(func)


class no_grad(_SetRecording):
    """Ops inside are computed but not recorded: `with no_grad(): …` or `@no_grad()`."""

    on = False


class enable_grad(_SetRecording):
    """Ops inside are recorded, also within `no_grad()`."""

    on = True


def is_grad_enabled() -> bool:
    """True when ops on this thread are recorded."""
    return bool(mode.level & RECORD)


# --- ops and nodes --------------------------------------------------------------------------------

_FREED: Any = ("freed",)


class _Launched(NamedTuple):
    """A node's choice, in its `kept`: the kernel of its forward, and what that saved."""

    kernel: Any
    saved: tuple[Any, ...]


class Function:
    """One op: y = forward(x₁, x₂, …); backward turns ∂L/∂y into ∂L/∂x₁, ∂L/∂x₂, …

    ```python
    class Tanh(Function):
        '''y = tanh(x)        dx = g ⊙ (1 − y²)'''

        def forward(self, x):
            y = namespace(x).tanh(x)
            self.save(y)
            return y

        def backward(self, g, y):
            return g * (1 - y * y)
    ```

    `forward` gets arrays and the options of the call, and returns one array. `backward` gets the
    gradient `g` of the output and what was saved, and returns a gradient per input: an array of
    the input's shape, or None where `needs(i)` is False. It runs on arrays; with `create_graph`
    the very same code runs on Tensors, which is how second derivatives come for free. So it keeps
    to what both share: operators, `sum`, `reshape` …, and the functions of `namespace(g)`.

    `save` takes inputs, the output, and integer or boolean arrays. `keep` takes what is cheaper to
    hold than to compute again but is neither: backward finds it in `self.kept`, which is None when
    `g` is a Tensor; it must then compute it from what was saved, or there is no second order.

    An op with a fused twin names its row in `dispatch.TABLE` as `kernel` and has two more methods.
    `forward_kernel(kernel, …)` launches it and saves what the op's own `backward` takes, for the
    second order; `backward_kernel(kernel, g, …)` gets what the kernel's forward handed out.
    """

    kernel: ClassVar[str] = ""
    second_order: ClassVar[bool] = True  # False: create_graph is refused, by name

    parents: tuple[Function | Leaf | None, ...] = ()
    saved: tuple[Any, ...] = ()
    kept: Any = None
    hooks: list[Callable[[Tensor], Tensor | None]] | None = None
    replay: Any = None  # the checkpointed call that it was recorded in
    site: str = ""  # where in the user's source, noted in anomaly mode
    tick: int
    origins: list[int]  # the identities of the inputs, then of the output

    def forward(self, *args: Any, **kwargs: Any) -> Array:
        raise NotImplementedError(f"{type(self).__name__} does not define forward()")

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} does not define backward()")

    def forward_kernel(self, *args: Any, **kwargs: Any) -> tuple[Array, Any]:
        """(output, what backward_kernel is handed): forward() by a file of kernels/."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward_kernel()")

    def backward_kernel(self, *args: Any, **kwargs: Any) -> Any:
        """backward() by the kernel of the forward."""
        raise NotImplementedError(f"{type(self).__name__} does not define backward_kernel()")

    @classmethod
    def apply(cls, *inputs: Tensor, **options: Any) -> Tensor:
        """Compute the op on Tensors, and record it when a gradient may be asked for."""
        node = cls()
        level = mode.level
        try:
            arrays = [x.data for x in inputs]
            if level & RECORD:
                parents = tuple([x.node for x in inputs])
                if any(parents):
                    node.parents = parents
            if cls.kernel and (dispatch.forced or type(arrays[0]) is not np.ndarray):
                y = node._choose_and_run(arrays, options)
            else:
                y = node.forward(*arrays, **options)
        except Exception as error:
            _explain(error, cls, inputs)
            raise
        out = _new(Tensor)
        out.data = y if type(y) is np.ndarray else _as_array(y)
        out.grad = None
        if node.parents:
            out.node = node
            node.tick = next(_clock)
            if node.saved:
                node.origins = [id(array) for array in arrays]
                node.origins.append(id(y))
        else:
            out.node = None
        if level > RECORD:
            watch.after_forward(node, [*arrays, *options.values()], out.data)
        return out

    def _choose_and_run(self, arrays: list[Array], options: dict[str, Any]) -> Array:
        choice = dispatch.select(self.kernel, arrays, options)
        if choice.module is None:
            return self.forward(*arrays, **options)
        y, saved = self.forward_kernel(choice.module, *arrays, **options)
        self.kept = _Launched(choice.module, saved)
        return y

    def needs(self, i: int) -> bool:
        """True when a gradient of input i will be asked for; forward and backward may ask."""
        return bool(self.parents) and self.parents[i] is not None

    def save(self, *arrays: Any) -> None:
        """What `backward` will be handed: inputs, the output, integers; None to keep a place."""
        self.saved = arrays

    def keep(self, value: Any) -> None:
        """What `backward` finds in `self.kept` when it runs on arrays; see the class."""
        self.kept = value

    def _load(self) -> tuple[Any, ...]:
        """What was saved, if it is still there and unspoilt."""
        saved = self.saved
        if saved is watch.DROPPED and self.replay is not None:
            self.replay.restore(self)
            saved = self.saved
        elif saved is _FREED:
            raise RuntimeError(
                f"backward through {self.name} a second time: its saved arrays were freed the "
                "first time; pass retain_graph=True to the first backward() or grad()"
            )
        if _last_write > self.tick:
            _refuse_overwritten(self, saved)
        return saved

    def _backward_on_tensors(self, g: Tensor) -> Any:
        """backward() with what was saved as Tensors that stand in the graph, so it is recorded."""
        if not self.second_order:
            raise RuntimeError(f"{self.name} has no second-order gradient (create_graph=True)")
        saved = self._load()
        kept, self.kept = self.kept, None
        try:
            return self.backward(g, *[self._as_tensor(array) for array in saved])
        finally:
            self.kept = kept

    def _as_tensor(self, array: Any) -> Any:
        if array is None or not is_float(array.dtype):
            return array
        *inputs, output = self.origins
        parents = {p for p, i in zip(self.parents, inputs, strict=True) if i == id(array)}
        if len(parents) > 1:
            raise RuntimeError(
                f"{self.name} has no second-order gradient here: two of its inputs are different "
                "tensors on one array, which cannot be told apart; make one of them with copy()"
            )
        if parents:
            return _tensor(array, parents.pop())
        if id(array) == output:
            return _tensor(_as_array(array), self)
        raise RuntimeError(
            f"{self.name} has no second-order gradient: its backward uses an intermediate result "
            "that is not part of the graph"
        )

    def _release(self) -> None:
        if self.saved or self.kept is not None:
            self.saved, self.kept = _FREED, None

    @property
    def name(self) -> str:
        """What errors call this op."""
        return type(self).__name__ + (f" ({self.site})" if self.site else "")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {getattr(self, 'tick', 'unrecorded')}>"


class Leaf:
    """The node of a Tensor that the user made: where gradients arrive."""

    __slots__ = ("__weakref__", "hooks", "tensor", "tick")
    parents: ClassVar[tuple[()]] = ()
    saved: ClassVar[tuple[()]] = ()

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = weakref.ref(tensor)
        self.tick = next(_clock)
        self.hooks: list[Callable[[Tensor], Tensor | None]] | None = None

    def receive(self, g: Any) -> None:
        """tensor.grad += g, in memory that is the tensor's own."""
        adoptable = getrefcount(g) <= _SOLE  # before any other name for g is made
        tensor = self.tensor()
        if tensor is None or tensor.node is None:  # gone, or frozen since the forward
            return
        if g.shape != tensor.shape:
            raise RuntimeError(
                f"a gradient of shape {g.shape} came for a tensor of shape {tensor.shape}: "
                "the backward of an op that uses it is wrong (gradcheck finds which)"
            )
        if isinstance(g, Tensor):
            g = _tensor(g.data, g.node) if g.node else _tensor(_copy(g.data, tensor.data), None)
            tensor.grad = g if tensor.grad is None else tensor.grad + g
        elif tensor.grad is None:
            own = adoptable and _is_own(g) and g.dtype == tensor.dtype
            tensor.grad = _tensor(g if own else _copy(g, tensor.data), None)
        elif tensor.grad.node is not None:
            tensor.grad = _tensor(tensor.grad.data + g, None)
        else:
            tensor.grad.data += g
            mark_written(tensor.grad.data, "accumulation into .grad")

    def __repr__(self) -> str:
        return f"<Leaf {self.tick}>"


_new = object.__new__


def _tensor(array: Array, node: Any) -> Tensor:
    out = _new(Tensor)
    out.data, out.node, out.grad = array, node, None
    return out


def _as_array(y: Any) -> Array:
    """NumPy's reductions to zero dimensions give scalars; a Tensor holds an array."""
    return np.asarray(y) if isinstance(y, np.generic | np.ndarray | int | float) else y


def _explain(error: Exception, op: type[Function], inputs: Sequence[Any]) -> None:
    """Note on the error of a forward where it happened; raise what it should have said."""
    for x in inputs:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{op.__name__}.apply() takes Tensors, got {type(x).__name__}; other values go in "
                "by keyword"
            ) from None
    error.add_note(f"in {op.__name__} of {', '.join(f'{x.dtype}{x.shape}' for x in inputs)}")


def _copy(g: Array, like: Array) -> Array:
    return namespace(like).array(g, dtype=like.dtype, order="C", copy=True)


def _count_references(x: object) -> int:
    return getrefcount(x)


# What getrefcount says inside a function about an argument that nobody else holds. Such an array,
# when it is not a view, is memory that only the engine can see: it may be adopted or added into.
# The caller must pass a temporary, as in receive(pending.pop(node)), never a name of its own: from
# Python 3.14 on, what a local name of the caller holds is not counted.
_SOLE = _count_references(np.empty(1))


# --- the walk -------------------------------------------------------------------------------------


class Part:
    """A gradient that is zero outside x[index]: handed over as (g, index, shape), never padded.

    What `x[:, t]` and `embedding` return from backward. A loop over T slices of one array then
    costs T slices, not T arrays of the full size; and rows of a tied embedding are added straight
    into the gradient that the output layer made.
    """

    __slots__ = ("add_at", "g", "shape")

    def __init__(self, g: Array, shape: tuple[int, ...], add_at: Callable[[Array, Array], None]):
        self.g, self.shape, self.add_at = g, shape, add_at

    def dense(self) -> Array:
        """The same gradient with its zeros."""
        whole = namespace(self.g).zeros(self.shape, dtype=self.g.dtype)
        self.add_at(whole, self.g)
        return whole


def backward(
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    retain_graph: bool = False,
    create_graph: bool = False,
) -> None:
    """leaf.grad += Σₖ gradientsₖ · ∂outputsₖ/∂leaf, for every leaf that requires a gradient."""
    seeds = [_seed(y, g) for y, g in zip(outputs, gradients, strict=True)]
    _walk(outputs, seeds, None, retain_graph or create_graph, create_graph)


def grad(
    outputs: Tensor | Sequence[Tensor],
    inputs: Tensor | Sequence[Tensor],
    grad_outputs: Tensor | Sequence[Tensor | None] | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    allow_unused: bool = False,
) -> tuple[Any, ...]:
    """(Σₖ grad_outputsₖ · ∂outputsₖ/∂x for x in inputs), leaving every `.grad` as it is.

    Args:
        outputs: what is differentiated; a scalar each, unless `grad_outputs` is given.
        inputs: with respect to what; leaves or results of ops.
        grad_outputs: the gradient to start from, of each output's shape.
        retain_graph: keep the saved arrays for another pass; default: `create_graph`.
        create_graph: record the backward pass itself, so that the results can be differentiated.
        allow_unused: give None for an input that no output depends on, instead of raising.

    Raises:
        RuntimeError: an input requires no gradient, or no output depends on it.
    """
    ys = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    xs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if grad_outputs is None or isinstance(grad_outputs, Tensor):
        grad_outputs = [grad_outputs] * len(ys)
    for i, x in enumerate(xs):
        if x.node is None:
            raise RuntimeError(f"grad(): input {i} does not require a gradient")
    seeds = [_seed(y, g) for y, g in zip(ys, grad_outputs, strict=True)]
    keep = create_graph if retain_graph is None else retain_graph
    found = _walk(ys, seeds, [x.node for x in xs], keep, create_graph)
    if not allow_unused:
        for i, x in enumerate(xs):
            if x.node not in found:
                raise RuntimeError(
                    f"grad(): no output depends on input {i}; pass allow_unused=True to get None"
                )
    return tuple([_returned(found.get(x.node), x) for x in xs])


def _returned(g: Any, x: Tensor) -> Tensor | None:
    """A gradient for the caller to keep: in memory of its own unless it stands in the graph."""
    if g is None or (isinstance(g, Tensor) and g.node is not None):
        return g
    return _tensor(_copy(g.data if isinstance(g, Tensor) else g, x.data), None)


def _seed(y: Tensor, g: Tensor | None) -> Tensor:
    """∂L/∂y to start from: 1 for a scalar."""
    if y.node is None:
        raise RuntimeError(
            "this tensor does not require a gradient: none of the tensors it was computed from "
            "has requires_grad=True, or it was computed under no_grad()"
        )
    if g is None:
        if y.size != 1:
            raise RuntimeError(
                f"a gradient can start by itself only from a scalar, got shape {y.shape}: reduce "
                "with sum() or mean(), or pass the gradient to start from"
            )
        return _tensor(namespace(y.data).ones_like(y.data), None)
    if not isinstance(g, Tensor):
        g = Tensor(g, dtype=y.dtype)
    if g.shape != y.shape:
        raise ValueError(f"gradient: expected the output's shape {y.shape}, got {g.shape}")
    return g


def _walk(
    outputs: Sequence[Tensor],
    seeds: Sequence[Tensor],
    wanted: Sequence[Any] | None,
    retain: bool,
    create_graph: bool,
) -> dict[Any, Any]:
    """The chain rule over the graph, latest node first; the gradients of the `wanted` nodes.

    With `wanted` None every leaf receives its gradient instead. `pending` holds the gradients that
    have been computed but not yet passed on: a node's sum is complete when its turn comes, because
    whatever used its output is later than it.
    """
    pending: dict[Any, Any] = {}
    for y, seed in zip(outputs, seeds, strict=True):
        _deliver(pending, y.node, seed if create_graph else seed.data)
    found: dict[Any, Any] = {}
    targets = None if wanted is None else set(wanted)
    before, level = mode.level, mode.level & ~RECORD | (RECORD if create_graph else 0)
    mode.level = level
    try:
        for node in _latest_first(pending, targets):
            if node not in pending:
                continue
            if node.hooks:
                pending[node] = _run_hooks(node.hooks, pending[node])
            if targets is None:
                if type(node) is Leaf:
                    node.receive(pending.pop(node))
                    continue
            elif node in targets:
                found[node] = pending[node]
            g = pending.pop(node)
            parents = node.parents
            if not parents:
                continue
            try:
                if create_graph:
                    gradients = node._backward_on_tensors(g)
                else:
                    saved = node._load()
                    kept = node.kept
                    if kept is None or type(kept) is not _Launched:
                        gradients = node.backward(g, *saved)
                    else:
                        gradients = node.backward_kernel(kept.kernel, g, *kept.saved)
                    saved = kept = None  # what was saved goes now, not with the next node
            except Exception as error:
                error.add_note(f"in the backward of {node.name}, with {len(node.saved)} saved")
                raise
            if not retain:
                node._release()
            if type(gradients) is not tuple:
                gradients = (gradients,)
            if len(gradients) != len(parents):
                raise _wrong_count(node, gradients)
            if level & watch.ANOMALY:
                watch.after_backward(node, g, gradients)
            del g  # a gradient passed on must not look shared because of this name
            for parent, gradient in zip(parents, gradients):  # noqa: B905 (checked, and hot)
                if parent is None or gradient is None:
                    continue
                if parent in pending or type(gradient) is Part:
                    _deliver(pending, parent, gradient)
                else:
                    pending[parent] = gradient
            gradients = gradient = None
    finally:
        mode.level = before
    return found


def _latest_first(roots: Iterable[Any], targets: set[Any] | None) -> list[Any]:
    """Every node that the roots depend on, by descending tick: a topological order.

    With targets, only the nodes on a path to one of them.
    """
    nodes = list(roots)
    seen = set(nodes)
    for node in nodes:  # grows while it is read
        for parent in node.parents:
            if parent is not None and parent not in seen:
                seen.add(parent)
                nodes.append(parent)
    nodes.sort(key=_tick)
    if targets is not None:
        useful: set[Any] = set()
        for node in nodes:
            if node in targets or not useful.isdisjoint(node.parents):
                useful.add(node)
        nodes = [node for node in nodes if node in useful]
    nodes.reverse()
    return nodes


_tick = attrgetter("tick")


def _wrong_count(node: Function, gradients: tuple[Any, ...]) -> TypeError:
    return TypeError(
        f"the backward of {node.name} returned {len(gradients)} gradients for "
        f"{len(node.parents)} inputs: one each, None where there is none"
    )


def _deliver(pending: dict[Any, Any], node: Any, g: Any) -> None:
    """pending[node] += g, added in place only where the memory is the engine's own."""
    if node not in pending:
        pending[node] = g if type(g) is not Part else g.dense()
    elif type(g) is Part:
        pending[node] = _add_part(pending.pop(node), g)
    else:
        pending[node] = _add(pending.pop(node), g)


def _add(a: Any, b: Any) -> Any:
    if getrefcount(a) <= _SOLE and _is_own(a) and a.shape == b.shape and a.dtype == b.dtype:
        a += b
        return a
    return a + b


def _add_part(a: Any, part: Part) -> Any:
    if not (getrefcount(a) <= _SOLE and _is_own(a) and a.dtype == part.g.dtype):
        a = a.copy()
    part.add_at(a, part.g)
    return a


def _is_own(a: Any) -> bool:
    """An array (not a Tensor or a scalar) which is no view and may be written."""
    return type(a) is not Tensor and a.base is None and a.ndim > 0 and a.flags.c_contiguous


def _run_hooks(hooks: list[Callable[[Tensor], Tensor | None]], g: Any) -> Any:
    """Each hook sees the gradient and may return another in its place."""
    tensor = g if isinstance(g, Tensor) else _tensor(_as_array(g), None)
    for hook in tuple(hooks):
        replaced = hook(tensor)
        if replaced is not None:
            if not isinstance(replaced, Tensor) or replaced.shape != tensor.shape:
                got = replaced.shape if isinstance(replaced, Tensor) else type(replaced).__name__
                raise ValueError(
                    f"a hook must return None or a Tensor of the gradient's shape {tensor.shape}, "
                    f"got {got}"
                )
            tensor = replaced
    return tensor if isinstance(g, Tensor) else tensor.data


# --- writes in place ------------------------------------------------------------------------------

_writes: dict[int, tuple[weakref.ref[Any], int, str]] = {}  # id of the memory's owner -> last write
_last_write = 0


def mark_written(array: Array, by: str) -> None:
    """Note that `array` was overwritten by `by`: a backward that needs its old values will raise.

    For whoever writes into the memory of a Tensor without going through Tensor's own methods:
    optimisers, kernels that work in place.
    """
    global _last_write
    owner = _owner(array)
    key = id(owner)
    known = _writes.get(key)
    reference = known[0] if known else weakref.ref(owner, lambda _: _writes.pop(key, None))
    _last_write = next(_clock)
    _writes[key] = (reference, _last_write, by)


def _owner(array: Array) -> Array:
    """The array that holds the memory: views of one array share their writes."""
    while True:
        base = getattr(array, "base", None)
        if base is None or not hasattr(base, "dtype"):
            return array
        array = base


def overwritten_by(array: Array, since: int) -> str | None:
    """Who wrote into the memory of `array` after the tick `since`; None when nobody did."""
    write = _writes.get(id(_owner(array)))
    return write[2] if write is not None and write[1] > since else None


def _refuse_overwritten(node: Function, saved: Iterable[Any]) -> None:
    for array in saved:
        if array is None:
            continue
        by = overwritten_by(array, node.tick)
        if by is not None:
            raise RuntimeError(
                f"backward of {node.name} needs an array of shape {tuple(array.shape)} which "
                f"{by} has overwritten since the forward pass: write into a copy, or after the "
                "backward"
            )
