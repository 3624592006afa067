"""Configuration: layers, the round trip through TOML, refusals."""

import dataclasses
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm.train import config
from tinygrad_llm.train.config import (
    PRESETS,
    ConfigError,
    DataConfig,
    ModelConfig,
    PretrainConfig,
    SampleConfig,
    TrainConfig,
)

finite = st.floats(0, 1e300, allow_nan=False)
text = st.text(st.characters(exclude_categories=["Cs"]))  # a lone surrogate is no text


@given(
    source=text,
    prompt=text,
    tokenizer=st.sampled_from(["char", "byte", "bpe"]),
    lr=finite,
    beta=st.floats(0, 1, exclude_max=True),
    steps=st.integers(1, 10**12),
)
def test_toml_gives_back_what_was_written(source, prompt, tokenizer, lr, beta, steps):
    before = PretrainConfig(
        data=DataConfig(source=source, tokenizer=tokenizer),
        train=TrainConfig(lr=lr, min_lr=lr / 2, betas=(beta, 0.5), steps=steps),
        sample=SampleConfig(prompt=prompt),
    )
    parsed = tomllib.loads(config.dumps(before))
    assert parsed["data"]["source"] == source
    assert config.merge(PretrainConfig(), parsed, where="test") == before


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load_and_survive_the_round_trip(name, tmp_path):
    preset = config.preset(name)
    file = tmp_path / "config.toml"
    file.write_text(config.dumps(preset))
    assert config.load(file) == preset


def test_a_file_changes_only_what_it_names(tmp_path):
    file = tmp_path / "my.toml"
    file.write_text("[train]\nlr = 1\nmin_lr = 0.5\nbetas = [0, 0.5]\n")
    base = config.preset("tiny")
    loaded = config.load(file, base)
    assert loaded.train == dataclasses.replace(base.train, lr=1.0, min_lr=0.5, betas=(0.0, 0.5))
    assert isinstance(loaded.train.lr, float)  # an integer is a number, too
    assert (loaded.data, loaded.model) == (base.data, base.model)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        (
            "[train]\nstpes = 3",
            r"my\.toml: unknown key 'train\.stpes'; did you mean 'train\.steps'\?",
        ),
        ("[trian]\nsteps = 3", r"unknown key 'trian'; did you mean 'train'\?"),
        ("lr = 3", r"unknown key 'lr'; did you mean 'train\.lr'\?"),
        ("[train]\nsteps = '3'", r"train\.steps must be an integer, got '3'"),
        ("[train]\nsteps = 3.0", r"train\.steps must be an integer, got 3\.0"),
        ("[train]\nsteps = true", r"train\.steps must be an integer, got True"),
        ("[train]\nlr = 'high'", r"train\.lr must be a number, got 'high'"),
        ("[data]\nsource = 3", r"data\.source must be text, got 3"),
        (
            "[data]\ntokenizer = 'bqe'",
            r"one of char, byte, bpe, got 'bqe'; did you mean 'bpe'",
        ),
        ("[train]\nbetas = [0.9]", r"train\.betas must be a list of 2 numbers"),
        ("[train]\nbetas = [0.9, 'x']", r"train\.betas must be a number, got 'x'"),
        ("train = 3", r"train must be a section \[train\], got 3"),
        ("[train]\nsteps = 0", r"my\.toml: train\.steps must be at least 1, got 0"),
        ("[train]\nlr = nan", r"train\.lr must be 0 or more, got nan"),
        ("[train]\nmin_lr = 1.0", r"train\.min_lr must be at most lr"),
        ("[model]\nn_embd = 10\nn_head = 4", r"n_embd must be a multiple of model\.n_head"),
        ("[model]\ndropout = 1.0", r"model\.dropout must be in \[0, 1\), got 1\.0"),
        ("[train]\nema = 1", r"train\.ema must be in \[0, 1\), got 1\.0"),
        ("[train]\naccumulate = 0", r"train\.accumulate must be at least 1, got 0"),
        ("[train]\nmax_seconds = inf", r"train\.max_seconds must be 0 or more, got inf"),
        ("[train]\npatience = -1", r"train\.patience must be 0 or more, got -1"),
        ("[train]\nkeep_last = 1.5", r"train\.keep_last must be an integer, got 1\.5"),
        ("[train]\noverfit_one_batch = 1", r"overfit_one_batch must be true or false, got 1"),
        ("[data]\nval_fraction = 0", r"data\.val_fraction must be in \(0, 1\)"),
        ("[train", r"my\.toml is not valid TOML"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(toml, message, tmp_path):
    file = tmp_path / "my.toml"
    file.write_text(toml)
    with pytest.raises(ConfigError, match=message) as caught:
        config.load(file)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_an_unknown_preset(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no configuration file"):
        config.load(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="did you mean 'demo'"):
        config.preset("dmo")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        config.load(binary)


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PretrainConfig().train.lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]


def test_differences_are_named_by_section():
    old = PretrainConfig()
    new = PretrainConfig(model=ModelConfig(n_layer=7), train=TrainConfig(seed=9))
    assert config.differences(old, new) == {"model.n_layer": (4, 7), "train.seed": (1, 9)}
    assert config.differences(old, old) == {}


def test_no_two_sections_share_a_key():
    """The command line flattens the sections: each flag means one thing."""
    keys = [
        f.name
        for section in dataclasses.fields(PretrainConfig)
        for f in dataclasses.fields(getattr(PretrainConfig(), section.name))
    ]
    assert len(keys) == len(set(keys))
