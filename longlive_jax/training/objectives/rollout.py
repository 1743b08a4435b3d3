"""A student's own videos, made without gradient inside a training step by the production sampler.

Arrays outside the sampler lie as in training, [batch, chunk, ...] with chunks over `seq`; inside
they lie as in sampling, a chunk's frames over `seq`. Random numbers are functions of the step's
key, the sample, the chunk and the use alone.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax import recipes as recipe_lib
from longlive_jax.config import TIMESTEPS
from longlive_jax.models import actions as actions_lib
from longlive_jax.models import dit
from longlive_jax.sampling import actions as action_state
from longlive_jax.sampling import exits, kv_cache, stream
from longlive_jax.sampling import window as window_lib
from longlive_jax.training.batch import Scripts

# Uses of a sample's, a chunk's or a step's key.
_NOISE, _EPS, _LEVEL, _ROUNDING, _EXIT, _LENGTH, _RENOISE = range(7)
# What a sample's key is folded by: for the sample as a whole, or first of all for its chunks. A key
# that is folded on is never drawn from: a draw splits it, and would give the keys of others.
_WHOLE, _BY_CHUNK = range(2)


def _spec(*axes: str | None) -> Any:  # a PartitionSpec, in an array's place
    return mesh_lib.spec(axes)


LATENTS = _spec("batch", "chunk", None, None, None, None)
CHUNKS = _spec("batch", "chunk")
_FRAMES = jax.P(None, *mesh_lib.spec(("batch", "frame", None, None, None)))  # chunks first


class Draws(struct.PyTreeNode):
    """The random numbers of a rollout and of what grades it.

    noise, eps: float32 [batch, chunk, frame, h, w, channel], of the rollout and of the scores.
    level: int32 [batch, chunk], entries of `diffusion.schedule.score_law`.
    exit_step: int32 [chunk]. length: int32 [], chunks of the rollout.
    rounding: keys [batch, chunk] for recipes that round gradients stochastically.
    renoise: float32 [step, batch, chunk, frame, h, w, channel], if the solver takes it, else None.
    """

    noise: jax.Array
    eps: jax.Array
    level: jax.Array
    exit_step: jax.Array
    length: jax.Array
    rounding: jax.Array | None = None
    renoise: jax.Array | None = None


class Clip(exits.Exit):
    """A rollout, as one teacher-forcing forward takes it: the exits of all chunks.

    x, x0, final: float32 [batch, chunk, frame, h, w, channel].
    timestep: float32 [batch, chunk, frame], of x. sigma: float32 [batch, chunk], of x0.
    position: int32 [batch, chunk], of each chunk's first frame.
    visible: int32 [batch, chunk, slot].
    """


def draw(cfg: config_lib.Config, mesh: jax.sharding.Mesh, key: jax.Array, rows: jax.Array) -> Draws:
    """Of the samples `rows`, int32 [batch], their numbers in the step.

    Args:
      key: of the step and of the network that is trained.
    """
    d, chunks = cfg.distill, cfg.distill.latent_frames // cfg.model.chunk_frames
    shape = (cfg.model.chunk_frames, *cfg.video.latent_size, cfg.model.in_dim)
    renoised = cfg.sample.steps if cfg.sample.solver == "x0_renoise" else 0

    def one(key, row, chunk):
        sample = jax.random.fold_in(key, row)
        here = jax.random.fold_in(jax.random.fold_in(sample, _BY_CHUNK), chunk)
        # The original's: one level a sample, one a chunk where the first frame is given.
        given = cfg.video.image_to_video
        of_level = here if given else jax.random.fold_in(sample, _WHOLE)

        def normal(use):
            return jax.random.normal(jax.random.fold_in(here, use), shape)

        level = jax.random.randint(jax.random.fold_in(of_level, _LEVEL), (), 0, TIMESTEPS)
        fresh = [normal(_RENOISE + step) for step in range(renoised)]
        return (
            normal(_NOISE), normal(_EPS), level, jax.random.fold_in(here, _ROUNDING),
            jnp.stack(fresh) if fresh else None,
        )  # fmt: skip

    def local(key, rows, chunk):
        return jax.vmap(lambda row: jax.vmap(lambda c: one(key, row, c))(chunk))(rows)

    later = _spec("batch", "chunk", *(None,) * 5) if renoised else None
    made = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(jax.P(), mesh_lib.spec(("batch",)), mesh_lib.spec(("chunk",))),
        out_specs=(LATENTS, LATENTS, CHUNKS, CHUNKS, later),
        check_vma=False,
    )(
        key,
        jax.reshard(rows, mesh_lib.sharding(mesh, ("batch",))),
        jax.reshard(jnp.arange(chunks, dtype=jnp.int32), mesh_lib.sharding(mesh, ("chunk",))),
    )
    noise, eps, level, rounding, fresh = made
    # Of a batch as a whole: all devices leave together. Its first sample's number tells it.
    whole = jax.NamedSharding(mesh, jax.P(None))
    first = jax.random.fold_in(key, jax.reshard(rows, whole)[0])
    batch = jax.random.fold_in(first, _WHOLE)
    each = chunks if d.exit == "chunk" else 1
    steps = jax.random.randint(jax.random.fold_in(batch, _EXIT), (each,), 0, cfg.sample.steps)
    least = (d.least_frames or d.latent_frames) // cfg.model.chunk_frames
    length = jax.random.randint(jax.random.fold_in(batch, _LENGTH), (), least, chunks + 1)
    return Draws(
        noise, eps, level, jnp.broadcast_to(steps, (chunks,)), length, rounding,
        None if fresh is None else jnp.moveaxis(fresh, 2, 0),
    )  # fmt: skip


def roll_out(
    cfg: config_lib.Config,
    mesh: jax.sharding.Mesh,
    params: params_lib.Tree,
    scripts: Scripts,
    draws: Draws,
) -> Clip:
    """Makes a video of each script, chunk by chunk from the sampler's own cache.

    Args:
      params: of `dit.spec`, with adapters or not, layers stacked, sharded by `mesh.RULES`.
    """
    precision = dit.Precision(recipe_lib.get(cfg.quant.recipe), cfg.compute_dtype)
    leave = functools.partial(
        exits.exit_chunk, cfg=cfg, to_the_end=cfg.distill.context == "final",
        sharding=dit.Sharding.training(), precision=precision,
    )  # fmt: skip

    def local(params, noise, text, cut, first_frame, renoise, actions, exit_step, length):
        chunks, rows, frames, height, width = noise.shape[:5]
        heads, ranks = cfg.model.num_heads, mesh.shape[mesh_lib.SEQ]
        patches = (height // dit.PATCH) * (width // dit.PATCH)
        own_heads = cfg.model.actions.heads // ranks
        state = stream.StreamState(
            kv_cache.init(cfg, 1, rows, cfg.model.chunk_frames * patches, heads // ranks),
            window_lib.init(cfg, rows, height, width, frames),
            action_state.init(cfg, 1, rows, patches, own_heads),
        )
        chunk_of = functools.partial(leave, params)

        def one(state, x):
            number, exit_step, noise, text, cut, renoise, actions = x
            inputs = stream.ChunkInput(noise, text, cut, None, first_frame, renoise, actions)
            if not cfg.distill.least_frames:
                return chunk_of(state, inputs, exit_step)
            like = jax.eval_shape(chunk_of, state, inputs, exit_step)[1]
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
            return jax.lax.cond(
                number < length, chunk_of, lambda *_: (state, nothing), state, inputs, exit_step
            )

        xs = (jnp.arange(chunks), exit_step, noise, text, cut, renoise, actions)
        return jax.lax.scan(one, state, xs)[1]

    def first(x, spec):
        """[batch, chunk, ...] -> [chunk, batch, ...], as the sampler's arrays lie."""
        return jax.reshard(jnp.moveaxis(x, 1, 0), jax.NamedSharding(mesh, spec))

    rows = _spec(None, "batch")
    own = jax.P(*rows, None, None)
    renoise = None
    if draws.renoise is not None:  # [step, batch, chunk, ...] -> [chunk, step, batch, ...]
        by_step = jax.P(None, *_FRAMES)
        renoise = jax.reshard(jnp.moveaxis(draws.renoise, 2, 0), jax.NamedSharding(mesh, by_step))
    arguments = (
        params, first(draws.noise, _FRAMES), first(scripts.text, own),
        first(scripts.cut, rows), scripts.first_frame, renoise,
        jax.tree.map(lambda x: first(actions_lib.newest(x), own), scripts.actions),
        jax.reshard(draws.exit_step, jax.NamedSharding(mesh, jax.P(None))), draws.length,
    )  # fmt: skip
    frames, whole = jax.P(*rows, mesh_lib.SEQ), _spec(None)
    specs: tuple[Any, ...] = (_FRAMES, _FRAMES, _FRAMES, frames, whole, rows, jax.P(*rows, None))
    left = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=jax.tree.map(lambda x: jax.typeof(x).sharding.spec, arguments),
        out_specs=exits.Exit(*specs),
        check_vma=False,
    )(*arguments)

    def back(x, spec):
        return jax.reshard(jnp.moveaxis(x, 0, 1), jax.NamedSharding(mesh, spec))

    place = jax.NamedSharding(mesh, rows)
    sigma = jnp.broadcast_to(left.sigma[:, None], left.position.shape, out_sharding=place)
    return Clip(
        *(back(x, LATENTS) for x in (left.x, left.x0, left.final)),
        timestep=back(left.timestep, jax.P(*CHUNKS, None)),
        sigma=back(sigma, CHUNKS),
        position=back(left.position, CHUNKS),
        visible=back(left.visible, _spec("batch", None, None)),
    )
