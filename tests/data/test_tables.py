"""Tables: what is read from CSV, TSV and JSONL, and one sentence for what cannot be."""

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm.data import tables
from tinygrad_llm.data.tables import Table, read_table


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder, a fresh one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(name: str, content: str | bytes, **options: bool) -> Table:
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return read_table(name, **options)


def refusal(name: str, content: str | bytes, **options: bool) -> str:
    """The one sentence with which a file is refused."""
    with pytest.raises(ValueError, match=r".") as info:
        table(name, content, **options)
    assert "\n" not in str(info.value)
    return str(info.value)


# --- CSV ------------------------------------------------------------------------------------------


def test_csv_with_header_quotes_and_a_line_end_inside_of_them():
    found = table("a.csv", '\ufefflabel,review\r\n1,"a ""b"", c\r\nd"\r\n\r\n0,e\r\n')
    assert found.columns == ["label", "review"]
    assert found.rows == [["1", 'a "b", c\nd'], ["0", "e"]]
    assert found.lines == [2, 5]


def test_csv_between_semicolons_and_tabs_is_seen_and_said():
    for delimiter, what in ((";", "semicolons"), ("\t", "tabs")):
        found = table("a.csv", f"text{delimiter}label\nx, y{delimiter}1\n".replace(", ", " "))
        assert found.rows == [["x y", "1"]]
        assert what in found.notes[0]


def test_an_open_quote_is_named_by_the_line_where_its_row_begins():
    why = refusal("a.csv", 'text,label\nfine,1\n"open,0\nnext,1\n')
    assert "line 3 of 'a.csv'" in why
    assert "never closed" in why


def test_letters_behind_a_closing_quote_are_an_error_and_not_dropped():
    assert "line 2 of 'a.csv' is broken" in refusal("a.csv", 'text,label\n"a" b,1\n')


def test_a_field_longer_than_the_csv_module_likes():
    before = csv.field_size_limit()
    text = "x" * (before + 1)
    assert table("a.csv", f'text,label\n"{text}",1\n').rows == [[text, "1"]]
    assert csv.field_size_limit() == before


def test_a_row_with_another_number_of_fields_is_an_error_with_its_line():
    why = refusal("a.csv", "text,label\na,1\n\nb, c,0\n")
    assert "line 4 of 'a.csv' has 3 fields, expected 2 as in line 1" in why
    assert "double quotes" in why
    assert "line 2 of 'a.tsv' has 1 field, expected 2" in refusal("a.tsv", "a\t1\nb\n")


# --- TSV ------------------------------------------------------------------------------------------


def test_quotes_in_a_tsv_are_letters_as_in_mrpc():
    lines = 'Quality\tString\r\n1\tthe "witness", he\r\n0\t"No," she said\r\n1\t"whole"\r\n'
    found = table("a.tsv", "\ufeff" + lines)
    assert found.columns == ["Quality", "String"]
    assert [row[1] for row in found.rows] == ['the "witness", he', '"No," she said', '"whole"']


@pytest.mark.parametrize(
    ("content", "evident"),
    [
        ('"id"\t"text"\n1\t"x"\n', True),
        ('1\t"a ""b"" c"\n', True),
        ('1\t"whole"\n', False),
        ('1\t"a ""b"" c"\n2\the said "no"\n', False),
        ('1\t"The Matrix" is good\n', False),
        ("1\tno quote\n", False),
    ],
)
def test_when_quotes_of_a_tsv_enclose_fields(content: str, evident: bool):
    assert tables.quoting_is_evident(content.splitlines()) is evident


def test_quoting_can_be_said():
    content = 'text\tlabel\n"a\tb"\t1\n'
    assert "say so (--quoted)" in refusal("a.tsv", content)
    assert table("a.tsv", content, quoted=True).rows == [["a\tb", "1"]]
    assert table("a.csv", '"a",1\n', quoted=False, header=False).rows == [['"a"', "1"]]


def test_only_line_feeds_end_a_line():
    found = table("a.tsv", "a\u2028b\x0cc\x85d\t1\ne\t0\n")
    assert found.rows == [["a\u2028b\x0cc\x85d", "1"], ["e", "0"]]
    assert table("b.tsv", "a\t1\rb\t0\r").rows == [["a", "1"], ["b", "0"]]


def test_blank_lines_are_passed_over_and_counted():
    found = table("a.tsv", "\na\t1\n \nb\t0\n\n")
    assert (found.lines, len(found)) == ([2, 4], 2)
    assert found.notes == ["'a.tsv': passed over 3 blank lines"]


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=8)


