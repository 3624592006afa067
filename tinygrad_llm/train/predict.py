"""Labels for new texts, from a fine-tuned checkpoint.

    classify   {"line": 1, "text": …, "label": "pos", "probability": 0.98, "probabilities": {…}}
    pair       the same with "text1" and "text2"
    translate  {"line": 1, "text": …, "translation": …}
    tag        {"line": 1, "words": […], "tags": […], "spans": [{"type", "start", "stop", "text"}]}

`start` and `stop` count words: a span is words[start:stop]. A text of zero length gets a label like
any other, so that every row of the data has its line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinygrad_llm.data import files
from tinygrad_llm.data.conll import Sentences, read_sentences
from tinygrad_llm.data.labels import spans
from tinygrad_llm.data.tables import Column, Table, lines_of, read_table
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.data.windows import TextWindows
from tinygrad_llm.models.seq2seq import Seq2Seq
from tinygrad_llm.models.tagger import Tagger
from tinygrad_llm.storage import check_sums
from tinygrad_llm.tasks import tag
from tinygrad_llm.tasks.classify import TASK_FILE, Collator, window_probabilities
from tinygrad_llm.tasks.translation import translate
from tinygrad_llm.train.finetune_data import second_column, text_column
from tinygrad_llm.train.finetune_models import model_folder, open_folder

Found = dict[str, Any]


@dataclass(frozen=True)
class Columns:
    """How a file is read; '' and None: by what is usual, and as the training data was."""

    text: str = ""
    second: str = ""
    header: bool | None = None
    quoted: bool | None = None


@dataclass(frozen=True)
class Predictor:
    """A fine-tuned model, and how it reads; `Predictor.open(folder)` makes one."""

    model: Any
    tokenizer: Tokenizer | None
    about: dict[str, Any] = field(default_factory=dict)  # task.json, where there is one

    @classmethod
    def open(cls, folder: str, device: str = "cpu") -> Predictor:
        """That of a run (its best checkpoint), or of a checkpoint.

        Raises FileNotFoundError and ValueError, with one sentence, where it cannot be opened or
        labels nothing.
        """
        found = model_folder(folder)
        tokenizer, model = open_folder(found)
        about: dict[str, Any] = {}
        if (found / TASK_FILE).is_file():
            check_sums(found, lambda name: name == TASK_FILE)
            about = json.loads((found / TASK_FILE).read_text(encoding="utf-8"))
        return cls(model.to(device), tokenizer, about)

    @property
    def task(self) -> str:
        """classify, pair, tag or translate."""
        if isinstance(self.model, Tagger):
            return "tag"
        return self.about.get("task", "classify")

    def of_file(self, path: str, columns: Columns) -> tuple[Iterator[Found], list[str]]:
        """(what was found for each row of a file, notes on how they were read)"""
        if self.task == "tag":
            return self.of_sentences(self._sentences(path, columns))
        file = Path(path).expanduser()
        alone = self.task in ("classify", "translate")
        if file.suffix.lower() == ".txt" and file.is_file() and alone:
            lines = lines_of(files.decode(file.read_bytes(), repr(path)))
            if not columns.text and not any("\t" in line for line in lines):
                return self.of_lines(lines)  # plain text: a line that is a name is one, too
        table = read_table(path, header=columns.header, quoted=columns.quoted)
        first = self._column(table, columns.text, "text_column")
        second = None
        if self.task == "pair":
            second = self._column(table, columns.second, "second_column")
        texts = table.texts(first)
        seconds = None if second is None else table.texts(second)
        found, notes = self.of_texts(texts, seconds, table.lines)
        return found, [*table.notes, *notes]

    def _column(self, table: Table, asked: str, key: str) -> Column:
        if asked:
            return asked
        known = str(self.about.get(key) or "")
        if known and known in table.columns:
            return known
        if len(table.columns) == 1 and self.task != "pair":
            return table.columns[0]
        if key == "second_column":
            return second_column(table)
        return text_column(table, pair=self.task == "pair")

    def _sentences(self, path: str, columns: Columns) -> Sentences:
        words: Column | None = columns.text or None
        if words is not None and words.removeprefix("-").isdecimal():
            words = int(words)
        return read_sentences(path, words, tagged=False, header=bool(columns.header))

    def of_lines(self, lines: Sequence[str]) -> tuple[Iterator[Found], list[str]]:
        """A text a line; a pair with a tab between; words with blanks between. Blank lines are not
        texts.

        Raises ValueError for a line without a pair where one is expected.
        """
        kept = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
        numbers, texts = [i for i, _ in kept], [line.strip("\r\n") for _, line in kept]
        if not kept:
            raise ValueError("there is no line with text in it to label")
        if self.task == "tag":
            words = [text.split() for text in texts]
            documents = list(range(len(words)))
            return self.of_sentences(Sentences("the lines", words, None, numbers, documents))
        if self.task != "pair":
            return self.of_texts(texts, None, numbers)
        pairs = [text.split("\t") for text in texts]
        wrong = next((i for i, pair in zip(numbers, pairs, strict=True) if len(pair) != 2), None)
        if wrong is not None:
            raise ValueError(f"line {wrong} must hold two texts with a tab between them")
        return self.of_texts([a for a, _ in pairs], [b for _, b in pairs], numbers)

    def of_texts(
        self, texts: Sequence[str], seconds: Sequence[str] | None, lines: Sequence[int]
    ) -> tuple[Iterator[Found], list[str]]:
        """What was found for each text, or pair of them, with the line that it is from."""
        assert self.tokenizer is not None
        config = self.model.config
        if isinstance(self.model, Seq2Seq):
            return self._translated(texts, lines)
        longest = getattr(config, "max_position_embeddings", 512)
        windows = TextWindows(
            self.tokenizer,
            texts,
            seconds,
            max_length=min(self.about.get("max_length", longest), longest),
            long=self.about.get("long", "cut"),
        )
        collate = Collator(self.tokenizer, getattr(config, "type_vocab_size", 1))
        probabilities = window_probabilities(self.model, windows, collate)
        names = list(config.labels.values())

        def found() -> Iterator[Found]:
            for i, row in enumerate(probabilities):
                said = {"text": texts[i]}
                if seconds is not None:
                    said = {"text1": texts[i], "text2": seconds[i]}
                shares = {n: round(float(p), 6) for n, p in zip(names, row, strict=True)}
                label = names[int(row.argmax())]
                yield {
                    "line": lines[i],
                    **said,
                    "label": label,
                    "probability": shares[label],
                    "probabilities": shares,
                }

        return found(), windows.notes

    def _translated(
        self, texts: Sequence[str], lines: Sequence[int]
    ) -> tuple[Iterator[Found], list[str]]:
        assert self.tokenizer is not None
        written = translate(self.model, self.tokenizer, texts)
        rows = zip(lines, texts, written, strict=True)
        return ({"line": n, "text": a, "translation": b} for n, a, b in rows), []

    def of_sentences(self, sentences: Sentences) -> tuple[Iterator[Found], list[str]]:
        """What was found for each sentence."""
        tags, notes = tag.predict(
            self.model,
            self.tokenizer,
            sentences.words,
            tag.documents_of(sentences),
            scheme=self.about.get("scheme"),
        )
        marks = self.model.config.scheme != "plain"

        def found() -> Iterator[Found]:
            for line, words, its in zip(sentences.lines, sentences.words, tags, strict=True):
                entities = [
                    {
                        "type": span.type,
                        "start": span.start,
                        "stop": span.stop,
                        "text": " ".join(words[span.start : span.stop]),
                    }
                    for span in (spans(its) if marks else [])
                ]
                yield {"line": line, "words": words, "tags": its, "spans": entities}

        return found(), [*sentences.notes, *notes]
