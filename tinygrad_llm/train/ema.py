"""An average of the weights over the last steps, often better than the weights themselves.

    θ̄ ← d θ̄ + (1 − d) θ        d = min(decay, (1 + step) / (10 + step))

Each step throws the weights a little to and fro; the mean lies in the middle. It looks back about
1 / (1 − decay) steps, at first fewer, so that the weights of the very beginning are soon forgotten.
Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992; the d of the
first steps is TensorFlow's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from tinygrad_llm import backend
from tinygrad_llm.tensor import Tensor


class WeightAverage:
    """The running average of `parameters`, beginning as they are; in float32 at least.

    `update(step)` after each step; within `with average.in_place():` the model has the average for
    its weights, to be evaluated or saved.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.arrays = [_wide(p.data, copy=True) for p in self.parameters]

    def update(self, step: int) -> None:
        """Take in the weights after `step` steps."""
        d = min(self.decay, (1 + step) / (10 + step))
        for mean, p in zip(self.arrays, self.parameters, strict=True):
            mean *= d
            mean += (1 - d) * _wide(p.data)

    @contextmanager
    def in_place(self, rounded: bool = False) -> Iterator[None]:
        """Within: the average in the place of the weights; rounded, in the dtype that they have."""
        arrays = [p.data for p in self.parameters]  # in memory that other processes may share
        weights = [array.copy() for array in arrays]
        for p, mean in zip(self.parameters, self.arrays, strict=True):
            if rounded or mean.dtype == p.dtype:
                p.data[...] = mean
            else:
                p.data = mean
        try:
            yield
        finally:
            for p, array, weight in zip(self.parameters, arrays, weights, strict=True):
                array[...] = weight
                p.data = array

    def load(self, parameters: Iterable[Tensor]) -> None:
        """Go on from the average that a checkpoint kept; ValueError where its shapes differ."""
        found = list(parameters)
        shapes = [[p.shape for p in group] for group in (self.parameters, found)]
        if shapes[0] != shapes[1]:
            raise ValueError("the averaged weights are of another model than the weights")
        self.arrays = [
            backend.to_device(_wide(theirs.data), p.device)
            for theirs, p in zip(found, self.parameters, strict=True)
        ]


def _wide(array: backend.Array, copy: bool = False) -> backend.Array:
    """In float32 where it is half precision, in which a small step would be rounded away."""
    return array.astype(max(array.dtype, backend.float32, key=lambda d: d.itemsize), copy=copy)
