"""Scores of whole entities: one is right when its type, its first and its last word are right.

    gold        B-PER I-PER O B-LOC        2 entities
    predicted   B-PER O     O B-LOC        2, of which 1 is right: P = R = F1 = 0.5

These are the numbers of the CoNLL shared tasks' script, conlleval, on IOB1, BIO, BIOES and BILOU:
gold and prediction are both read by `data.labels.spans`, which takes every tag where it stands, so
that in BIO an I-X behind O begins an entity. With `strict` such an entity does not count as
predicted: only what is well formed in the scheme does (seqeval's mode='strict').

Tjong Kim Sang and De Meulder, CoNLL 2003.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tinygrad_llm.data.labels import Scheme, Span, detect, spans, strict_spans
from tinygrad_llm.metrics.scores import Averages, Score


@dataclass(frozen=True)
class EntityScores:
    """A row for each type of entity, in the order of their names, and the averages of the rows."""

    rows: dict[str, Score]
    averages: Averages
    scheme: Scheme
    strict: bool

    def as_dict(self) -> dict[str, Any]:
        """What JSON holds of it."""
        rows = {name: row.as_dict() for name, row in self.rows.items()}
        how = "well-formed entities only" if self.strict else "as conlleval"
        return {"scheme": self.scheme, "counted": how, "types": rows} | self.averages.as_dict()


def entity_scores(
    gold: Sequence[Sequence[str]],
    predicted: Sequence[Sequence[str]],
    *,
    scheme: Scheme | None = None,
    strict: bool = False,
) -> EntityScores:
    """The scores of the tags of sentences, word for word.

    scheme: None, as `data.labels.detect` finds it in the gold tags; it matters with `strict` alone.

    Raises ValueError where the sentences are not as many or as long, for tags without B- or I-
    ('plain'), which mark no entities, and for a predicted tag that is none of these.
    """
    check_as_long(gold, predicted)
    scheme = detect(gold) if scheme is None else scheme
    if scheme == "plain" and any(tag != "O" for tags in gold for tag in tags):
        raise ValueError(
            "these tags mark no entities, for they do not begin with B-, I-, E- or S-: score them "
            "word by word"
        )
    read = _reader(scheme, strict)
    right: Counter[str] = Counter()
    found: Counter[str] = Counter()
    there: Counter[str] = Counter()
    for tags, guesses in zip(gold, predicted, strict=True):
        truth, guess = set(read(tags)), set(read(guesses))
        there.update(span.type for span in truth)
        found.update(span.type for span in guess)
        right.update(span.type for span in truth & guess)
    types = sorted(there.keys() | found.keys())
    rows = {name: Score.of(right[name], found[name], there[name]) for name in types}
    return EntityScores(rows, Averages.of(rows, right.total()), scheme, strict)


def _reader(scheme: Scheme, strict: bool) -> Callable[[Sequence[str]], list[Span]]:
    if not strict or scheme == "plain":  # plain: nothing but O in the gold tags
        return spans
    return lambda tags: strict_spans(tags, scheme)


def check_as_long(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> None:
    """Refuse sentences that do not belong together."""
    if len(gold) != len(predicted):
        raise ValueError(f"expected tags for {len(gold):,} sentences, got {len(predicted):,}")
    for i, (tags, guesses) in enumerate(zip(gold, predicted, strict=True)):
        if len(tags) != len(guesses):
            raise ValueError(
                f"sentence {i + 1} has {len(tags)} words but {len(guesses)} predicted tags"
            )
