"""Fine-tuning for multi: one encoder that learns several tasks at once, a head for each.

    # tasks.toml: a section for each task; paths are relative to this file
    temperature = 1.0            # above 1 small tasks come more often, see tasks.multi

    [reviews]
    task = "classify"            # or pair, tag, qa
    data = "reviews.csv"
    label_column = "stars"
    weight = 0.5                 # of its loss; 1.0 where nothing is said

    [names]
    task = "tag"
    data = "train.conll"
    val_data = "dev.conll"

Its keys are those of `Section`: the flags about the data, and some of model and training; what it
does not say is as the flags say. `--data builtin` is the built-in data of tag, classify and pair
together.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tinygrad_llm.data.labels import LabelSet
from tinygrad_llm.data.questions import Questions
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.finetune.answers import Answering
from tinygrad_llm.finetune.config import (
    BUILTIN,
    FinetuneConfig,
    FinetuneData,
    FinetuneModel,
    YesNo,
)
from tinygrad_llm.finetune.encoders import (
    check_max_length,
    learnt_tokenizer,
    model_folder,
    open_model,
    sentence_pooling,
    small_bert,
    tokenizer_of,
)
from tinygrad_llm.finetune.kind import Columns, Defaults, Fitted, Rows
from tinygrad_llm.finetune.tags import Tagging, learnt_scheme
from tinygrad_llm.finetune.texts import Classification
from tinygrad_llm.metrics.multi import MultiReport, measure_of
from tinygrad_llm.models.bert import BertConfig, Pooling
from tinygrad_llm.models.multitask import (
    Head,
    MultiTask,
    MultiTaskConfig,
    check_name,
    encoder_of,
)
from tinygrad_llm.models.pretrained import read_config
from tinygrad_llm.tasks.classify import Texts
from tinygrad_llm.tasks.multi import SeveralTasks
from tinygrad_llm.tasks.tag import tagger_config
from tinygrad_llm.train import config as configuration
from tinygrad_llm.train.config import ConfigError
from tinygrad_llm.train.log import Log, QuietLog

Single = Literal["classify", "pair", "tag", "qa"]

_KINDS: dict[Single, Any] = {
    "classify": Classification(),
    "pair": Classification(pairs=True),
    "tag": Tagging(),
    "qa": Answering(),
}


# --- tasks.toml -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """What a section says of its task; '' and 0: as the flags say."""

    task: Single = "classify"
    data: str = ""
    val_data: str = ""
    val_fraction: float = 0.0
    text_column: str = ""
    second_column: str = ""
    label_column: str = ""
    question_column: str = ""
    context_column: str = ""
    answer_column: str = ""
    start_column: str = ""
    header: YesNo = "auto"
    quoted: YesNo = "auto"
    weight: float = 1.0
    batch_size: int = 0
    max_length: int = 0
    long: Literal["", "cut", "windows"] = ""
    metric: Literal["", "accuracy", "macro-f1", "mcc"] = ""
    class_weights: Literal["", "none", "balanced"] = ""

    def __post_init__(self) -> None:
        # Without the name of the section, which stands before it.
        for name in ("val_fraction", "batch_size", "max_length"):
            configuration.require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        above = 0 < self.weight < float("inf")
        configuration.require(above, "weight", "above 0", self.weight)
        for name in _NOT_OF.get(self.task, ()):
            if getattr(self, name):
                raise ConfigError(f"{name} is not for {self.task}")


_NOT_OF: dict[Single, tuple[str, ...]] = {
    "tag": ("max_length", "long", "metric", "class_weights"),
    "qa": ("metric", "class_weights"),
}


@dataclass(frozen=True)
class Plan:
    """tasks.toml as it was read."""

    where: str  # for errors
    sections: dict[str, Section]
    temperature: float = 1.0

    @classmethod
    def of(cls, source: str) -> Plan:
        """That of the file, or of the built-in data.

        Raises FileNotFoundError where there is no such file, and ConfigError, which names file,
        section and key, where it cannot be used.
        """
        if source == BUILTIN:
            tasks: tuple[Single, ...] = ("tag", "classify", "pair")
            return cls("built-in data", {task: Section(task, BUILTIN) for task in tasks})
        found = _read_toml(Path(source).expanduser())
        temperature = found.pop("temperature", 1.0)
        sections = {}
        for name, values in found.items():
            if not isinstance(values, Mapping):
                hint = configuration.nearest(name, ["temperature"])
                raise ConfigError(
                    f"{source}: unknown key {name!r}{hint}; a task is a section, such as [reviews]"
                )
            try:
                check_name(name)
            except ValueError as error:
                raise ConfigError(f"{source}: [{name}]: {error}") from None
            sections[name] = _section(source, name, dict(values))
        if not sections:
            raise ConfigError(f"{source} has no section: each task is one, such as [reviews]")
        number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
        if not number or not 1 <= temperature < float("inf"):
            raise ConfigError(f"{source}: temperature must be a number from 1, got {temperature!r}")
        return cls(source, sections, float(temperature))

    def config_of(self, name: str, config: FinetuneConfig) -> FinetuneConfig:
        """The configuration of the task alone: the flags, and over them its section."""
        s = self.sections[name]
        data = FinetuneData(
            source=s.data,
            val_source=s.val_data,
            val_fraction=s.val_fraction or config.data.val_fraction,
            text_column=s.text_column,
            second_column=s.second_column,
            label_column=s.label_column,
            question_column=s.question_column,
            context_column=s.context_column,
            answer_column=s.answer_column,
            start_column=s.start_column,
            header=s.header,
            quoted=s.quoted,
        )
        model, train = config.model, config.train
        # What is cut off a context may be the answer.
        long = s.long or ("windows" if s.task == "qa" else model.long)
        model = replace(model, max_length=s.max_length or model.max_length, long=long)
        # The loss is no score of a task among others: a mean needs what grows with skill.
        metric = s.metric or ("accuracy" if train.metric == "loss" else train.metric)
        train = replace(
            train,
            batch_size=s.batch_size or train.batch_size,
            metric=metric,
            class_weights=s.class_weights or train.class_weights,
        )
        if s.task in ("tag", "qa"):
            train = replace(train, class_weights="none")
        return replace(config, task=s.task, data=data, model=model, train=train)

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Within: what is wrong is said with the file and the section, flags as keys."""
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.where}: [{name}]: {_keys(str(error))}") from error
        except ValueError as error:
            raise ConfigError(f"{self.where}: [{name}]: {_keys(str(error))}") from error


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {str(path)!r} with the tasks") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: byte {error.start} is invalid") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{path} is not valid TOML: {error}; multi takes a file with a section for each task"
        ) from error


