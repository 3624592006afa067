"""Folders: a round trip, Hugging Face's own layout, and files that cannot be used."""

import errno
import json
import math
import os
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tinygrad_llm import backend, no_grad, storage
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


def test_a_name_that_is_there_twice(folder):
    def both(arrays):
        arrays["wte.weight"] = arrays["transformer.wte.weight"] + 1

    rewrite(folder, both)
    with pytest.raises(ValueError, match=r"holds transformer\.wte\.weight twice"):
        GPT.from_pretrained(folder)


def test_the_config_of_the_published_gpt2_is_read(model, folder):
    """Its keys, values of the network's size aside; the file on the hub has the bare names."""
    theirs = {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 8,
        "n_embd": 12,
        "n_head": 3,
        "n_layer": 2,
        "n_positions": 8,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 11,
    }
    (folder / "config.json").write_text(json.dumps(theirs))
    rewrite(folder, lambda arrays: {n.removeprefix("transformer."): a for n, a in arrays.items()})
    loaded = GPT.from_pretrained(folder)
    assert loaded.config.attn_pdrop == 0.1
    np.testing.assert_array_equal(loaded(IDS).numpy(), model(IDS).numpy())


@pytest.mark.parametrize(
    ("embedding", "others", "expected"),
    [
        ("bfloat16", "float32", "float32"),
        ("float32", "bfloat16", "float32"),
        ("float16", "bfloat16", "float32"),
        ("float16", "float16", "float16"),
        ("bfloat16", "float64", "float64"),
    ],
)
def test_a_file_of_several_dtypes_loses_nothing(folder, embedding, others, expected):
    def mix(arrays):
        kinds = {n: embedding if n.endswith("wte.weight") else others for n in arrays}
        return {n: a.astype(backend.as_dtype(kinds[n])) for n, a in arrays.items()}

    rewrite(folder, mix)
    saved = load_file(folder / "model.safetensors")
    loaded = GPT.from_pretrained(folder)
    assert {p.dtype for p in loaded.parameters()} == {backend.as_dtype(expected)}
    for name in ("transformer.wte.weight", "transformer.h.0.ln_1.weight"):
        np.testing.assert_array_equal(
            loaded.state_dict()[name].numpy().astype(np.float64), saved[name].astype(np.float64)
        )


def test_reading_takes_little_more_than_the_weights(tmp_path):
    """Each is read on its own: there are never two of the whole."""
    size = GPTConfig(vocab_size=300, n_positions=8, n_embd=128, n_layer=4, n_head=2)
    GPT(size).save_pretrained(tmp_path)
    weights = 4 * size.num_parameters()
    tracemalloc.start()
    try:
        GPT.from_pretrained(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 1.4 * weights
    finally:
        tracemalloc.stop()


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
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.numpy.save_file", full_disk)
        with pytest.raises(OSError, match="No space left") as caught:
            model.save_pretrained(folder)
        assert caught.value.errno == errno.ENOSPC
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old
    model.save_pretrained(folder)
    assert (GPT.from_pretrained(folder).transformer.wte.weight.numpy() == 0.5).all()


# --- shards ---------------------------------------------------------------------------------------


@pytest.fixture
def sharded(model, tmp_path):
    model.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    return tmp_path / "shards"


def rewrite_index(folder, change):
    path = folder / pretrained.INDEX
    index = json.loads(path.read_text())
    path.write_text(json.dumps(change(index) or index))


def test_large_weights_go_into_shards_with_an_index(model, sharded, folder):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    n = len(names)
    assert n > 3
    assert names == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    assert sorted(os.listdir(sharded)) == sorted(
        [*names, "config.json", "model.safetensors.index.json"]
    )
    whole = load_file(folder / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in whole.values())
    held = {name: load_file(sharded / name) for name in names}
    assert {k: a.tobytes() for part in held.values() for k, a in part.items()} == {
        k: a.tobytes() for k, a in whole.items()
    }
    sizes = [sum(a.nbytes for a in part.values()) for part in held.values()]
    assert all(
        size <= 4000 or len(part) == 1 for size, part in zip(sizes, held.values(), strict=True)
    )
    loaded = GPT.from_pretrained(sharded)
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].data.tobytes() == tensor.data.tobytes()


def test_what_is_saved_replaces_what_was_there_in_other_files(model, sharded):
    model.save_pretrained(sharded)
    assert sorted(os.listdir(sharded)) == ["config.json", "model.safetensors"]
    model.save_pretrained(sharded, max_shard_size=10**4)
    assert "model.safetensors" not in os.listdir(sharded)
    np.testing.assert_array_equal(GPT.from_pretrained(sharded)(IDS).numpy(), model(IDS).numpy())


@pytest.mark.parametrize(
    ("size", "expected"),
    [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("1kib", 1024), ("7B", 7), (12, 12), ("2T", 2e12)],
)
def test_sizes_of_shards(size, expected):
    assert pretrained.as_bytes(size) == expected


@pytest.mark.parametrize("size", ["", "0", "-1", "5 bananas", "GB", 1.5, True, None])
def test_what_is_no_size_is_refused(model, tmp_path, size):
    with pytest.raises(ValueError, match="max_shard_size must be a size"):
        model.save_pretrained(tmp_path / "model", max_shard_size=size)
    assert not (tmp_path / "model").exists()


def test_a_missing_shard(sharded):
    (sharded / "model-00002-of-00005.safetensors").unlink(missing_ok=True)
    name = sorted(sharded.glob("model-*"))[1]
    name.unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.json names the file .*missing") as caught:
        GPT.from_pretrained(sharded)
    assert one_sentence(caught)


