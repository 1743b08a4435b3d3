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
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax import recipes as recipe_lib
from longlive_jax.diffusion import solvers, unipc
from longlive_jax.models import dit, lora
from longlive_jax.quant import kv
from longlive_jax.quant import weights as weights_lib
from longlive_jax.sampling import actions as actions_lib
from longlive_jax.sampling import kv_cache
from longlive_jax.sampling import window as window_lib
from longlive_jax.sampling.actions import ActionState
from longlive_jax.sampling.kv_cache import KVCache, Past
from longlive_jax.sampling.transformer import (
    ChunkTransformer,
    GivenFrame,
    local_frames,
    positions_of,
)
from longlive_jax.sampling.window import Window

_SELF = dit.SELF_ATTENTION.name


@struct.dataclass
class ChunkInput:
    """What the sampler is given for one chunk.

    noise: float32 [batch, frame, h, w, channel].
    text: [batch, text_len, text_dim], the chunk's prompt embedding.
    cut: bool [batch], whether the chunk starts a new shot.
    negative: [batch, text_len, text_dim] with classifier-free guidance, else None.
    guidance: float32 [batch], each row's scale of it; None: the config's. Without a negative prompt
      it is not read.
    first_frame: float32 [batch, 1, h, w, channel] for image-to-video, else None: the latent that
      the video's first frame is kept at. Read in chunk 0 only.
    renoise: float32 [step, batch, frame, h, w, channel], each step's new noise, if the solver
      takes any, else None; the last one is not used.
    actions: by path, "keyboard" and "mouse", float32 [batch, 4 * frame, dim], four vectors a
      latent, as `models.actions.of_chunk` cuts them; None without an action path.
    """

    noise: jax.Array
    text: jax.Array
    cut: jax.Array
    negative: jax.Array | None = None
    first_frame: jax.Array | None = None
    renoise: jax.Array | None = None
    actions: Mapping[str, jax.Array] | None = None
    guidance: jax.Array | None = None


class StreamState(struct.PyTreeNode):
    """What one chunk leaves to the next. Its size does not depend on the video's length."""

    cache: KVCache
    window: Window
    actions: ActionState | None = None

    @property
    def past(self) -> dit.Caches:
        """The visible past, as the transformer is given it."""
        own = Past(self.cache, self.window.valid)
        if self.actions is None:
            return own
        return {_SELF: own, **self.actions.pasts(self.window.next_chunk)}


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
    state = enter_shot(state, inputs, cfg)
    transformer = ChunkTransformer.of(params, state, inputs, cfg, sharding, precision)
    latents = _denoise(transformer, state, inputs)
    return commit_latents(transformer, state, latents), latents


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
    state = enter_shot(state, inputs, cfg)
    return _denoise(
        ChunkTransformer.of(params, state, inputs, cfg, sharding, precision), state, inputs
    )


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
    state = enter_shot(state, inputs, cfg)
    return commit_latents(
        ChunkTransformer.of(params, state, inputs, cfg, sharding, precision), state, latents
    )


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
    transformer = ChunkTransformer.of(params, state, inputs, cfg, sharding, precision)
    window = state.window.in_order()
    slots = jnp.arange(window.chunk.shape[1])

    def again(slot, carry):
        cache, actions = carry
        latents, chunk = window.latents[:, slot], window.chunk[:, slot]
        positions = positions_of(window.position[:, slot], latents.shape[1], sharding)
        past: Any = Past(cache, window.valid & (slots < slot)[None, :])
        here = jnp.full(chunk.shape, slot, jnp.int32)
        if actions is None or transformer.actions is None:
            return transformer.commit(latents, positions, past, here)[_SELF].cache, actions
        of_chunk = jax.tree.map(lambda x: x[:, slot], window.actions)
        frames = local_frames(latents.shape[1], sharding)
        then = dataclasses.replace(
            transformer, actions=transformer.actions.past(cfg, of_chunk, chunk, frames)
        )
        after = then.commit(latents, positions, {_SELF: past, **actions.pasts(chunk)}, here)
        own = window.valid[:, slot]
        if cfg.sample.memory.references:  # which were made under no actions
            own &= chunk > window_lib.EMPTY
        return after[_SELF].cache, actions.commit(after, chunk, own)

    # Of the latents before a gap the action path's caches have nothing then.
    actions = None if state.actions is None else state.actions.empty()
    cache, actions = jax.lax.fori_loop(0, len(slots), again, (state.cache, actions))
    return StreamState(cache, window, actions)


