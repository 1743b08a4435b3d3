"""The streaming sampler. `chunk_step` is all of it: pure, jitted once, its state donated.

Offline sampling is `lax.scan` over `chunk_step` (`Sampler.rollout`); live sampling calls it from
Python (`Sampler.stream`), where between two chunks a prompt may change, a shot may be cut or the
sampler may stop.
"""

import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
from flax import struct

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax import recipes as recipe_lib
from longlive_jax.diffusion import schedule, unipc
from longlive_jax.models import dit
from longlive_jax.quant import kv
from longlive_jax.quant import weights as weights_lib
from longlive_jax.sampling import kv_cache
from longlive_jax.sampling.kv_cache import EMPTY, KVCache


@struct.dataclass
class ChunkInput:
    """What the sampler is given for one chunk.

    noise: float32 [batch, frame, h, w, channel].
    context: [batch, text_len, text_dim], the chunk's prompt embedding.
    cut: bool [batch], whether the chunk starts a new shot.
    negative: [batch, text_len, text_dim] with classifier-free guidance, else None.
    first_frame: float32 [batch, 1, h, w, channel] for image-to-video, else None: the latent that
      the video's first frame is held at. Looked at in chunk 0 only.
    """

    noise: jax.Array
    context: jax.Array
    cut: jax.Array
    negative: jax.Array | None = None
    first_frame: jax.Array | None = None


@struct.dataclass
class StreamState:
    """What one chunk leaves to the next. Its size does not depend on the video's length.

    chunk: int32, index of the next chunk.
    shot: int32 [batch], first chunk of the newest shot, EMPTY before the first cut.
    offset: int32 [batch], temporal positions skipped by cuts so far.
    latents: [batch, slot, frame, h, w, channel], what the cache's slots were made from;
    position: int32 [batch, slot], and the temporal position of each one's first frame.
    """

    cache: KVCache
    chunk: jax.Array
    shot: jax.Array
    offset: jax.Array
    latents: jax.Array
    position: jax.Array


def chunk_step(
    params,
    state: StreamState,
    inputs: ChunkInput,
    *,
    cfg: config_lib.Config,
    sharding: dit.Sharding = dit.Sharding(),
    precision: dit.Precision = dit.Precision(),
) -> tuple[StreamState, jax.Array]:
    """Denoises one chunk and commits it to the cache.

    Returns:
      The state and the chunk's latents, float32 [batch, frame, h, w, channel].
    """
    state = _enter_shot(state, inputs.cut, cfg)
    text = _text(params, inputs, cfg, sharding, precision)
    sigmas, timesteps = schedule.sampling_schedule(cfg.sample.steps, cfg.video.shift)
    frames = _frames(state, inputs.noise.shape[1], sharding)
    held = _HeldFrame(state, inputs, sharding)

    def denoise(carry, step):
        sample, history = carry
        timestep, weights = step
        velocity = _velocity(
            params, state, text, held(sample), timestep, frames, held, cfg, sharding, precision
        )
        sample, history = unipc.step(weights, held(sample), velocity, history)
        return (sample, history), None

    start = (inputs.noise, unipc.History.start(held(inputs.noise)))
    steps = (jnp.asarray(timesteps), jnp.asarray(unipc.weights(sigmas)))
    (sample, _), _ = jax.lax.scan(denoise, start, steps)
    latents = held(sample)
    return _commit(params, state, text, latents, inputs.cut, cfg, sharding, precision), latents


def ingest(
    params,
    state: StreamState,
    inputs: ChunkInput,
    *,
    cfg: config_lib.Config,
    sharding: dit.Sharding = dit.Sharding(),
    precision: dit.Precision = dit.Precision(),
) -> StreamState:
    """Commits a chunk of an existing video; `inputs.noise` holds its clean latents."""
    state = _enter_shot(state, inputs.cut, cfg)
    text = _text(params, inputs, cfg, sharding, precision)
    return _commit(params, state, text, inputs.noise, inputs.cut, cfg, sharding, precision)


