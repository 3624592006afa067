"""A step that needs more memory than there is: the sentence that says what would need less."""

from __future__ import annotations

from typing import Any

from tinygrad_llm.optim import Optimizer
from tinygrad_llm.train import memory
from tinygrad_llm.train.config import TrainConfig
from tinygrad_llm.train.task import Model, Task
from tinygrad_llm.train.transfer import UploadedTask, with_arrays


class OutOfMemory(MemoryError):
    """A step needs more memory than there is; one sentence for people."""


def ways_out(config: TrainConfig, device: str, fits: int | None) -> str:
    """What to change so that less is needed; `fits` is how many rows do, where that is known."""
    ways = "a smaller --batch-size (with --accumulate for the same update) or --context"
    if not config.gradient_checkpointing:
        ways += ", or in this run --resume with --gradient-checkpointing"
    if config.dtype == "float32" and device != "cpu":
        ways += ", or in a new run --dtype bfloat16"
    if config.processes > 1:
        ways += ", or fewer --processes"
    if fits is not None and fits < config.batch_size:
        guess = f"a batch of about {fits} fits" if fits else "not even a batch of 1 fits"
        ways += f"; measured with few rows, {guess}"
    return ways


def rows_that_fit(
    error: BaseException, model: Model, task: Task, optimizer: Optimizer, device: str
) -> int | None:
    """How many rows a batch may have, measured with one and with two rows of the next one.

    None where that cannot be measured. The run is over after this: a batch is drawn, and the
    gradients are gone.
    """
    on_host: Any = task.task if isinstance(task, UploadedTask) else task

    def step(rows: int) -> None:
        optimizer.zero_grad()
        batch = with_arrays(on_host.next_batch(), lambda array: array[:rows])
        on_host.loss(model, batch).backward()
        optimizer.zero_grad()

    moments = 0 if optimizer.state else 8 * sum(p.size for p in model.parameters())
    return memory.batch_that_fits(error, step, device, reserved=moments)
