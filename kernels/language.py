"""Triton, imported in the mode that `mode.choose()` gave: every kernel file takes it from here.

    from tinygrad_llm.kernels.language import tl, triton

A direct `import triton` would let the order of imports decide where kernels run.
"""

from __future__ import annotations

import os
import sys

from tinygrad_llm.kernels import mode

_MODE = mode.choose()
_EARLIER = "triton" in sys.modules

if not _EARLIER:
    os.environ["TRITON_INTERPRET"] = "1" if _MODE.name == "interpret" else "0"
# Whether a·b + c is rounded once; 3.9 warns where it is left open.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
except ImportError as error:
    raise ImportError(
        "kernels need Triton: pip install 'tinygrad-llm[cuda13]' (or [cuda12]), or on a machine "
        "without a GPU pip install triton"
    ) from error

INTERPRETED = not isinstance(tl.sum, triton.runtime.JITFunction)

if (_MODE.name == "interpret") != INTERPRETED:
    raise RuntimeError(
        f"Triton was imported before tinygrad_llm.kernels and is set up for "
        f"{'its interpreter' if INTERPRETED else 'a GPU'}, but kernels run in mode "
        f"'{_MODE.name}' here ({_MODE.why}): import tinygrad_llm.kernels.language first, or set "
        f"{mode.VARIABLE} to {'interpret' if INTERPRETED else 'gpu'}"
    )

if INTERPRETED:
    # For the kernels that are still to be decorated, where Triton came first.
    os.environ["TRITON_INTERPRET"] = "1"
    from tinygrad_llm.kernels import interpret

    interpret.install()

__all__ = ["INTERPRETED", "libdevice", "tl", "triton"]
