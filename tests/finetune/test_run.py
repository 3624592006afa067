"""Fine-tuning put together: checkpoints and their heads, rates by layer, resuming bit for bit."""

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
from tinygrad_llm.finetune import run as finetune
from tinygrad_llm.finetune.config import TaskName
from tinygrad_llm.finetune.kinds import KINDS
from tinygrad_llm.finetune.predict import Columns, Predictor
from tinygrad_llm.models.bert import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
)
from tinygrad_llm.models.gpt import GPT, GPTConfig
from tinygrad_llm.train.config import ConfigError, merge
from tinygrad_llm.train.log import PlainLog, QuietLog
from tinygrad_llm.train.run import Run
from tinygrad_llm.train.trainer import Interrupted

WORDS = {"pos": ["fine", "lovely", "great"], "neg": ["awful", "dull", "poor"]}


def write_texts(path, count=48, seed=0, labels=("pos", "neg"), header=True):
    rng = np.random.default_rng(seed)
    lines = ["text,label"] if header else []
    for i in range(count):
        label = labels[i % len(labels)]
        words = WORDS.get(label, ["so so"])
        text = " ".join(words[j] for j in rng.integers(len(words), size=4))
        lines.append(f"the film {seed} {i} is {text},{label}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def write_sentences(path, count=40, seed=0):
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        name, place = ["Ada", "Bob", "Eva"][rng.integers(3)], ["Rome", "Oslo"][rng.integers(2)]
        lines += [f"{name} B-PER", "went O", "to O", f"{place} B-LOC", "City I-LOC", ". O", ""]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def data(tmp_path):
    return write_texts(tmp_path / "train.csv"), write_texts(tmp_path / "dev.csv", 16, 1)


@pytest.fixture
def bert(tmp_path):
    """A folder with a small BERT, two layers deep."""
    folder = tmp_path / "bert"
    words = " ".join(word for kind in WORDS.values() for word in kind)
    text = " ".join(f"the film is {words} {i}" for i in range(60))
    tokenizer = Tokenizer.wordpiece(text, 120)
    manual_seed(5)
    model = BertModel(sizes(tokenizer.vocab_size))
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return str(folder)


def sizes(vocab_size, **options):
    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        **options,
    )


def config_of(data=None, task: TaskName = "classify", **changes):
    begun = finetune_config.preset("tiny", task)
    files = {} if data is None else {"source": data[0], "val_source": data[1]}
    sections: dict = {"data": {}, "model": {}, "train": {"processes": 1, "device": "cpu"}}
    homes = {"data": begun.data, "model": begun.model, "train": begun.train}
    for key, value in (files | changes).items():
        section = next(name for name, home in homes.items() if hasattr(home, key))
        sections[section][key] = value
    return merge(begun, sections, where="the test")


def read(config, log) -> Any:
    return KINDS[config.task].read(config, log)


def start(config, folder, log=None) -> Any:
    return finetune.start(config, folder, log or QuietLog())


def resume(run, config) -> Any:
    return finetune.resume(run, config, QuietLog())


def weights(model):
    return {name: p.numpy().copy() for name, p in model.named_parameters()}


# --- a whole run ----------------------------------------------------------------------------------


def test_a_run_learns_scores_its_best_checkpoint_and_predicts(data, tmp_path):
    ready = start(config_of(data, epochs=10, lr=1e-2), tmp_path / "run")
    ready.trainer.fit()
    report, why_not = ready.report()
    assert report.scores.accuracy == 1.0
    assert "always 'neg'" in report.text()
    found = json.loads((tmp_path / "run/metrics.json").read_text())
    assert found["accuracy"] == 1.0
    assert (tmp_path / "run/metrics.txt").read_text() == report.text() + "\n"
    assert found["checkpoint"] == f"step-{ready.trainer.best['step']:06d}"
    assert why_not or (tmp_path / "run/metrics.png").stat().st_size > 1000
    saved = json.loads((tmp_path / "run/checkpoints/best/config.json").read_text())
    assert saved["id2label"] == {"0": "neg", "1": "pos"}

    predictor = Predictor.open(str(tmp_path / "run"))
    rows, _ = predictor.of_file(data[1], Columns())
    rows = list(rows)
    assert [row["label"] for row in rows] == ready.task.held_out.labels
    assert rows[0]["line"] == 2
    for row in rows:
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert row["probability"] == max(row["probabilities"].values())
    rows, _ = predictor.of_lines(["fine great lovely", "", "dull poor awful"])
    assert [(row["line"], row["label"]) for row in rows] == [(1, "pos"), (3, "neg")]