def _section(source: str, name: str, values: dict[str, Any]) -> Section:
    keys = [f.name for f in dataclasses.fields(Section)]
    for key in values:
        if key not in keys:
            hint = configuration.nearest(key, keys)
            raise ConfigError(f"{source}: [{name}]: unknown key {key!r}{hint}")
    for key, advice in (("task", f"one of {', '.join(_KINDS)}"), ("data", f"a file, or {BUILTIN}")):
        if not values.get(key):
            raise ConfigError(f"{source}: [{name}]: {key} is missing: give {advice}")
    for key, value in values.items():
        if key in ("header", "quoted") and isinstance(value, bool):
            values[key] = "yes" if value else "no"
        elif key.endswith("_column") and type(value) is int:
            values[key] = str(value)
    found = configuration.merge(Section(), values, where=f"{source}: [{name}]")
    folder = Path(source).expanduser().parent
    paths = {
        key: str(folder / Path(path).expanduser())
        for key in ("data", "val_data")
        if (path := getattr(found, key)) not in ("", BUILTIN)
    }
    return replace(found, **paths)


def _keys(sentence: str) -> str:
    """'Name it with --label-column' -> 'Name it with label_column'"""
    keys = {f.name for f in dataclasses.fields(Section)}

    def key(match: re.Match[str]) -> str:
        name = match[1].replace("-", "_")
        return name if name in keys else match[0]

    sentence = re.sub(r"--no-(header|quoted)\b", r"\1 = false", sentence)
    return re.sub(r"--([a-z]+(?:-[a-z]+)*)", key, sentence)


# --- the kind -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """The examples of each task, to train on or to validate with."""

    plan: Plan
    of: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(map(len, self.of.values()))


