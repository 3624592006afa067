"""Questions from tables, JSONL and SQuAD's JSON: what is read, what is refused and where it is."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm.data.questions import Answer, Questions, hold_out, read_squad
from tinygrad_llm.data.tables import Table, read_table

CONTEXT = "Ada wrote it in 1843, in London. Ada was a countess."


def of(rows, columns=("question", "context", "answer"), **names):
    table = Table("t.csv", list(columns), rows, list(range(2, len(rows) + 2)))
    start = "start" if "start" in columns else None
    return Questions.of(table, "question", "context", "answer", start)


def squad(path, *qas, context=CONTEXT, **more):
    value = {"data": [{"title": "x", "paragraphs": [{"context": context, "qas": list(qas)}]}]}
    path.write_text(json.dumps(value | more), encoding="utf-8")
    return path


def asked(text="1843", start=16, **more):
    answers = [{"text": text, "answer_start": start}]
    return {"id": "q1", "question": "When?", "answers": answers, **more}


# --- where an answer stands -----------------------------------------------------------------------


def test_a_start_says_which_place_is_meant():
    columns = ("question", "context", "answer", "start")
    found = of([["Who?", CONTEXT, "Ada", "33"], ["Who?", CONTEXT, "Ada", ""]], columns)
    assert found.first_answers == [Answer("Ada", 33), Answer("Ada", 0)]
    assert found.ids == [2, 3]
    (note,) = found.notes
    assert note.startswith("t.csv: 1 of 2 answers stand more than once in their context")


def test_whole_words_come_before_parts_of_words():
    found = of([["What?", "a party with art", "art"], ["What?", "partly", "art"]])
    assert [answer.start for answer in found.first_answers if answer] == [13, 1]


def test_blanks_around_an_answer_are_no_part_of_it():
    columns = ("question", "context", "answer", "start")
    found = of(
        [["Where?", CONTEXT, " London ", "24"], ["Where?", CONTEXT, "London\n", "25"]], columns
    )
    assert found.first_answers == [Answer("London", 25), Answer("London", 25)]


@given(st.text(min_size=1, max_size=30), st.data())
def test_every_passage_is_found_where_it_is_said_to_be(context, data):
    start = data.draw(st.integers(0, len(context) - 1))
    stop = data.draw(st.integers(start + 1, len(context)))
    text = context[start:stop]
    if not text.strip():
        return
    columns = ("question", "context", "answer", "start")
    for begins in (str(start), ""):
        (answer,) = of([["?", context, text, begins]], columns).answers[0]
        assert context[answer.start : answer.stop] == answer.text == text.strip()
        if begins:
            assert answer.start == start + len(text) - len(text.lstrip())


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (["When?", CONTEXT, "1844", ""], "line 3 of t.csv: the answer '1844' does not stand in"),
        (
            ["When?", CONTEXT, "1843", "17"],
            "line 3 of t.csv: the answer '1843' does not begin at c",
        ),
        (["When?", CONTEXT, "1843", "17"], "but at 16: count characters from 0"),
        (["When?", CONTEXT, "1843", "-1"], "does not begin at character -1"),
        (["When?", CONTEXT, "1843", "x"], "line 3 of t.csv: the start .* whole number, got 'x'"),
        (["When?", CONTEXT, "1843", 1.5], "whole number, got 1.5"),
        (["When?", CONTEXT, True, ""], "line 3 of t.csv: expected an answer as text, got bool"),
        (["When?", None, "1843", ""], "line 3 of t.csv has nothing .* in 'context'"),
    ],
)
def test_an_answer_that_is_not_there_is_an_error_with_its_line(row, why):
    columns = ("question", "context", "answer", "start")
    with pytest.raises(ValueError, match=why):
        of([["When?", CONTEXT, "1843", "16"], row], columns)


def test_of_many_that_are_wrong_the_first_is_named_and_the_others_counted():
    rows = [["When?", CONTEXT, text] for text in ("1843", "x1", "x2", "x3")]
    with pytest.raises(ValueError, match=r"line 3 of .*'x1'.* \(and 2 more such answers\)"):
        of(rows)


# --- tables ---------------------------------------------------------------------------------------


def test_rows_without_a_question_or_a_context_are_counted_and_an_empty_answer_is_none():
    found = of([["", CONTEXT, "Ada"], ["Who?", " ", "Ada"], ["Why?", CONTEXT, ""]])
    assert found.answers == [[]]
    assert found.unanswerable == 1
    assert found.texts == [[""]]
    assert found.notes == [
        "t.csv: left out 2 rows without a question or without a context, the first is line 2"
    ]
    with pytest.raises(ValueError, match="has no question with a context"):
        of([["", CONTEXT, "Ada"]])


def test_new_questions_are_kept_whatever_they_are():
    table = Table("t.csv", ["question", "context"], [["", "x"], ["Who?", ""]], [2, 3])
    found = Questions.of(table, "question", "context")
    assert (found.questions, found.ids, found.notes) == (["", "Who?"], [2, 3], [])


def test_columns_must_differ():
    table = Table("t.csv", ["question", "context"], [["Who?", "x"]], [2])
    with pytest.raises(
        ValueError, match=r"different columns, got 'question', 'context', 'context'"
    ):
        Questions.of(table, "question", "context", 2)


def test_a_csv_with_a_byte_order_mark_quotes_and_blank_lines(tmp_path):
    path = tmp_path / "a.csv"
    text = '\ufeffquestion,context,answer\n\n"Who, then?","She said ""Ada"", we heard",Ada\n'
    path.write_text(text, encoding="utf-8")
    found = Questions.of(read_table(path), "question", "context", "answer")
    assert found.questions == ["Who, then?"]
    assert found.first_answers == [Answer("Ada", 10)]


@pytest.mark.parametrize(
    "value",
    [
        ["1843", "in 1843"],
        {"text": ["1843", "in 1843"], "answer_start": [16, 13]},
        {"text": ["1843", "in 1843"]},
        [{"text": "1843", "answer_start": 16}, {"text": "in 1843", "answer_start": 13}],
        [{"text": "1843"}, {"text": "in 1843"}, {"text": "1843"}],
    ],
)
def test_jsonl_has_several_answers_in_the_forms_that_people_have(value, tmp_path):
    path = tmp_path / "a.jsonl"
    row = {"question": "When?", "context": CONTEXT, "answers": value}
    empty = {"question": "Why?", "context": CONTEXT, "answers": {"text": [], "answer_start": []}}
    path.write_text("\n".join(map(json.dumps, [row, empty])) + "\n")
    found = Questions.of(read_table(path), "question", "context", "answers")
    assert found.answers == [[Answer("1843", 16), Answer("in 1843", 13)], []]
    assert found.texts == [["1843", "in 1843"], [""]]


def test_numbers_are_texts_and_answers_need_a_start_each(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        json.dumps({"question": "When?", "context": CONTEXT, "answer": 1843, "start": 16})
    )
    table = read_table(path)
    found = Questions.of(table, "question", "context", "answer", "start")
    assert found.first_answers == [Answer("1843", 16)]
    path.write_text(
        json.dumps({"question": "?", "context": CONTEXT, "answer": ["a", "b"], "start": 1})
    )
    with pytest.raises(ValueError, match=r"line 1 of .* a start for each of several answers"):
        Questions.of(read_table(path), "question", "context", "answer", "start")


# --- SQuAD ----------------------------------------------------------------------------------------


def test_squad_with_several_answers_and_with_none(tmp_path):
    several = asked()
    several["answers"] += [
        {"text": "1843", "answer_start": 16},
        {"text": "in 1843", "answer_start": 13},
    ]
    none = {"id": "q2", "question": "Why?", "answers": [], "is_impossible": True}
    plausible = asked(id="q3", is_impossible=True, plausible_answers=[])
    path = squad(tmp_path / "dev.json", several, none, plausible, version="v2.0")
    found = read_squad(path)
    assert found.answers == [[Answer("1843", 16), Answer("in 1843", 13)], [], []]
    assert found.ids == ["q1", "q2", "q3"]
    assert found.contexts == [CONTEXT] * 3


def test_questions_one_by_one(tmp_path):
    path = tmp_path / "flat.json"
    row = {"id": 7, "question": "When?", "context": CONTEXT, "answers": {"text": ["1843"]}}
    for value in ({"data": [row]}, [row]):
        path.write_text(json.dumps(value))
        found = read_squad(path)
        assert (found.ids, found.first_answers) == ([7], [Answer("1843", 16)])


def test_new_questions_need_no_answers(tmp_path):
    path = squad(tmp_path / "test.json", {"question": "When?"}, {"id": "b", "question": ""})
    found = read_squad(path, answered=False)
    assert (found.ids, found.questions) == ([1, "b"], ["When?", ""])
    with pytest.raises(ValueError, match=r"data\[0\]\.paragraphs\[0\]\.qas\[0\] of .* 'answers'"):
        read_squad(path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", r"is not JSON: .* in line 1, column 2 \(an object per line is JSONL"),
        ("{}\n{}", r"is not JSON: .* in line 2, column 1"),
        ("3", "must be an object, got int"),
        ("{}", "has no 'data'"),
        ('{"data": {}}', "'data' must be a list, got dict"),
        ('{"data": [3]}', r"data\[0\] of .* must be an object"),
        ('{"data": [{"paragraphs": [{}]}]}', r"data\[0\]\.paragraphs\[0\] of .* has no 'context'"),
        ('{"data": [{"paragraphs": [{"context": "a"}]}]}', "has no 'qas'"),
        (
            '{"data": [{"paragraphs": [{"context": "a", "qas": [{"question": 1}]}]}]}',
            r"qas\[0\] of .*: 'question' must be a text, got int",
        ),
        (
            '[{"paragraphs": [{"context": "a", "qas": [{"question": "b", "answers": 1}]}]}]',
            "'answers' must be a list or an object, got int",
        ),
        ('{"data": []}', "has no question with a context"),
        ('["\\ud83d"]', "half a character"),
        ("[" * 100_000, "not JSON that can be read"),
    ],
)
def test_what_is_no_squad_is_refused_by_its_place(text, why, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=why):
        read_squad(path)


def test_files_that_are_not_there_or_not_text(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        read_squad(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_squad(tmp_path)
    path = squad(tmp_path / "bom.json", asked())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_squad(path)) == 1
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        read_squad(path)


def test_an_answer_that_squad_has_wrong_is_named_by_its_path(tmp_path):
    path = squad(tmp_path / "x.json", asked(), asked("1844"))
    with pytest.raises(ValueError, match=r"qas\[1\] of .*: the answer '1844' does not stand in"):
        read_squad(path)


# --- held out -------------------------------------------------------------------------------------


@given(
    contexts=st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=60),
    share=st.floats(0.05, 0.9),
    seed=st.integers(0, 50),
)
def test_whole_contexts_are_held_out(contexts, share, seed):
    n = len(contexts)
    data = Questions("data", ["?"] * n, contexts, [[] for _ in contexts], list(range(n)))
    try:
        train, held = hold_out(data, share, seed)
    except ValueError:  # such as where all are of one context
        return
    assert not {*train.contexts} & {*held.contexts}
    assert sorted(train.ids + held.ids) == list(range(n))
    assert held.name == "data, held out"
    assert hold_out(data, share, seed)[1].ids == held.ids


def test_one_context_cannot_be_shared_out():
    data = Questions("data", ["?"] * 4, ["c"] * 4, [[]] * 4, [1, 2, 3, 4])
    with pytest.raises(ValueError, match="4 questions on 1 context are too few"):
        hold_out(data, 0.2, 1)
