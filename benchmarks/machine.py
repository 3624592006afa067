"""What a result was measured on."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import numpy as np

import tinygrad_llm as tg


def environment() -> dict[str, str]:
    found = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "tinygrad_llm": tg.__version__,
        "cpu": cpu_name(),
        "system": platform.platform(terse=True),
    }
    if "torch" in sys.modules:
        found["torch"] = sys.modules["torch"].__version__
    return found


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return platform.processor()
