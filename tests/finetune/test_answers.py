"""`finetune qa` put together: files, checkpoints and their heads, resuming, new questions."""

import io
import json
import signal
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tinygrad_llm import manual_seed
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.finetune import config as finetune_config
from tinygrad_llm.finetune.kind import Columns
from tinygrad_llm.finetune.predict import Predictor
from tinygrad_llm.finetune.run import resume, start
from tinygrad_llm.models.bert import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
)
from tinygrad_llm.models.gpt import GPT, GPTConfig
from tinygrad_llm.train.config import ConfigError, merge
from tinygrad_llm.train.log import PlainLog, QuietLog
from tinygrad_llm.train.run import Run
from tinygrad_llm.train.trainer import Interrupted

QUICK = {"epochs": 5, "lr": 1e-2, "dropout": 0.0, "n_layer": 2, "vocab_size": 90}
NAMES, TOWNS = ["Ada", "Bob", "Eva", "Gus"], ["Rome", "Oslo", "Lima", "Bern"]


def rows(count, seed=0, why=False):
    """(question, context, answer): who? and where? of 'Ada went to Rome.'"""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        who, where = NAMES[rng.integers(4)], TOWNS[rng.integers(4)]
        question, answer = [("who?", who), ("where?", where), ("why?", "")][i % (3 if why else 2)]
        found.append((question, f"{who} went to {where}.", answer))
    return found


def write_csv(path, count=40, seed=0, why=False):
    lines = ["question,context,answer", *(",".join(row) for row in rows(count, seed, why))]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def write_squad(path, count=12, seed=0, why=True):
    paragraphs = [
        {
            "context": context,
            "qas": [
                {
                    "id": f"q{i}",
                    "question": question,
                    "answers": [{"text": answer, "answer_start": context.index(answer)}]
                    if answer
                    else [],
                }
            ],
        }
        for i, (question, context, answer) in enumerate(rows(count, seed, why))
    ]
    path.write_text(json.dumps({"version": "v2.0", "data": [{"paragraphs": paragraphs}]}))
    return str(path)


@pytest.fixture
def data(tmp_path):
    return write_csv(tmp_path / "train.csv"), write_csv(tmp_path / "dev.csv", 12, 100)


def tokenizer():
    return Tokenizer.wordpiece(" ".join(["who? where? why? went to .", *NAMES, *TOWNS] * 3), 90)


def sizes(**options):
    return BertConfig(
        **{
            "vocab_size": tokenizer().vocab_size,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 40,
            **options,
        }
    )


def folder_of(model, path):
    model.save_pretrained(path)
    tokenizer().save(path)
    return str(path)


@pytest.fixture
def bert(tmp_path):
    manual_seed(5)
    return folder_of(BertModel(sizes()), tmp_path / "bert")


def config_of(data=None, **changes):
    begun = finetune_config.preset("tiny", "qa")
    files = {} if data is None else {"source": data[0], "val_source": data[1]}
    sections: dict = {"data": {}, "model": {}, "train": {"processes": 1, "device": "cpu"}}
    homes = {"data": begun.data, "model": begun.model, "train": begun.train}
    for key, value in ({"max_length": 40, **files} | changes).items():
        section = next(name for name, home in homes.items() if hasattr(home, key))
        sections[section][key] = value
    return merge(begun, sections, where="the test")


def begin(config, folder, log=None) -> Any:
    return start(config, folder, log or QuietLog())


# --- a whole run ----------------------------------------------------------------------------------


