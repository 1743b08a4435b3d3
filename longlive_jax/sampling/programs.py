"""Every program that streaming runs, from shapes alone: for compiling before there are weights.

What is lowered here must be, to the bit, what `stream`, `decode` and `umt5` lower when they run:
only then does JAX's persistent compilation cache hand one to the other.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax import recipes as recipe_lib
from longlive_jax.config import TEMPORAL_COMPRESSION
from longlive_jax.models import actions, dit, umt5, vae, vae_spec
from longlive_jax.sampling import decode, stream
from longlive_jax.sampling import memory as memory_lib

Trace = Callable[[], jax.stages.Traced]


def programs(
    cfg: config_lib.Config, mesh: jax.sharding.Mesh, vae_mesh: jax.sharding.Mesh, batch: int
) -> dict[str, Trace]:
    """A function by name that traces each program, the slow ones to compile first.

    Those of videos of video.height x video.width, `batch` of them together: from text, from a
    first frame unless all are (`video.image_to_video`), and continued. Nothing is allocated.

    Raises:
      InputError: `vae_mesh` does not divide the batch or the width.
    """
    size = cfg.video.latent_size
    vae_spec.check_mesh(vae_mesh, batch, size[1])
    return dict(
        [
            *_decoding(cfg, vae_mesh, batch, size),
            *(_encoding(cfg, vae_mesh, batch, size) if _encodes(cfg) else ()),
            *_stream(cfg, mesh, batch, size),
            *_text(cfg, mesh),
        ]
    )


def _encodes(cfg: config_lib.Config) -> bool:
    """Whether a stream may begin with a picture or a video."""
    return "encoder" in vae.spec(cfg.vae)


def _stream(cfg, mesh, batch, size) -> Iterator[tuple[str, Trace]]:
    starts = (False, True) if _encodes(cfg) else (False,)
    for pictured in (True,) if cfg.video.image_to_video else starts:
        video = dataclasses.replace(cfg.video, image_to_video=pictured)
        one = dataclasses.replace(cfg, video=video)
        sampler = stream.Sampler(one, mesh)
        params, state, inputs = step_arguments(one, mesh, batch, *size)
        latents = inputs.noise
        after = " after a first frame" if pictured else ""
        each = {"chunk_step": sampler.step, "denoise_chunk": sampler.denoise}
        if cfg.sample.recache:
            each["recache"] = sampler.recache
        for name, program in each.items():
            yield f"{name}{after}", functools.partial(program.trace, params, state, inputs)
        arguments = params, state, latents, inputs
        yield f"commit_chunk{after}", functools.partial(sampler.commit.trace, *arguments)
        for name, program in _memory(sampler, params, state, inputs, mesh):
            yield f"{name}{after}", program
    make = functools.partial(stream.init_state, cfg, batch, *size)
    shardings = jax.tree.map(lambda s: jax.NamedSharding(mesh, s), stream.state_specs(cfg))
    yield "init_state", jax.jit(make, out_shardings=shardings).trace
    shape = (cfg.model.chunk_frames, *size, cfg.model.in_dim)
    samples = jax.ShapeDtypeStruct((batch,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    yield "noise", functools.partial(stream.noise.trace, key, samples, samples, shape)


def _memory(sampler, params, state, inputs, mesh) -> Iterator[tuple[str, Trace]]:
    """Of references, as many as there are slots, and of landmarks."""
    memory, settings = memory_lib.programs(sampler), sampler.cfg.sample.memory
    batch, *chunk = inputs.noise.shape
    if settings.references:
        given = jax.ShapeDtypeStruct((batch, settings.references, *chunk), jnp.float32)
        given = _on(mesh, given, memory.reference_specs)
        yield "pin_references", functools.partial(memory.pin.trace, params, state, inputs, given)
    if settings.landmarks:
        kept = _on(mesh, jax.eval_shape(memory_lib.newest, state), memory.kept_specs)
        index = jax.ShapeDtypeStruct((), jnp.int32)
        count = _on(mesh, jax.ShapeDtypeStruct((batch,), jnp.int32), memory_lib.BATCH)
        show = params, state, inputs, kept, index, count
        yield "show_landmark", functools.partial(memory.show.trace, *show)
        yield "hide_landmarks", functools.partial(memory.hide.trace, state, count)
        yield "newest_chunk", functools.partial(memory.newest.trace, state)


def step_arguments(
    cfg: config_lib.Config, mesh: jax.sharding.Mesh, batch: int, height: int, width: int
) -> tuple[params_lib.Tree, stream.StreamState, stream.ChunkInput]:
    """What `Sampler.step` takes, as `jax.ShapeDtypeStruct`s. `height`, `width`: of the latents."""
    m, dtype = cfg.model, cfg.compute_dtype
    specs = dit.sampling_spec(m, recipe_lib.get(cfg.quant.recipe), dtype)
    params = params_lib.abstract(specs, mesh, dtype, mesh_lib.SAMPLING_RULES)
    state = jax.eval_shape(functools.partial(stream.init_state, cfg, batch, height, width))

    def array(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct((batch, *shape), dtype)

    text = array(m.text_len, m.text_dim, dtype=dtype)
    picture = (height, width, m.in_dim)
    inputs = stream.ChunkInput(
        noise=array(m.chunk_frames, *picture),
        text=text,
        cut=array(dtype=jnp.bool_),
        negative=text if cfg.sample.guided else None,
        first_frame=array(1, *picture) if cfg.video.image_to_video else None,
        renoise=_each_step(cfg, batch, picture),
        actions={
            name: array(TEMPORAL_COMPRESSION * m.chunk_frames, dim)
            for name, dim in actions.dims(m.actions).items()
        }
        or None,
        guidance=array() if cfg.sample.guided else None,
    )
    specs = stream.state_specs(cfg), stream.input_specs(cfg)
    return params, *(_on(mesh, *pair) for pair in zip((state, inputs), specs))


def _each_step(cfg, batch, picture) -> Any:
    if cfg.sample.solver == "unipc":
        return None
    shape = (cfg.sample.steps, batch, cfg.model.chunk_frames, *picture)
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _decoding(cfg, mesh, batch, size):
    prepare = functools.partial(decode.prepare, cfg)
    whole = jax.NamedSharding(mesh, jax.P())
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
        jax.eval_shape(prepare, _vae_params(cfg, mesh, "decoder", "conv2")),
    )
    state = _vae_state(vae.init_decode_state, cfg, mesh, batch, size)
    for first, count in _calls(cfg, (1,)):
        latents = _placed(mesh, (batch, count, *size, cfg.vae.z_dim), cfg.compute_dtype)
        program = decode.decode_program(cfg.vae, mesh, first, decode.pictures)
        name = "first" if first else count
        yield f"decode {name}", functools.partial(program.trace, params, state, latents)


def _encoding(cfg, mesh, batch, size):
    """Of first frames, `batch` together; of a video to continue, once on each replica."""
    params = _vae_params(cfg, mesh, "encoder", "conv1")
    replicas = mesh.shape["data"] * mesh.shape["fsdp"]
    pixels = tuple(n * vae.PIXELS for n in size)
    for rows in sorted({batch, replicas}):
        state = _vae_state(vae.init_encode_state, cfg, mesh, rows, size)
        for first, count in _calls(cfg, range(1, 1 + cfg.sample.vae_latents_per_call)):
            if not first and (rows != replicas or cfg.video.image_to_video):
                continue
            number = 1 if first else count * vae.FRAMES
            frames = _placed(mesh, (rows, number, *pixels, 3), cfg.compute_dtype)
            program = vae.encode_on_mesh(mesh, cfg.vae, first)
            name = f"encode {'first' if first else count}" + (f" x{rows}" if rows > 1 else "")
            yield name, functools.partial(program.trace, params, state, frames)


def _calls(cfg, chunks):
    """(whether a video's first, latents) of each call of the VAE on so many chunks together."""
    size = cfg.sample.vae_latents_per_call
    rest = [n * cfg.model.chunk_frames - 1 for n in chunks]  # without the first latent
    counts = {1} | {n for left in rest for n in (min(size, left), left % size)}
    return [(True, 1), *((False, n) for n in sorted(counts - {0}, reverse=True))]


def _vae_params(cfg, mesh, *names):
    specs = {name: tree for name, tree in vae.spec(cfg.vae).items() if name in names}
    return params_lib.abstract(specs, mesh, cfg.compute_dtype, {})


def _vae_state(init, cfg, mesh, batch, size):
    state = jax.eval_shape(functools.partial(init, cfg.vae, batch, *size, cfg.compute_dtype))
    return jax.tree.map(lambda x: _placed(mesh, x.shape, x.dtype), state)


def _placed(mesh, shape, dtype):
    """Latents, frames or the VAE's state, as they lie on its mesh."""
    sharding = mesh_lib.sharding(mesh, vae_spec.SHARDED)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _text(cfg, mesh):
    params = params_lib.abstract(umt5.spec(cfg.umt5), mesh, cfg.compute_dtype, {})
    length = cfg.model.text_len
    for tokens in (*(n for n in umt5.TOKEN_BUCKETS if n < length), length):
        for batch in umt5.BATCHES:
            ids = jax.ShapeDtypeStruct((batch, tokens), jnp.int32)
            yield (
                f"text {batch}x{tokens}",
                functools.partial(
                    umt5.encode_program.trace, params, ids, ids,
                    cfg=cfg.umt5, text_len=length, dtype=cfg.compute_dtype,
                ),
            )  # fmt: skip


def _on(mesh, tree, specs):
    def one(x, spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

    return jax.tree.map(one, tree, specs)
