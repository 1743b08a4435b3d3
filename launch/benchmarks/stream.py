"""The streaming sampler: denoising alone, then with the VAE and frames on the host."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from launch.benchmarks import measure
from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.models import dit, vae
from longlive_jax.sampling import cost, decode, stream


def run(cfg: config_lib.Config) -> dict:
    mesh = mesh_lib.make_mesh(cfg.mesh)
    sampler = stream.Sampler(cfg, mesh)
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
    filling = cfg.sample.window_frames // cfg.model.chunk_frames
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
    }
    measure.show(figures)
    state = latents = None
    delivered = _delivered(cfg, mesh, sampler, step, params, inputs, size)
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


def _delivered(cfg, mesh, sampler, step, params, inputs, size):
    """Frames on the host: chunk k is fetched while chunk k + 1 is denoised."""
    vae_params = measure.random_params(vae.spec(cfg.vae), mesh, cfg.compute_dtype, seed=1)
    del vae_params["encoder"], vae_params["conv1"]
    for attempt in ("compile", "measure"):
        decoder = state = latents = pieces = waiting = None  # one set of states at a time
        decoder = decode.Decoder(cfg, vae_params, mesh)
        state = sampler.init_state(cfg.mesh.data * cfg.mesh.fsdp, *size)
        waiting, done, count = [], [], 0
        begin = time.perf_counter()
        first = None
        for chunk in range(3 if attempt == "compile" else max(6, flags.FLAGS.chunks // 2)):
            state, latents = step(params, state, inputs[chunk % 2])
            pieces = list(decoder(latents))
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
    # A prompt that changes while nothing is under way: until the next chunk's first frames.
    jax.block_until_ready((state, pieces))
    changed = inputs[0].replace(context=-inputs[0].context)
    begin = time.perf_counter()
    state, latents = step(params, state, changed)
    np.asarray(next(decoder(latents)))
    prompt = time.perf_counter() - begin
    return {
        "prompt_to_frame_s": round(prompt, 3),
        "vae_compile_s": round(compiled, 1),
        "vae_latents_per_call": cfg.sample.vae_latents_per_call,
        "first_frame_s": round(first, 3),
        "delivered_fps": round((after - before) * latents.shape[0] / (stop - start), 2),
    }


def chunk_inputs(cfg, chunk, size):
    batch = cfg.mesh.data * cfg.mesh.fsdp
    key = jax.random.key(0)
    shape = (cfg.model.chunk_frames, *size, cfg.model.in_dim)
    text = (batch, cfg.model.text_len, cfg.model.text_dim)
    context = jax.random.normal(jax.random.fold_in(key, 7), text, cfg.compute_dtype)
    return stream.ChunkInput(
        noise=stream.noise(key, chunk, jnp.arange(batch), shape),
        context=context,
        cut=jnp.zeros((batch,), bool),
        negative=context if stream.guided(cfg) else None,
        first_frame=jnp.zeros((batch, 1, *size, cfg.model.in_dim))
        if cfg.video.image_to_video
        else None,
    )


def _slope(times):
    """Change of the fitted line over the whole run, relative to its mean."""
    rise = np.polyfit(np.arange(len(times)), times, 1)[0] * (len(times) - 1)
    return float(rise / np.mean(times))


def _share(tflops, peak):
    return None if peak is None else round(tflops / peak, 3)
