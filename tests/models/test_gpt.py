"""GPT against a plain NumPy GPT-2 that shares no code with it, and its gradients and training."""

import copy
import math
import tracemalloc
import weakref
from dataclasses import asdict

import numpy as np
import pytest

from tinygrad_llm import Tensor, backend, no_grad, ops
from tinygrad_llm.models.gpt import GPT, GPTConfig, KVCache
from tinygrad_llm.nn import Linear
from tinygrad_llm.optim import AdamW

CONFIG = GPTConfig(vocab_size=11, n_positions=8, n_embd=12, n_layer=2, n_head=3)


def make(config=CONFIG, seed=0, dtype="float64", spread=0.3):
    """A GPT whose every parameter is random, biases and gains too."""
    model = GPT(config).to(dtype)
    rng = np.random.default_rng(seed)
    with no_grad():
        for p in model.parameters():
            p.copy_(p.numpy() + spread * rng.standard_normal(p.shape))
    return model


def tokens(b, t, seed=1, config=CONFIG):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (b, t))


# --- the forward pass -----------------------------------------------------------------------------


def reference(state, ids, n_head, eps=1e-5):
    """GPT-2 as its paper's code computes it, one text at a time: logits (B, T, V)."""
    w = {name.removeprefix("transformer."): tensor.numpy() for name, tensor in state.items()}

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attend(i, x):
        q, k, v = np.split(linear(f"h.{i}.attn.c_attn", x), 3, axis=1)
        heads = []
        for qh, kh, vh in zip(*(np.split(a, n_head, axis=1) for a in (q, k, v)), strict=True):
            e = np.exp(qh @ kh.T / math.sqrt(qh.shape[1])) * np.tri(len(x))
            heads.append(e / e.sum(1, keepdims=True) @ vh)
        return linear(f"h.{i}.attn.c_proj", np.concatenate(heads, axis=1))

    def mlp(i, x):
        a = linear(f"h.{i}.mlp.c_fc", x)
        a = 0.5 * a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
        return linear(f"h.{i}.mlp.c_proj", a)

    out = []
    for row in ids:
        x = w["wte.weight"][row] + w["wpe.weight"][: len(row)]
        for i in range(sum(name.endswith("ln_1.bias") for name in w)):
            x = x + attend(i, norm(f"h.{i}.ln_1", x))
            x = x + mlp(i, norm(f"h.{i}.ln_2", x))
        out.append(norm("ln_f", x) @ w["wte.weight"].T)
    return np.stack(out)


@pytest.mark.parametrize("t", [1, 5, 8])
def test_logits_are_gpt2s(t):
    model, ids = make(), tokens(3, t)
    logits = model(ids)
    assert logits.shape == (3, t, 11)
    expected = reference(model.state_dict(), ids, 3)
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-10, atol=1e-11)


def test_float32_is_close_to_float64():
    model, ids = make(), tokens(2, 8)
    exact = model(ids).numpy()
    single = copy.deepcopy(model).to("float32")(ids)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single.numpy(), exact, rtol=1e-4, atol=1e-4)


def test_other_options_reach_the_network():
    config = GPTConfig(
        vocab_size=11,
        n_positions=8,
        n_embd=12,
        n_layer=1,
        n_head=2,
        n_inner=7,
        activation_function="relu",
        layer_norm_epsilon=0.5,
    )
    model = make(config)
    block = model.transformer.h[0]
    assert block.mlp.c_fc.weight.shape == (7, 12)
    assert block.ln_1.eps == block.ln_2.eps == model.transformer.ln_f.eps == 0.5
    x = Tensor(np.random.default_rng(0).standard_normal((2, 12)))
    hidden = np.maximum(block.mlp.c_fc(x).numpy(), 0)
    np.testing.assert_allclose(block.mlp(x).numpy(), block.mlp.c_proj(hidden).numpy())


def test_the_future_is_not_seen():
    model, ids = make(), tokens(1, 8)
    changed = ids.copy()
    changed[0, 5] = (ids[0, 5] + 1) % 11
    before, after = model(ids).numpy(), model(changed).numpy()
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(axis=2).all()


def test_ids_may_be_a_tensor_an_array_or_a_list():
    model, ids = make(), tokens(1, 4)
    same = [model(kind).tolist() for kind in (ids, Tensor(ids), ids.tolist(), ids.astype("uint16"))]
    assert all(y == same[0] for y in same)


def test_what_is_no_input_is_refused_in_a_sentence():
    model = make()
    with pytest.raises(ValueError, match=r"the input has 9 tokens, but this GPT sees at most .* 8"):
        model(tokens(1, 9))
    with pytest.raises(ValueError, match=r"input_ids of shape \(B, T\), got \(4,\)"):
        model(tokens(1, 4)[0])
    with pytest.raises(IndexError, match="id 11 is outside"):
        model([[11]])
    with pytest.raises(ValueError, match=r"targets must have the shape .*\(1, 4\), got \(1, 3\)"):
        model.loss(tokens(1, 4), tokens(1, 3))


