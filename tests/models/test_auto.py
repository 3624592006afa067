"""Opening a folder whatever it holds, and names that may be on the hub."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tinygrad_llm.models import auto, bert, hub
from tinygrad_llm.models.auto import class_of, from_pretrained
from tinygrad_llm.models.bert import BertConfig
from tinygrad_llm.models.gpt import GPT, GPTConfig
from tinygrad_llm.models.pretrained import NewWeights

IDS = np.random.default_rng(0).integers(1, 11, (2, 8))
BERT = BertConfig(
    vocab_size=11,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=8,
)


def rewrite_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


# --- which class ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", auto.REGISTRY["bert"])
def test_a_bert_comes_back_as_what_was_saved(name, tmp_path):
    model = getattr(bert, name)(BERT)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(str(tmp_path), dtype="float64")
    assert type(loaded) is type(model)
    for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
        assert b.dtype == np.float64
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_a_gpt_comes_back(tmp_path):
    model = GPT(GPTConfig(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)).eval()
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert isinstance(loaded, GPT)
    np.testing.assert_array_equal(loaded(IDS).numpy(), model(IDS).numpy())


def test_every_class_that_is_named_exists():
    for kind, classes in auto.REGISTRY.items():
        for name in classes:
            found = auto._class(name, {"model_type": kind})
            assert hasattr(found, "save_pretrained")
            assert hasattr(found, "from_pretrained")


def test_another_head_can_be_asked_for(tmp_path):
    bert.BertForPreTraining(BERT).save_pretrained(tmp_path)
    with pytest.warns(NewWeights, match=r"classifier\.weight"):
        loaded = from_pretrained(tmp_path, architecture="BertForTokenClassification", num_labels=5)
    assert isinstance(loaded, bert.BertForTokenClassification)
    assert loaded(IDS).shape == (2, 8, 5)


def test_without_a_named_architecture_it_is_the_network_alone(tmp_path):
    bert.BertForPreTraining(BERT).save_pretrained(tmp_path)
    rewrite_config(tmp_path, architectures=...)
    assert class_of(tmp_path) is bert.BertModel
    assert isinstance(from_pretrained(tmp_path), bert.BertModel)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mamba"}, "model_type must be one of gpt2, bert"),
        ({"model_type": ...}, "got None"),
        ({"model_type": ["bert"]}, "model_type must be one of"),
        ({"architectures": ["BertForMultipleChoice"]}, "give one of BertModel, BertForPreTr"),
        ({"architectures": "BertModel"}, "architectures must be a list"),
        ({"architectures": [{}]}, "architectures must be a list"),
    ],
)
def test_what_cannot_be_opened_is_said_with_the_file(tmp_path, changes, words):
    bert.BertForPreTraining(BERT).save_pretrained(tmp_path)
    rewrite_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=words) as caught:
        from_pretrained(tmp_path)
    assert "config.json cannot be used" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_architecture_of_another_kind(tmp_path):
    bert.BertForPreTraining(BERT).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'GPT2LMHeadModel' is no architecture for .* bert"):
        from_pretrained(tmp_path, architecture="GPT2LMHeadModel")


@pytest.mark.parametrize(
    "path", ["./nothing", "/no/such/folder", Path("owner/name"), "a/b/c", "~x"]
)
def test_what_is_a_path_is_never_looked_for_elsewhere(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it would fail
    with pytest.raises(FileNotFoundError, match=r"is not a model folder: it has no config\.json"):
        from_pretrained(path)


# --- the hub --------------------------------------------------------------------------------------


class HubError(OSError):
    """As HfHubHTTPError."""


def a_hub(answer: Any) -> Any:
    """A huggingface_hub whose snapshot_download returns the answer, or raises it."""
    names = ("GatedRepoError", "RepositoryNotFoundError", "RevisionNotFoundError")
    errors = {name: type(name, (HubError,), {}) for name in names}
    errors["GatedRepoError"] = type("GatedRepoError", (errors["RepositoryNotFoundError"],), {})
    errors["LocalEntryNotFoundError"] = type("LocalEntryNotFoundError", (FileNotFoundError,), {})
    errors["OfflineModeIsEnabled"] = type("OfflineModeIsEnabled", (ConnectionError,), {})
    asked: list[Any] = []

    def snapshot_download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        if isinstance(answer, str):
            raise errors.get(answer, HubError)("Bad day\nwith many lines")
        return str(answer)

    return SimpleNamespace(
        snapshot_download=snapshot_download,
        errors=SimpleNamespace(**errors, HfHubHTTPError=HubError),
        asked=asked,
    )


def test_a_name_is_fetched_without_pickles(tmp_path, monkeypatch):
    bert.BertForMaskedLM(BERT).save_pretrained(tmp_path / "cached")
    fake = a_hub(tmp_path / "cached")
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.chdir(tmp_path)
    loaded = from_pretrained("owner/name", revision="v2")
    assert isinstance(loaded, bert.BertForMaskedLM)
    bert.BertForMaskedLM.from_pretrained("bert-base-uncased")
    assert [question[:2] for question in fake.asked] == [
        ("owner/name", "v2"),
        ("bert-base-uncased", None),
    ]
    assert not [p for p in fake.asked[0][2] if p.endswith((".bin", ".pt", ".pkl", "*"))]


def test_a_folder_goes_before_a_name(tmp_path, monkeypatch):
    bert.BertForMaskedLM(BERT).save_pretrained(tmp_path / "owner" / "name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    assert isinstance(from_pretrained("owner/name"), bert.BertForMaskedLM)


def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no folder 'owner/name'.*tinygrad-llm\[hub\]"):
        from_pretrained("owner/name")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("LocalEntryNotFoundError", "cannot be reached, and its cache here has none"),
        ("OfflineModeIsEnabled", "cannot be reached"),
        ("RepositoryNotFoundError", "the hub has none of that name"),
        ("GatedRepoError", "its owner gives it to those who ask"),
        ("RevisionNotFoundError", "it has no revision 'v9'"),
        ("SomethingElse", "Bad day$"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(error, words, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", a_hub(error))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=words) as caught:
        hub.find("owner/name", "v9")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("there is no folder 'owner/name', and no model")
