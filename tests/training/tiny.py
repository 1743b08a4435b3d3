"""A training run small enough to compile in seconds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import config as lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.training import state as state_lib
from longlive_jax.training.batch import Batch
from longlive_jax.training.objectives.teacher_forcing import MODEL as NETWORK
from longlive_jax.training.objectives.teacher_forcing import TeacherForcing
from longlive_jax.training.step import Step

MODEL = lib.Model(
    dim=32, ffn_dim=48, num_heads=4, num_layers=2, in_dim=4, out_dim=4, text_dim=16, text_len=8,
    freq_dim=16, chunk_frames=4,
)  # fmt: skip
UMT5 = lib.UMT5(vocab_size=32, dim=16, dim_attn=16, dim_ffn=32, num_heads=2, num_layers=1)


def config(mesh=lib.Mesh(), image_to_video=False, dtype="float32", **train) -> lib.Config:
    settings = dict(
        latent_frames=16, batch_size=2, learning_rate=1e-3, ema_start=1, ema_decay=0.5, remat="qkv"
    )
    cfg = lib.Config(
        model=MODEL,
        vae=lib.VAE(dim=8, dec_dim=8, z_dim=4, latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4),
        umt5=UMT5,
        mesh=mesh,
        video=lib.Video(height=64, width=64, image_to_video=image_to_video),
        sample=lib.Sample(window_frames=16, sink_frames=4),
        data=lib.Data(cached=True),
        train=lib.Train(**(settings | train)),
        dtype=dtype,
    )
    lib.validate_training(cfg)
    return cfg


@functools.cache
def objective_of(cfg: lib.Config) -> TeacherForcing:
    return TeacherForcing(cfg, mesh_lib.make_mesh(cfg.mesh))


@functools.cache
def program_of(cfg: lib.Config):
    (program,) = Step(objective_of(cfg)).programs.values()
    return program


def step(cfg: lib.Config, state: state_lib.TrainState, data: Batch):
    return program_of(cfg)(state, (), data)


def random_state(cfg: lib.Config, scale: float = 0.2) -> state_lib.TrainState:
    """Every weight random, the last layer's too, so that every gradient is something."""
    objective = objective_of(cfg)
    draw = np.random.default_rng(0)

    def weight(like):
        x = scale * draw.standard_normal(like.shape).astype(np.float32)
        return jax.device_put(x, like.sharding)

    params = state_lib.abstract(objective).networks[NETWORK].params
    return state_lib.init(objective, {NETWORK: jax.tree.map(weight, params)})


def params_of(state: state_lib.TrainState):
    return state.networks[NETWORK].params


def batches(cfg: lib.Config, seed: int = 0) -> Batch:
    """Random data of the config's shapes, on its mesh."""
    draw = np.random.default_rng(seed)

    def array(like):
        if like.dtype == jnp.bool_:
            x = np.ones(like.shape, bool)
        elif like.dtype == jnp.int32:
            x = draw.integers(1, 3, like.shape).astype(np.int32)
        else:
            x = draw.standard_normal(like.shape).astype(like.dtype)
        return jax.device_put(x, like.sharding)

    return jax.tree.map(array, objective_of(cfg).batch)


def run(cfg: lib.Config, steps: int, data: Batch | None = None):
    """The state after so many steps on the same data, and (loss, grad_norm) of each."""
    state = random_state(cfg)
    data = batches(cfg) if data is None else data
    figures = []
    for _ in range(steps):
        state, metrics = step(cfg, state, data)
        model = metrics.networks[NETWORK]
        figures.append((float(model.loss), float(model.grad_norm)))
    return state, np.array(figures)


def replaced(cfg: lib.Config, **train) -> lib.Config:
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, **train))
