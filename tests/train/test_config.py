"""Configuration: layers, the round trip through TOML, refusals."""

import dataclasses
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_llm.models.gpt import GPTConfig
from tinygrad_llm.train import config
from tinygrad_llm.train.config import (
    ARCHITECTURES,
    PRESETS,
    PRESETS_OF,
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
    factors=st.dictionaries(text.filter(bool), finite, max_size=3),
    beta=st.floats(0, 1, exclude_max=True),
    steps=st.integers(1, 10**12),
)
def test_toml_gives_back_what_was_written(source, prompt, tokenizer, lr, factors, beta, steps):
    before = PretrainConfig(
        data=DataConfig(source=source, tokenizer=tokenizer),
        train=TrainConfig(lr=lr, min_lr=lr / 2, lr_groups=factors, betas=(beta, 0.5), steps=steps),
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
            r"one of char, byte, bpe, .*, or a path, got 'bqe'; did you mean 'bpe'",
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
        (
            "[train]\nlr_groups = 0.1",
            r'lr_groups must be a table such as \{"wte" = 0\.1\}, got 0\.1',
        ),
        ("[train.lr_groups]\nwte = 'x'", r"train\.lr_groups\.wte must be a number, got 'x'"),
        ("[train.lr_groups]\nwte = -1", r"train\.lr_groups wte must be 0 or more, got -1\.0"),
        ("[train.lr_groups]\n'' = 1", r"a pattern of train\.lr_groups must be some text"),
        ("[sample]\nevery = -1", r"sample\.every must be 0 or more, got -1"),
        ("[sample]\nevery_max_new_tokens = 0", r"every_max_new_tokens must be at least 1, got 0"),
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


def _gpt(name, vocab_size):
    preset = config.preset(name)
    sizes = {key: getattr(preset.model, key) for key in ("n_layer", "n_head", "n_embd")}
    return GPTConfig(vocab_size, preset.train.context, **sizes)


@pytest.mark.parametrize(
    ("name", "parameters"), [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168)]
)
def test_the_sizes_of_gpt2_are_those_of_its_checkpoints(name, parameters):
    preset = config.preset(name)
    assert _gpt(name, preset.data.vocab_size).num_parameters() == parameters
    tokens = preset.train.batch_size * preset.train.accumulate * preset.train.context
    assert tokens == 491_520


@pytest.mark.parametrize(
    ("name", "millions"), [("shakespeare-char", "0.80"), ("shakespeare-char-gpu", "10.65")]
)
def test_the_sizes_of_the_character_models_are_nanogpts(name, millions):
    """It counts neither positions nor biases, which it has not, over 65 characters."""
    sizes = _gpt(name, 65)
    c, layers = sizes.n_embd, sizes.n_layer
    biases = layers * (3 * c + c + 4 * c + c + 2 * c) + c  # q k v, both c_proj, c_fc, the norms
    count = sizes.num_parameters() - biases - sizes.n_positions * c
    assert f"{count / 1e6:.2f}" == millions


def test_presets_that_share_do_not_change_each_other():
    cpu, gpu = config.preset("shakespeare-char"), config.preset("shakespeare-char-gpu")
    assert set(config.differences(cpu, gpu)) == {
        *("model.n_layer", "model.n_head", "model.n_embd", "model.dropout"),
        *("train.steps", "train.batch_size", "train.context"),
        *("train.eval_every", "train.checkpoint_every"),
    }
    small, medium = config.preset("gpt2"), config.preset("gpt2-medium")
    assert set(config.differences(small, medium)) == {
        *("model.n_layer", "model.n_head", "model.n_embd", "train.lr", "train.min_lr"),
    }


def test_a_table_of_factors_is_read_in_both_forms(tmp_path):
    file = tmp_path / "my.toml"
    for toml in (
        '[train]\nlr_groups = {"wte" = 0.1, "h.0.*" = 2}\n',
        '[train.lr_groups]\nwte = 0.1\n"h.0.*" = 2\n',
    ):
        file.write_text(toml)
        assert config.load(file).train.lr_groups == {"wte": 0.1, "h.0.*": 2.0}
    base = dataclasses.replace(PretrainConfig(), train=TrainConfig(lr_groups={"ln_f": 3.0}))
    assert config.load(file, base).train.lr_groups == {"wte": 0.1, "h.0.*": 2.0}  # as a whole
    other = dataclasses.replace(base, train=TrainConfig(lr_groups={"ln_f": 4.0}))
    assert set(config.differences(base, other)) == {"train.lr_groups"}


@pytest.mark.parametrize(
    ("architecture", "name"), [(a, name) for a in ARCHITECTURES for name in PRESETS_OF[a]]
)
def test_presets_of_every_architecture_survive_the_round_trip(architecture, name, tmp_path):
    there = config.preset(name, architecture)
    assert there.model.architecture == architecture
    written = config.dumps(there)
    (tmp_path / "config.toml").write_text(written)
    assert config.load(tmp_path / "config.toml") == there
    assert config.merge(PretrainConfig(), config.as_dict(there), where="here") == there
    sections = tomllib.loads(written)
    assert ("masking" in sections) == (architecture == "bert")
    assert ("span" in sections) == (architecture == "t5")
    assert ("sample" in sections) == (architecture in ("gpt", "llama", "lstm"))
    assert ("n_head" in sections["model"]) == (architecture != "lstm")


def test_a_file_without_an_architecture_is_a_gpts(tmp_path):
    """As every file was before there was another."""
    (tmp_path / "config.toml").write_text("[model]\nn_layer = 2\n")
    assert config.load(tmp_path / "config.toml").model.architecture == "gpt"


def test_what_an_architecture_has_no_use_for_is_refused():
    lstm = {"architecture": "lstm", "n_head": 2}
    with pytest.raises(ConfigError, match=r"model\.n_head is nothing that pretraining lstm has"):
        config.merge(PretrainConfig(), {"model": lstm}, where="here")
    with pytest.raises(ConfigError, match=r"masking\.whole_words .*: it is for bert$"):
        config.merge(PretrainConfig(), {"masking": {"whole_words": True}}, where="here")
    with pytest.raises(ConfigError, match=r"span\.mean_span must be at least 1, got 0\.5"):
        config.SpanConfig(mean_span=0.5)
    with pytest.raises(ConfigError, match=r"masking\.mask_probability must be in \(0, 1\), got 0"):
        config.MaskingConfig(mask_probability=0)
