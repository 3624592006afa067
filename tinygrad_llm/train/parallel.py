"""One step on several cores: each process works out the gradient of a share of the batch.

    L = Σᵢ (nᵢ / n) Lᵢ    ∂L/∂θ = Σᵢ (nᵢ / n) ∂Lᵢ/∂θ    over the parts i of a batch, nᵢ targets each

NumPy computes an exponential or a sum on one core only, and Python lets one thread run at a time;
processes share neither limit. The weights lie in memory that all of them see. Each writes its
gradients there, too; then every parameter has one owner, which adds up what the others found and
takes the optimiser's step for it (so the optimiser's state is spread, as in Rajbhandari et al.,
"ZeRO", 2020). A step of a small GPT takes little more than half of the time on two cores.

A part draws its random numbers from a place in the stream that depends on the step and the part
only, so the same number of processes gives the same weights to the last bit, however it is
scheduled, also after a resume.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import math
import mmap
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.optim import Optimizer
from tinygrad_llm.optim.clip import norms
from tinygrad_llm.tensor import Tensor


class Part(NamedTuple):
    """A part of the batches of a step."""

    batch: Any
    weight: float  # nᵢ / n
    random: dict[str, int] | None = None  # where its random numbers begin; None: go on
    weights: tuple[float, ...] = ()  # of each mean, where the loss is a sum of several: `Summed`


class Lost(RuntimeError):
    """A process of the team has died, or could not be started; one sentence for people."""


class Team:
    """Several processes that take a training step together; this one is the first of them.

    Args:
        parameters: what is trained; their arrays move into shared memory, on the CPU.
        optimizer: steps against the gradients; see `gather` before its state is saved.
        gradient: adds the gradient of some parts to every `.grad` and returns their loss.
        evaluate: the loss of a batch, nothing recorded.
        count: how many processes, this one included.

    `start()` forks the others, which see all Python objects as they are then.

    Raises ValueError for parameters on a GPU or in half precision, of which steps need a copy.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        optimizer: Optimizer,
        gradient: Callable[[Sequence[Part]], float],
        evaluate: Callable[[Any], float],
        count: int,
    ) -> None:
        self.parameters = list(parameters)
        for p in self.parameters:
            if p.device != "cpu" or p.dtype.itemsize < 4:
                raise ValueError(
                    "several processes train float32 or float64 parameters on the CPU, got one in "
                    f"{p.dtype} on {p.device}: train with processes = 1"
                )
        self.optimizer, self.count = optimizer, count
        self._add_gradient, self._evaluate = gradient, evaluate
        self.owner = owners([p.size if p.requires_grad else 0 for p in self.parameters], count)
        self._links: list[Connection] = []
        self._children: list[Any] = []
        self._gradients: list[list[np.ndarray]] = []  # of each process, in shared memory
        self._blas_threads: int | None = None
        self._rank, self._clip = 0, 1.0
        self._spread = False  # whether the others hold a part of the optimiser's state

    # --- what the trainer calls -------------------------------------------------------------------

    def start(self) -> None:
        """Fork the others; nothing where they run already. Raises Lost where that cannot be."""
        if self._gradients:
            return
        self._check_state()
        try:
            self._start()
        except OSError as error:  # also of mmap, where there is no memory
            self.stop()
            raise Lost(f"{self.count} processes cannot be started ({error.strerror})") from error

    def _start(self) -> None:
        for p, shared in zip(self.parameters, _shared_like(self.parameters), strict=True):
            shared[...] = p.data
            p.data = shared
        self._gradients = [_shared_like(self.parameters) for _ in range(self.count)]
        # Every core has a process of its own: threads of BLAS would only get in the way.
        self._blas_threads = backend.set_blas_threads(1)
        atexit.register(self.stop)  # multiprocessing would ask by SIGTERM, which they ignore
        context = multiprocessing.get_context("fork")
        for rank in range(1, self.count):
            ours, theirs = context.Pipe()
            self._links.append(ours)
            child = context.Process(target=self._serve, args=(rank, theirs), daemon=True)
            with warnings.catch_warnings():
                # Python warns where there are threads; BLAS's own, which it counts, survive a fork.
                warnings.simplefilter("ignore", DeprecationWarning)
                child.start()
            theirs.close()
            self._children.append(child)

    def stop(self) -> None:
        """End the others; the weights stay where they are."""
        for child in self._children:
            child.kill()  # it holds nothing that was not gathered, or given up with this run
        for child in self._children:
            child.join()
        for link in self._links:
            link.close()
        self._children, self._links, self._gradients = [], [], []
        if self._blas_threads is not None:
            backend.set_blas_threads(self._blas_threads)
            self._blas_threads = None
        atexit.unregister(self.stop)  # last: what cuts this short must not keep Python from ending

    def gradient(self, parts: Sequence[Part], max_norm: float) -> tuple[float, float]:
        """The loss of the parts and the norm of its gradient, which lies with the owners.

        What is longer than `max_norm` is made so long by the step, as by `clip_grad_norm_`.
        """
        self.start()
        shares = [parts[rank :: self.count] for rank in range(self.count)]
        found = self._all("_work_out", [(share,) for share in shares])
        missing = [none for _, none in found]
        loss = math.fsum(loss for loss, _ in found)
        norm = math.hypot(*self._all("_add_up", [(missing,)] * self.count))
        self._clip = min(1.0, max_norm / (norm + 1e-6)) if math.isfinite(norm) else 1.0
        return loss, norm

    def step(self) -> None:
        """θ ← θ − update(∂L/∂θ), with the optimiser's options as they are here."""
        options = [_without_params(group) for group in self.optimizer.param_groups]
        self._spread = self.count > 1
        self._all("_update", [(self._clip, options)] * self.count)

    def losses(self, batches: Iterable[Any]) -> Iterator[tuple[Any, float]]:
        """(batch, its loss) for each, in order; as many at a time as there are processes."""
        running = 1 + len(self._children)
        group: list[Any] = []
        for batch in batches:
            group.append(batch)
            if len(group) == running:
                yield from self._losses(group)
                group = []
        yield from self._losses(group)

    def _losses(self, group: Sequence[Any]) -> Iterator[tuple[Any, float]]:
        if not group:
            return
        jobs: list[tuple[Any, ...]] = [(batch,) for batch in group]
        yield from zip(group, self._all("_evaluate", jobs), strict=True)

    def gather(self) -> None:
        """Bring the optimiser's state together here, to be saved. Raises Lost where it is gone."""
        self._check_state()
        if not self._children:
            return
        for found in self._all("_own_state", [()] * self.count):
            for i, state in found.items():
                self.optimizer.state[self.parameters[i]] = state
        self._spread = False

    def _check_state(self) -> None:
        if self._spread and not self._children:
            raise Lost("the optimiser's state was lost with the processes that held a part of it")

    def _all(self, function: str, jobs: Sequence[tuple[Any, ...]]) -> list[Any]:
        """[self.function(*job) in process 0, 1, …]; where jobs are fewer, the last ones rest."""
        try:
            for link, job in zip(self._links, jobs[1:], strict=False):
                with _noticing_death():
                    link.send((function, job))
            mine = getattr(self, function)(*jobs[0])
            return [mine, *map(self._answer, self._links[: len(jobs) - 1])]
        except BaseException:
            self.stop()  # an answer that is still to come would be taken for that of the next job
            raise

    def _answer(self, link: Connection) -> Any:
        with _noticing_death():
            error, value = link.recv()
        if error == "MemoryError":
            raise MemoryError(value)
        if error:
            raise RuntimeError(f"a process that helped with the training failed:\n\n{value}")
        return value

    # --- what each process does -------------------------------------------------------------------

    def _serve(self, rank: int, link: Connection) -> None:
        """The life of a process that was forked: answer until nobody asks any more."""
        _become_a_helper(link)
        self._rank = rank
        with contextlib.suppress(EOFError, OSError):
            while True:
                name, job = link.recv()
                try:
                    answer = ("", getattr(self, name)(*job))
                except MemoryError as error:
                    answer = ("MemoryError", str(error))
                except BaseException:
                    answer = ("error", traceback.format_exc())
                link.send(answer)
        os._exit(0)

    def _work_out(self, parts: Sequence[Part]) -> tuple[float, list[int]]:
        """This process's loss; its gradients go into shared memory. Which there are none of."""
        before = backend.random.state()
        self.optimizer.zero_grad()
        loss = self._add_gradient(parts)
        backend.random.load_state(before)
        for i, (p, shared) in enumerate(
            zip(self.parameters, self._gradients[self._rank], strict=True)
        ):
            if p.grad is not None and self.owner[i] != self._rank:
                shared[...] = p.grad.data
        return loss, [i for i, p in enumerate(self.parameters) if p.grad is None]

    def _add_up(self, missing: Sequence[Sequence[int]]) -> float:
        """The whole gradient of the parameters owned here; its norm."""
        without = [set(indices) for indices in missing]
        for i, p in enumerate(self.parameters):
            if self.owner[i] != self._rank:
                p.grad = None
                continue
            for rank in range(self.count):
                if rank == self._rank or i in without[rank]:
                    continue
                theirs = self._gradients[rank][i]
                if p.grad is None:
                    p.grad = Tensor(theirs.copy())
                else:
                    p.grad.data += theirs
        return math.hypot(*norms([p.grad.data for p in self.parameters if p.grad is not None]))

    def _update(self, share: float, options: Sequence[dict[str, Any]]) -> None:
        for group, now in zip(self.optimizer.param_groups, options, strict=True):
            group.update(now)
        if share < 1.0:
            for p in self.parameters:
                if p.grad is not None:
                    p.grad.data *= share
        self.optimizer.step()

    def _own_state(self) -> dict[int, dict[str, Any]]:
        mine = [i for i, rank in enumerate(self.owner) if rank == self._rank]
        state = self.optimizer.state
        return {i: state[p] for i in mine if (p := self.parameters[i]) in state}


