"""Folders: a round trip, Hugging Face's own layout, and files that cannot be used."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tinygrad_llm import backend, no_grad
from tinygrad_llm.models import pretrained
from tinygrad_llm.models.gpt import GPT, GPTConfig

CONFIG = GPTConfig(vocab_size=11, n_positions=8, n_embd=12, n_layer=2, n_head=3, resid_pdrop=0.1)
IDS = np.random.default_rng(0).integers(0, 11, (2, 8))
LINEAR = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


@pytest.fixture
def model():
    model = GPT(CONFIG).eval()
    rng = np.random.default_rng(0)
    with no_grad():
        for p in model.parameters():
            p.copy_(p.numpy() + 0.3 * rng.standard_normal(p.shape))
    return model


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, change):
    """Apply `change` to the dict of arrays in the file."""
    arrays = load_file(folder / pretrained.WEIGHTS)
    save_file(change(arrays) or arrays, folder / pretrained.WEIGHTS)


def rewrite_config(folder, **changes):
    path = folder / pretrained.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_a_round_trip_keeps_every_bit(model, tmp_path, dtype):
    model.to(dtype).save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path)
    assert loaded.config == CONFIG
    assert not loaded.training
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert list(loaded.state_dict()) == list(model.state_dict())
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == backend.as_dtype(dtype)
        assert tensor.data.tobytes() == model.state_dict()[name].data.tobytes()


def test_what_was_loaded_trains(folder):
    model = GPT.from_pretrained(folder)
    assert all(p.data.flags.writeable and p.data.flags.c_contiguous for p in model.parameters())
    model.loss(IDS[:, :-1], IDS[:, 1:]).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_loading_draws_no_random_numbers_and_can_convert(model, folder):
    before = backend.random.state()
    double = GPT.from_pretrained(folder, dtype="float64")
    assert backend.random.state() == before
    assert double(IDS).dtype == np.float64
    np.testing.assert_allclose(double(IDS).numpy(), model(IDS).numpy(), rtol=1e-4, atol=1e-4)


def test_the_folder_is_hugging_faces(model, folder):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "gpt2"
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert config["torch_dtype"] == "float32"
    assert (config["n_embd"], config["n_inner"], config["resid_pdrop"]) == (12, None, 0.1)
    assert config["eos_token_id"] is None
    arrays = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in arrays  # the same numbers as wte
    assert set(arrays) == set(model.state_dict()) - {"lm_head.weight"}
    shapes = {name.split("h.0.")[-1]: array.shape for name, array in arrays.items()}
    assert shapes["attn.c_attn.weight"] == (12, 36)  # (in, out), where a Linear has (out, in)
    assert shapes["mlp.c_fc.weight"] == (12, 48)
    assert shapes["mlp.c_proj.weight"] == (48, 12)
    np.testing.assert_array_equal(
        arrays["transformer.h.1.attn.c_proj.weight"],
        model.transformer.h[1].attn.c_proj.weight.numpy().T,
    )
    header = (folder / "model.safetensors").read_bytes()
    assert b'"format":"pt"' in header[:400]


def test_files_of_the_bare_network_and_old_buffers_are_read(model, folder):
    def older(arrays):
        arrays = {name.removeprefix("transformer."): a for name, a in arrays.items()}
        for i in range(2):
            arrays[f"h.{i}.attn.bias"] = np.tri(8, dtype=np.float32)[None, None]
            arrays[f"h.{i}.attn.masked_bias"] = np.array(-1e4, dtype=np.float32)
        return arrays

    rewrite(folder, older)
    np.testing.assert_array_equal(GPT.from_pretrained(folder)(IDS).numpy(), model(IDS).numpy())


def test_a_stored_head_must_be_the_embedding(model, folder):
    def with_head(arrays):
        arrays["lm_head.weight"] = arrays["transformer.wte.weight"].copy()

    rewrite(folder, with_head)
    np.testing.assert_array_equal(GPT.from_pretrained(folder)(IDS).numpy(), model(IDS).numpy())

    def untied(arrays):
        arrays["lm_head.weight"][0, 0] += 1

    rewrite(folder, untied)
    with pytest.raises(ValueError, match="lm_head is not tied to wte"):
        GPT.from_pretrained(folder)


def test_saving_again_replaces_and_a_failed_save_leaves_the_old(model, folder, monkeypatch):
    old = {path.name: path.read_bytes() for path in folder.iterdir()}
    with no_grad():
        model.transformer.wte.weight.fill_(0.5)

    def full_disk(arrays, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.numpy.save_file", full_disk)
        with pytest.raises(OSError, match="no space left"):
            model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old
    model.save_pretrained(folder)
    assert (GPT.from_pretrained(folder).transformer.wte.weight.numpy() == 0.5).all()


# --- what cannot be used --------------------------------------------------------------------------


def one_sentence(error):
    message = str(error.value)
    return "\n" not in message and len(message) < 600


def test_missing_files(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a model folder: it has no config\.json"):
        GPT.from_pretrained(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"it has no model\.safetensors$"):
        GPT.from_pretrained(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match="a pickle and is not opened"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", '{"n_embd": "12"}', "[" * 100_000, "\xff"]
)
def test_a_damaged_config(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json cannot be used") as caught:
        GPT.from_pretrained(folder)
    assert one_sentence(caught)


def test_another_kind_of_model(folder):
    rewrite_config(folder, model_type="bert")
    with pytest.raises(ValueError, match="model_type must be 'gpt2' for a GPT, got 'bert'"):
        GPT.from_pretrained(folder)


def test_a_truncated_file(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in [0, 4, 8, 9, 500, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors cannot be used") as caught:
            GPT.from_pretrained(folder)
        assert one_sentence(caught)


def test_flipped_bits_in_the_header_never_end_in_another_error(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(0)
    for place in rng.integers(0, header, 100):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        message = "harmless: it hit a blank"
        try:
            GPT.from_pretrained(folder)
        except ValueError as error:
            message = str(error)
        assert "model.safetensors cannot be used" in message or message.startswith("harmless")


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("vocab_size", 10**12, 11),
        ("n_positions", 10**12, 8),
        ("n_embd", 3 * 10**12, 12),
        ("n_layer", 10**12, 2),
        ("n_inner", 10**12, 48),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_allocated(folder, name, value, found):
    rewrite_config(folder, **{name: value})
    with pytest.raises(ValueError, match=f"{name} is {found} and {value}"):
        GPT.from_pretrained(folder)


def test_sizes_that_a_small_file_only_pretends_to_have(folder):
    """Vectors of length 10⁵ are small; the matrices that they promise would take 160 GB."""
    wide = 10**5

    def pretend(arrays):
        arrays["transformer.wte.weight"] = np.zeros((11, wide), dtype=np.float32)
        arrays["transformer.wpe.weight"] = np.zeros((8, wide), dtype=np.float32)
        arrays["transformer.h.0.mlp.c_fc.bias"] = np.zeros(wide, dtype=np.float32)

    rewrite(folder, pretend)
    rewrite_config(folder, n_embd=wide, n_head=10, n_inner=wide)
    with pytest.raises(ValueError, match=r"expected shape \(300000, 100000\), got \(36, 12\)"):
        GPT.from_pretrained(folder)


def test_tensors_that_are_missing_unexpected_or_misshapen(folder):
    def change(arrays):
        del arrays["transformer.ln_f.bias"]
        arrays["transformer.score"] = np.zeros(1, dtype=np.float32)
        arrays["transformer.h.1.ln_1.weight"] = np.zeros(13, dtype=np.float32)

    rewrite(folder, change)
    with pytest.raises(ValueError, match="does not fit this GPT") as caught:
        GPT.from_pretrained(folder)
    message = str(caught.value)
    assert "missing: transformer.ln_f.bias" in message
    assert "unexpected: transformer.score" in message
    assert "transformer.h.1.ln_1.weight: expected shape (12,), got (13,)" in message


def test_a_file_of_something_else(folder):
    save_file({"bert.weight": np.zeros(3, dtype=np.float32)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="it holds no GPT-2"):
        GPT.from_pretrained(folder)


def test_weights_must_be_floats(folder):
    rewrite(folder, lambda arrays: {n: (10 * a).astype(np.int32) for n, a in arrays.items()})
    with pytest.raises(ValueError, match="weights need a float dtype, got int32"):
        GPT.from_pretrained(folder)
    assert GPT.from_pretrained(folder, dtype="float32").lm_head.weight.dtype == np.float32