def recache(
    params,
    state: StreamState,
    inputs: ChunkInput,
    *,
    cfg: config_lib.Config,
    sharding: dit.Sharding = dit.Sharding(),
    precision: dit.Precision = dit.Precision(),
) -> StreamState:
    """Runs the clean pass of the visible past again, oldest first, under `inputs.context`.

    For a prompt change inside a shot: otherwise cached keys and values keep the old prompt's
    influence until they leave the window. Each chunk sees the visible ones before it.
    """
    text = _text(params, inputs, cfg, sharding, precision)
    old = state.cache.chunk
    order = jnp.argsort(jnp.where(old == EMPTY, jnp.iinfo(jnp.int32).max, old), axis=1)

    def sort(x):
        return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)

    chunk, latents, position = sort(old), sort(state.latents), sort(state.position)
    branches = state.cache.k.shape[1]

    def again(slot, cache):
        frames = _positions(position[:, slot], latents.shape[2], sharding)
        x = _branches(latents[:, slot], branches).astype(cfg.compute_dtype)
        slots = jnp.full(old.shape[:1], slot, jnp.int32)
        cache = dit.commit(
            params, cfg.model, x, _branches(frames, branches),
            text=text, cache=cache, slot=slots, sharding=sharding, precision=precision,
        )  # fmt: skip
        return cache.replace(chunk=cache.chunk.at[:, slot].set(chunk[:, slot]))

    cache = state.cache.replace(chunk=jnp.full_like(old, EMPTY))
    cache = jax.lax.fori_loop(0, old.shape[1], again, cache)
    return state.replace(cache=cache, latents=latents, position=position)


# ---------------------------------------------------------------------------------------------
# Steps of a chunk.


def _enter_shot(state, cut, cfg):
    cut = cut & (state.chunk > 0)
    gap = jnp.where(cut, jnp.int32(cfg.sample.rope_offset), 0)
    return state.replace(offset=state.offset + gap)


def _text(params, inputs, cfg, sharding, precision):
    """`dit.text_keys_values` of branch * batch rows."""
    context = inputs.context
    if inputs.negative is not None:
        context = jnp.concatenate([context, inputs.negative])
    context = context.astype(cfg.compute_dtype)
    return dit.text_keys_values(params, cfg.model, context, sharding=sharding, precision=precision)


def _velocity(params, state, text, sample, timestep, frames, held, cfg, sharding, precision):
    branches = state.cache.k.shape[1]
    timesteps = held.zero(jnp.broadcast_to(timestep, frames.shape))
    x, timesteps, frames = (_branches(y, branches) for y in (sample, timesteps, frames))
    velocity = dit.denoise(
        params,
        cfg.model,
        x.astype(cfg.compute_dtype),
        timesteps,
        frames,
        text=text,
        cache=state.cache,
        sharding=sharding,
        precision=precision,
    ).astype(jnp.float32)
    if branches == 1:
        return velocity
    prompt, negative = jnp.split(velocity, 2)
    return negative + cfg.sample.guidance_scale * (prompt - negative)


def _commit(params, state, text, latents, cut, cfg, sharding, precision):
    """The clean pass, then the books: which slot holds what."""
    branches = state.cache.k.shape[1]
    slot, shot = next_slot(state.cache, state.chunk, state.shot, cut, cfg)
    frames = _frames(state, latents.shape[1], sharding)
    x = _branches(latents, branches).astype(cfg.compute_dtype)
    cache = dit.commit(
        params, cfg.model, x, _branches(frames, branches),
        text=text, cache=state.cache, slot=slot, sharding=sharding, precision=precision,
    )  # fmt: skip
    here = jnp.arange(cache.chunk.shape[1])[None, :] == slot[:, None]
    wide = here.reshape(*here.shape, *(1,) * (state.latents.ndim - 2))
    first = state.chunk * cfg.model.chunk_frames + state.offset
    return StreamState(
        cache=cache.replace(chunk=jnp.where(here, state.chunk, cache.chunk)),
        chunk=state.chunk + 1,
        shot=shot,
        offset=state.offset,
        latents=jnp.where(wide, latents[:, None].astype(state.latents.dtype), state.latents),
        position=jnp.where(here, first[:, None], state.position),
    )


