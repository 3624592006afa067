"""Scores as a text for people and as metrics.json for programs.

A table of tags can mislead in three ways, and this one is built against them. With O among its
rows an average is high for a model that finds nothing, so every average stands with and without O,
and says so. Tags are not entities: half an entity is half right by tags and wrong as a whole, so
both stand side by side. And a number says nothing without what is had for nothing, so
the majority baseline stands beside it. Averages are those of the rows that are printed.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tinygrad_llm.data.labels import OUTSIDE, detect
from tinygrad_llm.data.tables import counted
from tinygrad_llm.metrics.classification import LabelScores, label_scores, majority
from tinygrad_llm.metrics.entities import EntityScores, check_as_long, entity_scores
from tinygrad_llm.metrics.generated import (
    AnswerScores,
    TranslationScores,
    sentence_chrf,
    translation_scores,
)
from tinygrad_llm.metrics.scores import Averages, Score
from tinygrad_llm.storage import write_file

WIDTH = 100  # columns that a report takes at most, unless a label alone is wider


class Report(Protocol):
    """What every evaluation ends in."""

    @property
    def name(self) -> str:
        """What was evaluated."""
        ...

    def text(self) -> str:
        """For people, at most 100 columns wide."""
        ...

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        ...


def write_metrics(path: str | Path, report: Report, **more: Any) -> Path:
    """Write metrics.json: the report, and what else is to be known of it (seconds, model, sha256).

    The file is there whole, or as it was before. Raises ValueError for a number that JSON does not
    have (NaN, infinity).
    """
    file = Path(path)
    found = {"name": report.name, **more, **report.as_dict()}
    text = json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False)
    write_file(file, lambda path: path.write_text(text + "\n", encoding="utf-8", newline="\n"))
    return file


# --- labels of texts ------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelReport:
    """The scores of labels of texts, or of pairs of texts, and those of the baselines."""

    name: str
    scores: LabelScores
    baselines: dict[str, LabelScores]
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """What metrics.json holds of it."""
        found = self.scores.as_dict()
        found["baselines"] = {
            name: {"accuracy": s.accuracy, "macro f1": s.averages.macro.f1, "mcc": s.mcc}
            for name, s in self.baselines.items()
        }
        return found | {"notes": self.notes}

    def text(self) -> str:
        """The table, the averages beside the baselines, and the confusion matrix."""
        scores = self.scores
        n = int(scores.confusion.sum())
        lines = [f"{self.name}: {counted(n, 'text')}, {counted(len(scores.rows), 'label')}", ""]
        lines += _table("", scores.rows, "texts", {"": scores.averages}, micro="accuracy")
        rows = {
            "accuracy": [s.accuracy for s in self._all()],
            "F1, macro": [s.averages.macro.f1 for s in self._all()],
            "F1, weighted": [s.averages.weighted.f1 for s in self._all()],
            "MCC": [s.mcc for s in self._all()],
        }
        lines += ["", *_beside("Beside what is had for nothing", rows, list(self.baselines))]
        lines += ["", *_confusion(scores)]
        return _finished(lines, self.notes)

    def _all(self) -> list[LabelScores]:
        return [self.scores, *self.baselines.values()]


def label_report(
    gold: Sequence[str],
    predicted: Sequence[str],
    *,
    name: str = "evaluation",
    usual: str | None = None,
    baselines: Mapping[str, Sequence[str]] | None = None,
    notes: Sequence[str] = (),
) -> LabelReport:
    """The report on labels of texts.

    usual: the most frequent label of the training data, which the majority baseline answers with;
    None: that of `gold`, which is the best a constant can do. baselines: the predictions of others.

    Raises as `label_scores`.
    """
    usual = majority(gold) if usual is None else usual
    others = {f"always {usual!r}": [usual] * len(gold), **(baselines or {})}
    return LabelReport(
        name,
        label_scores(gold, predicted),
        {title: label_scores(gold, guesses) for title, guesses in others.items()},
        list(notes),
    )


# --- tags of words --------------------------------------------------------------------------------


@dataclass(frozen=True)
class TagScores:
    """The same tags scored word by word and, where they mark entities, entity by entity."""

    words: LabelScores
    entities: EntityScores | None

    @property
    def without_outside(self) -> Averages:
        """The averages over all tags but O."""
        return self.words.without.get(OUTSIDE, self.words.averages)

    def summary(self) -> dict[str, float]:
        """F1 in four ways, from the one that tells most."""
        entities = {} if self.entities is None else {"entities": self.entities.averages.micro.f1}
        if OUTSIDE not in self.words.rows:
            return entities | {"words, micro = accuracy": self.words.accuracy}
        return entities | {
            "words without O, micro": self.without_outside.micro.f1,
            "words without O, macro": self.without_outside.macro.f1,
            "words with O, micro = accuracy": self.words.accuracy,
        }


@dataclass(frozen=True)
class TagReport:
    """The scores of tags of words, and those of the baselines."""

    name: str
    sentences: int
    scores: TagScores
    baselines: dict[str, TagScores]
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """What metrics.json holds of it."""
        found: dict[str, Any] = {"f1": self.scores.summary()}
        if self.scores.entities is not None:
            found["entities"] = self.scores.entities.as_dict()
        found["words"] = self.scores.words.as_dict()
        found["baselines"] = {name: s.summary() for name, s in self.baselines.items()}
        return found | {"sentences": self.sentences, "notes": self.notes}

    def text(self) -> str:
        """Words and entities, their averages beside the baselines, and what to make of them."""
        words, entities = self.scores.words, self.scores.entities
        total = int(words.confusion.sum())
        title = f"{self.name}: {counted(total, 'word')} in {counted(self.sentences, 'sentence')}"
        if entities is not None:
            title += f", {entities.averages.micro.support:,} entities, tags as {entities.scheme}"
        averages = {"": words.averages}
        if OUTSIDE in words.rows:
            averages = {", without O": self.scores.without_outside, ", with O": words.averages}
        lines = [title, "", *_table("Word by word", words.rows, "words", averages)]
        if entities is not None:
            how = "well formed" if entities.strict else "as conlleval"
            head = f"Entities, {how}"
            lines += ["", *_table(head, entities.rows, "entities", {"": entities.averages})]
        columns = [self.scores.summary(), *(s.summary() for s in self.baselines.values())]
        rows = {key: [column[key] for column in columns] for key in columns[0]}
        lines += ["", *_beside("F1, in brief", rows, list(self.baselines))]
        lines += ["", *self._in_words(), "", *_confusion(words)]
        return _finished(lines, self.notes)

    def _in_words(self) -> list[str]:
        words, entities = self.scores.words, self.scores.entities
        if OUTSIDE not in words.rows:
            return ["The micro average over all tags is the accuracy."]
        share = words.rows[OUTSIDE].support / int(words.confusion.sum())
        said = (
            f"{share:.1%} of the words are O: an average with O in it is high for a model that "
            "finds nothing, and is no measure of what was found."
        )
        if entities is not None:
            said += (
                " An entity is right only as a whole, in type and extent: its F1 is what papers on "
                "named entities report."
            )
        return _wrapped(said)


def tag_report(
    gold: Sequence[Sequence[str]],
    predicted: Sequence[Sequence[str]],
    *,
    name: str = "evaluation",
    usual: str | None = None,
    baselines: Mapping[str, Sequence[Sequence[str]]] | None = None,
    strict: bool = False,
    entities: bool = True,
    notes: Sequence[str] = (),
) -> TagReport:
    """The report on tags of words; entities are scored where the gold tags mark them.

    entities: False where the predicted tags mark none, whatever gold ones do. usual: the most
    frequent tag of the training data; None: that of `gold`. baselines: the tags of others, such as
    `usual_tags`. strict: see `entity_scores`.

    Raises as `label_scores` and `entity_scores`.
    """
    check_as_long(gold, predicted)
    usual = majority([tag for tags in gold for tag in tags]) if usual is None else usual
    others = {f"always {usual}": [[usual] * len(tags) for tags in gold], **(baselines or {})}
    return TagReport(
        name,
        len(gold),
        _tag_scores(gold, predicted, strict, entities),
        {title: _tag_scores(gold, guesses, strict, entities) for title, guesses in others.items()},
        list(notes),
    )


def _tag_scores(
    gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], strict: bool, entities: bool
) -> TagScores:
    check_as_long(gold, predicted)
    flat = ([tag for tags in rows for tag in tags] for rows in (gold, predicted))
    words = label_scores(*flat, without=(OUTSIDE,))
    if not entities or detect(gold) == "plain":
        return TagScores(words, None)
    return TagScores(words, entity_scores(gold, predicted, strict=strict))


# --- generated texts ------------------------------------------------------------------------------


class Written(NamedTuple):
    """A text that a model wrote, and how good it is."""

    source: str  # what it was given
    right: Sequence[str]  # what it should have written: one text, or several that are as good
    text: str
    score: float  # from 0 to 100: chrF of a translation, F1 of the words of an answer


@dataclass(frozen=True)
class GeneratedReport:
    """The scores of translations or answers, and the texts that were scored."""

    name: str
    scores: TranslationScores | AnswerScores
    notes: list[str] = field(default_factory=list)
    written: list[Written] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """What metrics.json holds of it: the scores of all, no texts."""
        return self.scores.as_dict() | {"notes": self.notes}

    def text(self) -> str:
        """A number a line, then some of the texts: the same ones of the same data every time."""
        scores = self.scores
        lines = [f"{self.name}: {counted(scores.count, 'text')}", ""]
        if isinstance(scores, AnswerScores):
            lines += [f"exact match   {scores.exact_match:6.2f}", f"F1 of words   {scores.f1:6.2f}"]
        else:
            lines += _translated(scores)
        for sample in self.samples():
            lines += ["", *_sample(sample)]
        return _finished(lines, self.notes)

    def samples(self, count: int = 5) -> list[Written]:
        """So many texts that were scored, evenly spaced from the first on."""
        n = len(self.written)
        return [self.written[i * n // count] for i in range(count)] if n > count else self.written


def translation_report(
    predicted: Sequence[str],
    references: Sequence[Sequence[str]],
    sources: Sequence[str],
    *,
    name: str = "evaluation",
    notes: Sequence[str] = (),
) -> GeneratedReport:
    """The report on translations; references[i]: those of sources[i], one or several.

    Raises as `translation_scores`.
    """
    scores = translation_scores(predicted, references, sources)
    each = sentence_chrf(predicted, references)
    rows = zip(sources, references, predicted, each, strict=True)
    return GeneratedReport(name, scores, list(notes), [Written(*row) for row in rows])


def _translated(scores: TranslationScores) -> list[str]:
    rows = {
        "BLEU": (scores.bleu, scores.copied),
        "chrF": (scores.chrf, scores.copied_chrf),
        "exact, %": (scores.exact, scores.copied_exact),
    }
    lines = []
    for name, (score, copied) in rows.items():
        beside = "" if copied is None else f"    copying the source: {copied:.2f}"
        lines.append(f"{name:<12}  {score:6.2f}{beside}")
    return [*lines, f"{'sacrebleu':<12}  {scores.signature}"]


def _sample(sample: Written) -> list[str]:
    """A line each, shortened to the width."""
    others = len(sample.right) - 1
    more = f" (or {others} more)" if others > 0 else ""
    room = WIDTH - 12
    right = _short(_on_a_line(sample.right[0] if sample.right else ""), room - len(more)) + more
    return [
        f"  source    {_short(_on_a_line(sample.source), room)}",
        f"  target    {right}",
        f"  written   {_short(_on_a_line(sample.text), room)}",
    ]


def _on_a_line(text: str) -> str:
    return " ".join(text.split())


# --- lines of text --------------------------------------------------------------------------------


def _table(
    title: str,
    rows: Mapping[str, Score],
    unit: str,
    averages: Mapping[str, Averages],
    micro: str = "micro",
) -> list[str]:
    """A line for each row, then the averages, each kind with what its name ends in."""
    names = [f"{kind}{end}" for end in averages for kind in (micro, "macro", "weighted")]
    width = max(map(len, [title, *rows, *names]))
    head = f"{title:<{width}}  precision    recall        F1  {unit:>10}  {'predicted':>10}"
    lines = [head, "-" * len(head)]
    lines += [_row(name, width, row) for name, row in rows.items()]
    for end, average in averages.items():
        lines += ["-" * len(head)]
        kinds = {micro: average.micro, "macro": average.macro, "weighted": average.weighted}
        lines += [_row(f"{kind}{end}", width, row) for kind, row in kinds.items()]
    return lines


def _row(name: str, width: int, row: Score) -> str:
    numbers = f"{row.precision:9.4f} {row.recall:9.4f} {row.f1:9.4f}"
    return f"{name:<{width}}  {numbers}  {row.support:10,}  {row.predicted:10,}"


def _beside(title: str, rows: Mapping[str, Sequence[float]], baselines: Sequence[str]) -> list[str]:
    """A line for each measure: this model, then the baselines."""
    heads = ["this model", *(_short(name, 24) for name in baselines)]
    width = max(map(len, [title, *rows]))
    head = f"{title:<{width}}  " + "  ".join(f"{name:>10}" for name in heads)
    lines = [head, "-" * len(head)]
    for name, values in rows.items():
        cells = (f"{v:{max(10, len(h))}.4f}" for v, h in zip(values, heads, strict=True))
        lines.append(f"{name:<{width}}  " + "  ".join(cells))
    return lines


_WHOLE_MATRIX = 12  # labels; of more, the most frequent confusions are listed


def _confusion(scores: LabelScores) -> list[str]:
    """The matrix where it fits, and else what is most often taken for what."""
    labels, matrix = scores.labels, scores.confusion
    left = max(map(len, labels))
    cell = max(left, len(f"{matrix.max():,}"))
    if len(labels) <= _WHOLE_MATRIX and left + (cell + 2) * len(labels) <= WIDTH:
        lines = ["Confusions: a row for each gold label, a column for each predicted one"]
        lines.append(" " * left + "".join(f"  {label:>{cell}}" for label in labels))
        for label, row in zip(labels, matrix, strict=True):
            lines.append(f"{label:<{left}}" + "".join(f"  {n:{cell},}" for n in row))
        return lines
    pairs = [
        (int(matrix[i, j]), labels[i], labels[j])
        for i in range(len(labels))
        for j in range(len(labels))
        if i != j and matrix[i, j]
    ]
    if not pairs:
        return ["Confusions: none"]
    pairs.sort(key=lambda pair: (-pair[0], pair[1:]))
    lines = ["Confusions, the most frequent: gold → predicted"]
    lines += [f"{n:8,}  {gold} → {guess}" for n, gold, guess in pairs[:10]]
    if len(pairs) > 10:
        rest = sum(n for n, _, _ in pairs[10:])
        lines.append(f"{rest:8,}  in {len(pairs) - 10:,} other ways")
    return lines


def _short(name: str, width: int) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH)


def _finished(lines: Sequence[str], notes: Sequence[str]) -> str:
    said = [line for note in notes for line in _wrapped(f"note: {note}")]
    return "\n".join([*(line.rstrip() for line in lines), *([""] if said else []), *said])