def test_the_report_is_of_the_best_checkpoint_and_not_of_the_last(data, tmp_path):
    ready = start(config_of(data, epochs=4, lr=3e-3), tmp_path / "run")
    ready.trainer.fit()
    best = ready.run.checkpoint("best")
    model = BertForSequenceClassification.from_pretrained(best)
    for parameter in ready.model.parameters():  # the last state, spoilt
        parameter.data[...] = 0
    report, _ = ready.report()
    assert report.scores.accuracy == ready.task.evaluate(model)["val_accuracy"]
    assert report.scores.accuracy == ready.trainer.best["val_accuracy"]


def test_with_an_average_it_is_what_is_scored_kept_and_predicted_with(data, tmp_path):
    ready = start(config_of(data, epochs=2, lr=1e-2, ema=0.9), tmp_path / "run")
    ready.trainer.fit()
    report, _ = ready.report()
    best = ready.run.checkpoint("best")
    raw, average = (
        BertForSequenceClassification.from_pretrained(folder) for folder in (best, best / "ema")
    )
    assert any((a != b).any() for a, b in zip(*map(arrays_of, (raw, average)), strict=True))
    scores = ready.task.evaluate(average)
    record = ready.trainer.best
    assert record["val_loss"] == scores["val_loss"] != ready.task.evaluate(raw)["val_loss"]
    assert report.scores.accuracy == scores["val_accuracy"]
    predictor = Predictor.open(str(tmp_path / "run"))
    assert predictor.task == "classify"
    taken = arrays_of(predictor.fitted.model)
    assert all((a == b).all() for a, b in zip(taken, arrays_of(average), strict=True))


@pytest.mark.parametrize(
    ("modes", "asked", "expected"),
    [
        (["mean_tokens"], "auto", "mean"),
        (["mean_tokens"], "cls", "cls"),
        (["cls_token"], "auto", "cls"),
        (["mean_tokens", "max_tokens"], "auto", "cls"),
        (None, "auto", "cls"),
        (None, "mean", "mean"),
    ],
)
def test_pooling_is_as_the_checkpoint_was_trained(data, bert, tmp_path, modes, asked, expected):
    if modes is not None:
        written = {f"pooling_mode_{mode}": True for mode in modes} | {"pooling_mode_x": False}
        (tmp_path / "bert/1_Pooling").mkdir()
        (tmp_path / "bert/1_Pooling/config.json").write_text(json.dumps(written))
    config = config_of(data, checkpoint=bert, pooling=asked)
    ready = start(config, tmp_path / "run")
    assert ready.model.config.classifier_pooling == expected


def test_comparing_is_for_pairs():
    assert config_of(task="pair", pooling="compare").model.pooling == "compare"
    with pytest.raises(ConfigError, match="--pooling compare is for pairs of texts"):
        config_of(task="classify", pooling="compare")


def arrays_of(model):
    return [p.numpy() for p in model.parameters()]


def test_a_preset_of_one_task_is_refused_by_others():
    assert finetune_config.preset("ner", "tag").train.ema == 0.995
    with pytest.raises(ConfigError, match="the preset ner is for tag, not for pair"):
        finetune_config.preset("ner", "pair")


def test_a_run_without_time_for_a_step_is_scored_as_it_begins(data, tmp_path):
    ready = start(config_of(data, max_seconds=1e-6), tmp_path / "run")
    ready.trainer.fit()
    assert ready.trainer.step == 0
    report, _ = ready.report()
    assert report.scores.accuracy == ready.run.metrics()[0]["val_accuracy"]


