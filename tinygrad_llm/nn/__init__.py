"""Layers: what holds parameters, under PyTorch's names. One file per family."""

from tinygrad_llm.nn import init
from tinygrad_llm.nn.activations import (
    ACTIVATIONS,
    GELU,
    LogSoftmax,
    ReLU,
    Sigmoid,
    SiLU,
    Softmax,
    Softplus,
    Tanh,
    activation,
)
from tinygrad_llm.nn.attention import MultiHeadAttention
from tinygrad_llm.nn.cache import DecoderCache, KVCache, LayerCache
from tinygrad_llm.nn.containers import ModuleDict, ModuleList, Sequential
from tinygrad_llm.nn.crf import CRF, Constraints, constraints_for
from tinygrad_llm.nn.dropout import Dropout
from tinygrad_llm.nn.embedding import Embedding
from tinygrad_llm.nn.linear import Identity, Linear
from tinygrad_llm.nn.losses import (
    BCELoss,
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    KLDivLoss,
    L1Loss,
    MSELoss,
    SmoothL1Loss,
    head_cross_entropy,
)
from tinygrad_llm.nn.module import LoadResult, Module, Parameter, RemovableHandle
from tinygrad_llm.nn.normalization import LayerNorm, RMSNorm
from tinygrad_llm.nn.quantized import QuantizedLinear, quantize_
from tinygrad_llm.nn.recurrent import LSTM, LSTMCell
from tinygrad_llm.nn.transformer import MLP, TransformerBlock

__all__ = [
    "ACTIVATIONS",
    "CRF",
    "GELU",
    "LSTM",
    "MLP",
    "BCELoss",
    "BCEWithLogitsLoss",
    "Constraints",
    "CrossEntropyLoss",
    "DecoderCache",
    "Dropout",
    "Embedding",
    "Identity",
    "KLDivLoss",
    "KVCache",
    "L1Loss",
    "LSTMCell",
    "LayerCache",
    "LayerNorm",
    "Linear",
    "LoadResult",
    "LogSoftmax",
    "MSELoss",
    "Module",
    "ModuleDict",
    "ModuleList",
    "MultiHeadAttention",
    "Parameter",
    "QuantizedLinear",
    "RMSNorm",
    "ReLU",
    "RemovableHandle",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "SmoothL1Loss",
    "Softmax",
    "Softplus",
    "Tanh",
    "TransformerBlock",
    "activation",
    "constraints_for",
    "head_cross_entropy",
    "init",
    "quantize_",
]
