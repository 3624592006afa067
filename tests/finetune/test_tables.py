"""Which column is what, and how data is called."""

import pytest

from tinygrad_llm.data.tables import Table
from tinygrad_llm.finetune.tables import LABELS, named, title


@pytest.mark.parametrize(
    ("name", "headline"),
    [
        ("'a.tsv'", "a.tsv"),
        ("'a.tsv', held out", "a.tsv, held out"),
        ("'it's.csv', held out", "it's.csv, held out"),
        ("built-in tag, validation", "built-in tag, validation"),
    ],
)
def test_a_headline_has_no_quotes(name, headline):
    assert title(name) == headline


def test_usual_names_come_first_and_then_the_place():
    table = Table("t", ["x", "Class"], [["a", "b"]], [1], has_header=True)
    assert named(table, LABELS, 2, "label", "--label-column") == "Class"
    bare = Table("t", ["1", "2"], [["a", "b"]], [1], has_header=False)
    assert named(bare, LABELS, 2, "label", "--label-column") == 2
    other = Table("t", ["x", "y"], [["a", "b"]], [1], has_header=True)
    with pytest.raises(ValueError, match=r"which column is the label.*--label-column.*'x', 'y'"):
        named(other, LABELS, 2, "label", "--label-column")