def stop_at(ready, step):
    """As Ctrl-C while that step is done."""
    next_batch = ready.task.next_batch

    def stopping():
        if ready.trainer.step == step:
            ready.trainer._signal = signal.SIGINT
        return next_batch()

    ready.task.next_batch = stopping


@pytest.mark.parametrize("task", ["classify", "tag"])
def test_a_resumed_run_is_the_one_that_was_not_stopped(task, data, tmp_path):
    if task == "tag":
        data = write_sentences(tmp_path / "a.conll"), write_sentences(tmp_path / "b.conll", 9, 1)
    options = {"epochs": 3, "lr": 3e-3, "keep_last": 0}
    whole = start(config_of(data, task, **options), tmp_path / "whole")
    whole.trainer.fit()

    part = start(config_of(data, task, **options), tmp_path / "part")
    stop_at(part, part.trainer.config.eval_every + 1)
    with pytest.raises(Interrupted):
        part.trainer.fit()
    run = Run.open(tmp_path / "part")
    again = resume(run, finetune_config.load(run.config_file))
    again.trainer.fit()
    ours, theirs = weights(whole.model), weights(again.model)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert again.report()[0].as_dict() == whole.report()[0].as_dict()


def test_a_run_that_is_over_and_one_with_other_settings_are_refused(data, tmp_path):
    ready = start(config_of(data, epochs=1), tmp_path / "run")
    ready.trainer.fit()
    run = Run.open(tmp_path / "run")
    config = finetune_config.load(run.config_file)
    assert config == ready.config
    with pytest.raises(ConfigError, match="give a larger --epochs"):
        resume(run, config)
    other = replace(config, train=replace(config.train, epochs=2, seed=7))
    with pytest.raises(ConfigError, match=r"train\.seed = 1, which cannot become 7"):
        resume(Run.open(tmp_path / "run"), other)
    longer = replace(config, train=replace(config.train, epochs=2))
    more = resume(Run.open(tmp_path / "run"), longer)
    more.trainer.fit()
    assert more.trainer.step == 2 * ready.trainer.step


def test_the_configuration_is_read_back_as_it_was_written(tmp_path):
    config = config_of(None, freeze="embeddings layer.[0-2]", header="no", class_weights="balanced")
    path = tmp_path / "config.toml"
    path.write_text(finetune_config.dumps(config))
    assert finetune_config.load(path) == config


# --- checkpoints ----------------------------------------------------------------------------------


def test_a_checkpoint_keeps_its_weights_and_gets_a_head(bert, data, tmp_path):
    out = io.StringIO()
    ready = start(config_of(data, checkpoint=bert), tmp_path / "run", PlainLog(out))
    assert "new at random: classifier.weight, classifier.bias" in out.getvalue()
    before = weights(BertModel.from_pretrained(bert))
    now = weights(ready.model)
    assert all(np.array_equal(now[f"bert.{name}"], before[name]) for name in before)
    assert ready.config.train.lr == pytest.approx(5e-5 * 768 / 16)
    ready.run.close()


def test_layers_learn_at_their_rates_and_frozen_ones_not_at_all(bert, data, tmp_path):
    config = config_of(
        data, checkpoint=bert, layer_decay=0.5, lr=1e-3, head_lr=4e-3, freeze="layer.0 bias"
    )
    ready = start(config, tmp_path / "run")
    rates = {}
    for group in ready.trainer.optimizer.param_groups:
        by_id = {id(p): n for n, p in ready.model.named_parameters()}
        base = group.get("initial_lr", group["lr"])
        rates |= {by_id[id(p)]: base for p in group["params"]}
    last = ready.trainer.schedule.schedule(0)
    assert last >= 0
    ratio = {name: rate / rates["bert.pooler.dense.weight"] for name, rate in rates.items()}
    assert ratio["bert.encoder.layer.1.output.dense.weight"] == pytest.approx(1)
    assert ratio["bert.embeddings.word_embeddings.weight"] == pytest.approx(0.25)
    assert ratio["classifier.weight"] == pytest.approx(4)
    assert not [name for name in rates if "layer.0" in name or name.endswith("bias")]
    before = weights(ready.model)
    ready.trainer.fit()
    for name, value in weights(ready.model).items():
        frozen = "layer.0." in name or name.endswith("bias")
        # [SEP] and others that stand in every text move; rows of words that never come do not
        assert np.array_equal(value, before[name]) == frozen, name


