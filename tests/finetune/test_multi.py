"""multi: tasks.toml, heads on one encoder, a run that learns all of them, goes on, and predicts."""

import io
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinygrad_llm import manual_seed
from tinygrad_llm.data import builtin
from tinygrad_llm.data.conll import Sentences
from tinygrad_llm.data.tables import Table
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.finetune import config as finetune_config
from tinygrad_llm.finetune import run as finetune
from tinygrad_llm.finetune.kind import Columns
from tinygrad_llm.finetune.multi import Plan
from tinygrad_llm.finetune.predict import Predictor
from tinygrad_llm.metrics.multi import MultiReport
from tinygrad_llm.models.bert import BertConfig, BertForSequenceClassification, BertModel
from tinygrad_llm.models.gpt import GPT, GPTConfig
from tinygrad_llm.models.multitask import MultiTask
from tinygrad_llm.models.tagger import Tagger
from tinygrad_llm.train.config import ConfigError, merge
from tinygrad_llm.train.log import PlainLog, QuietLog
from tinygrad_llm.train.run import Run
from tinygrad_llm.train.trainer import Interrupted

WORDS = {"pos": ["fine", "lovely", "great"], "neg": ["awful", "dull", "poor"]}
TASKS = """
[reviews]
task = "classify"
data = "reviews.csv"
val_data = "reviews-dev.csv"
label_column = "stars"

[same]
task = "pair"
data = "pairs.tsv"
header = false

[names]
task = "tag"
data = "train.conll"
val_data = "dev.conll"
weight = 0.5
batch_size = 4
"""


