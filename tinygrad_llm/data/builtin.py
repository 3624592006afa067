"""Labelled data sets that every Python carries with it: a task to try on a fresh machine.

    tag         words of short functions and imports of the standard library → the roles of names
    classify    a docstring → the package that it belongs to
    pair        name and parameters of a function, a docstring → whether they belong together
    next        a paragraph, another one → whether it is the one that follows
    translate   a name run together, 'getdefaultencoding' → its words, 'get default encoding'
    qa          the head of a function and a question → what stands there as the answer
    lm          short functions as they stand, to go on writing

All labels are read off the source, so they are right and cost nothing. Nothing of a document is in
both splits: a document is a module, and for `classify`, whose label it is, a class or function at
the top of a module with all inside. The same Python gives the same data in the same order;
another version may not, so report `sha256` with a result.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import io
import json
import keyword
import re
import textwrap
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise

from tinygrad_llm.data import corpora
from tinygrad_llm.data.conll import Sentences
from tinygrad_llm.data.labels import Span, from_spans
from tinygrad_llm.data.tables import Table

Examples = Table | Sentences

_VALIDATION = 0.15  # of the documents, about
_MOST = {"train": 6000, "validation": 1000}  # examples, so that fine-tuning takes minutes


@dataclass(frozen=True)
class Builtin:
    """A built-in data set in two splits that share no document.

    `train` and `validation` are what the readers of files give: a `Table` with named columns, for
    `tag` `Sentences`.
    """

    task: str
    train: Examples
    validation: Examples
    about: str  # what it is, in a sentence

    @property
    def sha256(self) -> str:
        """SHA-256 over all examples, both splits: it depends on the version of Python."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation):
            rows = split.rows if isinstance(split, Table) else [split.words, split.tags]
            digest.update(json.dumps(rows).encode())
        return digest.hexdigest()


def names() -> list[str]:
    """The built-in data sets: what `load` knows."""
    return list(_BUILDERS)


def load(task: str) -> Builtin:
    """The built-in data set for this task; the columns of each stand below.

    tag         words and tags in BIO, see `roles`
    classify    text, label
    pair        text1, text2, label ('yes' or 'no'); so has `next`
    translate   source, target
    qa          question, context, answer, start (the place of the answer in the context)
    lm          text

    Raises ValueError, with the nearest name, where there is none; FileNotFoundError where Python
    came without its source.
    """
    if task not in _BUILDERS:
        close = difflib.get_close_matches(task.lower(), _BUILDERS, 1)
        nearest = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"no built-in data for {task!r}{nearest}; there are {', '.join(_BUILDERS)}"
        )
    return _BUILDERS[task](corpora.modules())


# --- splits ---------------------------------------------------------------------------------------


@dataclass
class _Splits:
    """Examples as they are found, by the split that their document belongs to."""

    train: list[tuple[str, ...]] = field(default_factory=list)
    validation: list[tuple[str, ...]] = field(default_factory=list)
    seen: set[tuple[str, ...]] = field(default_factory=set)

    def add(self, document: str, *row: str) -> None:
        """Take an example that has not come before, in whatever split."""
        if row not in self.seen:
            self.seen.add(row)
            (self.validation if _held_out(document) else self.train).append(row)

    def tables(self, task: str, columns: Sequence[str], about: str) -> Builtin:
        train = _table(f"built-in {task}, train", columns, _fewer(self.train, "train"))
        kept = _fewer(self.validation, "validation")
        return Builtin(task, train, _table(f"built-in {task}, validation", columns, kept), about)


def _table(name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    return Table(name, list(columns), [list(row) for row in rows], list(range(1, len(rows) + 1)))


def _held_out(document: str) -> bool:
    return _hash(document)[0] < _VALIDATION * 256


def _hash(*texts: str) -> bytes:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).digest()


def _fewer(rows: Iterable[tuple[str, ...]], split: str) -> list[tuple[str, ...]]:
    """As many as a task needs, in the order of their hashes: mixed, and always the same."""
    return sorted(rows, key=lambda row: _hash(*row))[: _MOST[split]]


# --- tag: roles of names --------------------------------------------------------------------------


_SENTENCES = {"train": 4000, "validation": 800}


def _tag(modules: Iterable[corpora.Module]) -> Builtin:
    found = {split: Sentences(f"built-in tag, {split}", [], [], [], []) for split in _SENTENCES}
    seen: set[tuple[str, ...]] = set()
    for number, module in enumerate(modules):
        split = "validation" if _held_out(module.name) else "train"
        missing = _SENTENCES[split] - len(found[split])
        for words, tags in islice(_tagged(module, seen), missing):
            _append(found[split], words, tags, number)
        if all(len(found[split]) == most for split, most in _SENTENCES.items()):
            break
    about = (
        "imports, class heads and short functions of the standard library, each name tagged with "
        "its role; strings stand as '', docstrings and comments are left out"
    )
    return Builtin("tag", found["train"], found["validation"], about)


