"""Layers of few bits: what replaces what, and how near the whole model stays."""

from __future__ import annotations

import numpy as np
import pytest

import tinygrad_llm as tg
from tinygrad_llm import Tensor, nn, ops
from tinygrad_llm.models.gpt import GPT, GPTConfig

SIZES = GPTConfig(vocab_size=61, n_positions=12, n_embd=64, n_layer=2, n_head=4)
LINEARS = 4 * SIZES.n_layer
IDS = np.random.default_rng(0).integers(0, 61, (2, 9))


def gpt() -> GPT:
    tg.manual_seed(0)
    return GPT(SIZES).eval()


def replaced(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.QuantizedLinear)]


def nbytes(model: nn.Module) -> int:
    return sum(t.data.nbytes for t in (*model.parameters(), *model.buffers()))


def logits(model: nn.Module) -> np.ndarray:
    with tg.no_grad():
        return model(IDS).numpy()


# --- one layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(8, None, True), (4, 16, False)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_its_rounded_linear(bits, group, symmetric, bias):
    linear = nn.Linear(37, 5, bias=bias)
    layer = nn.QuantizedLinear.from_linear(linear, bits, group, symmetric)
    assert layer.bias is linear.bias
    weight = layer.dequantize()
    error = abs(weight.numpy() - linear.weight.numpy()).max()
    assert 0 < error < (0.001 if bits == 8 else 0.02)
    x = Tensor(np.random.default_rng(0).normal(size=(2, 3, 37)), requires_grad=True)
    y = layer(x)
    np.testing.assert_allclose(
        y.numpy(), ops.linear(x, weight, linear.bias).numpy(), rtol=1e-5, atol=1e-5
    )
    y.sum().backward()
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy()[0, 0], weight.numpy().sum(0), rtol=1e-5, atol=1e-6)
    if linear.bias is not None:
        assert linear.bias.grad is not None
        assert linear.bias.grad.tolist() == [6.0] * 5


def test_a_new_layer_is_zero_until_it_is_loaded():
    made = nn.QuantizedLinear.from_linear(nn.Linear(37, 5), 4, 16, False)
    layer = nn.QuantizedLinear(37, 5, bits=4, group_size=16, symmetric=False)
    x = np.ones((2, 37), np.float32)
    assert not layer(x).numpy().any()
    layer.load_state_dict(made.state_dict())
    np.testing.assert_array_equal(layer(x).numpy(), made(x).numpy())
    assert sorted(made.state_dict()) == ["bias", "packed", "scales", "zeros"]
    assert sorted(nn.QuantizedLinear(4, 3, bias=False).state_dict()) == ["packed", "scales"]


def test_what_a_layer_says_of_itself():
    layer = nn.QuantizedLinear(64, 5, bias=False, bits=4, group_size=32, symmetric=False)
    assert repr(layer) == (
        "QuantizedLinear(in_features=64, out_features=5, bias=False, bits=4, group_size=32, "
        "symmetric=False)"
    )
    assert repr(nn.QuantizedLinear(4, 5)) == (
        "QuantizedLinear(in_features=4, out_features=5, bias=True, bits=8)"
    )


def test_a_dtype_reaches_the_scales_and_leaves_the_integers():
    layer = nn.QuantizedLinear.from_linear(nn.Linear(8, 3)).to(tg.float16)
    assert (layer.packed.dtype, layer.scales.dtype) == (np.int8, np.float16)
    assert layer(np.ones((2, 8), np.float16)).dtype == np.float16


# --- a model --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "near"),
    [(8, 64, True, 0.02), (4, 64, True, 0.35), (4, 16, True, 0.3), (4, 16, False, 0.3)],
)
def test_the_logits_of_a_gpt_stay_close(bits, group, symmetric, near):
    model = gpt()
    before = logits(model)
    assert nn.quantize_(model, bits, group, symmetric=symmetric) is model
    assert len(replaced(model)) == LINEARS
    error = np.linalg.norm(logits(model) - before) / np.linalg.norm(before)
    assert 0 < error < near
    if bits == 8:
        assert (logits(model).argmax(-1) == before.argmax(-1)).mean() > 0.9


