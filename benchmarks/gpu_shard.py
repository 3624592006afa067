"""A pytest plugin: of all tests collected, run those of one shard, TINYGRAD_LLM_SHARD=2/4 say.

`gpu.py` runs a file of tests in several processes at once with it (`pytest -p gpu_shard`).
"""

from __future__ import annotations

import os
from typing import Any


def pytest_collection_modifyitems(items: list[Any]) -> None:
    index, _, count = os.environ.get("TINYGRAD_LLM_SHARD", "1/1").partition("/")
    items[:] = items[int(index) - 1 :: int(count)]
