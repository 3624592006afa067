"""A label for a text, or for a pair of texts, and how to learn it.

    logits   model(pieces of a window)
    p        softmax(logits), the mean over a text's windows
    loss     −(1/n) Σ w[label] log p[label]

Where texts are cut each has one window. Else a long one has several: each is learnt from with the
text's label, and the text has the label that is likeliest over all of them.

Dimensions: B windows in a batch, T pieces of the longest, N labels.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from tinygrad_llm import ops
from tinygrad_llm.autograd import no_grad
from tinygrad_llm.data.labels import LabelSet
from tinygrad_llm.data.loader import shuffled
from tinygrad_llm.data.tables import Column, Table, counted
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.data.windows import Long, TextWindows, Window, pad
from tinygrad_llm.metrics.classification import label_scores
from tinygrad_llm.tensor import Tensor

Batch = dict[str, np.ndarray]  # input_ids, attention_mask, token_type_ids (B, T); labels (B,)

Metric = Literal["accuracy", "macro-f1", "mcc", "loss"]


class Classifier(Protocol):
    """What gives logits (B, N): `BertForSequenceClassification`, `LSTMForSequenceClassification`"""

    config: Any
    training: bool

    def __call__(self, input_ids: Any, attention_mask: Any, token_type_ids: Any, /) -> Tensor: ...

    def parameters(self) -> Any: ...

    def train(self) -> Any: ...

    def eval(self) -> Any: ...


# --- labelled texts -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """texts[i], of a pair with seconds[i], has the label labels[i]; it stood in line lines[i]."""

    name: str  # where they came from, for errors
    texts: list[str]
    seconds: list[str] | None  # None: single texts
    labels: list[str]
    lines: list[int]
    notes: list[str] = field(default_factory=list)  # what a user should know of how they were read

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def of(cls, table: Table, text: Column, label: Column, second: Column | None = None) -> Texts:
        """Those of a table's columns; rows with an empty field are left out, and counted.

        Raises ValueError for a column that is not there, or that is asked for twice.
        """
        columns = [text, label] if second is None else [text, second, label]
        places = [table.index(column) for column in columns]
        if len(set(places)) < len(places):
            raise ValueError(
                f"{table.name}: texts and labels must be in different columns, got "
                f"{', '.join(repr(table.columns[i]) for i in places)}"
            )
        taken = table.take(*columns)
        fields = [list(values) for values in zip(*taken.rows, strict=True)]
        seconds = None if second is None else fields[1]
        return cls(table.name, fields[0], seconds, fields[-1], taken.lines, taken.notes)

    def take(self, numbers: Sequence[int], name: str) -> Texts:
        """Those of these numbers, under another name."""
        seconds = None if self.seconds is None else [self.seconds[i] for i in numbers]
        texts, labels = ([column[i] for i in numbers] for column in (self.texts, self.labels))
        return Texts(name, texts, seconds, labels, [self.lines[i] for i in numbers], self.notes)

    def contents(self) -> list[tuple[str, ...]]:
        """What makes each the same as another: its text, or both of them."""
        columns = [self.texts] if self.seconds is None else [self.texts, self.seconds]
        return list(zip(*columns, strict=True))


def hold_out(
    data: Texts, share: float, seed: int, *, by_first: bool = False
) -> tuple[Texts, Texts]:
    """(training, validation): about `share` of the texts at random to validate with.

    All of the same text (of the same first text, with `by_first`) are on one side, and a label that
    training would else not show stays there.
    Raises ValueError where there is nothing left for one of the two.
    """
    by_key: dict[str | tuple[str, ...], list[int]] = {}
    for i, key in enumerate(data.texts if by_first else data.contents()):
        by_key.setdefault(key, []).append(i)
    groups = list(by_key.values())
    order = shuffled(np.arange(len(groups)), len(groups), seed, 0)
    left = Counter(data.labels)
    held: list[int] = []
    for g in order.tolist():
        if len(held) >= share * len(data):
            break
        of_group = Counter(data.labels[i] for i in groups[g])
        if all(left[label] > n for label, n in of_group.items()):
            held += groups[g]
            left -= of_group
    kept = sorted(set(range(len(data))) - set(held))
    if not held or not kept:
        raise ValueError(
            f"{data.name}: {counted(len(data), 'text')} are too few to hold some out for "
            "validation: name a file for it (--val-data)"
        )
    return data.take(kept, data.name), data.take(sorted(held), f"{data.name}, held out")


# --- the task -------------------------------------------------------------------------------------


class ClassifyTask:
    """Labelled texts to train a classifier on, and others to validate it with.

    Args:
        train, validation: both of single texts, or both of pairs.
        labels: their order is that of the logits.
        tokenizer: text → pieces.
        max_length: T at most, marks included.
        long: what becomes of longer texts, see `TextWindows`.
        batch_size, eval_batch_size: windows in a batch.
        weights: (N,) how much each label counts; None: all the same. Their mean over the training
            texts should be 1. The validation loss is without.
        metric: by which a checkpoint is the best.
        segments: how many the model tells apart: with 1, the second text of a pair is marked as
            the first is.
        about: what is kept beside a checkpoint, for `predict`.

    `notes` says what is to be known of the data: what was cut, empty or unknown, and texts that are
    in both files.

    Raises ValueError for labels that `labels` has not (which, and where), and for single texts
    beside pairs.
    """

    def __init__(
        self,
        train: Texts,
        validation: Texts,
        labels: LabelSet,
        tokenizer: Tokenizer,
        *,
        max_length: int = 128,
        long: Long = "cut",
        batch_size: int = 32,
        eval_batch_size: int = 64,
        weights: np.ndarray | None = None,
        metric: Metric = "accuracy",
        segments: int = 2,
        seed: int = 0,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        if batch_size < 1 or eval_batch_size < 1:
            raise ValueError(
                f"batch sizes must be at least 1, got {batch_size} and {eval_batch_size}"
            )
        if (train.seconds is None) != (validation.seconds is None):
            raise ValueError("expected pairs to train on and pairs to validate with, or neither")
        self.train, self.held_out = train, validation
        self.labels, self.tokenizer, self.weights = labels, tokenizer, weights
        self.train_ids = labels.encode(train.labels, name=train.name, lines=train.lines)
        self.val_ids = labels.encode(
            validation.labels, name=validation.name, lines=validation.lines
        )
        self.train_windows, self.val_windows = (
            TextWindows(tokenizer, data.texts, data.seconds, max_length=max_length, long=long)
            for data in (train, validation)
        )
        self.collate = Collator(tokenizer, segments)
        self.batch_size, self.eval_batch_size, self.seed = batch_size, eval_batch_size, seed
        self.score = f"val_{metric.replace('-', '_')}"
        kind = "texts" if train.seconds is None else "pairs"
        self.unit = kind if long == "cut" else "windows"  # what `size` counts
        self.about = dict(about or {})
        self.notes = self._notes()
        self._lengths = np.array([len(window.ids) for window in self.train_windows.windows])
        self._sha256 = _sha256(train)
        self._position = 0  # batches given so far, over all epochs
        self._order: tuple[int, list[np.ndarray]] = (-1, [])  # (epoch, its batches)

    # --- what a trainer calls ---------------------------------------------------------------------

    @property
    def steps_per_epoch(self) -> int:
        """⌈windows / batch_size⌉"""
        return -(-len(self.train_windows) // self.batch_size)

    def next_batch(self) -> Batch:
        """The next training batch."""
        epoch, number = divmod(self._position, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, self._batches_of(epoch)
        self._position += 1
        windows = [self.train_windows.windows[i] for i in self._order[1][number]]
        return self.collate(windows, self.train_ids)

    def loss(self, model: Classifier, batch: Batch) -> Tensor:
        """−(1/B) Σ w[label] ln p[label]: a scalar; in training the labels weigh as they should.

        It is divided by the number of texts and not by the sum of their weights, so that the parts
        of a large batch add up to it.
        """
        there = on_device(model, batch)
        logits = model(there["input_ids"], there["attention_mask"], there["token_type_ids"])
        weight = self.weights if model.training else None
        if weight is not None:
            weight = Tensor(weight).to(logits.device).astype(logits.dtype).data
        wide = "float32" if logits.dtype.itemsize < 4 else None  # a sum wants digits and room
        total = ops.cross_entropy(logits, there["labels"], weight, reduction="sum", dtype=wide)
        return total * (1.0 / len(batch["labels"]))

    def size(self, batch: Batch) -> int:
        """How many windows the batch has."""
        return len(batch["labels"])

    def validation(self) -> Iterator[Batch]:
        """The validation batches, in the same order every time."""
        for numbers in _by_length(self.val_windows.windows, self.eval_batch_size):
            yield self.collate([self.val_windows.windows[i] for i in numbers], self.val_ids)

    def evaluate(self, model: Classifier) -> dict[str, float]:
        """val_loss, val_accuracy, val_macro_f1 and val_mcc, over the texts of the validation."""
        probabilities = window_probabilities(
            model, self.val_windows, self.collate, self.eval_batch_size
        )
        right = probabilities[np.arange(len(self.val_ids)), self.val_ids]
        guesses = self.guesses(probabilities)
        scores = label_scores(self.held_out.labels, guesses)
        return {
            "val_loss": float(-np.log(np.maximum(right, 1e-30)).mean()),
            "val_accuracy": scores.accuracy,
            "val_macro_f1": scores.averages.macro.f1,
            "val_mcc": scores.mcc,
        }

    def remark(self, found: dict[str, float]) -> str | None:
        """The scores, for the log."""
        return (
            f"validation: accuracy {found['val_accuracy']:.4f}, macro F1 "
            f"{found['val_macro_f1']:.4f}, MCC {found['val_mcc']:.4f}"
        )

    def guesses(self, probabilities: np.ndarray) -> list[str]:
        """The likeliest label of each text."""
        return [self.labels.names[i] for i in probabilities.argmax(axis=1)]

    def predicted(self, model: Classifier) -> list[str]:
        """The label of each validation text."""
        found = window_probabilities(model, self.val_windows, self.collate, self.eval_batch_size)
        return self.guesses(found)

    def save(self, folder: Path) -> None:
        """Write the tokenizer, and task.json: how texts are read."""
        self.tokenizer.save(folder)
        if self.about:
            text = json.dumps(self.about, indent=2, ensure_ascii=False) + "\n"
            (folder / TASK_FILE).write_text(text, encoding="utf-8")

    def state(self) -> dict[str, Any]:
        """The position in the training data, and which data it is."""
        return {"position": self._position, "sha256": self._sha256}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`; ValueError where the texts are no longer the same."""
        if state["sha256"] != self._sha256:
            raise ValueError(
                f"the texts of {self.train.name} have changed since the run began (sha256 "
                f"{state['sha256'][:12]} then, {self._sha256[:12]} now): resume with the old ones, "
                "or start a new run"
            )
        self._position = int(state["position"])

    # --- inside -----------------------------------------------------------------------------------

    def _batches_of(self, epoch: int) -> list[np.ndarray]:
        """The windows of each batch: shuffled, then sorted by length within pools of many batches.

        So that little is filled up, and every epoch has other batches.
        """
        n, size = len(self._lengths), self.batch_size
        order = shuffled(np.arange(n), n, self.seed, 2 * epoch)
        pool = _POOL * size
        pools = [order[start : start + pool] for start in range(0, n, pool)]
        order = np.concatenate([p[np.argsort(self._lengths[p], kind="stable")] for p in pools])
        batches = [order[start : start + size] for start in range(0, n, size)]
        places = shuffled(np.arange(len(batches)), len(batches), self.seed, 2 * epoch + 1)
        return [batches[i] for i in places]

    def _notes(self) -> list[str]:
        notes: list[str] = []
        for data, windows in ((self.train, self.train_windows), (self.held_out, self.val_windows)):
            notes += [note for note in data.notes if note not in notes]
            notes += [f"{data.name}: {note}" for note in windows.notes]
        known = set(self.train.contents())
        if n := sum(key in known for key in self.held_out.contents()):
            notes.append(
                f"{n:,} of {counted(len(self.held_out), 'text')} to validate with are also among "
                "those that are trained on: the scores are too high by them"
            )
        return notes


