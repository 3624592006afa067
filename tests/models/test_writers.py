"""What writes text computes what `transformers` computes: GPT-2, Llama, T5, and their texts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from tinygrad_llm.generate import GenerationConfig, beam_search, generate
from tinygrad_llm.models.encoder_decoder import EncoderDecoder, shift_right
from tinygrad_llm.models.gpt import GPT
from tinygrad_llm.models.llama import Llama
from tinygrad_llm.models.t5 import T5

GOLDEN = Path(__file__).parent / "golden"
CASES: dict[str, Any] = {
    "gpt2": GPT,
    "llama": Llama,
    "llama_tied": Llama,
    "t5": T5,
    "t5_gated": T5,
}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def golden(name: str) -> tuple[dict[str, str], dict[str, Any]]:
    """The metadata, and the arrays by name, those of weights, inputs … in dicts of their own."""
    found: dict[str, Any] = {}
    with safe_open(GOLDEN / f"{name}.safetensors", framework="np") as file:
        for key in list(file.keys()):
            kind, _, inner = key.partition("/")
            array = file.get_tensor(key)
            if inner:
                found.setdefault(kind, {})[inner] = array
            else:
                found[kind] = array
        return file.metadata(), found


def opened(name: str, folder: Path) -> tuple[Any, dict[str, Any], int]:
    """The model from a folder made of what is stored, the arrays, and the token that ends texts."""
    metadata, stored = golden(name)
    (folder / "config.json").write_text(metadata["config"])
    save_file(stored["weights"], folder / "model.safetensors")
    return CASES[name].from_pretrained(folder), stored, int(metadata["eos"])


def logits_and_loss(model: Any, inputs: dict[str, np.ndarray]) -> tuple[Any, Any]:
    ids, mask, labels = (inputs[key] for key in ("input_ids", "attention_mask", "labels"))
    if isinstance(model, EncoderDecoder):
        return model(ids, shift_right(labels, 0, 0), mask), model.loss(ids, labels, mask)
    following = np.concatenate([labels[:, 1:], np.full((len(ids), 1), -100)], axis=1)
    if isinstance(model, Llama):
        return model(ids, attention_mask=mask), model.loss(ids, following, attention_mask=mask)
    return model(ids), model.loss(ids, following)  # what comes later changes nothing before


def check_gradients(model: Any, expected: dict[str, np.ndarray]) -> None:
    """Within 1e-4 of each one's norm; some are 0, such as that of a bias of all keys."""
    found = {name: p.grad.numpy() for name, p in model.named_parameters()}
    if isinstance(model, GPT):  # which keeps matrices as (out, in)
        found = {n: g.T if n.endswith(TRANSPOSED) else g for n, g in found.items()}
    assert found.keys() == expected.keys()
    noise = 1e-6 * max(np.linalg.norm(g) for g in expected.values())
    for name, g in expected.items():
        assert np.linalg.norm(found[name] - g) <= 1e-4 * np.linalg.norm(g) + noise, name


@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_gradients_are_those_stored(name, tmp_path):
    model, stored, _ = opened(name, tmp_path)
    assert model.num_parameters() == model.config.num_parameters()
    real = stored["inputs"]["attention_mask"] == 1
    logits, loss = logits_and_loss(model, stored["inputs"])
    found, expected = logits.numpy(), stored["logits"]
    if not isinstance(model, EncoderDecoder):
        found, expected = found[real], expected[real]
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(loss.numpy(), stored["loss"], rtol=1e-5)
    loss.backward()
    check_gradients(model, stored["gradients"])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_texts_are_those_stored(name, use_cache, tmp_path):
    model, stored, eos = opened(name, tmp_path)
    source = stored["inputs"]["input_ids"][0].tolist()
    greedy = list(generate(model, source, 8, temperature=0, eos_id=eos, use_cache=use_cache))
    assert greedy == stored["greedy"].tolist()
    assert greedy[-1] == eos
    for early, kind in ((False, "beams"), (True, "early")):
        config = GenerationConfig(
            8,
            num_beams=3,
            num_return_sequences=3,
            early_stopping=early,
            use_cache=use_cache,
        )
        beams = beam_search(model, source, config, eos_id=eos)
        assert [beam.ids for beam in beams] == [stored[kind][str(i)].tolist() for i in range(3)]
        scores = [beam.score for beam in beams]
        np.testing.assert_allclose(scores, stored[f"{kind}_scores"], rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_parity_with_transformers_both_ways(name, tmp_path):
    torch: Any = pytest.importorskip("torch")
    transformers: Any = pytest.importorskip("transformers")
    metadata, stored = golden(name)
    config = getattr(transformers, metadata["config_class"]).from_dict(
        json.loads(metadata["config"])
    )
    torch.manual_seed(2)
    kind = getattr(transformers, metadata["class"])
    theirs = kind(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = CASES[name].from_pretrained(tmp_path / "theirs")
    output = theirs(**{key: torch.from_numpy(v) for key, v in stored["inputs"].items()})
    output.loss.backward()
    logits, loss = logits_and_loss(ours, stored["inputs"])
    real = stored["inputs"]["attention_mask"] == 1
    found, expected = logits.numpy(), output.logits.detach().numpy()
    if not isinstance(ours, EncoderDecoder):
        found, expected = found[real], expected[real]
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=1e-5 * max(1.0, np.abs(expected).max())
    )
    np.testing.assert_allclose(loss.numpy(), output.loss.item(), rtol=1e-5)
    loss.backward()
    check_gradients(ours, {n: p.grad.numpy() for n, p in theirs.named_parameters()})

    source = stored["inputs"]["input_ids"][:1]
    begin = 1 if isinstance(ours, EncoderDecoder) else source.shape[1]
    ids = torch.from_numpy(source)
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )[0].tolist()[begin:]
    end = theirs.config.eos_token_id
    found = list(generate(ours, source[0].tolist(), 12, temperature=0, eos_id=end))
    assert found == expected

    ours.save_pretrained(tmp_path / "ours")
    again, info = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    output_again = again.eval()(**{k: torch.from_numpy(v) for k, v in stored["inputs"].items()})
    np.testing.assert_array_equal(output_again.logits.detach(), output.logits.detach())
