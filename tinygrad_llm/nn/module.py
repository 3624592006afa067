"""Module: a part of a model, which holds parameters and smaller parts.

    class Net(Module):
        def __init__(self):
            super().__init__()
            self.hidden = Linear(2, 8)          a part: net.hidden
            self.scale = Parameter([1.0])       a parameter: net.scale

        def forward(self, x):
            return self.hidden(x) * self.scale

The attributes are the whole record. An attribute that is a Parameter is a parameter of the module,
one that is a Module is a part of it, and their names joined by dots, "hidden.weight", are the names
in `named_parameters()` and in files. The interface is PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Self

from tinygrad_llm import backend
from tinygrad_llm.autograd import no_grad
from tinygrad_llm.backend import Array
from tinygrad_llm.nn import init
from tinygrad_llm.tensor import Tensor


class Parameter(Tensor):
    """A Tensor to be trained: as an attribute of a Module it is one of its `parameters()`.

    `Parameter(data)` requires a gradient unless told otherwise; the arguments are Tensor's.
    """

    __slots__ = ()

    def __init__(
        self,
        data: Any,
        dtype: Any = None,
        requires_grad: bool = True,
        device: str | None = None,
    ) -> None:
        super().__init__(data, dtype, requires_grad, device)

    @classmethod
    def empty(cls, *shape: int) -> Parameter:
        """A parameter in the default dtype whose values are still to be written (`nn.init`)."""
        return cls(init.allocate(shape))

    def __repr__(self) -> str:
        return "Parameter" + super().__repr__().removeprefix("Tensor").replace("\n", "\n   ")


class Module:
    """y = forward(x): subclass it, make the parts in `__init__`, write `forward`, call the module.

    Attributes:
        training: whether layers such as Dropout behave as in training; see `train` and `eval`.
    """

    training: bool = True
    _persistent: dict[str, bool]  # the buffers by name, and whether they are saved
    _hooks: list[_Hook] | tuple[()] = ()

    def __init__(self) -> None:
        self.__dict__.setdefault("_persistent", {})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes; a subclass defines it."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward()")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._hooks:
            return self._call_with_hooks(args, kwargs)
        return self.forward(*args, **kwargs)

    # --- attributes -------------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Parameter | Module):
            self._check_initialised(name)
            self._persistent.pop(name, None)
        else:
            self._refuse_to_forget(name, value)
        object.__setattr__(self, name, value)

    def _check_initialised(self, name: str) -> None:
        if "_persistent" not in self.__dict__:
            raise RuntimeError(
                f"{type(self).__name__}.__init__() must call super().__init__() before it sets "
                f"self.{name}"
            )

    def _refuse_to_forget(self, name: str, value: Any) -> None:
        """Raise where training would silently miss something: that is no ordinary attribute."""
        before = self.__dict__.get(name)
        got = type(value).__name__
        if isinstance(before, Parameter | Module) and value is not None:
            kind = "Parameter" if isinstance(before, Parameter) else "Module"
            raise TypeError(
                f"self.{name} is a {kind}, expected a Parameter, a Module or None in its place, "
                f"got {got}: write values with copy_() under no_grad(), or del self.{name} first"
            )
        buffers = self.__dict__.get("_persistent", ())
        if name in buffers and not isinstance(value, Tensor | None):
            raise TypeError(f"self.{name} is a buffer, expected a Tensor or None, got {got}")
        if name not in buffers and type(value) is Tensor and value.requires_grad and value.is_leaf:
            raise TypeError(
                f"self.{name} is a Tensor that requires a gradient, which parameters() would not "
                "find: make it a Parameter (or detach() it, if it is not to be trained)"
            )
        parts: Iterable[Any] = ()
        if isinstance(value, list | dict):
            parts = value.values() if isinstance(value, dict) else value
        if any(isinstance(part, Parameter | Module) for part in parts):
            raise TypeError(
                f"self.{name} is a {got} of Modules or Parameters, which parameters() would not "
                "find: use ModuleList or ModuleDict (or a tuple, if it is not to be trained)"
            )

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Make `tensor` the attribute `name`: state that is moved and saved but not trained.

        With `persistent=False` it moves with the module and is not in `state_dict()`. None keeps
        the name for later. For type checkers declare it in the class: `mask: Tensor`.
        """
        self._check_name(name)
        self._check_initialised(name)
        if not isinstance(tensor, Tensor | None) or isinstance(tensor, Parameter):
            raise TypeError(f"buffer {name!r}: expected a Tensor, got {type(tensor).__name__}")
        setattr(self, name, tensor)
        self._persistent[name] = persistent

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        """self.<name> = param, for names that are computed."""
        self._check_name(name)
        if not isinstance(param, Parameter | None):
            raise TypeError(f"parameter {name!r}: expected a Parameter, got {type(param).__name__}")
        setattr(self, name, param)

    def add_module(self, name: str, module: Module) -> None:
        """self.<name> = module, for names that are computed."""
        self._check_name(name)
        if not isinstance(module, Module):
            raise TypeError(f"module {name!r}: expected a Module, got {type(module).__name__}")
        setattr(self, name, module)

    def _check_name(self, name: str) -> None:
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"a name is a string that is not empty and has no '.', got {name!r}")
        own = self.__dict__
        replaceable = name in own and isinstance(own[name], Tensor | Module | None)
        if hasattr(self, name) and not replaceable:
            raise ValueError(f"{type(self).__name__} has an attribute {name!r} already: rename it")

    # --- walking through the parts ----------------------------------------------------------------

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """(name, module) of the direct parts, in the order in which they were made."""
        for name, value in tuple(vars(self).items()):
            if isinstance(value, Module):
                yield name, value

    def children(self) -> Iterator[Module]:
        """The direct parts, each once."""
        yield from {id(child): child for _, child in self.named_children()}.values()

    def named_modules(
        self, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Module]]:
        """("", self), ("hidden", …), ("hidden.part", …) …: every module before its parts."""
        return _descend(self, prefix, set() if remove_duplicate else None)

    def modules(self) -> Iterator[Module]:
        """This module and all below it, each once."""
        for _, module in self.named_modules():
            yield module

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Parameter]]:
        """("hidden.weight", p) …; a parameter that has two names comes once, by its first."""
        return self._named(_own_parameters, prefix, recurse, remove_duplicate)

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """The parameters of this module and all below it, each once: what an optimiser takes."""
        for _, parameter in self.named_parameters(recurse=recurse):
            yield parameter

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the buffers, as `named_parameters`."""
        return self._named(_own_buffers, prefix, recurse, remove_duplicate)

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """The buffers of this module and all below it, each once."""
        for _, buffer in self.named_buffers(recurse=recurse):
            yield buffer

    def _named(
        self,
        own: Callable[[Module], Iterator[tuple[str, Any]]],
        prefix: str,
        recurse: bool,
        remove_duplicate: bool,
    ) -> Iterator[tuple[str, Any]]:
        seen: set[int] = set()
        modules = self.named_modules(prefix, remove_duplicate) if recurse else [(prefix, self)]
        for path, module in modules:
            for name, tensor in own(module):
                if id(tensor) not in seen:
                    yield _join(path, name), tensor
                if remove_duplicate:
                    seen.add(id(tensor))

    def num_parameters(self, only_trainable: bool = False) -> int:
        """How many numbers the parameters hold; a shared parameter counts once."""
        return sum(p.size for p in self.parameters() if p.requires_grad or not only_trainable)

    def apply(self, fn: Callable[[Module], Any]) -> Self:
        """Call `fn(module)` for every part and then for this module."""
        for child in self.children():
            child.apply(fn)
        fn(self)
        return self

    # --- modes and places -------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Behave as in training (dropout on), with all parts; `train(False)` is `eval()`."""
        for module in self.modules():
            module.training = mode
        return self

    def eval(self) -> Self:
        """Behave as in use (dropout off), with all parts."""
        return self.train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Train the parameters, or freeze them with False."""
        for parameter in self.parameters():
            parameter.requires_grad = requires_grad
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """p.grad ← None, or ← 0 with `set_to_none=False`, for every parameter that has one."""
        for parameter in self.parameters():
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad = Tensor(
                    backend.namespace(parameter.data).zeros_like(parameter.data)
                )

    def to(self, target: Any) -> Self:
        """Move to a device ('cpu', 'cuda:1') or convert floats to a dtype, in place.

        Parameters and buffers stay the same objects with other arrays, so an optimiser that holds
        them stays valid; a dtype leaves integer and boolean buffers as they are.
        """
        is_device = isinstance(target, str) and target.partition(":")[0] in ("cpu", "cuda")
        if not is_device and not backend.is_float(backend.as_dtype(target)):
            raise TypeError(f"parameters need a float dtype, got {target}")
        for tensor in (*self.parameters(), *self.buffers()):
            if not is_device and not backend.is_float(tensor.dtype):
                continue
            tensor.data = Tensor(tensor.data).to(target).data
            if tensor.grad is not None:
                tensor.grad = tensor.grad.detach().to(target)
        return self

    # --- saving and loading -----------------------------------------------------------------------

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """{"hidden.weight": tensor, …}: parameters and persistent buffers, in the same memory.

        The tensors are outside the graph. A shared parameter is there under each of its names.
        """
        return {prefix + name: tensor.detach() for name, tensor in self._state().items()}

    def _state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for path, module in self.named_modules(remove_duplicate=False):
            for name, tensor in _own_parameters(module):
                state[_join(path, name)] = tensor
            for name, tensor in _own_buffers(module):
                if module._persistent[name]:
                    state[_join(path, name)] = tensor
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> LoadResult:
        """Write the values of `state_dict` into the parameters and persistent buffers.

        Args:
            state_dict: Tensors or arrays by name; they are converted to the dtype and device of
                the parameter. A shared parameter needs to be there under one of its names only.
            strict: refuse when a name is missing or unexpected.
            assign: take the given arrays themselves instead of copying their values, with their
                dtype and device.

        Returns:
            LoadResult(missing_keys, unexpected_keys), both empty when strict.

        Raises:
            ValueError: lists everything that is missing, unexpected or misshapen; then nothing
                was loaded.
        """
        own = self._state()
        arrays = {
            name: value.data if isinstance(value, Tensor) else value
            for name, value in state_dict.items()
        }
        given = {id(own[name]) for name in arrays if name in own}
        missing = [name for name, tensor in own.items() if id(tensor) not in given]
        unexpected = [name for name in arrays if name not in own]
        misfits = [
            f"{name}: {reason}"
            for name, array in arrays.items()
            if name in own and (reason := _misfit(own[name], array))
        ]
        problems = [f"misshapen: {'; '.join(misfits)}"] if misfits else []
        if strict and unexpected:
            problems.insert(0, f"unexpected: {', '.join(unexpected)}")
        if strict and missing:
            problems.insert(0, f"missing: {', '.join(missing)}")
        if problems:
            raise ValueError(
                f"this state does not fit this {type(self).__name__}: " + "; ".join(problems)
            )
        for name, array in arrays.items():
            if name in own:
                _write(own[name], array, assign)
        return LoadResult(missing, unexpected)

    # --- hooks ------------------------------------------------------------------------------------

    def register_forward_pre_hook(
        self, hook: Callable[[Any, tuple[Any, ...]], Any]
    ) -> RemovableHandle:
        """Call `hook(module, args)` before `forward`; what it returns replaces the arguments.

        None leaves them; a tuple is all positional arguments, anything else the only one.
        """
        return self._add_hook(hook, before=True)

    def register_forward_hook(
        self, hook: Callable[[Any, tuple[Any, ...], Any], Any]
    ) -> RemovableHandle:
        """Call `hook(module, args, output)` after `forward`; what it returns replaces the output.

        None leaves it. To see gradients, call `output.register_hook` in the hook.
        """
        return self._add_hook(hook, before=False)

    def _add_hook(self, function: Callable[..., Any], before: bool) -> RemovableHandle:
        if isinstance(self._hooks, tuple):
            self._hooks = []
        hook = _Hook(function, before)
        self._hooks.append(hook)
        return RemovableHandle(self._hooks, hook)

    def _call_with_hooks(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hooks = tuple(self._hooks)
        for hook in hooks:
            if hook.before and (changed := hook.function(self, args)) is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
        output = self.forward(*args, **kwargs)
        for hook in hooks:
            if not hook.before and (changed := hook.function(self, args, output)) is not None:
                output = changed
        return output

    # --- looking at it ----------------------------------------------------------------------------

    def extra_repr(self) -> str:
        """What `repr` shows in the parentheses of this module, such as "in_features=2"."""
        return ""

    def __repr__(self) -> str:
        name, extra = type(self).__name__, self.extra_repr()
        parts = _merge_equal([(label, repr(child)) for label, child in self.named_children()])
        lines = [f"({label}): {text}" for label, text in parts]
        if not lines:
            return f"{name}({extra})"
        body = "\n".join([extra, *lines] if extra else lines).replace("\n", "\n  ")
        return f"{name}(\n  {body}\n)"

    def summary(self) -> str:
        """A table for print(): the modules that hold parameters, their shapes, how many numbers.

        A shared parameter is counted where it is first met; elsewhere stands whose it is.
        """
        rows = [("module", "type", "parameters", "count"), *self._summary_rows()]
        total, trained = self.num_parameters(), self.num_parameters(only_trainable=True)
        rows.append(("total", type(self).__name__, f"{trained:,} trainable", f"{total:,}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        head, *body, foot = [_align(row, widths) for row in rows]
        rule = "-" * len(head)
        return "\n".join([head, rule, *body, rule, foot])

    def _summary_rows(self) -> Iterator[tuple[str, str, str, str]]:
        owners: dict[int, str] = {}
        for path, module in self.named_modules():
            shapes, count = [], 0
            for name, p in _own_parameters(module):
                if id(p) in owners:
                    shapes.append(f"{name} = {owners[id(p)]}")
                    continue
                owners[id(p)] = _join(path, name)
                count += p.size
                shapes.append(f"{name} {'×'.join(map(str, p.shape)) or 'scalar'}")
            if shapes:
                yield path or "(itself)", type(module).__name__, ", ".join(shapes), f"{count:,}"


class LoadResult(NamedTuple):
    """What `load_state_dict(strict=False)` did not find, and what it did not use."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class _Hook:
    """A function to be called before or after a module's forward."""

    __slots__ = ("before", "function")

    def __init__(self, function: Callable[..., Any], before: bool) -> None:
        self.function, self.before = function, before


