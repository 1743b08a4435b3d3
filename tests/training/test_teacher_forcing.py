"""The training step: its loss by an oracle, and what must not change it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from longlive_jax import config as lib
from longlive_jax import params as params_lib
from longlive_jax.diffusion import schedule
from longlive_jax.models import dit
from longlive_jax.training import draws as draws_lib
from longlive_jax.training import state as state_lib
from tests.training import tiny

MESHES = [
    lib.Mesh(fsdp=2, seq=4),
    *(pytest.param(m, marks=pytest.mark.slow) for m in (lib.Mesh(seq=4), lib.Mesh(data=2, seq=2))),
]


def oracle(cfg, params, batch, step=0, given=False):
    """Loss of one batch, without mesh or remat: the formulas of arXiv 2605.18739 written out."""
    table = schedule.training_schedule(cfg.video.shift)
    key = jax.random.fold_in(jax.random.key(cfg.train.seed), step)
    rows = jnp.arange(cfg.train.batch_size, dtype=jnp.int32)
    drawn = draws_lib.draw(cfg, tiny.step_of(cfg).mesh, key, rows, batch.latents.shape)
    data, noise, levels = (np.asarray(x) for x in (batch.latents, drawn.noise, drawn.levels))
    shape = data.shape[:3]
    sigma = np.broadcast_to(table.sigmas[levels][..., None], shape).copy()
    timestep = np.broadcast_to(table.timesteps[levels][..., None], shape).copy()
    mask = np.broadcast_to(np.asarray(batch.real)[..., None], shape).astype(np.float32).copy()
    target = noise - data
    if given:
        sigma[:, 0, 0] = timestep[:, 0, 0] = mask[:, 0, 0] = 0
    sigma = sigma[..., None, None, None]
    noisy = (1 - sigma) * data + sigma * noise
    frames = np.arange(shape[1] * shape[2], dtype=np.int32).reshape(1, *shape[1:])
    velocity = jax.jit(dit.teacher_forcing, static_argnums=1)(
        params, cfg.model, jnp.asarray(data), jnp.asarray(noisy), jnp.asarray(timestep),
        jnp.broadcast_to(frames, shape), text=jnp.asarray(np.asarray(batch.context)),
    )  # fmt: skip
    error = ((np.asarray(velocity) - target) ** 2).mean(axis=(-3, -2, -1))
    weighted = error * table.weights[levels][..., None] * mask
    return weighted.sum() / mask.sum()


def first(data):
    return jax.tree.map(lambda x: np.asarray(x)[0], data)


def whole(tree):
    return jax.tree.map(np.asarray, tree)


@pytest.mark.parametrize("given", [False, True])
def test_the_loss_is_the_oracles(given):
    cfg = tiny.config(image_to_video=given)
    params = whole(tiny.random_state(cfg).params["dit"])
    data = tiny.batches(cfg)
    real = np.ones(data.real.shape, bool)
    real[0, 1, 2:] = False
    data = data.replace(real=jax.device_put(real, data.real.sharding))
    expected = oracle(cfg, params, first(data), given=given)
    _, told = tiny.run(cfg, 1, data)
    np.testing.assert_allclose(told[0, 0], expected, rtol=2e-5)


def test_padding_changes_nothing():
    """What stands in chunks that are not real reaches neither loss nor gradient."""
    cfg = tiny.config()
    data = tiny.batches(cfg)
    real = np.ones(data.real.shape, bool)
    real[0, 1, 2:] = False
    data = data.replace(real=jax.device_put(real, data.real.sharding))
    other = np.array(data.latents)
    other[0, 1, 2:] = 7.0
    changed = data.replace(latents=jax.device_put(other, data.latents.sharding))
    (a, told_a), (b, told_b) = (tiny.run(cfg, 1, d) for d in (data, changed))
    np.testing.assert_array_equal(told_a, told_b)
    jax.tree.map(np.testing.assert_array_equal, whole(a.params), whole(b.params))


@pytest.fixture(scope="module")
def twenty_steps():
    return tiny.run(tiny.config(), 20)[1]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_twenty_steps_are_the_same_on_every_mesh(mesh, twenty_steps):
    state, told = tiny.run(tiny.config(mesh), 20)
    np.testing.assert_allclose(told[:, 0], twenty_steps[:, 0], atol=1e-4)
    np.testing.assert_allclose(told[:, 1], twenty_steps[:, 1], rtol=1e-3)
    # Sharded state stayed sharded, and nothing was compiled twice.
    step = tiny.step_of(tiny.config(mesh))
    expected = state_lib.abstract(step.cfg, step.mesh)
    jax.tree.map(
        lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim) or pytest.fail(str(y)),
        state,
        expected,
    )
    assert step.step._cache_size() == 1


def test_the_loss_falls(twenty_steps):
    assert twenty_steps[-5:, 0].mean() < 0.8 * twenty_steps[:5, 0].mean()


def test_micro_batches_are_one_batch(twenty_steps):
    """Two batches of one sample draw and weigh what one batch of two does."""
    cfg = tiny.config(batch_size=1, accumulation=2)
    one = tiny.batches(tiny.config())
    where = tiny.step_of(cfg).batch_abstract()
    data = jax.tree.map(
        lambda x, like: jax.device_put(np.asarray(x).reshape(like.shape), like.sharding), one, where
    )
    _, told = tiny.run(cfg, 3, data)
    np.testing.assert_allclose(told, twenty_steps[:3], rtol=1e-4)


@pytest.mark.parametrize("remat", [pytest.param("block", marks=pytest.mark.slow), "output"])
def test_what_is_kept_for_the_gradient_changes_nothing(remat, twenty_steps):
    _, told = tiny.run(tiny.config(remat=remat), 2)
    np.testing.assert_allclose(told, twenty_steps[:2], rtol=1e-5)


def test_a_step_that_is_not_finite_is_left_out():
    cfg = tiny.config()
    data = tiny.batches(cfg)
    broken = np.array(data.latents)
    broken[0, 0, 0, 0, 0, 0, 0] = np.nan
    broken = data.replace(latents=jax.device_put(broken, data.latents.sharding))
    step, state = tiny.step_of(cfg).step, tiny.random_state(cfg)
    before = whole((state.params, state.optimizer, state.average))
    for in_row in (1, 2):
        state, report = step(state, broken)
        assert list(report.bad) == [in_row, in_row] and not np.isfinite(report.told.loss)
    after = whole((state.params, state.optimizer, state.average))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    state, report = step(state, data)
    assert list(report.bad) == [2, 0] and int(state.step) == 3


def test_the_average_begins_late():
    cfg = tiny.config(ema_start=1, ema_decay=0.5)
    step, state, data = tiny.step_of(cfg).step, tiny.random_state(cfg), tiny.batches(cfg)
    weights = []
    for _ in range(3):
        state, _ = step(state, data)
        weights.append(whole(state.params))
    expected = weights[0]
    for new in weights[1:]:
        expected = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, expected, new)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole(state.average), expected
    )


@pytest.mark.slow
def test_the_text_encoder_learns_when_asked():
    cfg = tiny.config(text_encoder=True)
    before = whole(tiny.random_state(cfg).params["umt5"])
    state, told = tiny.run(cfg, 2)
    mesh_told = tiny.run(tiny.config(lib.Mesh(fsdp=2, seq=4), text_encoder=True), 2)[1]
    np.testing.assert_allclose(told, mesh_told, rtol=2e-4)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, whole(state.params["umt5"]))
    flat = params_lib.flatten(moved)
    assert all(change > 0 for path, change in flat.items()), flat


def test_noise_on_the_context_and_no_clean_copy_are_other_losses(twenty_steps):
    _, noisy = tiny.run(tiny.config(context_levels=300), 1)
    _, causal = tiny.run(tiny.config(teacher_forcing=False), 1)
    losses = [twenty_steps[0, 0], noisy[0, 0], causal[0, 0]]
    assert np.all(np.isfinite(losses)) and len(set(losses)) == 3


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_the_optimiser_is_adamw(beta1):
    cfg = lib.Train(beta1=beta1, learning_rate=0.1, max_grad_norm=1e9, weight_decay=0.01)
    ours, theirs = (
        state_lib.optimizer(cfg),
        optax.adamw(0.1, beta1, cfg.beta2, cfg.epsilon, weight_decay=0.01),
    )
    params = jnp.asarray([1.0, -2.0, 3.0])
    with jax.numpy_dtype_promotion("standard"):
        states = [ours.init(params), theirs.init(params)]
        for i in range(3):
            gradient = jnp.asarray([0.3, -0.1, 2.0]) * (i + 1)
            (a, states[0]), (b, states[1]) = (
                o.update(gradient, s, params) for o, s in zip((ours, theirs), states)
            )
            np.testing.assert_allclose(a, b, rtol=1e-5)


def test_training_levels_are_the_originals():
    """The values that reference implementations print for shift 5."""
    table = schedule.training_schedule(5.0)
    np.testing.assert_allclose(table.sigmas[[0, 999]], [1.0, 0.00498008], rtol=1e-5)
    np.testing.assert_allclose(table.sigmas.mean(), 0.74755, rtol=1e-4)
    np.testing.assert_allclose(
        table.weights[[0, 100, 300, 500, 700, 833, 900, 999]],
        [0, 0.13907, 0.50104, 1.02486, 1.73878, 2.07640, 1.86535, 0.03188], rtol=1e-3,
    )  # fmt: skip
    np.testing.assert_allclose(table.weights.mean(), 1.0, rtol=1e-5)
