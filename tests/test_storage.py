"""Saving and loading named tensors, and the checksums of a folder."""

import errno
import hashlib
import os
import pickle
import shutil
import subprocess
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import tinygrad_llm as tg
from tinygrad_llm import Tensor, storage


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.bool_]
)
def test_values_dtypes_and_shapes_come_back(tmp_path: Path, dtype: type) -> None:
    tensors = {
        "matrix": Tensor(np.arange(6).reshape(2, 3).astype(dtype)),
        "transposed": Tensor(np.arange(6).reshape(2, 3).astype(dtype).T),
        "scalar": Tensor(np.array(1).astype(dtype)),
        "empty": Tensor(np.zeros((0, 3)).astype(dtype)),
    }
    tg.save_file(tensors, tmp_path / "t.safetensors")
    found = tg.load_file(tmp_path / "t.safetensors")
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
        assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape)
        np.testing.assert_array_equal(found[name].numpy(), x.numpy())


def test_damaged_missing_and_pickled_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with pytest.raises(FileNotFoundError, match="no file"):
        tg.load_file(path)
    tg.save_file({"a": Tensor(np.zeros(100))}, path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="damaged"):
        tg.load_file(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="no safetensors file"):
        tg.load_file(path)


def test_what_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    """The library's own error is not one, and a full disk is nothing to guess from a text."""
    with pytest.raises(OSError, match=os.strerror(errno.ENOENT)) as caught:
        tg.save_file({"a": Tensor(np.zeros(100))}, tmp_path / "no" / "t.safetensors")
    assert caught.value.errno == errno.ENOENT


# --- checksums ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of three files and one within a folder, with its SHA256SUMS."""
    (tmp_path / "a.json").write_text("{}\n")
    (tmp_path / "b b.bin").write_bytes(bytes(range(256)))
    (tmp_path / "empty").touch()
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "c").write_text("c")
    storage.write_sums(tmp_path)
    return tmp_path


def test_sums_are_those_of_the_files(folder: Path) -> None:
    *lines, itself = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    assert lines == [
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("a.json", "b b.bin", "empty")
    ]
    assert itself == f"# {hashlib.sha256(''.join(lines).encode()).hexdigest()} of the lines above\n"
    storage.check_sums(folder)
    storage.write_sums(folder)  # again: they do not list themselves
    storage.check_sums(folder)


def test_sha256sum_reads_them(folder: Path) -> None:
    program = shutil.which("sha256sum")
    if program is None or "coreutils" not in subprocess.getoutput(f"{program} --version"):
        pytest.skip("needs the sha256sum of GNU coreutils")
    check = [program, "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(check, cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    (folder / "empty").write_text("no")
    assert subprocess.run(check, cwd=folder, capture_output=True).returncode == 1


def test_any_flipped_bit_shows_also_in_the_sums(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a.json", "b b.bin", "SHA256SUMS"):
        whole = (folder / name).read_bytes()
        for bit in rng.permutation(8 * len(whole))[:200]:
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(data)
            with pytest.raises(storage.Damaged) as caught:
                storage.check_sums(folder)
            assert "\n" not in str(caught.value)
        (folder / name).write_bytes(whole)
    storage.check_sums(folder)


def test_any_cut_shows_also_of_the_sums(folder: Path) -> None:
    for name in ("a.json", "b b.bin", "SHA256SUMS"):
        whole = (folder / name).read_bytes()
        for length in range(len(whole)):
            (folder / name).write_bytes(whole[:length])
            with pytest.raises(storage.Damaged, match=name):
                storage.check_sums(folder)
        (folder / name).write_bytes(whole)


def test_only_what_is_wanted_is_looked_at(folder: Path) -> None:
    (folder / "a.json").write_text("[]\n")
    (folder / "empty").unlink()
    (folder / "new").touch()
    storage.check_sums(folder, lambda name: name.startswith("b"))
    with pytest.raises(storage.Damaged, match=r"empty is missing, yet SHA256SUMS lists it"):
        storage.check_sums(folder, lambda name: name == "empty")
    with pytest.raises(storage.Damaged, match=r"a\.json is not as it was saved"):
        storage.check_sums(folder)
    (folder / "SHA256SUMS").unlink()
    storage.check_sums(folder)


def test_a_large_file_is_read_in_pieces(folder: Path) -> None:
    (folder / "large").write_bytes(bytes(20_000_000))
    tracemalloc.start()
    try:
        storage.write_sums(folder)
        storage.check_sums(folder)
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


# --- whole or not at all --------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "file"
    storage.write_file(file, lambda path: path.write_text("old"))

    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        storage.write_file(file, fail)
    assert file.read_text() == "old"
    (tmp_path / "plain").touch()
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode  # as the umask has it
    (tmp_path / "plain").unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
