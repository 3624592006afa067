"""A lock on a run folder: two processes in one would write over each other's checkpoints.

The system holds it for as long as the process lives, however it ends, so that a kill leaves no
lock behind: the file stays, but nobody holds it.
"""

from __future__ import annotations

import errno
import importlib
import os
from pathlib import Path

# What a file system without locks answers, such as an old NFS.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class Locked(OSError):
    """Another process works in the folder; one sentence for people."""


class Lock:
    """`take()` the lock on a file, `release()` it; the end of the process releases it, too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def take(self) -> None:
        """Hold the lock; nothing where this object holds it already. Raises Locked."""
        if self._descriptor is not None:
            return
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _lock(descriptor):
                holder = os.read(descriptor, 100).decode(errors="replace").strip()
                raise Locked(
                    f"{self.path.parent} is in use by another process (pid {holder or 'unknown'}): "
                    "wait until it ends, or name another folder"
                )
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def release(self) -> None:
        """Let go of it. The file stays: deleting it would let two processes lock two files."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.release()


def _lock(descriptor: int) -> bool:
    """Whether this process now holds the file: flock, Windows' own, or the process id in it."""
    if os.name == "nt":
        return _lock_on_windows(descriptor)
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return not _is_alive(os.pread(descriptor, 100, 0))
    return True


def _lock_on_windows(descriptor: int) -> bool:
    windows = importlib.import_module("msvcrt")
    os.lseek(descriptor, 1 << 20, os.SEEK_SET)  # beyond the process id, which others may read
    try:
        windows.locking(descriptor, windows.LK_NBLCK, 1)
    except OSError:
        return False
    finally:
        os.lseek(descriptor, 0, os.SEEK_SET)
    return True


def _is_alive(holder: bytes) -> bool:
    """Whether the process whose id is in the file runs, as far as this machine can tell.

    Only where the file system has no locks: two that start in the same instant both get in.
    """
    try:
        os.kill(int(holder), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:  # another user's
        return True
    return int(holder) != os.getpid()
