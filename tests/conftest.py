"""Settings that all tests share, and a GPU that none of them needs."""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

# A slow machine is no failure: no test is timed.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture
def fake_cupy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tests/fake_cupy.py in the place of CuPy, for machines that have none."""
    if importlib.util.find_spec("cupy") is not None:
        pytest.skip("CuPy itself is here")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    module = importlib.import_module("fake_cupy")
    module.install(monkeypatch)
    return module