# ---------------------------------------------------------------------------------------------
# Steps of a chunk.


def enter_shot(state: StreamState, inputs: ChunkInput, cfg: config_lib.Config) -> StreamState:
    """The state in which the next chunk is denoised: in rows that cut, of a new shot."""
    return state.replace(window=state.window.enter_shot(inputs.cut, cfg))


def _denoise(transformer, state, inputs):
    cfg, sharding = transformer.cfg, transformer.sharding
    solver = solvers.solver(cfg.sample, cfg.video)
    positions = positions_of(state.window.next_position(cfg), inputs.noise.shape[1], sharding)
    given = GivenFrame(state, inputs, sharding)

    def denoise(carry, step):
        sample, history = carry
        timestep, row, fresh = step
        timesteps = given.timesteps(jnp.broadcast_to(timestep, positions.shape))
        velocity = transformer.velocity(given(sample), timesteps, positions, state.past)
        sample, history = solver.step(row, given(sample), velocity, history, fresh)
        return (sample, history), None

    start = (inputs.noise, unipc.History.start(given(inputs.noise)))
    steps = jnp.asarray(solver.timesteps), jnp.asarray(solver.rows), inputs.renoise
    (sample, _), _ = jax.lax.scan(denoise, start, steps)
    return given(sample)


def commit_latents(
    transformer: ChunkTransformer, state: StreamState, latents: jax.Array
) -> StreamState:
    """The clean pass: the state after the chunk of these latents, whose shot is entered."""
    cfg, window = transformer.cfg, state.window
    slot = window.next_slot(cfg.sample.window(cfg.model))
    first = window.next_position(cfg)
    positions = positions_of(first, latents.shape[1], transformer.sharding)
    after = transformer.commit(latents, positions, state.past, slot)
    given, actions = transformer.actions, state.actions
    if given is None or actions is None:
        return StreamState(after[_SELF].cache, window.commit(slot, latents, cfg))
    actions = actions.commit(after, window.next_chunk).replace(before=given.before)
    window = window.commit(slot, latents, cfg, given.windows)
    return StreamState(after[_SELF].cache, window, actions)


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
    by_row, by_table = functools.partial(fn, 0), functools.partial(fn, 2)
    actions = [state.actions for state in states]
    if actions[0] is not None:
        rest = jax.tree.map(by_row, *(x.replace(caches={}) for x in actions))
        caches = jax.tree.map(by_table, *(dict(x.caches) for x in actions))
        actions = [rest.replace(caches=caches)]
    return StreamState(
        cache=jax.tree.map(by_table, *(state.cache for state in states)),
        window=jax.tree.map(by_row, *(state.window for state in states)),
        actions=actions[0],
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
        self.param_specs = params_lib.partition_specs(specs, mesh_lib.SAMPLING_RULES)
        state, inputs, latents = state_specs(cfg), input_specs(cfg), _FRAMES
        self.input_specs = inputs
        sharding = dit.Sharding.sampling(recipe_lib.PAYLOADS[cfg.quant.all_to_all])
        # What functions that run the transformer are given beside arrays.
        self.stepping = {
            "cfg": cfg, "sharding": sharding,
            "precision": dit.Precision(recipe, cfg.compute_dtype),
        }  # fmt: skip
        compile, stepping = self.compile, self.stepping
        each = (self.param_specs, state, inputs)
        stacked = jax.tree.map(lambda s: jax.P(None, *s), (inputs, latents))
        self.step = compile(chunk_step, each, (state, latents), 1, **stepping)
        self.denoise = compile(denoise_chunk, each, latents, **stepping)
        self.commit = compile(
            commit_chunk, (self.param_specs, state, latents, inputs), state, 1, **stepping
        )
        self.recache = compile(recache, each, state, 1, **stepping)
        self.rollout = compile(
            _rollout, (self.param_specs, state, stacked[0]), (state, stacked[1]), 1, **stepping
        )
        # Of streams that share a batch, on a mesh where it is whole on every device.
        self.insert = compile(insert, (state, state, jax.P()), state, 0)
        self.take = compile(take, (state, jax.P()), state)

    def compile(self, fn, in_specs, out_specs, donate=(), **static) -> Any:
        """`fn(*arrays, **static)` as a program of the mesh, manual on all its axes.

        donate: which of its arguments are donated.
        """
        options = _GPU_OPTIONS if self.mesh.devices.flat[0].platform == "gpu" else None
        # Without differentiation there is nothing for varying-axes types to check.
        fn = jax.shard_map(
            functools.partial(fn, **static),
            mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False,
        )  # fmt: skip
        return jax.jit(fn, donate_argnums=donate, compiler_options=options)

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
        return _beginning(self.cfg, self.mesh, batch, height, width)()

    def place(self, inputs: ChunkInput) -> ChunkInput:
        """`inputs` on the mesh; a leading axis of chunks (for `rollout`) may be there."""
        extra = inputs.cut.ndim - 1

        def put(spec, x):
            if x is None:  # the config's guidance
                return None
            return jax.device_put(x, jax.NamedSharding(self.mesh, jax.P(*(None,) * extra, *spec)))

        return jax.tree.map(put, self.input_specs, inputs)


# One for all who stream with these settings: programs are compiled once.
sampler = functools.cache(Sampler)


@functools.cache
def _beginning(cfg, mesh, batch, height, width):
    """The program of `init_state`: made anew for each stream it would stay in JAX's caches."""
    make = functools.partial(init_state, cfg, batch, height, width)
    shardings = jax.tree.map(lambda s: jax.NamedSharding(mesh, s), state_specs(cfg))
    return jax.jit(make, out_shardings=shardings)


def _rollout(params, state, inputs, *, cfg, sharding, precision):
    step = functools.partial(chunk_step, params, cfg=cfg, sharding=sharding, precision=precision)
    return jax.lax.scan(step, state, inputs)


def init_state(cfg: config_lib.Config, batch: int, height: int, width: int) -> StreamState:
    """The state before the first chunk. `height`, `width`: of the latents."""
    branches = cfg.branches
    tokens = cfg.model.chunk_frames * (height // dit.PATCH) * (width // dit.PATCH)
    return StreamState(
        cache=kv_cache.init(cfg, branches, batch, tokens, cfg.model.num_heads),
        window=window_lib.init(cfg, batch, height, width),
        actions=actions_lib.init(cfg, branches, batch, tokens // cfg.model.chunk_frames),
    )


def _spec(*axes: str | None) -> Any:  # a PartitionSpec, in an array's place
    # Of full rank: P("x") and P("x", None) are the same, and yet two entries in jit's cache.
    return mesh_lib.spec(axes, mesh_lib.SAMPLING_RULES)


_FRAMES = _spec("batch", "frame", None, None, None)
_STEPS = _spec(None, "batch", "frame", None, None, None)


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
            actions=actions_lib.window_specs(cfg),
        ),
        actions=actions_lib.specs(cfg),
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
        renoise=_STEPS if cfg.sample.solver == "x0_renoise" else None,
        actions=actions_lib.input_specs(cfg),
        guidance=_spec("batch") if cfg.sample.guided else None,
    )


@functools.partial(jax.jit, static_argnames="shape")
def noise(
    key: jax.Array, chunks: jax.Array, samples: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """Noise of a chunk of each of these samples, both int32 [batch]: float32 [batch, *shape].

    A function of key, sample and chunk alone: neither batching nor the mesh changes it.
    """

    return _noise(key, chunks, samples, shape)


@functools.partial(jax.jit, static_argnames=("shape", "steps"))
def renoise(
    key: jax.Array, chunks: jax.Array, samples: jax.Array, shape: tuple[int, ...], steps: int
) -> jax.Array:
    """As `noise`, of each of a chunk's steps: float32 [step, batch, *shape]."""

    def one(step):
        return _noise(jax.random.fold_in(key, _RENOISE + step), chunks, samples, shape)

    return jax.vmap(one)(jnp.arange(steps))


_RENOISE = 2**16  # keys from here on are of steps


def _noise(key, chunks, samples, shape):
    def one(chunk, sample):
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, sample), chunk), shape)

    return jax.vmap(one)(chunks, samples)