def owners(sizes: Sequence[int], count: int) -> list[int]:
    """Who owns which parameter: the largest first, each to whoever has least so far."""
    load, owner = [0] * count, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owner[i] = load.index(min(load))
        load[owner[i]] += sizes[i]
    return owner


_STREAM = 1 << 36  # random words set aside for a part: more than it can ever draw


def cut(
    batches: Sequence[Any],
    count: int,
    size: Callable[[Any], int],
    stream: backend.RandomStream,
    sizes: Callable[[Any], Sequence[int]] | None = None,
) -> list[Part]:
    """The parts of a step: each batch in `count` pieces along its first axis.

    A batch is an array, or a tuple, list or dict of arrays, with a row per example. Parts without
    targets are left out: a batch may have fewer rows than `count`. The stream steps over what is
    set aside for the parts. `size` and `sizes` are those of a task.
    """
    pieces = [piece for batch in batches for piece in _split(batch, count)]
    places = [stream.reserve(_STREAM) for _ in pieces]
    randoms = [{"seed": seed, "offset": offset} for seed, offset in places]
    return weighed(pieces, size, sizes, randoms)


def weighed(
    pieces: Sequence[Any],
    size: Callable[[Any], int],
    sizes: Callable[[Any], Sequence[int]] | None = None,
    randoms: Sequence[dict[str, int] | None] | None = None,
) -> list[Part]:
    """A part of each piece that has targets, with its share of all of them."""
    counts = [(size(piece), *(sizes(piece) if sizes is not None else ())) for piece in pieces]
    totals = [max(1, sum(column)) for column in zip(*counts, strict=True)]
    parts = []
    for piece, random, row in zip(pieces, randoms or [None] * len(pieces), counts, strict=True):
        if any(row):
            weight, *weights = (n / total for n, total in zip(row, totals, strict=True))
            parts.append(Part(piece, weight, random, tuple(weights)))
    return parts


