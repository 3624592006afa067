"""Model folders in Hugging Face's form: config.json beside model.safetensors.

    model.safetensors                    the weights; or, of a large model,
    model-00001-of-00002.safetensors …   shards of them, and
    model.safetensors.index.json         {"weight_map": {name of a tensor: file that holds it}}

What every model's `save_pretrained` and `from_pretrained` share. One kind of file is JSON, the
other is numbers, and no pickle is read: opening a folder runs nobody's code.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tinygrad_llm import backend, storage
from tinygrad_llm.backend import Array
from tinygrad_llm.storage import Damaged, save_file

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")

_Config = TypeVar("_Config")


# --- writing --------------------------------------------------------------------------------------


def save_folder(
    folder: str | Path,
    config: Mapping[str, Any],
    arrays: Mapping[str, Array],
    max_shard_size: int | str = "5GB",
) -> None:
    """Write config.json and the weights, making the folder where there is none.

    Weights larger than `max_shard_size` (bytes, or such as "500MB") go into several files with an
    index. What the folder held before is replaced only when everything new is written to its end.
    """
    folder = Path(folder)
    limit = as_bytes(max_shard_size)
    contents: dict[str, Callable[[Path], object]] = {}
    shards = _shards(arrays, limit)
    for name, part in shards.items():
        contents[name] = partial(save_file, part)
    if len(shards) > 1:
        contents[INDEX] = _text(_index(shards), sort_keys=True)
    contents[CONFIG] = _text(config)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder, contents)


def as_bytes(size: int | str) -> int:
    """500 from 500, 5 · 10⁹ from "5GB", 5 · 2³⁰ from "5GiB"; ValueError for what is no size."""
    match = re.fullmatch(r"(\d+) *([KMGT]?)(i?)B?", str(size).strip(), re.IGNORECASE)
    number = int(match[1]) if match and not isinstance(size, bool) else 0
    if not match or number < 1:
        raise ValueError(f"max_shard_size must be a size such as '5GB' or 10**9, got {size!r}")
    return number * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")


def _shards(arrays: Mapping[str, Array], limit: int) -> dict[str, dict[str, Array]]:
    """{file: {name: array}}, in their order, filled one after the other up to `limit` bytes."""
    parts: list[dict[str, Array]] = [{}]
    room = limit
    for name, array in arrays.items():
        if parts[-1] and array.nbytes > room:
            parts.append({})
            room = limit
        parts[-1][name] = array
        room -= array.nbytes
    if len(parts) == 1:
        return {WEIGHTS: parts[0]}
    n = len(parts)
    return {f"model-{i:05}-of-{n:05}.safetensors": part for i, part in enumerate(parts, 1)}


def _index(shards: Mapping[str, Mapping[str, Array]]) -> dict[str, Any]:
    total = sum(array.nbytes for part in shards.values() for array in part.values())
    weight_map = {name: file for file, part in shards.items() for name in part}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _text(value: Any, **options: Any) -> Callable[[Path], object]:
    text = json.dumps(value, indent=2, **options) + "\n"
    return lambda path: path.write_text(text, encoding="utf-8")


def _replace(folder: Path, contents: Mapping[str, Callable[[Path], object]]) -> None:
    """Write all under other names first, so that a full disk leaves the folder as it was."""
    unfinished = {name: folder / f"{name}.unfinished" for name in contents}
    try:
        for name, path in unfinished.items():
            contents[name](path)
        for path in folder.iterdir():  # old checksums, and weights that are in other files now
            old = path.name in (storage.SUMS, WEIGHTS, INDEX) or _SHARD.fullmatch(path.name)
            if old and path.name not in contents:
                path.unlink()
        for name, path in unfinished.items():
            os.replace(path, folder / name)
    finally:
        for path in unfinished.values():
            path.unlink(missing_ok=True)


# --- reading --------------------------------------------------------------------------------------


def check_folder(folder: str | Path) -> None:
    """Compare the model's files with the checksums beside them, where there are any.

    Those of training, which lie there too in a checkpoint, are not looked at: a model can write
    without them. Raises ValueError where a file is missing or not as it was saved.
    """
    storage.check_sums(folder, is_models)


def is_models(name: str) -> bool:
    """Whether a file belongs to the model, its tokenizer included."""
    start = (CONFIG, WEIGHTS, "model-", "tokenizer", "vocab", "merges", "special_tokens")
    return name.startswith(start)


def check_vocabulary(tokens: int, vocab_size: int) -> None:
    """Raise ValueError where a tokenizer of so many tokens is not for a model of that vocab_size.

    A model may know more ids than the tokenizer gives: some are padded to a round number.
    """
    if tokens > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokens} tokens, but the model's vocab_size is {vocab_size}: it is "
            "the tokenizer of another model"
        )


def read_config(folder: str | Path, make: Callable[[dict[str, Any]], _Config]) -> _Config:
    """make(the object in config.json)

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it holds no JSON object, or `make` refused it; the file is named.
    """
    path = Path(folder) / CONFIG
    try:
        with _as_damage(path):
            return make(_read_object(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} is not a model folder: it has no {CONFIG}") from None


def _read_object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


class Weights:
    """The arrays of a model folder by name; the names and shapes are read at once.

    They are in model.safetensors, or in the shards that its index names. `weights[name]` reads one,
    into memory of its own. A file's header is checked against its length, so the shapes promise no
    more than there is.

    Raises:
        FileNotFoundError: there is neither model.safetensors nor an index, or a shard is missing.
        ValueError: a file is damaged, or the index does not fit the shards.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / WEIGHTS  # what errors name
        self._files: dict[str, Any] = {}  # name of a tensor: the open file that holds it
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        if self.path.exists():
            self._open(self.path)
        elif self.path.with_name(INDEX).exists():
            self.path = self.path.with_name(INDEX)
            self._open_shards()
        else:
            pickled = (self.path.parent / "pytorch_model.bin").exists()
            hint = " (pytorch_model.bin is a pickle and is not opened)" if pickled else ""
            raise FileNotFoundError(f"{folder} is not a model folder: it has no {WEIGHTS}{hint}")

    def _open_shards(self) -> None:
        with _as_damage(self.path):
            weight_map = _read_weight_map(self.path)
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            if not self.path.with_name(shard).is_file():
                raise FileNotFoundError(
                    f"{self.path} names the file {shard}, which is missing beside it"
                )
        for shard in shards:
            listed = {name for name, file in weight_map.items() if file == shard}
            found = self._open(self.path.with_name(shard))
            if lost := sorted(listed - found):
                raise self.damaged(f"it says that {lost[0]} is in {shard}, where it is not")
            if extra := sorted(found - listed):
                raise self.damaged(f"{shard} holds {extra[0]}, of which it says otherwise")

    def _open(self, path: Path) -> set[str]:
        """The names of the tensors in one file, whose shapes and place are kept."""
        from safetensors import safe_open

        with _as_damage(path):
            file = safe_open(path, framework="np")
            names = set(file.keys())
            for name in names:
                header = file.get_slice(name)
                self.shapes[name] = tuple(header.get_shape())
                self.dtypes[name] = _dtype(name, header.get_dtype())
                self._files[name] = file
        return names

    def __getitem__(self, name: str) -> np.ndarray:
        with _as_damage(self.path):
            # A copy: what the library gives may be a view of the file, which others can rewrite.
            return np.array(self._files[name].get_tensor(name), order="C", copy=True)

    def damaged(self, why: object) -> Damaged:
        """The error to raise where the file is not what it should be."""
        return _damaged(self.path, why)


