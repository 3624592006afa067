"""A checkpoint: a Hugging Face model folder, and beside it what training needs to go on.

    config.json, model.safetensors    the model (`transformers` opens the folder as it is)
    tokenizer.json                    text ↔ token ids
    optimizer.safetensors             the optimiser's arrays
    trainer.json                      everything else: step, position in the data, random state …
    ema/                              a model folder with the average of the weights, where kept
    run.toml                          the run's config.toml as it was then
    SHA256SUMS                        what each of these files was when it was saved

No pickle: opening a checkpoint runs nobody's code. `Run.save_checkpoint` puts the folder in place
whole or not at all, with the last two; here is what else goes in and comes out. Every file is
compared with its checksum before it is used: a disk that flips a bit would else give another run,
silently.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.models.pretrained import is_models
from tinygrad_llm.optim import Optimizer
from tinygrad_llm.storage import Damaged, check_sums, save_file

TRAINER, OPTIMIZER, AVERAGE = "trainer.json", "optimizer.safetensors", "ema"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, in one sentence for people."""


def save_training(
    folder: Path, optimizer: Optimizer, state: dict[str, Any], masters: bool = True
) -> None:
    """Write optimizer.safetensors and trainer.json; `state` is JSON, floats to the last bit.

    The optimiser's arrays are named 'parameter number.key', as in '3.exp_avg'; what is not an
    array, such as Adam's step count, stands in trainer.json. Without `masters`, the float32 copies
    of half weights are left out: for a model that was saved with them.
    """
    kept = optimizer.state_dict()
    arrays: dict[str, backend.Array] = {}
    numbers: dict[str, Any] = {}
    for i, entries in kept["state"].items():
        for key, value in entries.items():
            if key == "master" and not masters:
                continue
            if backend.is_array(value):
                arrays[f"{i}.{key}"] = value
            else:
                numbers[f"{i}.{key}"] = value
    save_file(arrays, folder / OPTIMIZER)
    state = {**state, "optimizer": {"numbers": numbers, "param_groups": kept["param_groups"]}}
    (folder / TRAINER).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def load_training(folder: Path, optimizer: Optimizer) -> dict[str, Any]:
    """Load the optimiser from `folder`; the `state` that `save_training` was given.

    Every file is compared with its checksum, but for the model's, with which `from_pretrained` does
    so. Raises CheckpointError where one is missing, damaged or made for another model.
    """
    with reading(folder):
        check_sums(folder, lambda name: not is_models(name))
    state = read_state(folder)
    entries: dict[int, dict[str, Any]] = {}
    with reading(folder):
        kept = state.pop("optimizer")
        arrays = _read_arrays(folder / OPTIMIZER)
        try:
            for name, value in {**arrays, **kept["numbers"]}.items():
                i, _, key = name.partition(".")
                entries.setdefault(int(i), {})[key] = value
            optimizer.load_state_dict({"state": entries, "param_groups": kept["param_groups"]})
        except ValueError as error:
            raise Damaged(f"{folder / OPTIMIZER} cannot be used: {error}") from error
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """trainer.json; CheckpointError where there is none that can be read."""
    path = folder / TRAINER
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {TRAINER}: training cannot go on from it (a model folder without "
            "one can only generate)"
        )
    with reading(folder):
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise Damaged(f"{path} is damaged ({error})") from error
        if not isinstance(state, dict):
            raise Damaged(f"{path} is damaged (it holds no JSON object)")
        _check_kinds(path, state)
    return state


def _check_kinds(path: Path, state: dict[str, Any]) -> None:
    """Refuse numbers that are none: they would be missed only in the middle of the training."""
    best = state["best"]
    whole = [state["step"], state["tokens"], *([] if best is None else [best["step"]])]
    numbers = [state["elapsed"], *([] if best is None else [best["val_loss"]])]
    if any(type(n) is not int or n < 0 for n in whole):
        raise Damaged(f"{path} is damaged (a count in it is no integer from 0)")
    if any(type(x) not in (int, float) or not math.isfinite(x) for x in numbers):
        raise Damaged(f"{path} is damaged (a time or a loss in it is no number)")


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Within: a part of the checkpoint that is missing, damaged or of the wrong kind is named.

    As a CheckpointError, with what to do. Another ValueError, such as one about a text that has
    changed, says already what is wrong.
    """
    try:
        yield
    except (Damaged, OSError) as error:
        raise unusable(folder, error) from error
    except KeyError as error:
        raise unusable(folder, f"{folder / TRAINER} is damaged (it has no {error})") from error
    except (TypeError, AttributeError, IndexError, OverflowError) as error:
        raise unusable(folder, f"{folder / TRAINER} is damaged ({error})") from error


def unusable(folder: Path, why: object) -> CheckpointError:
    """The error to raise about a checkpoint of a run: what is wrong, and how to go on without it.

    It is not left out silently: the steps since the checkpoint before are lost with it, and
    perhaps there is a copy.
    """
    if isinstance(why, OSError) and why.strerror:
        why = f"{why.filename or folder}: {why.strerror}"
    earlier = [p for p in folder.parent.glob("step-*") if _order(p) < _order(folder)]
    instead = f"go on from {max(earlier, key=_order).name}" if earlier else "begin from the start"
    return CheckpointError(f"{why}; to {instead}, delete the folder {folder}")


def _order(folder: Path) -> tuple[int, str]:
    return len(folder.name), folder.name  # step-1000000 comes after step-999999


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise Damaged(f"{path} is damaged ({error})") from error