class RemovableHandle:
    """What registering a hook returns: `remove()` ends it, and so does leaving a `with` block."""

    def __init__(self, hooks: list[_Hook], hook: _Hook) -> None:
        self._hooks, self._hook = hooks, hook

    def remove(self) -> None:
        """Call the hook no more; a second time does nothing."""
        if self._hook in self._hooks:
            self._hooks.remove(self._hook)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def _descend(module: Module, path: str, seen: set[int] | None) -> Iterator[tuple[str, Module]]:
    if seen is not None:
        if id(module) in seen:
            return
        seen.add(id(module))
    yield path, module
    for name, child in module.named_children():
        yield from _descend(child, _join(path, name), seen)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _own_parameters(module: Module) -> Iterator[tuple[str, Parameter]]:
    for name, value in tuple(vars(module).items()):
        if isinstance(value, Parameter):
            yield name, value


def _own_buffers(module: Module) -> Iterator[tuple[str, Tensor]]:
    for name in tuple(vars(module).get("_persistent", ())):
        tensor = vars(module).get(name)
        if tensor is not None:
            yield name, tensor


def _misfit(tensor: Tensor, array: Any) -> str:
    """Why the array cannot be written into the tensor, or ''."""
    if not backend.is_array(array):
        return f"expected an array, got {type(array).__name__}"
    if array.shape != tensor.shape:
        return f"expected shape {tensor.shape}, got {array.shape}"
    if backend.is_float(array.dtype) and not backend.is_float(tensor.dtype):
        return f"expected {tensor.dtype}, got {array.dtype}"
    return ""


def _write(tensor: Tensor, array: Array, assign: bool) -> None:
    if assign:
        as_float = backend.is_float(tensor.dtype) and not backend.is_float(array.dtype)
        tensor.data = array.astype(tensor.dtype) if as_float else array
        return
    with no_grad():
        tensor.copy_(backend.to_device(array, tensor.device))


def _merge_equal(named: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """("0", "ReLU()"), ("1", "ReLU()"), … of a list as ("0-1", "2 x ReLU()")."""
    i = 0
    while i < len(named):
        first, text = named[i]
        j = i + 1
        while first.isdecimal() and j < len(named) and named[j] == (str(int(first) + j - i), text):
            j += 1
        yield (first, text) if j == i + 1 else (f"{first}-{named[j - 1][0]}", f"{j - i} x {text}")
        i = j


def _align(row: tuple[str, ...], widths: list[int]) -> str:
    """One line of the table, the last column to the right."""
    *left, last = zip(row, widths, strict=True)
    return "  ".join([*(cell.ljust(w) for cell, w in left), last[0].rjust(last[1])])
