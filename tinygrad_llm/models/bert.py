"""BERT: a transformer that reads a whole text at once, each word with those on both sides of it.

    x = LayerNorm(word[ids] + position[0 … T−1] + token_type[segments])
    for each of num_hidden_layers layers:
        x = LayerNorm(x + attention(x))       looks at all positions
        x = LayerNorm(x + mlp(x))             works on each position alone
    pooled = tanh(W x[0] + b)                 the first token, [CLS], stands for the text

It learns a language by two guesses: which words were hidden, and whether one text follows another.
What it knows then is put to use by another layer on top, a head:

    BertForPreTraining                both guesses          (B, T, V) and (B, 2)
    BertForMaskedLM                   the hidden words      (B, T, V)
    BertForNextSentencePrediction     the pair              (B, 2)
    BertForSequenceClassification     a label of the text   (B, N)
    BertForTokenClassification        a label per token     (B, T, N)
    BertForQuestionAnswering          where an answer begins and ends     (B, T) twice
    BertModel.sentence_embedding      a vector for the text (B, C)

Devlin et al., "BERT: pre-training of deep bidirectional transformers for language understanding",
NAACL 2019. The names of classes, parameters and options are Hugging Face's: folders go back and
forth between this and `transformers`.

Dimensions: B batch, T time, C = hidden_size, H heads, D = C / H head size, V = vocab_size,
N = num_labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple

from tinygrad_llm import backend, ops
from tinygrad_llm.checkpointing import checkpoint
from tinygrad_llm.models import checks
from tinygrad_llm.models.padding import Visible, visible
from tinygrad_llm.models.pretrained import PretrainedModel
from tinygrad_llm.nn import (
    Dropout,
    Embedding,
    LayerNorm,
    Linear,
    Module,
    ModuleList,
    Parameter,
    activation,
    init,
)
from tinygrad_llm.ops.convert import as_array
from tinygrad_llm.tensor import Tensor

IGNORE_INDEX = -100  # a label that does not count

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]
Pooling = Literal["cls", "mean", "compare"]


@dataclass(frozen=True)
class BertConfig:
    """The sizes and options of a BERT, with Hugging Face's names and defaults (BERT base).

    Labels are numbered 0 … num_labels − 1; `id2label` names them, and says how many there are.
    ValueError for what makes no network.
    """

    vocab_size: int = 30522  # V
    hidden_size: int = 768  # C
    num_hidden_layers: int = 12
    num_attention_heads: int = 12  # H
    intermediate_size: int = 3072  # how wide the middle of the MLP is
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1  # of the embeddings and of what a layer adds,
    attention_probs_dropout_prob: float = 0.1  # of the attention weights,
    classifier_dropout: float | None = None  # before a classifier; None: hidden_dropout_prob
    max_position_embeddings: int = 512  # the longest T
    type_vocab_size: int = 2  # segments: the first text and the second
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0  # its embedding stays 0 and is not trained
    tie_word_embeddings: bool = True  # hidden words are guessed with the word embeddings
    num_labels: int = 2  # N
    id2label: Mapping[int, str] | None = None  # None: LABEL_0, LABEL_1 …
    problem_type: ProblemType | None = None  # of BertForSequenceClassification; None: see its loss
    classifier_pooling: Pooling = "cls"  # what it looks at, see there

    def __post_init__(self) -> None:
        if self.id2label is not None:
            names = _label_names(self.id2label)
            unnamed = names == _default_names(len(names))
            object.__setattr__(self, "id2label", None if unnamed else names)
            if self.num_labels != len(names):
                raise ValueError(
                    f"num_labels is {checks.short(self.num_labels)}, but id2label names "
                    f"{len(names)} labels: give one of the two, or the same number"
                )
        sizes = {name: getattr(self, name) for name in _SIZES}
        checks.check_sizes(**sizes)
        checks.check_total(self.num_parameters(), **sizes)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                "hidden_size must be a multiple of num_attention_heads, got "
                f"{self.hidden_size} and {self.num_attention_heads}"
            )
        checks.check_activation("hidden_act", self.hidden_act)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            if getattr(self, name) is not None or name != "classifier_dropout":
                checks.check_number(name, getattr(self, name), 0.0, 1.0)
        for name in ("initializer_range", "layer_norm_eps"):
            checks.check_number(name, getattr(self, name))
        checks.check_choice("tie_word_embeddings", self.tie_word_embeddings, (True, False))
        checks.check_choice("problem_type", self.problem_type, (None, *_PROBLEMS))
        checks.check_choice("classifier_pooling", self.classifier_pooling, _POOLINGS)
        checks.check_token_id("pad_token_id", self.pad_token_id)
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ValueError(
                f"pad_token_id must be below vocab_size {self.vocab_size}, got {self.pad_token_id}"
            )

    @property
    def label2id(self) -> dict[str, int]:
        """The number of each label."""
        return {name: i for i, name in self.labels.items()}

    @property
    def labels(self) -> dict[int, str]:
        """The name of each label: `id2label`, or LABEL_0, LABEL_1 …"""
        if self.id2label is not None:
            return dict(self.id2label)
        return _default_names(self.num_labels)

    def num_parameters(self) -> int:
        """(V + P + S + 2) C + L (4 C² + 9 C + (2 C + 1) I) + C² + C: how many numbers it learns

        with P positions, S segments, L layers and I = intermediate_size: BertModel, with its
        pooler and without a head.
        """
        c, inner = self.hidden_size, self.intermediate_size
        tables = self.vocab_size + self.max_position_embeddings + self.type_vocab_size + 2
        layer = 4 * c * c + 9 * c + (2 * c + 1) * inner
        return tables * c + self.num_hidden_layers * layer + c * c + c

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> BertConfig:
        """The config that the object in a config.json describes.

        Keys that do not concern the network are ignored. ValueError for another model_type, and
        for an option of Hugging Face's that would make another network than this one.
        """
        model_type = config.get("model_type", "bert")
        if model_type != "bert":
            raise ValueError(
                f"model_type must be 'bert' for a BERT, got {checks.short(model_type)}"
            )
        checks.check_fixed(config, "BERT", _FIXED)
        names = {field.name for field in fields(cls)}
        known = {key: value for key, value in config.items() if key in names}
        if known.get("id2label") is not None:
            known["id2label"] = _label_names(known["id2label"])
            known.setdefault("num_labels", len(known["id2label"]))
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """The object for config.json."""
        config = {"model_type": "bert", **asdict(self), "label2id": self.label2id}
        config["id2label"] = {str(i): name for i, name in self.labels.items()}
        del config["num_labels"]  # is the number of id2label, which `transformers` counts
        if self.classifier_pooling == "cls":  # as everywhere
            del config["classifier_pooling"]
        return config


# Options of Hugging Face's BERT that are not options here.
_FIXED = {
    "is_decoder": False,
    "add_cross_attention": False,
    "position_embedding_type": "absolute",
}

_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "max_position_embeddings", "type_vocab_size", "num_labels"),
)
_POOLINGS = ("cls", "mean", "compare")
_PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


def _default_names(num_labels: int) -> dict[int, str]:
    """What Hugging Face calls labels that nobody has named."""
    return {i: f"LABEL_{i}" for i in range(num_labels)}


def _label_names(id2label: Any) -> dict[int, str]:
    """id2label with its numbers, which JSON writes as text, in their order."""
    wrong = ValueError(
        "id2label must name the labels 0, 1, 2 … once each, such as {0: 'O', 1: 'B-PER'}, got "
        f"{checks.short(id2label)}"
    )
    if not isinstance(id2label, Mapping):
        raise wrong
    try:
        names = {int(i): name for i, name in id2label.items()}
    except (TypeError, ValueError):
        raise wrong from None
    whole = names and sorted(names) == list(range(len(id2label)))
    if not whole or not all(isinstance(name, str) for name in names.values()):
        raise wrong
    if len(set(names.values())) < len(names):
        raise wrong
    return {i: names[i] for i in range(len(names))}


# --- the network ----------------------------------------------------------------------------------


class BertEmbeddings(Module):
    """x = dropout(LayerNorm(word[ids] + position[places] + token_type[segments]))"""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        c = config.hidden_size
        self.word_embeddings = Embedding(config.vocab_size, c, config.pad_token_id)
        self.position_embeddings = Embedding(config.max_position_embeddings, c)
        self.token_type_embeddings = Embedding(config.type_vocab_size, c)
        self.LayerNorm = LayerNorm(c, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, ids: Tensor, segments: Any = None, places: Any = None) -> Tensor:
        x = self.word_embeddings(ids)  # (B, T, C)
        if segments is None:  # all of it is the first text
            x = x + self.token_type_embeddings.weight[0]
        else:
            x = x + self.token_type_embeddings(segments)
        if places is None:
            x = x + self.position_embeddings.weight[: ids.shape[1]]
        else:
            x = x + self.position_embeddings(places)
        return self.dropout(self.LayerNorm(x))


class BertSelfAttention(Module):
    """y = [head₁ … head_H],  headₕ = softmax(Qₕ Kₕᵀ / √D) Vₕ over the tokens that are visible"""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.attention_probs_dropout_prob = config.attention_probs_dropout_prob
        self.query = Linear(config.hidden_size, config.hidden_size)
        self.key = Linear(config.hidden_size, config.hidden_size)
        self.value = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, seen: Visible) -> Tensor:
        y = ops.scaled_dot_product_attention(
            self._heads(self.query(x)),  # (B, H, T, D) each, views
            self._heads(self.key(x)),
            self._heads(self.value(x)),
            attn_mask=seen.mask,
            lengths=seen.lengths,
            dropout_p=self.attention_probs_dropout_prob if self.training else 0.0,
        )
        return y.swapaxes(1, 2).reshape(x.shape)  # (B, H, T, D) -> (B, T, C)

    def _heads(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        h = self.num_attention_heads
        return x.reshape(b, t, h, c // h).swapaxes(1, 2)


class BertOutput(Module):
    """y = LayerNorm(x + dropout(W z + b)): what half a layer found, z, added to what came in"""

    def __init__(self, in_features: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = Linear(in_features, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(x + self.dropout(self.dense(z)))


class BertAttention(Module):
    """x ← LayerNorm(x + W attention(x) + b)"""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertOutput(config.hidden_size, config)

    def forward(self, x: Tensor, seen: Visible) -> Tensor:
        return self.output(self.self(x, seen), x)


class BertIntermediate(Module):
    """z = φ(W x + b), wider than x"""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = activation(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        return self.intermediate_act_fn(self.dense(x))


class BertLayer(Module):
    """x ← LayerNorm(x + attention(x));  x ← LayerNorm(x + mlp(x))"""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config.intermediate_size, config)

    def forward(self, x: Tensor, seen: Visible) -> Tensor:
        x = self.attention(x, seen)
        return self.output(self.intermediate(x), x)


class BertEncoder(Module):
    """The layers, one after the other."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, seen: Visible, states: list[Tensor] | None = None) -> Tensor:
        for layer in self.layer:
            if states is not None:
                states.append(x)
            x = checkpoint(layer, x, seen) if self.gradient_checkpointing else layer(x, seen)
        if states is not None:
            states.append(x)
        return x


