"""A tagger: a label for every word, from what the word looks like and what stands around it.

    features    what a word looks like                      word, characters, shape
    encoder     "bilstm": nothing more                      from random initialisation
                "bert": [state of its first piece, features], the features also added to what
                the checkpoint reads, which does not tell upper from lower case
    recurrent   a BiLSTM over the words of the row          (none where num_layers is 0)
    head        emissions = W x + b, then
                "crf": labels are chosen together           "softmax": each for itself

It works on words, never on pieces: a word counts once however many pieces it has. A row holds the
words of one sentence or, for "bert", of several neighbouring ones; labels are chosen sentence by
sentence.

BiLSTM-CRF: Lample et al., "Neural architectures for named entity recognition", 2016; Ma and Hovy,
"End-to-end sequence labeling via bi-directional LSTM-CNNs-CRF", 2016.

Dimensions: N rows, V words in a row, T pieces in a row, S sentences, W words of the longest, C
channels of the encoder, F features, K labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from tinygrad_llm import backend, ops
from tinygrad_llm.backend import Array, float32, namespace, promote
from tinygrad_llm.data.labels import SCHEMES, Scheme
from tinygrad_llm.models import checks
from tinygrad_llm.models.bert import BertConfig, BertModel
from tinygrad_llm.models.padding import visible
from tinygrad_llm.models.pretrained import PretrainedModel
from tinygrad_llm.models.word_features import CharacterEncoder, Vocabularies, WordFeatures
from tinygrad_llm.nn import (
    CRF,
    LSTM,
    Constraints,
    Dropout,
    Linear,
    Parameter,
    constraints_for,
    init,
)
from tinygrad_llm.tensor import Tensor

IGNORE_INDEX = -100  # the label of a word that does not count

MODEL_TYPE = "tinygrad-llm-tagger"

Encoder = Literal["bilstm", "bert"]
Head = Literal["crf", "softmax"]

Batch = Mapping[str, Array]  # see `Tagger.emissions`


@dataclass(frozen=True)
class TaggerConfig:
    """All that makes a tagger: its labels, vocabularies, sizes, and how sentences are read.

    ValueError for what makes no network.
    """

    labels: tuple[str, ...]  # K of them
    vocabularies: Vocabularies
    scheme: Scheme = "plain"  # how the labels mark entities
    encoder: Encoder = "bilstm"
    head: Head = "crf"
    word_size: int = 100  # of the word embedding; 0: none
    character_encoder: CharacterEncoder = "cnn"
    character_size: int = 30  # of a character's embedding
    character_features: int = 60  # how many features the characters of a word give
    shape_size: int = 20  # of the shape embedding; 0: none
    hidden_size: int = 200  # of the recurrent layers, in each direction
    num_layers: int = 1  # of the recurrent ones; 0: none
    dropout: float = 0.5  # of what goes into and comes out of the recurrent layers
    word_dropout: float = 0.5  # how often a word that occurred once is taken for unknown
    bert: BertConfig | None = None  # the sizes of the checkpoint
    row_pieces: int = 0  # pieces of neighbouring sentences in a row; 0: one sentence
    context_pieces: int = 0  # pieces of the document before and after it, which are not scored

    def __post_init__(self) -> None:
        if not self.labels or len(set(self.labels)) < len(self.labels):
            raise ValueError(
                f"labels must be names that are all different, got {checks.short(self.labels)}"
            )
        checks.check_choice("scheme", self.scheme, SCHEMES)
        checks.check_choice("encoder", self.encoder, ("bilstm", "bert"))
        checks.check_choice("head", self.head, ("crf", "softmax"))
        checks.check_choice("character_encoder", self.character_encoder, ("cnn", "lstm", "none"))
        checks.check_sizes(**{name: getattr(self, name) for name in _SIZES})
        for name in ("word_size", "shape_size", "num_layers", "row_pieces", "context_pieces"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} must be an integer from 0, got {checks.short(value)}")
        for name in ("dropout", "word_dropout"):
            checks.check_number(name, getattr(self, name), 0.0, 1.0)
        self._check_together()

    def _check_together(self) -> None:
        if (self.encoder == "bert") != (self.bert is not None):
            raise ValueError(
                "a BertConfig and the encoder 'bert' belong together, got the encoder "
                f"{self.encoder!r} and {'one' if self.bert else 'none'}"
            )
        if self.character_encoder == "lstm" and self.character_features % 2:
            raise ValueError(
                "character_features must be even, half of them for each direction, got "
                f"{self.character_features}"
            )
        none = not self.word_size and not self.shape_size and self.character_encoder == "none"
        if none and self.encoder == "bilstm":
            raise ValueError("a tagger without word_size, shape_size and characters sees nothing")

    @property
    def has_features(self) -> bool:
        """Whether the words are looked at beside the encoder."""
        return bool(self.word_size or self.shape_size or self.character_encoder != "none")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> TaggerConfig:
        """The config that the object in a config.json describes; ValueError for another kind."""
        model_type = config.get("model_type", MODEL_TYPE)
        if model_type != MODEL_TYPE:
            raise ValueError(
                f"model_type must be {MODEL_TYPE!r} for a tagger, got {checks.short(model_type)}"
            )
        names = {field.name for field in fields(cls)}
        found = {key: value for key, value in config.items() if key in names}
        try:
            known = found["vocabularies"]
            found["labels"] = tuple(found["labels"])
            found["vocabularies"] = Vocabularies(
                tuple(known["words"]),
                known["rare"],
                "".join(known["characters"]),
                tuple(known["shapes"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"labels or vocabularies are missing or damaged: {error}") from None
        if found.get("bert") is not None:
            found["bert"] = BertConfig.from_dict(found["bert"])
        return cls(**found)

    def to_dict(self) -> dict[str, Any]:
        """The object for config.json."""
        bert = None if self.bert is None else self.bert.to_dict()
        return {"model_type": MODEL_TYPE, **asdict(self), "bert": bert}


_SIZES = ("character_size", "character_features", "hidden_size")


class Tagger(PretrainedModel):
    """emissions (N, V, K): the score of each label for each word

    `Tagger(config)` begins at random; `Tagger.from_checkpoint(folder, config)` puts one on a BERT.
    `tasks.tag` reads sentences into batches, trains it and predicts with it.
    """

    config_class = TaggerConfig
    architecture = "Tagger"
    config: TaggerConfig

    def __init__(self, config: TaggerConfig) -> None:
        super().__init__(config)
        width = 0
        with init.skip_init():  # every weight is drawn once, by reset_parameters
            self.features = WordFeatures(config) if config.has_features else None
            self.bert = self.project = self.lstm = None
            if self.features is not None:
                width += self.features.size
            if config.bert is not None:
                self.bert = BertModel(config.bert, add_pooling_layer=False)
                if self.features is not None:
                    self.project = Linear(self.features.size, config.bert.hidden_size, bias=False)
                width += config.bert.hidden_size
            self.dropout = Dropout(config.dropout)
            if config.num_layers:
                between = config.dropout if config.num_layers > 1 else 0.0
                options: dict[str, Any] = {"batch_first": True, "bidirectional": True}
                sizes = (width, config.hidden_size, config.num_layers)
                self.lstm = LSTM(*sizes, dropout=between, **options)
                width = 2 * config.hidden_size
            self.classifier = Linear(width, len(config.labels))
            self.crf = None
            if config.head == "crf":
                self.crf = CRF(len(config.labels), self._constraints())
        self.reset_parameters()

    def _constraints(self) -> Constraints | None:
        return None if self.config.scheme == "plain" else constraints_for(self.config.labels)

    def init_parameter(self, name: str, parameter: Parameter) -> None:
        """Matrices by Xavier's rule, embeddings in ±√(3 / size); biases 0, of forget gates 1.

        What is added to the checkpoint's embeddings begins as 0: at first it reads what it knows.
        """
        part, _, rest = name.partition(".")
        if part == "bert" and self.bert is not None:
            self.bert.init_parameter(rest, parameter)
        elif part == "project":
            init.zeros_(parameter)
        elif part == "crf":
            init.uniform_(parameter, -0.1, 0.1)
        elif "embedding" in name or rest in ("words.weight", "shapes.weight"):
            bound = (3.0 / parameter.shape[1]) ** 0.5
            init.uniform_(parameter, -bound, bound)
            init.zeros_(parameter.detach()[0])  # the padding
        elif "lstm" in name:
            self._init_lstm(name, parameter)
        elif parameter.ndim == 1:
            init.zeros_(parameter)
        else:
            init.xavier_uniform_(parameter)

    def _init_lstm(self, name: str, parameter: Parameter) -> None:
        if parameter.ndim == 2:
            init.xavier_uniform_(parameter)
            return
        init.zeros_(parameter)
        hidden = parameter.shape[0] // 4
        if "bias_ih" in name:  # remember at first
            init.ones_(parameter.detach()[hidden : 2 * hidden])

    @classmethod
    def from_checkpoint(cls, folder: str | Path, config: TaggerConfig) -> Self:
        """A tagger whose encoder has the weights of the BERT in `folder`, or of that hub name.

        `config.bert` is its config; only the rates of dropout may be others. Raises as
        `BertModel.from_pretrained`, and ValueError where the config is another one.
        """
        rates = ("hidden_dropout_prob", "attention_probs_dropout_prob")
        changes: dict[str, Any] = {rate: getattr(config.bert, rate, 0.0) for rate in rates}
        encoder, _ = BertModel.load(folder, **changes)
        if encoder.config != config.bert:
            raise ValueError(
                f"config.bert is not the config of the BERT in {folder}: take that one"
            )
        model = cls(config)
        assert model.bert is not None
        model.bert.load_state_dict(
            {n: t for n, t in encoder.state_dict().items() if not n.startswith("pooler.")}
        )
        return model

    # --- from words to emissions ------------------------------------------------------------------

    def emissions(self, batch: Batch) -> Tensor:
        """(N, V, K), from arrays of integers

        words, shapes (N, V), characters (N, V, L): see `WordReader`; lengths (N,): how many of the
        words are real. With a checkpoint also input_ids and attention_mask (N, T), first (N, V),
        where each word begins among the pieces, and piece_words (N, T), which word a piece belongs
        to, from 1 on, 0 for none.
        """
        parts = []
        features = None
        if self.features is not None:
            features = self.features(batch["words"], batch["shapes"], batch["characters"])
        if self.bert is not None:
            states = self._states(self.bert, batch, features)  # (N, T, C)
            parts.append(_rows(states, batch["first"]))
        if features is not None:
            parts.append(features)
        x = self.dropout(parts[0] if len(parts) == 1 else ops.concatenate(parts, axis=-1))
        if self.lstm is not None:
            x, _ = self.lstm(x, lengths=batch["lengths"])
            x = self.dropout(x)
        return self.classifier(x)

    def _states(self, bert: BertModel, batch: Batch, features: Tensor | None) -> Tensor:
        """What the checkpoint knows at each piece, told the features of each piece's word."""
        ids, mask = Tensor(batch["input_ids"]), batch["attention_mask"]
        if features is None or self.project is None:
            return bert(ids, mask).last_hidden_state
        e = bert.embeddings
        x = e.word_embeddings(ids) + e.token_type_embeddings.weight[0]
        x = x + e.position_embeddings.weight[: ids.shape[1]]
        owners = batch["piece_words"]
        told = _rows(self.project(self.dropout(features)), (owners - 1).clip(0))
        x = x + told * Tensor((owners > 0).astype(x.dtype)[:, :, None])
        return bert.encoder(e.dropout(e.LayerNorm(x)), visible(mask, ids))

    def forward(self, batch: Batch) -> Tensor:
        """`emissions`."""
        return self.emissions(batch)

    # --- from emissions to labels -----------------------------------------------------------------

    def loss(self, batch: Batch) -> Tensor:
        """−ln p(labels) / their number, a scalar, in nats for each word; see `loss_of`."""
        return self.loss_of(self.emissions(batch), batch)

    def loss_of(self, emissions: Tensor, batch: Batch) -> Tensor:
        """The loss of these emissions: −Σ ln p(labels of a sentence) / words

        labels (N, V); sentences (N, V) numbers the sentences of a row, −1 for words that do not
        count. p is the CRF's or, without one, the product over the words.
        """
        wide = promote(emissions.dtype, float32)  # in half precision a sum over words loses digits
        if self.crf is None:
            labels = namespace(batch["labels"]).where(
                batch["sentences"] >= 0, batch["labels"], IGNORE_INDEX
            )
            return ops.cross_entropy(emissions, labels, ignore_index=IGNORE_INDEX, dtype=wide)
        found = _sentences(_host(batch["sentences"]))
        flat = emissions.astype(wide).reshape(-1, emissions.shape[2])
        places = Tensor(found.places).to(emissions.device).data
        labels = _host(batch["labels"]).reshape(-1)[found.places]
        total = self.crf(_rows_at(flat, places), labels, lengths=found.lengths, reduction="sum")
        return total * (1.0 / max(1, int(found.lengths.sum())))

    def decode(self, emissions: Sequence[np.ndarray]) -> list[list[str]]:
        """The labels of sentences, from the emissions (words, K) of each."""
        if self.crf is None:
            return [[self.config.labels[i] for i in e.argmax(axis=1)] for e in emissions]
        found: list[list[str]] = [[] for _ in emissions]
        order = sorted(range(len(emissions)), key=lambda i: len(emissions[i]))
        for start in range(0, len(order), _DECODED_AT_ONCE):
            some = order[start : start + _DECODED_AT_ONCE]
            lengths = np.array([len(emissions[i]) for i in some])
            padded = np.zeros((len(some), int(lengths.max()), len(self.config.labels)), np.float32)
            for row, i in enumerate(some):
                padded[row, : lengths[row]] = emissions[i]
            device = self.classifier.weight.device
            paths = self.crf.decode(Tensor(padded).to(device), lengths=lengths)
            for i, path in zip(some, paths, strict=True):
                found[i] = [self.config.labels[k] for k in path]
        return found


