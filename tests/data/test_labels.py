"""Label sets, and entities in the four schemes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm.data import labels
from tinygrad_llm.data.labels import (
    LabelSet,
    Scheme,
    Span,
    convert,
    detect,
    fault_note,
    faults,
    from_spans,
    parse,
    spans,
    strict_spans,
)

ENTITY_SCHEMES: list[Scheme] = ["IOB1", "BIO", "BIOES", "BILOU"]

WORDS = 7
EXAMPLE = [Span(0, 1, "PER"), Span(4, 6, "LOC"), Span(6, 7, "LOC")]
WRITTEN: dict[Scheme, str] = {
    "IOB1": "I-PER O O O I-LOC I-LOC B-LOC",
    "BIO": "B-PER O O O B-LOC I-LOC B-LOC",
    "BIOES": "S-PER O O O B-LOC E-LOC S-LOC",
    "BILOU": "U-PER O O O B-LOC L-LOC U-LOC",
}


# --- label sets -----------------------------------------------------------------------------------


def test_labels_are_sorted_whatever_their_order():
    assert LabelSet.of(["b", "a", "b", "O"]).names == ("O", "a", "b")
    assert LabelSet.of(["b", "O", "a"]) == LabelSet.of(["a", "b", "O"])
    assert LabelSet.of(["10", "2", "-1"]).names == ("-1", "2", "10")
    assert LabelSet.of_tags([["O"], [], ["B-X", "O"]]).names == ("B-X", "O")


def test_encode_and_decode():
    known = LabelSet.of(["neg", "pos"])
    ids = known.encode(["pos", "neg", "pos"])
    assert ids.tolist() == [1, 0, 1]
    assert ids.dtype == np.int64
    assert known.decode(ids) == ["pos", "neg", "pos"]
    assert known.config() == {
        "id2label": {"0": "neg", "1": "pos"},
        "label2id": {"neg": 0, "pos": 1},
    }


def test_an_unseen_label_is_named_with_its_place_and_number():
    known = LabelSet.of(["neg", "pos"])
    given_labels = ["pos", "mixed", "neg", "mixed", "new"]
    with pytest.raises(ValueError, match="never shows") as info:
        known.encode(given_labels, name="'dev.tsv'", lines=[2, 3, 4, 6, 7])
    why = str(info.value)
    assert "'mixed' (2 of 5, the first in line 3)" in why
    assert "'new' (1 of 5, the first in line 7)" in why
    assert "training has 'neg', 'pos'" in why
    assert "number 2" in (known.unseen(given_labels) or "")
    assert known.encode(given_labels, ignore_unseen=True).tolist() == [1, -100, 0, -100, -100]
    assert known.unseen(["pos"]) is None


def test_sets_that_cannot_be():
    with pytest.raises(ValueError, match="got none"):
        LabelSet.of([])
    with pytest.raises(ValueError, match="all different"):
        LabelSet(["a", "a"])


def test_weights_are_balanced():
    known = LabelSet.of(["a", "b"])
    weights = known.weights(["a", "a", "a", "b"])
    np.testing.assert_allclose(weights, [4 / 6, 2.0])
    np.testing.assert_allclose((weights * [3, 1]).sum(), 4)
    with pytest.raises(ValueError, match="no example of it"):
        known.weights(["a"])


# --- schemes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ENTITY_SCHEMES)
def test_the_example_in_each_scheme(scheme: Scheme):
    tags = WRITTEN[scheme].split()
    assert spans(tags) == EXAMPLE
    assert strict_spans(tags, scheme) == EXAMPLE
    assert from_spans(EXAMPLE, WORDS, scheme) == tags
    assert detect([["O"], tags, []]) == scheme
    assert faults([tags], scheme) == []


def test_tags_that_begin_with_i():
    tags = ["O", "I-PER", "I-LOC", "I-LOC"]
    assert spans(tags) == [Span(1, 2, "PER"), Span(2, 4, "LOC")]
    assert strict_spans(tags, "BIO") == []
    assert detect([tags]) == "IOB1"
    assert convert(tags, "BIO") == ["O", "B-PER", "B-LOC", "I-LOC"]
    # Beside a B- that IOB1 would not write, it is a fault in BIO.
    rows = [["B-PER", "I-PER"], tags]
    assert detect(rows) == "BIO"
    assert faults(rows, "BIO") == [(1, 1, "I-PER"), (1, 2, "I-LOC")]
    note = fault_note(rows, "BIO", name="'a.conll'", lines=[1, 4])
    assert note is not None
    assert "2 entities not as BIO writes them, the first with 'I-PER' in line 5" in note
    assert fault_note([["O"]], "BIO") is None


def test_detect_what_marks_no_entities():
    assert detect([["NN", "VB"]]) == "plain"
    assert detect([["O", "O"]]) == "plain"
    assert detect([["B-X", "E-X"], ["O", "Z-X"]]) == "plain"
    assert detect([["B-X", "E-X"], ["I-X"]]) == "BIOES"


@pytest.mark.parametrize("tag", ["NN", "B-", "X-PER", "", "-", "BPER"])
def test_what_is_no_tag(tag: str):
    with pytest.raises(ValueError, match="does not begin with"):
        parse(tag)


def test_a_type_may_have_dashes_or_be_missing():
    assert parse("B-art-film") == ("B", "art-film")
    assert spans(["B", "I", "O"]) == [Span(0, 2, "")]
    assert from_spans([Span(0, 2, "")], 3, "BIO") == ["B", "I", "O"]


def test_spans_that_cannot_be_written():
    with pytest.raises(ValueError, match="overlaps"):
        from_spans([Span(0, 2, "X"), Span(1, 3, "Y")], 3, "BIO")
    with pytest.raises(ValueError, match="outside"):
        from_spans([Span(2, 4, "X")], 3, "BIO")
    with pytest.raises(ValueError, match="'plain'"):
        from_spans([], 3, "plain")


@st.composite
def sentences(draw: st.DrawFn) -> tuple[list[Span], int]:
    """Entities of a sentence that do not overlap, and how long it is."""
    found, at = [], 0
    for gap, length, kind in draw(
        st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3), st.sampled_from("XY")), max_size=6)
    ):
        found.append(Span(at + gap, at + gap + length, kind))
        at += gap + length
    return found, at + draw(st.integers(0, 2))


@given(sentences(), st.sampled_from(ENTITY_SCHEMES), st.sampled_from(ENTITY_SCHEMES))
def test_every_scheme_says_the_same(example: tuple[list[Span], int], a: Scheme, b: Scheme):
    found, length = example
    tags = from_spans(found, length, a)
    assert spans(tags) == strict_spans(tags, a) == found
    assert convert(convert(tags, b), a) == tags


TAGS = st.sampled_from(["O", *(f"{p}-{t}" for p in "BIES" for t in "XY")])


@given(st.lists(TAGS, max_size=8), st.sampled_from(ENTITY_SCHEMES))
def test_any_tags_are_read_and_mended(tags: list[str], scheme: Scheme):
    found = spans(tags)
    covered = [i for span in found for i in range(span.start, span.stop)]
    assert covered == [i for i, tag in enumerate(tags) if tag != "O"]  # each once, in order
    mended = convert(tags, scheme)
    assert spans(mended) == found
    assert faults([mended], scheme) == []
    assert set(strict_spans(tags, scheme)) <= set(found)
    assert (faults([tags], scheme) == []) is (mended == tags)


def test_the_schemes_are_listed():
    assert set(labels.SCHEMES) == {*ENTITY_SCHEMES, "plain"}