def _split(batch: Any, count: int) -> list[Any]:
    if isinstance(batch, dict):
        values = [_split(value, count) for value in batch.values()]
        return [dict(zip(batch, piece, strict=True)) for piece in zip(*values, strict=True)]
    if isinstance(batch, tuple | list):
        make = getattr(batch, "_make", type(batch))  # a named tuple takes its values one by one
        return list(map(make, zip(*[_split(value, count) for value in batch], strict=True)))
    return np.array_split(batch, count)


# Where nobody said how many processes: bytes of gradients in all of them, and FLOPs of a step that
# are worth a process (it costs about half a millisecond).
_MOST_MEMORY, _LEAST_WORK = 1 << 30, 1 << 27
_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # microseconds of all cores together, in how many


def processes_for(wanted: int, device: str, rows: int, tokens: int, parameters: int) -> int:
    """How many processes to train on: `wanted`, or where that is 0 what suits the machine.

    One per core, as long as each gets a row of the batch, the work is worth it (6 FLOPs for each
    token and parameter) and the gradients stay small beside everything else; one where a GPU
    computes. The cores are those that this process may use, or fewer where its container (cgroup
    v2), OMP_NUM_THREADS or OPENBLAS_NUM_THREADS say so.

    Raises ValueError where several are wanted and the system cannot fork safely, or on a GPU.
    """
    can_fork = sys.platform == "linux" and device == "cpu"
    if wanted > 1 and not can_fork:
        raise ValueError(
            f"train.processes = {wanted} needs the CPU of a Linux system, not {device} on "
            f"{sys.platform}: give --processes 1"
        )
    if wanted or not can_fork:
        return max(1, wanted)
    by_memory = _MOST_MEMORY // (8 * max(1, parameters))
    by_work = 6 * parameters * tokens // _LEAST_WORK
    return max(1, min(_cores(), rows, by_memory, by_work))


def _cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        value = os.environ.get(name, "").strip()
        if value.isdecimal() and int(value):
            cores = min(cores, int(value))
    with contextlib.suppress(OSError, ValueError):  # no such limit: "max 100000", or no such file
        quota, period = map(int, _CPU_MAX.read_text().split())
        cores = min(cores, max(1, quota // period))
    return cores


def _shared_like(parameters: Sequence[Tensor]) -> list[np.ndarray]:
    """Arrays of the parameters' shapes, zero, in memory that forked processes share."""
    starts, end = [], 0
    for p in parameters:
        starts.append(end)
        end += -(-p.data.nbytes // 64) * 64  # each begins at a cache line of its own
    memory = mmap.mmap(-1, max(1, end))
    return [
        np.ndarray(p.shape, p.dtype, buffer=memory, offset=start)
        for p, start in zip(parameters, starts, strict=True)
    ]


def _without_params(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


@contextlib.contextmanager
def _noticing_death() -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError) as error:
        raise Lost(
            "a process that helped with the training has died, perhaps for want of memory"
        ) from error


def _become_a_helper(link: Connection) -> None:
    """Forked: leave signals and files to the first process, and never outlive it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # What was open stays with the first process alone: its end of our pipe, the lock on the run.
    os.closerange(3, link.fileno())
    os.closerange(link.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    parent = multiprocessing.parent_process()
    with contextlib.suppress(OSError, AttributeError):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if parent is None or os.getppid() != parent.pid:  # it died before that could be said
        os._exit(0)
