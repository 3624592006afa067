"""Fine-tuning of language models: is it better than before, on what, and what is refused."""

import json
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tinygrad_llm import manual_seed
from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.finetune import config as finetune_config
from tinygrad_llm.finetune import run as finetune
from tinygrad_llm.finetune.kind import Columns, Fitted
from tinygrad_llm.finetune.kinds import KINDS
from tinygrad_llm.finetune.layers import layer_factors
from tinygrad_llm.finetune.predict import Predictor
from tinygrad_llm.models import auto
from tinygrad_llm.models.bert import BertConfig, BertForSequenceClassification, BertModel
from tinygrad_llm.models.gpt import GPT, GPTConfig
from tinygrad_llm.models.llama import Llama, LlamaConfig
from tinygrad_llm.models.lstm import LSTMConfig, LSTMLanguageModel
from tinygrad_llm.tasks.evaluate import Reading
from tinygrad_llm.train import evaluate
from tinygrad_llm.train.config import ConfigError, merge
from tinygrad_llm.train.log import QuietLog
from tinygrad_llm.train.run import Run
from tinygrad_llm.train.trainer import Interrupted

SENTENCES = ["the cat sits on the mat", "a dog runs to the sea", "the sea is far and blue"]
CODE = ["x = x + 1", "if x > 2: y = x", "return x + y"]


def prose(count, pieces=SENTENCES, seed=0):
    rng = np.random.default_rng(seed)
    return ". ".join(pieces[i] for i in rng.integers(len(pieces), size=count))


