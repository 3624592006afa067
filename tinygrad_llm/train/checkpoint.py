"""A checkpoint: a Hugging Face model folder, and beside it what training needs to go on.

    config.json, model.safetensors    the model (`transformers` opens the folder as it is)
    tokenizer.json                    text ↔ token ids
    optimizer.safetensors             the optimiser's arrays
    trainer.json                      everything else: step, position in the data, random state …
    ema/                              a model folder with the average of the weights, where kept

No pickle: opening a checkpoint runs nobody's code. `train.files.write_folder` puts the folder in
place whole or not at all; here is what goes in and comes out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.optim import Optimizer
from tinygrad_llm.storage import save_file

TRAINER, OPTIMIZER, AVERAGE = "trainer.json", "optimizer.safetensors", "ema"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, in one sentence for people."""


def save_training(folder: Path, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Write optimizer.safetensors and trainer.json; `state` is JSON, floats to the last bit.

    The optimiser's arrays are named 'parameter number.key', as in '3.exp_avg'; what is not an
    array, such as Adam's step count, stands in trainer.json.
    """
    kept = optimizer.state_dict()
    arrays: dict[str, backend.Array] = {}
    numbers: dict[str, Any] = {}
    for i, entries in kept["state"].items():
        for key, value in entries.items():
            if backend.is_array(value):
                arrays[f"{i}.{key}"] = value
            else:
                numbers[f"{i}.{key}"] = value
    save_file(arrays, folder / OPTIMIZER)
    state = {**state, "optimizer": {"numbers": numbers, "param_groups": kept["param_groups"]}}
    (folder / TRAINER).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def load_training(folder: Path, optimizer: Optimizer) -> dict[str, Any]:
    """Load the optimiser from `folder`; the `state` that `save_training` was given.

    Raises CheckpointError where a file is missing, damaged or made for another model.
    """
    state = read_state(folder)
    entries: dict[int, dict[str, Any]] = {}
    try:
        kept = state.pop("optimizer")
        for name, value in {**_read_arrays(folder / OPTIMIZER), **kept["numbers"]}.items():
            i, _, key = name.partition(".")
            entries.setdefault(int(i), {})[key] = value
        optimizer.load_state_dict({"state": entries, "param_groups": kept["param_groups"]})
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(_damaged(folder / TRAINER, error)) from error
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """trainer.json; CheckpointError where there is none that can be read."""
    try:
        state = json.loads((folder / TRAINER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {TRAINER}: training cannot go on from it (a model folder without "
            "one can only generate)"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(_damaged(folder / TRAINER, error)) from error
    if not isinstance(state, dict):
        raise CheckpointError(_damaged(folder / TRAINER, "it holds no JSON object"))
    return state


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Within: a part of trainer's state that is missing or of the wrong kind is a CheckpointError.

    A ValueError, such as one about another text, says already what is wrong.
    """
    try:
        yield
    except KeyError as error:
        raise CheckpointError(_damaged(folder / TRAINER, f"it has no {error}")) from error
    except (TypeError, AttributeError) as error:
        raise CheckpointError(_damaged(folder / TRAINER, error)) from error


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(_damaged(path, error)) from error


def _damaged(path: Path, why: object) -> str:
    return (
        f"{path} is damaged ({why}): delete the folder {path.parent} to go on from the checkpoint "
        "before it"
    )
