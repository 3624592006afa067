"""Tensors in files, files that are whole, and how to know that a folder is as it was saved.

    save_file, load_file        safetensors: names and shapes in a header before plain numbers
    write_file, sync            a file that is there whole or not at all
    write_sums, check_sums      SHA256SUMS: the sha256 of each file in a folder

No pickle: opening a file runs nobody's code.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.tensor import Tensor


class Damaged(ValueError):
    """A file is not what was written there; one sentence for people."""


# --- tensors --------------------------------------------------------------------------------------


def save_file(tensors: Mapping[str, Any], path: str | Path) -> None:
    """Write named Tensors or arrays, such as `model.state_dict()`, to a .safetensors file.

    `transformers` and every other reader of safetensors can open it. Raises OSError where it cannot
    be written, such as on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    arrays = {name: _on_cpu(x.data if isinstance(x, Tensor) else x) for name, x in tensors.items()}
    try:
        save_file(arrays, path, metadata={"format": "pt"})  # "pt" is what `transformers` asks for
    except SafetensorError as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        number = int(code[1]) if code else errno.EIO
        why = os.strerror(number) if code else str(error)
        raise OSError(number, why, str(path)) from error


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
        raise Damaged(f"{path} is damaged or no safetensors file: {error}") from error


def _on_cpu(array: backend.Array) -> np.ndarray:
    # Not ascontiguousarray, which gives a scalar an axis.
    return np.asarray(backend.to_device(array, "cpu"), order="C")


# --- whole or not at all --------------------------------------------------------------------------

UNFINISHED = ".unfinished-"  # what a killed process may leave


def write_file(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill(temporary)` write a file beside `path`; it takes its place whole or not at all.

    Whenever the process or the power stops, `path` is the old file or the new one: what was written
    is on the disk before it is renamed, and a rename is one step for everyone who looks. Raises
    what `fill` raises, and OSError; `path` is then as it was.
    """
    temporary = path.with_name(f"{UNFINISHED}{secrets.token_hex(4)}-{path.name}")
    try:
        fill(temporary)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """fsync of a file or folder: it is there after a power cut, too."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- checksums ------------------------------------------------------------------------------------

SUMS = "SHA256SUMS"

_ITSELF = "of the lines above"  # so that a cut or a flipped bit in SHA256SUMS shows, too


def write_sums(folder: str | Path) -> None:
    """Write SHA256SUMS: a line for each file in `folder`, and one for those lines themselves.

        3f2a…  config.json
        # 90c1… of the lines above        (a comment for the program)

    `sha256sum -c SHA256SUMS` within the folder reads it; `transformers` does not look at it. The
    files are read piece by piece, so a large model costs no memory. Folders inside have their own.
    """
    folder = Path(folder)
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != SUMS)
    (folder / SUMS).write_bytes(_sums_text({name: _sha256(folder / name) for name in names}))


def check_sums(folder: str | Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Compare the files in `folder` whose names are `wanted` with what SHA256SUMS says of them.

    Nothing is compared where there is no SHA256SUMS, as in a folder that another program saved, and
    files that it does not list may be there. Raises Damaged where one is missing or another file
    than it was, and where SHA256SUMS is damaged itself.
    """
    path = Path(folder) / SUMS
    if not path.is_file():
        return
    for name, sum in _read_sums(path).items():
        file = path.with_name(name)
        if not wanted(name):
            continue
        if not file.is_file():
            raise Damaged(f"{file} is missing, yet {SUMS} lists it")
        if _sha256(file) != sum:
            raise Damaged(
                f"{file} is not as it was saved: its sha256 is another than in {SUMS} beside it "
                f"(if it was changed on purpose, delete that {SUMS})"
            )


def _read_sums(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    found = re.findall(rb"^([0-9a-f]{64})  ([^\n\\/]+)\n", data, re.MULTILINE)
    sums = {os.fsdecode(name): sum.decode() for sum, name in found}
    if _sums_text(sums) != data:
        raise Damaged(
            f"{path} is damaged: it is not the list of checksums that was saved (to use the folder "
            "unchecked, delete it)"
        )
    return sums


def _sums_text(sums: Mapping[str, str]) -> bytes:
    lines = b"".join(b"%s  %s\n" % (sum.encode(), os.fsencode(n)) for n, sum in sums.items())
    return lines + f"# {hashlib.sha256(lines).hexdigest()} {_ITSELF}\n".encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
