"""Causal consistency distillation: a start for DMD that needs no rollout.

The student learns, on videos and under their clean past, to name at one noise level the clean
latents that its own moving average names at the next lower one, which the guided teacher's flow
leads to (consistency models, arXiv 2303.01469, equation 8; latent with guidance, arXiv 2310.04378).
All chunks of a video are one teacher-forcing forward, as in the autoregressive trainer.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import recipes as recipe_lib
from longlive_jax.config import TIMESTEPS
from longlive_jax.diffusion import losses, schedule
from longlive_jax.models import dit
from longlive_jax.training import batch as batch_lib
from longlive_jax.training import cost
from longlive_jax.training.batch import Batch
from longlive_jax.training.objective import Cost, Moment, Objective
from longlive_jax.training.objectives import conditions, randomness
from longlive_jax.training.objectives.dmd import DMD, NEGATIVE, STUDENT, TEACHER
from longlive_jax.training.objectives.rollout import LATENTS


class Inputs(struct.PyTreeNode):
    """One batch. Latents are float32 [batch, chunk, frame, h, w, channel].

    data: clean. noisy: at `level`. target: clean latents by the average, at the level below.
    level: int32 [batch, chunk], 0 the noisiest. count: float32, the step's latents that bear loss.
    """

    batch: Batch
    data: jax.Array
    noisy: jax.Array
    level: jax.Array
    count: jax.Array
    rounding: jax.Array | None = None
    target: jax.Array | None = None


class Consistency(Objective):
    """Trains the student of a DMD run: the same networks, adapters and frozen weights."""

    def __init__(self, cfg: config_lib.Config, mesh: jax.sharding.Mesh, teacher: bool = False):
        self.cfg, self.mesh = cfg, mesh
        self.dmd = DMD(cfg, mesh, teacher)
        self.seed, self.batch_size = cfg.train.seed, cfg.train.batch_size
        self.accumulation, self.frozen = cfg.train.accumulation, self.dmd.frozen
        self.networks = {STUDENT: dataclasses.replace(self.dmd.networks[STUDENT], period=1)}
        self.batch = batch_lib.abstract(cfg, mesh)
        base = np.linspace(schedule.SIGMA_MAX, 0, cfg.distill.consistency_levels + 1)
        shift = cfg.video.shift
        self.sigmas = (shift * base / (1 + (shift - 1) * base)).astype(np.float32)

    def freeze(self, weights: Mapping[str, Any], negative: jax.Array) -> dict[str, Any]:
        """As `DMD.freeze`."""
        return self.dmd.freeze(weights, negative)

    def cost(self, due: tuple[str, ...]) -> Cost:
        """A forward and its gradient, the average's forward, and the teacher's one or two."""
        videos = self.batch_size * self.accumulation
        trained = 2 if self.cfg.distill.lora.enabled else 3
        forwards = trained + 1 + (2 if self.cfg.distill.guidance else 1)
        forwards += 1 if self.cfg.distill.action_guidance else 0
        flops = forwards * cost.video_flops(self.cfg, batch_lib.chunks(self.cfg), 2)
        return Cost(videos * cost.video_tokens(self.cfg), flops * videos)

    def over_step(self, batches: Batch) -> jax.Array:
        """How many of the step's latents bear loss, float32: the loss is their mean."""
        frames = jnp.sum(batches.valid, dtype=jnp.float32) * self.cfg.model.chunk_frames
        if self.cfg.video.image_to_video:
            frames -= self.accumulation * self.batch_size  # the given first frames
        height, width = self.cfg.video.latent_size
        return jnp.maximum(frames, 1.0) * height * width * self.cfg.model.in_dim

    def before(self, network: str, moment: Moment) -> Inputs:
        batch, mesh = moment.batch, self.mesh
        assert moment.rows is not None
        drawn = randomness.draw(self.cfg, mesh, moment.key, moment.rows, batch.latents.shape)
        inputs = Inputs(
            batch, batch.latents.astype(jnp.float32), drawn.noise,
            drawn.timestep_index * self.cfg.distill.consistency_levels // TIMESTEPS,
            moment.over_step, drawn.rounding,
        )  # fmt: skip
        arguments = (moment.ema, moment.frozen, inputs)
        noisy, target = jax.shard_map(
            self._target,
            mesh=mesh,
            in_specs=jax.tree.map(lambda x: jax.typeof(x).sharding.spec, arguments),
            out_specs=(LATENTS, LATENTS),
            check_vma=False,
        )(*arguments)
        return inputs.replace(noisy=noisy, target=target)

    def _target(self, ema, frozen, inputs):
        """The noisy latents; and the average's clean ones after the teacher's step down."""
        sigma, below = (self._at(inputs.level + i) for i in (0, 1))
        noisy = self._shown(inputs, losses.add_noise(inputs.data, inputs.noisy, sigma))
        teacher, batch = self.dmd.transformer(TEACHER, ema, frozen), inputs.batch
        d = self.cfg.distill
        conditioned = velocity = self._velocity(TEACHER, teacher, noisy, sigma, inputs)
        if d.guidance:
            negative = jnp.broadcast_to(frozen[NEGATIVE][:, None], batch.text.shape)
            negative = inputs.replace(batch=batch.replace(text=negative))
            other = self._velocity(TEACHER, teacher, noisy, sigma, negative)
            velocity = conditioned + d.guidance * (conditioned - other)
        if d.action_guidance:
            still = inputs.replace(batch=batch.replace(actions=conditions.still(batch.actions)))
            other = self._velocity(TEACHER, teacher, noisy, sigma, still)
            velocity += d.action_guidance * (conditioned - other)
        down = (below - sigma)[..., None, None, None]
        lower = self._shown(inputs, noisy + down * velocity)
        average = self.dmd.transformer(STUDENT, ema, frozen)
        velocity = self._velocity(STUDENT, average, lower, below, inputs)
        return noisy, losses.clean_of(lower, velocity, below)

    def loss(
        self, network: str, params: Mapping, frozen: Any, inputs: Inputs, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean squared difference of the two levels' clean latents, over valid frames."""
        assert inputs.target is not None
        tree, sigma = self.dmd.transformer(STUDENT, params, frozen), self._at(inputs.level)
        velocity = self._velocity(STUDENT, tree, inputs.noisy, sigma, inputs)
        error = losses.clean_of(inputs.noisy, velocity, sigma) - inputs.target
        graded = jnp.broadcast_to(inputs.batch.valid[..., None], sigma.shape)
        graded &= ~self._given(inputs)
        mask = graded[..., None, None, None].astype(jnp.float32)
        return jnp.sum(mask * error**2) / inputs.count, {}

    def _velocity(self, name, tree, noisy, sigma, inputs):
        """float32, of noisy chunks under their clean past."""
        cfg, dtype, recipe = self.cfg, self.cfg.compute_dtype, self.dmd.recipes[name]
        recipe = recipe_lib.get(recipe)
        stochastic = recipe is not None and recipe.gradients and recipe.gradients.stochastic
        timestep = jnp.where(self._given(inputs), 0.0, TIMESTEPS * sigma)
        return dit.teacher_forcing(
            tree, cfg.model, inputs.data.astype(dtype), noisy.astype(dtype), timestep,
            self._positions(inputs), text=inputs.batch.text,
            inserted=conditions.inserted(cfg.model, inputs.batch.actions, copies=True),
            sharding=dit.Sharding.training(),
            precision=dit.Precision(recipe, dtype), remat=cfg.distill.remat,
            key=inputs.rounding if stochastic else None,
        ).astype(jnp.float32)  # fmt: skip

    def _at(self, level):
        """Sigma [batch, chunk, frame] of these levels."""
        sigma = jnp.asarray(self.sigmas)[level][..., None]
        return jnp.broadcast_to(sigma, (*level.shape, self.cfg.model.chunk_frames))

    def _positions(self, inputs):
        chunks, frames = inputs.data.shape[1:3]
        first = jax.lax.axis_index(mesh_lib.SEQ) * chunks
        chunk = (first + jnp.arange(chunks, dtype=jnp.int32))[:, None]
        positions = chunk * frames + jnp.arange(frames, dtype=jnp.int32)[None]
        return jnp.broadcast_to(positions[None], inputs.data.shape[:3])

    def _given(self, inputs):
        """bool [batch, chunk, frame], the first frame of image-to-video: clean, and no loss."""
        positions = self._positions(inputs)
        return (positions == 0) & self.cfg.video.image_to_video

    def _shown(self, inputs, latents):
        return jnp.where(self._given(inputs)[..., None, None, None], inputs.data, latents)