@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=6))
def test_what_the_csv_module_writes_is_read_back(rows: list[tuple[str, str]]):
    with Path("law.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("x", "y"), *rows])
    assert read_table("law.csv", header=True).rows == [list(row) for row in rows]


# --- headers and columns --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "rest", "is_header"),
    [
        ("label,review", ["1,good", "0,bad"], True),  # a known word
        ("stars,body", ["1,good", "0,bad"], True),  # a name over numbers
        ("mood,body", ["joy,a", "joy,b", "fear,c", "joy,d", "fear,e", "joy,f"], True),
        ("joy,a", ["joy,b", "fear,c", "joy,d", "fear,e", "joy,f", "joy,g"], False),
        ("good,1", ["bad,0", "fine,1"], False),  # numbers are no names
        ("Go.,Va !", ["Hi.,Salut", "Run.,Cours"], False),  # nothing tells it from the rest
        ("text,text", ["a,b", "c,d"], False),  # names are distinct
        ("text,label", [], False),  # nothing but a header would be no data
    ],
)
def test_what_looks_like_a_header(first: str, rest: list[str], is_header: bool):
    found = table("a.csv", "\n".join([first, *rest]))
    assert found.has_header is is_header
    assert any("for a header" in note for note in found.notes) is is_header
    assert table("a.csv", f"{first}\n{first}", header=False).rows == [first.split(",")] * 2


def test_columns_by_name_and_by_number():
    found = table("a.tsv", "Quality\t#1 String\t2\n1\ta\tb\n", header=True)
    assert [found.index(c) for c in ("Quality", "#1 String", 1, 3, -1, "3", "-3")] == [
        *(0, 1, 0, 2, 2, 2, 0)
    ]
    assert found.index("2") == 2  # a name comes before a number


def test_an_unknown_column_is_refused_with_the_nearest_and_those_there_are():
    found = table("a.csv", "label,review\n1,x\n")
    with pytest.raises(ValueError, match=r"did you mean 'review'\?\); it has 'label' and 'review'"):
        found.index("Reviews")
    with pytest.raises(ValueError, match="no column 3: it has 2 of them"):
        found.index(3)
    with pytest.raises(ValueError, match="no column 0"):
        found.index(0)
    bare = table("a.tsv", "good\t1\n")
    with pytest.raises(ValueError, match="it has no header, so give a number from 1 to 2"):
        bare.index("label")


def test_a_header_with_a_name_twice_is_refused():
    assert "'a' more than once" in refusal("a.csv", "a,b,a\n1,2,3\n", header=True)


def test_take_leaves_out_empty_fields_counts_them_and_says_where():
    found = table("a.csv", "label,review\n1,x\n0,\n1, \n0,y\n").take("review", "label")
    assert found.rows == [["x", "1"], ["y", "0"]]
    assert found.lines == [2, 5]
    assert "left out 2 rows with empty fields" in found.notes[-1]
    assert "in line 3" in found.notes[-1]
    with pytest.raises(ValueError, match="no row with text in 'review'"):
        table("a.csv", "label,review\n1,\n").take("review")


# --- JSONL ----------------------------------------------------------------------------------------


def test_jsonl_columns_are_the_keys_in_order():
    found = table("a.jsonl", '\ufeff{"text": "a\\nb", "label": 1}\r\n\r\n{"label": true, "x": 0}\n')
    assert found.columns == ["text", "label", "x"]
    assert found.texts("label") == ["1", "true"]
    assert found.lines == [1, 3]
    with pytest.raises(ValueError, match=r"line 3 of 'a.jsonl' has nothing .* in 'text'"):
        found.take("text")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"text": ', "is not JSON"),
        ("[1]", "is a list, expected an object"),
        ('{"a": ' + "[" * 5000, "JSON"),
        ('{"text": "\\ud800"}', "half a character"),
    ],
)
def test_broken_json_is_named_by_its_line(line: str, why: str):
    sentence = refusal("a.jsonl", '{"text": "fine"}\n' + line)
    assert sentence.startswith("line 2 of 'a.jsonl'")
    assert why in sentence


def test_lists_of_strings():
    found = table("a.jsonl", json.dumps({"tokens": ["a", "b"], "n": [1]}))
    assert found.lists("tokens") == [["a", "b"]]
    with pytest.raises(ValueError, match="must have a list of strings in 'n', got a list"):
        found.lists("n")
    with pytest.raises(ValueError, match="has a list in 'tokens', expected text"):
        found.texts("tokens")


# --- files that are none --------------------------------------------------------------------------


def test_files_that_cannot_be_read(here: Path):
    assert "not UTF-8" in refusal("a.csv", b"text,label\ncaf\xe9,1\n")
    assert "UTF-16" in refusal("a.csv", "text,label\n".encode("utf-16"))
    assert "is empty" in refusal("a.csv", "\n\n")
    assert "is empty" in refusal("a.jsonl", "")
    assert "expected JSONL" in refusal("a.json", "[]")
    with pytest.raises(FileNotFoundError, match=r"no file 'b\.csv'"):
        read_table("b.csv")
    (here / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_table("folder")


def test_a_name_of_another_kind_is_read_by_its_first_line():
    assert table("a.data", "x, y\t1\n").rows == [["x, y", "1"]]
    assert table("a.data", "x,1\n").rows == [["x", "1"]]
