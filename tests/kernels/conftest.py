"""What the tests of kernels share: arrays where the kernels run, memory layouts, tolerances.

The same tests run in Triton's interpreter on NumPy arrays and, where a GPU is, on it with CuPy's.
Importing `language` here chooses which, before anything else imports Triton in this process.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tinygrad_llm import backend
from tinygrad_llm.backend import Array, namespace

if importlib.util.find_spec("triton") is None:  # Triton has no wheels but for Linux
    collect_ignore_glob = ["test_*.py"]
    INTERPRETED = True
else:
    from tinygrad_llm.kernels.language import INTERPRETED

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

# Relative, and absolute where values are near 1: a few roundings of each dtype.
PRECISION = {"float32": 3e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


def _strided(a: Array) -> Array:
    wide = namespace(a).zeros([2 * n for n in a.shape], dtype=a.dtype)
    view = wide[(..., *[slice(None, None, 2)] * a.ndim)]
    view[...] = a
    return view


def _offset(a: Array) -> Array:
    """Somewhere inside of a larger array, not even at an address that 16 divides."""
    larger = namespace(a).full([n + 3 for n in a.shape], 99, dtype=a.dtype)
    view = larger[(..., *[slice(1, n + 1) for n in a.shape])]
    view[...] = a
    return view


def _reversed(a: Array) -> Array:
    backwards = (slice(None, None, -1),) * a.ndim
    return a[(..., *backwards)].copy()[(..., *backwards)]


def _repeated(a: Array) -> Array:
    """The first of a's rows, repeated with stride 0: other values, the same shape."""
    return namespace(a).broadcast_to(a[:1], a.shape)


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "contiguous": lambda a: a,
    "transposed": lambda a: a.T.copy().T,
    "strided": _strided,
    "offset": _offset,
    "reversed": _reversed,
    "stride 0": _repeated,
}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Callable[[Array], Array]:
    """A function that gives an array (of `array`) another layout in memory."""
    return LAYOUTS[request.param]


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> np.dtype:
    """float32, float16, bfloat16: what every kernel takes."""
    return np.dtype(DTYPES[request.param])


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def array() -> Callable[..., Array]:
    """array(values, dtype=None): them where the kernels run, in the CPU's memory or the GPU's."""

    def make(values: Any, dtype: Any = None) -> Array:
        values = np.asarray(values, dtype=dtype)
        return values if INTERPRETED else backend.to_device(values, "cuda")

    return make


@pytest.fixture(scope="session")
def wide() -> Callable[[Array], np.ndarray]:
    """wide(x): x as float64 in NumPy, for the reference."""

    def convert(x: Array) -> np.ndarray:
        return backend.to_device(x, "cpu").astype(np.float64)

    return convert


@pytest.fixture(scope="session")
def close(wide: Callable[[Array], np.ndarray]) -> Callable[..., None]:
    """close(actual, expected, times=1): equal to the precision of actual's dtype, and its shape."""

    def check(actual: Array, expected: np.ndarray, times: float = 1.0) -> None:
        assert actual.shape == expected.shape
        tolerance = times * PRECISION[str(actual.dtype)]
        np.testing.assert_allclose(wide(actual), expected, rtol=tolerance, atol=tolerance)

    return check
