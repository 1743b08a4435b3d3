"""A training step on random weights and latents: time, rate, memory, and where the time goes."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from launch.benchmarks import measure, trace
from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.training import cost
from longlive_jax.training import state as state_lib
from longlive_jax.training.objectives.teacher_forcing import MODEL, TeacherForcing
from longlive_jax.training.step import Step


def run(cfg: config_lib.Config) -> dict:
    config_lib.validate_training(cfg)
    mesh = mesh_lib.make_mesh(cfg.mesh)
    objective = TeacherForcing(cfg, mesh)
    start = time.perf_counter()
    compiled = Step(objective).lower((MODEL,)).compile()
    figures = {"compile_s": round(time.perf_counter() - start, 1)} | memory(compiled)
    measure.show(figures)

    params = measure.random_params(objective.specs, mesh, jnp.float32, rules=mesh_lib.RULES)
    state, frozen = state_lib.init(objective, {MODEL: params}), ()
    if cfg.train.trainable != "all":
        make = functools.partial(measure.random_params, objective.backbone, mesh, cfg.compute_dtype)
        frozen = objective.freeze(make(rules=mesh_lib.RULES))
    batches = jax.tree.map(random_batch, objective.batch)
    state, metrics = compiled(state, frozen, batches)
    first = float(metrics.networks[MODEL].loss)
    times = []
    for _ in range(flags.FLAGS.chunks):
        start = time.perf_counter()
        state, metrics = compiled(state, frozen, batches)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    if flags.FLAGS.profile:
        with jax.profiler.trace(flags.FLAGS.profile):
            state, metrics = compiled(state, frozen, batches)
            jax.block_until_ready((state, metrics))
        figures |= trace.shares(flags.FLAGS.profile)
    p50 = measure.percentile(times, 50)
    device = measure.device_figures()
    rate = cost.step_flops(cfg) / p50 / 1e12 / cfg.mesh.size
    peak = device["device_peak_tflops"]
    figures |= device | {
        "step_p50_s": round(p50, 4),
        "step_min_s": round(min(times), 4),
        "step_max_s": round(max(times), 4),
        "model_pflop_a_step": round(cost.step_flops(cfg) / 1e15, 3),
        "model_tflops_per_device": round(rate, 1),
        "share_of_peak": None if peak is None else round(rate / peak, 3),
        "recomputed_share": round(cost.recomputed_flops(cfg) / cost.step_flops(cfg), 4),
        "tokens_per_s": round(cost.video_tokens(cfg) * _videos(cfg) / p50),
        "latent_frames": cfg.train.latent_frames,
        "videos": _videos(cfg),
        "remat": cfg.train.remat,
        "recipe": cfg.quant.recipe,
        "mesh": list(mesh.shape.values()),
        "dtype": cfg.dtype,
        "loss_first": first,
        "loss_last": float(metrics.networks[MODEL].loss),
        "bad_steps": int(metrics.bad[0]),
    }
    measure.show(figures)
    return figures


def memory(compiled) -> dict:
    """Memory of a compiled program, in gigabytes a device."""
    sizes = compiled.memory_analysis()
    return {} if sizes is None else {
        "state_gb": round(sizes.argument_size_in_bytes / 1e9, 2),
        "program_temp_gb": round(sizes.temp_size_in_bytes / 1e9, 2),
    }  # fmt: skip


def _videos(cfg):
    return cfg.train.batch_size * cfg.train.accumulation


def random_batch(x: jax.ShapeDtypeStruct) -> jax.Array:
    """An array of a batch: noise, or True."""
    if x.dtype == jnp.bool_:
        return jax.device_put(np.ones(x.shape, bool), x.sharding)
    make = functools.partial(jax.random.normal, jax.random.key(0), x.shape, x.dtype)
    return jax.jit(make, out_shardings=x.sharding)()
