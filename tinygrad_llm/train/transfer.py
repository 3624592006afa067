"""Batches on their way to a GPU: the next one is copied while this one is computed with.

    host      draw batch 2          draw batch 3          …
    copies          ──► batch 2           ──► batch 3     on a stream of their own
    compute   ── batch 1 ─────────► ── batch 2 ─────────► …

A copy beside the computation needs pinned memory, which the system does not move, and events for
two dangers: that the GPU reads a batch before all of it is there, and that a copy writes over
memory which an earlier step still reads. What is drawn ahead is not yet trained on: the position in
the data that a checkpoint holds is that before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.backend import Array
from tinygrad_llm.ops import bounds
from tinygrad_llm.tensor import Tensor
from tinygrad_llm.train.task import Summed, Task, unit_of

# --- one batch ------------------------------------------------------------------------------------


class Uploader:
    """Copies arrays to a GPU on a stream of its own, through pinned memory.

    Args:
        device: 'cuda' or 'cuda:N'.

    What a batch's integers are bounded by is counted here, on the host: `ops.bounds`.
    """

    def __init__(self, device: str) -> None:
        self.cupy: Any = backend.cupy()
        self.index = int(device.partition(":")[2] or 0)
        with self._device():
            self.stream = self.cupy.cuda.Stream(non_blocking=True)
        self._staging: deque[_Staging] = deque()  # those in use first, the oldest of them first
        self._under_way: deque[tuple[Any, list[Array]]] = deque()

    def upload(self, values: Sequence[np.ndarray]) -> Uploaded:
        """Begin to copy; the arrays may be used once `Uploaded.wait()` was called."""
        with self._device():
            arrays = [self.cupy.empty(v.shape, dtype=v.dtype) for v in values]
            # Their memory comes from the pool of the computing stream. Whoever had it before is
            # done with it when that stream has come to here.
            self.stream.wait_event(self._event(None))
            staging = self._stage(sum(_rounded(v.nbytes) for v in values))
            place = 0
            for value, array in zip(values, arrays, strict=True):
                bounds.remember(array, value)
                if value.size:
                    address = staging.put(value, place)
                    array.data.copy_from_host_async(address, value.nbytes, self.stream)
                place += _rounded(value.nbytes)
            staging.copied = ready = self._event(self.stream)
        # An array that is dropped unused goes back to the pool: not while it is being written.
        while self._under_way and self._under_way[0][0].done:
            self._under_way.popleft()
        self._under_way.append((ready, arrays))
        return Uploaded(arrays, ready, staging)

    def _device(self) -> Any:
        return self.cupy.cuda.Device(self.index)

    def _event(self, stream: Any) -> Any:
        event = self.cupy.cuda.Event(disable_timing=True)
        event.record(stream)  # None: the current stream
        return event

    def _stage(self, nbytes: int) -> _Staging:
        """Pinned memory that no copy reads from any more: two pieces take turns."""
        if len(self._staging) < 2 or self._staging[0].buffer.nbytes < nbytes:
            if len(self._staging) >= 2:
                self._staging.popleft().wait()
            self._staging.append(_Staging(nbytes))
        else:
            self._staging.rotate(-1)
        staging = self._staging[-1]
        staging.wait()
        return staging


class Uploaded(NamedTuple):
    """Arrays on a GPU, and the event after which they are there."""

    arrays: list[Array]
    ready: Any
    source: Any = None  # the pinned memory, which must be there until then

    def wait(self) -> list[Array]:
        """The arrays; what is launched from here on finds them there. The host does not wait."""
        backend.cupy().cuda.get_current_stream().wait_event(self.ready)
        return self.arrays


class _Staging:
    """A piece of pinned memory, and the event after which its content has been copied."""

    def __init__(self, nbytes: int) -> None:
        import cupyx  # pyright: ignore[reportMissingImports]

        self.buffer: np.ndarray = cupyx.empty_pinned(max(nbytes, 1 << 16), np.uint8)
        self.copied: Any = None

    def put(self, values: np.ndarray, place: int) -> int:
        """Write the values at `place`; their address."""
        there = self.buffer[place : place + values.nbytes].view(values.dtype).reshape(values.shape)
        there[...] = values
        return there.ctypes.data

    def wait(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()


def _rounded(nbytes: int) -> int:
    return -(-nbytes // 512) * 512


# --- the batches of a task ------------------------------------------------------------------------


class Batch:
    """A batch of the task, as it is on the host, and its copy on the GPU."""

    def __init__(self, host: Any, uploaded: Uploaded, for_training: bool) -> None:
        self.host, self.uploaded, self.for_training = host, uploaded, for_training

    def on_gpu(self) -> Any:
        """The batch with CuPy's arrays in place of NumPy's."""
        arrays = iter(self.arrays())
        return with_arrays(self.host, lambda _: next(arrays))

    def arrays(self) -> list[Array]:
        """CuPy's arrays, there for what is launched from here on."""
        return self.uploaded.wait()

    @property
    def values(self) -> list[np.ndarray]:
        """NumPy's arrays."""
        found: list[np.ndarray] = []
        with_arrays(self.host, found.append)
        return found


