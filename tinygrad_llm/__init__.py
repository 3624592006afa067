"""tinygrad_llm: a neural-network engine for language models, from scratch, without PyTorch.

`Tensor` records what is computed on NumPy or CuPy arrays; `backward()` walks it back. Importing
this needs NumPy and ml_dtypes, nothing else.
"""

from tinygrad_llm import ops
from tinygrad_llm.autograd import (
    Function,
    enable_grad,
    grad,
    is_grad_enabled,
    no_grad,
)
from tinygrad_llm.backend import (
    bfloat16,
    bool_,
    default_dtype,
    float16,
    float32,
    float64,
    int8,
    int16,
    int32,
    int64,
    manual_seed,
    set_default_dtype,
    uint8,
)
from tinygrad_llm.checkpointing import checkpoint
from tinygrad_llm.dispatch import use_kernels
from tinygrad_llm.gradcheck import gradcheck
from tinygrad_llm.ops import arange, eye, full, ones, rand, randint, randn, zeros
from tinygrad_llm.storage import load_file, save_file
from tinygrad_llm.tensor import Tensor, from_dlpack
from tinygrad_llm.watch import detect_anomaly

__version__ = "0.1.0"

__all__ = [
    "Function",
    "Tensor",
    "__version__",
    "arange",
    "bfloat16",
    "bool_",
    "checkpoint",
    "default_dtype",
    "detect_anomaly",
    "enable_grad",
    "eye",
    "float16",
    "float32",
    "float64",
    "from_dlpack",
    "full",
    "grad",
    "gradcheck",
    "int8",
    "int16",
    "int32",
    "int64",
    "is_grad_enabled",
    "load_file",
    "manual_seed",
    "no_grad",
    "ones",
    "ops",
    "rand",
    "randint",
    "randn",
    "save_file",
    "set_default_dtype",
    "uint8",
    "use_kernels",
    "zeros",
]
