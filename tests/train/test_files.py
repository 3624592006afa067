"""Files and folders that are there whole or not at all."""

import os

import pytest

from tinygrad_llm.train import files


def test_write_text_replaces_at_once(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def fails(*_):
        raise OSError("power cut")

    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="power cut"):
            files.write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]
    files.write_text(path, "new")
    assert path.read_text() == "new"


def test_write_folder_is_whole_or_absent(tmp_path):
    target = tmp_path / "step-1"

    def half(folder):
        (folder / "a").write_text("1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_folder(target, half)
    assert os.listdir(tmp_path) == []

    files.write_folder(target, lambda folder: (folder / "a").write_text("1"))
    assert (target / "a").read_text() == "1"
    with pytest.raises(FileExistsError):
        files.write_folder(target, half)
    assert (target / "a").read_text() == "1"


def test_everything_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, replace = files.sync, os.replace
    monkeypatch.setattr(files, "sync", lambda p: (events.append(p.name), fsync(p)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))

    def fill(folder):
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("1")
        (folder / "b").write_text("2")

    files.write_folder(tmp_path / "out", fill)
    at = events.index("rename")
    assert {"a", "b", "inner", ".unfinished-out"} == set(events[:at])
    assert events[at + 1 :] == [tmp_path.name]


def test_leftovers_of_a_killed_write_are_removed_by_the_next(tmp_path):
    left = tmp_path / ".unfinished-step-1"
    left.mkdir()
    (left / "half").write_text("x")
    files.write_folder(tmp_path / "step-2", lambda folder: (folder / "a").write_text("1"))
    assert os.listdir(tmp_path) == ["step-2"]


def test_a_folder_is_deleted_at_once(tmp_path, monkeypatch):
    """A kill in the middle of it leaves no half folder under its name."""
    for name in ("step-1", "step-2"):
        files.write_folder(tmp_path / name, lambda folder: (folder / "a").write_text("1"))
    files.remove_folder(tmp_path / "step-1")
    assert os.listdir(tmp_path) == ["step-2"]
    with monkeypatch.context() as killed:
        killed.setattr("shutil.rmtree", lambda *_, **__: None)
        files.remove_folder(tmp_path / "step-2")
    (left,) = tmp_path.iterdir()
    assert files.is_unfinished(left)
    files.write_folder(tmp_path / "step-3", lambda folder: (folder / "a").write_text("1"))
    assert os.listdir(tmp_path) == ["step-3"]


@pytest.mark.parametrize("symlinks", [True, False])
def test_a_pointer_turns_at_once(tmp_path, monkeypatch, symlinks):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    link = tmp_path / "latest"
    assert files.pointed(link) is None
    if not symlinks:

        def refuses(*_, **__):
            raise OSError("no symbolic links here")

        monkeypatch.setattr("pathlib.Path.symlink_to", refuses)
    for name in ("one", "two"):
        files.point(link, name)
        assert files.pointed(link) == tmp_path / name
        assert link.is_symlink() == symlinks
    (tmp_path / "two").rmdir()
    assert files.pointed(link) is None
    assert sorted(os.listdir(tmp_path)) == ["latest", "one"]
