"""The cache: a folder for what can be made or fetched again.

$TINYGRAD_LLM_CACHE, else $XDG_CACHE_HOME/tinygrad-llm, else ~/.cache/tinygrad-llm
    downloads/   texts from the network
    texts/       the SHA-256 of large texts, by the names, sizes and times of their files
    tokens/      their token ids

Nothing in it is needed: delete what you like, when nothing runs.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import importlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tinygrad_llm.data.report import SILENT, Report

VARIABLE = "TINYGRAD_LLM_CACHE"


def folder() -> Path:
    """Where the cache is, whether or not it is there."""
    if own := os.environ.get(VARIABLE):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    # The specification of XDG has a relative path ignored.
    base = Path(shared) if shared and Path(shared).is_absolute() else _home() / ".cache"
    return base / "tinygrad-llm"


def writable(name: str, report: Report = SILENT) -> Path:
    """The folder `name` of the cache, made if need be; a temporary one where that is impossible.

    The temporary folder is deleted when the process ends, and `report` is told. Raises OSError with
    one sentence where there is no place for one either.
    """
    wanted = folder() / name
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=wanted).close()  # a folder's mode does not tell all
    except OSError as error:
        place = _temporary(error) / name
        place.mkdir(exist_ok=True)
        report.say(
            f"the cache {wanted} cannot be written ({error.strerror}), so {place} is used and "
            f"deleted at the end: set {VARIABLE} to a folder of your own to keep it"
        )
        return place
    return wanted


@contextlib.contextmanager
def alone(path: Path, report: Report, what: str) -> Iterator[bool]:
    """Within: no other process is, for the same `path`; waits until the others are done.

    The system holds the lock while the process lives, so a kill leaves none behind. False where the
    file system has no locks (an old NFS, Windows): then nobody is alone for sure.
    """
    if os.name == "nt":
        yield False
        return
    fcntl = importlib.import_module("fcntl")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        waiting = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    report.say(f"another process is {what}: waiting for it")
                waiting = True
                time.sleep(0.1)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                yield False
                return
        yield True
    finally:
        os.close(descriptor)


_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # no $HOME, and no entry for the user: some containers
        return Path(os.sep)


_temporary_folder: Path | None = None  # one for the process


def _temporary(why: OSError) -> Path:
    global _temporary_folder
    if _temporary_folder is None:
        try:
            _temporary_folder = Path(tempfile.mkdtemp(prefix="tinygrad-llm-"))
        except OSError as error:
            raise OSError(
                f"neither the cache {folder()} ({why.strerror}) nor a temporary folder "
                f"({error.strerror}) can be written: set {VARIABLE} to a folder with space"
            ) from error
        atexit.register(shutil.rmtree, _temporary_folder, ignore_errors=True)
    return _temporary_folder
