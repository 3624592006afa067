"""Fine-tuning for qa: the passage of a context that answers a question.

    question + context → BERT → where the answer begins, where it ends

Scored is the text of the passage by SQuAD's exact match and F1, beside what two constants score:
the most frequent answer of training, and the most frequent one that stands in the context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinygrad_llm.data.answers import AnswerWindows
from tinygrad_llm.data.questions import Questions, hold_out, read_squad
from tinygrad_llm.data.tables import Table, read_table
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.finetune.config import FinetuneConfig, FinetuneData, FinetuneModel
from tinygrad_llm.finetune.encoders import (
    check_max_length,
    learnt_tokenizer,
    model_folder,
    open_model,
    small_bert,
    tokenizer_of,
)
from tinygrad_llm.finetune.kind import Columns, Defaults, Fitted, Found, Rows, with_text
from tinygrad_llm.finetune.tables import named, open_table, splits, title
from tinygrad_llm.finetune.texts import trained_on
from tinygrad_llm.metrics.answers import AnswerReport, answer_report
from tinygrad_llm.models.bert import BertConfig, BertForQuestionAnswering
from tinygrad_llm.models.pretrained import read_config
from tinygrad_llm.tasks.answer import AnswerCollator, AnswerTask, read
from tinygrad_llm.train.config import ConfigError
from tinygrad_llm.train.log import Log


@dataclass(frozen=True)
class Answering:
    """The kind of qa."""

    examples: str = "questions"
    models: tuple[type, ...] = (BertForQuestionAnswering,)

    def read(self, config: FinetuneConfig, log: Log) -> tuple[Questions, Questions]:
        """(training, validation); what is held out shares no context with the rest."""
        share, seed = config.data.val_fraction, config.train.seed
        _check_flags(config)
        return splits(
            config,
            log,
            examples=self.examples,
            built_in=lambda table: questions_of(table, config.data),
            open_file=lambda path: open_questions(path, config),
            check=_check,
            hold_out=lambda data: hold_out(data, share, seed),
        )

    # --- the model --------------------------------------------------------------------------------

    def begin(
        self, config: FinetuneConfig, train: Questions, log: Log
    ) -> tuple[Tokenizer, BertForQuestionAnswering]:
        """(tokenizer, model): a BERT with a head for begin and end, or a small one at random."""
        options = config.model
        if options.checkpoint:
            return _begin_from(options, log)
        texts = [train.questions, list(dict.fromkeys(train.contexts))]
        tokenizer = learnt_tokenizer(texts, options, log)
        return tokenizer, BertForQuestionAnswering(small_bert(options, tokenizer.vocab_size))

    def open(self, folder: Path) -> tuple[Tokenizer, BertForQuestionAnswering]:
        """(tokenizer, model) as a checkpoint of a run holds them."""
        model = open_model(folder, self.models)
        return Tokenizer.from_file(folder), model

    def defaults(self, config: FinetuneConfig, model: BertForQuestionAnswering) -> Defaults:
        """BERT's authors train SQuAD at 5e-5 and a width of 768; see `Classification.defaults`."""
        width = model.config.hidden_size
        return Defaults(32, 5e-5 * 768 / width if config.model.checkpoint else 2e-3 * 128 / width)

    def task(
        self,
        config: FinetuneConfig,
        train: Questions,
        validation: Questions,
        tokenizer: Tokenizer | None,
        model: BertForQuestionAnswering,
    ) -> AnswerTask:
        """What the trainer is given."""
        assert tokenizer is not None
        data, options = config.data, config.model
        return AnswerTask(
            train,
            validation,
            tokenizer,
            max_length=options.max_length,
            long=options.long,
            batch_size=config.train.batch_size,
            segments=model.config.type_vocab_size,
            seed=config.data_seed,
            about={
                "task": config.task,
                "question_column": data.question_column,
                "context_column": data.context_column,
                "max_length": options.max_length,
                "long": options.long,
            },
        )

    def report(self, task: AnswerTask, model: BertForQuestionAnswering) -> AnswerReport:
        """Exact match and F1 of the answers, beside those of constants."""
        return answer_report(
            [guess.text for guess in task.predicted(model)],
            task.held_out.texts,
            name=title(task.held_out.name),
            usual=task.usual_answer(),
            baselines={"the usual answer in the context": task.usual_answers()},
            notes=task.notes,
        )

    # --- new questions ----------------------------------------------------------------------------

    def of_file(self, fitted: Fitted, path: str, columns: Columns) -> Rows:
        """An answer to each question of a file; answers in it are not looked at."""
        if columns.text or columns.second:
            raise ConfigError(_NOT_TEXTS)
        if Path(path).suffix.lower() == ".json":
            if columns.question or columns.context:
                raise ConfigError(_NO_COLUMNS.format(path))
            return _answered(fitted, read_squad(path, answered=False), "id")
        table = read_table(path, header=columns.header, quoted=columns.quoted)
        about = fitted.about
        asked = columns.question or trained_on(table, about, "question_column")
        told = columns.context or trained_on(table, about, "context_column")
        question, context = asked or _question(table), told or _context(table)
        return _answered(fitted, Questions.of(table, question, context), "line")

    def of_lines(self, fitted: Fitted, lines: Sequence[str]) -> Rows:
        """An answer to each line: a question, a tab, its context."""
        numbers, texts = with_text(lines)
        pairs = [[part.strip() for part in text.split("\t")] for text in texts]
        for number, pair in zip(numbers, pairs, strict=True):
            if len(pair) != 2 or not all(pair):
                raise ValueError(
                    f"line {number} must hold a question and its context with a tab between them"
                )
        questions, contexts = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        asked = Questions("the lines", questions, contexts, [[] for _ in pairs], [*numbers])
        return _answered(fitted, asked, "line")


