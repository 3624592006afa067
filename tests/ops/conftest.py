"""What the tests of ops share: memory layouts, float dtypes, and how close is equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tinygrad_llm import Tensor

Layout = Callable[[np.ndarray], np.ndarray]

# Relative, and absolute where values are near 1: a few roundings of each dtype.
PRECISION = {"float64": 1e-13, "float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}


def _strided(a: np.ndarray) -> np.ndarray:
    wide = np.zeros([2 * n for n in a.shape], dtype=a.dtype)
    view = wide[(..., *[slice(None, None, 2)] * a.ndim)]
    view[...] = a
    return view


def _reversed(a: np.ndarray) -> np.ndarray:
    backwards = (slice(None, None, -1),) * a.ndim
    return a[(..., *backwards)].copy()[(..., *backwards)]


def _repeated(a: np.ndarray) -> np.ndarray:
    """The first of a's rows, repeated with stride 0: other values, the same shape."""
    return np.broadcast_to(a[:1], a.shape) if a.ndim else np.broadcast_to(a, ())


LAYOUTS: dict[str, Layout] = {
    "contiguous": lambda a: a,
    "transposed": lambda a: a.T.copy().T,
    "strided": _strided,
    "reversed": _reversed,
    "stride 0": _repeated,
}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    """A function that gives an array another layout in memory."""
    return LAYOUTS[request.param]


@pytest.fixture(params=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> np.dtype:
    return np.dtype(request.param)


@pytest.fixture(params=["float16", "bfloat16"])
def half(request: pytest.FixtureRequest) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if request.param == "bfloat16" else np.float16)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def close() -> Callable[..., None]:
    """close(actual, expected, times=1): a Tensor of that shape, equal to its dtype's precision."""

    def check(actual: Any, expected: Any, times: float = 1.0) -> None:
        assert isinstance(actual, Tensor)
        expected = np.asarray(expected)
        assert actual.shape == expected.shape
        got = actual.numpy()
        if not np.issubdtype(expected.dtype, np.inexact) and got.dtype.kind in "biu":
            np.testing.assert_array_equal(got, expected)
            return
        tolerance = times * PRECISION[str(got.dtype)]
        np.testing.assert_allclose(
            got.astype(np.float64), expected.astype(np.float64), rtol=tolerance, atol=tolerance
        )

    return check