def write_reviews(path: Path, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lines = ["text,stars"]
    for i in range(count):
        label = ("pos", "neg")[i % 2]
        words = " ".join(WORDS[label][j] for j in rng.integers(3, size=3))
        lines.append(f"film {seed} {i} is {words},{label}")
    path.write_text("\n".join(lines) + "\n")


def write_sentences(path: Path, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        name, place = ["Ada", "Bob", "Eva"][rng.integers(3)], ["Rome", "Oslo"][rng.integers(2)]
        lines += [f"{name} B-PER", "went O", "to O", f"{place} B-LOC", "City I-LOC", ". O", ""]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def folder(tmp_path):
    """Files of three tasks, and tasks.toml beside them."""
    write_reviews(tmp_path / "reviews.csv", 40, 0)
    write_reviews(tmp_path / "reviews-dev.csv", 12, 1)
    write_sentences(tmp_path / "train.conll", 30, 0)
    write_sentences(tmp_path / "dev.conll", 8, 1)
    pairs = [f"film {i % 7}\t{'film' if i % 2 else 'book'} {i % 5}\t{i % 2}" for i in range(36)]
    (tmp_path / "pairs.tsv").write_text("\n".join(pairs) + "\n")
    (tmp_path / "tasks.toml").write_text(TASKS)
    return tmp_path


@pytest.fixture
def bert(tmp_path):
    """A folder with a small BERT, two layers deep."""
    words = " ".join([*WORDS["pos"], *WORDS["neg"], "film is Ada Bob Eva went to Rome Oslo City ."])
    tokenizer = Tokenizer.wordpiece(f"{words} " * 9, 120)
    manual_seed(5)
    sizes = BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    BertModel(sizes).save_pretrained(tmp_path / "bert")
    tokenizer.save(tmp_path / "bert")
    return str(tmp_path / "bert")


def config_of(source: Any, **changes: Any) -> Any:
    begun = finetune_config.preset("tiny", "multi")
    sections: dict[str, Any] = {
        "data": {"source": str(source)},
        "model": {},
        "train": {"processes": 1, "device": "cpu"},
    }
    homes = {"data": begun.data, "model": begun.model, "train": begun.train}
    for key, value in changes.items():
        section = next(name for name, home in homes.items() if hasattr(home, key))
        sections[section][key] = value
    return merge(begun, sections, where="the test")


def start(config: Any, folder: Any, log: Any = None) -> Any:
    return finetune.start(config, folder, log or QuietLog())


def weights(model: Any) -> dict[str, np.ndarray]:
    return {name: p.numpy().copy() for name, p in model.named_parameters()}


# --- a whole run ----------------------------------------------------------------------------------


def test_a_run_learns_its_tasks_scores_them_and_each_head_predicts(folder, tmp_path):
    out = io.StringIO()
    text = (folder / "tasks.toml").read_text()
    without = text[: text.index("[same]")] + text[text.index("[names]") :]
    (folder / "tasks.toml").write_text(without)
    config = config_of(folder / "tasks.toml", epochs=12, lr=1e-2)
    ready = start(config, tmp_path / "run", PlainLog(out))
    ready.trainer.fit()
    report, why_not = ready.report()
    assert isinstance(report, MultiReport)
    assert report.scores == {"reviews": 1.0, "names": 1.0}
    found = json.loads((tmp_path / "run/metrics.json").read_text())
    assert found["mean"] == 1.0
    assert found["scores"]["names"]["measure"] == "entity F1"
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert why_not or {"metrics.png", "metrics_reviews.png", "metrics_names.png"} <= names
    assert "reviews: data: 40 texts to train on, 12 to validate with" in out.getvalue()

    reviews = Predictor.open(str(tmp_path / "run"), head="reviews")
    assert reviews.task == "classify"
    rows = list(reviews.of_file(str(folder / "reviews-dev.csv"), Columns())[0])
    assert [row["label"] for row in rows] == ["pos", "neg"] * 6
    tags = Predictor.open(str(tmp_path / "run"), head="names")
    (row,) = tags.of_lines(["Bob went to Oslo City ."])[0]
    assert row["tags"] == ["B-PER", "O", "O", "B-LOC", "I-LOC", "O"]
    with pytest.raises(ConfigError, match=r"--task, of reviews \(classify\), names \(tag\)"):
        Predictor.open(str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="no head 'name'; did you mean 'names'"):
        Predictor.open(str(tmp_path / "run"), head="name")


def test_a_head_goes_into_an_ordinary_folder(folder, tmp_path):
    ready = start(config_of(folder / "tasks.toml", epochs=1), tmp_path / "run")
    ready.trainer.fit()
    model = MultiTask.from_pretrained(ready.run.checkpoint("best"))
    assert list(model.heads) == ["reviews", "same", "names"]
    model.head("reviews").save_pretrained(tmp_path / "reviews")
    ready.task.tokenizer.save(tmp_path / "reviews")
    alone = Predictor.open(str(tmp_path / "reviews"))
    assert isinstance(alone.fitted.model, BertForSequenceClassification)
    both = Predictor.open(str(tmp_path / "run"), head="reviews")
    for found, expected in zip(
        *(list(p.of_lines(["a fine film", "dull"])[0]) for p in (alone, both)), strict=True
    ):
        assert found == expected
    with pytest.raises(ConfigError, match="has one head, for classify: leave out --task"):
        Predictor.open(str(tmp_path / "reviews"), head="reviews")
    model.head("names").save_pretrained(tmp_path / "names")
    assert isinstance(Tagger.from_pretrained(tmp_path / "names"), Tagger)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_run_is_the_one_that_was_not_stopped(processes, folder, tmp_path):
    options = {"epochs": 2, "lr": 3e-3, "keep_last": 0, "processes": processes}
    whole = start(config_of(folder / "tasks.toml", **options), tmp_path / "whole")
    whole.trainer.fit()
    part = start(config_of(folder / "tasks.toml", **options), tmp_path / "part")
    next_batch = part.task.next_batch

    def stopping() -> Any:
        if part.trainer.step == part.task.steps_per_epoch - 3:
            part.trainer._signal = signal.SIGINT
        return next_batch()

    part.task.next_batch = stopping
    with pytest.raises(Interrupted):
        part.trainer.fit()
    run = Run.open(tmp_path / "part")
    again: Any = finetune.resume(run, finetune_config.load(run.config_file), QuietLog())
    again.trainer.fit()
    ours, theirs = weights(whole.model), weights(again.model)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert again.report()[0].as_dict() == whole.report()[0].as_dict()


def test_another_tasks_toml_is_refused_by_a_resumed_run(folder, tmp_path):
    ready = start(config_of(folder / "tasks.toml", epochs=1), tmp_path / "run")
    ready.trainer.fit()
    run = Run.open(tmp_path / "run")
    config = finetune_config.load(run.config_file)
    config = replace(config, train=replace(config.train, epochs=2))
    (folder / "tasks.toml").write_text(TASKS.replace("weight = 0.5", "weight = 2.0"))
    with pytest.raises(ValueError, match=r"the task names had 8 batches .* weight 0\.5"):
        finetune.resume(run, config, QuietLog())
    (folder / "tasks.toml").write_text(TASKS.replace("[same]", "[alike]"))
    with pytest.raises(ConfigError, match="has the tasks reviews, alike, names, but the run began"):
        finetune.resume(Run.open(tmp_path / "run"), config, QuietLog())
    (folder / "tasks.toml").write_text(TASKS)
    finetune.resume(Run.open(tmp_path / "run"), config, QuietLog()).run.close()


def few_examples(task: str) -> Any:
    """What `builtin.load` gives, of a size for seconds."""
    splits: list[Any] = []
    for n in (24, 8):
        name = f"built-in {task}"
        if task == "tag":
            words, tags = ["import", "time"], ["O", "B-MODULE"]
            splits.append(
                Sentences(name, [words] * n, [tags] * n, list(range(n)), [i // 4 for i in range(n)])
            )
            continue
        columns = ["text", "label"] if task == "classify" else ["text1", "text2", "label"]
        rows = [[*[f"text {i}"] * (len(columns) - 1), "yn"[i % 2]] for i in range(n)]
        splits.append(Table(name, columns, rows, list(range(n))))
    return builtin.Builtin(task, *splits, about=f"the {task} of the test")


def test_the_built_in_data_are_three_tasks(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin, "load", few_examples)
    ready = start(config_of("builtin", epochs=1), tmp_path / "run")
    ready.trainer.fit()
    report, _ = ready.report()
    assert list(report.reports) == ["tag", "classify", "pair"]
    assert report.measures == {"tag": "entity F1", "classify": "accuracy", "pair": "accuracy"}
    with pytest.raises(ConfigError, match="--val-data is of one task"):
        start(config_of("builtin", val_source="x.csv"), tmp_path / "other")


def test_answers_to_questions_are_a_task_among_others(folder, tmp_path):
    rows = [
        f"what follows {word}?,the {word} is {i % 5} here,{i % 5}"
        for i, word in enumerate(["film", "book", "city"] * 8)
    ]
    (folder / "questions.csv").write_text("\n".join(["question,context,answer", *rows]) + "\n")
    text = '[asked]\ntask = "qa"\ndata = "questions.csv"\n'
    text += '[names]\ntask = "tag"\ndata = "train.conll"\n'
    (folder / "tasks.toml").write_text(text)
    ready = start(config_of(folder / "tasks.toml", epochs=1), tmp_path / "run")
    ready.trainer.fit()
    report, why_not = ready.report()
    assert report.measures == {"asked": "answer F1", "names": "entity F1"}
    assert report.scores["asked"] == ready.task.evaluate(ready.model)["val_asked_f1"]
    assert why_not or (tmp_path / "run/metrics_asked.png").is_file()
    asked = Predictor.open(str(tmp_path / "run"), head="asked")
    (row,) = asked.of_lines(["what follows book?\tthe book is 3 here"])[0]
    assert row["answer"] in "the book is 3 here"


# --- encoder and options --------------------------------------------------------------------------


def test_heads_on_a_checkpoint_whose_layers_have_their_rates(folder, bert, tmp_path):
    config = config_of(
        folder / "tasks.toml", checkpoint=bert, layer_decay=0.5, lr=1e-3, freeze="layer.0"
    )
    config = replace(config, train=replace(config.train, head_lr=4e-3))
    ready = start(config, tmp_path / "run")
    before = weights(BertModel.from_pretrained(bert))
    now = weights(ready.model)
    assert all(np.array_equal(now[f"bert.{name}"], value) for name, value in before.items())
    names = {id(p): name for name, p in ready.model.named_parameters()}
    rates = {
        names[id(p)]: group.get("initial_lr", group["lr"])
        for group in ready.trainer.optimizer.param_groups
        for p in group["params"]
    }
    top = rates["bert.encoder.layer.1.output.dense.weight"]
    assert rates["bert.embeddings.word_embeddings.weight"] / top == pytest.approx(0.25)
    assert rates["heads.reviews.classifier.weight"] / top == pytest.approx(4)
    assert rates["heads.names.classifier.weight"] / top == pytest.approx(4)
    assert not [name for name in rates if "layer.0" in name]
    ready.trainer.fit()
    assert all(
        np.array_equal(value, now[name]) == ("layer.0." in name)
        for name, value in weights(ready.model).items()
        if "dense.weight" in name
    )


def test_a_section_goes_before_the_flags(folder):
    config = config_of(folder / "tasks.toml", batch_size=6, class_weights="balanced", metric="mcc")
    text = '[a]\ntask = "classify"\ndata = "x.csv"\nmetric = "macro-f1"\nmax_length = 9\n'
    text += 'text_column = 2\n[b]\ntask = "tag"\ndata = "builtin"\nbatch_size = 3\n'
    (folder / "t.toml").write_text(f"temperature = 2\n{text}")
    plan = Plan.of(str(folder / "t.toml"))
    assert plan.temperature == 2.0
    a, b = plan.config_of("a", config), plan.config_of("b", config)
    assert (a.train.metric, b.train.metric) == ("macro-f1", "mcc")
    assert (a.train.batch_size, b.train.batch_size) == (6, 3)
    assert (a.train.class_weights, b.train.class_weights) == ("balanced", "none")
    assert (a.model.max_length, b.model.max_length) == (9, config.model.max_length)
    assert (a.data.source, b.data.source) == (str(folder / "x.csv"), "builtin")
    assert (a.data.text_column, a.task, b.task) == ("2", "classify", "tag")


def test_by_the_loss_the_checkpoint_is_chosen_by_the_mean_of_the_losses(folder, tmp_path):
    ready = start(config_of(folder / "tasks.toml", epochs=1, metric="loss"), tmp_path / "run")
    assert ready.task.score == "val_loss"
    assert ready.task.tasks["reviews"].score == "val_accuracy"
    ready.run.close()


# --- what is refused ------------------------------------------------------------------------------

SECTION = '[reviews]\ntask = "classify"\ndata = "reviews.csv"\nlabel_column = "stars"\n'


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "has no section: each task is one"),
        ("temperatur = 2\n", "unknown key 'temperatur'; did you mean 'temperature'"),
        ("temperature = 0.5\n" + SECTION, "temperature must be a number from 1, got 0.5"),
        ("[reviews\n", "is not valid TOML"),
        ('[a."b.c"]\nx = 1\n', r"\[a\]: unknown key 'b.c'"),
        ('["b c"]\ntask = "tag"\n', r"\[b c\]: the name of a task must be of letters"),
        ('[train]\ntask = "tag"\n', r"\[train\]: 'train' cannot be the name of a task"),
        (
            '[reviews]\ndata = "a.csv"\n',
            r"\[reviews\]: task is missing: give one of classify, pair",
        ),
        ('[reviews]\ntask = "tag"\n', r"\[reviews\]: data is missing: give a file, or builtin"),
        (
            SECTION.replace("classify", "clasify"),
            r"\[reviews\]: task must be .*did you mean 'class",
        ),
        (SECTION + "lable_column = 3\n", "'lable_column'; did you mean 'label_column'"),
        (SECTION + 'weight = "much"\n', r"\[reviews\]: weight must be a number, got 'much'"),
        (SECTION + "weight = 0\n", r"\[reviews\]: weight must be above 0, got 0"),
        (SECTION + "val_fraction = 2.0\n", r"\[reviews\]: .*val_fraction must be in \(0, 1\)"),
        (SECTION + "max_length = 99\n", r"\[reviews\]: model.max_length is 99, but the encoder"),
        (
            SECTION.replace("stars", "star"),
            r"\[reviews\]: .*no column 'star'.*did you mean 'stars'",
        ),
        (SECTION.replace("label_column", "text_column"), r"Name it with label_column; it has"),
        (SECTION.replace("reviews.csv", "none.csv"), r"\[reviews\]: no file '.*none.csv'"),
        ('[a]\ntask = "tag"\ndata = "train.conll"\nlong = "cut"\n', r"\[a\]: long is not for tag"),
        (SECTION + 'second_column = "x"\n', r"\[reviews\]: second_column is for pairs of texts"),
    ],
)
def test_bad_tasks_name_the_file_the_section_and_the_key(text, why, folder, tmp_path):
    (folder / "bad.toml").write_text(text)
    with pytest.raises((ConfigError, FileNotFoundError), match=why) as caught:
        start(config_of(folder / "bad.toml"), tmp_path / "run")
    assert "bad.toml" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_is_of_one_task_is_no_flag_of_several(folder, bert, tmp_path):
    GPT(GPTConfig(vocab_size=30, n_positions=8, n_embd=8, n_layer=1, n_head=1)).save_pretrained(
        tmp_path / "gpt"
    )
    for source, changes, why in [
        ("tasks.toml", {"label_column": "stars"}, "--label-column is of one task: write label_c"),
        ("tasks.toml", {"val_source": "x.csv"}, "--val-data is of one task: write val_data into"),
        ("tasks.toml", {"header": "yes"}, "--header is of one task"),
        ("tasks.toml", {"encoder": "bilstm"}, "several heads share a bert"),
        ("tasks.toml", {"checkpoint": str(tmp_path / "gpt")}, "is a model of type 'gpt2'"),
        ("tasks.toml", {"checkpoint": bert, "max_length": 64}, "reads at most 32 pieces"),
        ("none.toml", {}, "there is no file .*none.toml' with the tasks"),
        ("reviews.csv", {}, "is not valid TOML.*multi takes a file with a section for each task"),
    ]:
        with pytest.raises((ConfigError, FileNotFoundError), match=why):
            start(config_of(folder / source, **changes), tmp_path / "run")
        assert not (tmp_path / "run").exists()
