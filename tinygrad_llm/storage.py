"""Tensors in files: safetensors, a header of names and shapes before plain numbers. No pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.tensor import Tensor


def save_file(tensors: Mapping[str, Any], path: str | Path) -> None:
    """Write named Tensors or arrays, such as `model.state_dict()`, to a .safetensors file.

    `transformers` and every other reader of safetensors can open it.
    """
    from safetensors.numpy import save_file

    arrays = {name: _on_cpu(x.data if isinstance(x, Tensor) else x) for name, x in tensors.items()}
    save_file(arrays, path, metadata={"format": "pt"})  # "pt" is what `transformers` asks for


def load_file(path: str | Path) -> dict[str, Tensor]:
    """The Tensors of a .safetensors file by name, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or no safetensors file (a pickle is never opened).
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return {name: Tensor(array) for name, array in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def _on_cpu(array: backend.Array) -> np.ndarray:
    # Not ascontiguousarray, which gives a scalar an axis.
    return np.asarray(backend.to_device(array, "cpu"), order="C")
