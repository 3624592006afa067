"""Where kernels run in this process: on the GPU, or in Triton's interpreter on the CPU.

The choice is made once, before Triton is first imported: at that moment Triton's own library
(`tl.sum`, `tl.zeros` …) becomes either something to compile or plain Python. This file imports no
Triton, so that `doctor` can say what would happen at no cost.
"""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import os
from typing import NamedTuple

VARIABLE = "TINYGRAD_LLM_KERNELS"


class Mode(NamedTuple):
    """`name`, 'gpu' or 'interpret', and in words why."""

    name: str
    why: str


def choose() -> Mode:
    """The mode that kernels get in this process, from the first that decides.

    1. TINYGRAD_LLM_KERNELS=gpu or =interpret: that. (=auto, or unset, goes on.)
    2. TRITON_INTERPRET, Triton's own variable, where it is set.
    3. Whether an NVIDIA GPU is visible: a device file, not hidden by CUDA_VISIBLE_DEVICES. The CUDA
       library is not asked: a process that has asked it cannot be forked any more.

    'gpu' without a GPU is allowed: kernels can then be compiled, not launched.
    """
    wanted = os.environ.get(VARIABLE, "auto").strip().lower() or "auto"
    if wanted not in ("gpu", "interpret", "auto"):
        raise ValueError(f"{VARIABLE} is 'gpu', 'interpret' or 'auto', got {wanted!r}")
    if wanted != "auto":
        return Mode(wanted, f"{VARIABLE}={wanted}")
    tritons = os.environ.get("TRITON_INTERPRET", "").strip().lower()
    if tritons:
        on = tritons in ("1", "true", "on", "y", "yes")
        return Mode("interpret" if on else "gpu", f"TRITON_INTERPRET={tritons}")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Mode("interpret", "CUDA_VISIBLE_DEVICES hides every GPU")
    if glob.glob("/dev/nvidia[0-9]*") or os.path.exists("/dev/dxg"):  # dxg: Windows' Linux
        return Mode("gpu", "an NVIDIA GPU is visible")
    return Mode("interpret", "no NVIDIA GPU is visible (there is no /dev/nvidia0)")


def describe() -> str:
    """One line for `doctor`: the mode, why, and which Triton."""
    if importlib.util.find_spec("triton") is None:
        return "none: Triton is not installed (pip install 'tinygrad-llm[cuda13]' on a GPU machine)"
    name, why = choose()
    where = "on the GPU" if name == "gpu" else "in Triton's interpreter, on the CPU, for tests only"
    return f"Triton {importlib.metadata.version('triton')} {where}: {why}"