def test_a_head_for_the_same_labels_goes_on_and_another_is_refused(data, tmp_path):
    first = start(config_of(data, epochs=1), tmp_path / "first")
    first.trainer.fit()
    best = str(tmp_path / "first")
    more = start(config_of(data, checkpoint=best, max_length=20), tmp_path / "second")
    best_model = BertForSequenceClassification.from_pretrained(first.run.checkpoint("best"))
    assert np.array_equal(
        more.model.classifier.weight.numpy(), best_model.classifier.weight.numpy()
    )
    more.run.close()
    other = write_texts(tmp_path / "o.csv", labels=("pos", "meh")), None
    config = config_of((other[0], ""), checkpoint=best, max_length=20)
    with pytest.raises(ConfigError, match=r"has a head for the 2 labels 'neg', 'pos'.*--new-head"):
        start(config, tmp_path / "third")
    config = replace(config, model=replace(config.model, new_head=True))
    fresh = start(config, tmp_path / "third")
    assert fresh.model.config.labels == {0: "meh", 1: "pos"}
    assert not np.array_equal(
        fresh.model.classifier.weight.numpy(), best_model.classifier.weight.numpy()
    )
    fresh.run.close()


def test_a_file_with_a_header_alone_is_refused(tmp_path):
    (tmp_path / "one.csv").write_text("\ufefftext,label\n")
    with pytest.raises(ValueError, match="a single row of data, 'text' with the label 'label'"):
        start(config_of((str(tmp_path / "one.csv"), "")), tmp_path / "run")


def test_what_cannot_be_fine_tuned_is_said(bert, data, tmp_path):
    gpt = tmp_path / "gpt"
    GPT(GPTConfig(vocab_size=30, n_positions=8, n_embd=8, n_layer=1, n_head=1)).save_pretrained(gpt)
    run = tmp_path / "run"
    for changes, why in [
        ({"checkpoint": str(gpt)}, "is a model of type 'gpt2'"),
        ({"checkpoint": bert, "max_length": 64}, "reads at most 32 pieces.*--max-length 32"),
        ({"checkpoint": bert, "freeze": "nothing"}, "'nothing' matches no parameter"),
        ({"checkpoint": bert, "freeze": "bert classifier"}, "leaves nothing to train"),
        ({"checkpoint": str(tmp_path / "none")}, "none"),
        ({"text_column": "txet"}, "no column 'txet'"),
        ({"label_column": "text", "text_column": "label"}, "different labels among"),
        ({"label_column": "text", "text_column": "text"}, "must be in different columns"),
        ({"second_column": "text"}, "is for pairs"),
    ]:
        many = {"source": write_texts(tmp_path / "m.csv", 240), "val_source": ""}
        files = many if "different labels" in why else {}
        with pytest.raises((ValueError, OSError), match=why):
            start(config_of(data, **(changes | files)), run)
        assert not run.exists()
    strange = write_texts(tmp_path / "s.csv", labels=("pos", "neg", "meh"))
    with pytest.raises(ValueError, match="training data never shows: 'meh'"):
        start(config_of((data[0], strange)), run)
    alike = write_texts(tmp_path / "alike.csv", labels=("pos",))
    with pytest.raises(ValueError, match="all texts have the label 'pos'"):
        start(config_of((alike, data[1])), run)


