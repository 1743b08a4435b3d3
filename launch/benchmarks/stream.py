"""The streaming sampler: denoising alone, then with the VAE and frames on the host."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from launch.benchmarks import measure
from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.config import TEMPORAL_COMPRESSION
from longlive_jax.models import actions, dit, vae
from longlive_jax.prompts.embeddings import Embeddings
from longlive_jax.sampling import cost, decode, memory, stream
from longlive_jax.sampling.session import Engine, Session, Start


def run(cfg: config_lib.Config) -> dict:
    mesh = mesh_lib.make_mesh(cfg.mesh)
    sampler = stream.sampler(cfg, mesh)
    params = measure.random_params(dit.spec(cfg.model), mesh, cfg.compute_dtype)
    params = sampler.prepare(params)
    size = cfg.video.latent_size
    inputs = [sampler.place(chunk_inputs(cfg, chunk, size)) for chunk in range(2)]

    start = time.perf_counter()
    state = sampler.init_state(cfg.mesh.data * cfg.mesh.fsdp, *size)
    step = sampler.step.lower(params, state, inputs[0]).compile()
    figures = {"compile_s": round(time.perf_counter() - start, 1)}
    memory = step.memory_analysis()
    if memory is not None:
        figures["program_temp_gb"] = round(memory.temp_size_in_bytes / 1e9, 2)

    # Denoising alone: fill the window, then time every chunk.
    filling = cfg.sample.window(cfg.model).chunks
    measured = flags.FLAGS.chunks
    times = []
    for chunk in range(filling + measured):
        start = time.perf_counter()
        state, latents = step(params, state, inputs[chunk % 2])
        jax.block_until_ready(latents)
        times.append(time.perf_counter() - start)
    if flags.FLAGS.profile:
        with jax.profiler.trace(flags.FLAGS.profile):
            for chunk in range(2):
                state, latents = step(params, state, inputs[chunk])
            jax.block_until_ready(latents)
    finite = bool(np.isfinite(np.asarray(latents, np.float32)).all())
    warm = times[filling:]
    frames = cfg.model.chunk_frames * config_lib.TEMPORAL_COMPRESSION
    p50 = measure.percentile(warm, 50)
    tflops = cost.chunk_flops(cfg, *size) * latents.shape[0] / p50 / 1e12 / cfg.mesh.size
    device = measure.device_figures()
    figures |= {
        "denoise_fps": round(frames * latents.shape[0] / p50, 2),
        "chunk_p50_s": round(p50, 4),
        "chunk_p90_s": round(measure.percentile(warm, 90), 4),
        "chunk_p99_over_p50": round(measure.percentile(warm, 99) / p50, 4),
        "chunk_slope": round(_slope(warm), 5),
        "chunk_5_s": round(times[5], 4),
        "chunk_last_s": round(times[-1], 4),
        "chunk_last": len(times) - 1,
        "tflops_per_device": round(tflops, 1),
        "share_of_peak": _share(tflops, device["device_peak_tflops"]),
        "denoise_peak_memory_gb": device["peak_memory_gb"],
        "finite": finite,
        "window_chunks": dataclasses.asdict(cfg.sample.window(cfg.model)),
    }
    if cfg.sample.memory.landmarks:
        state, figures["landmark_s"] = _landmark(sampler, params, state, inputs[0])
        figures["landmark_tflop"] = round(cost.landmark_flops(cfg, *size) / 1e12, 3)
    measure.show(figures)
    state = latents = None
    sampler.step = step  # compiled already
    delivered = _delivered(cfg, Engine(cfg, mesh, params, decoder(cfg, mesh)))
    delivered |= measure.device_figures()
    delivered |= {
        "steps": cfg.sample.steps,
        "recipe": cfg.quant.recipe,
        "kv": cfg.quant.kv,
        "dtype": cfg.dtype,
        "pixels": [cfg.video.height, cfg.video.width],
        "mesh": list(mesh.shape.values()),
    }
    measure.show(delivered)
    return figures | delivered


def _landmark(sampler, params, state, inputs):
    """The state with a landmark in its first slot, and the seconds that showing it takes."""
    programs, times = memory.programs(sampler), []
    kept, rows = programs.newest(state), inputs.noise.shape[0]
    count = programs.place(np.ones(rows, np.int32), memory.BATCH)
    for _ in range(6):
        start = time.perf_counter()
        state = programs.show(params, state, inputs, kept, jnp.int32(0), count)
        jax.block_until_ready(state)
        times.append(time.perf_counter() - start)
    return state, round(measure.percentile(times[1:], 50), 4)


def decoder(cfg, mesh):
    spec = vae.spec(cfg.vae)
    decoding = {name: spec[name] for name in ("conv2", "decoder") if name in spec}
    params = measure.random_params(decoding, mesh, cfg.compute_dtype, seed=1)
    return decode.Decoder(cfg, params, mesh)


def _delivered(cfg, engine):
    """Frames on the host: chunk k is fetched while chunk k + 1 is denoised."""
    for attempt in ("compile", "measure"):
        session = pieces = waiting = None  # one stream at a time
        session = _session(cfg, engine, whole=True)
        waiting, done, count = [], [], 0
        begin = time.perf_counter()
        first = None
        for _ in range(3 if attempt == "compile" else max(6, flags.FLAGS.chunks // 2)):
            pieces = session.step().frames
            for piece in pieces:
                piece.copy_to_host_async()
            if first is None:
                np.asarray(pieces[0])
                first = time.perf_counter() - begin
            count += sum(np.asarray(piece).shape[1] for piece in waiting)
            waiting = pieces
            done.append((time.perf_counter(), count))
        if attempt == "compile":
            compiled = time.perf_counter() - begin
    (start, before), (stop, after) = done[2], done[-1]
    prompt = _prompt_to_frame(session, pieces)
    session = pieces = waiting = piece = None
    session = _session(cfg, engine, whole=False)
    for _ in range(3):
        pieces = session.step().frames
    return {
        "prompt_to_frame_s": round(prompt, 3),
        "live_prompt_to_frame_s": round(_prompt_to_frame(session, pieces), 3),
        "vae_compile_s": round(compiled, 1),
        "vae_latents_per_call": cfg.sample.vae_latents_per_call,
        "first_frame_s": round(first, 3),
        "delivered_fps": round((after - before) * session.rows / (stop - start), 2),
    }


def _session(cfg, engine, whole):
    """A stream of random embeddings for two prompts."""
    rows, (height, width) = cfg.mesh.data * cfg.mesh.fsdp, cfg.video.latent_size
    text = np.asarray(_text(cfg, 2))
    start = Start(
        height=height, width=width, samples=tuple(range(rows)), whole=whole,
        first_frame=np.zeros((rows, 1, height, width, cfg.model.in_dim), np.float32)
        if cfg.video.image_to_video
        else None,
    )  # fmt: skip
    session = Session(engine, Embeddings(["one", "other"], text, text[0]), start)
    session.prompt("one")
    return session


def _prompt_to_frame(session, pieces):
    """Seconds from a prompt, given to an idle session, to its first frames."""
    jax.block_until_ready((pieces, session.carried))
    begin = time.perf_counter()
    session.prompt("other")
    np.asarray(session.step().frames[0])
    return time.perf_counter() - begin


def _text(cfg, rows):
    key = jax.random.fold_in(jax.random.key(0), 7)
    return jax.random.normal(key, (rows, cfg.model.text_len, cfg.model.text_dim), cfg.compute_dtype)


def chunk_inputs(cfg, chunk, size):
    batch = cfg.mesh.data * cfg.mesh.fsdp
    shape, text = (cfg.model.chunk_frames, *size, cfg.model.in_dim), _text(cfg, batch)
    samples = jnp.arange(batch)
    return stream.ChunkInput(
        noise=stream.noise(jax.random.key(0), jnp.full(batch, chunk), samples, shape),
        text=text,
        cut=jnp.zeros((batch,), bool),
        negative=text if cfg.sample.guided else None,
        guidance=jnp.full(batch, cfg.sample.guidance_scale) if cfg.sample.guided else None,
        first_frame=jnp.zeros((batch, 1, *size, cfg.model.in_dim))
        if cfg.video.image_to_video
        else None,
        actions={
            name: jnp.zeros((batch, TEMPORAL_COMPRESSION * cfg.model.chunk_frames, dim))
            for name, dim in actions.dims(cfg.model.actions).items()
        }
        or None,
    )


def _slope(times):
    """Change of the fitted line over the whole run, relative to its mean."""
    rise = np.polyfit(np.arange(len(times)), times, 1)[0] * (len(times) - 1)
    return float(rise / np.mean(times))


def _share(tflops, peak):
    return None if peak is None else round(tflops / peak, 3)
