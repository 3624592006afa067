"""Every op on CuPy's arrays is what it is on NumPy's; they are those of tests/fake_cupy.py.

The reference formulas run there, for the kernels are in the interpreter, which takes NumPy's only.
What this finds is an array of the host among those of the GPU, and a function that CuPy lacks.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from tinygrad_llm import Tensor, backend, ops
from tinygrad_llm.ops.convert import ToDevice
from tinygrad_llm.ops.embedding import AddRows
from tinygrad_llm.ops.samples import Sample, samples

# The samples of AddRows bring ids from the host, and those of ToDevice leave the GPU.
OPS = {op: found for op, found in samples().items() if op not in (AddRows, ToDevice)}
ALL = {f"{op.__name__}: {s.note}": s for op, found in OPS.items() for s in found}


def run(sample: Sample, device: str) -> list[np.ndarray]:
    """The output and the gradients, on the CPU again."""
    leaves = [Tensor(a.astype(np.float32)).to(device).detach() for a in sample.arrays]
    y = sample.function(*[leaf.requires_grad_() for leaf in leaves])
    assert y.device.partition(":")[0] == device
    if y.requires_grad:
        y.backward(Tensor(np.random.default_rng(0).normal(size=y.shape), y.dtype).to(device))
    found = [y.detach(), *[leaf.grad for leaf in leaves if leaf.grad is not None]]
    return [backend.to_device(t.data, "cpu") for t in found]


@pytest.mark.parametrize("name", ALL)
def test_an_op_on_cupys_arrays(name: str, fake_cupy: ModuleType) -> None:
    for got, expected in zip(run(ALL[name], "cuda"), run(ALL[name], "cpu"), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(8, None, True), (4, 16, True), (4, 32, False)]
)
def test_weights_are_quantized_where_they_are(bits, group, symmetric, fake_cupy) -> None:
    w = np.random.default_rng(0).normal(size=(5, 37)).astype(np.float32)
    found = ops.quantize(Tensor(w).to("cuda"), bits, group, symmetric)
    expected = ops.quantize(w, bits, group, symmetric)
    for got, wanted in zip(found, expected, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None and wanted is not None:
            assert got.device != "cpu"
            np.testing.assert_array_equal(got.to("cpu").numpy(), wanted.numpy())
    back = ops.dequantize(*found, columns=37, group_size=group)
    np.testing.assert_array_equal(
        back.to("cpu").numpy(), ops.dequantize(*expected, columns=37, group_size=group).numpy()
    )
