"""The streaming sampler, as pure functions of a state: compiled once, for video of any length.

    chunk_step      denoises a chunk and commits it to the cache: what offline sampling scans over
    denoise_chunk   the first half: reads the state only, so pictures can leave before the second
    commit_chunk    the second half, the clean pass; also for the chunks of an existing video
    recache         the clean pass of the visible past again, under another prompt

`Sampler` compiles them for a mesh. `sampling.session` steps them from Python, for streams that can
be directed, saved and replayed.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax import recipes as recipe_lib
from longlive_jax.diffusion import schedule, unipc
from longlive_jax.models import dit, lora
from longlive_jax.quant import kv
from longlive_jax.quant import weights as weights_lib
from longlive_jax.sampling import kv_cache
from longlive_jax.sampling import window as window_lib
from longlive_jax.sampling.kv_cache import KVCache, Past
from longlive_jax.sampling.window import Window


@struct.dataclass
class ChunkInput:
    """What the sampler is given for one chunk.

    noise: float32 [batch, frame, h, w, channel].
    text: [batch, text_len, text_dim], the chunk's prompt embedding.
    cut: bool [batch], whether the chunk starts a new shot.
    negative: [batch, text_len, text_dim] with classifier-free guidance, else None.
    first_frame: float32 [batch, 1, h, w, channel] for image-to-video, else None: the latent that
      the video's first frame is kept at. Read in chunk 0 only.
    """

    noise: jax.Array
    text: jax.Array
    cut: jax.Array
    negative: jax.Array | None = None
    first_frame: jax.Array | None = None


@struct.dataclass
class StreamState:
    """What one chunk leaves to the next. Its size does not depend on the video's length."""

    cache: KVCache
    window: Window

    @property
    def past(self) -> Past:
        """The visible past, as the transformer is given it."""
        return Past(self.cache, self.window.valid)


def chunk_step(
    params: params_lib.Tree,
    state: StreamState,
    inputs: ChunkInput,
    *,
    cfg: config_lib.Config,
    sharding: dit.Sharding = dit.Sharding(),
    precision: dit.Precision = dit.Precision(),
) -> tuple[StreamState, jax.Array]:
    """`denoise_chunk` and `commit_chunk` in one program, which reads the text once.

    Returns:
      The state and the chunk's latents, float32 [batch, frame, h, w, channel].
    """
    state = _enter_shot(state, inputs, cfg)
    transformer = _Transformer.of(params, state, inputs, cfg, sharding, precision)
    latents = _denoise(transformer, state, inputs)
    return _commit(transformer, state, latents), latents


def denoise_chunk(
    params: params_lib.Tree,
    state: StreamState,
    inputs: ChunkInput,
    *,
    cfg: config_lib.Config,
    sharding: dit.Sharding = dit.Sharding(),
    precision: dit.Precision = dit.Precision(),
) -> jax.Array:
    """Latents of the next chunk, float32 [batch, frame, h, w, channel]."""
    state = _enter_shot(state, inputs, cfg)
    return _denoise(_Transformer.of(params, state, inputs, cfg, sharding, precision), state, inputs)


def commit_chunk(
    params: params_lib.Tree,
    state: StreamState,
    latents: jax.Array,
    inputs: ChunkInput,
    *,
    cfg: config_lib.Config,
    sharding: dit.Sharding = dit.Sharding(),
    precision: dit.Precision = dit.Precision(),
) -> StreamState:
    """The state after the next chunk, whose clean latents are given; `inputs.noise` is not read."""
    state = _enter_shot(state, inputs, cfg)
    return _commit(_Transformer.of(params, state, inputs, cfg, sharding, precision), state, latents)


def recache(
    params: params_lib.Tree,
    state: StreamState,
    inputs: ChunkInput,
    *,
    cfg: config_lib.Config,
    sharding: dit.Sharding = dit.Sharding(),
    precision: dit.Precision = dit.Precision(),
) -> StreamState:
    """Runs the clean pass of the visible past again, oldest first, under `inputs.text`.

    For a prompt change inside a shot: otherwise cached keys and values keep the old prompt's
    influence until they leave the window. Each chunk sees the visible ones before it.
    """
    transformer = _Transformer.of(params, state, inputs, cfg, sharding, precision)
    window = state.window.in_order()
    slots = jnp.arange(window.chunk.shape[1])

    def again(slot, cache):
        latents = window.latents[:, slot]
        positions = _positions(window.position[:, slot], latents.shape[1], sharding)
        past = Past(cache, window.valid & (slots < slot)[None, :])
        here = jnp.full(window.chunk.shape[:1], slot, jnp.int32)
        return transformer.commit(latents, positions, past, here)

    cache = jax.lax.fori_loop(0, len(slots), again, state.cache)
    return StreamState(cache, window)


