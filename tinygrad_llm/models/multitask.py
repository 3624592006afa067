"""One encoder, several heads: what is learnt for one task is there for the others.

    heads["reviews"]    BertForSequenceClassification ─┐
    heads["pairs"]      BertForSequenceClassification ─┼─ bert, one BertModel for all of them
    heads["names"]      Tagger                        ─┘

A head is a model of its own kind whose `bert` is the shared network itself, not a copy. So whoever
can train, score or ask such a model can do it with `model.heads["reviews"]`, and a step for one
task moves the encoder of all. The weights of the encoder are parameters once, and once in a file:
`bert.…` beside `heads.reviews.…`.

Caruana, "Multitask learning", 1997; Liu et al., "Multi-task deep neural networks for natural
language understanding", ACL 2019.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from tinygrad_llm import backend
from tinygrad_llm.models import checks
from tinygrad_llm.models.bert import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from tinygrad_llm.models.pretrained import PretrainedModel
from tinygrad_llm.models.tagger import Tagger, TaggerConfig
from tinygrad_llm.nn import ModuleDict, Parameter, init

MODEL_TYPE = "tinygrad-llm-multitask"

HEADS: dict[str, Any] = {
    kind.architecture: kind
    for kind in (
        BertForSequenceClassification,
        BertForTokenClassification,
        BertForQuestionAnswering,
        Tagger,
    )
}


@dataclass(frozen=True)
class Head:
    """A head: its class, by the name in `HEADS`, and the config of that class.

    The encoder in the config is the shared one; of its own are labels and what stands above.
    """

    architecture: str
    config: BertConfig | TaggerConfig

    def __post_init__(self) -> None:
        checks.check_choice("architecture", self.architecture, HEADS)
        wanted = HEADS[self.architecture].config_class
        if type(self.config) is not wanted:
            raise ValueError(
                f"a {self.architecture} has a {wanted.__name__}, got a {type(self.config).__name__}"
            )

    @property
    def bert(self) -> BertConfig | None:
        """The config of the encoder that it stands on."""
        return self.config if isinstance(self.config, BertConfig) else self.config.bert


@dataclass(frozen=True)
class MultiTaskConfig:
    """The encoder's config, and the heads by name.

    A name is of letters, digits, '_' and '-'. What a BertConfig says of a head, such as labels, is
    left out of the encoder's. ValueError for a head on another encoder.
    """

    bert: BertConfig
    heads: Mapping[str, Head]

    def __post_init__(self) -> None:
        object.__setattr__(self, "bert", encoder_of(self.bert))
        if not self.heads:
            raise ValueError("expected at least one head, got none")
        for name, head in self.heads.items():
            check_name(name)
            if head.bert is None or encoder_of(head.bert) != self.bert:
                raise ValueError(
                    f"head {name!r} stands on another encoder than the shared one: make its config "
                    "from that of the encoder"
                )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> MultiTaskConfig:
        """The config that the object in a config.json describes; ValueError for another kind."""
        model_type = config.get("model_type", MODEL_TYPE)
        if model_type != MODEL_TYPE:
            raise ValueError(
                f"model_type must be {MODEL_TYPE!r} for several heads, got "
                f"{checks.short(model_type)}"
            )
        bert, heads = config.get("bert"), config.get("heads")
        if not isinstance(bert, Mapping) or not isinstance(heads, Mapping):
            raise ValueError("bert and heads must be objects")
        return cls(
            BertConfig.from_dict(bert),
            {name: _head_from(name, found, bert) for name, found in heads.items()},
        )

    def to_dict(self) -> dict[str, Any]:
        """The object for config.json: of each head what is not the encoder's."""
        bert = self.bert.to_dict()
        heads: dict[str, Any] = {}
        for name, head in self.heads.items():
            own = head.config.to_dict()
            if isinstance(head.config, TaggerConfig):
                del own["bert"]
            else:
                own = {k: v for k, v in own.items() if k not in bert or v != bert[k]}
            heads[name] = {"architecture": head.architecture, "config": own}
        return {"model_type": MODEL_TYPE, "bert": bert, "heads": heads}


def check_name(name: str) -> None:
    """Raise ValueError for what cannot be the name of a head, and of its weights."""
    if not re.fullmatch(r"[\w-]+", name, re.ASCII):
        raise ValueError(
            f"the name of a task must be of letters, digits, '_' and '-', got {checks.short(name)}"
        )
    if hasattr(ModuleDict, name):
        raise ValueError(f"{name!r} cannot be the name of a task: take another, such as {name}_1")


