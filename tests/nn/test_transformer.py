"""TransformerBlock: the order of its steps, pre-norm and post-norm, with and without a memory."""

import numpy as np
import pytest

from tinygrad_llm import Tensor, nn, ops

B, T, S, C = 2, 3, 4, 8
rng = np.random.default_rng(3)
X, MEMORY = rng.standard_normal((B, T, C)), rng.standard_normal((B, S, C))


def block(**options):
    made = nn.TransformerBlock(C, 2, dim_feedforward=16, dropout=0.0, **options).to("float64")
    for p in made.parameters():
        p.detach().copy_(rng.standard_normal(p.shape) * 0.3)
    return made


def close(a, b):
    np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-10, atol=1e-12)


def test_mlp_is_two_layers_with_an_activation_between():
    mlp = nn.MLP(3, 5, activation="relu").to("float64")
    x = Tensor(rng.standard_normal((4, 3)))
    close(mlp(x), mlp.linear2(ops.relu(mlp.linear1(x))))
    assert nn.MLP(3).linear1.out_features == 12
    with pytest.raises(ValueError, match="an activation is one of"):
        nn.MLP(3, activation="none")


def test_pre_norm():
    f = block()
    x = Tensor(X)
    y = x + f.self_attn(f.self_attn_norm(x), is_causal=True)
    close(f(x, is_causal=True), y + f.mlp(f.mlp_norm(y)))


def test_post_norm():
    f = block(norm_first=False)
    x = Tensor(X)
    y = f.self_attn_norm(x + f.self_attn(x, lengths=[3, 2]))
    close(f(x, lengths=[3, 2]), f.mlp_norm(y + f.mlp(y)))


@pytest.mark.parametrize("norm_first", [True, False])
def test_cross_attention_reads_the_memory(norm_first):
    f = block(cross_attention=True, norm_first=norm_first)
    assert f.cross_attn is not None
    assert f.cross_attn_norm is not None
    x, memory, lengths = Tensor(X), Tensor(MEMORY), [4, 1]
    if norm_first:
        y = x + f.self_attn(f.self_attn_norm(x))
        y = y + f.cross_attn(f.cross_attn_norm(y), memory, lengths=lengths)
        y = y + f.mlp(f.mlp_norm(y))
    else:
        y = f.self_attn_norm(x + f.self_attn(x))
        y = f.cross_attn_norm(y + f.cross_attn(y, memory, lengths=lengths))
        y = f.mlp_norm(y + f.mlp(y))
    close(f(x, memory, memory_lengths=lengths), y)
    f(x, memory).sum().backward()
    assert all(p.grad is not None for p in f.parameters())


def test_a_memory_where_there_is_none_and_none_where_one_is_needed():
    with pytest.raises(ValueError, match="has no cross-attention for a memory"):
        block()(X, MEMORY)
    with pytest.raises(ValueError, match="needs a memory"):
        block(cross_attention=True)(X)


def test_dropout_acts_in_training_only():
    f = nn.TransformerBlock(C, 2, dropout=0.5).to("float64")
    assert (f(X).numpy() != f(X).numpy()).any()
    assert f.eval()(X).tolist() == f(X).tolist()


def test_options_reach_the_parts():
    f = nn.TransformerBlock(C, 4, bias=False, kv_heads=2, layer_norm_eps=1e-3, activation="silu")
    assert not [name for name, _ in f.named_parameters() if name.endswith("bias")]
    assert f.self_attn.kv_heads == 2
    assert f.mlp_norm.eps == 1e-3
    assert isinstance(f.mlp.activation, nn.SiLU)
    assert f.mlp.linear1.out_features == 4 * C