def test_no_tokens_give_no_logits():
    assert make()(np.zeros((2, 0), dtype=np.int64)).shape == (2, 0, 11)


# --- the loss -------------------------------------------------------------------------------------


def test_loss_is_the_cross_entropy_of_the_logits():
    model, ids, targets = make(), tokens(2, 6), tokens(2, 6, seed=2)
    logits = model(ids)
    log_p = logits.numpy() - np.log(np.exp(logits.numpy()).sum(-1, keepdims=True))
    picked = -np.take_along_axis(log_p, targets[..., None], axis=-1)
    np.testing.assert_allclose(model.loss(ids, targets).item(), picked.mean(), rtol=1e-12)
    targets[0, :4] = -100
    targets[1, 2] = -100
    picked = picked[targets != -100]
    np.testing.assert_allclose(model.loss(ids, targets).item(), picked.mean(), rtol=1e-12)


def test_ignored_targets_need_no_logits_and_change_no_gradient():
    model, ids, targets = make(), tokens(2, 6), tokens(2, 6, seed=2)
    targets[0, 3:] = -100
    ops.cross_entropy(model(ids), targets).backward()
    expected = [p.grad.numpy() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    rows = []
    model.lm_head.register_forward_hook(lambda module, args, y: rows.append(y.shape))
    model.loss(ids, targets).backward()
    assert rows == [(9, 11)]
    for p, g in zip(model.parameters(), expected, strict=True):
        assert p.grad is not None
        np.testing.assert_allclose(p.grad.numpy(), g, rtol=1e-9, atol=1e-12)


def test_nothing_to_learn_from_is_a_loss_of_zero():
    model, ids = make(), tokens(2, 6)
    loss = model.loss(ids, np.full((2, 6), -100))
    assert loss.item() == 0.0
    loss.backward()
    assert all(p.grad is None or not p.grad.numpy().any() for p in model.parameters())


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_gradient_along_a_random_direction(seed):
    """∂L/∂θ · v against (L(θ + εv) − L(θ − εv)) / 2ε, θ being all parameters at once."""
    model, ids, targets = make(seed=seed), tokens(2, 6), tokens(2, 6, seed=2)
    model.loss(ids, targets).backward()
    rng = np.random.default_rng(seed)
    directions = [rng.standard_normal(p.shape) for p in model.parameters()]
    slope = 0.0
    for p, v in zip(model.parameters(), directions, strict=True):
        assert p.grad is not None
        slope += float((p.grad.numpy() * v).sum())

    def loss_at(step):
        moved = copy.deepcopy(model)
        with no_grad():
            for p, v in zip(moved.parameters(), directions, strict=True):
                p.copy_(p.numpy() + step * v)
            return moved.loss(ids, targets).item()

    eps = 1e-5
    numeric = (loss_at(eps) - loss_at(-eps)) / (2 * eps)
    assert abs(slope - numeric) < 1e-7 * max(1.0, abs(slope))


@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.1.attn.c_attn.bias"])
def test_gradient_element_by_element(name):
    model, ids, targets = make(), tokens(1, 5), tokens(1, 5, seed=2)
    model.loss(ids, targets).backward()
    p = dict(model.named_parameters())[name]
    assert p.grad is not None
    eps = 1e-5
    for i in np.ndindex(p.shape):
        if sum(i) % 3:
            continue
        kept = p.data[i]
        with no_grad():
            p[i] = kept + eps
            above = model.loss(ids, targets).item()
            p[i] = kept - eps
            below = model.loss(ids, targets).item()
            p[i] = kept
        assert p.grad.numpy()[i] == pytest.approx((above - below) / (2 * eps), abs=1e-8)


def test_a_step_in_float32_stays_in_float32():
    model = make(dtype="float32")
    loss = model.loss(tokens(2, 6), tokens(2, 6, seed=2))
    assert loss.dtype == np.float32
    loss.backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {np.dtype("float32")}
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_the_graph_of_a_step_is_freed_with_its_loss():
    model = make()
    loss = model.loss(tokens(1, 4), tokens(1, 4))
    node = weakref.ref(loss)
    loss.backward()
    del loss
    assert node() is None


# --- gradient checkpointing -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_checkpointing_changes_no_bit_of_loss_and_gradients(dtype):
    """Dropout in every place, so that the second run of a block must draw the same masks."""
    drop = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
    model = make(GPTConfig(**{**asdict(CONFIG), "n_layer": 3, **drop}), dtype=dtype)
    ids, targets = tokens(2, 6), tokens(2, 6, seed=2)

    def step():
        backend.manual_seed(3)
        model.zero_grad()
        loss = model.loss(ids, targets)
        loss.backward()
        grads = [p.grad.numpy().copy() for p in model.parameters() if p.grad is not None]
        return loss.item(), backend.random.state(), grads

    runs = []
    model.transformer.h[1].register_forward_hook(lambda module, args, y: runs.append(1))
    loss, random, grads = step()
    assert len(runs) == 1
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    again_loss, again_random, again_grads = step()
    assert len(runs) == 3  # once more in the backward pass
    assert (again_loss, again_random) == (loss, random)
    for ours, theirs in zip(again_grads, grads, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    model.gradient_checkpointing_disable()
    step()
    assert len(runs) == 4


def test_checkpointing_needs_less_memory():
    model = GPT(GPTConfig(vocab_size=11, n_positions=32, n_embd=16, n_layer=8, n_head=2))
    ids = np.random.default_rng(0).integers(0, 11, (32, 32))

    def peak():
        model.zero_grad()
        tracemalloc.start()
        try:
            model.loss(ids, ids).backward()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak()  # what is made once
    kept = peak()
    model.gradient_checkpointing_enable()
    assert peak() < 0.4 * kept


def test_checkpointing_leaves_generation_alone():
    model, ids = make(), tokens(2, 6)
    with no_grad():
        expected = model(ids).numpy()
        model.gradient_checkpointing_enable()
        cache = KVCache(model.config)
        parts = [model(part, cache).numpy() for part in np.split(ids, [3], axis=1)]
        np.testing.assert_array_equal(model(ids).numpy(), expected)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, rtol=1e-12, atol=1e-12)


def test_flops_are_those_of_the_matrix_products():
    """Counted at the Linear layers as they run, and for attention by its definition."""
    model, t = make(), 8
    counted = []

    def count(module, args, y):
        counted.append(2 * module.weight.size * args[0].size // module.weight.shape[1])

    linears = [m for m in model.modules() if isinstance(m, Linear)]
    for linear in linears:
        linear.register_forward_hook(count)
    model(tokens(1, t))
    assert len(counted) == 2 * 4 + 1
    attention = 2 * 2 * 2 * t * t * CONFIG.n_embd  # two layers, two products, 2 T² C
    assert model.flops_per_token(t) * t == 3 * (sum(counted) + attention)


# --- training -------------------------------------------------------------------------------------


def test_one_batch_is_learnt_by_heart():
    backend.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, n_positions=8, n_embd=24, n_layer=2, n_head=2))
    text = tokens(4, 9)
    text[:, 0] = np.arange(4)  # four texts that can be told apart from the first token on
    optimizer = AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    first = model.loss(text[:, :-1], text[:, 1:]).item()
    assert abs(first - math.log(11)) < 0.1  # it begins knowing nothing
    for _ in range(80):
        optimizer.zero_grad()
        model.loss(text[:, :-1], text[:, 1:]).backward()
        optimizer.step()
    assert model.loss(text[:, :-1], text[:, 1:]).item() < 0.05
    with no_grad():
        assert model(text[:, :-1]).numpy().argmax(-1).tolist() == text[:, 1:].tolist()