def _dtype(name: str, code: str) -> np.dtype:
    if code not in _DTYPES:
        raise ValueError(f"{name[:80]} has the dtype {code}, expected one of {', '.join(_DTYPES)}")
    return backend.as_dtype(_DTYPES[code])


# What safetensors calls them in a header.
_DTYPES = {
    **{f"F{bits}": f"float{bits}" for bits in (64, 32, 16)},
    "BF16": "bfloat16",
    **{f"I{bits}": f"int{bits}" for bits in (64, 32, 16, 8)},
    **{f"U{bits}": f"uint{bits}" for bits in (64, 32, 16, 8)},
    "BOOL": "bool",
}


def _read_weight_map(path: Path) -> dict[str, str]:
    weight_map = _read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError("it has no weight_map, an object of tensor names and files")
    for name, file in weight_map.items():
        # A name and no path: an index from somewhere must not open files elsewhere.
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            shown = json.dumps(file)[:80]
            raise ValueError(
                f"{name[:80]} is said to be in {shown}, no .safetensors file beside it"
            )
    return weight_map


@contextmanager
def _as_damage(path: Path) -> Iterator[None]:
    """Within: whatever is wrong with the file is a sentence that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, why: object) -> Damaged:
    why = getattr(why, "strerror", None) or why  # an OSError's own text has no end
    return Damaged(f"{path} cannot be used: {why}")
