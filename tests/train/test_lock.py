"""Two processes never share a run folder; a lock dies with its process."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from tinygrad_llm.train import lock
from tinygrad_llm.train.lock import Lock, Locked
from tinygrad_llm.train.run import Run

fcntl = pytest.importorskip("fcntl")

HOLD = """
import sys, time
from pathlib import Path
from tinygrad_llm.train.lock import Lock
lock = Lock(Path(sys.argv[1]))
lock.take()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "lock")], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_process_is_told_who_has_it_until_that_one_is_killed(other, tmp_path):
    mine = Lock(tmp_path / "lock")
    with pytest.raises(Locked, match=rf"is in use by another process \(pid {other.pid}\)") as no:
        mine.take()
    assert "\n" not in str(no.value)
    with pytest.raises(Locked):  # being refused takes nothing away from the holder
        mine.take()
    other.send_signal(signal.SIGKILL)
    other.wait()
    mine.take()
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    mine.release()


def test_a_lock_is_taken_once_and_released(tmp_path):
    one, two = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    one.take()
    one.take()
    with pytest.raises(Locked):
        two.take()
    one.release()
    one.release()
    two.take()
    del two  # a forgotten one lets go, too
    one.take()
    one.release()


@pytest.fixture
def without_locks(monkeypatch):
    """A file system that answers ENOLCK."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_without_locks_of_the_system_the_process_id_counts(other, without_locks, tmp_path):
    mine = Lock(tmp_path / "lock")
    with pytest.raises(Locked, match=str(other.pid)):
        mine.take()
    other.kill()
    other.wait()
    mine.take()
    mine.release()


@pytest.mark.parametrize("left", [b"", b"nonsense", b"9" * 40])
def test_a_file_that_names_no_process_is_no_lock(without_locks, tmp_path, left):
    (tmp_path / "lock").write_bytes(left)
    mine = Lock(tmp_path / "lock")
    mine.take()
    mine.release()


def test_another_error_is_not_taken_for_a_lock(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fails)
    with pytest.raises(OSError, match="Input/output"):
        Lock(tmp_path / "lock").take()


def test_windows_locks_are_asked_for_there(tmp_path, monkeypatch):
    class Windows:
        LK_NBLCK = 2
        busy = False

        def locking(self, descriptor, mode, count):
            if self.busy:
                raise PermissionError

    windows = Windows()
    monkeypatch.setattr(lock.importlib, "import_module", {"msvcrt": windows}.get)
    descriptor = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    assert lock._lock_on_windows(descriptor)
    windows.busy = True
    assert not lock._lock_on_windows(descriptor)
    os.close(descriptor)


def test_a_run_holds_its_folder_from_begin_to_close(tmp_path):
    one = Run.new(tmp_path / "run")
    late = Run.new(tmp_path / "run")  # looked before the first had begun
    one.begin("x = 1\n")
    with pytest.raises(Locked):
        late.begin("x = 2\n")
    one.append({"step": 1})
    one.forget_after(0)
    with pytest.raises(Locked):
        Run.open(tmp_path / "run").hold()
    one.close()
    with pytest.raises(FileExistsError, match="holds a run already"):
        late.begin("x = 2\n")
    assert one.config_file.read_text() == "x = 1\n"
    again = Run.open(tmp_path / "run")
    again.hold()
    again.begin("x = 3\n")
    again.close()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch, code):
    open_ = os.open

    def refuses(path, flags, *rest):
        if flags & os.O_CREAT:
            raise OSError(code, os.strerror(code), str(path))
        return open_(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuses)
    with pytest.raises(OSError, match=rf"cannot write into .*run \({os.strerror(code)}\)"):
        Run.new(tmp_path / "run").begin("x = 1\n")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write into .*Not a directory"):
        Run.new(tmp_path / "file" / "run").begin("x = 1\n")