def test_a_masked_lm_is_a_bert_to_fine_tune(bert, data, tmp_path):
    tokenizer = Tokenizer.from_file(bert)
    folder = tmp_path / "mlm"
    BertForMaskedLM(sizes(tokenizer.vocab_size)).save_pretrained(folder)
    tokenizer.save(folder)
    ready = start(config_of(data, checkpoint=str(folder), epochs=1), tmp_path / "run")
    ready.trainer.fit()
    assert np.isfinite(ready.trainer.best["val_loss"])


# --- pairs, windows, tags -------------------------------------------------------------------------


def test_pairs_and_the_bilstm(tmp_path):
    rng = np.random.default_rng(0)
    words = ["red", "blue", "green", "black"]
    lines = ["sentence1\tsentence2\tlabel"]
    for _ in range(160):
        a, b = rng.integers(4, size=2)
        lines.append(f"{words[a]} {words[a]}\t{words[b]} {words[b]}\t{'yn'[int(a == b)]}")
    (tmp_path / "pairs.tsv").write_text("\n".join(lines) + "\n")
    config = config_of((str(tmp_path / "pairs.tsv"), ""), "pair", encoder="bilstm", epochs=1)
    ready = start(config, tmp_path / "run")
    ready.trainer.fit()
    assert ready.report()[0].scores.confusion.sum() == len(ready.task.held_out)
    rows, _ = Predictor.open(str(tmp_path / "run")).of_lines(["red\tred", "red\tblue"])
    assert [row["text2"] for row in rows] == ["red", "blue"]
    with pytest.raises(ValueError, match="line 2 must hold two texts"):
        Predictor.open(str(tmp_path / "run")).of_lines(["red\tred", "red"])


def test_rare_labels_count_as_much_with_balanced_weights(data, tmp_path):
    ready = start(config_of(data, class_weights="balanced"), tmp_path / "run")
    assert ready.task.weights.tolist() == [1.0, 1.0]
    ready.run.close()
    sentences = write_sentences(tmp_path / "a.conll")
    with pytest.raises(ConfigError, match="not for tag"):
        start(config_of((sentences, ""), "tag", class_weights="balanced"), tmp_path / "tag")


@pytest.mark.parametrize("on_checkpoint", [False, True])
def test_tagging_learns_and_predicts_spans(on_checkpoint, bert, tmp_path):
    sentences = write_sentences(tmp_path / "a.conll", 60)
    changes = {"checkpoint": bert} if on_checkpoint else {}
    config = config_of((sentences, ""), "tag", epochs=4, lr=1e-2, **changes)
    ready = start(config, tmp_path / "run")
    ready.trainer.fit()
    report, _ = ready.report()
    assert report.scores.entities.averages.micro.f1 == 1.0
    assert "the word's usual tag" in report.text()
    lines = ["Ada went to Rome City ."]
    (row,), _ = Predictor.open(str(tmp_path / "run")).of_lines(lines)
    assert row["tags"] == ["B-PER", "O", "O", "B-LOC", "I-LOC", "O"]
    assert row["spans"] == [
        {"type": "PER", "start": 0, "stop": 1, "text": "Ada"},
        {"type": "LOC", "start": 3, "stop": 5, "text": "Rome City"},
    ]
    rows, _ = Predictor.open(str(tmp_path / "run")).of_file(sentences, Columns())
    assert len(list(rows)) == 60


def test_several_processes_share_a_step_also_with_frozen_layers(bert, data, tmp_path):
    options = {"checkpoint": bert, "freeze": "layer.0", "epochs": 1, "lr": 1e-3}
    one = start(config_of(data, **options), tmp_path / "one")
    one.trainer.fit()
    two = start(config_of(data, **options, processes=2), tmp_path / "two")
    two.trainer.fit()
    losses = [one.trainer.best["val_loss"], two.trainer.best["val_loss"]]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)  # dropout is drawn otherwise


