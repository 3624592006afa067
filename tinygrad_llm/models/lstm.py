"""LSTM models: what a text said so far is in a state of fixed size, carried from token to token.

    x = dropout(embedding[ids])
    h, state = LSTM(x, state)                n_layer layers, one on top of the other
    logits = W dropout(h) + b                LSTMLanguageModel: scores for the next token
    logits = W dropout(pool h) + b           LSTMForSequenceClassification: scores for a label

A transformer looks at all tokens before; this has read them once and keeps 2 · n_layer vectors of
them. So a text may be of any length, a further token costs the same wherever it stands, and in
training the steps come one after the other.

Mikolov et al., "Recurrent neural network based language model", 2010; dropout between the layers
only: Zaremba et al., "Recurrent neural network regularization", 2014; the tied output layer: Press
and Wolf, "Using the output embedding to improve language models", 2017.

Dimensions: B batch, T time, E = n_embd, H = n_hidden, V = vocab_size, N = num_labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from tinygrad_llm import backend, ops
from tinygrad_llm.models import checks
from tinygrad_llm.models.padding import visible
from tinygrad_llm.models.pretrained import PretrainedModel
from tinygrad_llm.nn import LSTM, Dropout, Embedding, Linear, Module, Parameter, init
from tinygrad_llm.nn.losses import head_cross_entropy
from tinygrad_llm.nn.recurrent import State
from tinygrad_llm.ops.convert import as_array
from tinygrad_llm.tensor import Tensor

MODEL_TYPE = "tinygrad-llm-lstm"

Pooling = Literal["max", "mean"]


@dataclass(frozen=True)
class LSTMConfig:
    """The sizes and options of an LSTM; ValueError for what makes no network.

    An LSTM has no longest text. `n_positions` is how many tokens it is trained on at a time, and
    what `generate` and `evaluate` read at once.
    """

    vocab_size: int = 50257  # V
    n_positions: int = 256
    n_embd: int = 512  # E
    n_hidden: int = 512  # H, in each direction
    n_layer: int = 2
    dropout: float = 0.0  # of the embeddings, between the layers and of what comes out
    tie_word_embeddings: bool = True  # the output layer is the token embedding again: E = H
    initializer_range: float = 0.1  # of the embeddings, uniform
    bos_token_id: int | None = None  # not used by the network; kept for the folder
    eos_token_id: int | None = None
    bidirectional: bool = False  # for labels; a language model must not see what follows
    pooling: Pooling = "max"  # of a text's states, for its label
    compare: bool = False  # whether a label is for two texts, which are pooled each for itself
    num_labels: int = 2  # N
    id2label: Mapping[int, str] | None = None  # None: LABEL_0, LABEL_1 …

    def __post_init__(self) -> None:
        if self.id2label is not None:
            names = {int(i): str(name) for i, name in self.id2label.items()}
            object.__setattr__(self, "id2label", names)
            if sorted(names) != list(range(self.num_labels)):
                raise ValueError(
                    f"id2label must name the labels 0 to {self.num_labels - 1} once each, got "
                    f"{checks.short(names)}"
                )
        sizes = {name: getattr(self, name) for name in _SIZES}
        checks.check_sizes(**sizes)
        checks.check_total(self.num_parameters(), **sizes)
        checks.check_number("dropout", self.dropout, 0.0, 1.0)
        checks.check_number("initializer_range", self.initializer_range)
        checks.check_choice("tie_word_embeddings", self.tie_word_embeddings, (True, False))
        checks.check_choice("bidirectional", self.bidirectional, (True, False))
        checks.check_choice("pooling", self.pooling, ("max", "mean"))
        checks.check_choice("compare", self.compare, (True, False))
        for name in ("bos_token_id", "eos_token_id"):
            checks.check_token_id(name, getattr(self, name))

    @property
    def labels(self) -> dict[int, str]:
        """The name of each label: `id2label`, or LABEL_0, LABEL_1 …"""
        if self.id2label is not None:
            return dict(self.id2label)
        return {i: f"LABEL_{i}" for i in range(self.num_labels)}

    def num_parameters(self) -> int:
        """V E + Σ over layers and directions of 4 H (I + H + 2), I = E and then D H: no head."""
        directions = 2 if self.bidirectional else 1
        total, inputs = self.vocab_size * self.n_embd, self.n_embd
        for _ in range(self.n_layer):
            total += directions * 4 * self.n_hidden * (inputs + self.n_hidden + 2)
            inputs = directions * self.n_hidden
        return total

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> LSTMConfig:
        """The config that the object in a config.json describes; ValueError for another kind."""
        model_type = config.get("model_type", MODEL_TYPE)
        if model_type != MODEL_TYPE:
            raise ValueError(
                f"model_type must be {MODEL_TYPE!r} for an LSTM, got {checks.short(model_type)}"
            )
        names = {field.name for field in fields(cls)}
        known = {key: value for key, value in config.items() if key in names}
        if known.get("id2label") is not None:
            known["num_labels"] = len(known["id2label"])
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """The object for config.json."""
        names = {str(i): name for i, name in self.labels.items()}
        return {"model_type": MODEL_TYPE, **asdict(self), "id2label": names}


_SIZES = ("vocab_size", "n_positions", "n_embd", "n_hidden", "n_layer", "num_labels")


class StateCache:
    """The state after the tokens read so far, and how many they were: what `generate` carries on.

    It is for `no_grad`, in place of a transformer's keys and values, and never grows.
    """

    def __init__(self) -> None:
        self.state: State | None = None  # (h, c), each (n_layer, B, H)
        self.length = 0  # tokens read

    def clear(self) -> None:
        """Forget all of it: the next token is the first."""
        self.state, self.length = None, 0

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these of the B texts, in this order; one may be there several times."""
        if self.state is not None:
            h, c = (Tensor(part.data[:, list(rows)]) for part in self.state)
            self.state = h, c


