"""Random bits inside a kernel, where they are used: those of `formats.nvfp4.random_bits`.

Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
2011), as `jax.extend.random.threefry_2x32`, which kernels cannot call. Noise is never in memory,
and a call serves four numbers, where `jax.random.bits` makes one for each and keeps 16 bits of 64.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.formats import nvfp4
from longlive_jax.kernels import mosaic

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # of rounds: four of each, alternating
_PARITY = np.uint32(0x1BD11BDA)


def seeds(keys: jax.Array) -> jax.Array:
    """uint32 [group, 2]: of one key, or of an array of any shape with a key for each group."""
    return jax.vmap(nvfp4.seed)(keys.reshape(-1))


def seeds_of_each(keys: jax.Array | None, tensors: int) -> list[jax.Array | None]:
    """`seeds` for each of `tensors` tensors, by keys [tensor, group, ..]; None without keys."""
    return [None] * tensors if keys is None else [seeds(k) for k in keys]


def random_bits(seeds_ref, group: jax.Array, block: jax.Array) -> jax.Array:
    """uint32 [rows, 16], of 16 bits each: for blocks of 16 numbers, one a row and thread.

    seeds_ref: `seeds`, in memory. group: int32 []. block: uint32 [rows, 1], the block's number
    within the group.
    """
    calls = [block * nvfp4.CALLS + np.uint32(i) for i in range(nvfp4.CALLS)]
    seed = (jnp.broadcast_to(seeds_ref[group, i], block.shape) for i in (0, 1))
    # A number for all rows has no layout of its own.
    seed = [plgpu.layout_cast(word, mosaic.a_row_a_thread(1)) for word in seed]
    seed = [jnp.concatenate([word] * nvfp4.CALLS, axis=1) for word in seed]
    return nvfp4.halves(*threefry_2x32(*seed, jnp.concatenate(calls, axis=1)))


def threefry_2x32(key_0, key_1, counter: jax.Array) -> tuple[jax.Array, jax.Array]:
    """64 bits of a key and a counter below 2^32: both words of uint32 arrays of one shape."""
    keys = key_0, key_1, key_0 ^ key_1 ^ _PARITY
    x, y = key_0, counter + key_1  # the counter's upper word is 0
    for i in range(5):
        for rotation in _ROTATIONS[i % 2]:
            x = x + y
            y = (y << rotation | y >> (32 - rotation)) ^ x
        x = x + keys[(i + 1) % 3]
        y = y + (keys[(i + 2) % 3] + np.uint32(i + 1))
    return x, y