TASK_FILE = "task.json"  # beside a checkpoint: how `predict` reads texts
_POOL = 32  # batches whose windows are sorted by length together


class Collator:
    """Windows → the arrays of a batch."""

    def __init__(self, tokenizer: Tokenizer, segments: int = 2) -> None:
        self.pad_id = tokenizer.token_to_id("[PAD]") or 0
        self.segments = segments

    def __call__(self, windows: Sequence[Window], labels: np.ndarray | None = None) -> Batch:
        """labels: of all texts, by their numbers; None: nothing to learn from."""
        batch = pad(windows, self.pad_id)
        if self.segments < 2:
            batch["token_type_ids"][:] = 0
        if labels is not None:
            batch["labels"] = labels[[window.example for window in windows]]
        return batch


def window_probabilities(
    model: Classifier, windows: TextWindows, collate: Collator, batch_size: int = 64
) -> np.ndarray:
    """p (texts, N): softmax of the logits, the mean over each text's windows; dropout off."""
    found: list[Any] = [None] * len(windows)
    model.eval()
    with no_grad():
        for numbers in _by_length(windows.windows, batch_size):
            batch = on_device(model, collate([windows.windows[i] for i in numbers]))
            logits = model(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
            rows = ops.softmax(logits.astype("float32"), axis=-1).numpy()
            for i, row in zip(numbers, rows, strict=True):
                found[i] = row
    return windows.merge(np.stack(found))


def on_device(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch's arrays where the model is."""
    device = next(iter(model.parameters())).device
    return {name: Tensor(array).to(device).data for name, array in batch.items()}


def _by_length(windows: Sequence[Window], batch_size: int) -> list[np.ndarray]:
    order = np.argsort([len(window.ids) for window in windows], kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _sha256(data: Texts) -> str:
    text = json.dumps([data.texts, data.seconds, data.labels], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
