"""A step's random numbers: keys folded by (step, sample, chunk, use), never by device.

So a result does not depend on the mesh, and a run that is started again draws what it would have
drawn.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import recipes as recipe_lib
from longlive_jax.config import TIMESTEPS

# Uses of a chunk's key. Error recycling folds its own, from 16 on.
NOISE, TIMESTEP, PAST_NOISE, PAST_TIMESTEP, ROUNDING = range(5)
_DROPPED = 2**16  # use of a sample's key, in place of a chunk's number


class Randomness(struct.PyTreeNode):
    """noise: float32 [batch, chunk, frame, h, w, channel]; timestep_index: int32 [batch, chunk],
    entries of `diffusion.schedule.training_schedule`. The same of the clean past when
    train.context_levels asks for it, else None. rounding: keys [batch, chunk] for the rounding of
    gradients, if the recipe rounds them stochastically, else None.
    """

    noise: jax.Array
    timestep_index: jax.Array
    past_noise: jax.Array | None = None
    past_timestep_index: jax.Array | None = None
    rounding: jax.Array | None = None


def _spec(*axes: str | None) -> Any:  # a PartitionSpec, in an array's place
    return mesh_lib.spec(axes)


def kept(mesh: jax.sharding.Mesh, key: jax.Array, rows: jax.Array, dropout: float) -> jax.Array:
    """float32 [batch], 0 in a share of `dropout` of the samples `rows` and 1 in the others."""

    def one(key, row):
        own = jax.random.fold_in(jax.random.fold_in(key, row), _DROPPED)
        return jax.random.bernoulli(own, 1 - dropout).astype(jnp.float32)

    place = jax.shard_map(
        jax.vmap(one, (None, 0)),
        mesh=mesh,
        in_specs=(jax.P(), mesh_lib.spec(("batch",))),
        out_specs=mesh_lib.spec(("batch",)),
        check_vma=False,
    )
    return place(key, jax.reshard(rows, mesh_lib.sharding(mesh, ("batch",))))


def draw(
    cfg: config_lib.Config, mesh: jax.sharding.Mesh, key: jax.Array, rows: jax.Array, shape
) -> Randomness:
    """Of the samples `rows` (int32 [batch], their numbers in the step), as global arrays.

    Args:
      key: the step's.
      shape: of the latents, [batch, chunk, frame, h, w, channel].
    """
    noised = cfg.train.context_levels
    recipe = recipe_lib.get(cfg.quant.recipe)
    rounding = recipe is not None and recipe.gradients is not None and recipe.gradients.stochastic

    def one(key, row, chunk):
        here = jax.random.fold_in(jax.random.fold_in(key, row), chunk)

        def noise(use):
            return jax.random.normal(jax.random.fold_in(here, use), shape[2:])

        def index(use, least):
            # Every index is as likely; the shift is in what the table says of it.
            return jax.random.randint(jax.random.fold_in(here, use), (), least, TIMESTEPS)

        return Randomness(
            noise(NOISE),
            index(TIMESTEP, 0),
            noise(PAST_NOISE) if noised else None,
            index(PAST_TIMESTEP, TIMESTEPS - noised) if noised else None,
            jax.random.fold_in(here, ROUNDING) if rounding else None,
        )

    def local(key, rows, chunks):
        return jax.vmap(lambda row: jax.vmap(lambda chunk: one(key, row, chunk))(chunks))(rows)

    latents, by_chunk = _spec("batch", "chunk", None, None, None, None), _spec("batch", "chunk")
    specs = Randomness(
        latents,
        by_chunk,
        *((latents, by_chunk) if noised else (None, None)),
        by_chunk if rounding else None,
    )
    place = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(jax.P(), mesh_lib.spec(("batch",)), mesh_lib.spec(("chunk",))),
        out_specs=specs,
        check_vma=False,
    )
    rows, chunks = (
        jax.reshard(x, mesh_lib.sharding(mesh, (name,)))
        for x, name in ((rows, "batch"), (jnp.arange(shape[1], dtype=jnp.int32), "chunk"))
    )
    return place(key, rows, chunks)