def _append(sentences: Sentences, words: list[str], tags: list[str], document: int) -> None:
    sentences.words.append(words)
    if sentences.tags is not None:
        sentences.tags.append(tags)
    sentences.lines.append(len(sentences.words))
    sentences.documents.append(document)


_LONGEST = 80  # words of a function that is taken


def _tagged(
    module: corpora.Module, seen: set[tuple[str, ...]]
) -> Iterator[tuple[list[str], list[str]]]:
    """Words and tags of the statements of a module that are short enough and not yet `seen`."""
    lines = [line + "\n" for line in module.source.split("\n")]  # as `ast` counts them
    todo: list[ast.stmt] = list(reversed(module.tree.body))
    while todo:
        node = todo.pop()
        last = node.end_lineno or node.lineno
        if isinstance(node, ast.ClassDef):
            todo += reversed(node.body)
            last = node.body[0].lineno
        elif not isinstance(
            node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef
        ):
            continue
        for words, tags in _sentence(node, lines, last):
            if (key := tuple(words)) not in seen:
                seen.add(key)
                yield words, tags


def _sentence(
    node: ast.stmt, lines: Sequence[str], last: int
) -> Iterator[tuple[list[str], list[str]]]:
    """One statement as words and tags; none where it is too short, too long or hard to read."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
    text = lines[first - 1 : last]
    strange = any(isinstance(part, ast.Match) for part in ast.walk(node))
    if last - first > 40 or strange or not "".join(text).isascii():
        return
    words, places = _words(node, text, first)
    if 4 <= len(words) <= _LONGEST:
        yield words, from_spans(roles(node, words, places), len(words), "BIO")


Place = tuple[int, int]  # line from 1, column from 0, as `ast` counts them


def _words(node: ast.stmt, text: Sequence[str], first: int) -> tuple[list[str], list[Place]]:
    """The tokens of the statement, a class up to its colon; ([], []) where they are broken off."""
    docstring = _docstring_lines(node)
    words, places = [], []
    depth = inside_string = 0
    try:
        for token in tokenize.generate_tokens(io.StringIO("".join(text)).readline):
            kind, line = tokenize.tok_name[token.type], token.start[0] + first - 1
            # From Python 3.12 on an f-string is many tokens; here it is one word, as before.
            begins = kind in ("FSTRING_START", "TSTRING_START")
            ends = kind in ("FSTRING_END", "TSTRING_END")
            inside_string += begins - ends
            if inside_string > begins or ends or line in docstring or kind in _LAYOUT:
                continue
            word = "''" if begins or kind == "STRING" else token.string
            words.append(word)
            places.append((line, token.start[1]))
            depth += (word in _OPEN) - (word in _CLOSE)
            if isinstance(node, ast.ClassDef) and word == ":" and depth == 0:
                break
    except (tokenize.TokenError, IndentationError, SyntaxError):  # the text stops amid a class
        return [], []
    return words, places


_LAYOUT = frozenset(("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER", "ENCODING"))
_OPEN, _CLOSE = frozenset("([{"), frozenset(")]}")


def _docstring_lines(node: ast.stmt) -> set[int]:
    """The lines of the docstrings inside, which the tagger does not read."""
    found: set[int] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            text = part.body[0]
            if ast.get_docstring(part, clean=False) is not None and text.end_lineno is not None:
                found.update(range(text.lineno, text.end_lineno + 1))
    return found


def roles(node: ast.stmt, words: Sequence[str], places: Sequence[Place]) -> list[Span]:
    """The names of a statement with their roles, a dotted name as one span.

        FUNCTION   CLASS        def NAME, class NAME
        PARAMETER  LOCAL        of this function, where defined and where used
        CALL       ATTRIBUTE    the dotted name that is called; that is not
        KEYWORD                 NAME= in a call
        MODULE     IMPORT       import NAME.NAME, from NAME import …; what is imported, and `as`
        DECORATOR  BASE         @NAME.NAME; class …(NAME.NAME)
        EXCEPTION  TYPE         except NAME.NAME, raise NAME; in an annotation
        GLOBAL                  all other names

    A name takes the first role that the tree gives it, from the outside in: in
    `self.path.append(x)` all of `self . path . append` is one CALL. Scopes of nested functions are
    taken together.
    """
    known = _Roles(words, {place: i for i, place in enumerate(places)})
    known.read(node)
    return known.spans


class _Roles:
    def __init__(self, words: Sequence[str], index: dict[Place, int]) -> None:
        self.words, self.index = words, index
        self.spans: list[Span] = []
        self.taken: set[int] = set()

    def read(self, node: ast.stmt) -> None:
        """Roles by the words around, by the tree, and by the scope for what is left."""
        self._heads(node)
        for part in ast.walk(node):
            self._of_node(part)
        parameters = {part.arg for part in ast.walk(node) if isinstance(part, ast.arg)}
        local = {
            part.id
            for part in ast.walk(node)
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
        }
        local |= {h.name for h in ast.walk(node) if isinstance(h, ast.ExceptHandler) and h.name}
        for i, word in enumerate(self.words):
            if word.isidentifier() and not keyword.iskeyword(word):
                attribute = i > 0 and self.words[i - 1] == "."
                scope = "LOCAL" if word in local else "GLOBAL"
                role = "PARAMETER" if word in parameters else scope
                self._take(i, i + 1, "ATTRIBUTE" if attribute else role)
        self.spans.sort()

    def _heads(self, node: ast.stmt) -> None:
        """What the tree gives no place for: names behind def and class, and all of an import."""
        if isinstance(node, ast.Import | ast.ImportFrom):
            self._import(node)
            return
        for i, word in enumerate(self.words[:-1]):
            if word in ("def", "class"):
                self._take(i + 1, i + 2, "FUNCTION" if word == "def" else "CLASS")

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        role = "MODULE"
        start = 1
        for i in range(1, len(self.words) + 1):
            word = self.words[i] if i < len(self.words) else ","
            if word in (",", "as", "import", "(", ")"):
                self._take(start, i, role)
                start = i + 1
                plain = isinstance(node, ast.Import)
                role = "IMPORT" if word == "as" or not plain else "MODULE"

    def _of_node(self, node: ast.AST) -> None:
        if isinstance(node, ast.Call):
            self._dotted(node.func, "CALL")
        elif isinstance(node, ast.Attribute):
            self._dotted(node, "ATTRIBUTE")
        elif isinstance(node, ast.keyword) and node.arg is not None:
            self._at(node.lineno, node.col_offset, "KEYWORD")
        elif isinstance(node, ast.arg):
            self._at(node.lineno, node.col_offset, "PARAMETER")
            self._annotation(node.annotation)
        elif isinstance(node, ast.AnnAssign):
            self._annotation(node.annotation)
        elif isinstance(node, ast.ExceptHandler):
            self._exceptions(node.type)
        elif isinstance(node, ast.Raise):
            self._exceptions(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            for decorator in node.decorator_list:
                name = decorator.func if isinstance(decorator, ast.Call) else decorator
                self._dotted(name, "DECORATOR")
            for base in node.bases if isinstance(node, ast.ClassDef) else ():
                self._dotted(base, "BASE")
            self._annotation(getattr(node, "returns", None))

    def _exceptions(self, node: ast.expr | None) -> None:
        for name in node.elts if isinstance(node, ast.Tuple) else [node]:
            if isinstance(name, ast.Attribute) or (
                isinstance(name, ast.Name) and name.id[:1].isupper()
            ):
                self._dotted(name, "EXCEPTION")

    def _annotation(self, node: ast.expr | None) -> None:
        for part in ast.walk(node) if node is not None else ():
            if isinstance(part, ast.Name | ast.Attribute):
                self._dotted(part, "TYPE")

    def _dotted(self, node: ast.AST, role: str) -> None:
        """All of a.b.c; only the last name of what begins with no name, as in f().c"""
        if not isinstance(node, ast.Name | ast.Attribute):
            return
        links = 0
        root: ast.expr = node
        while isinstance(root, ast.Attribute):
            root, links = root.value, links + 1
        start = self.index.get((root.lineno, root.col_offset))
        if isinstance(root, ast.Name) and start is not None:
            stop = start + 1 + 2 * links
            chain = self.words[start:stop]
            if chain[1::2] == ["."] * links:
                self._take(start, stop, role)
                return
        last = self._word_before(node.end_lineno or 0, node.end_col_offset or 0)
        if isinstance(node, ast.Attribute) and last is not None:
            self._take(last, last + 1, role)

    def _word_before(self, line: int, column: int) -> int | None:
        """The word that ends at this place."""
        return next(
            (
                i
                for (at, begin), i in self.index.items()
                if at == line and begin + len(self.words[i]) == column
            ),
            None,
        )

    def _at(self, line: int, column: int, role: str) -> None:
        if (i := self.index.get((line, column))) is not None:
            self._take(i, i + 1, role)

    def _take(self, start: int, stop: int, role: str) -> None:
        """Give words[start:stop] the role unless a part of it has one."""
        if start < stop and not self.taken.intersection(range(start, stop)):
            self.spans.append(Span(start, stop, role))
            self.taken.update(range(start, stop))


# --- classify: the package of a docstring ---------------------------------------------------------

_PACKAGES = 12


def _classify(modules: Iterable[corpora.Module]) -> Builtin:
    """Documents are classes and functions at the top of a module, with all that is inside them."""
    found: list[tuple[str, str, str]] = []  # document, text, package
    for module in modules:
        package = module.name.partition(".")[0]
        for top in module.tree.body:
            document = f"{module.name}.{getattr(top, 'name', '')}"
            found += [(document, text, package) for text in _texts(top)]
    owners: dict[str, set[str]] = {}
    for _, text, package in found:
        owners.setdefault(text, set()).add(package)
    sizes = Counter(package for _, text, package in found if len(owners[text]) == 1)
    largest = sorted(sizes, key=lambda package: (-sizes[package], package))[:_PACKAGES]
    splits = _Splits()
    for document, text, package in found:
        if package in largest and len(owners[text]) == 1:
            splits.add(document, text, package)
    about = (
        f"docstrings of the {_PACKAGES} packages of the standard library that have most of them, "
        "first paragraph only → the package; texts that stand in two packages are left out"
    )
    return splits.tables("classify", ("text", "label"), about)


def _texts(top: ast.AST) -> Iterator[str]:
    """The first paragraphs of the docstrings of a class or function and of all inside."""
    for node in ast.walk(top):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = _summary(node)
            if len(text) >= 20:
                yield text


def _summary(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The first paragraph of the docstring on one line, '' where there is none."""
    paragraph = (ast.get_docstring(node) or "").strip().partition("\n\n")[0]
    text = " ".join(paragraph.split())
    return text if text.isprintable() else ""