# ---------------------------------------------------------------------------------------------
# Steps of a chunk.


def _enter_shot(state, inputs, cfg):
    return state.replace(window=state.window.enter_shot(inputs.cut, cfg))


def _denoise(transformer, state, inputs):
    cfg, sharding = transformer.cfg, transformer.sharding
    sigmas, timesteps = schedule.sampling_schedule(cfg.sample.steps, cfg.video.shift)
    positions = _positions(state.window.next_position(cfg), inputs.noise.shape[1], sharding)
    given = _GivenFrame(state, inputs, sharding)

    def denoise(carry, step):
        sample, history = carry
        timestep, weights = step
        timesteps = given.timesteps(jnp.broadcast_to(timestep, positions.shape))
        velocity = transformer.velocity(given(sample), timesteps, positions, state.past)
        sample, history = unipc.step(weights, given(sample), velocity, history)
        return (sample, history), None

    start = (inputs.noise, unipc.History.start(given(inputs.noise)))
    steps = (jnp.asarray(timesteps), jnp.asarray(unipc.weights(sigmas)))
    (sample, _), _ = jax.lax.scan(denoise, start, steps)
    return given(sample)


def _commit(transformer, state, latents):
    cfg, window = transformer.cfg, state.window
    slot = window.next_slot(cfg.sample.window(cfg.model))
    first = window.next_position(cfg)
    positions = _positions(first, latents.shape[1], transformer.sharding)
    cache = transformer.commit(latents, positions, state.past, slot)
    return StreamState(cache, window.commit(slot, latents, cfg))


@dataclasses.dataclass(frozen=True)
class _Transformer:
    """The transformer under the prompts of one chunk, with and without guidance.

    text: `dit.text_keys_values` of branch * batch rows.
    """

    params: params_lib.Tree
    text: tuple
    branches: int
    cfg: config_lib.Config
    sharding: dit.Sharding
    precision: dit.Precision

    @classmethod
    def of(cls, params, state, inputs, cfg, sharding, precision):
        text = inputs.text
        if inputs.negative is not None:
            text = jnp.concatenate([text, inputs.negative])
        text = dit.text_keys_values(
            params, cfg.model, text.astype(cfg.compute_dtype),
            sharding=sharding, precision=precision,
        )  # fmt: skip
        return cls(params, text, state.cache.k.shape[1], cfg, sharding, precision)

    def velocity(self, sample, timesteps, positions, past):
        """float32 [batch, frame, h, w, channel], of `sample` at `timesteps` [batch, frame]."""
        x, timesteps, positions = map(self._branches, (sample, timesteps, positions))
        velocity = dit.denoise(
            self.params, self.cfg.model, x.astype(self.cfg.compute_dtype), timesteps, positions,
            text=self.text, cache=past, sharding=self.sharding, precision=self.precision,
        ).astype(jnp.float32)  # fmt: skip
        if self.branches == 1:
            return velocity
        prompt, negative = jnp.split(velocity, 2)
        return negative + self.cfg.sample.guidance_scale * (prompt - negative)

    def commit(self, latents, positions, past, slot) -> KVCache:
        """The cache, with keys and values of clean `latents` in `slot` int32 [batch]."""
        x, positions = self._branches(latents), self._branches(positions)
        past = dit.commit(
            self.params, self.cfg.model, x.astype(self.cfg.compute_dtype), positions,
            text=self.text, cache=past, slot=slot, sharding=self.sharding, precision=self.precision,
        )  # fmt: skip
        assert isinstance(past, Past)
        return past.cache

    def _branches(self, x):
        return x if self.branches == 1 else jnp.concatenate([x] * self.branches)


def _positions(first, local_frames, sharding):
    """Temporal positions of this device's frames of a chunk that begins at `first` [batch]."""
    return first[:, None] + _local(local_frames, sharding)[None, :]


def _local(local_frames, sharding):
    """Indices, within the chunk, of the frames that this device has."""
    rank = 0 if sharding.seq is None else jax.lax.axis_index(sharding.seq)
    return rank * local_frames + jnp.arange(local_frames, dtype=jnp.int32)


class _GivenFrame:
    """Image-to-video: keeps a video's first frame at the given latent, at timestep 0."""

    def __init__(self, state, inputs, sharding):
        self.latent = inputs.first_frame
        if self.latent is not None:
            first = _local(inputs.noise.shape[1], sharding) == 0
            self.mask = first[None, :] & (state.window.next_chunk == 0)[:, None]

    def __call__(self, sample):
        if self.latent is None:
            return sample
        return jnp.where(self.mask[..., None, None, None], self.latent, sample)

    def timesteps(self, timesteps):
        return timesteps if self.latent is None else jnp.where(self.mask, 0.0, timesteps)


