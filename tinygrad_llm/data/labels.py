"""Labels ↔ ids, and the ways in which tags mark where an entity begins and ends.

    words       Alex    is      going   to      Los     Angeles   Paris
    IOB1        I-PER   O       O       O       I-LOC   I-LOC     B-LOC    B- parts two that touch
    BIO (IOB2)  B-PER   O       O       O       B-LOC   I-LOC     B-LOC    B- begins each
    BIOES       S-PER   O       O       O       B-LOC   E-LOC     S-LOC    E- ends, S- is alone
    BILOU       U-PER   O       O       O       B-LOC   L-LOC     U-LOC    BIOES by other letters

'plain' is all else, such as parts of speech: every tag stands for itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from tinygrad_llm.data.loader import IGNORE_INDEX
from tinygrad_llm.data.tables import counted

Scheme = Literal["IOB1", "BIO", "BIOES", "BILOU", "plain"]
SCHEMES: tuple[Scheme, ...] = ("IOB1", "BIO", "BIOES", "BILOU", "plain")

OUTSIDE = "O"


class LabelSet:
    """id = the place of the label among the sorted distinct labels of the training data.

    {'O': 2, 'B-PER': 0, 'I-PER': 1}: the same data gives the same ids in whatever order it stands.
    Whole numbers are sorted as numbers: '2' before '10'.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self.ids = {name: i for i, name in enumerate(self.names)}
        if not self.names or len(self.ids) != len(self.names):
            raise ValueError(f"expected labels that are all different, got {list(self.names)}")

    @classmethod
    def of(cls, labels: Iterable[str]) -> LabelSet:
        """The set of the labels of training data; ValueError where there are none."""
        distinct = set(labels)
        if not distinct:
            raise ValueError("expected training data with labels, got none")
        numbers = all(label.removeprefix("-").isdecimal() for label in distinct)
        return cls(sorted(distinct, key=lambda label: (int(label) if numbers else 0, label)))

    @classmethod
    def of_tags(cls, sentences: Iterable[Sequence[str]]) -> LabelSet:
        """The set of the tags of sentences; ValueError where there are none."""
        return cls.of(tag for tags in sentences for tag in tags)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, label: object) -> bool:
        return label in self.ids

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LabelSet) and self.names == other.names

    def __hash__(self) -> int:
        return hash(self.names)

    def __repr__(self) -> str:
        return f"LabelSet({list(self.names)})"

    def encode(
        self,
        labels: Sequence[str],
        *,
        name: str = "the data",
        lines: Sequence[int] | None = None,
        ignore_unseen: bool = False,
    ) -> np.ndarray:
        """The ids, int64 of shape (N,).

        Raises ValueError for labels that training has never shown: which, where and how many
        (`lines[i]` is the line of label i in the file `name`). With `ignore_unseen` they become
        `IGNORE_INDEX`: no model can learn or give them, and a score must still count them as missed
        (it compares the labels themselves, not these ids).
        """
        unseen = None if ignore_unseen else self.unseen(labels, name=name, lines=lines)
        if unseen:
            raise ValueError(unseen)
        return np.array([self.ids.get(label, IGNORE_INDEX) for label in labels], np.int64)

    def unseen(
        self, labels: Sequence[str], *, name: str = "the data", lines: Sequence[int] | None = None
    ) -> str | None:
        """The sentence on the labels that are not in the set; None where there are none."""
        counts = Counter(label for label in labels if label not in self.ids)
        if not counts:
            return None
        said = []
        for label, n in counts.most_common(5):
            first = next(i for i, other in enumerate(labels) if other == label)
            where = f"number {first + 1}" if lines is None else f"in line {lines[first]}"
            said.append(f"{label!r} ({n:,} of {len(labels):,}, the first {where})")
        more = f" and {len(counts) - 5} more" if len(counts) > 5 else ""
        known = ", ".join(map(repr, self.names[:12])) + (", …" if len(self.names) > 12 else "")
        what = "a label" if len(counts) == 1 else "labels"
        return (
            f"{name} has {what} that the training data never shows: {', '.join(said)}{more}; "
            f"training has {known}"
        )

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The labels of the ids."""
        return [self.names[i] for i in ids]

    def weights(self, labels: Iterable[str]) -> np.ndarray:
        """w_c = N / (C · n_c), float32 of shape (C,): every class weighs the same in all.

        The 'balanced' weights of scikit-learn. Raises ValueError for a label of the set that
        `labels` does not have.
        """
        counts = Counter(labels)
        if missing := [name for name in self.names if not counts[name]]:
            raise ValueError(f"no weight for {missing[0]!r}: there is no example of it")
        n = np.array([counts[name] for name in self.names], np.float32)
        return n.sum() / (len(n) * n)

    def config(self) -> dict[str, dict[str, str] | dict[str, int]]:
        """{'id2label': …, 'label2id': …}: how a Hugging Face config.json holds it."""
        return {
            "id2label": {str(i): name for i, name in enumerate(self.names)},
            "label2id": dict(self.ids),
        }


# --- spans ----------------------------------------------------------------------------------------


class Span(NamedTuple):
    """words[start:stop] is an entity of this type."""

    start: int
    stop: int
    type: str


def parse(tag: str) -> tuple[str, str]:
    """'B-PER' -> ('B', 'PER'), 'O' -> ('O', ''); ValueError for what is no such tag."""
    if tag == OUTSIDE:
        return OUTSIDE, ""
    prefix, dash, kind = tag.partition("-")
    if prefix not in _LETTERS or (dash and not kind) or (not dash and kind):
        raise ValueError(
            f"the tag {tag!r} is not 'O' and does not begin with B-, I-, E-, S-, L- or U-"
        )
    return prefix, kind


_LETTERS = frozenset("BIESLU")
_AS_BIOES = {"L": "E", "U": "S"}


def spans(tags: Sequence[str]) -> list[Span]:
    """The entities that tags of any scheme mark, as conlleval reads them.

    It never refuses a tag for its place. With p before t, types equal unless said, an entity

        begins at t     t is B or S; t is I or E and p is O, E or S; t is not O and has another type
        ends after p    p is E or S; t is O, B or S; t has another type

    so that 'O I-PER' begins one, as IOB1 writes it and as a model may in BIO. `strict_spans` leaves
    out what is not well formed.

    Raises ValueError as `parse`.
    """
    found: list[Span] = []
    start, before, kind_before = -1, OUTSIDE, ""
    for i, tag in enumerate([*tags, OUTSIDE]):
        letter, kind = parse(tag)
        letter = _AS_BIOES.get(letter, letter)
        other = kind != kind_before
        ends = before in "ES" or letter in "OBS" or other
        if before != OUTSIDE and ends:
            found.append(Span(start, i, kind_before))
        if letter != OUTSIDE and (letter in "BS" or before in "OES" or other):
            start = i
        before, kind_before = letter, kind
    return found


def strict_spans(tags: Sequence[str], scheme: Scheme) -> list[Span]:
    """The entities that are well formed in this scheme: those that it would write just so.

    BIO: I-X that follows neither B-X nor I-X is no entity. BIOES: also one that does not end in E-
    or S-. IOB1: B-X stands only behind an entity of type X. Raises ValueError as `parse`.
    """
    parsed = [parse(tag) for tag in tags]
    if scheme == "IOB1":
        return [span for span in spans(tags) if _is_iob1(parsed, span)]
    return [span for span in spans(tags) if _is_written(parsed, span, scheme)]


def _is_written(parsed: Sequence[tuple[str, str]], span: Span, scheme: Scheme) -> bool:
    return [letter for letter, _ in parsed[span.start : span.stop]] == _letters(span, scheme)


def _is_iob1(parsed: Sequence[tuple[str, str]], span: Span) -> bool:
    letters = [letter for letter, _ in parsed[span.start : span.stop]]
    touches = span.start > 0 and parsed[span.start - 1][1] == span.type
    touches = touches and parsed[span.start - 1][0] != OUTSIDE
    return letters == (["B"] if touches else ["I"]) + ["I"] * (len(letters) - 1)


def _letters(span: Span, scheme: Scheme) -> list[str]:
    """What stands before the dashes of this entity: BIO, three words -> ['B', 'I', 'I']."""
    n = span.stop - span.start
    if scheme == "BIO":
        return ["B"] + ["I"] * (n - 1)
    begin, inside, end, alone = "BIES" if scheme == "BIOES" else "BILU"
    return [alone] if n == 1 else [begin] + [inside] * (n - 2) + [end]


def from_spans(found: Iterable[Span], length: int, scheme: Scheme) -> list[str]:
    """The tags of a sentence of `length` words with these entities, which do not overlap.

    Raises ValueError for spans that overlap or reach out of the sentence, and for 'plain'.
    """
    if scheme == "plain":
        raise ValueError("expected the scheme IOB1, BIO, BIOES or BILOU, got 'plain'")
    tags = [OUTSIDE] * length
    stop, kind = 0, None
    for span in sorted(found):
        if not stop <= span.start < span.stop <= length:
            raise ValueError(f"{span} overlaps another one or lies outside of 0 … {length}")
        if scheme == "IOB1":
            touches = span.start == stop and span.type == kind
            letters = ["B" if touches else "I"] + ["I"] * (span.stop - span.start - 1)
        else:
            letters = _letters(span, scheme)
        dash = f"-{span.type}" if span.type else ""
        tags[span.start : span.stop] = [letter + dash for letter in letters]
        stop, kind = span.stop, span.type
    return tags


def convert(tags: Sequence[str], scheme: Scheme) -> list[str]:
    """The same entities in another scheme, read by `spans`: ['I-PER', 'O'] -> ['B-PER', 'O'].

    Raises ValueError as `parse` and for the scheme 'plain'.
    """
    return from_spans(spans(tags), len(tags), scheme)


def detect(sentences: Iterable[Sequence[str]]) -> Scheme:
    """The scheme in which these tags are written.

    L- or U-: BILOU; E- or S-: BIOES. With B- and I- alone: BIO, unless an I- begins an entity and
    all is well formed as IOB1, where B- stands only behind an entity of its type. 'plain' where a
    tag is neither 'O' nor has such a prefix, and where nothing but 'O' is there.
    """
    letters: set[str] = set()
    bio = iob1 = True
    for tags in sentences:
        try:
            letters.update(parse(tag)[0] for tag in tags)
        except ValueError:
            return "plain"
        bio = bio and not _broken(tags, "BIO")
        iob1 = iob1 and not _broken(tags, "IOB1")
    if letters <= {OUTSIDE}:
        return "plain"
    if letters & {"L", "U"} and not letters & {"E", "S"}:
        return "BILOU"
    if letters & {"E", "S"}:
        return "BIOES"
    return "IOB1" if iob1 and not bio else "BIO"


class Fault(NamedTuple):
    """Tag `tag` at word `word` of sentence `sentence`, both from 0, is not as the scheme writes."""

    sentence: int
    word: int
    tag: str


def faults(sentences: Sequence[Sequence[str]], scheme: Scheme) -> list[Fault]:
    """The entities whose tags are not well formed in the scheme, each by its first wrong tag.

    [['O', 'I-PER']] in BIO -> [Fault(0, 1, 'I-PER')]: it should be B-PER. `convert` mends them.
    """
    if scheme == "plain":
        return []
    return [
        Fault(i, word, tags[word])
        for i, tags in enumerate(sentences)
        for word in _broken(tags, scheme)
    ]


def _broken(tags: Sequence[str], scheme: Scheme) -> list[int]:
    """Where in each entity the first tag stands that the scheme would write otherwise."""
    found = spans(tags)
    right = from_spans(found, len(tags), scheme)
    differ = [next((i for i in range(s.start, s.stop) if tags[i] != right[i]), -1) for s in found]
    return [i for i in differ if i >= 0]


def fault_note(
    sentences: Sequence[Sequence[str]],
    scheme: Scheme,
    *,
    name: str = "the data",
    lines: Sequence[int] | None = None,
) -> str | None:
    """The sentence on tags that are not well formed; None where all are.

    lines[i]: where sentence i begins in the file, a word per line.
    """
    found = faults(sentences, scheme)
    if not found:
        return None
    sentence, word, tag = found[0]
    where = f"word {word + 1} of sentence {sentence + 1}"
    if lines is not None:
        where = f"line {lines[sentence] + word}"
    return (
        f"{name}: {counted(len(found), 'entity').replace('entitys', 'entities')} not as {scheme} "
        f"writes them, the first with {tag!r} in {where}; read as conlleval does"
    )
