"""Questions about texts, and the passages that answer them: tables, JSONL, and SQuAD's own JSON.

    CSV, TSV     question, context, answer, and where there is one start: the place of the answer in
                 the context, in characters from 0. An empty answer: the context does not tell
    JSONL        the same; the answer may also be a list of answers that are as good, or, as the
                 `datasets` library writes them, {"text": [...], "answer_start": [...]}
    .json        {"data": [{"paragraphs": [{"context": ..., "qas": [{"id", "question", "answers":
                 [{"text", "answer_start"}], "is_impossible"}]}]}]}, SQuAD 1.1 and 2.0; or the
                 questions one by one: {"data": [{"question", "context", "answers"}]}

An answer is a passage of its context, to the letter: one that does not stand there is an error that
says where. Rajpurkar et al., EMNLP 2016 and ACL 2018 (SQuAD).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinygrad_llm.data import files
from tinygrad_llm.data.loader import shuffled
from tinygrad_llm.data.tables import Column, Table, counted


class Answer(NamedTuple):
    """context[start : start + len(text)] is `text`."""

    text: str
    start: int

    @property
    def stop(self) -> int:
        """Where what follows it begins."""
        return self.start + len(self.text)


@dataclass(frozen=True)
class Questions:
    """questions[i] is about contexts[i]; answers[i] are right, each of them.

    No answer: the context does not tell. ids[i]: the line that it stood in, or SQuAD's id.
    """

    name: str  # where they came from, for errors
    questions: list[str]
    contexts: list[str]
    answers: list[list[Answer]]
    ids: list[int | str]
    notes: list[str] = field(default_factory=list)  # what a user should know of how they were read

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def unanswerable(self) -> int:
        """How many have no answer."""
        return sum(not right for right in self.answers)

    @property
    def first_answers(self) -> list[Answer | None]:
        """The one of each that is learnt."""
        return [right[0] if right else None for right in self.answers]

    @property
    def texts(self) -> list[list[str]]:
        """The right answers of each as SQuAD's scores want them; [''] where there is none."""
        return [[answer.text for answer in right] or [""] for right in self.answers]

    def take(self, numbers: Sequence[int], name: str) -> Questions:
        """Those of these numbers, under another name."""
        columns = (self.questions, self.contexts, self.answers, self.ids)
        questions, contexts, answers, ids = ([column[i] for i in numbers] for column in columns)
        return Questions(name, questions, contexts, answers, ids, self.notes)  # pyright: ignore[reportArgumentType]  (each column keeps its type)

    @classmethod
    def of(
        cls,
        table: Table,
        question: Column,
        context: Column,
        answer: Column | None = None,
        start: Column | None = None,
    ) -> Questions:
        """Those of a table's columns; without `answer` there is none to any, as for `predict`.

        Rows without a question or a context are left out, and counted, where answers are read: a
        new question is answered whatever it is. An answer without a start is
        looked for: the first place where it stands as whole words, else the first of all. Blanks
        around an answer are no part of it.

        Raises ValueError for a column that is not there or is asked for twice, and, with the line,
        for a field that is none and for an answer that does not stand in its context.
        """
        asked = [column for column in (question, context, answer, start) if column is not None]
        places = [table.index(column) for column in asked]
        if len(set(places)) < len(places):
            raise ValueError(
                f"{table.name}: questions, contexts and answers must be in different columns, got "
                f"{', '.join(repr(table.columns[i]) for i in places)}"
            )
        texts = zip(table.texts(question), table.texts(context), strict=True)
        found = _Reader(table.name, list(table.notes), "rows", answer is not None)
        for row, line, (asks, tells) in zip(table.rows, table.lines, texts, strict=True):
            where = f"line {line} of {table.name}"
            given: list[_Given] = []
            if answer is not None:
                begins = None if start is None else row[table.index(start)]
                given = list(_given(row[table.index(answer)], begins, where))
            found.add(asks, tells, given, line, where)
        return found.questions()


