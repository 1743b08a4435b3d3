"""Random bits made in a kernel: the library's generator, and `formats.nvfp4.random_bits`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import random as extended

from longlive_jax.formats import nvfp4
from longlive_jax.kernels import threefry


@pytest.mark.parametrize("key", ((0, 0), (1, 2), (0xFFFFFFFF, 0x80000001)))
def test_it_is_the_librarys_generator(key):
    key = jnp.uint32(key)
    counter = jnp.uint32([0, 1, 2, 0x7FFFFFFF, 0xFFFFFFFF])
    counters = jnp.concatenate([jnp.zeros_like(counter), counter])
    expected = extended.threefry_2x32(tuple(key), counters).reshape(2, -1)
    result = threefry.threefry_2x32(*(jnp.broadcast_to(k, counter.shape) for k in key), counter)
    np.testing.assert_array_equal(np.asarray(result), np.asarray(expected))


def test_seeds_of_any_keys():
    keys = jax.random.split(jax.random.key(3), (2, 3))
    seeds = threefry.seeds(keys)
    assert (seeds.shape, seeds.dtype) == ((6, 2), jnp.uint32)
    for i, key in enumerate(keys.reshape(-1)):
        np.testing.assert_array_equal(np.asarray(seeds[i]), np.asarray(nvfp4.seed(key)))
    assert threefry.seeds(jax.random.key(3, impl="rbg")).shape == (1, 2)
    each = threefry.seeds_of_each(keys, 2)
    np.testing.assert_array_equal(np.concatenate(each), np.asarray(seeds))
    assert threefry.seeds_of_each(None, 2) == [None, None]
