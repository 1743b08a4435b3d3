"""One training step by teacher forcing, as a pure function of state and batch.

Each chunk of a video has its own noise level, and the model predicts each chunk's velocity given
the clean chunks before it: the whole video in one forward (LongLive-2.0, arXiv 2605.18739, section
3). The forward and its gradient are one fully manual `shard_map`: chunks over `seq`, an all-to-all
around attention and nothing else between devices inside a block; parameters are gathered a layer
at a time, and their gradients are scattered back and summed in float32.
"""

import jax
import jax.numpy as jnp
import optax
from flax import struct

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax import recipes as recipe_lib
from longlive_jax.diffusion import losses, schedule
from longlive_jax.models import dit, umt5
from longlive_jax.training import draws as draws_lib
from longlive_jax.training import error_recycling
from longlive_jax.training import state as state_lib
from longlive_jax.training.state import Batch, TrainState

BINS = 10  # of noise levels, in the report
_CHUNKS = mesh_lib.spec(("batch", "chunk"))
_LATENTS = mesh_lib.spec(("batch", "chunk", None, None, None, None))


class Told(struct.PyTreeNode):
    """What a batch tells, float32; the sum over a step's batches is what the step tells.

    loss: weighted, and averaged over all the step's frames that bear loss.
    errors, counts: [BINS], unweighted squared errors of frames, summed, and the frames' number, by
      timestep: bin i is from 1000 i / BINS to 1000 (i + 1) / BINS.
    injected: int32, chunks that recycled errors were added to; None without error recycling.
    """

    loss: jax.Array
    errors: jax.Array
    counts: jax.Array
    injected: error_recycling.Counts | None = None


class Report(struct.PyTreeNode):
    """What a step tells. grad_norm: float32, before clipping. bad: int32 [2], TrainState's.
    recycling: scalars of error_recycling.metrics; empty without it.
    """

    told: Told
    grad_norm: jax.Array
    bad: jax.Array
    recycling: dict[str, jax.Array]


class _Inputs(struct.PyTreeNode):
    """One batch, ready for the model. Latents are float32 [batch, chunk, frame, h, w, channel]."""

    data: jax.Array  # what the model should find
    clean: jax.Array  # what noise is added to: the data, perhaps with a recycled error
    noise: jax.Array
    context: jax.Array  # what later chunks see of this one
    levels: jax.Array  # int32 [batch, chunk]
    context_levels: jax.Array | None
    rounding: jax.Array | None  # keys [batch, chunk], see draws.Draws


# cuBLASLt alone multiplies, and no tiling is weighed for Triton. Four H200, 5B, 96 latents: a step
# takes 7.29 s, as with both, and is compiled in 11 s, not 72 (jax 0.11.2, 2026-11-22).
_GPU_OPTIONS = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_disable_hlo_passes": "triton-softmax-rewriter",
}


