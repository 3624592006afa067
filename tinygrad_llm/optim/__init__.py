"""Optimisers, gradient clipping and learning-rate schedules, with PyTorch's interface.

The formula of each optimiser opens its docstring; `_update` below it is the same in code.
"""

from tinygrad_llm.optim import schedules
from tinygrad_llm.optim.adam import Adam, AdamW
from tinygrad_llm.optim.clip import clip_grad_norm_, clip_grad_value_
from tinygrad_llm.optim.groups import decay_groups, lr_groups
from tinygrad_llm.optim.optimizer import Optimizer
from tinygrad_llm.optim.schedules import (
    WSD,
    Constant,
    Cosine,
    Linear,
    LRScheduler,
    OneCycle,
    StepDecay,
    Warmup,
)
from tinygrad_llm.optim.sgd import SGD

__all__ = [
    "SGD",
    "WSD",
    "Adam",
    "AdamW",
    "Constant",
    "Cosine",
    "LRScheduler",
    "Linear",
    "OneCycle",
    "Optimizer",
    "StepDecay",
    "Warmup",
    "clip_grad_norm_",
    "clip_grad_value_",
    "decay_groups",
    "lr_groups",
    "schedules",
]
