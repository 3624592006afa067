"""The training loop. There is one, for every model and every task.

    repeat:  batch → loss → gradients → a step of the weights against them

Around these four lines stands what a long run needs: validation, records, checkpoints, and an end
that can be resumed bit for bit.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.autograd import no_grad
from tinygrad_llm.optim import LRScheduler, Optimizer, clip_grad_norm_
from tinygrad_llm.tensor import Tensor
from tinygrad_llm.train import checkpoint, plot
from tinygrad_llm.train.config import TrainConfig
from tinygrad_llm.train.log import Log
from tinygrad_llm.train.run import Record, Run


class Task(Protocol):
    """What is learnt: where batches come from and how wrong a model is on one."""

    def next_batch(self) -> Any: ...

    def loss(self, model: Any, batch: Any) -> Tensor:
        """The mean loss over the targets of the batch: a scalar."""
        ...

    def validation(self) -> Iterable[Any]:
        """The same batches every time."""
        ...

    def size(self, batch: Any) -> int:
        """How many targets the batch has."""
        ...

    def save(self, folder: Path) -> None:
        """Write what belongs beside the weights, such as the tokenizer."""
        ...

    def state(self) -> dict[str, Any]:
        """The position in the data, as JSON."""
        ...

    def load_state(self, state: dict[str, Any]) -> None: ...


class Model(Protocol):
    """What is trained: every class in `models/` has this."""

    def parameters(self) -> Iterable[Tensor]: ...

    def train(self) -> Any: ...

    def eval(self) -> Any: ...

    def save_pretrained(self, folder: Path) -> Any: ...


class Interrupted(Exception):
    """A signal ended the run; what it had reached is saved."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}; saved")
        self.number, self.step = number, step


class Diverged(ArithmeticError):
    """The loss or its gradient is no longer a number."""