# ---------------------------------------------------------------------------------------------
# Rows of a batch.


def insert(state: StreamState, one: StreamState, row: jax.Array) -> StreamState:
    """`state` with the stream of `one`, a batch of one, in row `row` int32 []."""
    return _by_row(functools.partial(_put, row), state, one)


def take(state: StreamState, row: jax.Array) -> StreamState:
    """The stream in row `row` int32 [], as a batch of one."""
    return _by_row(lambda axis, x: jax.lax.dynamic_slice_in_dim(x, row, 1, axis), state)


def _put(row, axis, whole, one):
    return jax.lax.dynamic_update_slice_in_dim(whole, one, row, axis)


def _by_row(fn, *states):
    """The state of `fn(axis, *arrays)` of each array, `axis` being that of its batch."""
    caches, windows = zip(*((state.cache, state.window) for state in states))
    return StreamState(
        cache=jax.tree.map(functools.partial(fn, 2), *caches),
        window=jax.tree.map(functools.partial(fn, 0), *windows),
    )


# ---------------------------------------------------------------------------------------------
# On a mesh.

# cuBLASLt alone multiplies: it ends a product with its bias, with GELU or with the sum that
# follows, and no other is compiled to be compared with. H200, 5B, 4 steps: a chunk takes 1.059 s,
# not 1.076, and its program is compiled in 24 s, not 110 (jax 0.11.2, 2026-11-21).
_GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


class Sampler:
    """This module's functions, compiled for a mesh.

    Parameters are what `prepare` makes of those of `dit.spec`. Frames of the chunk and heads of the
    cache are sharded over `seq`, batch over `data` and `fsdp`. A state is donated to the functions
    that return another: use what comes back. `rollout` scans `chunk_step` over stacked inputs.

    adapters: of those that parameters have beside them; None: there are none.
    """

    def __init__(
        self,
        cfg: config_lib.Config,
        mesh: jax.sharding.Mesh,
        adapters: config_lib.LoRA | None = None,
    ):
        self.cfg, self.mesh, self.adapters = cfg, mesh, adapters
        recipe = recipe_lib.get(cfg.quant.recipe)
        specs = dit.sampling_spec(cfg.model, recipe, cfg.compute_dtype, adapters=adapters)
        self.param_shardings = params_lib.shardings(specs, mesh, mesh_lib.SAMPLING_RULES)
        param_specs = params_lib.partition_specs(specs, mesh_lib.SAMPLING_RULES)
        state, inputs, latents = state_specs(cfg), input_specs(cfg), _FRAMES
        self.input_specs = inputs
        options = _GPU_OPTIONS if mesh.devices.flat[0].platform == "gpu" else None

        sharding = dit.Sharding.sampling(recipe_lib.PAYLOADS[cfg.quant.all_to_all])
        precision = dit.Precision(recipe, cfg.compute_dtype)
        stepping = {"cfg": cfg, "sharding": sharding, "precision": precision}

        def compile(fn, in_specs, out_specs, donate=(), **static):
            # Without differentiation there is nothing for varying-axes types to check.
            fn = jax.shard_map(
                functools.partial(fn, **static),
                mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False,
            )  # fmt: skip
            return jax.jit(fn, donate_argnums=donate, compiler_options=options)

        each = (param_specs, state, inputs)
        stacked = jax.tree.map(lambda s: jax.P(None, *s), (inputs, latents))
        self.step = compile(chunk_step, each, (state, latents), 1, **stepping)
        self.denoise = compile(denoise_chunk, each, latents, **stepping)
        self.commit = compile(
            commit_chunk, (param_specs, state, latents, inputs), state, 1, **stepping
        )
        self.recache = compile(recache, each, state, 1, **stepping)
        self.rollout = compile(
            _rollout, (param_specs, state, stacked[0]), (state, stacked[1]), 1, **stepping
        )
        # Of streams that share a batch, on a mesh where it is whole on every device.
        self.insert = compile(insert, (state, state, jax.P()), state, 0)
        self.take = compile(take, (state, jax.P()), state)

    def prepare(
        self, params: params_lib.Tree, adapters: params_lib.Tree | None = None
    ) -> params_lib.Tree:
        """Parameters of `dit.spec`, in compute dtype, as the programs take them.

        Placed on the mesh, weights quantised by the config's recipe (or already so), layers apart.
        With adapters, of `models.lora.specs`, if the sampler is for such.
        """
        specs, rules = dit.spec(self.cfg.model), mesh_lib.SAMPLING_RULES
        recipe, dtype = recipe_lib.get(self.cfg.quant.recipe), self.cfg.compute_dtype
        if not weights_lib.is_quantized(params):
            params = jax.device_put(params, params_lib.shardings(specs, self.mesh, rules))
            params = weights_lib.quantize_params(params, specs, recipe, self.mesh, rules, dtype)
        if self.adapters is not None:
            assert adapters is not None
            places = params_lib.shardings(lora.specs(specs, self.adapters), self.mesh, rules)
            placed = jax.device_put(jax.tree.map(lambda x: x.astype(dtype), adapters), places)
            params = lora.attach(params, placed, self.adapters.scale)
        return jax.jit(dit.layers, out_shardings=self.param_shardings)(params)

    def init_state(self, batch: int, height: int, width: int) -> StreamState:
        """The state before the first chunk. `height`, `width`: of the latents."""
        make = functools.partial(init_state, self.cfg, batch, height, width)
        shardings = jax.tree.map(lambda s: jax.NamedSharding(self.mesh, s), state_specs(self.cfg))
        return jax.jit(make, out_shardings=shardings)()

    def place(self, inputs: ChunkInput) -> ChunkInput:
        """`inputs` on the mesh; a leading axis of chunks (for `rollout`) may be there."""
        extra = inputs.cut.ndim - 1

        def put(x, spec):
            return jax.device_put(x, jax.NamedSharding(self.mesh, jax.P(*(None,) * extra, *spec)))

        return jax.tree.map(put, inputs, self.input_specs)


