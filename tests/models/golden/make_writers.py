"""Make gpt2, llama, t5 … .safetensors: small models of `transformers`, and what they compute.

    python tests/models/golden/make_writers.py        (needs torch and transformers)

A file has one model of random weights. Its tensors are named weights/NAME, inputs/NAME, logits,
loss, gradients/NAME, greedy, beams/N and scores; the metadata tells the model's class and config,
and the token that ended the texts.
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

V = 37  # tokens
LLAMA: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
T5: dict[str, Any] = {
    "vocab_size": V,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
    "dropout_rate": 0.0,
    "initializer_factor": 1.5,
    "decoder_start_token_id": 0,
}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": V,
            "n_positions": 40,
            "n_embd": 24,
            "n_layer": 2,
            "n_head": 4,
            "initializer_range": 0.3,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        },
    ),
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            **LLAMA,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "llama_tied": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            **LLAMA,
            "num_key_value_heads": 1,
            "head_dim": 10,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5_gated": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            **T5,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "num_decoder_layers": 1,
        },
    ),
}
BEAMS = {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 3, "do_sample": False}


def inputs(model: Any, rng: np.random.Generator) -> dict[str, Any]:
    """Three texts of 14 tokens and less, filled up at their ends, and the labels."""
    real = np.arange(14) < np.array([14, 9, 5])[:, None]
    ids = np.where(real, rng.integers(2, V, real.shape), 0)
    labels = np.where(real, ids, -100)
    if model.config.is_encoder_decoder:
        labels = rng.integers(2, V, (3, 6))
        labels[1, 4:] = -100
    given = {"input_ids": ids, "attention_mask": real.astype(np.int64), "labels": labels}
    return {key: torch.from_numpy(value) for key, value in given.items()}


def written(model: Any, source: Any) -> tuple[dict[str, Any], int]:
    """The texts by greedy choice and by beams, cut behind the token that ends them, and that."""
    begin = 1 if model.config.is_encoder_decoder else source.shape[1]
    options = {"attention_mask": torch.ones_like(source), "pad_token_id": 0}
    free = model.generate(source, max_new_tokens=8, do_sample=False, eos_token_id=V + 1, **options)
    eos = int(free[0, begin + 5])

    def cut(ids: Any) -> Any:
        new = ids[begin:].tolist()
        return torch.tensor(new[: new.index(eos) + 1] if eos in new else new)

    options["eos_token_id"] = eos
    greedy = model.generate(source, max_new_tokens=8, do_sample=False, **options)
    found = {"greedy": cut(greedy[0])}
    for name, early in (("beams", "never"), ("early", True)):
        beams = model.generate(
            source,
            **BEAMS,
            **options,
            early_stopping=early,
            return_dict_in_generate=True,
            output_scores=True,
        )
        found |= {f"{name}/{i}": cut(ids) for i, ids in enumerate(beams.sequences)}
        found[f"{name}_scores"] = beams.sequences_scores
    return found, eos


def make(name: str, folder: Path) -> None:
    """One model with its weights, what goes in and what comes out, as a file."""
    kind, config, sizes = CASES[name]
    torch.manual_seed(1)
    model = getattr(transformers, kind)(getattr(transformers, config)(**sizes)).eval()
    with torch.no_grad():  # biases and gains that are not just 0 and 1
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    given = inputs(model, np.random.default_rng(1))
    output = model(**given)
    output.loss.backward()
    found = {"loss": output.loss.detach(), "logits": output.logits.detach()}
    found |= {f"inputs/{key}": value for key, value in given.items()}
    for key, p in model.named_parameters():
        found[f"weights/{key}"], found[f"gradients/{key}"] = p.detach(), p.grad
    texts, eos = written(model, given["input_ids"][:1])
    arrays = {key: np.array(v.numpy(), order="C") for key, v in (found | texts).items()}
    saved = model.config.to_dict()
    metadata = {"class": kind, "config_class": config, "config": json.dumps(saved), "eos": str(eos)}
    file = folder / f"{name}.safetensors"
    save_file(arrays, file, metadata)
    print(f"{file.name}: {file.stat().st_size:,} bytes, {len(arrays)} arrays, ended by {eos}")


if __name__ == "__main__":
    for case in CASES:
        make(case, Path(__file__).parent)
