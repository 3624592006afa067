"""Llama: grouped heads, rotary positions, padding, cache, folder, what is refused."""

import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tinygrad_llm import backend, no_grad
from tinygrad_llm.generate import generate
from tinygrad_llm.models import auto
from tinygrad_llm.models.llama import Llama, LlamaConfig
from tinygrad_llm.models.pretrained import NewWeights
from tinygrad_llm.nn import KVCache

SIZES: dict[str, Any] = {
    "vocab_size": 19,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 12,
    "initializer_range": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
KINDS: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": 1, "head_dim": 6, "attention_bias": True, "mlp_bias": True},
    {"num_key_value_heads": None, "tie_word_embeddings": True, "hidden_act": "gelu"},
    {"rope_theta": 500.0, "rope_scaling": LLAMA3},
]
IDS = np.random.default_rng(0).integers(2, 19, (3, 12))
REAL = np.arange(12) < np.array([12, 8, 3])[:, None]


def make(**options) -> Llama:
    backend.manual_seed(1)
    return Llama(LlamaConfig(**{**SIZES, **options})).to("float64").eval()


@pytest.mark.parametrize("options", KINDS)
def test_a_position_depends_on_those_before_it_only(options):
    model = make(**options)
    assert model.num_parameters() == model.config.num_parameters()
    changed = IDS.copy()
    changed[:, 5] = (changed[:, 5] + 1) % 19
    with no_grad():
        one, two = model(IDS).numpy(), model(changed).numpy()
    np.testing.assert_allclose(one[:, :5], two[:, :5], rtol=1e-12)
    assert np.abs(one[:, 5:] - two[:, 5:]).max(axis=2).min() > 1e-9


@pytest.mark.parametrize("options", KINDS)
def test_padding_on_either_side_changes_nothing(options):
    """Rotary positions know distances only, so texts may begin anywhere."""
    model = make(**options)
    with no_grad():
        right = model(IDS, attention_mask=REAL).numpy()
        for row, n in enumerate(REAL.sum(axis=1)):
            alone = model(IDS[row : row + 1, :n]).numpy()[0]
            np.testing.assert_allclose(alone, right[row, :n], rtol=1e-9, atol=1e-12)
            left = np.zeros((1, 12), int)
            left[0, 12 - n :] = IDS[row, :n]
            mask = (np.arange(12) >= 12 - n).astype(int)[None]
            found = model(left, attention_mask=mask).numpy()[0, 12 - n :]
            np.testing.assert_allclose(found, alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("cuts", [list(range(1, 12)), [5, 6]])
def test_a_text_in_parts_with_a_cache_is_the_whole(options, cuts):
    model = make(**options)
    cache = KVCache(model.config)
    with no_grad():
        whole = model(IDS).numpy()
        parts = [model(part, cache).numpy() for part in np.split(IDS, cuts, axis=1)]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-9, atol=1e-12)
    kept = cache.layers[0].k
    assert kept.shape[1] == model.config.kv_heads  # not one for each query head
    assert kept.shape[3] == model.config.head_size


def test_texts_of_several_lengths_go_on_together():
    """Padded on the left, with a cache and a mask of all positions so far."""
    model, lengths = make(), [6, 4, 1]
    ids, mask = np.zeros((3, 6), int), np.zeros((3, 6), int)
    for row, n in enumerate(lengths):
        ids[row, 6 - n :], mask[row, 6 - n :] = IDS[row, :n], 1
    cache = KVCache(model.config)
    with no_grad():
        model.next_logits(ids, cache, mask)
        mask = np.concatenate([mask, np.ones((3, 1), int)], axis=1)
        found = model.next_logits(IDS[:, 11:], cache, mask).numpy()
        for row, n in enumerate(lengths):
            text = np.concatenate([IDS[row, :n], IDS[row, 11:]])[None]
            np.testing.assert_allclose(found[row], model.next_logits(text).numpy()[0], rtol=1e-9)


def gradient(parameter: Any) -> np.ndarray:
    return parameter.grad.numpy()