class BertPooler(Module):
    """y = tanh(W x[0] + b): the first token stands for the whole text"""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return ops.tanh(self.dense(x[:, 0]))


class BertPreTrained(PretrainedModel):
    """What the network and every network with a head share: first values, folders, memory."""

    config_class = BertConfig
    base = "bert"
    optional = ("pooler.",)  # those who look at single tokens have none
    obsolete = (".position_ids", ".token_type_ids")  # 0, 1, 2 … and zeros
    config: BertConfig

    @property
    def _network(self) -> BertModel:
        return getattr(self, self.base)

    @classmethod
    def own_name(cls, name: str) -> str:
        """TensorFlow's gamma and beta of a LayerNorm are weight and bias."""
        if name.endswith("LayerNorm.gamma"):
            return name.removesuffix("gamma") + "weight"
        return name.removesuffix("beta") + "bias" if name.endswith("LayerNorm.beta") else name

    def init_parameter(self, name: str, parameter: Parameter) -> None:
        """N(0, initializer_range²); biases and the padding's embedding 0, a LayerNorm's gain 1."""
        if name.endswith("bias"):
            init.zeros_(parameter)
        elif parameter.ndim == 1:  # the gain of a LayerNorm
            init.ones_(parameter)
        else:
            init.normal_(parameter, std=self.config.initializer_range)
        if name.endswith("word_embeddings.weight"):
            self._network.embeddings.word_embeddings.zero_padding()

    def gradient_checkpointing_enable(self) -> None:
        """From now on each layer keeps only its input for the backward pass, and runs again there.

        The same loss and gradients to the last bit, dropout included, in less memory and about a
        third more time. See `tinygrad_llm.checkpoint`.
        """
        self._network.encoder.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """From now on keep what backward needs: faster, in more memory."""
        self._network.encoder.gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether the layers are computed again in the backward pass."""
        return self._network.encoder.gradient_checkpointing

    def flops_per_token(self, context: int) -> int:
        """6 N + 12 L T C: floating-point operations of a training step, for each token of its input

        N counts the encoder's matrices, as `GPT.flops_per_token`; what a head does, at some of the
        positions only, is left out.

        Args:
            context: T, tokens in a text of the batch.
        """
        matrices = sum(p.size for p in self._network.encoder.parameters() if p.ndim == 2)
        layers = self.config.num_hidden_layers
        return 6 * matrices + 12 * layers * context * self.config.hidden_size


class BertStates(NamedTuple):
    """What BertModel returns."""

    last_hidden_state: Tensor  # (B, T, C)
    pooler_output: Tensor | None  # (B, C), where there is a pooler
    hidden_states: tuple[Tensor, ...] | None  # the embeddings and each layer's, where asked for


class BertModel(BertPreTrained):
    """Token ids (B, T) -> what the network knows at each position (B, T, C), and of all (B, C)

    Args:
        config: the sizes and options
        add_pooling_layer: whether there is a pooler, which the whole text needs

    What is at a position depends on all tokens that are not padding.
    """

    architecture = "BertModel"

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        with init.skip_init():  # every weight is drawn once, by reset_parameters
            self.embeddings = BertEmbeddings(config)
            self.encoder = BertEncoder(config)
            self.pooler = BertPooler(config) if add_pooling_layer else None
        self.reset_parameters()

    @property
    def _network(self) -> BertModel:
        return self

    def forward(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        output_hidden_states: bool = False,
    ) -> BertStates:
        """The states of all positions, and the pooled one.

        Args:
            input_ids: (B, T) integers from 0 to V − 1, T ≤ max_position_embeddings
            attention_mask: (B, T), 1 for a token and 0 for padding; or (B, T, T), where position i
                looks at j where it is 1; None: all are tokens
            token_type_ids: (B, T): 0 in the first text, 1 in the second; None: 0
            position_ids: (B, T) or (T,); None: 0 … T − 1
            output_hidden_states: also return the embeddings and what each layer made of them

        Raises ValueError for a text that is too long, and for shapes that do not fit.
        """
        ids = ops.as_tensor(input_ids)
        if ids.ndim != 2:
            raise ValueError(f"BERT takes input_ids of shape (B, T), got {ids.shape}")
        if position_ids is None and ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"the input has {ids.shape[1]} tokens, but this BERT sees at most "
                f"max_position_embeddings = {self.config.max_position_embeddings}: cut it"
            )
        _check_shape("token_type_ids", token_type_ids, ids.shape)
        _check_shape("position_ids", position_ids, ids.shape, ids.shape[1:])
        x = self.embeddings(ids, token_type_ids, position_ids)
        states: list[Tensor] | None = [] if output_hidden_states else None
        x = self.encoder(x, _visible(attention_mask, ids), states)
        pooled = None if self.pooler is None else self.pooler(x)
        return BertStates(x, pooled, None if states is None else tuple(states))

    def sentence_embedding(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        normalize: bool = True,
    ) -> Tensor:
        """y = m / ‖m‖,  m = Σₜ aₜ xₜ / Σₜ aₜ: the mean over the tokens, of length 1, (B, C)

        The dot product of two of them is the cosine of their angle, a measure of how alike the
        texts are where the network was trained for that (Reimers and Gurevych, "Sentence-BERT",
        2019). attention_mask is (B, T); with normalize=False it is m.
        """
        mean = self.token_mean(input_ids, attention_mask, token_type_ids)
        if not normalize:
            return mean
        lengths = ops.norm(mean, axis=-1, keepdims=True)
        return mean / ops.clip(lengths, 1e-12, None)

    def token_mean(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
    ) -> Tensor:
        """m = Σₜ aₜ xₜ / Σₜ aₜ, (B, C): the mean over the tokens; attention_mask is (B, T)"""
        x = self(input_ids, attention_mask, token_type_ids, position_ids).last_hidden_state
        if attention_mask is None:
            return ops.mean(x, 1)
        shares = as_array(attention_mask, x.data)
        if shares.shape != x.shape[:2]:
            raise ValueError(f"attention_mask must be {x.shape[:2]}, got {shares.shape}")
        return _weighted_mean(x, shares)


def _visible(attention_mask: Any, ids: Tensor) -> Visible:
    """Which keys each position looks at; (B, T, T) is said for each query apart."""
    if attention_mask is None or ops.as_tensor(attention_mask).ndim == 2:
        return visible(attention_mask, ids)
    given = as_array(attention_mask, ids.data)
    wanted = (*ids.shape, ids.shape[1])
    if given.shape != wanted:
        raise ValueError(
            f"attention_mask must be {ids.shape} or {wanted}, got {tuple(given.shape)}"
        )
    return Visible(mask=(given != 0)[:, None])  # (B, 1, T, T)


def _weighted_mean(x: Tensor, shares: Any) -> Tensor:
    """Σₜ aₜ xₜ / Σₜ aₜ of x (B, T, C) and an array a (B, T): (B, C), 0 where all aₜ are"""
    counts = shares.sum(axis=1, keepdims=True).clip(1)
    weights = Tensor((shares / counts).astype(x.dtype)).unsqueeze(1)  # (B, 1, T)
    return (weights @ x).squeeze(1)


def _check_shape(name: str, value: Any, *shapes: tuple[int, ...]) -> None:
    found = None if value is None else ops.as_tensor(value).shape
    if found is not None and found not in shapes:
        raise ValueError(f"{name} must be {' or '.join(map(str, shapes))}, got {found}")


# --- heads of pretraining -------------------------------------------------------------------------


class BertPredictionHeadTransform(Module):
    """y = LayerNorm(φ(W x + b))"""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.transform_act_fn = activation(config.hidden_act)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(self.transform_act_fn(self.dense(x)))


class BertLMPredictionHead(Module):
    """logits = E transform(x) + b, with E the word embeddings again"""

    def __init__(self, config: BertConfig, words: Embedding) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.bias = Parameter.empty(config.vocab_size)
        self.decoder = Linear(config.hidden_size, config.vocab_size)
        self.decoder.bias = self.bias  # Hugging Face has it under both names
        if config.tie_word_embeddings:
            self.decoder.weight = words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform(x))


class BertHeads(Module):
    """The heads of pretraining, of which a model has one or both."""

    def __init__(self, config: BertConfig, words: Embedding | None, pairs: bool) -> None:
        super().__init__()
        if words is not None:
            self.predictions = BertLMPredictionHead(config, words)
        if pairs:
            self.seq_relationship = Linear(config.hidden_size, 2)


class PreTrainingLogits(NamedTuple):
    """What BertForPreTraining returns."""

    prediction_logits: Tensor  # (B, T, V)
    seq_relationship_logits: Tensor  # (B, 2): follows, does not follow


class PreTrainingLosses(NamedTuple):
    """The two parts of the loss of pretraining, and their sum."""

    loss: Tensor
    masked_lm: Tensor
    next_sentence: Tensor


class _Headed(BertPreTrained):
    """A network `bert` with a head on top; subclasses make the head in `_make_head`."""

    pooled: bool  # whether the head looks at the pooled state

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        with init.skip_init():
            self.bert = BertModel(config, add_pooling_layer=self._pools(config))
            self._make_head(config)
        self.reset_parameters()

    def _make_head(self, config: BertConfig) -> None:
        raise NotImplementedError

    def _pools(self, config: BertConfig) -> bool:
        return self.pooled

    def _states(self, input_ids: Any, *masks: Any) -> Tensor:
        """(B, T, C)"""
        return self.bert(input_ids, *masks).last_hidden_state

    def _pooled(self, input_ids: Any, *masks: Any) -> Tensor:
        """(B, C)"""
        pooled = self.bert(input_ids, *masks).pooler_output
        assert pooled is not None  # `pooled` is True where this is asked
        return pooled


class BertForPreTraining(_Headed):
    """logits (B, T, V) of the hidden words, and (B, 2) of whether one text follows the other"""

    architecture = "BertForPreTraining"
    pooled = True

    def _make_head(self, config: BertConfig) -> None:
        self.cls = BertHeads(config, self.bert.embeddings.word_embeddings, pairs=True)

    def forward(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        positions: Any = None,
    ) -> PreTrainingLogits:
        """The arguments are those of `BertModel.forward`.

        With positions (B, T), booleans, logits of words are computed where they are True only:
        (n, V), in the order of `input_ids[positions]`.
        """
        states = self.bert(input_ids, attention_mask, token_type_ids, position_ids)
        x = states.last_hidden_state
        if positions is not None:
            x = _at(x, as_array(positions, x.data))
        return PreTrainingLogits(
            self.cls.predictions(x), self.cls.seq_relationship(states.pooler_output)
        )

    def loss(
        self,
        input_ids: Any,
        labels: Any,
        next_sentence_label: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
    ) -> Tensor:
        """The sum of both losses, a scalar, in nats; the arguments are those of `losses`."""
        return self.losses(
            input_ids, labels, next_sentence_label, attention_mask, token_type_ids, position_ids
        ).loss

    def losses(
        self,
        input_ids: Any,
        labels: Any,
        next_sentence_label: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
    ) -> PreTrainingLosses:
        """−mean ln p(hidden word) − mean ln p(follows or not), and each of them

        labels (B, T) are the words at the hidden positions and −100 elsewhere, where no logits are
        computed; next_sentence_label (B,) is 0 where the second text follows the first, 1 where it
        is from elsewhere, −100 where it does not count.
        """
        states = self.bert(input_ids, attention_mask, token_type_ids, position_ids)
        words = _masked_lm_loss(self.cls.predictions, states.last_hidden_state, labels)
        follows = self.cls.seq_relationship(states.pooler_output)
        pairs = ops.cross_entropy(follows, next_sentence_label, dtype=_wide(follows))
        return PreTrainingLosses(words + pairs, words, pairs)


class BertForMaskedLM(_Headed):
    """logits (B, T, V): scores for the word that stands, or stood, at each position"""

    architecture = "BertForMaskedLM"
    pooled = False

    def _make_head(self, config: BertConfig) -> None:
        self.cls = BertHeads(config, self.bert.embeddings.word_embeddings, pairs=False)

    def forward(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
    ) -> Tensor:
        """The arguments are those of `BertModel.forward`."""
        x = self._states(input_ids, attention_mask, token_type_ids, position_ids)
        return self.cls.predictions(x)

    def loss(
        self,
        input_ids: Any,
        labels: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
    ) -> Tensor:
        """−mean ln p(labels[b, t]) over those that are not −100, a scalar, in nats"""
        x = self._states(input_ids, attention_mask, token_type_ids, position_ids)
        return _masked_lm_loss(self.cls.predictions, x, labels)


def _masked_lm_loss(head: BertLMPredictionHead, x: Tensor, labels: Any) -> Tensor:
    """The mean over the labels that count; the others, most of them, cost no logits."""
    wanted = as_array(labels, x.data)
    if wanted.shape != x.shape[:2]:
        raise ValueError(f"labels must have input_ids' shape {x.shape[:2]}, got {wanted.shape}")
    counted = wanted != IGNORE_INDEX
    logits = head(_at(x, counted))
    return ops.cross_entropy(logits, Tensor(wanted[counted]), dtype=_wide(logits))


def _wide(logits: Tensor) -> Any:
    """Of a loss: float32 at least, for in half precision it would lose digits, or be infinite."""
    return backend.promote(logits.dtype, backend.float32)


def _at(x: Tensor, positions: Any) -> Tensor:
    """x (B, T, C) where positions (B, T) is True: (n, C)"""
    return x.reshape(-1, x.shape[2])[positions.reshape(-1)]


class BertForNextSentencePrediction(_Headed):
    """logits (B, 2): whether the second text follows the first (0) or not (1)"""

    architecture = "BertForNextSentencePrediction"
    pooled = True

    def _make_head(self, config: BertConfig) -> None:
        self.cls = BertHeads(config, None, pairs=True)

    def forward(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
    ) -> Tensor:
        """The arguments are those of `BertModel.forward`."""
        pooled = self._pooled(input_ids, attention_mask, token_type_ids, position_ids)
        return self.cls.seq_relationship(pooled)

    def loss(
        self,
        input_ids: Any,
        labels: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
    ) -> Tensor:
        """−mean ln p(labels[b]), labels (B,): 0 it follows, 1 it does not, −100 does not count"""
        logits = self(input_ids, attention_mask, token_type_ids, position_ids)
        return ops.cross_entropy(logits, labels, dtype=_wide(logits))


# --- heads of fine-tuning -------------------------------------------------------------------------


def _classifier_dropout(config: BertConfig) -> Dropout:
    p = config.classifier_dropout
    return Dropout(config.hidden_dropout_prob if p is None else p)


class BertForSequenceClassification(_Headed):
    """logits (B, N) = W dropout(pooled) + b: scores of the labels for the whole text

    `classifier_pooling` says what pooled is, where u and v are means over the first and the second
    text (token_type_ids 0 and 1):

        cls        tanh(W x₀ + b)              BERT's own
        mean       mean of all x               as networks for sentence embeddings are trained
        compare    [u, v, |u − v|, u ⊙ v]      pairs: what both have in common is there to be seen

    For a BERT `transformers` knows only the first, and says that its pooler is missing where it
    opens another. compare: Conneau et al., EMNLP 2017 (InferSent).
    """

    architecture = "BertForSequenceClassification"
    pooled = True

    def _pools(self, config: BertConfig) -> bool:
        return config.classifier_pooling == "cls"

    def _make_head(self, config: BertConfig) -> None:
        self.dropout = _classifier_dropout(config)
        compares = config.classifier_pooling == "compare"
        if compares and config.type_vocab_size < 2:
            raise ValueError("a BERT with type_vocab_size 1 cannot tell two texts to compare apart")
        features = 4 if compares else 1
        self.classifier = Linear(features * config.hidden_size, config.num_labels)

    def forward(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
    ) -> Tensor:
        """The arguments are those of `BertModel.forward`."""
        masks = attention_mask, token_type_ids, position_ids
        if self.config.classifier_pooling == "compare":
            pooled = self._compared(input_ids, *masks)
        elif self.config.classifier_pooling == "mean":
            pooled = self.bert.token_mean(input_ids, *masks)
        else:
            pooled = self._pooled(input_ids, *masks)
        return self.classifier(self.dropout(pooled))

    def _compared(self, input_ids: Any, mask: Any, token_type_ids: Any, positions: Any) -> Tensor:
        """[u, v, |u − v|, u ⊙ v], (B, 4 C); a mean over no token is 0"""
        if token_type_ids is None:
            raise ValueError("to compare two texts, token_type_ids must say which is which")
        x = self._states(input_ids, mask, token_type_ids, positions)
        types = as_array(token_type_ids, x.data)
        seen = 1 if mask is None else as_array(mask, x.data)
        u, v = (_weighted_mean(x, seen * (types == text)) for text in (0, 1))
        return ops.concatenate([u, v, ops.abs(u - v), u * v], axis=1)

    def loss(
        self,
        input_ids: Any,
        labels: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        weight: Any = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """How wrong the labels are, a scalar: which loss, `problem_type` says

            regression                     mean (logits − labels)²           labels (B,) or (B, N)
            single_label_classification    −mean ln softmax(logits)[label]   (B,) integers
            multi_label_classification     mean binary cross-entropy         (B, N) of 0 and 1

        Without one it is the first for a single label, the second for integers (B,), and else the
        third. Integer labels of −100 do not count.

        Args:
            weight: (N,), how much each class counts; of several labels each, how much its 1 counts
            label_smoothing: of single labels, see `ops.cross_entropy`
        """
        logits = self(input_ids, attention_mask, token_type_ids, position_ids)
        target = Tensor(as_array(labels, logits.data))
        problem = self.problem_type(target)
        if problem == "single_label_classification":
            return ops.cross_entropy(
                *(logits, target, weight, IGNORE_INDEX),
                label_smoothing=label_smoothing,
                dtype=_wide(logits),
            )
        if label_smoothing or (weight is not None and problem == "regression"):
            raise ValueError(f"weight and label_smoothing are not for {problem}")
        shape = logits.shape[:1] if logits.shape[1] == 1 and target.ndim == 1 else logits.shape
        if target.shape != shape:
            raise ValueError(f"labels of {problem} must be {shape}, got {target.shape}")
        logits = logits.astype(_wide(logits))
        target = target.reshape(logits.shape).astype(logits.dtype)
        if problem == "regression":
            return ops.mse_loss(logits, target)
        return ops.binary_cross_entropy_with_logits(logits, target, pos_weight=weight)

    def problem_type(self, labels: Tensor) -> ProblemType:
        """The config's, or else what these labels look like."""
        if self.config.problem_type is not None:
            return self.config.problem_type
        if self.config.num_labels == 1:
            return "regression"
        if labels.ndim == 1 and not backend.is_float(labels.dtype):
            return "single_label_classification"
        return "multi_label_classification"


