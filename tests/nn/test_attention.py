"""MultiHeadAttention against the definition, written with loops over batch and heads."""

import numpy as np
import pytest

from tinygrad_llm import Tensor, backend
from tinygrad_llm.nn import MultiHeadAttention

B, T, S, C, H = 2, 4, 5, 12, 3
rng = np.random.default_rng(2)


def inputs(t=T):
    return rng.standard_normal((B, t, C))


def layer(**options):
    attention = MultiHeadAttention(C, H, **options).to("float64")
    for p in attention.parameters():
        p.detach().copy_(rng.standard_normal(p.shape) * 0.3)
    return attention


def project(linear, x):
    y = x @ linear.weight.numpy().T
    return y if linear.bias is None else y + linear.bias.numpy()


def reference(attention, x, z, visible):
    """visible: (B, T, S)"""
    d = C // H
    q, k, v = (
        project(p, a)
        for p, a in ((attention.q_proj, x), (attention.k_proj, z), (attention.v_proj, z))
    )
    group = H // attention.kv_heads
    out = np.zeros_like(x)
    for b in range(len(x)):
        for h in range(H):
            mine, shared = slice(h * d, (h + 1) * d), slice(h // group * d, (h // group + 1) * d)
            scores = q[b][:, mine] @ k[b][:, shared].T / np.sqrt(d)
            e = np.where(visible[b], np.exp(scores), 0.0)
            out[b][:, mine] = e / e.sum(axis=1, keepdims=True) @ v[b][:, shared]
    return project(attention.out_proj, out)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kv_heads", [None, 1, 3])
def test_self_attention(kv_heads, bias):
    attention, x = layer(kv_heads=kv_heads, bias=bias), inputs()
    everything = np.ones((B, T, T), dtype=bool)
    expected = reference(attention, x, x, everything)
    np.testing.assert_allclose(attention(x).numpy(), expected, rtol=1e-10, atol=1e-12)
    causal = everything & np.tri(T, dtype=bool)
    np.testing.assert_allclose(
        attention(x, is_causal=True).numpy(), reference(attention, x, x, causal), rtol=1e-10
    )


def test_cross_attention_with_masks_and_lengths():
    attention, x, z = layer(), inputs(), inputs(S)
    lengths = np.array([5, 2])
    visible = np.broadcast_to(np.arange(S) < lengths[:, None, None], (B, T, S))
    expected = reference(attention, x, z, visible)
    np.testing.assert_allclose(attention(x, z, lengths=lengths).numpy(), expected, rtol=1e-10)
    mask = visible[:, None]  # (B, 1, T, S)
    np.testing.assert_allclose(attention(x, z, attn_mask=mask).numpy(), expected, rtol=1e-10)
    bias = np.where(mask, 0.0, -np.inf)
    np.testing.assert_allclose(attention(x, z, z, attn_mask=bias).numpy(), expected, rtol=1e-10)


def test_key_and_value_may_differ():
    attention, x, z = layer(), inputs(), inputs(S)
    twice = attention(x, z, 2 * z).numpy()
    assert attention.out_proj.bias is not None
    assert attention.v_proj.bias is not None
    out_bias, v_bias = attention.out_proj.bias.numpy(), attention.v_proj.bias.numpy()
    constant = v_bias @ attention.out_proj.weight.numpy().T + out_bias
    np.testing.assert_allclose(twice - constant, 2 * (attention(x, z).numpy() - constant), 1e-9)


def test_one_sequence_without_a_batch():
    attention, x = layer(), inputs()
    np.testing.assert_allclose(attention(x[0]).numpy(), attention(x).numpy()[0], rtol=1e-10)


def test_dropout_only_in_training():
    backend.manual_seed(0)
    attention, x = layer(dropout=0.5), inputs()
    assert (attention(x).numpy() != attention(x).numpy()).any()
    attention.eval()
    assert attention(x).tolist() == attention(x).tolist()


def test_first_values():
    backend.manual_seed(0)
    attention = MultiHeadAttention(48, 4)
    bound = np.sqrt(6 / 96)
    for name, p in attention.named_parameters():
        if name.endswith("bias"):
            assert not p.numpy().any()
        else:
            limit = 1 / np.sqrt(48) if name.startswith("out") else bound
            assert 0.9 * limit < np.abs(p.numpy()).max() <= limit


def test_every_projection_gets_a_gradient():
    attention = MultiHeadAttention(C, H, kv_heads=1)
    attention(Tensor(inputs(), dtype="float32")).sum().backward()
    assert all(p.grad is not None for p in attention.parameters())


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads, got 12 and 5"):
        MultiHeadAttention(12, 5)
    with pytest.raises(ValueError, match="kv_heads must divide num_heads, got 2 and 3"):
        MultiHeadAttention(12, 3, kv_heads=2)
    with pytest.raises(ValueError, match="dropout must be at least 0 and below 1"):
        MultiHeadAttention(12, 3, dropout=1.5)