def test_a_run_learns_scores_its_best_checkpoint_and_answers(data, tmp_path):
    files = write_csv(tmp_path / "many.csv", 160), data[1]
    ready = begin(config_of(files, **QUICK), tmp_path / "run")
    ready.trainer.fit()
    report, why_not = ready.report()
    assert report.scores.exact_match == 100
    assert max(s.exact_match for s in report.baselines.values()) <= 50
    found = json.loads((tmp_path / "run/metrics.json").read_text())
    assert (found["task"], found["exact match"]) == ("qa", 100)
    assert "this model" in (tmp_path / "run/metrics.txt").read_text()
    assert why_not or (tmp_path / "run/metrics.png").stat().st_size > 1000

    predictor = Predictor.open(str(tmp_path / "run"))
    assert predictor.task == "qa"
    answers = [row[2] for row in rows(12, 100)]
    lines = list(predictor.of_file(data[1], Columns())[0])
    assert [line["answer"] for line in lines] == answers
    assert list(lines[0]) == [
        *("line", "question", "context", "answer", "start", "stop", "probability"),
    ]
    assert lines[0]["line"] == 2
    for line in lines:
        assert line["context"][line["start"] : line["stop"]] == line["answer"]
        assert 0.3 < line["probability"] <= 1
    squad = write_squad(tmp_path / "dev.json", 12, 100, why=False)
    lines = list(predictor.of_file(squad, Columns())[0])
    assert [line["id"] for line in lines] == [f"q{i}" for i in range(12)]
    assert [line["answer"] for line in lines] == answers
    other = tmp_path / "other.tsv"
    other.write_text("passage\tq\nBob went to Oslo.\twhere?\n")
    (line,) = predictor.of_file(str(other), Columns(question="q", header=True))[0]
    assert line["answer"] == "Oslo"
    lines, _ = predictor.of_lines(["who?\tEva went to Lima.", "", "where?\tEva went to Lima."])
    assert [(line["line"], line["answer"]) for line in lines] == [(1, "Eva"), (3, "Lima")]


def test_squad_2_is_learnt_with_the_questions_that_have_no_answer(tmp_path):
    files = write_squad(tmp_path / "a.json", 192), write_squad(tmp_path / "b.json", 12, 100)
    ready = begin(config_of(files, **QUICK), tmp_path / "run")
    ready.trainer.fit()
    report, _ = ready.report()
    assert report.groups["none"].exact_match == report.scores.exact_match == 100
    lines, _ = Predictor.open(str(tmp_path / "run")).of_lines(["why?\tAda went to Rome."])
    (line,) = lines
    assert (line["answer"], line["start"], line["stop"]) == ("", None, None)


def stop_at(ready, step):
    """As Ctrl-C while that step is done."""
    next_batch = ready.task.next_batch

    def stopping():
        if ready.trainer.step == step:
            ready.trainer._signal = signal.SIGINT
        return next_batch()

    ready.task.next_batch = stopping


def test_a_resumed_run_is_the_one_that_was_not_stopped(data, tmp_path):
    options = {"epochs": 3, "lr": 3e-3, "keep_last": 0}
    whole = begin(config_of(data, **options), tmp_path / "whole")
    whole.trainer.fit()
    part = begin(config_of(data, **options), tmp_path / "part")
    stop_at(part, part.trainer.config.eval_every + 1)
    with pytest.raises(Interrupted):
        part.trainer.fit()
    run = Run.open(tmp_path / "part")
    again = resume(run, finetune_config.load(run.config_file), QuietLog())
    again.trainer.fit()
    for (name, ours), (_, theirs) in zip(
        whole.model.named_parameters(), again.model.named_parameters(), strict=True
    ):
        assert np.array_equal(ours.numpy(), theirs.numpy()), name
    assert again.report()[0].as_dict() == whole.report()[0].as_dict()


def test_changed_questions_are_refused(data, tmp_path):
    ready = begin(config_of(data, epochs=1), tmp_path / "run")
    ready.trainer.fit()
    write_csv(tmp_path / "train.csv", seed=1)
    run = Run.open(tmp_path / "run")
    config = finetune_config.load(run.config_file)
    with pytest.raises(ValueError, match="have changed since the run began"):
        resume(run, replace(config, train=replace(config.train, epochs=2)), QuietLog())


