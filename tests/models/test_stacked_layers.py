"""Layers in a stack, which a loop goes through, compute what layers that are apart compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import config as lib
from longlive_jax.models import dit, lora
from longlive_jax.params import is_spec
from longlive_jax.sampling import kv_cache
from longlive_jax.sampling.kv_cache import Past
from tests.sampling import test_stream

MODEL = test_stream.MODEL


def passes(params, x, timesteps, positions, text, past):
    """Velocity, and the cache after the clean pass."""
    keys = dit.text_keys_values(params, MODEL, text)
    velocity = dit.denoise(params, MODEL, x, timesteps, positions, text=keys, cache=past)
    slot = jnp.ones(x.shape[0], jnp.int32)
    after = dit.commit(params, MODEL, x, positions, text=keys, cache=past, slot=slot)
    assert isinstance(after, Past)
    return velocity, after.cache.k, after.cache.v


@pytest.mark.slow  # tests/training has rollouts of stacks against the original
def test_denoise_and_commit_of_stacked_layers():
    """With adapters beside the weights too."""
    cfg, draw = test_stream.make_config(), np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(draw.standard_normal(shape), jnp.float32)

    adapters = lora.specs(dit.spec(MODEL), lib.LoRA(rank=2, alpha=2.0))
    adapters = jax.tree.map(lambda s: 0.1 * normal(*s.shape), adapters, is_leaf=is_spec)
    params = lora.attach(jax.tree.map(jnp.asarray, test_stream.random_params()), adapters, 1.0)
    x, text = normal(2, 8, 4, 4, 4), normal(2, MODEL.text_len, MODEL.text_dim)
    positions = jnp.broadcast_to(8 + jnp.arange(8, dtype=jnp.int32), (2, 8))
    timesteps = jnp.full((2, 8), 700.0)
    empty = kv_cache.init(cfg, 1, 2, 32, MODEL.num_heads)
    cache = jax.tree.map(lambda c: normal(*c.shape), empty)
    valid = jnp.broadcast_to(jnp.arange(cache.k.shape[3]) < 1, (2, cache.k.shape[3]))
    given = (x, timesteps, positions, text, Past(cache, valid))

    @jax.jit
    def both(params, *given):
        return passes(params, *given), passes(dit.layers(params), *given)

    stacked, apart = both(params, *given)
    for a, b in zip(stacked, apart, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    # What was written is the chunk's, in every layer, and nothing else.
    changed = np.any(np.asarray(stacked[1]) != np.asarray(cache.k), axis=(4, 5, 6))
    assert np.array_equal(changed, np.broadcast_to([False, True, False], changed.shape))