@dataclass(frozen=True)
class Several:
    """The kind of multi."""

    examples: str = "examples"
    models: tuple[type, ...] = (MultiTask,)

    def read(self, config: FinetuneConfig, log: Log) -> tuple[Split, Split]:
        """(training, validation): those of every task, each read by its own kind."""
        _refuse_flags(config)
        plan = Plan.of(config.data.source)
        train, validation = Split(plan), Split(plan)
        for name, section in plan.sections.items():
            with plan.within(name):
                its = plan.config_of(name, config)
                both = _KINDS[section.task].read(its, _Prefixed(log, name))
            train.of[name], validation.of[name] = both
        return train, validation

    # --- the model --------------------------------------------------------------------------------

    def begin(self, config: FinetuneConfig, train: Split, log: Log) -> tuple[Tokenizer, MultiTask]:
        """(tokenizer, model): heads on a checkpoint, or on a small encoder at random.

        The pieces of that one are learnt from the texts of all tasks.
        """
        options = config.model
        if options.checkpoint:
            folder = model_folder(options.checkpoint)
            bert = _encoder_in(folder, options.checkpoint)
            check_max_length(
                options.max_length, options.checkpoint, bert.max_position_embeddings, _TO_READ_ALL
            )
            tokenizer = tokenizer_of(folder, bert.vocab_size)
            sizes = _sizes(bert, train, _Poolings.of(options, folder), _ON_CHECKPOINT)
            model = MultiTask.from_checkpoint(folder, sizes)
            log.say(f"{options.checkpoint}: the encoder; new at random: a head for each task")
            return tokenizer, model
        columns = [column for its in train.of.values() for column in _columns(its)]
        tokenizer = learnt_tokenizer(columns, options, log)
        bert = small_bert(options, tokenizer.vocab_size)
        sizes = _sizes(bert, train, _Poolings.of(options), _without_checkpoint(bert))
        return tokenizer, MultiTask(sizes)

    def open(self, folder: Path) -> tuple[Tokenizer, MultiTask]:
        """(tokenizer, model) as a checkpoint of a run holds them."""
        model = open_model(folder, self.models)
        return Tokenizer.from_file(folder), model

    def defaults(self, config: FinetuneConfig, model: MultiTask) -> Defaults:
        """Between those of texts and those of words; the heads above a checkpoint learn faster."""
        width = model.config.bert.hidden_size
        if not config.model.checkpoint:
            return Defaults(16, 1e-3 * 128 / width)
        lr = float(f"{7e-5 * 768 / width:.2g}")
        return Defaults(8, lr, 5 * lr)

    def task(
        self,
        config: FinetuneConfig,
        train: Split,
        validation: Split,
        tokenizer: Tokenizer | None,
        model: MultiTask,
    ) -> SeveralTasks:
        """What the trainer is given."""
        assert tokenizer is not None
        plan = train.plan
        if list(plan.sections) != list(model.heads):  # of a run that is resumed
            raise ConfigError(
                f"{plan.where} has the tasks {', '.join(plan.sections)}, but the run began with "
                f"{', '.join(model.heads)}: resume with the old ones, or start a new run"
            )
        tasks: dict[str, Any] = {}
        for name, section in plan.sections.items():
            its, head = plan.config_of(name, config), model.heads[name]
            data = train.of[name], validation.of[name]
            with plan.within(name):
                longest = model.config.bert.max_position_embeddings
                check_max_length(its.model.max_length, "the encoder", longest, _TO_READ_ALL)
                tasks[name] = _KINDS[section.task].task(its, *data, tokenizer, head)
                tasks[name].notes = [_keys(note) for note in tasks[name].notes]
        return SeveralTasks(
            tasks,
            tokenizer,
            weights={name: section.weight for name, section in plan.sections.items()},
            temperature=plan.temperature,
            score="val_loss" if config.train.metric == "loss" else "val_mean",
            seed=config.data_seed,
            about={"task": config.task, "tasks": {n: task.about for n, task in tasks.items()}},
        )

    def report(self, task: SeveralTasks, model: MultiTask) -> MultiReport:
        """The report of each task, and the mean of their scores."""
        reports, measures = {}, {}
        for name, its in task.tasks.items():
            kind = _KINDS[task.about["tasks"][name]["task"]]
            reports[name] = kind.report(its, model.heads[name])
            measures[name] = measure_of(reports[name], its.score)
        return MultiReport("the validation data", reports, measures)

    # --- new data ---------------------------------------------------------------------------------

    def of_file(self, fitted: Fitted, path: str, columns: Columns) -> Rows:
        """What the only head says of each row; `one_head` chooses among several."""
        kind, its = one_head(fitted, "")
        return _KINDS[kind].of_file(its, path, columns)

    def of_lines(self, fitted: Fitted, lines: Sequence[str]) -> Rows:
        """What the only head says of each line."""
        kind, its = one_head(fitted, "")
        return _KINDS[kind].of_lines(its, lines)


_TO_READ_ALL = ", and --long windows to read all"