class Trainer:
    """Trains `model` on `task` and keeps the run folder.

    Args:
        model, optimizer, schedule: what is trained, and how.
        task: where batches come from and how wrong the model is on one; see `Task`.
        config: how long, how often.
        run: the folder; `run.begin()` has been called.
        log: where to tell how it goes.
    """

    def __init__(
        self,
        model: Model,
        optimizer: Optimizer,
        schedule: LRScheduler,
        task: Task,
        config: TrainConfig,
        run: Run,
        log: Log,
    ) -> None:
        self.model, self.optimizer, self.schedule, self.task = model, optimizer, schedule, task
        self.config, self.run, self.log = config, run, log
        self.step = 0  # updates so far
        self.best: Record | None = None  # {"step", "val_loss"} of the best checkpoint
        self._saved_step: int | None = None
        self._elapsed = 0.0  # seconds of training before this process
        self._began = time.monotonic()
        self._signal: int | None = None

    # --- the loop ---------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train until `config.steps` updates are done; the last state is validated and saved.

        Raises Interrupted after SIGINT or SIGTERM, with a checkpoint of that very step, and
        Diverged when the loss is no longer finite.
        """
        self._began = time.monotonic()
        self.log.start(self.step, self.config.steps)
        try:
            # An overflow needs no warning of NumPy's: `_require_finite` stops at what comes of it.
            with self._noticing_signals(), np.errstate(over="ignore", invalid="ignore"):
                self._loop()
        finally:
            self.log.stop()
            self.run.close()
            self._draw()

    def _loop(self) -> None:
        if self.step == 0:  # where it starts from: about log(vocabulary size) for a language model
            self._note({"step": 0, "val_loss": self.evaluate(), "elapsed": self._seconds()})
        while self.step < self.config.steps:
            record = self.train_step()
            if self._due(self.config.eval_every) or self._due(self.config.checkpoint_every):
                record["val_loss"] = self.evaluate()
            self._note({**record, "elapsed": self._seconds()})
            if self._due(self.config.checkpoint_every):
                self.save(record["val_loss"])
            if self._signal is not None and self.step < self.config.steps:
                self.save()
                raise Interrupted(self._signal, self.step)

    def train_step(self) -> Record:
        """θ ← θ − update(∂L/∂θ): one batch, one update; its line in metrics.jsonl."""
        began = time.perf_counter()
        batch = self.task.next_batch()
        self.model.train()  # dropout on

        self.optimizer.zero_grad()  # forget the gradients of the last batch
        loss = self.task.loss(self.model, batch)  # forward: how wrong is the model?
        loss.backward()  # backward: which way is each weight wrong?
        norm = clip_grad_norm_(self.model.parameters(), self.config.grad_clip or math.inf)
        value = loss.item()
        self._require_finite(value, norm)  # before the weights are spoilt
        self.optimizer.step()  # a step against the gradient
        lr = self.schedule.get_last_lr()[0]
        self.schedule.step()  # the learning rate of the next step

        self.step += 1
        return {
            "step": self.step,
            "loss": value,
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_second": self.task.size(batch) / (time.perf_counter() - began),
        }

    def evaluate(self) -> float:
        """The mean loss per target over the validation batches, dropout off, nothing recorded."""
        self.model.eval()
        total, targets = 0.0, 0
        with no_grad():
            for batch in self.task.validation():
                size = self.task.size(batch)
                total += self.task.loss(self.model, batch).item() * size
                targets += size
        return total / targets

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _note(self, record: Record) -> None:
        self.run.append(record)
        self.log.record(record)

    def _seconds(self) -> float:
        """Time spent on this run, by all processes that worked on it."""
        return self._elapsed + time.monotonic() - self._began

    def _require_finite(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what = f"the loss is {loss} and its gradient has norm {norm}"
        saved = self.run.checkpoint()
        good = f"the last good checkpoint is {saved}" if saved else "there is no checkpoint yet"
        raise Diverged(
            f"{what} at step {self.step + 1}, so training stopped; {good}; a lower learning rate "
            "often helps"
        )

    # --- going on later ---------------------------------------------------------------------------

    def save(self, val_loss: float | None = None) -> None:
        """Write a checkpoint; it becomes the best one when `val_loss` is the lowest so far.

        Only checkpoints with a validation compete: `best` is always a folder that is there.
        """
        if self._saved_step == self.step:
            return
        better = val_loss is not None and (self.best is None or val_loss < self.best["val_loss"])
        if better:
            self.best = {"step": self.step, "val_loss": val_loss}
        folder = self.run.save_checkpoint(self.step, self._write)
        self._saved_step = self.step
        if better:
            self.run.mark_best(folder)

    def _write(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.task.save(folder)
        checkpoint.save_training(folder, self.optimizer, self.state())

    def state(self) -> dict[str, Any]:
        """All that decides how training goes on, beside the weights and the optimiser's arrays."""
        return {
            "step": self.step,
            "elapsed": self._seconds(),
            "best": self.best,
            "data": self.task.state(),
            "random": backend.random.state(),
            "schedule": self.schedule.state_dict(),
        }

    def resume(self, folder: Path) -> None:
        """Go on from the checkpoint in `folder`, whose weights `model` already has.

        From here the run is bit for bit the one that was not stopped: records later than the
        checkpoint are dropped, for they will be made again.
        """
        state = checkpoint.load_training(folder, self.optimizer)
        self.task.load_state(state["data"])
        backend.random.load_state(state["random"])
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.best = state["step"], state["best"]
        self._elapsed, self._saved_step = state["elapsed"], state["step"]
        self.run.forget_after(self.step)
        if self.best:  # a kill may have come just before the link was turned
            self.run.mark_best(self.run.step_folder(self.best["step"]))

    @contextmanager
    def _noticing_signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM ask the loop to stop after its step; a second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python lets only the main thread handle signals
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.getsignal(number) for number in numbers}

        def notice(number: int, _: object) -> None:
            self._signal = number
            for n in numbers:
                signal.signal(n, before[n])

        for number in numbers:
            signal.signal(number, notice)
        try:
            yield
        finally:
            for number in numbers:
                signal.signal(number, before[number])

    def _draw(self) -> None:
        why_not = plot.draw_loss(self.run.metrics(), self.run.picture_file)
        if why_not:
            self.log.say(why_not)