# One for all who stream with these settings: programs are compiled once.
sampler = functools.cache(Sampler)


def _rollout(params, state, inputs, *, cfg, sharding, precision):
    step = functools.partial(chunk_step, params, cfg=cfg, sharding=sharding, precision=precision)
    return jax.lax.scan(step, state, inputs)


def init_state(cfg: config_lib.Config, batch: int, height: int, width: int) -> StreamState:
    """The state before the first chunk. `height`, `width`: of the latents."""
    branches = 2 if cfg.sample.guided else 1
    tokens = cfg.model.chunk_frames * (height // dit.PATCH) * (width // dit.PATCH)
    return StreamState(
        cache=kv_cache.init(cfg, branches, batch, tokens, cfg.model.num_heads),
        window=window_lib.init(cfg, batch, height, width),
    )


def _spec(*axes: str | None) -> Any:  # a PartitionSpec, in an array's place
    # Of full rank: P("x") and P("x", None) are the same, and yet two entries in jit's cache.
    return mesh_lib.spec(axes, mesh_lib.SAMPLING_RULES)


_FRAMES = _spec("batch", "frame", None, None, None)


def state_specs(cfg: config_lib.Config) -> StreamState:
    """A PartitionSpec for each array of a StreamState."""
    cache = jax.eval_shape(lambda: kv_cache.init(cfg, 1, 1, 16, cfg.model.num_heads))

    def specs(table, axes):  # an array of fewer axes has the first of them
        axes = (*KVCache.AXES, *axes)
        return jax.tree.map(lambda leaf: _spec(*axes[: leaf.ndim]), table)

    k, v = map(specs, (cache.k, cache.v), kv.axes(cache.format))
    return StreamState(
        cache=cache.replace(k=k, v=v),
        window=Window(
            chunk=_spec("batch", None),
            position=_spec("batch", None),
            latents=_spec("batch", None, "frame", None, None, None),
            pinned=_spec("batch", None),
            next_chunk=_spec("batch"),
            shot=_spec("batch"),
            offset=_spec("batch"),
        ),
    )


def input_specs(cfg: config_lib.Config) -> ChunkInput:
    """A PartitionSpec for each array of a ChunkInput."""
    text = _spec("batch", None, None)
    return ChunkInput(
        noise=_FRAMES,
        text=text,
        cut=_spec("batch"),
        negative=text if cfg.sample.guided else None,
        first_frame=_spec("batch", None, None, None, None) if cfg.video.image_to_video else None,
    )


@functools.partial(jax.jit, static_argnames="shape")
def noise(
    key: jax.Array, chunks: jax.Array, samples: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """Noise of a chunk of each of these samples, both int32 [batch]: float32 [batch, *shape].

    A function of key, sample and chunk alone: neither batching nor the mesh changes it.
    """

    def one(chunk, sample):
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, sample), chunk), shape)

    return jax.vmap(one)(chunks, samples)
