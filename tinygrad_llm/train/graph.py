"""A whole training step as one CUDA graph: recorded once, then replayed with a single launch.

    rehearse, twice    the step as ever, on memory that will be the graph's      compiles, tunes
    capture            nothing is computed: CUDA notes down every launch
    replay             new batch and numbers into that memory; launch; read L and ‖g‖

A small model's step is hundreds of kernels of a few microseconds, and the host launches them one by
one. A replay launches all of them at once. It repeats every launch with its arguments, so whatever
changes from step to step lies in memory that is written before: the batch; the learning rate and
the step number, as `kernels.optimizer.step_numbers`; the places in the random stream that dropout
draws from. The losses and weights are those of the same kernels launched one by one, bit for bit.

While a graph is captured the host can learn nothing from the GPU, and CuPy refuses cuBLAS: so the
products are Triton's (`use_kernels("triton")`), from the first step on, and what would wait, such
as a sort, has a way around it (`backend.must_not_wait`). Arrays of the graph come from a memory
pool of its own, which nobody else may take from as long as the graph is there; what it reads
besides, such as weights and tables that a model has cached, it keeps from being freed.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tinygrad_llm import backend, watch
from tinygrad_llm.autograd import mark_written
from tinygrad_llm.backend import Array, RandomStream
from tinygrad_llm.dispatch import use_kernels
from tinygrad_llm.ops import bounds
from tinygrad_llm.optim import Adam, Optimizer
from tinygrad_llm.tensor import Tensor
from tinygrad_llm.train.parallel import Part
from tinygrad_llm.train.transfer import Batch, Uploaded, UploadedTask

if TYPE_CHECKING:
    from tinygrad_llm.train.config import TrainConfig

REHEARSALS = 2  # the first of them compiles and tunes, the second finds all of that
KINDS = 4  # shapes of batches that get a graph; each holds a step's memory. Others are launched
_DRAWS = 4096  # places in the random stream that a step may draw from
_UPDATES = 256  # launches of AdamW in a step

Compute = Callable[[Sequence[Part]], tuple[Array, Array]]


class GraphError(RuntimeError):
    """A step that cannot be captured; one sentence for people."""


def refuse_graph(config: TrainConfig, device: str, optimizer: Optimizer) -> None:
    """ConfigError where `cuda_graph` is asked for and cannot be."""
    from tinygrad_llm.train.config import ConfigError

    if not config.cuda_graph:
        return
    why = ""
    if device == "cpu":
        why = "records what a GPU does, and this run is on the CPU"
    elif config.dtype == "float16":
        why = "has no loss scaling, which float16 needs: use bfloat16"
    elif not isinstance(optimizer, Adam) or not optimizer.decoupled:
        why = f"needs AdamW, which reads its step number on the GPU, got {type(optimizer).__name__}"
    elif config.processes > 1:
        why = "is of one process"
    if why:
        raise ConfigError(f"train.cuda_graph {why}; leave cuda_graph out")


class GraphedStep:
    """`compute(parts)`, a training step, as a CUDA graph for each shape of the batches, up to four.

    Args:
        compute: the step: gradients, clipping, the update; gives (L, ‖g‖), both on the GPU. It
            waits for nothing.
        optimizer: an AdamW.
        task: whose batches the parts hold.
        settle: called before the results of the last step are written over.
        pools: where the memory pool of each graph is put, for whoever counts.
    """

    def __init__(
        self,
        compute: Compute,
        optimizer: Adam,
        task: UploadedTask,
        settle: Callable[[], None],
        pools: list[Any],
    ) -> None:
        self.compute, self.optimizer, self.task = compute, optimizer, task
        self.settle, self.pools = settle, pools
        self._graphs: dict[tuple[Any, ...], _Graph] = {}

    def __call__(self, parts: Sequence[Part]) -> tuple[Array, Array]:
        """One step: (L, ‖g‖), to be read before the next one."""
        key = _kind(parts)
        graph = self._graphs.get(key)
        if graph is None and len(self._graphs) < KINDS:
            graph = self._graphs[key] = _Graph(parts, self.optimizer, self.task)
        with use_kernels("triton"):
            if graph is None:
                self.settle()
                return self.compute(parts)
            if graph.rehearsed < REHEARSALS:
                self.settle()
                return graph.rehearse(self.compute, parts)
            if graph.recorded is None or graph.is_stale():
                graph.capture(self.compute, self.pools)
        graph.fill(parts)
        for _ in parts:
            self.task.draw_ahead()  # the host's work, while the GPU still has some
        self.settle()
        return graph.replay()


def _kind(parts: Sequence[Part]) -> tuple[Any, ...]:
    """What a graph is of: shapes, dtypes and weights."""
    arrays = [[(a.shape, a.dtype) for a in part.batch.uploaded.arrays] for part in parts]
    return (*map(tuple, arrays), *[(part.weight, *part.weights) for part in parts])


# --- the graph of one shape -----------------------------------------------------------------------


class _Recorded(NamedTuple):
    """A captured graph, what it computes, and the memory that it lives in."""

    graph: Any
    results: tuple[Array, Array]
    pool: Any
    draws: int  # counters of the random stream that a step uses
    read: list[Any]  # what it reads of memory that is not the pool's: nobody may free that


class _Graph:
    """The memory that a step reads, and the step as a graph once it is captured."""

    def __init__(self, parts: Sequence[Part], optimizer: Adam, task: UploadedTask) -> None:
        self.cupy: Any = backend.cupy()
        self.optimizer, self.uploader = optimizer, task.uploader
        self.inputs = [
            [self.cupy.empty_like(a) for a in part.batch.uploaded.arrays] for part in parts
        ]
        self.parts = [
            Part(_Static(part.batch.host, arrays), part.weight, None, part.weights)
            for part, arrays in zip(parts, self.inputs, strict=True)
        ]
        self.limits: list[bounds.Bounds] = []  # what the integers of the inputs are held to
        self.offsets = self.cupy.zeros(_DRAWS, dtype=backend.int64)
        self.numbers = self.cupy.zeros((_UPDATES, 3), dtype=backend.float32)
        self.drawn: list[int] = []  # where dropout draws, from the step's first counter on
        self.updates: list[list[Tensor]] = []  # the parameters of each launch of AdamW
        self.groups = {id(p): g for g in optimizer.param_groups for p in g["params"]}
        self.places: list[int] = []  # where the parameters were when it was captured
        self.rehearsed = 0
        self.recorded: _Recorded | None = None
        self.graph_stream = self.cupy.cuda.Stream(non_blocking=True)

    def rehearse(self, compute: Compute, parts: Sequence[Part]) -> tuple[Array, Array]:
        """A step that is made as it will be captured."""
        self.fill(parts, with_numbers=False)
        with backend.rehearsal(), self._on_memory(write=True):
            try:
                results = compute(self.parts)
            except TypeError as error:  # of an op that wants the number, not where it lies
                raise _not_capturable(error) from error
        self.rehearsed += 1
        return results

    def capture(self, compute: Compute, pools: list[Any]) -> None:
        """Record a step; GraphError where something in it must wait, or is cuBLAS."""
        steps = {p: state["step"] for p, state in self.optimizer.state.items()}
        self.cupy.cuda.get_current_stream().synchronize()
        if self.recorded is not None:
            pools.remove(self.recorded.pool)
            self.recorded = None
        pool, stream = self.cupy.cuda.MemoryPool(), self.graph_stream
        # What the rehearsals left free in the common pool: the graph's own takes it now.
        self.cupy.get_default_memory_pool().free_all_blocks()
        # Nothing may be freed in the middle of a capture that was not allocated in it.
        collecting = gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            with (
                self.cupy.cuda.using_allocator(pool.malloc),
                stream,
                self._on_memory(write=False),
                watch.noting_inputs() as noted,
                backend.keeping_tables() as tables,
            ):
                stream.begin_capture()
                try:
                    results = compute(self.parts)
                    draws = backend.random.offset
                except BaseException as error:
                    with contextlib.suppress(Exception):
                        stream.end_capture()
                    if isinstance(error, _OF_CAPTURING) and not isinstance(error, GraphError):
                        raise _not_capturable(error) from error
                    raise
                graph = stream.end_capture()
        finally:
            if collecting:
                gc.enable()
            for p, step in steps.items():  # no step was made
                self.optimizer.state[p]["step"] = step
        # What outlives the step came from elsewhere: weights, but also what a model has cached,
        # such as rotary tables, and may forget while the graph goes on reading it.
        self.recorded = _Recorded(graph, results, pool, draws, [*noted(), *tables])
        self.places = self._places()
        pools.append(pool)

    def replay(self) -> tuple[Array, Array]:
        """One step of the graph on what `fill` wrote."""
        assert self.recorded is not None
        self.recorded.graph.launch()
        backend.random.offset += self.recorded.draws
        for parameters in self.updates:
            for p in parameters:
                self.optimizer.state[p]["step"] += 1
                mark_written(p.data, by="AdamW")
        return self.recorded.results

    def is_stale(self) -> bool:
        """Whether AdamW would be launched otherwise, or the parameters have moved.

        Parameters of one launch share their numbers: those with another rate need another launch.
        """
        apart = any(len({self._options(p) for p in members}) > 1 for members in self.updates)
        return apart or self.places != self._places()

    def _places(self) -> list[int]:
        return [p.data.data.ptr for members in self.updates for p in members]

    # --- what changes from step to step -----------------------------------------------------------

    def fill(self, parts: Sequence[Part], with_numbers: bool = True) -> None:
        """Write the batch, and the numbers of the step, into the graph's memory.

        Raises what the op would for an id that is in no table.
        """
        if not self.limits:
            self._remember_limits(parts)
        limits = iter(self.limits)
        for part, inputs in zip(parts, self.inputs, strict=True):
            for value in part.batch.values:
                if value.dtype.kind in "iu":
                    limit = next(limits)
                    limit.look_at(value)
                    limit.check_again()
            for there, array in zip(inputs, part.batch.uploaded.wait(), strict=True):
                there[...] = array
        if with_numbers:
            self._fill_numbers()

    def _remember_limits(self, parts: Sequence[Part]) -> None:
        for part, inputs in zip(parts, self.inputs, strict=True):
            for value, array in zip(part.batch.values, inputs, strict=True):
                limit = bounds.remember(array, value)
                if limit is not None:
                    self.limits.append(limit)

    def _fill_numbers(self) -> None:
        from tinygrad_llm.kernels.optimizer import step_numbers

        first = backend.random.offset
        offsets = np.array([first + n for n in self.drawn], dtype=np.int64)
        rows = [step_numbers(*self._options(members[0])) for members in self.updates]
        numbers = np.stack(rows) if rows else np.empty((0, 3), np.float32)
        there: Uploaded = self.uploader.upload([offsets, numbers])
        for target, array in zip((self.offsets, self.numbers), there.wait(), strict=True):
            if len(array):
                target[: len(array)] = array

    def _options(self, p: Tensor) -> tuple[int, float, tuple[float, float], float]:
        """(t, lr, betas, eps) of the next step of p."""
        group = self.groups[id(p)]
        beta1, beta2 = map(float, group["betas"])
        step = self.optimizer.state[p]["step"] + 1
        return step, float(group["lr"]), (beta1, beta2), float(group["eps"])

    @contextlib.contextmanager
    def _on_memory(self, write: bool) -> Iterator[None]:
        """Within: random places and AdamW's numbers are those in the graph's memory.

        With `write` they are also written there, at once, since this step is a rehearsal.
        """
        stream, self.updates = backend.random, []
        ours = _StreamInMemory(stream, self.offsets, write)

        def numbers(parameters: list[Tensor], *options: Any) -> Array:
            from tinygrad_llm.kernels.optimizer import step_numbers

            k = len(self.updates)
            if k == _UPDATES:
                raise GraphError(f"a step has more than {_UPDATES} launches of AdamW")
            self.updates.append(parameters)
            if write:
                for i, number in enumerate(step_numbers(*options).tolist()):
                    self.numbers[k, i : i + 1].fill(number)
            return self.numbers[k]

        backend.random, self.optimizer.numbers = ours, numbers
        try:
            yield
        finally:
            backend.random, self.optimizer.numbers = stream, None
            self.drawn = ours.drawn
        if write:
            stream.offset = ours.first + ours.offset


class _Static(Batch):
    """A batch that lies in the memory of a graph."""

    def __init__(self, host: Any, arrays: list[Array]) -> None:
        super().__init__(host, Uploaded(arrays, None), for_training=False)

    def arrays(self) -> list[Array]:
        return self.uploaded.arrays


class _StreamInMemory(RandomStream):
    """The random stream of a step, counted from 0, whose offsets are handed out as memory."""

    def __init__(self, stream: RandomStream, offsets: Array, write: bool) -> None:
        super().__init__(stream.seed)
        self.first, self.offsets, self.write = stream.offset, offsets, write
        self.drawn: list[int] = []
        self._handed: dict[int, Array] = {}

    def reserve(self, count: int) -> Any:
        """As a stream's: (seed, where the offset is in the GPU's memory)."""
        seed, start = super().reserve(count)
        place = self._handed.get(start)
        if place is None:  # a checkpointed block draws again from where it drew before
            k = len(self.drawn)
            if k == _DRAWS:
                raise GraphError(f"a step draws random numbers more than {_DRAWS} times")
            self.drawn.append(start)
            place = self._handed[start] = self.offsets[k : k + 1]
            if self.write:
                place.fill(self.first + start)
        return seed, place

    def words(self, count: int, xp: Any = np) -> Array:
        """Refused: a graph would draw the same words at each replay."""
        raise GraphError(
            "this step draws random numbers that no kernel of ours draws, and a CUDA graph would "
            "repeat them: train it without --cuda-graph"
        )


# CUDA's, CuPy's of cuBLAS, and of ops that want a number and get where it lies.
_OF_CAPTURING = (RuntimeError, TypeError, AttributeError)


def _not_capturable(error: BaseException) -> GraphError:
    """What a person can do about it."""
    notes = [n.removeprefix("in ") for n in getattr(error, "__notes__", ()) if n.startswith("in ")]
    where = f" in {notes[0]}" if notes else ""
    return GraphError(
        f"this step cannot be captured as a CUDA graph ({' '.join(str(error).split())}{where}): "
        "train it without --cuda-graph"
    )
