"""Modules that hold modules: one after the other, in a list, by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self, overload

from tinygrad_llm.nn.module import Module


class _Indexed(Module):
    """Modules under the names "0", "1", … : what Sequential and ModuleList share."""

    def __len__(self) -> int:
        return sum(1 for _ in self.named_children())

    def __iter__(self) -> Iterator[Module]:
        for _, module in self.named_children():
            yield module

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> Self: ...

    def __getitem__(self, index: int | slice) -> Any:
        """The module at a place, counted from the end if negative; of a slice a container."""
        modules = list(self)
        return self._of(modules[index]) if isinstance(index, slice) else modules[index]

    def __setitem__(self, index: int, module: Module) -> None:
        names = [name for name, _ in self.named_children()]
        self.add_module(names[index], module)

    def __delitem__(self, index: int | slice) -> None:
        modules = list(self)
        del modules[index]
        self._replace(modules)

    def append(self, module: Module) -> Self:
        """Put a module at the end."""
        self.add_module(str(len(self)), module)
        return self

    def extend(self, modules: Iterable[Module]) -> Self:
        """Put modules at the end."""
        for module in list(modules):
            self.append(module)
        return self

    def insert(self, index: int, module: Module) -> Self:
        """Put a module before the one at `index`."""
        modules = list(self)
        modules.insert(index, module)
        return self._replace(modules)

    def _replace(self, modules: Iterable[Module]) -> Self:
        """Hold these instead, numbered from 0."""
        modules = list(modules)
        for name, _ in tuple(self.named_children()):
            delattr(self, name)
        return self.extend(modules)

    def _of(self, modules: list[Module]) -> Self:
        """A container of the same kind that holds these: what a slice of it is."""
        raise NotImplementedError(f"{type(self).__name__} does not define _of()")


class Sequential(_Indexed):
    """y = fₙ(… f₂(f₁(x)))

    `Sequential(Linear(2, 8), ReLU(), Linear(8, 1))`, or with names of one's own from a dict:
    `Sequential({"hidden": Linear(2, 8), "out": Linear(8, 1)})`. Indexing gives a part, slicing a
    Sequential of the same parts.
    """

    def __init__(self, *modules: Module | Mapping[str, Module]) -> None:
        super().__init__()
        if len(modules) == 1 and isinstance(modules[0], Mapping):
            named = modules[0]
        else:
            named = {str(i): module for i, module in enumerate(modules)}
        for name, module in named.items():
            self.add_module(name, module)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Any) -> Any:
        for module in self:
            x = module(x)
        return x

    def _of(self, modules: list[Module]) -> Self:
        return type(self)(*modules)


class ModuleList(_Indexed):
    """A list whose modules are parts of whoever holds it; it computes nothing itself.

    `self.blocks = ModuleList(Block() for _ in range(12))`, then `for block in self.blocks: …`.
    """

    def __init__(self, modules: Iterable[Module] = ()) -> None:
        super().__init__()
        self.extend(modules)

    def __iadd__(self, modules: Iterable[Module]) -> Self:
        return self.extend(modules)

    def _of(self, modules: list[Module]) -> Self:
        return type(self)(modules)


class ModuleDict(Module):
    """A dict whose modules are parts of whoever holds it; it computes nothing itself.

    A key is a name: a string without dots that is no method of this class, such as "keys".
    """

    def __init__(self, modules: Mapping[str, Module] | None = None) -> None:
        super().__init__()
        self.update(modules or {})

    def __len__(self) -> int:
        return sum(1 for _ in self.named_children())

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __getitem__(self, key: str) -> Any:
        if key not in self:
            raise KeyError(f"{key!r}; the keys are {', '.join(map(repr, self.keys())) or 'none'}")
        return vars(self)[key]

    def __setitem__(self, key: str, module: Module) -> None:
        self.add_module(key, module)

    def __delitem__(self, key: str) -> None:
        self.pop(key)

    def pop(self, key: str) -> Module:
        """Take the module out and return it."""
        module = self[key]
        delattr(self, key)
        return module

    def update(self, modules: Mapping[str, Module]) -> None:
        """Add these, in place of those with the same keys."""
        for key, module in modules.items():
            self.add_module(key, module)

    def keys(self) -> list[str]:
        return [name for name, _ in self.named_children()]

    def values(self) -> list[Module]:
        return [module for _, module in self.named_children()]

    def items(self) -> list[tuple[str, Module]]:
        return list(self.named_children())
