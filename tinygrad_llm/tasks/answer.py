"""Extractive question answering: the passage of a context that answers a question.

    logits        model(pieces of a window): two for each place, begin and end
    p             softmax(logits) over the pieces of the window
    loss          −½ (log p(begin) + log p(end)), at [CLS] where the window has no answer
    answer        argmax of log p(begin = i) + log p(end = j),  i ≤ j < i + most, in the context
    no answer     the least of 2 log p([CLS]) over the windows, where training has such questions

Within a window that is the order of the sums of logits, which Hugging Face takes; a logit of one
window says nothing beside one of another, a probability does.
Devlin et al., NAACL 2019, sections 4.2 and 4.3.

Dimensions: B windows in a batch, T pieces of the longest.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tinygrad_llm import ops
from tinygrad_llm.autograd import no_grad
from tinygrad_llm.data.answers import AnswerWindows
from tinygrad_llm.data.loader import shuffled
from tinygrad_llm.data.questions import Questions
from tinygrad_llm.data.tables import counted
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.data.windows import Long
from tinygrad_llm.metrics.classification import majority
from tinygrad_llm.metrics.generated import answer_scores, normal_answer
from tinygrad_llm.models.bert import SpanLogits
from tinygrad_llm.tasks.classify import TASK_FILE, Collator, on_device
from tinygrad_llm.tensor import Tensor

Batch = dict[str, np.ndarray]  # as of `pad`, (B, T) each; start_positions, end_positions (B,)


class Reader(Protocol):
    """What gives logits of begin and end, (B, T) each: `BertForQuestionAnswering`"""

    config: Any
    training: bool

    def __call__(
        self, input_ids: Any, attention_mask: Any, token_type_ids: Any, /
    ) -> SpanLogits: ...

    def parameters(self) -> Any: ...

    def train(self) -> Any: ...

    def eval(self) -> Any: ...


class AnswerTask:
    """Answered questions to train a reader on, and others to validate it with.

    Args:
        train, validation: questions, contexts, answers.
        tokenizer: text → pieces; a BERT's, with [CLS].
        max_length: T at most, marks included.
        long: what becomes of longer contexts, see `AnswerWindows`.
        batch_size, eval_batch_size: windows in a batch.
        segments: how many the model tells apart: with 1, the context is marked as the question is.
        about: what is kept beside a checkpoint, for `predict`.

    `most` is the longest answer that is looked for, in pieces: 30 as in Hugging Face, or more where
    training has a longer one. `unanswerable`: whether training has questions without an answer;
    only then is there none to a new one. `notes` says what is to be known of the data.

    Raises ValueError as `AnswerWindows`, and where training has nothing to learn from.
    """

    score = "val_f1"
    unit = "windows"

    def __init__(
        self,
        train: Questions,
        validation: Questions,
        tokenizer: Tokenizer,
        *,
        max_length: int = 384,
        long: Long = "windows",
        batch_size: int = 32,
        eval_batch_size: int = 64,
        segments: int = 2,
        seed: int = 0,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        if batch_size < 1 or eval_batch_size < 1:
            raise ValueError(
                f"batch sizes must be at least 1, got {batch_size} and {eval_batch_size}"
            )
        self.train, self.held_out, self.tokenizer = train, validation, tokenizer
        self.train_windows, self.val_windows = (
            AnswerWindows(
                tokenizer,
                data.questions,
                data.contexts,
                data.first_answers,
                max_length=max_length,
                long=long,
            )
            for data in (train, validation)
        )
        self._learnt = np.flatnonzero(self.train_windows.learnable)
        if not len(self._learnt):
            raise ValueError(
                f"{train.name}: no window of {max_length} pieces shows a whole answer, so there is "
                "nothing to learn from: give a larger max_length"
            )
        self.collate = AnswerCollator(tokenizer, segments)
        self.batch_size, self.eval_batch_size, self.seed = batch_size, eval_batch_size, seed
        self.unanswerable = train.unanswerable > 0
        self.most = max(30, self.train_windows.longest_answer)
        found = {"unanswerable": self.unanswerable, "longest_answer": self.most}
        self.about = {**(about or {}), **found}
        self.notes = self._notes()
        self._lengths = self.train_windows.lengths[self._learnt]
        self._sha256 = _sha256(train)
        self._position = 0  # batches given so far, over all epochs
        self._order: tuple[int, list[np.ndarray]] = (-1, [])  # (epoch, its batches)

    # --- what a trainer calls ---------------------------------------------------------------------

    @property
    def steps_per_epoch(self) -> int:
        """⌈windows / batch_size⌉"""
        return -(-len(self._learnt) // self.batch_size)

    def next_batch(self) -> Batch:
        """The next training batch."""
        epoch, number = divmod(self._position, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, self._batches_of(epoch)
        self._position += 1
        return self.collate(self.train_windows, self._order[1][number])

    def loss(self, model: Reader, batch: Batch) -> Tensor:
        """−(1/2B) Σ (ln p(begin) + ln p(end)): a scalar; what fills a row up has no part in p."""
        there = on_device(model, batch)
        total = None
        for logits, name in zip(_logits(model, there), _POSITIONS, strict=True):
            loss = ops.cross_entropy(logits, there[name], reduction="sum")
            total = loss if total is None else total + loss
        assert total is not None
        return total * (0.5 / len(batch["input_ids"]))

    def size(self, batch: Batch) -> int:
        """How many windows the batch has."""
        return len(batch["input_ids"])

    def validation(self) -> Iterator[Batch]:
        """The validation batches, in the same order every time."""
        learnt = np.flatnonzero(self.val_windows.learnable)
        for numbers in _by_length(self.val_windows.lengths, learnt, self.eval_batch_size):
            yield self.collate(self.val_windows, numbers)

    def evaluate(self, model: Reader) -> dict[str, float]:
        """val_loss (of windows), val_f1 and val_exact (SQuAD's, from 0 to 1, of the questions)."""
        found = self._read(model)
        scores = answer_scores([guess.text for guess in found.guesses], self.held_out.texts)
        return {
            "val_loss": found.loss,
            "val_f1": scores.f1 / 100,
            "val_exact": scores.exact_match / 100,
        }

    def remark(self, found: dict[str, float]) -> str | None:
        """The scores, for the log."""
        return f"validation: F1 {found['val_f1']:.4f}, exact match {found['val_exact']:.4f}"

    def predicted(self, model: Reader) -> list[Guess]:
        """The answer to each question of the validation."""
        return self._read(model).guesses

    def save(self, folder: Path) -> None:
        """Write the tokenizer, and task.json: how questions are read."""
        self.tokenizer.save(folder)
        text = json.dumps(self.about, indent=2, ensure_ascii=False) + "\n"
        (folder / TASK_FILE).write_text(text, encoding="utf-8")

    def state(self) -> dict[str, Any]:
        """The position in the training data, and which data it is."""
        return {"position": self._position, "sha256": self._sha256}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`; ValueError where the questions are no longer the same."""
        if state["sha256"] != self._sha256:
            raise ValueError(
                f"the questions of {self.train.name} have changed since the run began (sha256 "
                f"{state['sha256'][:12]} then, {self._sha256[:12]} now): resume with the old ones, "
                "or start a new run"
            )
        self._position = int(state["position"])

    # --- what a constant would score --------------------------------------------------------------

    def usual_answer(self) -> str:
        """The most frequent answer of the training data; '' where most often there is none."""
        return majority(_learnt_answers(self.train))

    def usual_answers(self) -> list[str]:
        """For each validation question the most frequent answer of training in its context.

        What is had without reading the question; '' where its context has none of the 1,000 most
        frequent ones, or most often there is no answer.
        """
        counts = Counter(_learnt_answers(self.train))
        known = [text for text, _ in counts.most_common(1000)]
        found: dict[str, str] = {}
        for context in self.held_out.contexts:
            if context not in found:
                found[context] = next((text for text in known if text in context), "")
        return [found[context] for context in self.held_out.contexts]

    # --- inside -----------------------------------------------------------------------------------

    def _read(self, model: Reader) -> Found:
        return read(
            model,
            self.val_windows,
            self.held_out.contexts,
            self.collate,
            most=self.most,
            unanswerable=self.unanswerable,
            batch_size=self.eval_batch_size,
        )

    def _batches_of(self, epoch: int) -> list[np.ndarray]:
        """The windows of each batch: shuffled, then sorted by length within pools of many batches.

        So that little is filled up, and every epoch has other batches.
        """
        n, size = len(self._learnt), self.batch_size
        order = shuffled(np.arange(n), n, self.seed, 2 * epoch)
        pool = _POOL * size
        pools = [order[start : start + pool] for start in range(0, n, pool)]
        order = np.concatenate([p[np.argsort(self._lengths[p], kind="stable")] for p in pools])
        batches = [self._learnt[order[start : start + size]] for start in range(0, n, size)]
        places = shuffled(np.arange(len(batches)), len(batches), self.seed, 2 * epoch + 1)
        return [batches[i] for i in places]

    def _notes(self) -> list[str]:
        notes: list[str] = []
        for data, windows in ((self.train, self.train_windows), (self.held_out, self.val_windows)):
            notes += [note for note in data.notes if note not in notes]
            notes += [f"{data.name}: {note}" for note in windows.notes]
        total = counted(len(self.held_out), "question")
        if n := len({*self.train.contexts} & {*self.held_out.contexts}):
            notes.append(
                f"{counted(n, 'context')} to validate with are also among those that are trained on"
            )
        if self.held_out.unanswerable and not self.unanswerable:
            notes.append(
                f"{self.held_out.unanswerable:,} of {total} to validate with have no answer, and "
                "none that is trained on: one is given to each, and counts as wrong"
            )
        bare = sum(any(a and not normal_answer(a) for a in texts) for texts in self.held_out.texts)
        if bare:
            notes.append(
                f"{bare:,} of {total} to validate with have an answer of nothing but punctuation "
                "and articles, which SQuAD's scores do not look at: any other such one is as right"
            )
        return notes


_POSITIONS = ("start_positions", "end_positions")
_POOL = 32  # batches whose windows are sorted by length together


class AnswerCollator:
    """Windows → the arrays of a batch."""

    def __init__(self, tokenizer: Tokenizer, segments: int = 2) -> None:
        self.pad = Collator(tokenizer, segments)

    def __call__(self, windows: AnswerWindows, numbers: Sequence[int] | np.ndarray) -> Batch:
        """The windows with these numbers, and where their answers begin and end."""
        batch = self.pad([windows.window(int(k)) for k in numbers])
        targets = windows.targets[numbers]
        return batch | {name: targets[:, i].copy() for i, name in enumerate(_POSITIONS)}


def _logits(model: Reader, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Of begin and end, (B, T) in float32 or wider, −10⁹ where a row is filled up."""
    found = model(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
    seen = []
    for logits in found:
        wide = logits.astype("float32") if logits.dtype.itemsize < 4 else logits
        filled = Tensor(((batch["attention_mask"] == 0) * -1e9).astype(wide.dtype))
        seen.append(wide + filled)
    return seen[0], seen[1]


# --- with a trained model -------------------------------------------------------------------------


@dataclass(frozen=True)
class Guess:
    """context[start:stop] is the answer `text`; '' where there is none."""

    text: str
    start: int | None
    stop: int | None
    probability: float  # among the likeliest passages, and no answer where that may be


@dataclass(frozen=True)
class Found:
    """What a model says of questions, and how wrong it is on their windows."""

    guesses: list[Guess]
    loss: float  # the mean over the windows that could be learnt


def read(
    model: Reader,
    windows: AnswerWindows,
    contexts: Sequence[str],
    collate: AnswerCollator,
    *,
    most: int = 30,
    unanswerable: bool = False,
    batch_size: int = 64,
) -> Found:
    """The best passage of each question's windows, dropout off.

    most: pieces of the longest answer. unanswerable: whether there may be none. A context without a
    piece has the answer ''.
    """
    passages: list[dict[tuple[int, int], float]] = [{} for _ in contexts]
    absent = np.zeros(len(contexts))  # 2 log p([CLS]), the least over the windows
    total, count = 0.0, 0
    model.eval()
    with no_grad():
        for numbers in _by_length(windows.lengths, np.arange(len(windows)), batch_size):
            batch = collate(windows, numbers)
            begin, end = (
                ops.log_softmax(logits, axis=-1).numpy()
                for logits in _logits(model, on_device(model, batch))
            )
            for row, k in enumerate(numbers.tolist()):
                example = int(windows.examples[k])
                absent[example] = min(absent[example], float(begin[row, 0] + end[row, 0]))
                if windows.learnable[k]:
                    first, last = windows.targets[k]
                    total -= 0.5 * float(begin[row, first] + end[row, last])
                    count += 1
                allowed = windows.allowed(k)
                n = len(allowed)
                known = passages[example]
                for score, first, last in best_spans(begin[row, :n], end[row, :n], allowed, most):
                    place = windows.characters(k, first, last)
                    known[place] = max(score, known.get(place, score))
    guesses = [
        _guess(context, known, absent[i] if unanswerable else None)
        for i, (context, known) in enumerate(zip(contexts, passages, strict=True))
    ]
    return Found(guesses, total / max(1, count))


def best_spans(
    begin: np.ndarray, end: np.ndarray, allowed: np.ndarray, most: int, count: int = 20
) -> list[tuple[float, int, int]]:
    """(begin[i] + end[j], i, j), the highest first: i ≤ j < i + most, both `allowed`; (T,) each.

    Of equal ones the earlier, then the shorter comes first.
    """
    places = np.flatnonzero(allowed)
    if not len(places):
        return []
    low, high = int(places[0]), int(places[-1]) + 1
    begins = np.where(allowed[low:high], begin[low:high], -np.inf)
    ends = np.where(allowed[low:high], end[low:high], -np.inf)
    width = min(most, high - low)
    padded = np.concatenate([ends, np.full(width - 1, -np.inf)])
    # sums[i, d]: from i to i + d
    sums = begins[:, None] + np.lib.stride_tricks.sliding_window_view(padded, width)
    flat = sums.reshape(-1)
    top = np.arange(len(flat))
    if len(flat) > count:
        least = -np.partition(-flat, count - 1)[count - 1]
        top = np.flatnonzero(flat >= least)
    top = top[np.isfinite(flat[top])]
    top = top[np.argsort(-flat[top], kind="stable")][:count]
    starts, further = np.divmod(top, width)
    return [
        (float(flat[n]), low + int(i), low + int(i + d))
        for n, i, d in zip(top, starts, further, strict=True)
    ]


def _guess(context: str, known: Mapping[tuple[int, int], float], absent: float | None) -> Guess:
    """The likeliest passage; '' where none is, or where none is likelier than no answer."""
    if not known:
        return Guess("", None, None, 1.0)
    place = max(known, key=lambda span: (known[span], -span[0], -span[1]))
    scores = np.array([*known.values(), *([] if absent is None else [absent])])
    shares = np.exp(scores - scores.max())
    best = known[place]
    if absent is not None and absent > best:
        return Guess("", None, None, float(shares[-1] / shares.sum()))
    start, stop = place
    probability = float(np.exp(best - scores.max()) / shares.sum())
    return Guess(context[start:stop], start, stop, probability)


def _by_length(lengths: np.ndarray, numbers: np.ndarray, batch_size: int) -> list[np.ndarray]:
    order = numbers[np.argsort(lengths[numbers], kind="stable")]
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _learnt_answers(data: Questions) -> list[str]:
    """'' where there is none."""
    return ["" if answer is None else answer.text for answer in data.first_answers]


def _sha256(data: Questions) -> str:
    text = json.dumps([data.questions, data.contexts, data.answers], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