def one_head(fitted: Fitted, name: str) -> tuple[Single, Fitted]:
    """(its task, its model and how it reads) of the head of that name; '': of the only one.

    ConfigError, with the names, where there is none, or several and none is named.
    """
    known: dict[str, Any] = fitted.about.get("tasks", {})
    there = ", ".join(f"{n} ({known[n]['task']})" if n in known else n for n in fitted.model.heads)
    if not name and len(fitted.model.heads) == 1:
        name = next(iter(fitted.model.heads))
    if not name:
        raise ConfigError(f"this model has several heads: say which with --task, of {there}")
    if name not in fitted.model.heads:
        hint = configuration.nearest(name, fitted.model.heads)
        raise ConfigError(f"this model has no head {name!r}{hint} (it has {there})")
    if name not in known:
        raise ConfigError(f"the checkpoint does not say how {name!r} reads: its task.json is lost")
    its = Fitted(fitted.model.heads[name], fitted.tokenizer, known[name])
    return known[name]["task"], its


class _Prefixed(QuietLog):
    """What is said of one task, with its name before it."""

    def __init__(self, log: Log, name: str) -> None:
        self.log, self.name = log, name

    def say(self, text: str) -> None:
        self.log.say(f"{self.name}: {text}")


def _refuse_flags(config: FinetuneConfig) -> None:
    """What is said of one file cannot be said of several."""
    for option in dataclasses.fields(FinetuneData):
        given = getattr(config.data, option.name) != option.default
        if given and option.name not in ("source", "val_fraction"):
            key = "val_data" if option.name == "val_source" else option.name
            raise ConfigError(
                f"--{key.replace('_', '-')} is of one task: write {key} into its section of the "
                "TOML file"
            )
    if config.model.encoder != "bert":
        raise ConfigError("several heads share a bert: leave out --encoder bilstm")


# --- encoder and heads ----------------------------------------------------------------------------


def _encoder_in(folder: Path, name: str) -> BertConfig:
    """The config of the BERT in the folder, without that of a head."""
    found: dict[str, Any] = read_config(folder, dict)
    if found.get("model_type", "bert") != "bert":
        raise ConfigError(
            f"{name} is a model of type {found.get('model_type')!r}: to learn several tasks, "
            "expected a BERT"
        )
    return encoder_of(read_config(folder, BertConfig.from_dict))


class _Poolings(NamedTuple):
    """What the heads for texts, and for pairs of them, look at."""

    classify: Pooling
    pair: Pooling

    @classmethod
    def of(cls, options: FinetuneModel, folder: Path | None = None) -> _Poolings:
        """As asked, or as the checkpoint was trained; at random as `texts` begins them."""
        asked = None if options.pooling == "auto" else options.pooling
        trained = (sentence_pooling(folder) if folder is not None else None) or "cls"
        pair = asked or (trained if folder is not None else "compare")
        return cls(trained if asked in (None, "compare") else asked, pair)


def _sizes(
    bert: BertConfig, train: Split, poolings: _Poolings, of_taggers: Mapping[str, Any]
) -> MultiTaskConfig:
    heads = {}
    for name, section in train.plan.sections.items():
        data = train.of[name]
        with train.plan.within(name):
            if section.task == "tag":
                options = {"scheme": learnt_scheme(data), "bert": bert, **of_taggers}
                heads[name] = Head("Tagger", tagger_config(data, **options))
            elif section.task == "qa":
                heads[name] = Head("BertForQuestionAnswering", bert)
            else:
                pooling = poolings.pair if section.task == "pair" else poolings.classify
                heads[name] = _head_for(LabelSet.of(data.labels), bert, pooling)
    return MultiTaskConfig(bert, heads)


# Batches of 8 such rows hold as many words as the 4 long ones of the recipe for a tagger alone.
_ON_CHECKPOINT: dict[str, Any] = {"row_pieces": 96}


def _without_checkpoint(bert: BertConfig) -> dict[str, Any]:
    """Options of a tagger on an encoder that knows no words yet: it looks them up by itself, too.

    Short rows, so that a batch of sentences is not many times as large as one of texts.
    """
    width = bert.hidden_size
    return {
        "word_size": min(100, width),
        "word_dropout": 0.5,
        "hidden_size": min(200, width),
        "dropout": 0.5,
        "row_pieces": 48,
        "context_pieces": 8,
    }


def _head_for(labels: LabelSet, bert: BertConfig, pooling: Pooling) -> Head:
    names = dict(enumerate(labels.names))
    config = replace(bert, num_labels=len(names), id2label=names, classifier_pooling=pooling)
    return Head("BertForSequenceClassification", config)


def _columns(data: Any) -> list[list[str]]:
    """The texts of the data, for the pieces of a tokenizer."""
    if isinstance(data, Texts):
        return [data.texts, *([] if data.seconds is None else [data.seconds])]
    if isinstance(data, Questions):
        return [data.questions, list(dict.fromkeys(data.contexts))]
    return [[" ".join(words) for words in data.words]]
