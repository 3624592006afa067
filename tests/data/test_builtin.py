"""Built-in labelled data: right labels, splits without a document in common, always the same."""

import ast
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from tinygrad_llm.data import builtin, corpora
from tinygrad_llm.data.conll import Sentences
from tinygrad_llm.data.labels import Span, detect, faults
from tinygrad_llm.data.tables import Table


@pytest.fixture
def stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that Python believes to hold its standard library."""
    real = sysconfig.get_path

    def get_path(name: str, *args, **kwargs):
        return str(tmp_path / "lib") if name == "stdlib" else real(name, *args, **kwargs)

    monkeypatch.setattr(sysconfig, "get_path", get_path)
    (tmp_path / "lib").mkdir()
    return tmp_path / "lib"


# --- on this machine's own standard library -------------------------------------------------------


@pytest.fixture(scope="module")
def tag() -> builtin.Builtin:
    return builtin.load("tag")


def test_tags_are_well_formed_and_enough(tag: builtin.Builtin):
    for split, least in ((tag.train, 2000), (tag.validation, 300)):
        assert isinstance(split, Sentences)
        assert split.tags is not None
        assert len(split) >= least
        assert detect(split.tags) == "BIO"
        assert faults(split.tags, "BIO") == []
        assert all(
            len(words) == len(tags) for words, tags in zip(split.words, split.tags, strict=True)
        )
        assert max(map(len, split.words)) <= 80
        assert all(word and not word.isspace() for words in split.words for word in words)
        assert split.documents == sorted(split.documents)


def test_every_role_is_in_both_splits(tag: builtin.Builtin):
    for split in (tag.train, tag.validation):
        assert isinstance(split, Sentences)
        found = Counter(name for tags in split.tags or () for name in tags)
        roles = "FUNCTION CLASS PARAMETER LOCAL CALL ATTRIBUTE KEYWORD MODULE IMPORT DECORATOR BASE"
        assert all(found[f"B-{role}"] for role in f"{roles} EXCEPTION GLOBAL".split())
        assert found["I-CALL"]


def test_tags_share_no_sentence_and_come_again_the_same(tag: builtin.Builtin):
    train, validation = tag.train, tag.validation
    assert isinstance(train, Sentences)
    assert isinstance(validation, Sentences)
    assert not {tuple(words) for words in train.words} & {tuple(w) for w in validation.words}
    assert builtin.load("tag").sha256 == tag.sha256


@pytest.mark.parametrize("task", [name for name in builtin.names() if name != "tag"])
def test_tables_are_large_enough_and_share_nothing(task: str):
    found = builtin.load(task)
    train, validation = found.train, found.validation
    assert isinstance(train, Table)
    assert isinstance(validation, Table)
    assert train.columns == validation.columns
    assert 1000 <= len(train) <= 6000
    assert 200 <= len(validation) <= 1000
    rows = [tuple(row) for row in (*train.rows, *validation.rows)]
    assert len(set(rows)) == len(rows)
    assert all(isinstance(field, str) and field.strip() for row in rows for field in row)
    assert len(train.take(*train.columns)) == len(train)  # no empty field
    assert len(found.sha256) == 64
    if "label" in train.columns:
        assert set(train.texts("label")) == set(validation.texts("label"))
    if task in ("pair", "next"):
        shares = Counter(train.texts("label"))
        assert set(shares) == {"yes", "no"}
        assert 0.4 < shares["yes"] / len(train) < 0.6
    if task == "qa":
        for question, context, answer, start in rows:
            assert context[int(start) :].startswith(answer)
            assert question.endswith("?")
    if task == "lm":
        assert all(compile(text, "it", "exec", dont_inherit=True) for (text,) in rows[:100])
    if task == "translate":
        assert all(source == target.replace(" ", "") != target for source, target in rows)
        assert len({source for source, _ in rows}) == len(rows)  # one right answer each


def test_an_unknown_task_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean 'classify'\?\); there are tag, classify"):
        builtin.load("clasify")


# --- on a standard library made for the test ------------------------------------------------------


def test_modules_are_named_parsed_and_in_one_order(stdlib: Path):
    (stdlib / "json").mkdir()
    for name in ("json/__init__", "json/decoder", "csv", "abc"):
        (stdlib / f"{name}.py").write_text(f"name = {name!r}\n", encoding="utf-8")
    (stdlib / "cmd.py").write_text("class:", encoding="utf-8")
    found = list(corpora.modules())
    assert {module.name for module in found} == {"json", "json.decoder", "csv", "abc"}
    assert [m.name for m in found] == [m.name for m in corpora.modules()]
    assert isinstance(found[0].tree, ast.Module)


def test_without_source_there_is_a_sentence(stdlib: Path):
    with pytest.raises(FileNotFoundError, match="give files of your own"):
        builtin.load("pair")


SOURCE = '''
import os.path as p, sys
from .a import (b as c, d)

@functools.cache
def f(self, x: int = 0, *rest, key=None, **more) -> str:
    """Docstring."""
    y = os.path.join(x, key=len)  # comment
    try:
        self.a.b = f"{y}" + z().w
    except (OSError, a.Error) as e:
        raise ValueError("no") from e
    return [i for i in rest if p.q]

class A(base.B, metaclass=M):
    """Class."""
    def g(): return super().g()
'''


@pytest.fixture
def longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take functions of up to 200 words."""
    monkeypatch.setattr(builtin, "_LONGEST", 200)


