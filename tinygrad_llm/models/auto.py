"""Whatever a model folder holds: its config.json says which class opens it.

from_pretrained("runs/small/checkpoints/best")       a GPT, BERT, T5 …, as it was saved
from_pretrained("google-bert/bert-base-uncased", architecture="BertForTokenClassification",
                num_labels=9)                        its network, with a head that is new
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from tinygrad_llm.models import checks, hub, pretrained

# model_type in config.json -> architecture there -> "module:class" here. The first architecture is
# taken where config.json names none. Modules are imported when they are needed.
REGISTRY: dict[str, dict[str, str]] = {
    "gpt2": {"GPT2LMHeadModel": "gpt:GPT", "GPT2Model": "gpt:GPT"},
    "bert": {
        name: f"bert:{name}"
        for name in (
            "BertModel",
            "BertForPreTraining",
            "BertForMaskedLM",
            "BertForNextSentencePrediction",
            "BertForSequenceClassification",
            "BertForTokenClassification",
            "BertForQuestionAnswering",
        )
    },
    "llama": {"LlamaForCausalLM": "llama:Llama", "LlamaModel": "llama:Llama"},
    "t5": {"T5ForConditionalGeneration": "t5:T5", "T5Model": "t5:T5"},
    "tinygrad-llm-seq2seq": {"Seq2Seq": "seq2seq:Seq2Seq"},
    "tinygrad-llm-lstm": {
        "LSTMLanguageModel": "lstm:LSTMLanguageModel",
        "LSTMForSequenceClassification": "lstm:LSTMForSequenceClassification",
    },
    "tinygrad-llm-tagger": {"Tagger": "tagger:Tagger"},
    "tinygrad-llm-multitask": {"MultiTask": "multitask:MultiTask"},
}


def from_pretrained(
    folder: str | Path,
    dtype: Any = None,
    *,
    architecture: str | None = None,
    revision: str | None = None,
    **options: Any,
) -> Any:
    """The model in `folder`, or of that name on the Hugging Face hub, after `eval()`.

    Args:
        folder: a path, or a name on the hub (see `hub.find`).
        dtype: of the weights; None: the one that they have in the file.
        architecture: the class, under Hugging Face's name, in place of the one that saved it: such
            as "BertForTokenClassification", to put that head on a BERT.
        revision: of the repository on the hub.
        options: further ones of the class's `from_pretrained`, such as num_labels.

    Raises:
        FileNotFoundError: config.json or model.safetensors is missing, or the hub has no such
            model, or is out of reach.
        ValueError: a file is damaged, or is of a kind of model that is not here.
    """
    found = hub.find(folder, revision)
    return class_of(found, architecture).from_pretrained(found, dtype, **options)


def class_of(folder: str | Path, architecture: str | None = None) -> Any:
    """The class that opens the folder; `architecture` is another of its kind. No weight is read."""
    return pretrained.read_config(folder, partial(_class, architecture))


def _class(architecture: str | None, config: dict[str, Any]) -> Any:
    kind: Any = config.get("model_type")
    checks.check_choice("model_type", kind, REGISTRY)
    classes = REGISTRY[kind]
    name = architecture or _saved_as(config) or next(iter(classes))
    if name not in classes:
        raise ValueError(
            f"{checks.short(name)} is no architecture for the model_type {kind} here: give one of "
            f"{', '.join(classes)} as architecture"
        )
    module, _, found = classes[name].partition(":")
    return getattr(import_module(f"tinygrad_llm.models.{module}"), found)


def _saved_as(config: dict[str, Any]) -> str | None:
    names = config.get("architectures") or [None]
    if not isinstance(names, list) or not isinstance(names[0], str | None):
        raise ValueError(
            f"architectures must be a list of names in config.json, got {checks.short(names)}"
        )
    return names[0]