class LSTMNetwork(Module):
    """Token ids (B, T) -> what is known after each token (B, T, D·H), and the last state"""

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        self.embedding = Embedding(config.vocab_size, config.n_embd)
        self.drop = Dropout(config.dropout)
        self.lstm = LSTM(
            config.n_embd,
            config.n_hidden,
            config.n_layer,
            batch_first=True,
            dropout=config.dropout if config.n_layer > 1 else 0.0,
            bidirectional=config.bidirectional,
        )

    def forward(
        self, input_ids: Any, state: State | None = None, lengths: Any = None
    ) -> tuple[Tensor, State]:
        ids = ops.as_tensor(input_ids)
        if ids.ndim != 2:
            raise ValueError(f"an LSTM takes input_ids of shape (B, T), got {ids.shape}")
        x, last = self.lstm(self.drop(self.embedding(ids)), state, lengths)
        return self.drop(x), last


class _OnNetwork(PretrainedModel):
    """A network with a head on top; subclasses make the head in `_make_head`."""

    config_class = LSTMConfig
    base = "network"
    config: LSTMConfig

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__(config)
        with init.skip_init():  # every weight is drawn once, by reset_parameters
            self.network = LSTMNetwork(config)
            self._make_head(config)
        self.reset_parameters()

    def _make_head(self, config: LSTMConfig) -> None:
        raise NotImplementedError

    def init_parameter(self, name: str, parameter: Parameter) -> None:
        """Embeddings ± initializer_range; the LSTM ±1/√H, forget gates +1; biases 0.

        A head that scores tokens is as the embeddings, one that labels n features ±1/√n.

        What a forget gate begins with decides how long things are remembered at first: Jozefowicz
        et al., "An empirical exploration of recurrent network architectures", 2015.
        """
        hidden = self.config.n_hidden
        if ".lstm.weight" in name:
            init.uniform_(parameter, -(hidden**-0.5), hidden**-0.5)
        elif parameter.ndim == 1:
            init.zeros_(parameter)
            if ".lstm.bias_ih" in name:  # the gates are i, f, g, o
                init.ones_(parameter.detach()[hidden : 2 * hidden])
        else:
            labels = name.startswith("classifier.")
            most = parameter.shape[1] ** -0.5 if labels else self.config.initializer_range
            init.uniform_(parameter, -most, most)

    def flops_per_token(self, context: int) -> int:
        """6 N: floating-point operations of a training step, for each token, whatever the context

        N counts the matrices of the LSTM and of the head; see `GPT.flops_per_token`.
        """
        matrices = sum(p.size for p in self.network.lstm.parameters() if p.ndim == 2)
        return 6 * (matrices + self._head_size())

    def _head_size(self) -> int:
        """Weights of the head that each token is multiplied with."""
        return 0