def test_checkpointing_and_padding_give_the_same_gradients():
    model = make()
    targets = np.where(REAL, IDS, -100)[:, 1:]
    gradients = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing is enable
        model.zero_grad()
        model.loss(IDS[:, :-1], targets, attention_mask=REAL[:, :-1]).backward()
        gradients.append([gradient(p).copy() for p in model.parameters()])
    for one, two in zip(*gradients, strict=True):
        np.testing.assert_array_equal(one, two)
        assert np.abs(one).max() > 0


def test_a_text_longer_than_the_positions_slides():
    model = make()
    cached, plain = (
        list(generate(model, [3, 4], 30, temperature=0, use_cache=use)) for use in (True, False)
    )
    assert cached == plain
    assert len(cached) == 30


def test_flops_count_the_matrices_and_attention():
    tied, untied = make(tie_word_embeddings=True), make()
    assert tied.flops_per_token(10) == untied.flops_per_token(10)
    weights = sum(p.size for p in tied.parameters() if p.ndim == 2)
    assert tied.flops_per_token(10) == 6 * weights + 12 * 2 * 10 * 16


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS)
def test_a_folder_keeps_every_bit(options, tmp_path):
    model = make(**options)
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    assert type(again) is Llama
    for name, tensor in again.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), model.state_dict()[name].numpy())
    np.testing.assert_array_equal(again(IDS).numpy(), model(IDS).numpy())


def test_old_configs_say_rope_scaling_and_new_ones_rope_parameters():
    old = {"model_type": "llama", "rope_theta": 500.0, "rope_scaling": LLAMA3}
    new = {"model_type": "llama", "rope_parameters": {**LLAMA3, "rope_theta": 500.0}}
    older = {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert LlamaConfig.from_dict(old) == LlamaConfig.from_dict(new)
    assert LlamaConfig.from_dict(older).rope_scaling == {"type": "linear", "factor": 2.0}
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}
    assert LlamaConfig.from_dict(plain) == LlamaConfig(rope_theta=9.0)
    assert LlamaConfig.from_dict({"eos_token_id": [5, 6]}).eos_token_id == (5, 6)


def test_a_file_of_the_bare_network_has_no_head(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    arrays = {n.removeprefix("model."): a for n, a in load_file(file).items() if "head" not in n}
    arrays["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2)
    save_file(arrays, file)
    with pytest.warns(NewWeights, match=r"has no lm_head\.weight"):
        again = Llama.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again.model(IDS).numpy(), model.model(IDS).numpy())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be an integer of at least 1"),
        ({"num_attention_heads": 3}, "must be a multiple of num_attention_heads, got 16 and 3"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide"),
        ({"head_dim": 5}, "even head_dim, got 5"),
        ({"hidden_act": "sine"}, "hidden_act must be one of"),
        ({"mlp_bias": "no"}, "mlp_bias must be one of True, False"),
        ({"rope_theta": 0}, "rope_theta must be a number from 1"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type must be one of .* got 'longrope'"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "got 'dynamic'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' needs factor"),
        ({"rope_scaling": 2.0}, "rope_scaling must be an object or none"),
        ({"eos_token_id": (1, -2)}, "eos_token_id must be an integer from 0"),
        ({"vocab_size": 10**12}, "more than any machine has"),
    ],
)
def test_a_config_that_makes_no_network(options, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig(**{**SIZES, **options})


def test_input_that_does_not_fit(tmp_path):
    model = make()
    with pytest.raises(ValueError, match="the input has 13 tokens, but this Llama sees at most"):
        model(np.ones((1, 13), int))
    with pytest.raises(ValueError, match=r"input_ids of shape \(B, T\)"):
        model(IDS[0])
    with pytest.raises(ValueError, match=r"targets must have the shape of input_ids \(3, 12\)"):
        model.loss(IDS, IDS[:, 1:])
    with pytest.raises(ValueError, match="model_type must be one of llama, got 'mistral'"):
        LlamaConfig.from_dict({"model_type": "mistral"})
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="asks for"):
        Llama.from_pretrained(tmp_path)
