"""The training loop. There is one, for every model and every task.

    repeat:  batch → loss → gradients → a step of the weights against them

Around these four lines stands what a long run needs: validation, records, checkpoints, and an end
that can be resumed bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from tinygrad_llm import backend
from tinygrad_llm.optim import LRScheduler, Optimizer
from tinygrad_llm.train import checkpoint, memory, plot
from tinygrad_llm.train.blackbox import first_bad_op
from tinygrad_llm.train.config import TrainConfig
from tinygrad_llm.train.ema import WeightAverage
from tinygrad_llm.train.gradient import Gradient
from tinygrad_llm.train.graph import GraphedStep, refuse_graph
from tinygrad_llm.train.log import Log
from tinygrad_llm.train.parallel import Lost, Team
from tinygrad_llm.train.precision import HalfWeights, LossScaler
from tinygrad_llm.train.readback import Late
from tinygrad_llm.train.run import Record, Run, speed_key
from tinygrad_llm.train.samples import Samples
from tinygrad_llm.train.shortage import OutOfMemory, rows_that_fit, ways_out
from tinygrad_llm.train.signals import Interrupted, noticing_signals
from tinygrad_llm.train.step import CapturedStep, FusedStep, PlainStep, TeamStep
from tinygrad_llm.train.stopping import End, Limits, better
from tinygrad_llm.train.task import Measured, Model, Task, unit_of
from tinygrad_llm.train.transfer import uploaded
from tinygrad_llm.train.utilisation import Utilisation


class Diverged(ArithmeticError):
    """The loss or its gradient is no longer a number."""


class NotSaved(OSError):
    """The run folder cannot be written, such as on a full disk; one sentence for people."""


class Trainer:
    """Trains `model` on `task` and keeps the run folder.

    Args:
        model, optimizer, schedule: what is trained, and how.
        task: where batches come from and how wrong the model is on one; see `Task`.
        config: how long, how often.
        run: the folder; `run.begin()` has been called.
        log: where to tell how it goes.
        samples: texts to be written on the way.
        utilisation: records what share of the machine's peak a step gets, as `mfu`.
        judge_average: whether the average of the weights, where one is kept, is what is validated,
            and what makes a checkpoint the best; otherwise its score stands beside theirs.
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
        samples: Samples | None = None,
        utilisation: Utilisation | None = None,
        *,
        judge_average: bool = False,
    ) -> None:
        self.device = next((p.device for p in model.parameters()), "cpu")
        on_gpu = self.device != "cpu"
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.task: Task = uploaded(task, self.device) if on_gpu else task
        self.memory = memory.GpuMemory() if on_gpu else None
        self.config, self.run, self.log = config, run, log
        self.samples, self.utilisation = samples, utilisation
        self.half = self.scaler = None  # where the network computes in half precision
        if config.dtype != "float32":
            self.half = HalfWeights(model.parameters(), optimizer, config.dtype)
            self.scaler = LossScaler() if config.dtype == "float16" else None
        with self._masters():
            self.average = WeightAverage(model.parameters(), config.ema) if config.ema else None
        self.judge_average = judge_average
        self.gradient = Gradient(model, self.task, self.half, self.scaler)
        self.team: Team | None = None  # the processes that share a step, where there are several
        self.graph: GraphedStep | None = None  # the step, where it is captured
        self._make_step = self._way_to_step(config.cuda_graph)
        self.measured = task if isinstance(task, Measured) else None
        self.score = self.measured.score if self.measured is not None else "val_loss"
        self.limits = Limits(config, self.score)
        self._speed = speed_key(unit_of(task))
        self.end: End | None = None  # why the run is over, once it is
        self.step = 0  # updates so far
        self.tokens = 0  # targets trained on so far
        self.best: Record | None = None  # {"step", "val_loss", score} of the best checkpoint
        self._late: Late | None = None  # what a GPU has not yet told of the last step
        self._saved_step: int | None = None
        self._elapsed = 0.0  # seconds of training before this process
        self._began = time.monotonic()
        self._signal: int | None = None

    # --- the loop ---------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train until a limit of `config` is reached; the last state is validated and saved.

        Raises Interrupted after SIGINT or SIGTERM, with a checkpoint of that very step, Diverged
        when the loss is no longer finite, OutOfMemory when an array cannot be allocated, Lost when
        a process that shares the work dies, and NotSaved when the run folder cannot be written.
        """
        self._began = time.monotonic()
        try:
            # An overflow needs no warning of NumPy's: the run stops at what comes of it.
            quiet = np.errstate(over="ignore", invalid="ignore")
            on_device = backend.on_device(self.device)
            with noticing_signals(self._notice), quiet, on_device, self._explaining():
                if self.team is not None:
                    self.team.start()  # before the log: a bar has a thread, which no fork survives
                self.log.start(self.step, self.config.steps)
                self._loop()
        finally:
            if self.team is not None:
                self.team.stop()
            self.log.stop()
            try:
                self._draw()
            finally:
                self.run.close()

    def _loop(self) -> None:
        if self.step == 0:  # where it starts from: about log(vocabulary size) for a language model
            record: Record = {"step": 0, **self._validate(), "elapsed": self._seconds()}
            self._note(record)
            if self.over():  # there is no time for a step: what there is, is kept
                self.save(record)
        self.end = self.over()
        while self.end is None:
            record = self.train_step()
            saving = self._due(self.config.checkpoint_every)
            self.end = self.over()
            if self.end or saving or self._due(self.config.eval_every):
                self._settle()
                record |= self._validate()
                self.end = self.end or self.over()  # the patience may be used up now
                saving = saving or (self.config.patience > 0 and self.limits.waited == 0)
            record["elapsed"] = self._seconds()
            self._note(record)
            if not math.isfinite(record.get("val_loss", 0.0)):  # this step spoilt the weights
                raise Diverged(
                    f"the validation loss is {record['val_loss']} after step {self.step}, so "
                    f"training stopped; {self._last_good()}; a lower learning rate often helps"
                )
            self._sample()
            if self.end or saving:
                self.save(record)
            if self._signal is not None and self.end is None:
                self.save()
                raise Interrupted(self._signal, self.step)
        if self.memory is not None:
            self.log.say(self.memory.summary())

    def train_step(self) -> Record:
        """θ ← θ − update(∂L/∂θ): one update; its line in metrics.jsonl.

        On a GPU the line has no loss yet: the GPU still works when this returns. See `_settle`.
        """
        began = time.perf_counter()
        batches = [self.task.next_batch() for _ in range(self.config.accumulate)]
        random = backend.random.state()
        parts = self._make_step.parts(batches)
        lr = self.optimizer.defaults["lr"] * self.schedule.schedule(self.schedule.last_step)
        loss, norm = self._make_step(parts)
        record: Record = {"step": self.step + 1, "loss": None, "lr": lr, "grad_norm": None}
        late = Late(record, (loss, norm), parts, random)
        if isinstance(norm, float):  # it is known whether the step was made
            self._take_in(late)
        else:
            self._late = late
        self.schedule.step()  # the learning rate of the next step

        self.step += 1
        if self.average is not None:
            with self._masters():
                self.average.update(self.step)
        targets = sum(map(self.task.size, batches))
        self.tokens += targets
        seconds = time.perf_counter() - began
        record[self._speed] = targets / seconds
        if self.utilisation is not None:
            record["mfu"] = self.utilisation.mfu(targets, seconds)
        if self.memory is not None:
            record |= self.memory.record()
        return record

    def _way_to_step(self, capture: bool) -> PlainStep:
        """How this run makes a step: see `step`."""
        c, optimizer = self.config, self.optimizer
        plain = self.gradient, self.model.parameters(), optimizer, c.grad_clip or math.inf
        refuse_graph(c, self.device, optimizer)
        if c.processes > 1:
            work = self.gradient, self.gradient.loss
            self.team = Team(self.model.parameters(), optimizer, *work, c.processes)
            return TeamStep(self.team, *plain)
        if capture:
            pools = [] if self.memory is None else self.memory.pools
            captured = CapturedStep(self._settle, pools, *plain)
            self.graph = captured.graph
            return captured
        if self.half is not None or self.device != "cpu":
            return FusedStep(self._settle, *plain)
        return PlainStep(*plain)

    def _settle(self) -> None:
        """Wait for what a GPU has to tell of the last step, and write its line if that is due.

        It is called when the GPU has the next step's forward and backward pass to do, so it does
        not stand still; but before the next update, and before anything is validated or saved.
        Weights are never spoilt meanwhile: where the norm is not finite, the step left them alone.
        """
        late, self._late = self._late, None
        if late is not None:
            self._take_in(late)
            if late.due:
                self._write_line(late.record)

    def _take_in(self, late: Late) -> None:
        """The loss and norm of a step into its record; Diverged where they end the run."""
        loss, norm = late.read()
        good, record = math.isfinite(loss + norm), late.record
        record |= {"loss": loss, "grad_norm": norm}
        if self.scaler is not None:
            record |= {"loss_scale": self.scaler.scale, "skipped": not good}
            self.scaler.update(good)
        if good:
            return
        if self.scaler is None or self.scaler.exhausted:
            raise self._diverged(loss, norm, late)
        for name in ("loss", "grad_norm"):  # a step that is skipped: JSON has no infinity
            if not math.isfinite(record[name]):
                del record[name]

    def evaluate(self) -> float:
        """The mean loss per target over the validation batches, dropout off, nothing recorded."""
        batches = self.task.validation()
        if self.team is not None:
            losses = self.team.losses(batches)
        else:
            losses = ((batch, self.gradient.loss(batch)) for batch in batches)
        total, targets = 0.0, 0
        for batch, loss in losses:
            size = self.task.size(batch)
            total += loss * size
            targets += size
        return total / targets

    def over(self) -> End | None:
        """Why there is nothing more to do, such as all steps being done; None while there is."""
        return self.limits.over(self.step, self.tokens, self._seconds())

    def _validate(self) -> Record:
        """The loss of the weights, and that of their average where one is kept."""
        by_average = self.average is not None and self.judge_average
        found = self._measure_average() if by_average else self._measure()
        self.limits.validated(found[self.score])
        if self.measured is not None and (remark := self.measured.remark(found)):
            self.log.say(remark)
        if self.average is not None and not by_average:
            averaged = self._measure_average()
            found |= {f"{key}_ema": averaged[key] for key in {"val_loss", self.score}}
        return found

    def _measure_average(self) -> Record:
        assert self.average is not None
        with self.average.in_place(rounded=True):
            return self._measure()

    def _measure(self) -> Record:
        """`val_loss`, and what else the task has to say of the weights as they are."""
        if self.measured is None:
            return {"val_loss": self.evaluate()}
        return dict(self.measured.evaluate(self.model))

    def _sample(self) -> None:
        """Show what the model writes by now, where that is due."""
        if self.samples is None or not self.samples.due(self.step):
            return
        self._settle()
        try:
            with self._writing():
                text = self.samples.take(self.step)
        except FloatingPointError as error:  # the next step will say more
            self.log.say(f"no sample after step {self.step}: {error}")
        else:
            self.log.say(f"step {self.step} writes: {text!r}")  # on one line, no control characters

    def _due(self, every: int) -> bool:
        return self.step % every == 0

    def _note(self, record: Record) -> None:
        """Write the line, or have it written once its numbers are there."""
        if self._late is not None and self._late.record is record:
            self._late.due = True
        else:
            self._write_line(record)

    def _write_line(self, record: Record) -> None:
        with self._writing():
            self.run.append(record)
        self.log.record(record)

    def _seconds(self) -> float:
        """Time spent on this run, by all processes that worked on it."""
        return self._elapsed + time.monotonic() - self._began

    def _diverged(self, loss: float, norm: float, late: Late) -> Diverged:
        """What is known about the step that failed: its number, the op, and where to go back to."""
        backend.random.load_state(late.random)  # the same dropout again
        op = first_bad_op(lambda: self.gradient(late.parts))
        where = f": {op}" if op else ""
        if self.scaler is not None:
            where += f", also with a loss scale of {2 * self.scaler.scale:g}"
        return Diverged(
            f"the loss is {loss} and its gradient has norm {norm} at step {late.record['step']}"
            f"{where}, so training stopped; {self._last_good()}; a lower learning rate often helps"
        )

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Within: what the machine cannot do ends the run with a sentence, not with a traceback."""
        try:
            yield
        except Lost as error:
            raise Lost(
                f"{error}, so training stopped after step {self.step}; {self._last_good()}: go on "
                "with --resume, perhaps with fewer --processes"
            ) from error
        except (MemoryError, RuntimeError) as error:
            if not memory.is_shortage(error):
                raise
            raise self._out_of_memory(error) from error

    def _out_of_memory(self, error: BaseException) -> OutOfMemory:
        c, parameters = self.config, self.model.parameters()
        why = str(memory.look_at(error, parameters, self.optimizer, self.device))
        fits = None
        if self.team is None:  # whose memory is not this process's alone
            self.graph = self._late = None  # and the memory that they hold
            self._make_step = self._way_to_step(capture=False)
            if self.memory is not None:
                del self.memory.pools[1:]
            fits = rows_that_fit(error, self.model, self.task, self.optimizer, self.device)
        return OutOfMemory(
            f"there is not enough memory to go on after step {self.step} with batch_size "
            f"{c.batch_size} and context {c.context}{f' ({why})' if why else ''}, so training "
            f"stopped; {self._last_good()}; less is needed by {ways_out(c, self.device, fits)}"
        )

    def _last_good(self) -> str:
        saved = self.run.checkpoint()
        return f"the last good checkpoint is {saved}" if saved else "there is no checkpoint yet"

    # --- going on later ---------------------------------------------------------------------------

    def save(self, record: Record | None = None) -> None:
        """Write a checkpoint; it becomes the best one when the record's score is the best so far.

        Only checkpoints with a validation compete: `best` is always a folder that is there.
        """
        self._settle()
        if self._saved_step == self.step:
            return
        improved = (
            record is not None
            and math.isfinite(record[self.score])  # nothing would ever be better than NaN
            and better(self.score, record[self.score], self.best[self.score] if self.best else None)
        )
        if improved:
            assert record is not None
            self.best = {key: record[key] for key in ("step", "val_loss", self.score)}
        with self._writing():
            folder = self.run.save_checkpoint(self.step, self._write)
            self._saved_step = self.step
            if improved:
                self.run.mark_best(folder)
            if self.config.keep_last:
                best = self.run.step_folder(self.best["step"]) if self.best else None
                self.run.keep_last(self.config.keep_last, best)

    def _write(self, folder: Path) -> None:
        if self.team is not None:
            self.team.gather()
        with self._masters():
            self.model.save_pretrained(folder)
        self.task.save(folder)
        checkpoint.save_training(folder, self.optimizer, self.state(), self.half is None)
        if self.average is not None:  # a model folder of its own: `generate` can open it
            with self.average.in_place():
                self.model.save_pretrained(folder / checkpoint.AVERAGE)
            self.task.save(folder / checkpoint.AVERAGE)

    def _masters(self) -> AbstractContextManager[None]:
        """Within: the weights in float32, where those of the network are rounded."""
        return nullcontext() if self.half is None else self.half.masters_in_place()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Within: what cannot be written ends the run with a sentence, not with a traceback."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise NotSaved(
                f"{self.run.folder} cannot be written ({why}), so training stopped after step "
                f"{self.step}; {self._last_good()}: put that right, then go on with --resume"
            ) from error

    def state(self) -> dict[str, Any]:
        """All that decides how training goes on, beside the weights and the optimiser's arrays."""
        scale = {} if self.scaler is None else {"loss_scale": self.scaler.state()}
        return {
            "step": self.step,
            "tokens": self.tokens,
            "elapsed": self._seconds(),
            "best": self.best,
            "limits": self.limits.state(),
            "data": self.task.state(),
            "random": backend.random.state(),
            "schedule": self.schedule.state_dict(),
            **scale,
        }

    def resume(self, folder: Path | None) -> None:
        """Go on from the checkpoint in `folder`, whose weights `model` already has.

        From here the run is bit for bit the one that was not stopped: records later than the
        checkpoint are dropped, for they will be made again. None is a run that has no checkpoint
        yet: it begins anew.
        """
        if folder is not None:
            self._load(folder)
        reached = -1 if folder is None else self.step
        self.run.forget_after(reached)
        if self.samples is not None:
            self.samples.forget_after(reached)
        if folder is None:
            return
        self.run.mark_latest(folder)  # a newer, damaged one may have been deleted
        if self.best and not self.run.step_folder(self.best["step"]).is_dir():
            self.best = None  # deleted by hand: the next one with a validation is the best
        if self.best:  # a kill may have come just before the link was turned
            self.run.mark_best(self.run.step_folder(self.best["step"]))

    def _load(self, folder: Path) -> None:
        state = checkpoint.load_training(folder, self.optimizer)
        if self.half is not None:
            self.half.give_masters()  # the weights that the model was loaded with
        with checkpoint.reading(folder):
            if self.scaler is not None:
                self.scaler.load_state(state["loss_scale"])
            self.task.load_state(state["data"])
            backend.random.load_state(state["random"])
            self.schedule.load_state_dict(state["schedule"])
            self.limits.load_state(state["limits"])
            self.step, self.tokens, self.best = state["step"], state["tokens"], state["best"]
            self._elapsed, self._saved_step = state["elapsed"], state["step"]
            if self.average is not None:
                kept = self.model.from_pretrained(folder / checkpoint.AVERAGE)
                self.average.load(kept.parameters())

    def _notice(self, number: int) -> None:
        self._signal = number

    def _draw(self) -> None:
        try:
            why_not = plot.draw_loss(self.run.metrics(), self.run.picture_file)
        except (OSError, MemoryError) as error:  # it can be drawn again: no reason to fail
            why_not = f"loss.png was not drawn: {getattr(error, 'strerror', None) or error}"
        if why_not:
            self.log.say(why_not)