def test_the_memory_that_it_saves():
    model = gpt()
    weights = sum(m.weight.size for m in model.modules() if type(m) is nn.Linear) - 61 * 64
    rows = sum(len(m.weight) for m in model.modules() if type(m) is nn.Linear) - 61
    whole = nbytes(model)
    assert whole - nbytes(nn.quantize_(gpt(), 8)) == 3 * weights - 4 * rows
    assert whole - nbytes(nn.quantize_(gpt(), 4, 64)) == 3.5 * weights - 4 * weights / 64


def test_a_tied_head_stays_as_it_is():
    model = nn.quantize_(gpt(), skip=())
    assert len(replaced(model)) == LINEARS
    assert model.lm_head.weight is model.transformer.wte.weight
    untied = nn.Sequential({"body": nn.Linear(4, 4), "lm_head": nn.Linear(4, 3)})
    assert replaced(nn.quantize_(untied)) == ["body"]
    assert replaced(nn.quantize_(untied, skip=())) == ["body", "lm_head"]


def test_names_that_are_skipped():
    model = nn.quantize_(gpt(), skip=("c_proj", "h.1"))
    assert replaced(model) == ["transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc"]
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert replaced(nn.quantize_(model, skip=("0",))) == ["1"]


def test_one_layer_in_two_places_stays_one():
    linear = nn.Linear(4, 4)
    model = nn.quantize_(nn.Sequential(linear, nn.ReLU(), linear))
    assert isinstance(model[0], nn.QuantizedLinear)
    assert model[0] is model[2]


def test_the_state_of_a_quantized_model_comes_back():
    model = nn.quantize_(gpt(), 4, 32, symmetric=False)
    state = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    assert state["transformer.h.0.attn.c_attn.packed"].dtype == np.uint8
    tg.manual_seed(1)
    other = nn.quantize_(GPT(SIZES).eval(), 4, 32, symmetric=False)
    assert abs(logits(other) - logits(model)).max() > 0.01
    other.load_state_dict(state)
    np.testing.assert_array_equal(logits(other), logits(model))


def test_a_model_folder_refuses_what_it_could_not_read_again(tmp_path):
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn\.packed are quantised: save the"):
        nn.quantize_(gpt()).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_what_is_left_can_be_trained():
    """As in QLoRA: gradients pass the frozen layers on their way to the others."""
    model = nn.quantize_(gpt(), 4, 32)
    model.loss(IDS[:, :-1], IDS[:, 1:]).backward()
    names = [name for name, p in model.named_parameters() if p.grad is not None]
    assert names == [name for name, _ in model.named_parameters()]
    assert not any("packed" in name for name in names)
    first = model.transformer.wte.weight.grad
    assert first is not None
    assert abs(first.numpy()).max() > 0


def test_hooks_stay_and_subclasses_are_left_alone():
    class Special(nn.Linear):
        pass

    seen = []
    model = nn.Sequential(nn.Linear(4, 4), Special(4, 4))
    model[0].register_forward_hook(lambda module, args, y: seen.append(type(module)))
    assert replaced(nn.quantize_(model)) == ["0"]
    model(np.ones((1, 4), np.float32))
    assert seen == [nn.QuantizedLinear]


def test_nothing_to_replace():
    with pytest.raises(ValueError, match=r"found no Linear in this Linear .*from_linear"):
        nn.quantize_(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="found no Linear in this Sequential"):
        nn.quantize_(nn.Sequential(nn.ReLU()))
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="8 and 4 bits, got 2"):
        nn.quantize_(model, bits=2)
    assert not replaced(model)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data[0, 0] = np.nan
    with pytest.raises(ValueError, match="finite weights"):
        nn.quantize_(model)
    assert not replaced(model)
