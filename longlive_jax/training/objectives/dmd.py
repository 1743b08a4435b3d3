"""Distribution matching distillation: a student of few steps learns from its own videos.

Three causal networks: the student, a frozen teacher (the real score) and a critic (the fake score),
which follows the student's distribution (arXiv 2311.18828, 2405.14867; on rollouts of a causal
student: Self-Forcing, arXiv 2506.08009). A rollout has no gradient; one teacher-forcing forward on
it has, with the rollout's final latents as the clean half and its exit inputs as the noisy half.
That is the loss of the unrolled rollout with the memory of one training step, and what shards,
quantises and recomputes is the autoregressive trainer's.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax import recipes as recipe_lib
from longlive_jax.diffusion import losses, schedule
from longlive_jax.models import dit
from longlive_jax.training import batch as batch_lib
from longlive_jax.training import distill_cost, trained
from longlive_jax.training.batch import Scripts
from longlive_jax.training.objective import Cost, Moment, Network, Objective
from longlive_jax.training.objectives import conditions, rollout
from longlive_jax.training.objectives.rollout import CHUNKS, LATENTS, Clip, Draws
from longlive_jax.training.optimizer import adamw

STUDENT, CRITIC, TEACHER = "student", "critic", "teacher"
DIT, LORA = trained.DIT, trained.LORA  # parts of a network
BASE, NEGATIVE = "base", "negative"
_FRAMES = jax.P(*CHUNKS, None)


class Inputs(struct.PyTreeNode):
    """What both losses are computed from.

    clip: the student's rollout. scripts: what it is of. draws: of the rollout.
    count: float32 [], numbers of the step's latents that bear loss.
    g: float32 [batch, chunk, frame, h, w, channel], of the student: the gradient of the distance
      between the two distributions; None for the critic.
    """

    clip: Clip
    scripts: Scripts
    draws: Draws
    count: jax.Array
    g: jax.Array | None = None


class Scores(struct.PyTreeNode):
    """How two scores judge a clip. Arrays as `Inputs.g`, but normaliser float32 [batch, chunk].

    The teacher's are conditioned, without text, and without actions; those that no guidance needs
    are the conditioned one.
    """

    x_t: jax.Array
    timestep: jax.Array
    fake_x0: jax.Array
    real_cond_x0: jax.Array
    real_uncond_x0: jax.Array
    real_still_x0: jax.Array
    normaliser: jax.Array
    g: jax.Array


class DMD(Objective):
    """The student is trained every `distill.student_every` steps, the critic every step.

    With `distill.lora` both are adapters over weights that are held once, and an action path of
    their own if the model has one; else whole networks.
    Frozen are NEGATIVE, the negative prompt's embedding [1, text_len, text_dim], and weights by
    recipe: of BASE where there are adapters, of TEACHER where it has weights of its own.

    Args:
      teacher: the teacher's weights are other than the base's.
    """

    maxima = ("rollout_difference",)
    shown = ("rollout_difference",)

    def __init__(self, cfg: config_lib.Config, mesh: jax.sharding.Mesh, teacher: bool = False):
        self.cfg, self.mesh = cfg, mesh
        d = cfg.distill
        self.seed, self.batch_size, self.accumulation = d.seed, d.batch_size, d.accumulation
        self.recipes = {
            STUDENT: cfg.quant.recipe, TEACHER: d.teacher_recipe, CRITIC: d.critic_recipe
        }  # fmt: skip
        self.specs = dit.spec(cfg.model)
        parts = trained.specs(cfg.model, d.lora) if d.lora.enabled else {DIT: self.specs}
        self.networks = {
            STUDENT: Network(
                parts, _optimizer(d, d.learning_rate), self._ema_decay, d.student_every
            ),
            CRITIC: Network(parts, _optimizer(d, d.critic_learning_rate)),
        }
        self.batch = batch_lib.abstract_scripts(cfg, mesh)
        self.law = schedule.score_law(cfg.video.shift, d.least_timestep, d.most_timestep)
        own = teacher or not d.lora.enabled
        self.holds = {STUDENT: BASE, CRITIC: BASE, TEACHER: TEACHER if own else BASE}
        self.frozen = {
            NEGATIVE: jax.ShapeDtypeStruct(
                (1, cfg.model.text_len, cfg.model.text_dim), cfg.compute_dtype,
                sharding=jax.NamedSharding(mesh, jax.P(None, None, None)),
            )
        }  # fmt: skip
        for name in self._frozen_networks():
            held = self.frozen.setdefault(self.holds[name], {})
            recipe = self.recipes[name]
            held[recipe] = trained.abstract(self.specs, recipe, mesh, cfg)

    def _frozen_networks(self):
        """The networks whose weights, or weights below adapters, are frozen."""
        return self.recipes if self.cfg.distill.lora.enabled else (TEACHER,)

    def freeze(self, weights: Mapping[str, params_lib.Tree], negative: jax.Array) -> dict[str, Any]:
        """`frozen` of these weights in compute dtype, by BASE and TEACHER as far as it has them."""
        held = {}
        for name, recipes in self.frozen.items():
            if name != NEGATIVE:
                held[name] = {
                    recipe: trained.freeze(weights[name], self.specs, recipe, self.mesh, self.cfg)
                    for recipe in recipes
                }
        where = self.frozen[NEGATIVE]
        return held | {NEGATIVE: jax.device_put(negative.astype(where.dtype), where.sharding)}

    def _ema_decay(self, step):
        d = self.cfg.distill
        return jnp.where(step > d.ema_start, jnp.float32(d.ema_decay), jnp.float32(0))

    def cost(self, due: tuple[str, ...]) -> Cost:
        return distill_cost.cost(self.cfg, STUDENT in due)

    def transformer(self, name: str, params: Mapping, frozen: Any) -> params_lib.Tree:
        """A network's parameters as `models.dit` takes them, from global or local arrays."""
        if name != TEACHER and not self.cfg.distill.lora.enabled:
            return params[name][DIT]
        weights = frozen[self.holds[name]][self.recipes[name]]
        if name == TEACHER:
            return weights
        return trained.transformer(weights, params[name], self.cfg.distill.lora)

    # ---------------------------------------------------------------------------------------------
    # Before the loss, on global arrays and without gradient.

    def before(self, network: str, moment: Moment) -> Inputs:
        assert moment.rows is not None
        key = jax.random.fold_in(moment.key, tuple(self.networks).index(network))
        return self.inputs(network, moment, rollout.draw(self.cfg, self.mesh, key, moment.rows))

    def inputs(self, network: str, moment: Moment, draws: Draws) -> Inputs:
        """A rollout by the student as it is before the step and, for its loss, its scores."""
        student = self.transformer(STUDENT, moment.params, moment.frozen)
        clip = rollout.roll_out(self.cfg, self.mesh, student, moment.batch, draws)
        frames = draws.length * self.cfg.model.chunk_frames
        frames -= int(self.cfg.video.image_to_video)
        latents = math.prod(clip.x.shape[3:]) * self.batch_size * self.accumulation
        count = frames.astype(jnp.float32) * latents
        inputs = Inputs(clip, moment.batch, draws, count)
        return inputs if network == CRITIC else inputs.replace(g=self.scores(moment, inputs).g)

    def scores(self, moment: Moment, inputs: Inputs) -> Scores:
        """The two scores of a clip, and what they say of it."""

        def local(params, frozen, inputs):
            return self._scores(params, frozen, inputs)

        arguments = (moment.params, moment.frozen, inputs)
        arrays = Scores(*(LATENTS,) * 8).replace(timestep=_FRAMES, normaliser=CHUNKS)
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=jax.tree.map(lambda x: jax.typeof(x).sharding.spec, arguments),
            out_specs=arrays,
            check_vma=False,
        )(*arguments)

    # ---------------------------------------------------------------------------------------------
    # On each device's chunks.

    def _scores(self, params, frozen, inputs) -> Scores:
        x0, d, scripts = inputs.clip.x0, self.cfg.distill, inputs.scripts
        x_t, timestep, sigma = self._noised(inputs)

        def clean(name, scripts):
            tree = self.transformer(name, params, frozen)
            velocity = self._block_causal(name, tree, x_t, timestep, inputs, scripts)
            return losses.clean_of(x_t, velocity.astype(jnp.float32), sigma)

        fake, conditioned = clean(CRITIC, scripts), clean(TEACHER, scripts)
        real = unconditioned = still = conditioned
        if d.guidance:
            negative = jnp.broadcast_to(frozen[NEGATIVE][:, None], scripts.text.shape)
            unconditioned = clean(TEACHER, scripts.replace(text=negative))
            real = conditioned + d.guidance * (conditioned - unconditioned)
        if d.action_guidance:
            still = clean(TEACHER, scripts.replace(actions=conditions.still(scripts.actions)))
            real += d.action_guidance * (conditioned - still)
        # Of each sample and chunk, as the original's: over all its frames, a given one included.
        normaliser = jnp.mean(jnp.abs(x0 - real), axis=(2, 3, 4, 5))
        g = jnp.nan_to_num((fake - real) / normaliser[..., None, None, None, None])
        return Scores(x_t, timestep, fake, conditioned, unconditioned, still, normaliser, g)

    def _noised(self, inputs):
        """The clip with noise, and the timestep and sigma [batch, chunk, frame] of it."""
        x0, eps = inputs.clip.x0, inputs.draws.eps
        graded = self._graded(inputs)
        timestep, sigma = (
            jnp.where(graded, jnp.asarray(x)[inputs.draws.level][..., None], 0.0) for x in self.law
        )
        return losses.add_noise(x0, eps, sigma), timestep, sigma

    def _graded(self, inputs):
        """bool [batch, chunk, frame], the frames that are the student's own."""
        clip = inputs.clip
        positions, chunk = self._positions(clip), self._chunk(clip)
        graded = jnp.broadcast_to((chunk < inputs.draws.length)[None, :, None], positions.shape)
        return graded & (positions > 0) if self.cfg.video.image_to_video else graded

    def _positions(self, clip):
        frames = jnp.arange(clip.x.shape[2], dtype=jnp.int32)
        return clip.position[..., None] + frames[None, None]

    def _chunk(self, clip):
        """int32 [chunk], numbers of this device's chunks."""
        chunks = clip.x.shape[1]
        return jax.lax.axis_index(mesh_lib.SEQ) * chunks + jnp.arange(chunks)

    def _settings(self, name, inputs, scripts, copies) -> dict[str, Any]:
        recipe = recipe_lib.get(self.recipes[name])
        stochastic = recipe is not None and recipe.gradients and recipe.gradients.stochastic
        return {
            "text": scripts.text,
            "inserted": conditions.inserted(self.cfg.model, scripts.actions, copies=copies),
            "sharding": dit.Sharding.training(),
            "precision": dit.Precision(recipe, self.cfg.compute_dtype),
            "remat": self.cfg.distill.remat,
            "key": inputs.draws.rounding if stochastic else None,
        }

    def _block_causal(self, name, tree, x_t, timestep, inputs, scripts):
        """A score network's velocity: every chunk sees the noisy chunks up to itself."""
        return dit.block_causal(
            tree, self.cfg.model, x_t.astype(self.cfg.compute_dtype), timestep,
            self._positions(inputs.clip), **self._settings(name, inputs, scripts, copies=False),
        )  # fmt: skip

    def loss(
        self, network: str, params: Mapping, frozen: Any, inputs: Inputs, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Of the student 1/2 mean((x0 - stop_gradient(x0 - g))^2); of the critic the flow's error.

        Both are means over the step's latents that are the student's own. Metrics of the student:
        "g", mean |g|; "rollout_difference", largest |graded x0 - the rollout's| over the largest
        |x0|: whether the sampler and the trainer are the same model.
        """
        tree = self.transformer(network, params, frozen)
        mask = self._graded(inputs)[..., None, None, None].astype(jnp.float32)
        if network == CRITIC:
            x_t, timestep, _ = self._noised(inputs)
            velocity = self._block_causal(CRITIC, tree, x_t, timestep, inputs, inputs.scripts)
            error = velocity.astype(jnp.float32) - (inputs.draws.eps - inputs.clip.x0)
            return jnp.sum(mask * error**2) / inputs.count, {}
        assert inputs.g is not None
        x0 = self.student_x0(tree, inputs)
        target = jax.lax.stop_gradient(x0 - inputs.g)
        loss = 0.5 * jnp.sum(mask * (x0 - target) ** 2) / inputs.count
        found = jax.lax.stop_gradient(jnp.stack([mask * (x0 - inputs.clip.x0), mask * x0]))
        most = jnp.max(jnp.abs(found), axis=range(1, found.ndim))
        most, largest = jax.lax.pmax(most, mesh_lib.AXES)
        return loss, {
            "g": jnp.sum(mask * jnp.abs(inputs.g)) / inputs.count,
            "rollout_difference": most / largest / self.mesh.size,  # summed over devices
        }

    def student_x0(self, tree: params_lib.Tree, inputs: Inputs) -> jax.Array:
        """The rollout's x0 of all chunks again, by one forward, float32.

        A given frame's x0 is the network's, not the given one; `_graded` leaves it out.
        """
        clip, dtype = inputs.clip, self.cfg.compute_dtype
        slots = clip.visible.shape[-1]
        longer = slots + 1 < self.cfg.distill.latent_frames // self.cfg.model.chunk_frames
        past = dit.PastView(clip.visible if longer else None, self.cfg.distill.gradient == "stop")
        velocity = dit.teacher_forcing(
            tree, self.cfg.model, clip.final.astype(dtype), clip.x.astype(dtype), clip.timestep,
            self._positions(clip), past=past,
            **self._settings(STUDENT, inputs, inputs.scripts, copies=True),
        )  # fmt: skip
        sigma = jnp.broadcast_to(clip.sigma[..., None], clip.timestep.shape)
        return losses.clean_of(clip.x, velocity.astype(jnp.float32), sigma)


def settings(cfg: config_lib.Config, data: str, teacher: str | None) -> dict[str, Any]:
    """What a run cannot be continued with another value of, by the names of the flags.

    Args:
      data: what tells these scripts from others. teacher: its checkpoint, if it has one of its own.
    """
    d = cfg.distill
    names = ("seed", "batch_size", "accumulation", "latent_frames", "least_frames",
             "student_every", "exit", "context", "gradient", "init", "guidance",
             "least_timestep", "most_timestep", "teacher_recipe", "critic_recipe")  # fmt: skip
    values = {f"distill.{name}": getattr(d, name) for name in names}
    values |= {f"distill.lora.{k}": v for k, v in vars(d.lora).items()}
    values |= {f"model.{k}": v for k, v in config_lib.values(cfg.model).items()}
    sample = ("steps", "solver", "window_frames", "sink_frames", "multi_shot_sink", "rope_offset")
    values |= {f"sample.{name}": getattr(cfg.sample, name) for name in sample}
    if cfg.sample.memory != config_lib.Memory():  # its slots are part of the window
        values |= {f"memory.{k}": v for k, v in config_lib.values(cfg.sample.memory).items()}
    values |= {f"video.{k}": v for k, v in vars(cfg.video).items()}
    if cfg.model.actions.kind != "none":
        values["distill.action_guidance"] = d.action_guidance
    return values | {
        "objective": cfg.objective,
        "sample.negative_prompt": cfg.sample.negative_prompt,
        "quant.recipe": cfg.quant.recipe,
        "quant.kv": cfg.quant.kv,
        "dtype": cfg.dtype,
        "--teacher": teacher,
        "the training data": data,
        # These decide which arrays the optimisers have.
        "distill.beta1 == 0": d.beta1 == 0,
        "distill.weight_decay == 0": d.weight_decay == 0,
    }


def _optimizer(cfg: config_lib.Distill, rate: float) -> optax.GradientTransformation:
    return adamw(
        rate, beta1=cfg.beta1, beta2=cfg.beta2, epsilon=cfg.epsilon,
        weight_decay=cfg.weight_decay, max_grad_norm=cfg.max_grad_norm,
    )  # fmt: skip