# --- pair: name ↔ docstring -----------------------------------------------------------------------


def _pair(modules: Iterable[corpora.Module]) -> Builtin:
    splits = _Splits()
    for module in modules:
        heads = [pair for pair in _functions(module) if len(pair[1]) >= 20]
        texts = list(dict.fromkeys(text for _, text in heads))
        for i, (head, text) in enumerate(heads):
            others = [other for other in texts if other != text]
            if not others:
                continue
            # Half of them belong together; the others get a text of the same module.
            together = _hash(head, text)[0] % 2 == 0
            other = others[int.from_bytes(_hash(head, str(i))[:4]) % len(others)]
            row = (head, text, "yes") if together else (head, other, "no")
            splits.add(module.name, *row)
    about = (
        "name and parameters of a function of the standard library, the first paragraph of a "
        "docstring of the same module → whether it is its own; the function's name in it is '…'"
    )
    return splits.tables("pair", ("text1", "text2", "label"), about)


def _functions(module: corpora.Module) -> Iterator[tuple[str, str]]:
    """('loads(s, cls)', 'Deserialize … to a Python object.') of each function with a docstring."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            parameters = [a.arg for a in named if a.arg not in ("self", "cls")]
            # The name in its own docstring would give the answer away.
            text = re.sub(rf"\b{re.escape(node.name)}\b", "…", _summary(node))
            yield f"{node.name}({', '.join(parameters)})", text


# --- next: the paragraph that follows -------------------------------------------------------------


def _next(modules: Iterable[corpora.Module]) -> Builtin:
    """A document is one docstring; the wrong paragraph comes from another one of the same split."""
    splits = _Splits()
    documents: dict[bool, list[list[str]]] = {True: [], False: []}
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                paragraphs = _paragraphs(ast.get_docstring(node) or "")
                if len(paragraphs) > 1:
                    documents[_held_out(module.name)].append([module.name, *paragraphs])
    for same in documents.values():
        for i, (name, *paragraphs) in enumerate(same):
            for first, second in pairwise(paragraphs):
                place = int.from_bytes(_hash(first, second)[:8])
                if place % 2 or len(same) == 1:
                    splits.add(name, first, second, "yes")
                else:
                    other = same[(i + 1 + (place >> 1) % (len(same) - 1)) % len(same)]
                    splits.add(name, first, other[1 + (place >> 33) % (len(other) - 1)], "no")
    about = (
        "a paragraph of a docstring of the standard library, another paragraph → whether it is "
        "the one that follows, or one of another docstring"
    )
    return splits.tables("next", ("text1", "text2", "label"), about)


def _paragraphs(docstring: str) -> list[str]:
    """The paragraphs of prose, each on one line: no examples, no lists of three words."""
    found = [" ".join(part.split()) for part in docstring.split("\n\n")]
    return [
        text
        for text in found
        if 40 <= len(text) <= 600 and text.isprintable() and not text.startswith(">>>")
    ]


# --- translate: a name → its words ----------------------------------------------------------------


def _translate(modules: Iterable[corpora.Module]) -> Builtin:
    """Python's own names come in both spellings, `getdefaultencoding` and `get_default_encoding`;
    whoever reads the first must know the words. Those written apart tell what they are."""
    where: dict[str, str] = {}  # words → the first module that has them
    for module in modules:
        for name in _names(module.tree):
            where.setdefault(" ".join(words_of(name)), module.name)
    splits = _Splits()
    by_source: dict[str, list[str]] = {}
    for target in where:
        by_source.setdefault(target.replace(" ", ""), []).append(target)
    for source, targets in by_source.items():
        # 'non empty' and 'nonempty' share a source: there would be no right answer.
        target = targets[0]
        if len(targets) == 1 and 2 <= target.count(" ") + 1 <= 6 and len(source) <= 40:
            splits.add(where[target], source, target)
    about = (
        "names of the standard library written as one word → their words, as get_default_encoding "
        "and getDefaultEncoding give them away; what to beat is copying the source"
    )
    return splits.tables("translate", ("source", "target"), about)


def _names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name):
            yield node.id


_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def words_of(name: str) -> list[str]:
    """The words that a name is made of, in lower case; digits are left out.

    'get_default_encoding' and 'getDefaultEncoding' -> ['get', 'default', 'encoding'],
    'HTTPServer' -> ['http', 'server']
    """
    return [word.lower() for word in _WORD.findall(name)]


# --- qa: what stands in the head of a function ----------------------------------------------------


def _qa(modules: Iterable[corpora.Module]) -> Builtin:
    splits = _Splits()
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                for question, context, start, stop in _questions(node):
                    answer = context[start:stop]
                    splits.add(module.name, question, context, answer, str(start))
    about = (
        "the head of a function of the standard library and the first paragraph of its docstring; "
        "asked are defaults, the parameter that has one, and what follows another"
    )
    return splits.tables("qa", ("question", "context", "answer", "start"), about)


def _questions(
    node: ast.FunctionDef | ast.AsyncFunctionDef,
) -> Iterator[tuple[str, str, int, int]]:
    """(question, context, start, stop); the answer is context[start:stop]."""
    named = [*node.args.posonlyargs, *node.args.args]
    if len(named) < 3 or not (summary := _summary(node)):
        return
    defaults: list[ast.expr | None] = [None] * (len(named) - len(node.args.defaults))
    defaults += node.args.defaults
    context, places = f"{node.name}(", []
    for i, (parameter, default) in enumerate(zip(named, defaults, strict=True)):
        context += ", " if i else ""
        name = (len(context), len(context) + len(parameter.arg))
        context += parameter.arg
        value = None
        if default is not None:
            text = ast.unparse(default)
            value = (len(context) + 1, len(context) + 1 + len(text))
            context += f"={text}"
        places.append((name, value))
    context += f"): {summary}"
    if len(context) > 400 or not context.isprintable():
        return
    for i, (name, value) in enumerate(places):
        word = context[slice(*name)]
        if value is not None:
            yield f"What is the default of {word}?", context, *value
        if i + 1 < len(places):
            yield f"Which parameter comes after {word}?", context, *places[i + 1][0]


# --- lm: the code itself --------------------------------------------------------------------------


_FUNCTIONS = {"train": 3000, "validation": 400}


def _lm(modules: Iterable[corpora.Module]) -> Builtin:
    splits = _Splits()
    for module in modules:
        lines = module.source.split("\n")  # as `ast` counts them
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                text = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
                if 100 <= len(text) <= 1000 and text.startswith(("def ", "async ")):
                    splits.add(module.name, text)
        if all(len(getattr(splits, split)) >= most for split, most in _FUNCTIONS.items()):
            break
    train, validation = (
        _table(f"built-in lm, {split}", ("text",), _fewer(rows, split)[: _FUNCTIONS[split]])
        for split, rows in (("train", splits.train), ("validation", splits.validation))
    )
    about = "functions of the standard library of 100 to 1,000 characters, each a document"
    return Builtin("lm", train, validation, about)


_BUILDERS: dict[str, Callable[[Iterable[corpora.Module]], Builtin]] = {
    "tag": _tag,
    "classify": _classify,
    "pair": _pair,
    "next": _next,
    "translate": _translate,
    "qa": _qa,
    "lm": _lm,
}
