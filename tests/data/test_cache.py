"""The cache: where it is, what happens where it cannot be, and that nobody is in another's way."""

import threading
import time
from pathlib import Path

import pytest

from tinygrad_llm.data import cache
from tinygrad_llm.data.report import SILENT, Silent


class Heard(Silent):
    """Remembers the sentences."""

    def __init__(self):
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.folder() == tmp_path / "home" / ".cache" / "tinygrad-llm"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert cache.folder() == tmp_path / "home" / ".cache" / "tinygrad-llm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg" / "tinygrad-llm"
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "own"))
    assert cache.folder() == tmp_path / "own"


def test_a_cache_that_cannot_be_written_gives_way_to_a_temporary_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file"))
    monkeypatch.setattr(cache, "_temporary_folder", None)
    heard = Heard()
    place = cache.writable("tokens", heard)
    assert place.is_dir()
    assert tmp_path not in place.parents
    assert cache.writable("tokens", heard) == place
    assert "cannot be written (Not a directory)" in heard.said[0]
    assert cache.VARIABLE in heard.said[0]
    monkeypatch.setattr(cache, "_temporary_folder", None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with pytest.raises(OSError, match=r"neither the cache .* nor a temporary folder") as caught:
        cache.writable("tokens", heard)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif("sys.platform == 'win32'", reason="no such locks")
def test_one_waits_for_the_other(tmp_path):
    heard, order = Heard(), []

    def second() -> None:
        with cache.alone(tmp_path / "lock", heard, "counting") as is_alone:
            order.append(("second", is_alone))

    with cache.alone(tmp_path / "lock", SILENT, "counting") as is_alone:
        assert is_alone
        thread = threading.Thread(target=second)
        thread.start()
        while not heard.said:
            time.sleep(0.01)
        order.append(("first", is_alone))
    thread.join()
    assert order == [("first", True), ("second", True)]
    assert heard.said == ["another process is counting: waiting for it"]
