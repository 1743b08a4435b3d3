"""A distillation small enough to compile in seconds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import config as lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.training.objectives.dmd import BASE, CRITIC, DIT, DMD, LORA, STUDENT, TEACHER
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