def read_squad(path: str | PathLike[str], *, answered: bool = True) -> Questions:
    """The questions of a file in SQuAD's JSON; answered: whether each must have its "answers".

    Raises FileNotFoundError where there is no such file; ValueError where it is not JSON, or, with
    the path within it (data[0].paragraphs[3].qas[1]), not as SQuAD's, and for an answer that does
    not stand in its context.
    """
    file = Path(path).expanduser()
    name = repr(str(path))
    if not file.is_file():
        raise FileNotFoundError(
            f"{name} is a folder: expected one file" if file.is_dir() else f"no file {name}"
        )
    found = _Reader(name, [], "questions", answered)
    for number, (where, value, context) in enumerate(_questions(_loaded(file, name), name), 1):
        place = f"{where} of {name}"
        question = _member(value, "question", str, place)
        given: list[_Given] = []
        if answered and value.get("is_impossible") is not True:
            given = list(_given(_member(value, "answers", (list, dict), place), None, place))
        key = value.get("id", number)
        if isinstance(key, bool) or not isinstance(key, str | int):
            raise ValueError(f"{place}: 'id' must be a text, got {type(key).__name__}")
        found.add(question, context, given, key, place)
    return found.questions()


def hold_out(data: Questions, share: float, seed: int) -> tuple[Questions, Questions]:
    """(training, validation): about `share` of the questions, of whole contexts, at random.

    Raises ValueError where there is nothing left for one of the two.
    """
    groups: dict[str, list[int]] = {}
    for i, context in enumerate(data.contexts):
        groups.setdefault(context, []).append(i)
    numbers = list(groups.values())
    held: list[int] = []
    for g in shuffled(np.arange(len(numbers)), len(numbers), seed, 0).tolist():
        if len(held) >= share * len(data):
            break
        held += numbers[g]
    kept = sorted(set(range(len(data))) - set(held))
    if not held or not kept:
        raise ValueError(
            f"{data.name}: {counted(len(data), 'question')} on {counted(len(groups), 'context')} "
            "are too few to hold some out for validation: name a file for it (--val-data)"
        )
    return data.take(kept, data.name), data.take(sorted(held), f"{data.name}, held out")


# --- an answer and its place ----------------------------------------------------------------------


class _Given(NamedTuple):
    """An answer as a file has it."""

    text: str
    start: int | None


class _Reader:
    """Questions one by one, with what is to be said of all of them."""

    def __init__(self, name: str, notes: list[str], unit: str, answered: bool) -> None:
        self.found = Questions(name, [], [], [], [], notes)
        self.unit, self.answered = unit, answered
        self.empty: list[str] = []
        self.wrong: list[str] = []
        self.several = 0

    def add(
        self, question: str, context: str, given: Sequence[_Given], key: int | str, where: str
    ) -> None:
        if self.answered and not (question.strip() and context.strip()):
            self.empty.append(where)
            return
        right: list[Answer] = []
        for i, one in enumerate(given):
            answer = _located(context, one)
            if isinstance(answer, str):
                self.wrong.append(f"{where}: {answer}")
                return
            self.several += i == 0 and one.start is None and context.count(answer.text) > 1
            right += [] if answer in right else [answer]
        self.found.questions.append(question)
        self.found.contexts.append(context)
        self.found.answers.append(right)
        self.found.ids.append(key)

    def questions(self) -> Questions:
        """All of them; ValueError for answers that do not stand where they should."""
        name, notes = self.found.name, self.found.notes
        if self.wrong:
            others = f" (and {len(self.wrong) - 1:,} more such answers)"
            raise ValueError(self.wrong[0] + (others if len(self.wrong) > 1 else ""))
        if not self.found.questions:
            raise ValueError(f"{name} has no question with a context")
        if self.empty:
            notes.append(
                f"{name}: left out {len(self.empty):,} {self.unit} without a question or without a "
                f"context, the first is {self.empty[0].removesuffix(f' of {name}')}"
            )
        if self.several:
            notes.append(
                f"{name}: {self.several:,} of {counted(len(self.found), 'answer')} stand more than "
                "once in their context, and where is not said: the first place is taken"
            )
        return self.found


