"""The keys and values that attention has computed, kept for the tokens that are still to come.

    cache = KVCache(model.config)
    model(ids[:, :5], cache); model(ids[:, 5:], cache)          as model(ids), in two parts

So a further token costs one position's work, not that of all. The keys of a position never change,
for no position sees a later one. It is for `no_grad`: no gradient goes through it.

Dimensions: B texts, H heads of keys and values, S positions so far, T next ones, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tinygrad_llm.backend import namespace
from tinygrad_llm.tensor import Tensor


class Layered(Protocol):
    """What a cache needs to know of a model: how many layers of attention it fills."""

    @property
    def n_layer(self) -> int: ...


class KVCache:
    """The keys and values of every layer of a model that reads a text once, from left to right."""

    def __init__(self, config: Layered) -> None:
        self.layers = [LayerCache() for _ in range(config.n_layer)]

    @property
    def length(self) -> int:
        """How many positions are in it."""
        return self.layers[-1].length

    def clear(self) -> None:
        """Forget all of it: the next token is the first."""
        self.layers = [LayerCache() for _ in self.layers]

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these of the B texts, in this order; one may be there several times."""
        for layer in self.layers:
            layer.select(rows)


class DecoderCache(KVCache):
    """The same for a decoder that also looks at a source: `sources` holds what it sees there.

    The keys and values of a source are computed with the first token, and are those of all others.
    """

    def __init__(self, config: Layered) -> None:
        super().__init__(config)
        self.sources = [LayerCache() for _ in self.layers]

    def clear(self) -> None:
        super().clear()
        self.sources = [LayerCache() for _ in self.layers]

    def select(self, rows: Sequence[int]) -> None:
        super().select(rows)
        for layer in self.sources:
            layer.select(rows)


class LayerCache:
    """One layer's K and V, (B, H, S, D) each, in arrays that have room for more."""

    def __init__(self) -> None:
        self.length = 0
        self.k: Any = None
        self.v: Any = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values there are, after k and v (B, H, T, D) of the next T positions."""
        if k.requires_grad:
            raise ValueError("a KVCache has no gradients: call the model within no_grad()")
        end = self.length + k.shape[-2]
        if self.k is None:
            self.k, self.v = (_grown(x.data, 0, max(end, _ROOM)) for x in (k, v))
        if len(self.k) != len(k):
            raise ValueError(f"the KVCache holds {len(self.k)} texts, got input_ids of {len(k)}")
        if end > self.k.shape[-2]:  # doubled, so that on average a position is copied twice
            room = max(end, 2 * self.k.shape[-2])
            self.k, self.v = (_grown(x, self.length, room) for x in (self.k, self.v))
        self.k[:, :, self.length : end] = k.data
        self.v[:, :, self.length : end] = v.data
        self.length = end
        return Tensor(self.k[:, :, :end]), Tensor(self.v[:, :, :end])

    def once(self, compute: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """compute(), the first time; what it gave then, ever after."""
        if self.k is None:
            k, v = compute()
            if k.requires_grad:
                raise ValueError("a KVCache has no gradients: call the model within no_grad()")
            self.k, self.v, self.length = k.data, v.data, k.shape[-2]
        return Tensor(self.k), Tensor(self.v)

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these of the B texts."""
        if self.k is not None and list(rows) != list(range(len(self.k))):
            self.k, self.v = (self._rows(x, list(rows)) for x in (self.k, self.v))

    def _rows(self, x: Any, rows: list[int]) -> Any:
        chosen = namespace(x).empty((len(rows), *x.shape[1:]), x.dtype)
        chosen[:, :, : self.length] = x[rows, :, : self.length]
        return chosen


_ROOM = 64  # positions, at first


def _grown(x: Any, length: int, room: int) -> Any:
    """An array (B, H, room, D) that begins with the first `length` positions of x."""
    b, h, _, d = x.shape
    larger = namespace(x).empty((b, h, room, d), x.dtype)
    larger[:, :, :length] = x[:, :, :length]
    return larger
