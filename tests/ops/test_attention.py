"""Attention over a prefix of keys, norms, the linear layer, all-to-all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.ops import attention as attention_lib
from longlive_jax.ops import linear, norm, ulysses

attention = attention_lib.attention


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def reference(q, k, v):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), v)


def test_attention_is_softmax_of_scaled_scores():
    q, k, v = draw(2, 5, 3, 8), draw(2, 9, 3, 8, seed=1), draw(2, 9, 3, 8, seed=2)
    np.testing.assert_allclose(attention(q, k, v), reference(q, k, v), atol=1e-6)


def test_keys_past_the_length_do_not_matter():
    q, k, v = draw(2, 5, 3, 8), draw(2, 9, 3, 8, seed=1), draw(2, 9, 3, 8, seed=2)
    lengths = jnp.asarray([4, 9], jnp.int32)
    out = attention(q, k.at[0, 4:].set(1e4), v.at[0, 4:].set(-1e4), lengths)
    np.testing.assert_allclose(out[0], reference(q[:1], k[:1, :4], v[:1, :4])[0], atol=1e-6)
    np.testing.assert_allclose(out[1], reference(q[1:], k[1:], v[1:])[0], atol=1e-6)


@pytest.mark.parametrize("limit", [1, 100, 333])
def test_queries_in_pieces_give_the_same(monkeypatch, limit):
    q, k, v = draw(1, 12, 2, 8), draw(1, 10, 2, 8, seed=1), draw(1, 10, 2, 8, seed=2)
    monkeypatch.setattr(attention_lib, "_LOGITS", limit)
    np.testing.assert_allclose(attention(q, k, v), reference(q, k, v), atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "keys", "by_cudnn"), [(6, 8, True), (5, 8, False), (6, 7, False)]
)
def test_odd_lengths_are_not_for_cudnn(monkeypatch, tokens, keys, by_cudnn):
    """A VAE's frame of 5 x 7 latents, trained on a GPU, ended with JAX's NotImplementedError."""
    seen = []
    monkeypatch.setattr(attention_lib.cudnn, "supports", lambda q: True)
    monkeypatch.setattr(attention_lib, "_cudnn", lambda q, k, v: seen.append(q.shape) or q)
    q, kv = draw(1, tokens, 2, 8), draw(1, keys, 2, 8, seed=1)
    out = attention(q, kv, kv)
    assert bool(seen) == by_cudnn
    if not by_cudnn:
        np.testing.assert_allclose(out, reference(q, kv, kv), atol=1e-6)


def test_bfloat16_softmax_is_float32():
    q, k, v = (draw(1, 64, 2, 16, seed=i, dtype=jnp.bfloat16) for i in range(3))
    exact = reference(q, k, v)
    out = np.asarray(attention(q, k, v), np.float64)
    assert np.linalg.norm(out - exact) / np.linalg.norm(exact) < 5e-3


def test_norms():
    x = draw(2, 3, 7) * 3 + 1
    y = np.asarray(x, np.float64)
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    scale, shift = draw(2, 1, 7, seed=1), draw(2, 1, 7, seed=2)
    np.testing.assert_allclose(norm.layer_norm(x, scale, shift), y * scale + shift, atol=1e-5)
    weight = draw(7, seed=3)
    expected = np.asarray(x) / np.sqrt(
        (np.asarray(x, np.float64) ** 2).mean(-1, keepdims=True) + 1e-6
    )
    np.testing.assert_allclose(norm.rms_norm(x, weight), expected * np.asarray(weight), atol=1e-5)
    assert norm.rms_norm(x.astype(jnp.bfloat16), weight).dtype == jnp.bfloat16


def test_linear_computes_in_the_inputs_dtype():
    p = {"weight": draw(4, 6), "bias": draw(6, seed=1)}
    x = draw(2, 3, 4, seed=2)
    np.testing.assert_allclose(
        linear.linear(p, x), x @ p["weight"] + p["bias"][None, None], atol=1e-6
    )
    assert linear.linear(p, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_all_to_all_gives_every_token_of_some_heads_and_back():
    mesh = mesh_lib.make_mesh(config_lib.Mesh(seq=4))
    x = draw(2, 8, 4, 3)
    spec = jax.P(None, "seq")

    def through(x):
        heads = ulysses.to_heads(x, "seq", token_axis=1)
        assert heads.shape == (2, 8, 1, 3)
        rank = jax.lax.axis_index("seq").astype(jnp.float32)
        return heads + rank, ulysses.to_tokens(heads, "seq", token_axis=1)

    run = jax.shard_map(
        through, mesh=mesh, in_specs=spec, out_specs=(jax.P(None, None, "seq"), spec)
    )
    heads, back = run(jax.device_put(x, jax.NamedSharding(mesh, spec)))
    np.testing.assert_array_equal(back, x)
    np.testing.assert_allclose(heads, x + np.arange(4, dtype=np.float32)[None, None, :, None])
    np.testing.assert_array_equal(ulysses.to_heads(x, None, token_axis=1), x)