def _located(context: str, given: _Given) -> Answer | str:
    """The answer in its place, without blanks around it; or a sentence on why it has none."""
    text = given.text.strip()
    lead = len(given.text) - len(given.text.lstrip())
    short = repr(text if len(text) <= 40 else text[:39] + "…")
    first = context.find(text)
    if first < 0:
        return f"the answer {short} does not stand in its context"
    if given.start is None:
        return Answer(text, _whole_words(context, text, first))
    for start in (given.start + lead, given.start):
        if start >= 0 and context.startswith(text, start):
            return Answer(text, start)
    return (
        f"the answer {short} does not begin at character {given.start} of its context, but at "
        f"{first}: count characters from 0, or leave the start out"
    )


def _whole_words(context: str, text: str, first: int) -> int:
    """The first place where no letter or digit touches the text; `first` where there is none."""
    start = first
    while start >= 0:
        stop = start + len(text)
        around = context[max(0, start - 1) : start] + context[stop : stop + 1]
        if not any(map(str.isalnum, around)):
            return start
        start = context.find(text, start + 1)
    return first


def _given(value: Any, start: Any, where: str) -> Iterator[_Given]:
    """The answers of a field; none for '' and null, which say that there is none.

    'blue'    ['blue', 'red']    [{'text': 'blue', 'answer_start': 8}]
    {'text': ['blue', 'red'], 'answer_start': [8, 20]}
    """
    if isinstance(value, Mapping):
        texts = _member(value, "text", (list, str), where)
        starts = value.get("answer_start")
        if isinstance(texts, str):
            texts, starts = [texts], [starts]
        starts = [None] * len(texts) if starts is None else starts
        if not isinstance(starts, list) or len(starts) != len(texts):
            raise ValueError(f"{where}: 'answer_start' must list as many numbers as 'text' answers")
        for text, begins in zip(texts, starts, strict=True):
            yield from _given(text, begins, where)
    elif isinstance(value, list):
        if start not in (None, "") and len(value) != 1:
            raise ValueError(f"{where}: a start for each of several answers goes with them")
        for one in value:
            yield from _given(one, start, where)
    elif isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise ValueError(f"{where}: expected an answer as text, got {type(value).__name__}")
    elif value is not None and (text := value if isinstance(value, str) else str(value)).strip():
        yield _Given(text, _start(start, where))


def _start(value: Any, where: str) -> int | None:
    """A number of characters, or None where there is none."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = int(value) if isinstance(value, str | int) else None
    except ValueError:
        number = None
    if number is None or isinstance(value, bool):
        raise ValueError(f"{where}: the start of an answer must be a whole number, got {value!r}")
    return number


# --- SQuAD's JSON ---------------------------------------------------------------------------------


def _loaded(file: Path, name: str) -> Any:
    text = files.decode(file.read_bytes(), name)
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():  # JSON can spell half a character; no text can hold it
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{name} is not JSON: {error.msg} in line {error.lineno}, column {error.colno} (an "
            "object per line is JSONL: call it .jsonl)"
        ) from error
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has half a character (a lone surrogate) in it") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON that can be read: {error}") from error
    return value


def _questions(value: Any, name: str) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """(path within the file, the question's object, its context), one after the other."""
    entries = value if isinstance(value, list) else _member(value, "data", list, name)
    root = "" if isinstance(value, list) else "data"
    for i, entry in enumerate(entries):
        where = f"{root}[{i}]"
        if isinstance(entry, Mapping) and "paragraphs" not in entry and "question" in entry:
            yield where, entry, _member(entry, "context", str, f"{where} of {name}")
            continue
        paragraphs = _member(entry, "paragraphs", list, f"{where} of {name}")
        for j, paragraph in enumerate(paragraphs):
            inside = f"{where}.paragraphs[{j}]"
            context = _member(paragraph, "context", str, f"{inside} of {name}")
            asked = _member(paragraph, "qas", list, f"{inside} of {name}")
            for k, one in enumerate(asked):
                yield f"{inside}.qas[{k}]", one, context


def _member(value: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """value[key], where it is what it must be."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be an object, got {type(value).__name__}")
    if key not in value:
        raise ValueError(f"{where} has no {key!r}")
    if not isinstance(value[key], kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join(_NAMES[one] for one in kinds)
        raise ValueError(f"{where}: {key!r} must be {expected}, got {type(value[key]).__name__}")
    return value[key]


_NAMES = {str: "a text", list: "a list", dict: "an object"}
