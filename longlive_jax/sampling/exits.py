"""A chunk that leaves its denoising early: the sampler as distillation rolls it out.

Distribution matching distillation grades a student's clean latents at one of its few steps, drawn
at random (Self-Forcing, arXiv 2506.08009, algorithm 1). `exit_chunk` is `stream.chunk_step` up to
that step. It keeps what one teacher-forcing forward needs to compute the same latents again, with
a gradient.
"""

import jax
import jax.numpy as jnp
from flax import struct

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.diffusion import solvers, unipc
from longlive_jax.models import dit
from longlive_jax.sampling.stream import ChunkInput, StreamState, commit_latents, enter_shot
from longlive_jax.sampling.transformer import ChunkTransformer, GivenFrame, positions_of


class Exit(struct.PyTreeNode):
    """One chunk of a rollout. Latents are float32 [batch, frame, h, w, channel].

    x: the input of the exit step. x0: the clean latents that its velocity stands for.
    final: the latents that the clean pass stored.
    timestep: float32 [batch, frame], of x; 0 where a frame is given.
    sigma: float32 [], of x0.
    position: int32 [batch], temporal position of the chunk's first frame.
    visible: int32 [batch, slot], chunks that it saw, the oldest first; `window.EMPTY` for none.
    """

    x: jax.Array
    x0: jax.Array
    final: jax.Array
    timestep: jax.Array
    sigma: jax.Array
    position: jax.Array
    visible: jax.Array


def exit_chunk(
    params: params_lib.Tree, state: StreamState, inputs: ChunkInput, exit_step: jax.Array, *,
    cfg: config_lib.Config, to_the_end: bool = False, sharding: dit.Sharding = dit.Sharding(),
    precision: dit.Precision = dit.Precision(),
) -> tuple[StreamState, Exit]:  # fmt: skip
    """Denoises up to step `exit_step`, int32 [], and commits the chunk.

    Args:
      to_the_end: the other steps are done too, and their result is committed; otherwise x0 is, as
        in the original.
      others: as `stream.chunk_step`; `exit_step` must be the same on all devices.

    Returns:
      The next state, and the chunk.
    """
    state = enter_shot(state, inputs, cfg)
    transformer = ChunkTransformer.of(params, state, inputs, cfg, sharding, precision)
    solver, given = solvers.solver(cfg.sample, cfg.video), GivenFrame(state, inputs, sharding)
    first = state.window.next_position(cfg)
    positions = positions_of(first, inputs.noise.shape[1], sharding)
    timesteps, rows = jnp.asarray(solver.timesteps), jnp.asarray(solver.rows)

    def timesteps_at(step):
        return given.timesteps(jnp.broadcast_to(timesteps[step], positions.shape))

    def velocity_of(step, sample):
        return transformer.velocity(given(sample), timesteps_at(step), positions, state.past)

    def advance(step, carry, velocity=None):
        sample, history = carry
        if velocity is None:
            velocity = velocity_of(step, sample)
        fresh = None if inputs.renoise is None else inputs.renoise[step]
        return solver.step(rows[step], given(sample), velocity, history, fresh)

    start = inputs.noise, unipc.History.start(given(inputs.noise))
    carry = jax.lax.fori_loop(0, exit_step, advance, start)
    x, velocity = given(carry[0]), velocity_of(exit_step, carry[0])
    sigma = jnp.asarray(solver.exit_sigmas)[exit_step]
    x0 = final = given(x - sigma * velocity)
    if to_the_end:
        carry = advance(exit_step, carry, velocity)
        carry = jax.lax.fori_loop(exit_step + 1, len(solver.timesteps), advance, carry)
        final = given(carry[0])
    visible = state.window.in_order().chunk
    left = Exit(x, x0, final, timesteps_at(exit_step), sigma, first, visible)
    return commit_latents(transformer, state, final), left