def test_two_processes_find_what_one_finds(data, tmp_path):
    options = {"epochs": 1, "lr": 1e-3, "dropout": 0.0}
    one = begin(config_of(data, **options), tmp_path / "one")
    one.trainer.fit()
    two = begin(config_of(data, **options, processes=2), tmp_path / "two")
    two.trainer.fit()
    losses = [one.trainer.best["val_loss"], two.trainer.best["val_loss"]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# --- checkpoints ----------------------------------------------------------------------------------


def test_a_checkpoint_keeps_its_weights_and_gets_a_head(bert, data, tmp_path):
    out = io.StringIO()
    ready = begin(config_of(data, checkpoint=bert), tmp_path / "run", PlainLog(out))
    assert "new at random: qa_outputs.weight, qa_outputs.bias" in out.getvalue()
    before = dict(BertModel.from_pretrained(bert).named_parameters())
    for name, parameter in ready.model.bert.named_parameters():
        assert np.array_equal(parameter.numpy(), before[name].numpy())
    assert ready.config.train.lr == pytest.approx(5e-5 * 768 / 16)
    ready.run.close()


def test_a_head_of_its_own_goes_on_and_another_is_refused(data, tmp_path):
    manual_seed(3)
    own = BertForQuestionAnswering(sizes())
    path = folder_of(own, tmp_path / "own")
    for new_head in (False, True):
        ready = begin(
            config_of(data, checkpoint=path, new_head=new_head), tmp_path / f"run{new_head}"
        )
        same = np.array_equal(ready.model.qa_outputs.weight.numpy(), own.qa_outputs.weight.numpy())
        assert same != new_head
        ready.run.close()
    config = json.loads((tmp_path / "own/config.json").read_text())
    config["id2label"] = {"0": "a", "1": "b", "2": "c"}
    config["label2id"] = {"a": 0, "b": 1, "c": 2}
    (tmp_path / "own/config.json").write_text(json.dumps(config))
    (tmp_path / "own/SHA256SUMS").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match=r"a head with 3 outputs.*--new-head"):
        begin(config_of(data, checkpoint=path), tmp_path / "run")


def test_a_head_for_something_else_is_left_behind(data, tmp_path):
    other = BertForTokenClassification(sizes(num_labels=5))
    path = folder_of(other, tmp_path / "ner")
    ready = begin(config_of(data, checkpoint=path, epochs=1), tmp_path / "run")
    assert ready.model.config.num_labels == 2
    ready.trainer.fit()
    assert np.isfinite(ready.trainer.best["val_loss"])


def test_what_cannot_be_learnt_is_said(bert, data, tmp_path):
    gpt = tmp_path / "gpt"
    GPT(GPTConfig(vocab_size=30, n_positions=8, n_embd=8, n_layer=1, n_head=1)).save_pretrained(gpt)
    marks = tmp_path / "marks"
    BertModel(sizes(vocab_size=300)).save_pretrained(marks)
    Tokenizer.bpe("who where", 300).save(marks)
    nothing = tmp_path / "nothing.csv"
    nothing.write_text("question,context,answer\nwho?,Ada.,\nwhere?,Rome.,\n")
    absent = tmp_path / "absent.csv"
    absent.write_text("question,context,answer\nwho?,Ada.,Ada\nwhere?,Rome.,Oslo\n")
    bare = tmp_path / "bare.csv"
    bare.write_text("who?,Ada went.,Ada,x\n" * 3)
    squad = write_squad(tmp_path / "a.json")
    run = tmp_path / "run"
    for changes, why in [
        ({"checkpoint": str(gpt)}, "is a model of type 'gpt2': to answer questions"),
        ({"checkpoint": bert, "max_length": 64}, "reads at most 40 pieces.*--max-length 40"),
        ({"checkpoint": str(marks)}, r"puts \[CLS\] before a text"),
        ({"text_column": "context"}, "name theirs with --question-column and --context-column"),
        ({"label_column": "answer"}, "--answer-column"),
        ({"context_column": "contxt"}, "did you mean 'context'"),
        ({"answer_column": "context"}, "must be in different columns"),
        ({"class_weights": "balanced"}, "not for qa"),
        ({"encoder": "bilstm"}, "leave out --encoder"),
        ({"source": str(nothing)}, "no question has an answer"),
        ({"source": str(absent)}, "line 3 of .*the answer 'Oslo' does not stand in its context"),
        ({"source": str(bare), "header": "no"}, "--question-column; it has '1', '2'"),
        ({"source": squad, "question_column": "q"}, "has no columns to name"),
        ({"source": data[0], "val_source": "none.json"}, "no file 'none.json'"),
    ]:
        with pytest.raises((ValueError, OSError), match=why):
            begin(config_of(data, **changes), run)
        assert not run.exists()
    with pytest.raises(ConfigError, match="--start-column is for questions"):
        config_of(data, start_column="start").__class__(
            "pair", config_of(data, start_column="start").data
        )


