"""At which rate each layer of a checkpoint learns: what lies deeper knows more, and moves less.

Howard and Ruder, "Universal language model fine-tuning for text classification", ACL 2018.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tinygrad_llm.finetune.config import FinetuneConfig
from tinygrad_llm.models.gpt import GPT
from tinygrad_llm.models.llama import Llama
from tinygrad_llm.models.lstm import LSTMLanguageModel

ENCODER = "bert"  # what heads stand on; of a language model, nothing is new
LANGUAGE_MODELS = (GPT, Llama, LSTMLanguageModel)


def layer_factors(model: Any, config: FinetuneConfig) -> dict[str, float]:
    """Part of a name → what the rate of its parameters is multiplied with.

    The last layer of a checkpoint has 1, each one below `layer_decay` times as much as the one
    above it, the embeddings as much as a layer below the first; what is new has head_lr / lr.
    """
    train = config.train
    names = [name for name, _ in model.named_parameters()]
    if isinstance(model, LANGUAGE_MODELS):
        return _by_depth(names, train.layer_decay)
    known = [name for name in names if name.startswith(f"{ENCODER}.")]
    new = {name.partition(".")[0] for name in names} - {ENCODER}
    return dict.fromkeys(new, train.head_lr / train.lr) | _by_depth(known, train.layer_decay)


def _by_depth(names: Sequence[str], decay: float) -> dict[str, float]:
    """decay ** (layers above it); the names stand in the order in which the network computes.

    What comes before the first layer is below it, what comes after the last learns as that does:

        wte  wpe    h.0    h.1    ln_f        decay², decay², decay, 1, 1
    """
    depths: dict[str, int] = {}
    for name in names:
        layer = _LAYER.match(name)
        if layer:
            depths[layer[0]] = 1 + int(layer[1] or layer[2])
        elif not any(depths.values()):
            depths[name] = 0
    top = max(depths.values(), default=0)
    return {name: decay ** (top - depth) for name, depth in depths.items()}


# bert.encoder.layer.0, transformer.h.0, model.layers.0; network.lstm.weight_ih_l0
_LAYER = re.compile(r"(?:.*\.)?(?:h|layers?)\.(\d+)(?=\.)|.*_l(\d+)$")