class Step:
    """`step(state, batches) -> (state, Report)`, compiled for a mesh; the state is donated.

    Each array of `batches` has a leading axis of train.accumulation batches and lies as
    `batch_abstract` says.
    """

    def __init__(self, cfg: config_lib.Config, mesh: jax.sharding.Mesh):
        self.cfg, self.mesh = cfg, mesh
        self.specs = state_lib.specs(cfg)
        self.optimizer = state_lib.optimizer(cfg.train)
        self.table = schedule.training_schedule(cfg.video.shift)
        # Spelled out, or the state that comes back would be another entry in jit's cache.
        place = jax.tree.map(lambda x: x.sharding, state_lib.abstract(cfg, mesh))
        options = _GPU_OPTIONS if mesh.devices.flat[0].platform == "gpu" else None
        self.step = jax.jit(
            self._step, donate_argnums=0, out_shardings=(place, None), compiler_options=options
        )

    def batch_abstract(self) -> Batch:
        """Shapes, dtypes and shardings of a step's batches."""
        cfg = self.cfg
        lead = (cfg.train.accumulation, cfg.train.batch_size, state_lib.chunks(cfg))
        words = (*lead, cfg.model.text_len)
        trained = cfg.train.text_encoder

        def array(shape, dtype):
            spec = jax.P(None, *_CHUNKS, *(None,) * (len(shape) - 3))
            return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(self.mesh, spec))

        return Batch(
            latents=array(lead + state_lib.chunk_shape(cfg), cfg.compute_dtype),
            real=array(lead, jnp.bool_),
            context=None if trained else array((*words, cfg.model.text_dim), cfg.compute_dtype),
            ids=array(words, jnp.int32) if trained else None,
            mask=array(words, jnp.int32) if trained else None,
        )

    # ---------------------------------------------------------------------------------------------
    # The step, on global arrays.

    def _step(self, state: TrainState, batches: Batch) -> tuple[TrainState, Report]:
        cfg = self.cfg.train
        key = jax.random.fold_in(jax.random.key(cfg.seed), state.step)
        frames = jnp.sum(batches.real, dtype=jnp.float32) * self.cfg.model.chunk_frames
        if self.cfg.video.image_to_video:
            frames -= cfg.accumulation * cfg.batch_size  # the given first frames
        count = jnp.maximum(frames, 1.0)

        def one(errors, number, batch):
            rows = number * cfg.batch_size + jnp.arange(cfg.batch_size, dtype=jnp.int32)
            return self._batch(state, errors, key, rows, batch, count)

        if cfg.accumulation == 1:
            batch = jax.tree.map(lambda x: jax.lax.squeeze(x, (0,)), batches)
            errors, (gradient, told) = one(state.errors, jnp.int32(0), batch)
        else:

            def add(carry, numbered):
                errors, sums = carry
                errors, more = one(errors, *numbered)
                return (errors, jax.tree.map(jnp.add, sums, more)), None

            sums = jax.tree.map(jnp.zeros_like, state.params), self._nothing_told()
            numbers = jnp.arange(cfg.accumulation, dtype=jnp.int32)
            (errors, (gradient, told)), _ = jax.lax.scan(
                add, (state.errors, sums), (numbers, batches)
            )
        return self._update(state, gradient, told, errors)

    def _batch(self, state, errors, key, rows, batch, count):
        """Gradient and report of one batch, and the error rings after it."""
        cfg = self.cfg.train.error_recycling
        draws = draws_lib.draw(self.cfg, self.mesh, key, rows, batch.latents.shape)
        inputs, injected = self._inputs(errors, key, rows, batch, draws, state.step)
        gradient, told, found = self._gradient(state.params, batch, inputs, count)
        if injected is not None:
            kept = jnp.logical_and(batch.real, injected.kept)
            errors = error_recycling.store(cfg, errors, key, rows, draws.levels, kept, *found)
            told = told.replace(injected=injected.counts)
        return errors, (gradient, told)

    def _inputs(self, errors, key, rows, batch, draws, step):
        data = batch.latents.astype(jnp.float32)
        context = data
        if draws.context_levels is not None:
            context = self._context(data, draws)
        inputs = _Inputs(
            data, data, draws.noise, context, draws.levels, draws.context_levels, draws.rounding
        )
        if not self.cfg.train.error_recycling.enabled:
            return inputs, None
        injected = error_recycling.inject(
            self.cfg.train.error_recycling, errors, key, step, rows, draws.levels,
            clean=data, noise=draws.noise, context=context,
        )  # fmt: skip
        inputs = inputs.replace(
            clean=injected.clean, noise=injected.noise, context=injected.context
        )
        return inputs, injected

    def _context(self, data, draws):
        def local(data, noise, levels):
            sigma = jnp.asarray(self.table.sigmas)[levels][..., None]
            return losses.add_noise(data, noise, sigma)

        return self._local(local, (_LATENTS, _LATENTS, _CHUNKS), _LATENTS)(
            data, draws.context_noise, draws.context_levels
        )

    def _update(self, state, gradient, told, errors):
        """Optimiser and average; or, where something is not finite, the old state."""
        cfg = self.cfg.train
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradient)))
        good = jnp.isfinite(told.loss) & jnp.isfinite(norm)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an int32
            updates, slots = self.optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        step = state.step + 1
        decay = jnp.where(step > cfg.ema_start, jnp.float32(cfg.ema_decay), jnp.float32(0))
        average = optax.incremental_update(params, state.average, 1 - decay)
        in_row = jnp.where(good, 0, state.bad[1] + 1)
        bad = jnp.stack([state.bad[0] + jnp.where(good, 0, 1), in_row])
        new = (params, slots, average)
        old = (state.params, state.optimizer, state.average)
        new = jax.tree.map(lambda new, old: jnp.where(good, new, old), new, old)
        recycling = {}
        if errors is not None:  # the rings take nothing that is not finite
            recycling = error_recycling.metrics(errors, told.injected)
        return TrainState(step, *new, errors, bad), Report(told, norm, bad, recycling)

    def _nothing_told(self):
        zeros = jnp.zeros((BINS,), jnp.float32)
        injected = None
        if self.cfg.train.error_recycling.enabled:
            injected = error_recycling.Counts(*(jnp.int32(0),) * 3)
        return Told(jnp.float32(0), zeros, zeros, injected)

    # ---------------------------------------------------------------------------------------------
    # The forward and its gradient, on each device's chunks.

    def _gradient(self, params, batch, inputs, count):
        """Gradient, report, and the errors of prediction (latent, noise) if they are recycled."""
        specs = params_lib.partition_specs(self.specs)
        like = jax.tree.map(lambda x: jax.P(*_CHUNKS, *(None,) * (x.ndim - 2)), (batch, inputs))
        found = (_LATENTS, _LATENTS) if self.cfg.train.error_recycling.enabled else None
        told = jax.tree.map(lambda _: jax.P(), self._nothing_told().replace(injected=None))
        return self._local(self._local_gradient, (specs, *like, jax.P()), (specs, told, found))(
            params, batch, inputs, count
        )

    def _local(self, function, in_specs, out_specs):
        # Gradients are reduced by hand, so varying-axes types have nothing to do.
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def _local_gradient(self, params, batch, inputs, count):
        recipe = recipe_lib.get(self.cfg.quant.recipe)
        sharding = dit.Sharding.training()
        precision = dit.Precision(recipe, self.cfg.compute_dtype)

        def loss(params):
            return self._loss(params, batch, inputs, count, sharding, precision)

        (_, (told, found)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return sharding.sum_gradients(gradient, self.specs), sharding.sum(told), found

    def _loss(self, params, batch, inputs, count, sharding, precision):
        cfg, dtype = self.cfg, self.cfg.compute_dtype
        local_chunks, chunk_frames = batch.latents.shape[1:3]
        chunk = jax.lax.axis_index(mesh_lib.SEQ) * local_chunks + jnp.arange(local_chunks)
        frames = chunk[:, None] * chunk_frames + jnp.arange(chunk_frames)[None]
        frames = jnp.broadcast_to(frames[None], batch.latents.shape[:3]).astype(jnp.int32)

        sigmas, timesteps, weights = (jnp.asarray(x)[inputs.levels] for x in self.table)
        sigma = jnp.broadcast_to(sigmas[..., None], frames.shape)
        timestep = jnp.broadcast_to(timesteps[..., None], frames.shape)
        context, context_timestep = inputs.context, jnp.zeros_like(timestep)
        if inputs.context_levels is not None:
            level = jnp.asarray(self.table.timesteps)[inputs.context_levels]
            context_timestep = jnp.broadcast_to(level[..., None], frames.shape)
        noisy = losses.add_noise(inputs.clean, inputs.noise, sigma)
        target = inputs.noise - inputs.data
        bears_loss = jnp.broadcast_to(batch.real[..., None], frames.shape)
        if cfg.video.image_to_video:
            given = frames == 0  # the image: clean in both copies, and nothing to learn
            sigma, timestep, context_timestep = (
                jnp.where(given, 0.0, x) for x in (sigma, timestep, context_timestep)
            )
            shown = given[..., None, None, None]
            noisy, context = (jnp.where(shown, inputs.data, x) for x in (noisy, context))
            target = jnp.where(shown, 0.0, target)
            bears_loss &= ~given

        shared = dict(
            text=self._text(params, batch, sharding), sharding=sharding, precision=precision,
            remat=cfg.train.remat, key=inputs.rounding,
        )  # fmt: skip
        if cfg.train.teacher_forcing:
            velocity = dit.teacher_forcing(
                params["dit"], cfg.model, context.astype(dtype), noisy.astype(dtype), timestep,
                frames, clean_timesteps=context_timestep, **shared,
            )  # fmt: skip
        else:
            velocity = dit.block_causal(
                params["dit"], cfg.model, noisy.astype(dtype), timestep, frames, **shared
            )
        error = losses.squared_error(velocity, target)
        mask = bears_loss.astype(jnp.float32)
        loss = jnp.sum(error * weights[..., None] * mask) / count
        bin_of = jnp.minimum(timestep * BINS / 1000, BINS - 1).astype(jnp.int32)
        bins = jax.nn.one_hot(bin_of, BINS) * mask[..., None]
        sums = (jnp.sum(x, axis=(0, 1, 2)) for x in (bins * error[..., None], bins))
        found = None
        if cfg.train.error_recycling.enabled:
            velocity = velocity.astype(jnp.float32)
            found = (
                losses.clean_of(noisy, velocity, sigma) - inputs.data,
                (velocity - target) * (1 - sigma)[..., None, None, None],
            )
        return loss, (Told(loss, *sums), found)

    def _text(self, params, batch, sharding):
        """Embeddings of each chunk's prompt, [batch, chunk, text_len, text_dim]."""
        cfg = self.cfg
        if not cfg.train.text_encoder:
            return batch.context
        weights = params_lib.gather(params["umt5"], self.specs["umt5"], sharding.shards)
        ids, mask = (x.reshape(-1, x.shape[-1]) for x in (batch.ids, batch.mask))
        text = umt5.prompt_embeddings(
            weights, cfg.umt5, ids, mask, cfg.model.text_len, cfg.compute_dtype
        )
        return text.reshape(*batch.ids.shape[:2], *text.shape[1:])
