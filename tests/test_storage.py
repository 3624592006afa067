"""Saving and loading named tensors."""

import pickle
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import tinygrad_llm as tg
from tinygrad_llm import Tensor


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