class UploadedTask:
    """`task` with its batches on a GPU before they are needed; all else is the task's.

    Batches are NumPy arrays, or tuples, lists and dicts of them.
    """

    def __init__(self, task: Task, device: str) -> None:
        self.task, self.uploader, self.unit = task, Uploader(device), unit_of(task)
        self._ahead: deque[tuple[dict[str, Any], Batch]] = deque()  # with the positions before them
        self._may_draw_ahead = True

    def next_batch(self) -> Batch:
        """The task's next one, most often uploaded already."""
        if self._ahead:
            return self._ahead.popleft()[1]
        return self._upload(self.task.next_batch(), for_training=True)

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """The task's; and the next batch is drawn and sent while the GPU works on this one."""
        loss = self.task.loss(model, batch.on_gpu())
        self._begin_next(batch)
        return loss

    def _begin_next(self, batch: Batch) -> None:
        if batch.for_training:
            batch.for_training = False  # one is drawn for each that was handed out
            self.draw_ahead()

    def draw_ahead(self) -> None:
        """Draw a batch and begin to upload it; nothing of it is seen in `state()`."""
        if not self._may_draw_ahead:
            return
        position, random = self.task.state(), backend.random.state()
        host = self.task.next_batch()
        if backend.random.state() != random:  # of which the model draws, too, in between
            backend.random.load_state(random)
            self.task.load_state(position)
            self._may_draw_ahead = False
            return
        self._ahead.append((position, self._upload(host, for_training=True)))

    def validation(self) -> Iterator[Batch]:
        """The task's, one ahead."""
        waiting: Batch | None = None
        for host in self.task.validation():
            batch = self._upload(host, for_training=False)
            if waiting is not None:
                yield waiting
            waiting = batch
        if waiting is not None:
            yield waiting

    def size(self, batch: Batch) -> int:
        """The task's, counted on the host."""
        return self.task.size(batch.host)

    def save(self, folder: Path) -> None:
        """The task's."""
        self.task.save(folder)

    def state(self) -> dict[str, Any]:
        """The position in the data of what was handed out, not of what is drawn ahead."""
        return self._ahead[0][0] if self._ahead else self.task.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """The task's; what was drawn ahead is forgotten."""
        self._ahead.clear()
        self.task.load_state(state)

    def _upload(self, host: Any, for_training: bool) -> Batch:
        batch = Batch(host, Uploaded([], None), for_training)
        batch.uploaded = self.uploader.upload(batch.values)
        return batch


class UploadedSum(UploadedTask):
    """An `UploadedTask` of a task whose loss is a sum of means."""

    def __init__(self, task: Any, device: str) -> None:
        super().__init__(task, device)
        self._of: Summed = task

    def losses(self, model: Any, batch: Batch) -> Sequence[Tensor]:
        """The task's, as `loss`."""
        losses = self._of.losses(model, batch.on_gpu())
        self._begin_next(batch)
        return losses

    def sizes(self, batch: Batch) -> Sequence[int]:
        """The task's, counted on the host."""
        return self._of.sizes(batch.host)


def uploaded(task: Task, device: str) -> UploadedTask:
    """The task with its batches on that GPU."""
    return (UploadedSum if isinstance(task, Summed) else UploadedTask)(task, device)


def with_arrays(batch: Any, by: Callable[[np.ndarray], Any]) -> Any:
    """The batch with by(array) for each array in it, in their order."""
    if isinstance(batch, np.ndarray):
        return by(batch)
    if isinstance(batch, dict):
        return {key: with_arrays(value, by) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        make = getattr(type(batch), "_make", type(batch))  # a NamedTuple's
        return make([with_arrays(value, by) for value in batch])
    return batch