def roles(source: str) -> list[tuple[str, str]]:
    """What each statement that the data set takes from a source is tagged with."""
    module = corpora.Module("m", source, ast.parse(source))
    found = []
    for words, tags in builtin._tagged(module, set()):
        span: list[str] = []
        for word, name in zip([*words, ""], [*tags, "O"], strict=True):
            if span and not name.startswith("I-"):
                found.append((" ".join(span[1:]), span[0]))
                span = []
            if name != "O":
                span = [*span, word] if span else [name[2:], word]
    return found


def test_roles_of_names(longer: None):
    expected = [
        *(("os . path", "MODULE"), ("p", "IMPORT"), ("sys", "MODULE")),
        *((". a", "MODULE"), ("b", "IMPORT"), ("c", "IMPORT"), ("d", "IMPORT")),
        *(("functools . cache", "DECORATOR"), ("f", "FUNCTION")),
        *(("self", "PARAMETER"), ("x", "PARAMETER"), ("int", "TYPE"), ("rest", "PARAMETER")),
        *(("key", "PARAMETER"), ("more", "PARAMETER"), ("str", "TYPE")),
        *(("y", "LOCAL"), ("os . path . join", "CALL"), ("x", "PARAMETER")),
        *(("key", "KEYWORD"), ("len", "GLOBAL")),
        *(("self . a . b", "ATTRIBUTE"), ("z", "CALL"), ("w", "ATTRIBUTE")),
        *(("OSError", "EXCEPTION"), ("a . Error", "EXCEPTION"), ("e", "LOCAL")),
        *(("ValueError", "EXCEPTION"), ("e", "LOCAL")),
        *(("i", "LOCAL"), ("i", "LOCAL"), ("rest", "PARAMETER"), ("p . q", "ATTRIBUTE")),
        *(("A", "CLASS"), ("base . B", "BASE"), ("metaclass", "KEYWORD"), ("M", "GLOBAL")),
        *(("g", "FUNCTION"), ("super", "CALL"), ("g", "CALL")),
    ]
    assert roles(SOURCE) == expected


def test_words_are_the_tokens_without_layout_docstrings_and_comments(longer: None):
    module = corpora.Module("m", SOURCE, ast.parse(SOURCE))
    sentences = [" ".join(words) for words, _ in builtin._tagged(module, set())]
    assert sentences[1] == "from . a import ( b as c , d )"
    body = "y = os . path . join ( x , key = len ) try : self . a . b = '' + z ( ) . w"
    assert body in sentences[2]
    assert sentences[3] == "class A ( base . B , metaclass = M ) :"
    assert sentences[4] == "def g ( ) : return super ( ) . g ( )"


def test_a_form_feed_in_the_source_moves_nothing():
    assert roles("x = 1\n\x0c\ndef f(a):\n    return a.b\n") == [
        *(("f", "FUNCTION"), ("a", "PARAMETER"), ("a . b", "ATTRIBUTE"))
    ]


def test_long_functions_are_left_out():
    assert ("f", "FUNCTION") not in roles(SOURCE)
    assert ("g", "FUNCTION") in roles(SOURCE)


def test_statements_seen_before_are_left_out():
    module = corpora.Module("m", SOURCE, ast.parse(SOURCE))
    seen: set[tuple[str, ...]] = set()
    assert list(builtin._tagged(module, seen))
    assert list(builtin._tagged(module, seen)) == []


def test_roles_of_a_statement():
    words = ["import", "a", ".", "b"]
    places = [(1, 0), (1, 7), (1, 8), (1, 9)]
    node = ast.parse("import a.b").body[0]
    assert builtin.roles(node, words, places) == [Span(1, 4, "MODULE")]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("get_default_encoding", "get default encoding"),
        ("getDefaultEncoding", "get default encoding"),
        ("HTTPServer", "http server"),
        ("parse_HTTPHeader2", "parse http header"),
        ("__init__", "init"),
        ("_2", ""),
    ],
)
def test_words_of_names(name: str, words: str):
    assert " ".join(builtin.words_of(name)) == words


def test_pairs_do_not_give_the_name_away(stdlib: Path):
    source = "".join(
        f'def name{i}(a, b):\n    """Call name{i} with {i} things for good."""\n\n'
        for i in range(40)
    )
    for module in ("csv", "abc", "ast", "bdb", "cmd", "dis", "json", "queue", "pdb"):
        (stdlib / f"{module}.py").write_text(source.replace("name", module), encoding="utf-8")
    found = builtin.load("pair")
    for split in (found.train, found.validation):
        assert isinstance(split, Table)
        for head, text, label in split.rows:
            number = head.partition("(")[0].lstrip("abcdefghijklmnopqrstuvwxyz")
            assert text.startswith("Call … with")
            assert (f"with {number} things" in text) is (label == "yes")
    assert len(found.train) + len(found.validation) == 9 * 40
