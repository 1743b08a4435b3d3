"""Teacher forcing: the transformer learns all chunks of a video in one forward.

Each chunk of a video has its own noise level, and the model predicts each chunk's velocity given
the clean chunks before it (LongLive-2.0, arXiv 2605.18739, section 3). Chunks lie over `seq`, with
an all-to-all around attention and nothing else between devices inside a block; parameters are
gathered a layer at a time, and their gradients are scattered back and summed in float32.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax import recipes as recipe_lib
from longlive_jax.diffusion import losses, schedule
from longlive_jax.models import actions, dit, umt5
from longlive_jax.training import batch as batch_lib
from longlive_jax.training import cost, trained
from longlive_jax.training.batch import Batch
from longlive_jax.training.objective import Cost, Moment, Network, Objective
from longlive_jax.training.objectives import conditions, error_recycling, randomness
from longlive_jax.training.optimizer import adamw

MODEL = "model"  # the only network: the transformer and, where it is trained, the text encoder
BASE = "base"  # the frozen weights below it
BINS = 10  # of timesteps, in the log
_CHUNKS = mesh_lib.spec(("batch", "chunk"))
_LATENTS = mesh_lib.spec(("batch", "chunk", None, None, None, None))
# What a run cannot be continued with another value of.
_FIXED = {
    "data": ("cached", "max_chunks_per_shot", "single_shot", "allow_padding", "min_chunks"),
    "train": (
        "seed", "batch_size", "accumulation", "latent_frames", "teacher_forcing", "context_levels",
        "text_encoder",
    ),
    "video": ("height", "width", "shift", "image_to_video"),
}  # fmt: skip


class Inputs(struct.PyTreeNode):
    """One batch, ready for the model. Latents are float32 [batch, chunk, frame, h, w, channel].

    data: what the model should find. clean: what noise is added to: the data, perhaps with a
      recycled error. past: what later chunks see of this one.
    timestep_index, past_timestep_index: int32 [batch, chunk]. rounding: keys [batch, chunk].
    kept, injected: of error recycling. count: float32, the step's frames that bear loss.
    """

    batch: Batch
    data: jax.Array
    clean: jax.Array
    noise: jax.Array
    past: jax.Array
    timestep_index: jax.Array
    past_timestep_index: jax.Array | None
    rounding: jax.Array | None
    count: jax.Array
    kept: jax.Array | None = None
    injected: dict[str, jax.Array] | None = None


class TeacherForcing(Objective):
    """One network of the parts {"dit": ...} and, if it is trained too, "umt5".

    With train.trainable other than "all" the parts are those of `training.trained`, and what is
    frozen is BASE, the transformer's backbone.
    """

    def __init__(self, cfg: config_lib.Config, mesh: jax.sharding.Mesh):
        self.cfg, self.mesh = cfg, mesh
        train, recycling = cfg.train, cfg.train.error_recycling
        self.seed, self.batch_size = train.seed, train.batch_size
        self.accumulation = train.accumulation
        self.specs = specs(cfg)
        self.adapters = adapters(cfg)
        self.backbone, _ = actions.split(dit.spec(cfg.model), cfg.model)
        if train.trainable != "all":
            self.frozen = {BASE: trained.abstract(self.backbone, cfg.quant.recipe, mesh, cfg)}
        self.networks = {MODEL: Network(self.specs, optimizer(train), self._ema_decay)}
        self.batch = batch_lib.abstract(cfg, mesh)
        self.table = schedule.training_schedule(cfg.video.shift)
        if recycling.enabled:
            self.carried = error_recycling.abstract(
                recycling, batch_lib.chunks(cfg), batch_lib.chunk_shape(cfg), mesh
            )
            self.outputs = {"latent_error": _LATENTS, "noise_error": _LATENTS}

    def _ema_decay(self, step):
        train = self.cfg.train
        return jnp.where(step > train.ema_start, jnp.float32(train.ema_decay), jnp.float32(0))

    def cost(self, due: tuple[str, ...]) -> Cost:
        videos = self.batch_size * self.accumulation
        return Cost(videos * cost.video_tokens(self.cfg), cost.step_flops(self.cfg))

    def freeze(self, backbone: params_lib.Tree) -> Any:
        """`frozen`, of the backbone's weights in the compute dtype, as `actions.split` gives it."""
        recipe = self.cfg.quant.recipe
        return {BASE: trained.freeze(backbone, self.backbone, recipe, self.mesh, self.cfg)}

    def whole(self, params: Mapping, frozen: Any) -> dict[str, Any]:
        """The parts of a network as a checkpoint has them: the transformer whole, with adapters
        merged into plain weights.
        """
        if not frozen:
            return dict(params)
        own = {k: v for k, v in params.items() if k in (trained.DIT, trained.LORA)}
        rest = {k: v for k, v in params.items() if k not in own}
        merge = jax.jit(functools.partial(trained.merged, adapters=self.adapters))
        return {trained.DIT: merge(frozen[BASE], own), **rest}

    # ---------------------------------------------------------------------------------------------
    # Around the loss, on global arrays.

    def over_step(self, batches: Batch) -> jax.Array:
        """How many of the step's frames bear loss, float32: the loss is their mean."""
        frames = jnp.sum(batches.valid, dtype=jnp.float32) * self.cfg.model.chunk_frames
        if self.cfg.video.image_to_video:
            frames -= self.accumulation * self.batch_size  # the given first frames
        return jnp.maximum(frames, 1.0)

    def before(self, network: str, moment: Moment) -> Inputs:
        batch = moment.batch
        assert moment.rows is not None
        if batch.actions is not None and self.cfg.model.actions.dropout:
            kept = randomness.kept(
                self.mesh, moment.key, moment.rows, self.cfg.model.actions.dropout
            )
            dropped = jax.tree.map(lambda x: x * kept[:, None, None, None, None], batch.actions)
            batch = batch.replace(actions=dropped)
        drawn = randomness.draw(self.cfg, self.mesh, moment.key, moment.rows, batch.latents.shape)
        data = batch.latents.astype(jnp.float32)
        past = data if drawn.past_noise is None else self._noised_past(data, drawn)
        inputs = Inputs(
            batch, data, data, drawn.noise, past, drawn.timestep_index, drawn.past_timestep_index,
            drawn.rounding, moment.over_step,
        )  # fmt: skip
        if not self.cfg.train.error_recycling.enabled:
            return inputs
        injected = error_recycling.inject(
            self.cfg.train.error_recycling, moment.carried, _chunks(moment, inputs), moment.step,
            clean=data, noise=drawn.noise, past=past,
        )  # fmt: skip
        return inputs.replace(
            clean=injected.clean, noise=injected.noise, past=injected.past,
            kept=injected.kept, injected=injected.counts,
        )  # fmt: skip

    def after(
        self, network: str, moment: Moment, inputs: Inputs, outputs: Mapping[str, jax.Array]
    ) -> tuple[error_recycling.Errors | None, dict[str, jax.Array]]:
        if not outputs:
            return None, {}
        assert inputs.kept is not None and inputs.injected is not None
        errors = error_recycling.store(
            self.cfg.train.error_recycling, moment.carried, _chunks(moment, inputs),
            jnp.logical_and(inputs.batch.valid, inputs.kept), **outputs,
        )  # fmt: skip
        return errors, inputs.injected

    def _noised_past(self, data, drawn):
        def local(data, noise, index):
            sigma = jnp.asarray(self.table.sigmas)[index][..., None]
            return losses.add_noise(data, noise, sigma)

        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(_LATENTS, _LATENTS, _CHUNKS),
            out_specs=_LATENTS,
            check_vma=False,
        )(data, drawn.past_noise, drawn.past_timestep_index)

    # ---------------------------------------------------------------------------------------------
    # The loss, on each device's chunks.

    def loss(
        self, network: str, params: Mapping, frozen: Any, inputs: Inputs, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Weighted by timestep, and averaged over all the step's frames that bear loss.

        Metrics: "errors", "counts", float32 [BINS], unweighted squared errors of frames, summed,
        and the frames' number, by timestep: bin i is from 1000 i / BINS to 1000 (i + 1) / BINS.
        """
        cfg, dtype, params = self.cfg, self.cfg.compute_dtype, params[network]
        sharding = dit.Sharding.training()
        precision = dit.Precision(recipe_lib.get(cfg.quant.recipe), dtype)
        local_chunks, chunk_frames = inputs.data.shape[1:3]
        chunk = jax.lax.axis_index(mesh_lib.SEQ) * local_chunks + jnp.arange(local_chunks)
        positions = chunk[:, None] * chunk_frames + jnp.arange(chunk_frames)[None]
        positions = jnp.broadcast_to(positions[None], inputs.data.shape[:3]).astype(jnp.int32)

        sigmas, timesteps, weights = (jnp.asarray(x)[inputs.timestep_index] for x in self.table)
        sigma = jnp.broadcast_to(sigmas[..., None], positions.shape)
        timestep = jnp.broadcast_to(timesteps[..., None], positions.shape)
        past, past_timestep = inputs.past, jnp.zeros_like(timestep)
        if inputs.past_timestep_index is not None:
            own = jnp.asarray(self.table.timesteps)[inputs.past_timestep_index]
            past_timestep = jnp.broadcast_to(own[..., None], positions.shape)
        noisy = losses.add_noise(inputs.clean, inputs.noise, sigma)
        target = inputs.noise - inputs.data
        bears_loss = jnp.broadcast_to(inputs.batch.valid[..., None], positions.shape)
        if cfg.video.image_to_video:
            given = positions == 0  # the image: clean in both copies, and nothing to learn
            sigma, timestep, past_timestep = (
                jnp.where(given, 0.0, x) for x in (sigma, timestep, past_timestep)
            )
            shown = given[..., None, None, None]
            noisy, past = (jnp.where(shown, inputs.data, x) for x in (noisy, past))
            target = jnp.where(shown, 0.0, target)
            bears_loss &= ~given

        shared: dict[str, Any] = dict(
            text=self._text(params, inputs.batch, sharding), sharding=sharding,
            precision=precision, remat=cfg.train.remat, key=inputs.rounding,
            inserted=conditions.inserted(
                cfg.model, inputs.batch.actions, copies=cfg.train.teacher_forcing
            ),
        )  # fmt: skip
        tree = params["dit"] if not frozen else self._transformer(params, frozen)
        if cfg.train.teacher_forcing:
            velocity = dit.teacher_forcing(
                tree, cfg.model, past.astype(dtype), noisy.astype(dtype), timestep,
                positions, clean_timesteps=past_timestep, **shared,
            )  # fmt: skip
        else:
            velocity = dit.block_causal(
                tree, cfg.model, noisy.astype(dtype), timestep, positions, **shared
            )
        error = losses.squared_error(velocity, target)
        mask = bears_loss.astype(jnp.float32)
        loss = jnp.sum(error * weights[..., None] * mask) / inputs.count
        bin_of = jnp.minimum(timestep * BINS / 1000, BINS - 1).astype(jnp.int32)
        bins = jax.nn.one_hot(bin_of, BINS) * mask[..., None]
        errors, counts = (jnp.sum(x, axis=(0, 1, 2)) for x in (bins * error[..., None], bins))
        values = {"errors": errors, "counts": counts}
        if cfg.train.error_recycling.enabled:
            velocity = velocity.astype(jnp.float32)
            values["latent_error"] = losses.clean_of(noisy, velocity, sigma) - inputs.data
            values["noise_error"] = (velocity - target) * (1 - sigma)[..., None, None, None]
        return loss, values

    def _transformer(self, params, frozen):
        return trained.transformer(frozen[BASE], params, self.adapters)

    def _text(self, params, batch, sharding):
        """Embeddings of each chunk's prompt, [batch, chunk, text_len, text_dim]."""
        cfg = self.cfg
        if not cfg.train.text_encoder:
            return batch.text
        weights = params_lib.gather(params["umt5"], self.specs["umt5"], sharding.shards)
        ids, mask = (x.reshape(-1, x.shape[-1]) for x in (batch.ids, batch.mask))
        text = umt5.prompt_embeddings(
            weights, cfg.umt5, ids, mask, cfg.model.text_len, cfg.compute_dtype
        )
        return text.reshape(*batch.ids.shape[:2], *text.shape[1:])

    # ---------------------------------------------------------------------------------------------
    # The log.

    def carried_metrics(self, carried: error_recycling.Errors | None) -> dict[str, jax.Array]:
        return {} if carried is None else error_recycling.metrics(carried)

    def fields(self, network: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Unweighted errors by timestep, noisiest last; None: no chunk had such a timestep."""
        fields = dict(metrics)
        bins = zip(fields.pop("errors"), fields.pop("counts"))
        return {"error_by_level": [np.float32(e / n) if n else None for e, n in bins]} | fields


def _chunks(moment: Moment, inputs: Inputs) -> error_recycling.Chunks:
    assert moment.rows is not None
    return error_recycling.Chunks(moment.key, moment.rows, inputs.timestep_index)


def specs(cfg: config_lib.Config) -> params_lib.Tree:
    """ParamSpecs of what is trained: {"dit": ...}, or the parts of `training.trained`.

    And "umt5" if the text encoder is trained.
    """
    if cfg.train.trainable == "all":
        found = {"dit": dit.spec(cfg.model)}
    else:
        found = trained.specs(cfg.model, adapters(cfg))
    return found | ({"umt5": umt5.spec(cfg.umt5)} if cfg.train.text_encoder else {})


def adapters(cfg: config_lib.Config) -> config_lib.LoRA | None:
    """The settings of the backbone's adapters; None: it has none."""
    return cfg.distill.lora if cfg.train.trainable == "lora" else None


def optimizer(cfg: config_lib.Train) -> optax.GradientTransformation:
    """AdamW, with a linear warm-up, then a constant rate."""
    rate = cfg.learning_rate
    if cfg.warmup_steps:
        rate = optax.linear_schedule(rate / cfg.warmup_steps, rate, cfg.warmup_steps - 1)
    return adamw(
        rate, beta1=cfg.beta1, beta2=cfg.beta2, epsilon=cfg.epsilon,
        weight_decay=cfg.weight_decay, max_grad_norm=cfg.max_grad_norm,
    )  # fmt: skip


def settings(cfg: config_lib.Config, data: str) -> dict[str, Any]:
    """What a run cannot be continued with another value of, by the names of the flags.

    The mesh is not among them, nor what only later steps depend on, as the learning rate.

    Args:
      data: what tells this training data from other.
    """
    train, whole = cfg.train, ("model", "umt5")[: 1 + cfg.train.text_encoder]
    values = {f"{s}.{k}": getattr(getattr(cfg, s), k) for s in _FIXED for k in _FIXED[s]}
    for name in whole:
        values |= {f"{name}.{k}": v for k, v in config_lib.values(getattr(cfg, name)).items()}
    values |= {
        "dtype": cfg.dtype,
        "the training data": data,
        # These decide which arrays the optimiser has.
        "train.beta1 == 0": train.beta1 == 0,
        "train.weight_decay == 0": train.weight_decay == 0,
        "train.error_recycling.enabled": train.error_recycling.enabled,
    }
    if train.trainable != "all":  # runs of before this setting have no word of it
        values["train.trainable"] = train.trainable
    if train.trainable == "lora":
        values |= {f"distill.lora.{k}": v for k, v in vars(cfg.distill.lora).items()}
    if train.error_recycling.enabled:
        for name in ("buckets", "slots", "positions"):
            values[f"train.error_recycling.{name}"] = getattr(train.error_recycling, name)
    return values
