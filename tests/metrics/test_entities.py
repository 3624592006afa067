"""Entity scores are conlleval's: against its own way of counting, and against seqeval."""

import importlib
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm.data.labels import Scheme, convert, spans
from tinygrad_llm.metrics.entities import entity_scores

# --- conlleval, as the script does it: one pass over both columns, no spans -----------------------


def chunk_ends(before: tuple[str, str], tag: tuple[str, str]) -> bool:
    (p, pt), (t, tt) = before, tag
    listed = {"BB", "BS", "BO", "IB", "IS", "IO", "EE", "EI", "EO", "ES", "EB"}
    listed |= {"SB", "SI", "SE", "SO", "SS"}
    return p + t in listed or (p != "O" and pt != tt)


def chunk_starts(before: tuple[str, str], tag: tuple[str, str]) -> bool:
    (p, pt), (t, tt) = before, tag
    listed = {"EE", "EI", "OE", "OI", "SE", "SI"}
    return t in "BS" or p + t in listed or (t != "O" and pt != tt)


def conlleval(gold: list[list[str]], predicted: list[list[str]]) -> tuple[Counter, ...]:
    """(right, predicted, gold) by type: an entity is right if both begin and both end together."""
    right, found, there = Counter(), Counter(), Counter()
    outside = ("O", "")
    for tags, guesses in zip(gold, predicted, strict=True):
        in_correct = None
        last_true = last_guess = outside
        for true_tag, guess_tag in zip([*tags, "O"], [*guesses, "O"], strict=True):
            true, guess = ((t[0], t[2:]) for t in (true_tag, guess_tag))
            if in_correct is not None:
                ends = chunk_ends(last_true, true), chunk_ends(last_guess, guess)
                if all(ends):
                    right[in_correct] += 1
                if any(ends):
                    in_correct = None
            starts = chunk_starts(last_true, true), chunk_starts(last_guess, guess)
            if all(starts) and true[1] == guess[1]:
                in_correct = true[1]
            there[true[1]] += starts[0]
            found[guess[1]] += starts[1]
            last_true, last_guess = true, guess
    return right, found, there


LETTERS = {"IOB1": "BI", "BIO": "BI", "BIOES": "BIES"}


@st.composite
def taggings(draw: st.DrawFn) -> tuple[list[list[str]], list[list[str]], Scheme]:
    """Gold tags, well formed in a scheme, and any tags as predictions."""
    schemes: list[Scheme] = ["IOB1", "BIO", "BIOES"]
    scheme = draw(st.sampled_from(schemes))
    tag = st.sampled_from(["O", *(f"{p}-{t}" for p in LETTERS[scheme] for t in "XY")])
    pairs = draw(st.lists(st.lists(st.tuples(tag, tag), max_size=8), min_size=1, max_size=4))
    gold = [convert([a for a, _ in row], scheme) for row in pairs]
    return gold, [[b for _, b in row] for row in pairs], scheme


@given(taggings())
def test_counts_are_those_of_conlleval(example: tuple[list[list[str]], list[list[str]], Scheme]):
    gold, predicted, scheme = example
    right, found, there = conlleval(gold, predicted)
    scores = entity_scores(gold, predicted, scheme=scheme)
    assert set(scores.rows) == {t for t in "XY" if found[t] or there[t]}
    for kind, row in scores.rows.items():
        assert (row.predicted, row.support) == (found[kind], there[kind])
        assert row.precision == pytest.approx(right[kind] / max(found[kind], 1))
        assert row.recall == pytest.approx(right[kind] / max(there[kind], 1))
    total = right.total()
    micro = scores.averages.micro
    assert micro.f1 == pytest.approx(2 * total / max(found.total() + there.total(), 1))