@pytest.mark.parametrize(
    "file",
    [
        *("../model/model.safetensors", "/etc/passwd", "a/b.safetensors", "a\\b.safetensors"),
        *(
            "pytorch_model-00001-of-00002.bin",
            "",
            None,
            5,
            ["model.safetensors"],
            "a\0.safetensors",
        ),
    ],
)
def test_an_index_names_files_beside_it_and_no_others(sharded, folder, file):
    def elsewhere(index):
        index["weight_map"]["transformer.wte.weight"] = file

    assert (folder / "model.safetensors").exists()  # it is there, but must not be opened from here
    rewrite_index(sharded, elsewhere)
    with pytest.raises(ValueError, match=r"is said to be in .*, no \.safetensors file") as caught:
        GPT.from_pretrained(sharded)
    assert one_sentence(caught)


def test_an_index_that_does_not_fit_its_shards(sharded):
    good = (sharded / pretrained.INDEX).read_text()
    for change, words in (
        (lambda i: i["weight_map"].update(more="model-00001-of-000"), "no .safetensors file"),
        (lambda i: i["weight_map"].pop("transformer.wpe.weight") and i, "says otherwise"),
        (lambda i: i["weight_map"].clear(), "has no weight_map"),
        (lambda i: {"weight_map": [1]}, "has no weight_map"),
        (lambda i: [i], "expected a JSON object"),
    ):
        (sharded / pretrained.INDEX).write_text(good)
        rewrite_index(sharded, change)
        with pytest.raises(ValueError, match=rf"index\.json cannot be used: .*{words}") as caught:
            GPT.from_pretrained(sharded)
        assert one_sentence(caught)

    def lost(index):
        first = index["weight_map"]["transformer.wte.weight"]
        index["weight_map"]["transformer.nothing"] = first

    (sharded / pretrained.INDEX).write_text(good)
    rewrite_index(sharded, lost)
    with pytest.raises(ValueError, match=r"says that transformer\.nothing is in .*it is not"):
        GPT.from_pretrained(sharded)


# --- checksums ------------------------------------------------------------------------------------


def test_a_folder_with_checksums_is_compared_with_them(model, folder):
    storage.write_sums(folder)
    assert GPT.from_pretrained(folder).config == CONFIG
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # in a weight: still a safetensors file
    path.write_bytes(data)
    with pytest.raises(storage.Damaged, match=r"model\.safetensors is not as it was saved"):
        GPT.from_pretrained(folder)
    (folder / storage.SUMS).unlink()
    GPT.from_pretrained(folder)


def test_saving_over_a_folder_with_checksums_forgets_them(model, folder):
    storage.write_sums(folder)
    with no_grad():
        model.transformer.wte.weight.fill_(0.5)
    model.save_pretrained(folder)
    assert not (folder / storage.SUMS).exists()
    assert (GPT.from_pretrained(folder).transformer.wte.weight.numpy() == 0.5).all()


def test_training_files_do_not_concern_a_model(folder):
    for name in ("optimizer.safetensors", "trainer.json"):
        (folder / name).write_text("x")
    storage.write_sums(folder)
    for name in ("optimizer.safetensors", "trainer.json"):
        (folder / name).write_text("y")
    assert GPT.from_pretrained(folder).config == CONFIG


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
        ("vocab_size", 10**9, 11),
        ("n_positions", 10**9, 8),
        ("n_embd", 3 * 10**4, 12),
        ("n_layer", 10**7, 2),
        ("n_inner", 10**9, 48),
    ],
)
def test_wrong_sizes_are_refused_before_anything_is_allocated(folder, name, value, found):
    rewrite_config(folder, **{name: value})
    with small_memory(), pytest.raises(ValueError, match=f"{name} is {found} and {value}"):
        GPT.from_pretrained(folder)


NUMBERS = [10**9, 10**12, 10**400, -12, 0, 1.5, math.nan, math.inf, "12", True, [12], None, {}]


@pytest.mark.parametrize("name", ["vocab_size", "n_positions", "n_embd", "n_layer", "n_inner"])
@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: repr(value)[:12])
def test_absurd_sizes_are_one_sentence(folder, name, value):
    if (name, value) == ("n_inner", None):
        return  # means 4 n_embd, as it is
    rewrite_config(folder, **{name: value})
    with small_memory(), pytest.raises(ValueError, match=rf"cannot be used: .*{name} ") as caught:
        GPT.from_pretrained(folder)
    assert one_sentence(caught)


@contextmanager
def small_memory():
    """Within, Python and NumPy may not take more than 20 MB at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_head", 5),
        ("n_head", 10**9),
        ("n_head", "3"),
        ("activation_function", "gleu"),
        ("activation_function", ["gelu"]),
        ("activation_function", "x" * 10**5),
        ("resid_pdrop", 1.0),
        ("resid_pdrop", True),
        ("layer_norm_epsilon", 10**400),
        ("layer_norm_epsilon", math.nan),
        ("initializer_range", "0.02"),
        ("eos_token_id", -1),
        ("bos_token_id", "a"),
        ("scale_attn_weights", False),
        ("model_type", ["gpt2"] * 10**4),
    ],
)
def test_other_values_that_make_no_network(folder, name, value):
    rewrite_config(folder, **{name: value})
    with pytest.raises(ValueError, match=rf"config\.json cannot be used: .*{name}") as caught:
        GPT.from_pretrained(folder)
    assert one_sentence(caught)


@pytest.mark.parametrize("inner", [None, 7])
def test_the_config_counts_what_the_model_has(inner):
    config = GPTConfig(vocab_size=11, n_positions=8, n_embd=12, n_layer=3, n_head=3, n_inner=inner)
    assert config.num_parameters() == sum(p.size for p in GPT(config).parameters())
    assert GPTConfig().num_parameters() == 124_439_808  # GPT-2's "124M"


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