def test_tags_that_mark_no_entities_are_scored_as_words(tmp_path):
    (tmp_path / "train.conll").write_text("Ada X-PER\nran O\n\nBob X-PER\nran O\n")
    (tmp_path / "dev.conll").write_text("Ada I-PER\nran O\n")
    files = str(tmp_path / "train.conll"), str(tmp_path / "dev.conll")
    ready = start(config_of(files, task="tag"), tmp_path / "run")
    ready.trainer.fit()
    report, _ = ready.report()
    assert report.scores.entities is None
    assert report.scores.words.rows["I-PER"].support == 1
    with pytest.raises(ValueError, match=r"train.*line 1: the tag 'X-PER' is not 'O'.*as IOB1"):
        read_and_begin(config_of(files[::-1], task="tag"))


def read_and_begin(config):
    kind = KINDS[config.task]
    train, held = read(config, QuietLog())
    tokenizer, model = kind.begin(config, train, QuietLog())
    return kind.task(config, train, held, tokenizer, model)


# --- translations ---------------------------------------------------------------------------------


def write_pairs(path, count=60):
    rng = np.random.default_rng(0)
    words = {"rot": "red", "blau": "blue", "haus": "house", "ball": "ball"}
    names = list(words)
    lines = []
    for _ in range(count):
        chosen = [names[i] for i in rng.integers(4, size=2)]
        lines.append(f"{' '.join(chosen)}\t{' '.join(words[w] for w in chosen)}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_translations_are_learnt_scored_and_written(tmp_path):
    pairs = write_pairs(tmp_path / "pairs.tsv", 200)
    changes = {"epochs": 16, "lr": 1e-2, "n_embd": 32, "vocab_size": 300, "dropout": 0.0}
    options = {"header": "no", "val_fraction": 0.2, **changes}
    ready = start(config_of((pairs, ""), "translate", **options), tmp_path / "run")
    train, held = read(ready.config, QuietLog())
    assert not {*train.texts} & {*held.texts}  # no source is on both sides
    ready.trainer.fit()
    report, why_not = ready.report()
    assert why_not is None
    assert report.scores.exact > 50 > report.scores.copied
    assert json.loads((tmp_path / "run/metrics.json").read_text())["bleu"] == report.scores.bleu
    rows, _ = Predictor.open(str(tmp_path / "run")).of_lines(["rot ball", "blau haus"])
    assert [row["translation"] for row in rows] == ["red ball", "blue house"]

    more = config_of((pairs, ""), "translate", **options, checkpoint=str(tmp_path / "run"))
    second = start(more, tmp_path / "second")
    assert second.task.pairs == ready.task.pairs
    second.run.close()


def test_pairs_that_are_too_long_are_left_out_and_counted(bert, tmp_path):
    path = tmp_path / "pairs.tsv"
    write_pairs(path)
    path.write_text(path.read_text() + "rot " * 60 + "\tred\n")
    options = {"header": "no", "vocab_size": 300}
    ready = start(config_of((str(path), ""), "translate", **options), tmp_path / "run")
    assert "left out 1 of" in " ".join(ready.task.notes)
    ready.run.close()
    with pytest.raises(ConfigError, match="is a model of type 'bert': to translate"):
        start(config_of((str(path), ""), "translate", **options, checkpoint=bert), tmp_path / "b")
    with pytest.raises(ConfigError, match="--label-column is not for translate"):
        start(config_of((str(path), ""), "translate", label_column="1"), tmp_path / "b")


# --- columns --------------------------------------------------------------------------------------


def test_columns_without_a_header_are_taken_in_their_order(data, tmp_path):
    bare = write_texts(tmp_path / "bare.csv", header=False)
    config = config_of((bare, data[1]), header="no")
    with pytest.raises(ValueError, match="label"):  # the other file's first line is no row
        start(config, tmp_path / "run")
    train, held = read(config_of((bare, ""), header="no"), QuietLog())
    assert len(train) + len(held) == 48
    assert {*train.labels} == {"pos", "neg"}
    (tmp_path / "wide.csv").write_text("a,b,c,d\n1,2,3,4\n")
    with pytest.raises(ValueError, match=r"which column is the text\? Name it with --text-column"):
        read(config_of((str(tmp_path / "wide.csv"), "")), QuietLog())
