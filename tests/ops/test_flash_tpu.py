"""JAX's flash attention for TPUs, interpreted, against plain attention."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from longlive_jax.ops import attention, dense_attention, flash_tpu

# Lengths that the kernel's blocks divide, and lengths that they do not.
SIZES = [(128, 256, 16), (100, 77, 64)]


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture(params=SIZES, ids=str)
def qkv(request):
    tokens, keys, head_dim = request.param
    return (
        drawn(2, tokens, 2, head_dim),
        drawn(2, keys, 2, head_dim, seed=1),
        drawn(2, keys, 2, head_dim, seed=2),
    )


@pytest.fixture
def interpreted(monkeypatch):
    """Not by `force_tpu_interpret_mode`, whose threads wait for each other on two cores."""
    call = functools.partial(pl.pallas_call, interpret=True)
    monkeypatch.setattr(pl, "pallas_call", call)


def near(found, expected):
    for x, y in zip(found, expected):
        assert x.shape == y.shape and x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6)


def test_out_and_lse(qkv, interpreted):
    found = flash_tpu.forward(*qkv)
    near(found, dense_attention.forward(*qkv, backend="xla"))


def test_gradients_of_a_piece_of_a_larger_softmax(qkv, interpreted):
    out, lse = dense_attention.forward(*qkv, backend="xla")
    whole = (out, lse + 0.5, drawn(*out.shape, seed=3))  # as if other keys had a share of it
    found = flash_tpu.backward(*qkv, *whole)
    near(found, dense_attention.backward(*qkv, *whole, backend="xla"))


def test_a_prefix_of_the_keys(qkv, interpreted):
    keys = qkv[1].shape[1]
    length = jnp.array([keys, keys // 3], jnp.int32)
    found = flash_tpu.attention(*qkv, length)
    near([found], [attention.attention(*qkv, length)])


def test_it_is_not_chosen_on_other_devices():
    q = drawn(1, 8, 1, 16)
    assert not flash_tpu.supports(q) and dense_attention.choose_backend(q) == "xla"