class LSTMLanguageModel(_OnNetwork):
    """logits (B, T, V): at each position, scores for the token that follows

    `model(input_ids)`; the probabilities of the next token are softmax(logits[b, t]) and depend on
    input_ids[b, 0 … t] only, and on what a `StateCache` has read before.
    """

    architecture = "LSTMLanguageModel"

    def __init__(self, config: LSTMConfig) -> None:
        if config.bidirectional:
            raise ValueError(
                "a language model cannot be bidirectional: it would see the token that it predicts"
            )
        if config.tie_word_embeddings and config.n_embd != config.n_hidden:
            raise ValueError(
                "tie_word_embeddings needs n_embd = n_hidden, got "
                f"{config.n_embd} and {config.n_hidden}: make them equal, or do not tie"
            )
        super().__init__(config)

    def _make_head(self, config: LSTMConfig) -> None:
        self.lm_head = Linear(config.n_hidden, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.network.embedding.weight

    def forward(self, input_ids: Any, cache: StateCache | None = None) -> Tensor:
        """logits (B, T, V) for input_ids (B, T), integers from 0 to V − 1.

        With a cache input_ids are the tokens after those that it has read, and are read into it.
        """
        return self.lm_head(self._states(input_ids, cache))

    def next_logits(self, input_ids: Any, cache: StateCache | None = None) -> Tensor:
        """logits (B, V) for the token after input_ids: forward's last, the others not computed."""
        return self.lm_head(self._states(input_ids, cache)[:, -1])

    def loss(self, input_ids: Any, targets: Any, ignore_index: int = -100) -> Tensor:
        """−mean ln p(targets[b, t] | input_ids[b, 0 … t]), a scalar, in nats

        targets (B, T) are the tokens that follow; those equal to `ignore_index` do not count.
        """
        x = self._states(input_ids, None)  # (B, T, H)
        labels = ops.as_tensor(targets)
        if labels.shape != x.shape[:2]:
            raise ValueError(
                f"targets must have the shape of input_ids {x.shape[:2]}, got {labels.shape}"
            )
        return head_cross_entropy(self.lm_head, x, labels, ignore_index)

    def new_cache(self) -> StateCache:
        """An empty cache for this model."""
        return StateCache()

    def _states(self, input_ids: Any, cache: StateCache | None) -> Tensor:
        x, state = self.network(input_ids, None if cache is None else cache.state)
        if cache is not None:
            if x.requires_grad:
                raise ValueError("a StateCache has no gradients: call the model within no_grad()")
            cache.state = state
            cache.length += x.shape[1]
        return x

    def _head_size(self) -> int:
        return self.lm_head.weight.size


class LSTMForSequenceClassification(_OnNetwork):
    """logits (B, N) = W dropout(pool h) + b: scores of the labels for the whole text

    `pooling` says how the states of a text become one: the largest value of each feature, or the
    mean, over its real tokens. With `compare` the two texts of a pair, token_type_ids 0 and 1,
    become u and v, and what is looked at is [u, v, |u − v|, u ⊙ v], where what both have in common
    is there to be seen. Conneau et al., EMNLP 2017 (InferSent).
    """

    architecture = "LSTMForSequenceClassification"

    def _make_head(self, config: LSTMConfig) -> None:
        features = config.n_hidden * (2 if config.bidirectional else 1)
        features *= 4 if config.compare else 1
        self.classifier = Linear(features, config.num_labels)

    def forward(
        self, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None
    ) -> Tensor:
        """logits (B, N)

        Args:
            input_ids: (B, T) integers from 0 to V − 1
            attention_mask: (B, T), 1 for a token and then 0 for what fills up; None: all are tokens
            token_type_ids: (B, T), 0 in the first text and 1 in the second, with `compare`; else
                not needed: the mark between two texts is read like any token
        """
        ids = ops.as_tensor(input_ids)
        seen = visible(attention_mask, ids)
        if seen.mask is not None:
            raise ValueError(
                "an LSTM reads texts from their first token: in attention_mask all 1 must come "
                "before all 0"
            )
        x, _ = self.network(ids, None, seen.lengths)  # (B, T, D·H)
        if self.config.compare:
            return self.classifier(self._compared(x, seen.lengths, token_type_ids))
        return self.classifier(pooled(x, _first(seen.lengths, x), self.config.pooling))

    def _compared(self, x: Tensor, lengths: Any, token_type_ids: Any) -> Tensor:
        """[u, v, |u − v|, u ⊙ v], (B, 4 D·H)"""
        if token_type_ids is None:
            raise ValueError("to compare two texts, token_type_ids must say which is which")
        types, real = as_array(token_type_ids, x.data), _first(lengths, x)
        parts = ((types == text) if real is None else (types == text) & real for text in (0, 1))
        u, v = (pooled(x, part, self.config.pooling) for part in parts)
        return ops.concatenate([u, v, ops.abs(u - v), u * v], axis=1)

    def loss(
        self,
        input_ids: Any,
        labels: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        weight: Any = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """−mean ln softmax(logits)[label], a scalar, in nats

        labels (B,) integers, −100 for those that do not count; weight (N,), how much each counts.
        """
        logits = self(input_ids, attention_mask, token_type_ids)
        wide = backend.promote(logits.dtype, backend.float32)  # in half precision it loses digits
        return ops.cross_entropy(
            logits, labels, weight, label_smoothing=label_smoothing, dtype=wide
        )


def _first(lengths: Any, x: Tensor) -> Any:
    """(B, T) booleans: whether token t of text b is among its first lengths[b]; None for all."""
    if lengths is None:
        return None
    counts = ops.as_tensor(lengths).to(x.device).data
    return ops.arange(x.shape[1], device=x.device).data < counts[:, None]


def pooled(x: Tensor, real: Any, how: Pooling) -> Tensor:
    """(B, C): the largest or the mean of x[b, t] over the t where real[b, t], for x (B, T, C)

    real (B, T) booleans, None for all T; a text of which nothing is real gives zeros.
    """
    if real is None:
        return ops.max(x, axis=1) if how == "max" else ops.mean(x, axis=1)
    counts = real.sum(axis=1, keepdims=True)
    if how == "mean":
        shares = 1.0 / counts.clip(1).astype(x.dtype)
        return ops.where(real[:, :, None], x, 0.0).sum(axis=1) * shares
    largest = ops.max(ops.where(real[:, :, None], x, -1e30), axis=1)
    return ops.where(counts > 0, largest, 0.0)