def next_slot(
    cache: KVCache, chunk: jax.Array, shot: jax.Array, cut: jax.Array, cfg: config_lib.Config
) -> tuple[jax.Array, jax.Array]:
    """Where `chunk` goes: the slot that no later chunk may see; and the newest shot's first chunk.

    The sinks stay, and with `multi_shot_sink` the first chunk of the newest shot, which a cut makes
    `chunk` itself; of the others the oldest goes.

    Args:
      shot: int32 [batch], first chunk of the newest shot so far; cut: bool [batch].

    Returns:
      slot and shot, int32 [batch].
    """
    shot = jnp.where(cut & (chunk > 0), chunk, shot)
    held, sample = cache.chunk, cfg.sample
    sink = held < sample.sink_frames // cfg.model.chunk_frames
    if sample.multi_shot_sink and sample.sink_frames:
        sink |= held == shot[:, None]
    return cache.oldest(sink & (held != EMPTY)), shot


def _frames(state, local_frames, sharding):
    """Temporal positions of this device's frames of the chunk, int32 [batch, frame]."""
    size = 1 if sharding.seq is None else jax.lax.axis_size(sharding.seq)
    return _positions(state.chunk * (local_frames * size) + state.offset, local_frames, sharding)


def _positions(first, local_frames, sharding):
    return first[:, None] + _local(local_frames, sharding)[None, :]


def _local(local_frames, sharding):
    """Indices, within the chunk, of the frames that this device holds."""
    rank = 0 if sharding.seq is None else jax.lax.axis_index(sharding.seq)
    return rank * local_frames + jnp.arange(local_frames, dtype=jnp.int32)


class _HeldFrame:
    """Image-to-video: keeps the video's first frame at the given latent, at timestep 0."""

    def __init__(self, state, inputs, sharding):
        self.latent = inputs.first_frame
        if self.latent is not None:
            first = _local(inputs.noise.shape[1], sharding) == 0
            self.mask = (first & (state.chunk == 0))[None, :]

    def __call__(self, sample):
        if self.latent is None:
            return sample
        return jnp.where(self.mask[..., None, None, None], self.latent, sample)

    def zero(self, timesteps):
        return timesteps if self.latent is None else jnp.where(self.mask, 0.0, timesteps)


def _branches(x, branches):
    return x if branches == 1 else jnp.concatenate([x] * branches)


# ---------------------------------------------------------------------------------------------
# On a mesh.

# cuBLASLt alone multiplies: it ends a product with its bias, with GELU or with the sum that
# follows, and no other is compiled to be compared with. H200, 5B, 4 steps: a chunk takes 1.059 s,
# not 1.076, and its program is compiled in 24 s, not 110 (jax 0.11.2, 2026-11-21).
_GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