def test_dropout_is_where_the_config_puts_it_and_only_in_training():
    ids = tokens(2, 6)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        backend.manual_seed(0)
        model = make(GPTConfig(**{**asdict(CONFIG), name: 0.5}))
        assert (model(ids).numpy() != model(ids).numpy()).any(), name
        model.eval()
        expected = reference(model.state_dict(), ids, 3)
        np.testing.assert_allclose(model(ids).numpy(), expected, rtol=1e-9, atol=1e-10)


# --- first values, names, config ------------------------------------------------------------------


def test_first_values_are_gpt2s():
    backend.manual_seed(5)
    model = GPT(GPTConfig(vocab_size=300, n_positions=64, n_embd=64, n_layer=8, n_head=2))
    for name, p in model.named_parameters():
        x = p.numpy()
        if name.endswith("bias"):
            assert not x.any()
        elif ".ln_" in name:
            assert (x == 1).all()
        else:
            std = 0.02 / 4 if "c_proj" in name else 0.02  # √(2 · 8) = 4
            assert abs(x.std() / std - 1) < 0.06, name
            assert abs(x.mean()) < 0.1 * std, name


def test_each_weight_is_drawn_once():
    backend.manual_seed(7)
    model = GPT(CONFIG)
    used = backend.random.state()
    backend.manual_seed(7)
    expected = 0.02 * backend.random.normal((11, 12))
    np.testing.assert_allclose(model.transformer.wte.weight.numpy(), expected, rtol=1e-6)
    matrices = [p.size for p in model.parameters() if p.ndim == 2]
    assert used["offset"] == sum(-(-n // 4) for n in matrices)


def test_names_are_hugging_faces():
    names = ["transformer.wte.weight", "transformer.wpe.weight"]
    for i in range(2):
        for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            names += [f"transformer.h.{i}.{part}.weight", f"transformer.h.{i}.{part}.bias"]
    names += ["transformer.ln_f.weight", "transformer.ln_f.bias"]
    model = GPT(CONFIG)
    assert [name for name, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == [*names, "lm_head.weight"]
    assert model.lm_head.weight is model.transformer.wte.weight


def test_gpt2_small_has_its_124_million_parameters():
    from tinygrad_llm.nn import init

    with init.placeholders():
        assert GPT(GPTConfig()).num_parameters() == 124_439_808


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_embd": 10, "n_head": 3}, "n_embd must be a multiple of n_head, got 10 and 3"),
        ({"n_layer": 0}, "n_layer must be an integer of at least 1, got 0"),
        ({"vocab_size": -1}, "vocab_size must be an integer"),
        ({"n_positions": 8.0}, r"n_positions must be an integer of at least 1, got 8\.0"),
        ({"n_embd": True}, "n_embd must be an integer"),
        ({"n_head": "3"}, "n_head must be an integer of at least 1, got '3'"),
        ({"n_inner": 0}, "n_inner must be an integer"),
        ({"activation_function": "mish"}, r"activation_function must be one of .* got 'mish'"),
        ({"resid_pdrop": 1.0}, "resid_pdrop must be a number from 0 to below 1"),
        ({"attn_pdrop": "no"}, "attn_pdrop must be a number"),
        ({"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon must be a number"),
        ({"initializer_range": float("nan")}, "initializer_range must be a number"),
    ],
)
def test_a_config_that_makes_no_network_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**wrong)


def test_from_dict_takes_what_it_knows_and_refuses_another_network():
    given = {**CONFIG.to_dict(), "task_specific_params": {}, "n_ctx": 8, "use_cache": True}
    assert GPTConfig.from_dict(given) == CONFIG
    assert GPTConfig.from_dict({}) == GPTConfig()
    for wrong in (
        {"model_type": "bert"},
        {"tie_word_embeddings": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"add_cross_attention": True},
        {"scale_attn_weights": False},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            GPTConfig.from_dict({**given, **wrong})


# --- the cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-5), ("float64", 1e-12)])
@pytest.mark.parametrize("cuts", [[], [1, 2, 3, 4, 5, 6, 7], [5], [1, 6]])
def test_a_text_in_parts_with_a_cache_has_the_logits_of_the_whole(dtype, near, cuts):
    model, ids = make(spread=0.1).to(dtype), tokens(3, 8)
    cache = KVCache(model.config)
    with no_grad():
        expected = model(ids).numpy()
        parts = [model(part, cache).numpy() for part in np.split(ids, cuts, axis=1)]
    assert np.concatenate(parts, axis=1).dtype == dtype
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, rtol=near, atol=near)
    assert cache.length == 8
    cache.clear()
    with no_grad():
        np.testing.assert_allclose(model(ids, cache).numpy(), expected, rtol=near, atol=near)


def test_next_logits_are_forwards_last():
    model, ids = make(), tokens(2, 6)
    cache = KVCache(model.config)
    with no_grad():
        expected = model(ids).numpy()[:, -1]
        np.testing.assert_allclose(model.next_logits(ids).numpy(), expected, rtol=1e-12)
        model.next_logits(ids[:, :4], cache)
        np.testing.assert_allclose(
            model.next_logits(ids[:, 4:], cache).numpy(), expected, rtol=1e-10, atol=1e-12
        )


def test_a_cache_goes_on_with_the_rows_selected():
    model, ids, rows = make(), tokens(3, 8), [2, 0, 0, 1]
    cache = KVCache(model.config)
    with no_grad():
        expected = model(ids[rows]).numpy()
        model(ids[:, :3], cache)
        cache.select(rows)
        middle = model(ids[rows, 3:5], cache).numpy()
        cache.select([0, 1, 2, 3])
        cache.select([3, 1])
        end = model(ids[[1, 0], 5:], cache).numpy()
    np.testing.assert_allclose(middle, expected[:, 3:5], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(end, expected[[3, 1], 5:], rtol=1e-10, atol=1e-12)


def test_a_cache_refuses_what_it_cannot_hold():
    model, cache = make(), KVCache(CONFIG)
    with pytest.raises(ValueError, match=r"within no_grad\(\)"):
        model(tokens(1, 3), cache)
    assert cache.length == 0
    with no_grad():
        model(tokens(2, 5), cache)
        with pytest.raises(ValueError, match="holds 2 texts, got input_ids of 1"):
            model(tokens(1, 1), cache)
        with pytest.raises(ValueError, match="the input has 9 tokens, but this GPT sees at most"):
            model(tokens(2, 4), cache)
        assert cache.length == 5
        model(tokens(2, 3), cache)