class BertForTokenClassification(_Headed):
    """logits (B, T, N) = W dropout(x) + b: scores of the labels for each token"""

    architecture = "BertForTokenClassification"
    pooled = False

    def _make_head(self, config: BertConfig) -> None:
        self.dropout = _classifier_dropout(config)
        self.classifier = Linear(config.hidden_size, config.num_labels)

    def forward(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
    ) -> Tensor:
        """The arguments are those of `BertModel.forward`."""
        x = self._states(input_ids, attention_mask, token_type_ids, position_ids)
        return self.classifier(self.dropout(x))

    def loss(
        self,
        input_ids: Any,
        labels: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        weight: Any = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """−mean ln softmax(logits)[labels[b, t]] over those that are not −100, a scalar

        labels (B, T); weight (N,) is how much each class counts, in the sum and in its divisor.
        """
        logits = self(input_ids, attention_mask, token_type_ids, position_ids)
        return ops.cross_entropy(
            *(logits, labels, weight, IGNORE_INDEX),
            label_smoothing=label_smoothing,
            dtype=_wide(logits),
        )


class SpanLogits(NamedTuple):
    """What BertForQuestionAnswering returns."""

    start_logits: Tensor  # (B, T)
    end_logits: Tensor  # (B, T)


class BertForQuestionAnswering(_Headed):
    """logits (B, T) of where the answer begins, and of where it ends (its last token)"""

    architecture = "BertForQuestionAnswering"
    pooled = False

    def _make_head(self, config: BertConfig) -> None:
        if config.num_labels != 2:
            raise ValueError(
                f"question answering has two labels, begin and end: got num_labels "
                f"{config.num_labels}"
            )
        self.qa_outputs = Linear(config.hidden_size, 2)

    def forward(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
    ) -> SpanLogits:
        """The arguments are those of `BertModel.forward`."""
        x = self._states(input_ids, attention_mask, token_type_ids, position_ids)
        logits = self.qa_outputs(x)  # (B, T, 2)
        return SpanLogits(logits[:, :, 0], logits[:, :, 1])

    def loss(
        self,
        input_ids: Any,
        start_positions: Any,
        end_positions: Any,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
    ) -> Tensor:
        """½ (−mean ln p(start) − mean ln p(end)), positions (B,) from 0 to T − 1, or −100

        As in Hugging Face, positions from T on (the answer was cut off) do not count.
        """
        logits = self(input_ids, attention_mask, token_type_ids, position_ids)
        losses = []
        for scores, positions in zip(logits, (start_positions, end_positions), strict=True):
            places = as_array(positions, scores.data)
            places = Tensor(places + (places >= scores.shape[1]) * (IGNORE_INDEX - places))
            losses.append(
                ops.cross_entropy(scores, places, ignore_index=IGNORE_INDEX, dtype=_wide(scores))
            )
        return (losses[0] + losses[1]) * 0.5
