"""`benchmarks/ner.py` on a few sentences: it trains, scores, keeps the tagger and writes a page."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tinygrad_llm.data.tokenizers import Tokenizer
from tinygrad_llm.models import auto
from tinygrad_llm.models.bert import BertConfig, BertModel

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

SENTENCE = "{} B-PER\nwent O\nto O\nNew B-LOC\nYork I-LOC\n. O\n\n"


@pytest.fixture
def ner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("ner")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return module


def files(folder: Path) -> list[str]:
    text = "-DOCSTART- O\n\n" + "".join(SENTENCE.format(name) for name in ("Ada", "Bob") * 6)
    (folder / "train.txt").write_text(text, encoding="utf-8")
    (folder / "valid.txt").write_text(SENTENCE.format("Eva") * 2, encoding="utf-8")
    return ["--train", str(folder / "train.txt"), "--valid", str(folder / "valid.txt")]


def checkpoint(folder: Path) -> str:
    tokenizer = Tokenizer.wordpiece("Ada Bob Eva went to New York .", 50)
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(tokenizer.vocab_size, **sizes, intermediate_size=12)
    BertModel(config).save_pretrained(folder)
    tokenizer.save(folder)
    return str(folder)


def run(ner: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["ner.py", *words])
    ner.main()


@pytest.mark.parametrize("recipe", ["bilstm-crf", "checkpoint"])
def test_a_recipe_from_files_to_a_page(
    recipe: str,
    ner: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--recipe", recipe, *files(tmp_path), "--save", "x", "--model", str(tmp_path / "m")]
    if recipe == "checkpoint":
        words += ["--checkpoint", checkpoint(tmp_path / "bert")]
    run(ner, monkeypatch, *words, "--set", "epochs=2", "hidden_size=8", "character_features=4")
    printed = capsys.readouterr().out
    assert printed.count("\nepoch ") == 2
    assert "Entities, as conlleval" in printed
    page = (tmp_path / "results" / "ner_x.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {recipe}: entity F1 ")
    assert "| epoch | loss | val_loss | val_f1 |" in page
    assert "without O" in page
    model = auto.from_pretrained(tmp_path / "m")
    assert model.config.hidden_size == 8
    assert (tmp_path / "m" / "tokenizer.json").exists() == (recipe == "checkpoint")


def test_a_checkpoint_belongs_to_its_recipe(
    ner: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        run(ner, monkeypatch, "--recipe", "checkpoint", *files(tmp_path))


def test_changes_go_into_the_recipe_or_its_tagger(ner: ModuleType) -> None:
    recipe = ner.with_changes(ner.RECIPES["bilstm-crf"], ["lr=0.1", "head=softmax", "dropout=0.3"])
    assert recipe["lr"] == 0.1
    assert recipe["tagger"] == {"scheme": "BIOES", "head": "softmax", "dropout": 0.3}
    assert ner.RECIPES["bilstm-crf"]["lr"] != 0.1
