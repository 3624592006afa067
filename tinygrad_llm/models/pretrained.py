"""Model folders in Hugging Face's form: config.json beside model.safetensors.

What every model's `save_pretrained` and `from_pretrained` share. One file is JSON, the other is
numbers, and no pickle is read: opening a folder runs nobody's code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tinygrad_llm.backend import Array
from tinygrad_llm.storage import save_file

CONFIG, WEIGHTS = "config.json", "model.safetensors"

_Config = TypeVar("_Config")


def save_folder(folder: str | Path, config: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """Write config.json and model.safetensors, making the folder where there is none.

    Each file takes the place of an older one only when it is written to its end.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2) + "\n"
    _replace(folder / WEIGHTS, lambda path: save_file(arrays, path))
    _replace(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_config(folder: str | Path, make: Callable[[dict[str, Any]], _Config]) -> _Config:
    """make(the object in config.json)

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it holds no JSON object, or `make` refused it; the file is named.
    """
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("expected a JSON object")
        return make(config)
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} is not a model folder: it has no {CONFIG}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


class Weights:
    """The arrays in model.safetensors by name; the names and shapes are read at once.

    `weights[name]` reads one, into memory of its own. The file's header is checked against its
    length, so the shapes promise no more than there is.

    Raises:
        FileNotFoundError: there is no model.safetensors.
        ValueError: it is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = Path(folder) / WEIGHTS
        if not self.path.exists():
            pickled = (self.path.parent / "pytorch_model.bin").exists()
            hint = " (pytorch_model.bin is a pickle and is not opened)" if pickled else ""
            raise FileNotFoundError(f"{folder} is not a model folder: it has no {WEIGHTS}{hint}")
        try:
            self._file = safe_open(self.path, framework="np")
            names = self._file.keys()
            self.shapes: dict[str, tuple[int, ...]] = {
                name: tuple(self._file.get_slice(name).get_shape()) for name in names
            }
        except (OSError, SafetensorError) as error:
            raise self.damaged(error) from error

    def __getitem__(self, name: str) -> np.ndarray:
        from safetensors import SafetensorError

        try:
            # A copy: what the library gives may be a view of the file, which others can rewrite.
            return np.array(self._file.get_tensor(name), order="C", copy=True)
        except (OSError, SafetensorError, TypeError) as error:
            raise self.damaged(error) from error

    def damaged(self, why: object) -> ValueError:
        """The error to raise where the file is not what it should be."""
        return ValueError(f"{self.path} cannot be used: {why}")