_DECODED_AT_ONCE = 256  # sentences


def _rows(x: Tensor, places: Array) -> Tensor:
    """x[n, places[n]] for x (N, T, C) and places (N, V): (N, V, C)"""
    n, t, c = x.shape
    starts = namespace(places).arange(n, dtype=places.dtype)[:, None] * t
    return _rows_at(x.reshape(n * t, c), starts + places)


def _rows_at(x: Tensor, places: Array) -> Tensor:
    """x[places] for x (n, C): an embedding, whose gradient adds up in a fixed order."""
    return ops.embedding(places, x)


class _Sentences(NamedTuple):
    places: np.ndarray  # (S, W) among the N · V words; 0 for padding
    lengths: np.ndarray  # (S,)


def _sentences(numbers: np.ndarray) -> _Sentences:
    """Where the sentences stand, from their numbers in each row (N, V), −1 for none."""
    rows = np.arange(len(numbers))[:, None] * (numbers.shape[1] + 1)
    flat = np.flatnonzero(numbers.reshape(-1) >= 0)
    keys = (rows + numbers).reshape(-1)[flat]
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    lengths = np.diff(np.append(starts, len(flat)))
    places = np.zeros((len(lengths), int(lengths.max(initial=0))), np.int64)
    places[np.arange(places.shape[1]) < lengths[:, None]] = flat
    return _Sentences(places, lengths)


def _host(x: Any) -> np.ndarray:
    return np.asarray(backend.to_device(x, "cpu"))
