"""Gradient checkpointing: compute again what would take too much memory to keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tinygrad_llm import autograd, backend
from tinygrad_llm.autograd import Function, Leaf
from tinygrad_llm.tensor import Tensor
from tinygrad_llm.watch import COLLECT, DROP, DROPPED, RECORD, clock, mode


def checkpoint(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """y = function(*inputs), keeping no intermediate: backward computes them again.

    Costs one more forward pass of `function` and saves the memory of everything inside it (Chen et
    al., "Training deep nets with sublinear memory cost", 2016). Draws from `backend.random` are
    the same the second time, so dropout has the same mask. Gradients also reach parameters that
    `function` holds. Within a checkpointed function another checkpoint() is an ordinary call.

    Args:
        function: returns one Tensor; must compute the same from the same when it is called again.
        inputs: its arguments.

    Raises:
        RuntimeError: in backward, when the second call did other things than the first, or when
            what it starts from was overwritten in between.
    """
    if not autograd.is_grad_enabled() or mode.replay is not None:
        return function(*inputs)
    return Replay(function, inputs).first_run()


class Replay:
    """One checkpointed call: runs the function, and once more when its saved arrays are needed.

    The first run records its nodes as usual but strips each of what it saved. When the backward
    pass reaches the first of them, the function runs again from the same inputs and random state;
    the nodes of that second run come in the same order, and lend what they saved to the first.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> None:
        self.function = function
        # Tensors of its own on the same arrays: `x += y` gives the caller's x another place.
        self.inputs = [
            autograd._tensor(x.data, x.node) if isinstance(x, Tensor) else x for x in inputs
        ]
        self.random_state = backend.random.state()
        self.began = next(clock)
        self.steps: list[tuple[Any, ...]] = []  # what each node did in the first run
        self.again: list[tuple[tuple[Any, ...], Function]] = []  # the same in the second

    def first_run(self) -> Tensor:
        return self._run(DROP, self.began)

    def note(self, node: Any, dropping: bool) -> None:
        """A node was recorded, in the first run (dropping) or in the second."""
        # From outside: inputs and parameters. A loop variable may have become another one.
        outside = [p for p in node.parents if p is not None and p.tick < self._start]
        step = (type(node), *outside, getattr(node, "draw", None))
        if not dropping:
            self.again.append((step, node))
            return
        node.replay, node.place = self, len(self.steps)
        self.steps.append(step)
        if node.saved or node.kept is not None:
            node.saved = DROPPED
        node.kept = None

    def restore(self, node: Any) -> None:
        """Give the node what it saved in the first run."""
        if not self.again:
            self._run_again()
        _, other = self.again[node.place]
        node.saved, node.kept = other.saved, other.kept
        node.origins = getattr(other, "origins", [])
        other.saved, other.kept = (), None

    def _run_again(self) -> None:
        self._refuse_overwritten()
        now = backend.random.state()
        backend.random.load_state(self.random_state)
        try:
            self._run(COLLECT | RECORD, next(clock))
            if [step for step, _ in self.again] != self.steps:
                raise RuntimeError(
                    f"checkpoint(): the function did {len(self.steps)} things in the forward pass "
                    f"and {len(self.again)} others when it ran again; it must compute the same "
                    "twice (does it use a loop variable, or a random stream of its own?)"
                )
        except BaseException:
            self.again = []
            raise
        finally:
            backend.random.load_state(now)

    def _refuse_overwritten(self) -> None:
        arrays = [x.data for x in self.inputs if isinstance(x, Tensor)]
        leaves = {p for step in self.steps for p in step if isinstance(p, Leaf)}
        arrays += [x.data for x in (leaf.tensor() for leaf in leaves) if x is not None]
        for array in arrays:
            by = autograd.overwritten_by(array, since=self.began)
            if by is not None:
                raise RuntimeError(
                    f"checkpoint(): {by} has overwritten an array of shape {tuple(array.shape)} "
                    "that the function starts from, since the forward: write after the backward"
                )

    def _run(self, flags: int, start: int) -> Tensor:
        before, outer = mode.level, mode.replay
        mode.level, mode.replay = (before & ~(DROP | COLLECT)) | flags, self
        self._start = start
        try:
            return self.function(*self.inputs)
        finally:
            mode.level, mode.replay = before, outer
