"""Steps of distillation on random weights and text: time, rate and memory of both programs."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from launch.benchmarks import measure
from launch.benchmarks.train import memory, random_batch
from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.models import dit
from longlive_jax.training import distill_cost
from longlive_jax.training import state as state_lib
from longlive_jax.training.objectives.dmd import CRITIC, DIT, DMD, NEGATIVE, STUDENT
from longlive_jax.training.step import Step


def run(cfg: config_lib.Config) -> dict:
    config_lib.validate_distillation(cfg)
    mesh = mesh_lib.make_mesh(cfg.mesh)
    goal = DMD(cfg, mesh)
    step = Step(goal)
    programs, figures = {}, {}
    for due in step.programs:
        start = time.perf_counter()
        programs[due] = step.lower(due).compile()
        own = {"compile_s": round(time.perf_counter() - start, 1)} | memory(programs[due])
        figures |= {f"{_name(due)}_{key}": value for key, value in own.items()}
    measure.show(figures)

    specs, dtype = dit.spec(cfg.model), cfg.compute_dtype
    weights = {
        name: measure.random_params(specs, mesh, dtype, seed, mesh_lib.RULES)
        for seed, name in enumerate(name for name in goal.frozen if name != NEGATIVE)
    }
    text = np.zeros((1, cfg.model.text_len, cfg.model.text_dim), np.float32)
    frozen = goal.freeze(weights, jnp.asarray(text))
    del weights
    params = goal.init_params()
    if not cfg.distill.lora.enabled:
        params = {
            name: {DIT: measure.random_params(specs, mesh, jnp.float32, 1, mesh_lib.RULES)}
            for name in (STUDENT, CRITIC)
        }
    state = state_lib.init(goal, params)
    del params
    batches = jax.tree.map(random_batch, goal.batch)
    for due, program in programs.items():
        figures |= _timed(cfg, goal, due, program, state, frozen, batches)
        state = figures.pop("state")
    device = measure.device_figures()
    both, alone = (figures[f"{_name(due)}_step_mean_s"] for due in programs)
    every = cfg.distill.student_every
    mean = (both + (every - 1) * alone) / every
    flops = [distill_cost.cost(cfg, STUDENT in due).flops for due in programs]
    pflop = (flops[0] + (every - 1) * flops[1]) / every / 1e15
    rate = 1e3 * pflop / mean / cfg.mesh.size
    figures |= device | {
        "mean_step_s": round(mean, 4),
        "mean_model_pflop_a_step": round(pflop, 3),
        "mean_model_tflops_per_device": round(rate, 1),
        "latent_frames": cfg.distill.latent_frames,
        "steps": cfg.sample.steps,
        "recipes": goal.recipes,
        "held": {k: list(v) for k, v in goal.frozen.items() if k != NEGATIVE},
        "rank": cfg.distill.lora.rank if cfg.distill.lora.enabled else None,
        "remat": cfg.distill.remat,
        "mesh": list(mesh.shape.values()),
        "dtype": cfg.dtype,
    }
    measure.show(figures)
    return figures


def _name(due):
    return STUDENT if STUDENT in due else CRITIC


def _timed(cfg, goal, due, program, state, frozen, batches) -> dict:
    """Exit steps are drawn by step, so steps differ: their mean is what counts."""
    times = []
    for i in range(1 + flags.FLAGS.chunks):
        start = time.perf_counter()
        state, metrics = program(state, frozen, batches)
        jax.block_until_ready(metrics)
        if i:
            times.append(time.perf_counter() - start)
    values = metrics.networks[_name(due)]
    mean, flops = float(np.mean(times)), distill_cost.cost(cfg, STUDENT in due).flops
    figures = {
        "step_mean_s": round(mean, 4),
        "step_min_s": round(min(times), 4),
        "step_max_s": round(max(times), 4),
        "model_pflop": round(flops / 1e15, 3),
        "model_tflops_per_device": round(flops / mean / 1e12 / cfg.mesh.size, 1),
        "peak_memory_gb": measure.device_figures()["peak_memory_gb"],
        "loss": float(values.loss),
        "bad_steps": int(metrics.bad[0]),
    } | {k: float(v) for k, v in values.values.items()}
    measure.show(figures)
    return {f"{_name(due)}_{k}": v for k, v in figures.items()} | {"state": state}