def gpt(size, context):
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT(GPTConfig(size, context, **sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def llama(size, context):
    config = LlamaConfig(size, 16, 24, 2, 2, max_position_embeddings=context)
    return Llama(config)


def lstm(size, context):
    config = LSTMConfig(size, n_positions=context, n_embd=16, n_hidden=16, n_layer=2)
    return LSTMLanguageModel(config)


def checkpoint(folder, tokenizer=None, make=gpt, context=16):
    """A folder with a language model that has seen nothing."""
    tokenizer = tokenizer or Tokenizer.byte()
    manual_seed(3)
    make(tokenizer.vocab_size, context).save_pretrained(folder)
    tokenizer.save(folder)
    return str(folder)


@pytest.fixture
def model(tmp_path):
    return checkpoint(tmp_path / "model")


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(prose(40, CODE))
    return str(tmp_path / "text.txt")


@pytest.fixture
def other(tmp_path):
    (tmp_path / "other.txt").write_text(prose(12, CODE, seed=1))
    return str(tmp_path / "other.txt")


def config_of(**changes):
    begun = finetune_config.preset("tiny", "lm")
    sections: dict = {"data": {}, "model": {}, "train": {"processes": 1, "device": "cpu"}}
    homes = {"data": begun.data, "model": begun.model, "train": begun.train}
    for key, value in changes.items():
        section = next(name for name, home in homes.items() if hasattr(home, key))
        sections[section][key] = value
    return merge(begun, sections, where="the test")


def start(config, folder) -> Any:
    return finetune.start(config, folder, QuietLog())


def task_of(folder, **changes) -> Any:
    return start(config_of(**changes), folder).task


# --- a whole run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gpt, llama, lstm])
def test_a_shifted_text_is_learnt_and_the_report_says_how_much(make, text, other, tmp_path):
    folder = checkpoint(tmp_path / "began", make=make)
    ready = start(
        config_of(source=text, val_source=other, checkpoint=folder, lr=2e-2), tmp_path / "run"
    )
    ready.trainer.fit()
    report, why_not = ready.report()
    assert report.score.loss < report.before.loss - 1
    assert report.score.tokens == report.before.tokens == report.unigram.tokens
    assert "It is better than before by" in report.text()
    assert why_not or (tmp_path / "run/metrics.png").stat().st_size > 1000
    found = json.loads((tmp_path / "run/metrics.json").read_text())
    assert found["loss"] == report.score.loss
    assert found["baselines"]["before"]["loss"] == report.before.loss
    assert found["written"]["before"] != found["written"]["after"]
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert first["val_loss"] == report.before.loss
    best = ready.trainer.best
    assert best["val_loss"] == pytest.approx(report.score.loss, abs=1e-9)
    saved = auto.from_pretrained(tmp_path / "run/checkpoints/best")
    assert type(saved) is type(ready.model)


def test_the_score_before_is_what_evaluate_says_of_the_checkpoint(model, text, other, tmp_path):
    ready = start(
        config_of(source=text, val_source=other, checkpoint=model, max_length=8), tmp_path / "run"
    )
    ready.trainer.fit()
    report, _ = ready.report()

    def said(path):
        subject = evaluate.load(path, "cpu")
        read = evaluate.open_text(subject, other, "all")
        return evaluate.evaluate(subject, read, Reading(8).fit(subject.model))

    for score, path in ((report.before, model), (report.score, tmp_path / "run")):
        assert score.loss == pytest.approx(said(path).loss, abs=1e-5)
        assert score.bits_per_byte == pytest.approx(said(path).bits_per_byte, abs=1e-5)
        assert (score.tokens, score.bytes) == (said(path).tokens, said(path).bytes)
        assert score.perplexity == pytest.approx(math.exp(score.loss))
    with pytest.raises(ValueError, match=r"was fine-tuned, and metrics\.json of its run"):
        evaluate.open_text(evaluate.load(tmp_path / "run", "cpu"), "", "val")


def test_the_unigram_model_is_counted_on_the_training_text(model, text, other, tmp_path):
    task = task_of(tmp_path / "run", source=text, val_source=other, checkpoint=model)
    trained = list((tmp_path / "text.txt").read_bytes())
    counts, total = Counter(trained), len(trained) + 257  # one more of each of the vocabulary
    scored = list((tmp_path / "other.txt").read_bytes())
    nats = -sum(math.log((counts[byte] + 1) / total) for byte in scored)
    assert task.unigram.loss == pytest.approx(nats / len(scored), abs=1e-12)
    assert task.unigram.bits_per_byte == pytest.approx(nats / len(scored) / math.log(2))


def test_without_a_checkpoint_a_small_gpt_begins_at_random(text, tmp_path):
    ready = start(config_of(source=text, epochs=1), tmp_path / "run")
    assert isinstance(ready.model, GPT)
    assert ready.model.config.n_positions == ready.config.model.max_length == 128
    assert ready.task.tokenizer.kind == "bpe"
    ready.trainer.fit()
    assert "before, at random" in ready.report()[0].text()


def test_the_saved_folder_has_the_names_of_transformers(model, text, tmp_path):
    ready = start(config_of(source=text, checkpoint=model, epochs=1), tmp_path / "run")
    ready.trainer.fit()
    folder = tmp_path / "run/checkpoints/best"
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
    assert {"model.safetensors", "tokenizer.json", "task.json"} <= {
        p.name for p in folder.iterdir()
    }
    ids = np.array([[5, 6, 7]])
    found = GPT.from_pretrained(folder)(ids).numpy()
    assert np.array_equal(found, ready.model.eval()(ids).numpy())


# --- going on, and at which rates -----------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"freeze": "wte h.0"}])
def test_a_stopped_run_goes_on_bit_for_bit(options, model, text, tmp_path, monkeypatch):
    changes = {"source": text, "checkpoint": model, "evals_per_epoch": 2, **options}
    whole = start(config_of(**changes), tmp_path / "whole")
    whole.trainer.fit()

    part = start(config_of(**changes), tmp_path / "part")
    step = part.trainer.train_step

    def stopping():
        record = step()
        if part.trainer.step == part.trainer.config.eval_every + 1:
            part.trainer._signal = 2
        return record

    monkeypatch.setattr(part.trainer, "train_step", stopping)
    with pytest.raises(Interrupted):
        part.trainer.fit()
    run = Run.open(tmp_path / "part")
    again: Any = finetune.resume(run, finetune_config.load(run.config_file), QuietLog())
    again.trainer.fit()
    theirs = dict(again.model.named_parameters())
    for name, parameter in whole.model.named_parameters():
        assert np.array_equal(parameter.numpy(), theirs[name].numpy()), name
    assert again.report()[0].as_dict() == whole.report()[0].as_dict()


def test_frozen_parameters_stay_and_two_processes_learn_the_same(model, text, tmp_path):
    losses = []
    for count in (1, 2):
        changes = {"source": text, "checkpoint": model, "freeze": "wte", "processes": count}
        ready = start(config_of(**changes), tmp_path / f"run{count}")
        ready.trainer.fit()
        began = GPT.from_pretrained(model)
        ours, theirs = (m.transformer.wte.weight.numpy() for m in (ready.model, began))
        assert np.array_equal(ours, theirs)
        losses.append(ready.report()[0].score.loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_each_model_names_its_layers():
    config = config_of(layer_decay=0.5, lr=1e-3, head_lr=1e-3)

    def rates(model):
        return layer_factors(model, config)

    assert rates(gpt(20, 8)) == {
        **{"transformer.wte.weight": 0.25, "transformer.wpe.weight": 0.25},
        **{"transformer.h.0": 0.5, "transformer.h.1": 1.0},
    }
    found = {"model.embed_tokens.weight": 0.25, "model.layers.0": 0.5, "model.layers.1": 1.0}
    assert rates(llama(20, 8)) == found
    found = rates(lstm(20, 8))
    assert found.pop("network.embedding.weight") == 0.25
    assert {name[-3:]: rate for name, rate in found.items()} == {"_l0": 0.5, "_l1": 1.0}
    bert = BertForSequenceClassification(BertConfig(20, 8, 2, 2, 8))
    assert rates(bert) == {
        **{name: 0.25 for name, _ in bert.named_parameters() if "embeddings" in name},
        **{"bert.encoder.layer.0": 0.5, "bert.encoder.layer.1": 1.0, "classifier": 1.0},
    }


# --- the data -------------------------------------------------------------------------------------


def test_rows_lines_and_files_are_documents(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [f"row {i}, of some words" for i in range(120)]
    table = "".join(f'{i},"{row}"\n' for i, row in enumerate(rows))
    (tmp_path / "a.csv").write_text("id,body\n" + table)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": r}) + "\n" for r in rows))
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(rows))
    (tmp_path / "docs").mkdir()
    for i, row in enumerate(rows):
        (tmp_path / f"docs/{i:03}.md").write_text(row)
    found = [
        task_of(tmp_path / "1", source="a.csv", text_column="body", checkpoint=model),
        task_of(tmp_path / "2", source="a.jsonl", text_column="body", checkpoint=model),
        task_of(tmp_path / "3", source="a.jsonl:body", checkpoint=model),
        task_of(tmp_path / "4", source="a.txt", checkpoint=model),
        task_of(tmp_path / "5", source="docs/*.md", checkpoint=model),
    ]
    for task in found:
        assert np.array_equal(task.train_tokens.ids, found[0].train_tokens.ids)
        assert np.array_equal(task.scored_tokens.ids, found[0].scored_tokens.ids)
    task = found[0]
    held = task.tokenizer.decode(task.val_tokens.ids).split("<|endoftext|>")
    assert set(held) < set(rows)  # whole ones
    assert task.scored_bytes == len("".join(held))
    assert f"{len(held)} of 120 documents" in task.notes[0]
    x, _ = task.next_batch()
    ends = x == task.tokenizer.eos_id
    assert not ends[:, 1:].any()  # a window begins with the mark or has none: it is of one document
    config = finetune_config.load(tmp_path / "5/config.toml")
    assert config.data.source == str(tmp_path / "docs/*.md")  # and means the same elsewhere


def test_an_epoch_has_every_token_once_and_the_next_another_order(model, text, tmp_path):
    task = task_of(tmp_path / "run", source=text, checkpoint=model, batch_size=5)
    epochs = []
    for _ in range(2):
        batches = [task.next_batch() for _ in range(task.steps_per_epoch)]
        assert task.epochs.epoch == len(epochs) + 1
        epochs.append([tuple(row) for x, _ in batches for row in x.tolist()])
        assert sum(task.size(batch) for batch in batches) == len(task.train_tokens) - 1
    assert epochs[0] != epochs[1]
    cut = [{row[:8] for row in epoch} for epoch in epochs]  # the last one is filled up otherwise
    assert cut[0] == cut[1]


def test_the_built_in_text_has_its_own_validation(tmp_path):
    with pytest.raises(ConfigError, match="leave out --val-data"):
        start(config_of(val_source="x.txt"), tmp_path / "run")


# --- what is refused ------------------------------------------------------------------------------


REFUSED = [
    ({"label_column": "x"}, "--label-column is for other tasks"),
    ({"second_column": "x"}, "--second-column is for other tasks"),
    ({"encoder": "bilstm"}, "--encoder is for other tasks"),
    ({"cased": True}, "--cased is for other tasks"),
    ({"new_head": True}, "--new-head is for other tasks"),
    ({"long": "windows"}, "--long is for other tasks"),
    ({"class_weights": "balanced"}, "--class-weights is for other tasks"),
    ({"metric": "mcc"}, "--metric is for other tasks"),
    ({"head_lr": 1.0}, "--head-lr is for what is new"),
    ({"source": "empty.txt"}, "holds no text"),
    ({"source": "one.txt"}, "has 1 tokens"),
    ({"source": "few.txt"}, "leaves 0 for validation"),
    ({"source": "a.csv", "text_column": "nam"}, "no column 'nam' .did you mean 'name'"),
    ({"source": "a.csv"}, "which column is the text"),
    ({"source": "a.jsonl"}, "has no field 'text', it has 'name'"),
    ({"source": "a.jsonl", "text_column": "x"}, "has no field 'x'"),
    ({"source": "docs", "text_column": "x"}, "--text-column is for columns of CSV and TSV"),
    ({"source": "a.jsonl", "header": "yes"}, "--header is for columns"),
    ({"source": "nowhere.txt"}, "no file"),
    ({"source": "https://example.org/a.csv"}, "a table on the network: download it"),
    ({"source": "text.txt", "val_source": "text.txt"}, "is the text that is trained on"),
    ({"source": "text.txt", "max_length": 17}, "reads at most 16 pieces at once"),
    ({"source": "text.txt", "checkpoint": "bert"}, "a BertModel, which does not predict each"),
    ({"source": "text.txt", "checkpoint": "letters"}, "'Z'"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_bad_input_is_one_sentence(changes, message, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "one.txt").write_text("a")
    (tmp_path / "few.txt").write_text("abcd")
    (tmp_path / "text.txt").write_text("the Zoo " * 40)
    (tmp_path / "a.csv").write_text("id,name\n1,one\n2,two\n")
    (tmp_path / "a.jsonl").write_text('{"name": "one"}\n{"name": "two"}\n')
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/a.md").write_text("words")
    BertModel(BertConfig(30, 8, 1, 2, 8)).save_pretrained(tmp_path / "bert")
    checkpoint(tmp_path / "letters", Tokenizer.char("the oo"))
    with pytest.raises((ValueError, OSError), match=message) as caught:
        start(config_of(**{"source": "text.txt", "checkpoint": model, **changes}), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_length_of_0_is_for_lm_alone():
    with pytest.raises(ConfigError, match=r"model\.max_length must be at least 4, got 0"):
        merge(finetune_config.FinetuneConfig(), {"model": {"max_length": 0}}, where="the test")


def test_a_changed_text_is_not_gone_on_with(model, text, tmp_path):
    ready = start(config_of(source=text, checkpoint=model, epochs=1), tmp_path / "run")
    ready.trainer.fit()
    (tmp_path / "text.txt").write_text(prose(40, SENTENCES))
    run = Run.open(tmp_path / "run")
    config = finetune_config.load(run.config_file)
    with pytest.raises(ValueError, match="has changed since the run began"):
        finetune.resume(run, replace(config, train=replace(config.train, epochs=2)), QuietLog())


def test_it_labels_nothing_but_says_what_to_do(model, text):
    with pytest.raises(
        ConfigError, match=r"holds a GPT, which labels nothing.*generate --model RUN"
    ):
        Predictor.open(model)
    kind, fitted = KINDS["lm"], Fitted(GPT.from_pretrained(model), Tokenizer.byte())
    with pytest.raises(ConfigError, match="tinygrad-llm generate --model RUN"):
        kind.of_file(fitted, text, Columns())
    with pytest.raises(ConfigError, match="tinygrad-llm generate --model RUN"):
        kind.of_lines(fitted, ["a"])


def test_tokens_that_a_tokenizer_lacks_are_counted(tmp_path, text):
    known = Tokenizer.wordpiece("if return : > + = 1 2 x", 60)
    folder = checkpoint(tmp_path / "pieces", known)
    task = task_of(tmp_path / "run", source=text, checkpoint=folder)
    assert known.encode("y").tolist() == [known.token_to_id("[UNK]")]
    assert [note for note in task.notes if "to train on stand for what the tokenizer lacks" in note]
    assert task.scored_bytes is None  # these pieces do not spell the text out