@given(taggings())
def test_seqeval_gives_the_same(example: tuple[list[list[str]], list[list[str]], Scheme]):
    default_mode: Any = pytest.importorskip("seqeval.metrics.sequence_labeling")
    strict_mode: Any = importlib.import_module("seqeval.metrics.v1")
    schemes: Any = importlib.import_module("seqeval.scheme")
    gold, predicted, scheme = example
    scores = entity_scores(gold, predicted, scheme=scheme)
    if not scores.rows:  # nothing there at all: seqeval fails on it
        return
    same(default_mode.precision_recall_fscore_support(gold, predicted, zero_division=0), scores)
    if scheme != "IOB1":  # there seqeval loses an I-X behind B-Y
        kind = {"BIO": schemes.IOB2, "BIOES": schemes.IOBES}[scheme]
        strict = entity_scores(gold, predicted, scheme=scheme, strict=True)
        if strict.rows:
            score = strict_mode.precision_recall_fscore_support
            same(score(gold, predicted, scheme=kind, zero_division=0), strict)


def same(theirs: Any, ours: Any) -> None:
    rows = list(ours.rows.values())
    for i, name in enumerate(("precision", "recall", "f1", "support")):
        assert list(theirs[i]) == pytest.approx([getattr(row, name) for row in rows]), name


# --- by hand --------------------------------------------------------------------------------------


def test_the_example_of_the_docstring():
    scores = entity_scores([["B-PER", "I-PER", "O", "B-LOC"]], [["B-PER", "O", "O", "B-LOC"]])
    micro = scores.averages.micro
    assert (micro.precision, micro.recall, micro.f1) == (0.5, 0.5, 0.5)
    assert scores.rows["LOC"].f1 == 1.0
    assert scores.rows["PER"].f1 == 0.0
    assert scores.scheme == "BIO"


def test_averages_are_those_of_the_rows():
    gold = [["B-A"], ["B-A"], ["B-A"], ["B-B"]]
    scores = entity_scores(gold, [["B-A"], ["B-A"], ["B-B"], ["B-B"]])
    a, b = scores.rows["A"], scores.rows["B"]
    assert scores.averages.macro.f1 == (a.f1 + b.f1) / 2
    assert scores.averages.weighted.f1 == pytest.approx((3 * a.f1 + b.f1) / 4)
    assert scores.averages.micro.f1 == 0.75
    assert scores.averages.macro.support == 4


def test_the_same_entities_score_the_same_in_every_scheme():
    gold = [["B-X", "I-X", "B-X", "O", "B-Y"]]
    guess = [["B-X", "I-X", "O", "B-X", "B-Y"]]
    expected = entity_scores(gold, guess).averages
    schemes: tuple[Scheme, ...] = ("IOB1", "BIOES", "BILOU")
    for scheme in schemes:
        written = [[convert(tags, scheme) for tags in rows] for rows in (gold, guess)]
        found = entity_scores(written[0], written[1], scheme=scheme)
        assert found.averages == expected
        assert entity_scores(*written, scheme=scheme, strict=True).averages == expected


def test_strict_does_not_count_what_is_not_well_formed():
    gold, guess = [["O", "B-X", "I-X"]], [["O", "I-X", "I-X"]]
    assert entity_scores(gold, guess).averages.micro.f1 == 1.0
    strict = entity_scores(gold, guess, strict=True)
    assert strict.averages.micro.predicted == 0
    assert strict.averages.micro.f1 == 0.0
    assert "well-formed" in strict.as_dict()["counted"]


def test_gold_without_entities():
    scores = entity_scores([["O", "O"], []], [["O", "B-X"], []])
    assert scores.rows["X"].support == 0
    assert scores.averages.micro.precision == 0.0
    assert entity_scores([["O"]], [["O"]]).averages.macro.f1 == 0.0


def test_what_cannot_be_scored():
    with pytest.raises(ValueError, match="expected tags for 1 sentences, got 2"):
        entity_scores([["O"]], [["O"], ["O"]])
    with pytest.raises(ValueError, match="sentence 2 has 1 words but 2 predicted tags"):
        entity_scores([["O"], ["O"]], [["O"], ["O", "O"]])
    with pytest.raises(ValueError, match="mark no entities"):
        entity_scores([["NN"]], [["NN"]])
    with pytest.raises(ValueError, match="'NN' is not 'O'"):
        entity_scores([["B-X"]], [["NN"]])


def test_spans_of_a_long_sentence_are_found_once():
    tags = ["B-X", "I-X"] * 500
    assert len(spans(tags)) == 500
