"""Causal consistency distillation, on a model of two layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.training import state as state_lib
from longlive_jax.training.objectives import consistency
from longlive_jax.training.objectives.consistency import Consistency
from longlive_jax.training.objectives.dmd import BASE, LORA, NEGATIVE, STUDENT
from longlive_jax.training.step import Step

MODEL = config_lib.Model(
    dim=32, ffn_dim=32, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=8, text_len=4,
    freq_dim=16, chunk_frames=2,
)  # fmt: skip
CONFIG = config_lib.Config(
    model=MODEL,
    vae=config_lib.VAE(z_dim=4, latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4),
    video=config_lib.Video(height=32, width=32),
    sample=config_lib.Sample(window_frames=8, sink_frames=0),
    train=config_lib.Train(batch_size=2, latent_frames=6),
    distill=config_lib.Distill(
        lora=config_lib.LoRA(rank=4, alpha=4.0), learning_rate=1e-2, ema_start=0, ema_decay=0.5,
        consistency_levels=8,
    ),
    objective="consistency",
    dtype="float32",
)  # fmt: skip


def array(like, seed):
    if like.dtype == jnp.bool_:
        return jax.device_put(jnp.ones(like.shape, bool), like.sharding)
    values = np.random.default_rng(seed).normal(size=like.shape).astype(np.float32)
    return jax.device_put(jnp.asarray(values, like.dtype), like.sharding)


def begin(cfg=CONFIG):
    goal = Consistency(cfg, mesh_lib.make_mesh(cfg.mesh))
    base = jax.tree.map(lambda x: x * 0.3, _arrays(goal.frozen[BASE]["bf16"]))
    frozen = {BASE: {"bf16": base}, NEGATIVE: array(goal.frozen[NEGATIVE], 5)}
    return goal, frozen, state_lib.init(goal), _arrays(goal.batch, 100)


def _arrays(tree, seed=0):
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten([array(leaf, seed + i) for i, leaf in enumerate(leaves)])


@pytest.mark.slow
def test_the_student_learns_and_only_its_adapters_change():
    goal, frozen, state, batches = begin()
    program = Step(goal).programs[(STUDENT,)]
    first = jax.device_get(state.networks[STUDENT].params)

    def loss(state):
        """Of the same eight steps' draws, whatever step the state is at."""
        each = []
        for step in range(8):
            copied = jax.tree.map(jnp.copy, state).replace(step=jnp.int32(step))
            each.append(float(program(copied, frozen, batches)[1].networks[STUDENT].loss))
        return np.mean(each)

    before = loss(state)
    for _ in range(80):
        state, metrics = program(state, frozen, batches)
    assert int(metrics.bad[0]) == 0 and loss(state) < 0.8 * before
    assert set(state.networks[STUDENT].params) == {LORA}
    changed = jax.tree.map(
        lambda a, b: bool((a != b).any()), first, jax.device_get(state.networks[STUDENT].params)
    )
    assert all(jax.tree.leaves(changed))


@pytest.mark.slow
def test_levels_fall_to_clean_and_the_lowest_step_aims_at_the_teachers_clean_latents():
    goal, frozen, state, batches = begin()
    assert goal.sigmas[0] > 0.99 and goal.sigmas[-1] == 0
    assert (np.diff(goal.sigmas) < 0).all() and len(goal.sigmas) == 9
    batch = jax.tree.map(lambda x: x[0], batches)
    ema = {STUDENT: state.networks[STUDENT].ema}

    def target(level):
        """Of a student that is the teacher, without guidance."""
        plain = dataclasses.replace(
            CONFIG, distill=dataclasses.replace(CONFIG.distill, guidance=0.0)
        )
        same = Consistency(plain, goal.mesh)

        def local(ema, frozen, batch):
            levels = jnp.full(batch.valid.shape, level, jnp.int32)
            inputs = consistency.Inputs(
                batch, batch.latents, jnp.ones_like(batch.latents), levels, jnp.float32(1)
            )
            noisy, clean = same._target(ema, frozen, inputs)
            sigma = same._at(levels)
            velocity = same._velocity(
                "teacher", same.dmd.transformer("teacher", ema, frozen), noisy, sigma, inputs
            )  # fmt: skip
            return clean, noisy - sigma[..., None, None, None] * velocity

        arguments = (ema, frozen, batch)
        spec = jax.P(*mesh_lib.spec(("batch", "chunk", None, None, None, None)))
        return jax.jit(
            jax.shard_map(
                local,
                mesh=goal.mesh,
                in_specs=jax.tree.map(lambda x: jax.typeof(x).sharding.spec, arguments),
                out_specs=(spec, spec),
                check_vma=False,
            )
        )(*arguments)

    # From the lowest level the teacher's step ends at sigma 0: the target is its clean latents.
    clean, by_teacher = target(7)
    np.testing.assert_allclose(clean, by_teacher, atol=2e-5)