class Sampler:
    """`chunk_step` and its companions, compiled for a mesh; parameters in, latents out.

    Parameters are what `prepare` makes of those of `dit.spec`.

    Frames of the chunk and heads of the cache are sharded over `seq`, batch over `data` and `fsdp`.
    States passed in are donated: use what comes back.
    """

    def __init__(self, cfg: config_lib.Config, mesh: jax.sharding.Mesh):
        self.cfg, self.mesh = cfg, mesh
        recipe = recipe_lib.get(cfg.quant.recipe)
        specs = dit.sampling_spec(cfg.model, recipe, cfg.compute_dtype)
        self.param_shardings = params_lib.shardings(specs, mesh, mesh_lib.SAMPLING_RULES)
        param_specs = params_lib.partition_specs(specs, mesh_lib.SAMPLING_RULES)
        state, inputs, latents = state_specs(cfg), input_specs(cfg), _FRAMES
        self.input_specs = inputs
        options = _GPU_OPTIONS if mesh.devices.flat[0].platform == "gpu" else None

        def compile(fn, in_specs, out_specs):
            sharding = dit.Sharding.sampling(recipe_lib.PAYLOADS[cfg.quant.all_to_all])
            precision = dit.Precision(recipe, cfg.compute_dtype)
            fn = functools.partial(fn, cfg=cfg, sharding=sharding, precision=precision)
            # Without differentiation there is nothing for varying-axes types to check.
            fn = jax.shard_map(
                fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
            )
            return jax.jit(fn, donate_argnums=1, compiler_options=options)

        each = (param_specs, state, inputs)
        self.step = compile(chunk_step, each, (state, latents))
        self.ingest = compile(ingest, each, state)
        self.recache = compile(recache, each, state)
        stacked = jax.tree.map(lambda s: jax.P(None, *s), (inputs, latents))
        self.rollout = compile(_rollout, (param_specs, state, stacked[0]), (state, stacked[1]))

    def prepare(self, params: params_lib.Tree) -> params_lib.Tree:
        """Parameters of `dit.spec`, in compute dtype, as the programs take them.

        Placed on the mesh, weights quantised by the config's recipe (or already so), layers apart.
        """
        specs, rules = dit.spec(self.cfg.model), mesh_lib.SAMPLING_RULES
        recipe, dtype = recipe_lib.get(self.cfg.quant.recipe), self.cfg.compute_dtype
        if not weights_lib.is_quantized(params):
            params = jax.device_put(params, params_lib.shardings(specs, self.mesh, rules))
            params = weights_lib.quantize_params(params, specs, recipe, self.mesh, rules, dtype)
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

    def stream(self, params, state: StreamState, inputs: Iterable[ChunkInput]) -> Iterator[tuple]:
        """Yields (state, latents) for each input, drawn only when it is needed.

        A consumer that wants to change the prompt just lets its iterable of inputs do so.
        """
        for chunk in inputs:
            state, latents = self.step(params, state, self.place(chunk))
            yield state, latents


def _rollout(params, state, inputs, *, cfg, sharding, precision):
    step = functools.partial(chunk_step, params, cfg=cfg, sharding=sharding, precision=precision)
    return jax.lax.scan(step, state, inputs)


def init_state(cfg: config_lib.Config, batch: int, height: int, width: int) -> StreamState:
    branches = 2 if guided(cfg) else 1
    tokens = cfg.model.chunk_frames * (height // dit.PATCH) * (width // dit.PATCH)
    cache = kv_cache.init(cfg, branches, batch, tokens, cfg.model.num_heads)
    slots = cache.chunk.shape[1]
    latents = (batch, slots, cfg.model.chunk_frames, height, width, cfg.model.in_dim)
    return StreamState(
        cache=cache,
        chunk=jnp.int32(0),
        shot=jnp.full((batch,), EMPTY, jnp.int32),
        offset=jnp.zeros((batch,), jnp.int32),
        latents=jnp.zeros(latents, cfg.compute_dtype),
        position=jnp.zeros((batch, slots), jnp.int32),
    )


def guided(cfg: config_lib.Config) -> bool:
    """Whether classifier-free guidance is on (Ho and Salimans, arXiv 2207.12598)."""
    return cfg.sample.guidance_scale != 1.0


def _spec(*axes: str | None) -> jax.P:
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
        cache=cache.replace(
            k=k,
            v=v,
            chunk=_spec("batch", None),
        ),
        chunk=jax.P(),
        shot=_spec("batch"),
        offset=_spec("batch"),
        latents=_spec("batch", None, "frame", None, None, None),
        position=_spec("batch", None),
    )


def input_specs(cfg: config_lib.Config) -> ChunkInput:
    """A PartitionSpec for each array of a ChunkInput."""
    text = _spec("batch", None, None)
    return ChunkInput(
        noise=_FRAMES,
        context=text,
        cut=_spec("batch"),
        negative=text if guided(cfg) else None,
        first_frame=_spec("batch", None, None, None, None) if cfg.video.image_to_video else None,
    )


@functools.partial(jax.jit, static_argnames="shape")
def noise(key: jax.Array, chunk: int, samples: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Noise of one chunk of these samples (int32 [batch]), float32 [batch, *shape].

    A function of key, sample and chunk alone: neither batching nor the mesh changes it.
    """

    def one(sample):
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, sample), chunk), shape)

    return jax.vmap(one)(samples)