def _answered(fitted: Fitted, asked: Questions, key: str) -> Rows:
    assert fitted.tokenizer is not None
    config, about = fitted.model.config, fitted.about
    longest = config.max_position_embeddings
    windows = AnswerWindows(
        fitted.tokenizer,
        asked.questions,
        asked.contexts,
        max_length=min(about.get("max_length", 384), longest),
        long=about.get("long", "windows"),
    )
    guesses = read(
        fitted.model,
        windows,
        asked.contexts,
        AnswerCollator(fitted.tokenizer, config.type_vocab_size),
        most=about.get("longest_answer", 30),
        unanswerable=about.get("unanswerable", False),
    ).guesses

    def found() -> Iterator[Found]:
        rows = zip(asked.ids, asked.questions, asked.contexts, guesses, strict=True)
        for place, question, context, guess in rows:
            yield {
                key: place,
                "question": question,
                "context": context,
                "answer": guess.text,
                "start": guess.start,
                "stop": guess.stop,
                "probability": round(guess.probability, 6),
            }

    return found(), [*asked.notes, *windows.notes]


# --- data -----------------------------------------------------------------------------------------

_NOT_TEXTS = (
    "questions have no text column: name theirs with --question-column and --context-column"
)
_NO_COLUMNS = "{} is JSON, as SQuAD's: it has no columns to name"
_QUESTIONS = ("question", "query", "questions")
_CONTEXTS = ("context", "passage", "paragraph", "document", "text", "article")
_ANSWERS = ("answer", "answers", "answer_text")
_STARTS = ("start", "answer_start")


def open_questions(path: str, config: FinetuneConfig) -> Questions:
    """Those of a file: SQuAD's JSON, or a table."""
    if Path(path).suffix.lower() != ".json":
        return questions_of(open_table(path, config), config.data)
    if config.data.columns_of_questions:
        raise ConfigError(_NO_COLUMNS.format(path))
    return read_squad(path)


def questions_of(table: Table, data: FinetuneData) -> Questions:
    """Those in the columns that are named, or that are named as is usual."""
    question = data.question_column or _question(table)
    context = data.context_column or _context(table)
    answer = data.answer_column or named(table, _ANSWERS, 3, "answer", "--answer-column")
    start = data.start_column or next(
        (name for name in table.columns if name.lower() in _STARTS), None
    )
    return Questions.of(table, question, context, answer, start)


def _question(table: Table) -> Any:
    return named(table, _QUESTIONS, 1, "question", "--question-column")


def _context(table: Table) -> Any:
    return named(table, _CONTEXTS, 2, "context", "--context-column")


def _check_flags(config: FinetuneConfig) -> None:
    data = config.data
    if data.text_column or data.second_column or data.label_column:
        raise ConfigError(f"{_NOT_TEXTS}, and --answer-column")
    if config.train.class_weights != "none":
        raise ConfigError("--class-weights is for texts and pairs of texts, not for qa")
    if config.model.encoder != "bert":
        raise ConfigError("qa is learnt by a BERT: leave out --encoder")


def _check(data: Questions) -> None:
    """Refuse what has nothing to learn from."""
    if data.unanswerable == len(data):
        raise ValueError(
            f"{data.name}: no question has an answer, so there is nothing to learn; is it the "
            "right --answer-column?"
        )


# --- models ---------------------------------------------------------------------------------------


def _begin_from(options: FinetuneModel, log: Log) -> tuple[Tokenizer, BertForQuestionAnswering]:
    """The checkpoint with its own head for begin and end, or with a new one."""
    folder, kind = model_folder(options.checkpoint), BertForQuestionAnswering
    found: dict[str, Any] = read_config(folder, dict)
    if found.get("model_type") != "bert":
        raise ConfigError(
            f"{options.checkpoint} is a model of type {found.get('model_type')!r}: to answer "
            "questions, expected a BERT"
        )
    has_head = (found.get("architectures") or [None])[0] == kind.architecture
    outputs = BertConfig.from_dict(found).num_labels
    if has_head and outputs != 2 and not options.new_head:
        raise ConfigError(
            f"{options.checkpoint} has a head with {outputs} outputs, question answering has two, "
            "begin and end; give --new-head to begin one anew"
        )
    head: dict[str, Any] = {"num_labels": 2, "id2label": None}
    model, loaded = kind.load(folder, np.float32, ignore_mismatched_sizes=True, **head)
    if has_head and options.new_head:
        for name, parameter in model.qa_outputs.named_parameters():
            model.init_parameter(f"qa_outputs.{name}", parameter)
    if loaded.new:
        log.say(f"{options.checkpoint}: new at random: {', '.join(loaded.new)}")
    longest = model.config.max_position_embeddings
    check_max_length(options.max_length, options.checkpoint, longest)
    return tokenizer_of(folder, model.config.vocab_size), model
