"""Distillation as a run: laws of its draws, any mesh, random lengths, and exact resume.

A step of the student is compiled for one device and for eight. Steps of both networks, and a whole
run of them, are slow tests; test_dmd_gaussian.py has a run whose networks are two numbers each.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import config as lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.diffusion import schedule
from longlive_jax.training import loop, state
from longlive_jax.training.objectives import rollout
from longlive_jax.training.objectives.dmd import CRITIC, STUDENT
from tests.training import tiny_distill
from tests.training.dmd_parts import error

MESH = lib.Mesh(data=2, fsdp=2, seq=2)
STEPS = 6
# Lengths of 4 to 6 chunks, of which 4 are visible together. With a first moment, the optimiser's
# state has the gradient.
CONFIG = tiny_distill.config(
    accumulation=2, latent_frames=24, least_frames=16, beta1=0.9, max_grad_norm=1e6, steps=STEPS, save_every=1,
    keep_last=STEPS,
)  # fmt: skip
# A length that is not the whole, and a step of the student that is not the first.
LENGTH, EXIT = 5, 1


# ---------------------------------------------------------------------------------------------
# What a step draws.


def drawn(cfg, keys, rows=(0, 1)):
    """Exit steps, lengths and levels of these keys [n]."""
    mesh, rows = mesh_lib.make_mesh(cfg.mesh), jnp.asarray(rows, jnp.int32)

    @jax.jit
    def run(keys):
        def one(key):
            found = rollout.draw(cfg, mesh, key, rows)
            return found.exit_step, found.length, found.level

        return jax.lax.map(one, keys)

    with jax.set_mesh(mesh):
        return [np.asarray(x) for x in run(keys)]


def test_the_laws_of_exits_lengths_and_timesteps():
    keys = jax.random.split(jax.random.key(0), 10_000)
    shared = tiny_distill.config(least_frames=8, sample=dict(steps=4))
    exits, lengths, levels = drawn(shared, keys)
    assert np.all(exits == exits[:, :1]) and np.all(levels == levels[..., :1])
    for found, values in ((exits[:, 0], range(4)), (lengths, (2, 3, 4))):
        counts = np.bincount(found, minlength=5)
        assert set(np.flatnonzero(counts)) == set(values)
        np.testing.assert_allclose(counts[list(values)] / 1e4, 1 / len(values), atol=0.02)
    flat = levels[..., 0].ravel()
    assert (flat.min(), flat.max()) == (0, 999)
    np.testing.assert_allclose(np.histogram(flat, 10)[0] / flat.size, 0.1, atol=0.01)
    # Of the timesteps that these stand for, five levels are at the least, 93 at the most.
    d = shared.distill
    law = schedule.score_law(5.0, d.least_timestep, d.most_timestep).timesteps
    t = law[flat]
    assert np.mean(t == 20) == pytest.approx(0.005, abs=0.002)
    assert np.mean(t == 980) == pytest.approx(0.093, abs=0.01)
    u = np.array([0.25, 0.5, 0.75])
    np.testing.assert_allclose(np.quantile(t, u), 5000 * u / (1 + 4 * u), rtol=0.02)
    # Samples are independent of each other and of the exit step.
    assert abs(np.corrcoef(levels[:, 0, 0], levels[:, 1, 0])[0, 1]) < 0.05
    assert abs(np.corrcoef(levels[:, 0, 0], exits[:, 0])[0, 1]) < 0.05


def test_one_exit_a_chunk_and_one_level_a_chunk_with_an_image():
    keys = jax.random.split(jax.random.key(0), 2000)
    cfg = tiny_distill.config(exit="chunk", image_to_video=True, sample=dict(steps=4))
    exits, lengths, levels = drawn(cfg, keys)
    assert np.all(lengths == 4)
    for a, b in ((exits[:, 0], exits[:, 3]), (levels[:, 0, 0], levels[:, 0, 3])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.1
    counts = [np.bincount(exits[:, c], minlength=4) / 2000 for c in range(4)]
    np.testing.assert_allclose(counts, 0.25, atol=0.05)


def test_draws_are_the_same_on_every_mesh():
    """The exit step and the length are whole on every device: all leave together."""
    one = tiny_distill.config(batch_size=4, exit="chunk", least_frames=8)
    rows, found = jnp.arange(4, dtype=jnp.int32), []
    for cfg in (one, dataclasses.replace(one, mesh=MESH)):
        mesh = mesh_lib.make_mesh(cfg.mesh)
        program = jax.jit(functools.partial(rollout.draw, cfg, mesh))
        with jax.set_mesh(mesh):
            found.append(program(jax.random.key(3), rows))
    for name in ("noise", "eps", "level", "exit_step", "length"):
        np.testing.assert_array_equal(*(np.asarray(getattr(x, name)) for x in found))
    for name in ("exit_step", "length"):
        array = getattr(found[1], name)
        shards = [np.asarray(shard.data) for shard in array.addressable_shards]
        assert len(shards) == 8 and all(np.array_equal(x, shards[0]) for x in shards)
        assert shards[0].shape == array.shape


# ---------------------------------------------------------------------------------------------
# A step.


@functools.cache
def seed():
    """One with which both batches of the first step have the same exit and length."""
    seeds = jnp.arange(6000)
    step = jax.vmap(lambda s: jax.random.fold_in(jax.random.key(s), 0))(seeds)
    each = jax.vmap(jax.random.fold_in, (0, None))
    keys = jnp.concatenate([each(step, network) for network in range(2)])
    good = np.ones(len(seeds), bool)
    for rows in ((0, 1), (2, 3)):
        exits, lengths, _ = drawn(CONFIG, keys, rows)
        good &= np.all(((exits[:, 0] == EXIT) & (lengths == LENGTH)).reshape(2, -1), axis=0)
    return int(np.flatnonzero(good)[0])


def config():
    return dataclasses.replace(CONFIG, distill=dataclasses.replace(CONFIG.distill, seed=seed()))


@functools.cache
def program(mesh=None):
    """The objective, its step, what is frozen, and how a run begins."""
    cfg = config()
    if mesh is not None:
        one_batch = dataclasses.replace(cfg.distill, batch_size=4, accumulation=1)
        cfg = dataclasses.replace(cfg, mesh=mesh, distill=one_batch)
    goal, params, frozen = tiny_distill.begin(cfg)
    return goal, tiny_distill.CompiledOnce(goal), frozen, jax.device_get(params)


def begin(goal, params):
    """Initial parameters; `state.init` takes them away."""
    like = state.abstract(goal).networks
    where = {name: jax.tree.map(lambda x: x.sharding, like[name].params) for name in params}
    return jax.device_put(params, where)


def one_step(due, mesh=None, change=lambda text: text):
    """State and metrics after a first step of these networks; `change` edits the texts [row, chunk,
    ...].
    """
    goal, step, frozen, params = program(mesh)
    made = tiny_distill.batches(program()[0])
    text = change(np.array(made.text).reshape(4, *made.text.shape[2:]))
    cut = np.asarray(made.cut).reshape(4, -1)
    like = goal.batch
    batch = like.replace(
        text=jax.device_put(text.reshape(like.text.shape), like.text.sharding),
        cut=jax.device_put(cut.reshape(like.cut.shape), like.cut.sharding),
    )
    now = state.init(goal, begin(goal, params))
    return jax.device_get(step.compiled(due)(now, frozen, batch))


BOTH = pytest.param((STUDENT, CRITIC), marks=pytest.mark.slow)


@pytest.fixture(
    scope="module",
    params=[pytest.param((STUDENT,), marks=pytest.mark.slow), BOTH],
    ids=["student", "both"],
)
def first(request):
    return request.param, one_step(request.param)


def test_mesh_and_accumulation_change_nothing(first):
    """Two batches of two on one device, and one batch of four on eight."""
    due, (theirs, metrics) = first
    ours, ours_metrics = one_step(due, MESH)
    assert set(metrics.networks) == set(due)
    for name in due:
        got, expected = (m.networks[name] for m in (ours_metrics, metrics))
        np.testing.assert_allclose(got.loss, expected.loss, rtol=1e-5)
        np.testing.assert_allclose(got.grad_norm, expected.grad_norm, rtol=1e-4)
        pairs = (jax.tree.leaves(s.networks[name].opt_state) for s in (ours, theirs))
        for a, b in zip(*pairs, strict=True):
            assert np.any(b) and error(a, b) <= 2e-4
    got, expected = (m.networks[STUDENT].values for m in (ours_metrics, metrics))
    assert set(got) == {"g", "rollout_difference"}
    np.testing.assert_allclose(got["g"], expected["g"], rtol=1e-5)
    assert 0 < got["rollout_difference"] < 1e-4 and 0 < expected["rollout_difference"] < 1e-4


def test_nothing_behind_the_rollouts_length_counts(first):
    """Another text for a chunk that no rollout of the step reaches; and for one that each does."""
    due, expected = first

    def other(chunk, text):
        text[:, chunk] = 1 - text[:, chunk]
        return text

    assert CONFIG.distill.latent_frames // CONFIG.model.chunk_frames > LENGTH
    behind = one_step(due, change=functools.partial(other, LENGTH))
    jax.tree.map(np.testing.assert_array_equal, behind, expected)
    within = one_step(due, change=functools.partial(other, LENGTH - 1))[1]
    for name in due:
        assert within.networks[name].loss != expected[1].networks[name].loss


# ---------------------------------------------------------------------------------------------
# A run.


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_bits_from_every_residue(monkeypatch, tmp_path):
    goal, step, frozen, params = program()
    inputs = loop.Inputs(
        batches=lambda steps: ((tiny_distill.batches(goal, i), None) for i in steps),
        params=lambda: begin(goal, params),
        frozen=frozen,
    )
    log = tiny_distill.check_resume(step, inputs, tmp_path, monkeypatch)
    every = CONFIG.distill.student_every
    assert all(line[STUDENT + "_rollout_difference"] < 1e-4 for line in log[::every])
