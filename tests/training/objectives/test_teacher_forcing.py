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
from longlive_jax.training import state as state_lib
from longlive_jax.training.objectives import randomness, teacher_forcing
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
    mesh = tiny.objective_of(cfg).mesh
    drawn = randomness.draw(cfg, mesh, key, rows, batch.latents.shape)
    data, noise, index = (np.asarray(x) for x in (batch.latents, drawn.noise, drawn.timestep_index))
    shape = data.shape[:3]
    sigma = np.broadcast_to(table.sigmas[index][..., None], shape).copy()
    timestep = np.broadcast_to(table.timesteps[index][..., None], shape).copy()
    mask = np.broadcast_to(np.asarray(batch.valid)[..., None], shape).astype(np.float32).copy()
    target = noise - data
    if given:
        sigma[:, 0, 0] = timestep[:, 0, 0] = mask[:, 0, 0] = 0
    sigma = sigma[..., None, None, None]
    noisy = (1 - sigma) * data + sigma * noise
    frames = np.arange(shape[1] * shape[2], dtype=np.int32).reshape(1, *shape[1:])
    velocity = jax.jit(dit.teacher_forcing, static_argnums=1)(
        params, cfg.model, jnp.asarray(data), jnp.asarray(noisy), jnp.asarray(timestep),
        jnp.broadcast_to(frames, shape), text=jnp.asarray(np.asarray(batch.text)),
    )  # fmt: skip
    error = ((np.asarray(velocity) - target) ** 2).mean(axis=(-3, -2, -1))
    weighted = error * table.weights[index][..., None] * mask
    return weighted.sum() / mask.sum()


def first(data):
    return jax.tree.map(lambda x: np.asarray(x)[0], data)


def padded(data):
    """The data with padding at the end of one video."""
    valid = np.ones(data.valid.shape, bool)
    valid[0, 1, 2:] = False
    return data.replace(valid=jax.device_put(valid, data.valid.sharding))


def whole(tree):
    return jax.tree.map(np.asarray, tree)


@pytest.mark.parametrize("given", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_loss_is_the_oracles(given):
    cfg = tiny.config(image_to_video=given)
    params = whole(tiny.params_of(tiny.random_state(cfg))["dit"])
    data = tiny.batches(cfg)
    data = padded(data)
    expected = oracle(cfg, params, first(data), given=given)
    _, figures = tiny.run(cfg, 1, data)
    np.testing.assert_allclose(figures[0, 0], expected, rtol=2e-5)


def test_padding_changes_nothing():
    """What stands in chunks that are not valid reaches neither loss nor gradient."""
    cfg = tiny.config()
    data = tiny.batches(cfg)
    data = padded(data)
    other = np.array(data.latents)
    other[0, 1, 2:] = 7.0
    changed = data.replace(latents=jax.device_put(other, data.latents.sharding))
    (a, figures_a), (b, figures_b) = (tiny.run(cfg, 1, d) for d in (data, changed))
    np.testing.assert_array_equal(figures_a, figures_b)
    jax.tree.map(np.testing.assert_array_equal, whole(tiny.params_of(a)), whole(tiny.params_of(b)))


@pytest.fixture(scope="module")
def twenty_steps():
    return tiny.run(tiny.config(), 20)[1]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_twenty_steps_are_the_same_on_every_mesh(mesh, twenty_steps):
    state, figures = tiny.run(tiny.config(mesh), 20)
    np.testing.assert_allclose(figures[:, 0], twenty_steps[:, 0], atol=1e-4)
    np.testing.assert_allclose(figures[:, 1], twenty_steps[:, 1], rtol=1e-3)
    # Sharded state stayed sharded, and nothing was compiled twice.
    expected = state_lib.abstract(tiny.objective_of(tiny.config(mesh)))
    jax.tree.map(
        lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim) or pytest.fail(str(y)),
        state,
        expected,
    )
    assert tiny.program_of(tiny.config(mesh))._cache_size() == 1


def test_the_loss_falls(twenty_steps):
    assert twenty_steps[-5:, 0].mean() < 0.8 * twenty_steps[:5, 0].mean()


@pytest.mark.slow
def test_micro_batches_are_one_batch(twenty_steps):
    """Two batches of one sample draw and weigh what one batch of two does."""
    cfg = tiny.config(batch_size=1, accumulation=2)
    one = tiny.batches(tiny.config())
    where = tiny.objective_of(cfg).batch
    data = jax.tree.map(
        lambda x, like: jax.device_put(np.asarray(x).reshape(like.shape), like.sharding), one, where
    )
    _, figures = tiny.run(cfg, 3, data)
    np.testing.assert_allclose(figures, twenty_steps[:3], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["block", "output"])
def test_what_is_kept_for_the_gradient_changes_nothing(remat, twenty_steps):
    _, figures = tiny.run(tiny.config(remat=remat), 2)
    np.testing.assert_allclose(figures, twenty_steps[:2], rtol=1e-5)


def test_a_step_that_is_not_finite_is_left_out():
    cfg = tiny.config()
    data = tiny.batches(cfg)
    broken = np.array(data.latents)
    broken[0, 0, 0, 0, 0, 0, 0] = np.nan
    broken = data.replace(latents=jax.device_put(broken, data.latents.sharding))
    state = tiny.random_state(cfg)
    before = whole(state.networks)
    for in_row in (1, 2):
        state, metrics = tiny.step(cfg, state, broken)
        assert list(metrics.bad) == [in_row, in_row]
        assert not np.isfinite(metrics.networks[teacher_forcing.MODEL].loss)
    jax.tree.map(np.testing.assert_array_equal, before, whole(state.networks))
    state, metrics = tiny.step(cfg, state, data)
    assert list(metrics.bad) == [2, 0] and int(state.step) == 3


def test_the_average_begins_late():
    cfg = tiny.config(ema_start=1, ema_decay=0.5)
    state, data = tiny.random_state(cfg), tiny.batches(cfg)
    weights = []
    for _ in range(3):
        state, _ = tiny.step(cfg, state, data)
        weights.append(whole(tiny.params_of(state)))
    expected = weights[0]
    for new in weights[1:]:
        expected = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, expected, new)
    ema = whole(state.networks[teacher_forcing.MODEL].ema)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ema, expected)


@pytest.mark.slow
def test_the_text_encoder_learns_when_asked():
    cfg = tiny.config(text_encoder=True)
    before = whole(tiny.params_of(tiny.random_state(cfg))["umt5"])
    state, figures = tiny.run(cfg, 2)
    mesh_figures = tiny.run(tiny.config(lib.Mesh(fsdp=2, seq=4), text_encoder=True), 2)[1]
    np.testing.assert_allclose(figures, mesh_figures, rtol=2e-4)
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), before, whole(tiny.params_of(state)["umt5"])
    )
    flat = params_lib.flatten(moved)
    assert all(change > 0 for path, change in flat.items()), flat


@pytest.mark.slow
def test_noise_on_the_context_and_no_clean_copy_are_other_losses(twenty_steps):
    _, noisy = tiny.run(tiny.config(context_levels=300), 1)
    _, causal = tiny.run(tiny.config(teacher_forcing=False), 1)
    losses = [twenty_steps[0, 0], noisy[0, 0], causal[0, 0]]
    assert np.all(np.isfinite(losses)) and len(set(losses)) == 3


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_the_optimiser_is_adamw(beta1):
    cfg = lib.Train(beta1=beta1, learning_rate=0.1, max_grad_norm=1e9, weight_decay=0.01)
    ours, theirs = (
        teacher_forcing.optimizer(cfg),
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
