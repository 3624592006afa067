"""CoNLL columns: sentences, documents, and which line is broken."""

from pathlib import Path
from typing import Any

import pytest

from tinygrad_llm.data.conll import Sentences, read_sentences


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sentences(content: str | bytes, name: str = "a.conll", **options: Any) -> Sentences:
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return read_sentences(name, **options)


def refusal(content: str | bytes, name: str = "a.conll", **options: Any) -> str:
    with pytest.raises(ValueError, match=r".") as info:
        sentences(content, name, **options)
    assert "\n" not in str(info.value)
    return str(info.value)


CONLL = """\
-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

Peter NNP B-NP B-PER

-DOCSTART- -X- -X- O

. . O O
"""


def test_conll_2003():
    found = sentences(CONLL)
    assert found.words == [["EU", "rejects"], ["Peter"], ["."]]
    assert found.tags == [["B-ORG", "O"], ["B-PER"], ["O"]]
    assert found.lines == [3, 6, 10]
    assert found.documents == [0, 0, 1]
    assert found.notes == []
    assert (len(found), found.tokens) == (3, 4)


def test_line_ends_and_byte_order_mark_make_no_difference():
    found = sentences("\ufeff" + CONLL.replace("\n", "\r\n"))
    assert found.words == sentences(CONLL).words
    assert found.tags == sentences(CONLL).tags


def test_a_sentence_ends_with_the_file_and_with_a_document():
    found = sentences("a O\n-DOCSTART- O\nb O")
    assert found.words == [["a"], ["b"]]
    assert found.documents == [0, 1]


def test_columns_by_number_and_by_name():
    assert sentences(CONLL, words=1, tags=2).tags == [["NNP", "VBZ"], ["NNP"], ["."]]
    assert sentences(CONLL, tags=-2).tags == [["B-NP", "B-VP"], ["B-NP"], ["O"]]
    named = "word\tpos\tner\nEU\tNNP\tB-ORG\n"
    assert sentences(named, header=True, words="word", tags="ner").tags == [["B-ORG"]]
    assert "did you mean 'ner'?" in refusal(named, header=True, words="word", tags="nre")
    assert "no column 5: it has 4" in refusal(CONLL, tags=5)


def test_between_tabs_words_keep_their_blanks():
    found = sentences("New York\tB-loc\n\u00a0x\tO\n \t \n#tag\tO\n#\tO\n")
    assert found.words == [["New York", "\u00a0x"], ["#tag", "#"]]
    assert sentences("a\u00a0b O\n").words == [["a\u00a0b"]]


def test_remarks_between_tabs_are_counted_and_nowhere_else():
    found = sentences("# sent_id = 1\nEU\tB-ORG\n\n# text = x\nx\tO\n")
    assert found.words == [["EU"], ["x"]]
    assert found.notes == ["'a.conll': passed over 2 remarks ('# …')"]
    assert sentences("# O\nx O\n").words == [["#", "x"]]


def test_the_broken_line_is_named():
    why = refusal("EU NNP B-ORG\n\nrejects O\n")
    assert "line 3 of 'a.conll' has 2 columns, expected 3 as in line 1" in why
    assert "'rejects O'" in why
    assert "line 2 of 'a.conll' has 3 columns" in refusal("EU\tO\na\tO\tO\n")
    assert "line 2 of 'a.conll' has no word" in refusal("EU\tO\n\tO\n")
    assert "line 1 of 'a.conll' has no tag" in refusal("EU\t\nx\tO\n")
    assert "has one column, expected a word and its tag" in refusal("EU\nrejects\n")


def test_sentences_of_zero_length_are_counted():
    found = sentences("a O\n\n\n\nb O\n\n")
    assert found.words == [["a"], ["b"]]
    assert "left out 2 sentences of zero length" in found.notes[0]


def test_without_tags():
    found = sentences("EU\n\nrejects\n", tagged=False)
    assert found.words == [["EU"], ["rejects"]]
    assert found.tags is None


def test_what_is_no_text_or_holds_no_sentence():
    assert "not UTF-8" in refusal(b"caf\xe9 O\n")
    assert "holds no sentence" in refusal("")
    assert "holds no sentence" in refusal("-DOCSTART- O\n\n")
    assert "holds no sentence" in refusal("word tag\n", header=True)
    with pytest.raises(FileNotFoundError, match=r"no file 'b\.conll'"):
        read_sentences("b.conll")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_sentences(".")


def test_jsonl():
    lines = '{"tokens": ["a", "b"], "ner_tags": ["O", "B-X"]}\n{"tokens": [], "ner_tags": []}\n'
    found = sentences(lines, "a.jsonl")
    assert found.words == [["a", "b"]]
    assert found.tags == [["O", "B-X"]]
    assert "left out 1 sentence of zero length" in found.notes[0]
    assert sentences('{"words": ["a"]}', "a.jsonl", tagged=False).words == [["a"]]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"tokens": ["a"], "tags": ["O", "O"]}', "has 1 word and 2 tags"),
        ('{"tokens": ["a", ""], "tags": ["O", "O"]}', "an empty word or tag"),
        ('{"tokens": "a b", "tags": ["O"]}', "must have a list of strings"),
        ('{"token": ["a"], "tags": ["O"]}', "did you mean 'token'?"),
        ('{"tokens": [], "tags": []}', "holds no sentence with a word in it"),
    ],
)
def test_broken_jsonl(line: str, why: str):
    assert why in refusal(line, "a.jsonl")
