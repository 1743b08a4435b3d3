"""A distillation small enough to compile in seconds."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import config as lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.training import checkpoint, loop
from longlive_jax.training.objectives import dmd
from longlive_jax.training.objectives.dmd import BASE, CRITIC, DIT, DMD, LORA, STUDENT, TEACHER
from longlive_jax.training.plan import Plan
from longlive_jax.training.step import Step
from tests.training import dmd_parts
from tests.training.tiny import MODEL

ADAPTERS = lib.LoRA(rank=2, alpha=4.0)
WHOLE = lib.LoRA(enabled=False)
NETWORKS = (STUDENT, CRITIC)


def config(mesh=lib.Mesh(), dtype="float32", image_to_video=False, quant=None, sample=None,
           model=None, **distill) -> lib.Config:  # fmt: skip
    """Four chunks of four latents; the window has place for all of them."""
    settings = dict(
        latent_frames=16, batch_size=2, lora=ADAPTERS, learning_rate=1e-2,
        critic_learning_rate=1e-2, ema_start=1, ema_decay=0.5, remat="qkv", student_every=3,
    )  # fmt: skip
    streamed = dict(steps=2, window_frames=16, sink_frames=4, rope_offset=2.0)
    cfg = lib.Config(
        model=dataclasses.replace(MODEL, **(model or {})),
        vae=lib.VAE(dim=8, dec_dim=8, z_dim=4, latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4),
        mesh=mesh,
        video=lib.Video(height=64, width=64, image_to_video=image_to_video),
        sample=lib.Sample(**(streamed | (sample or {}))),
        quant=lib.Quant(**(quant or {})),
        distill=lib.Distill(**(settings | distill)),
        dtype=dtype,
        objective="dmd",
    )
    lib.validate_distillation(cfg)
    return cfg


def weights(cfg: lib.Config, seed: int) -> params_lib.Tree:
    """Every weight of a transformer random, the last layer's too."""
    draw = np.random.default_rng(seed)

    def one(spec):
        ones = spec.init is params_lib.ones
        return (0.2 * draw.standard_normal(spec.shape) + ones).astype(np.float32)

    goal = DMD(cfg, mesh_lib.make_mesh(cfg.mesh))
    return jax.tree.map(one, goal.specs, is_leaf=params_lib.is_spec)


def negative(cfg: lib.Config) -> jax.Array:
    shape = (1, cfg.model.text_len, cfg.model.text_dim)
    return jnp.asarray(np.random.default_rng(9).standard_normal(shape), jnp.float32)


def begin(cfg: lib.Config, teacher: bool = False):
    """The objective, parameters of its networks, and what is frozen; all of them random."""
    goal = DMD(cfg, mesh_lib.make_mesh(cfg.mesh), teacher=teacher)
    place = functools.partial(dmd_parts.place, goal)
    if cfg.distill.lora.enabled:
        params = {name: {LORA: _adapters(goal, seed)} for seed, name in enumerate(NETWORKS, 5)}
    else:
        params = {name: {DIT: place(weights(cfg, seed))} for seed, name in enumerate(NETWORKS)}
    held = {BASE: weights(cfg, 2), TEACHER: weights(cfg, 3)}
    held = {name: place(tree) for name, tree in held.items() if name in goal.frozen}
    return goal, params, goal.freeze(held, negative(cfg))


def _adapters(goal, seed):
    specs = goal.networks[CRITIC].specs[LORA]
    draw = np.random.default_rng(seed)

    def one(spec):
        return (0.3 * draw.standard_normal(spec.shape)).astype(np.float32)

    tree = jax.tree.map(one, specs, is_leaf=params_lib.is_spec)
    return jax.device_put(tree, params_lib.shardings(specs, goal.mesh))


def batches(goal: DMD, seed: int = 0):
    """A step's scripts, on the objective's mesh; a cut in the first video."""
    draw = np.random.default_rng(seed)

    def one(like):
        if like.dtype == jnp.bool_:
            x = np.zeros(like.shape, bool)
            x.reshape(-1, like.shape[-1])[0, 2] = True
        else:
            x = draw.standard_normal(like.shape).astype(like.dtype)
        return jax.device_put(x, like.sharding)

    return jax.tree.map(one, goal.batch)


class CompiledOnce(Step):
    """A step whose programs are compiled when they are first needed, and once.

    Beside those of a run it has the program of a step of the student alone.
    """

    def __init__(self, goal: DMD):
        super().__init__(goal)
        self.programs[STUDENT,] = jax.jit(functools.partial(self._step, (STUDENT,)))
        self.compiled = functools.cache(lambda due: self.lower(due).compile())


def check_resume(step: CompiledOnce, inputs: loop.Inputs, root: pathlib.Path, monkeypatch):
    """A run, and ones that go on from each of its states, as after kill -9: states after the kth
    step are not there, lines of the log are. All must end with the same bits. Gives the log.
    """
    goal = step.objective
    assert isinstance(goal, DMD)
    used = {due: step.compiled(due) for due in map(step.due, range(goal.cfg.distill.steps))}
    monkeypatch.setattr(loop, "Step", lambda goal: step)
    monkeypatch.setattr(loop, "_compile", lambda step, due, show: used.get(due))
    end, log = _train(goal, inputs, root / "whole")
    count, every = goal.cfg.distill.steps, goal.cfg.distill.student_every
    assert [f"{STUDENT}_loss" in line for line in log] == [i % every == 0 for i in range(count)]
    assert int(end.step) == count and int(end.bad[0]) == 0
    assert {k % every for k in range(1, count)} == set(range(every))
    for k in range(1, count):
        copy = shutil.copytree(root / "whole", root / str(k))
        for later in range(k + 1, count + 1):
            shutil.rmtree(copy / "checkpoints" / str(later))
        again, log_again = _train(goal, inputs, copy)
        jax.tree.map(np.testing.assert_array_equal, again, end)
        assert log_again == log
    return log


def _train(goal, inputs, root):
    plan = Plan.of(goal.cfg.distill)
    with checkpoint.acquire(root, dmd.settings(goal.cfg, "random scripts", None), STUDENT):
        end, done = loop.run(goal, plan, root, inputs, lambda text: None)
    assert done == loop.Done(plan.steps, stopped=False)
    timed = ("seconds", "tokens_per_second", "tflops_per_device", "data_wait", "goodput", "mfu")
    lines = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    return jax.device_get(end), [{k: v for k, v in x.items() if k not in timed} for x in lines]
