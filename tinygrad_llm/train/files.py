"""Files and folders that are there whole or not at all, whenever the process or the power stops.

Write beside the target under a temporary name, fsync, rename: a rename is one step for everyone
who looks, and only what was fsynced before it is sure to be there after a power cut.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from tinygrad_llm.storage import UNFINISHED, sync, write_file


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` at once: a reader sees the old content or the new, never a part."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill(temporary)` write a folder beside `path`, then rename it to `path`.

    Whatever goes wrong on the way, `path` is not there. Raises FileExistsError where it is already:
    a rename does not replace a folder.
    """
    if path.exists():
        raise FileExistsError(f"{path} is there already; delete it or write elsewhere")
    temporary = _beside(path)
    remove_unfinished(path.parent)
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        for folder, _, names in os.walk(temporary):
            for name in names:
                sync(Path(folder, name))
            sync(Path(folder))
        os.replace(temporary, path)
    finally:
        remove_unfinished(path.parent)
    sync(path.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder that others may look for by its name: there whole, then not at all."""
    temporary = _beside(path)
    os.replace(path, temporary)
    shutil.rmtree(temporary, ignore_errors=True)  # what stays is cleaned up by the next write


def remove_unfinished(folder: Path) -> None:
    """Delete what a write that did not come to its end left in `folder`."""
    for left in folder.glob(f"{UNFINISHED}*"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def is_unfinished(path: Path) -> bool:
    """Whether this is something that a write which did not come to its end left behind."""
    return path.name.startswith(UNFINISHED)


def point(link: Path, target: str) -> None:
    """Make `link` name its neighbour `target`, at once.

    A symbolic link, so that every program can open it as the folder; where the file system has
    none, a text file with the name. `pointed` reads both.
    """
    temporary = _beside(link)
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(target, target_is_directory=True)
    except OSError:
        temporary.write_text(f"{target}\n", encoding="utf-8")
        sync(temporary)
    os.replace(temporary, link)
    sync(link.parent)


def pointed(link: Path) -> Path | None:
    """The folder that `link` names, or None where it names none that exists."""
    if link.is_file():
        with link.open("rb") as file:
            name = file.read(256).strip()  # any file may be given: do not read a book
        if not re.fullmatch(rb"[\w.-]+", name):
            return None
        link = link.parent / name.decode("ascii")
    return link.resolve() if link.is_dir() else None


def _beside(path: Path) -> Path:
    return path.with_name(f"{UNFINISHED}{path.name}")
