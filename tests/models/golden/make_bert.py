"""Make bert.safetensors: small BERTs of `transformers` with random weights, and what they compute.

    python tests/models/golden/make_bert.py        (needs torch and transformers)

Tensors are named CLASS/weights/NAME, CLASS/inputs/NAME, CLASS/logits/N, CLASS/loss and
CLASS/gradients/NAME; `config` in the metadata is theirs.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

torch: Any = import_module("torch")
transformers: Any = import_module("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,  # such that no part of the network is nearly linear
    "num_labels": 2,
}
CLASSES = (
    *("BertForPreTraining", "BertForSequenceClassification", "BertForTokenClassification"),
    "BertForQuestionAnswering",
)
GRADIENTS = (  # of these, by the end of the name: one of each kind
    *("word_embeddings.weight", "position_embeddings.weight", "embeddings.LayerNorm.weight"),
    *("0.attention.self.query.weight", "1.attention.self.value.bias"),
    *("1.intermediate.dense.weight", "1.output.LayerNorm.bias", "pooler.dense.weight"),
    *("predictions.bias", "transform.dense.weight", "seq_relationship.weight"),
    *("classifier.weight", "qa_outputs.bias"),
)
FILE = Path(__file__).with_name("bert.safetensors")


def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Three texts of 9 tokens, of which the last two are shorter, in two segments."""
    lengths = np.array([9, 6, 4])
    mask = (np.arange(9) < lengths[:, None]).astype(np.int64)
    return {
        "input_ids": rng.integers(1, SIZES["vocab_size"], (3, 9)) * mask,
        "attention_mask": mask,
        "token_type_ids": (np.arange(9) > 3).astype(np.int64)[None] * mask,
    }


def labels(name: str, rng: np.random.Generator, mask: np.ndarray) -> dict[str, np.ndarray]:
    """What the head is to say, under the names of its arguments."""
    if name == "BertForPreTraining":
        words = rng.integers(0, SIZES["vocab_size"], (3, 9))
        hidden = (rng.random((3, 9)) < 0.4) & (mask == 1)
        hidden[:, 1] = True
        return {
            "labels": np.where(hidden, words, -100),
            "next_sentence_label": np.array([0, 1, 1]),
        }
    if name == "BertForSequenceClassification":
        return {"labels": np.array([1, 0, 1])}
    if name == "BertForTokenClassification":
        return {"labels": np.where(mask == 1, rng.integers(0, 2, (3, 9)), -100)}
    return {"start_positions": np.array([2, 0, 3]), "end_positions": np.array([5, 4, 3])}


def computed(name: str) -> dict[str, np.ndarray]:
    """One model with its weights, what goes in and what comes out."""
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    model = getattr(transformers, name)(transformers.BertConfig(**SIZES)).eval()
    with torch.no_grad():  # biases and gains that are not just 0 and 1
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        model.bert.embeddings.word_embeddings.weight[0] = 0.0
    given = inputs(rng)
    given |= labels(name, rng, given["attention_mask"])
    output = model(**{key: torch.from_numpy(value) for key, value in given.items()})
    output.loss.backward()
    logits = [value for key, value in output.items() if key.endswith("logits")]
    found = {"loss": output.loss.detach()}
    found |= {f"logits/{i}": value.detach() for i, value in enumerate(logits)}
    found |= {f"inputs/{key}": torch.from_numpy(value) for key, value in given.items()}
    for key, p in model.named_parameters():
        found[f"weights/{key}"] = p.detach()
        if key.endswith(GRADIENTS):
            found[f"gradients/{key}"] = p.grad
    return {f"{name}/{key}": np.array(v.numpy(), order="C") for key, v in found.items()}


if __name__ == "__main__":
    arrays = {key: value for name in CLASSES for key, value in computed(name).items()}
    save_file(arrays, FILE, {"config": json.dumps({"model_type": "bert", **SIZES})})
    print(f"{FILE.name}: {FILE.stat().st_size:,} bytes, {len(arrays)} arrays")