def test_what_is_held_out_shares_no_context_and_columns_are_named(tmp_path):
    path = tmp_path / "a.tsv"
    lines = ["q\tp\ta\tat"]
    for who, town in [(who, town) for who in NAMES for town in TOWNS]:
        text = f"{who} went to {town}, said {who}."
        place = str(text.rindex(who))
        lines += [f"who?\t{text}\t{who}\t{place}", f"where?\t{text}\t{town}\t"]
    path.write_text("\n".join(lines) + "\n")
    columns = {
        f"{name}_column": key
        for name, key in zip(
            ("question", "context", "answer", "start"), ("q", "p", "a", "at"), strict=True
        )
    }
    ready = begin(config_of((str(path), ""), val_fraction=0.25, **columns), tmp_path / "run")
    train, held = ready.task.train, ready.task.held_out
    assert (len(train), len(held)) == (24, 8)
    assert not {*train.contexts} & {*held.contexts}
    first = train.first_answers[0]
    assert first is not None
    assert first.start == train.contexts[0].rindex(first.text) > 0
    ready.run.close()


# --- new questions --------------------------------------------------------------------------------


@pytest.fixture
def predictor(tmp_path):
    manual_seed(1)
    return Predictor.open(folder_of(BertForQuestionAnswering(sizes()), tmp_path / "own"))


def test_every_row_has_its_line_also_where_there_is_nothing_to_read(predictor, tmp_path):
    path = tmp_path / "new.jsonl"
    long = "Ada went to Rome . " * 30
    asked = [("who?", ""), ("", "Ada went."), ("who?", long), ("who? " * 60, "Ada")]
    objects = [{"question": q, "context": c, "n": 1} for q, c in asked]
    path.write_text("\n".join(map(json.dumps, objects)) + "\n")
    found, notes = predictor.of_file(str(path), Columns())
    lines = list(found)
    assert [line["line"] for line in lines] == [1, 2, 3, 4]
    assert (lines[0]["answer"], lines[0]["probability"]) == ("", 1.0)
    assert all(line["answer"] for line in lines[1:])
    said = " ".join(notes)
    assert "1 of 4 questions have a context of zero length" in said
    assert "1 of 4 questions have a context longer than a window" in said
    assert "1 of 4 questions leave too little room" in said


def test_lines_and_columns_that_are_wrong(predictor, tmp_path):
    for line in ("who?", "who?\t", "who?\tAda\tBob"):
        with pytest.raises(ValueError, match="line 2 must hold a question and its context"):
            predictor.of_lines(["who?\tAda", line])
    path = tmp_path / "new.csv"
    path.write_text("question,context\nwho?,Ada\n")
    with pytest.raises(ValueError, match="--question-column and --context-column"):
        predictor.of_file(str(path), Columns(text="question"))
    with pytest.raises(ConfigError, match="it has no columns to name"):
        predictor.of_file(write_squad(tmp_path / "a.json"), Columns(context="context"))
    with pytest.raises(ValueError, match="did you mean 'question'"):
        predictor.of_file(str(path), Columns(question="qustion"))


def test_questions_are_for_a_model_of_questions(tmp_path):
    from tinygrad_llm.models.bert import BertForSequenceClassification

    path = folder_of(BertForSequenceClassification(sizes()), tmp_path / "labels")
    with pytest.raises(ConfigError, match="are for a model of qa"):
        Predictor.open(path).of_file("x.csv", Columns(question="q"))