def encoder_of(config: BertConfig) -> BertConfig:
    """The config with the defaults for all that is a head's."""
    return replace(config, **_OF_HEADS)


_OF_HEADS: dict[str, Any] = {
    "num_labels": 2,
    "id2label": None,
    "problem_type": None,
    "classifier_dropout": None,
    "classifier_pooling": "cls",
}


def _head_from(name: str, found: Any, bert: Mapping[str, Any]) -> Head:
    if not isinstance(found, Mapping) or not isinstance(found.get("config"), Mapping):
        raise ValueError(f"head {checks.short(name)} must be an object with architecture, config")
    architecture, own = found.get("architecture"), found["config"]
    checks.check_choice(f"architecture of head {name!r}", architecture, HEADS)
    kind = HEADS[str(architecture)].config_class
    whole = {**own, "bert": bert} if kind is TaggerConfig else {**bert, **own}
    return Head(str(architecture), kind.from_dict(whole))


class MultiTask(PretrainedModel):
    """One `BertModel`, `bert`, and models with heads on it, `heads`, a ModuleDict.

    `MultiTask(config)` begins at random; `MultiTask.from_checkpoint(folder, config)` puts the heads
    on a BERT. `tasks.multi` trains it; `head(name)` takes one model out.
    """

    config_class = MultiTaskConfig
    architecture = "MultiTask"
    base = "bert"
    optional = BertModel.optional
    obsolete = BertModel.obsolete
    config: MultiTaskConfig

    def __init__(self, config: MultiTaskConfig) -> None:
        super().__init__(config)
        with init.skip_init():  # every weight is drawn once, by reset_parameters
            heads = {
                name: HEADS[head.architecture](head.config) for name, head in config.heads.items()
            }
            pooled = any(head.bert.pooler is not None for head in heads.values())
            self.bert = BertModel(config.bert, add_pooling_layer=pooled)
        for head in heads.values():
            head.bert = self.bert  # in place of the one that it made, which held no numbers
        self.heads = ModuleDict(heads)
        self.reset_parameters()

    def forward(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """What the head of that name says: heads[name](…)"""
        return self.heads[name](*args, **kwargs)

    def init_parameter(self, name: str, parameter: Parameter) -> None:
        """As the encoder and the head's own class begin."""
        part, _, rest = name.partition(".")
        if part == "bert":
            self.bert.init_parameter(rest, parameter)
        else:
            head, _, rest = rest.partition(".")
            self.heads[head].init_parameter(rest, parameter)

    @classmethod
    def from_checkpoint(cls, folder: str | Path, config: MultiTaskConfig) -> Self:
        """New heads on the BERT in `folder`, or of that hub name.

        `config.bert` is its config; only the rates of dropout may be others. A pooler that the
        checkpoint lacks is new, too. Raises as `BertModel.from_pretrained`, and ValueError where
        the config is another one.
        """
        rates = ("hidden_dropout_prob", "attention_probs_dropout_prob")
        changes: dict[str, Any] = {rate: getattr(config.bert, rate) for rate in rates}
        encoder, _ = BertModel.load(folder, np.float32, **changes)
        if encoder_of(encoder.config) != config.bert:
            raise ValueError(
                f"config.bert is not the config of the BERT in {folder}: take that one"
            )
        model = cls(config)
        own = model.bert.state_dict()
        model.bert.load_state_dict(
            {name: t for name, t in encoder.state_dict().items() if name in own}
        )
        return model

    def head(self, name: str) -> Any:
        """The head of that name as a model of its own, with a copy of the encoder.

        What it saves is an ordinary folder of its class: `transformers` opens that of a
        BertForSequenceClassification. ValueError, with the names, where there is none.
        """
        if name not in self.heads:
            raise ValueError(
                f"there is no head {name!r}; there are {', '.join(map(repr, self.heads))}"
            )
        shared = self.heads[name]
        with init.placeholders():
            alone = type(shared)(shared.config)
        wanted, there = alone.state_dict(), shared.state_dict()
        alone.load_state_dict(  # without the pooler where this head looks at none
            {
                key: backend.namespace(t.data).array(t.data)
                for key, t in there.items()
                if key in wanted
            },
            assign=True,
        )
        return alone.train(self.training)
