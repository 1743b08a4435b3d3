"""Distillation under actions: the sampler and the trainer stay one model, and actions matter."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from longlive_jax import config as lib
from longlive_jax import params as params_lib
from longlive_jax.errors import InputError
from longlive_jax.models import actions
from longlive_jax.training.objectives.dmd import CRITIC, DIT, STUDENT
from tests.training import dmd_parts, tiny_distill

ACTIONS = lib.Actions(kind="module", heads=4, head_dim=8, keyboard_embed=8, window=6, layers=1)
NETWORKS = (STUDENT, CRITIC)


def config(mesh=lib.Mesh(), own=ACTIONS, **distill):
    """Six chunks of four latents; the window has place for four."""
    model = dict(actions=own, num_layers=1)
    return tiny_distill.config(mesh, model=model, latent_frames=24, **distill)


@functools.cache
def parts_of(cfg):
    goal, params, frozen = tiny_distill.begin(cfg)
    if cfg.distill.lora.enabled:
        # Each network's path is its own; the base has the teacher's.
        for seed, name in enumerate(NETWORKS, 11):
            _, path = actions.split(tiny_distill.weights(cfg, seed), cfg.model)
            where = params_lib.shardings(goal.networks[name].specs[DIT], goal.mesh)
            params[name][DIT] = jax.device_put(path, where)
    return dmd_parts.Parts(goal, params, frozen)


def draws(cfg, goal, **given):
    draw, chunks = np.random.default_rng(4), 6
    shape = (2, chunks, 4, 4, 4, 4)
    return dmd_parts.draws(
        cfg, goal.mesh, draw.standard_normal(shape), draw.standard_normal(shape),
        draw.integers(0, 1000, (2, chunks)), given.get("exit_step", 1),
    )  # fmt: skip


def vectors(goal):
    """Of each latent, cut from the same vectors of pictures; the draws of a rollout know the rest."""
    draw, cfg = np.random.default_rng(7), goal.cfg.model

    def one(name, like):
        pictures = draw.standard_normal((2, 4 * 24, like.shape[-1])).astype(np.float32)
        windows = actions.windows(pictures, cfg.actions, 24).reshape(like.shape[1:])
        return jax.device_put(windows, jax.NamedSharding(goal.mesh, jax.P(*like.sharding.spec[1:])))

    return {name: one(name, like) for name, like in goal.batch.actions.items()}


@functools.cache
def graded(cfg):
    """The student's inputs with g, its gradient, loss and metrics."""
    own = parts_of(cfg)
    batches = tiny_distill.batches(own.goal)
    scripts = jax.tree.map(lambda x: x[0], batches)
    scripts = scripts.replace(actions=vectors(own.goal))
    inputs = own.roll(scripts, draws(cfg, own.goal))
    inputs = inputs.replace(g=own.scores(inputs).g)
    gradient, loss, values = own.gradient(STUDENT, inputs)
    return inputs, params_lib.flatten(jax.device_get(gradient)), loss, values


@pytest.mark.slow
def test_the_sampler_and_the_trainer_are_one_model():
    """Past the window, through a cut, with adapters and a path of its own over shared weights."""
    _, gradient, loss, values = graded(config())
    assert values["rollout_difference"] < 1e-4 and np.isfinite(loss)
    path = [x for place, x in gradient.items() if place[0] == DIT]
    assert path and all(np.abs(x).max() > 0 for x in path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cfg",
    [
        config(gradient="through"),
        config(own=dataclasses.replace(ACTIONS, window=0)),
        config(own=dataclasses.replace(ACTIONS, mouse_dim=0, pad=11), exit="chunk"),
        config(own=lib.Actions(kind="token")),
        config(lora=tiny_distill.WHOLE, context="final"),
    ],
    ids=["through", "all latents", "no mouse", "token", "whole"],
)
def test_whatever_the_path(cfg):
    *_, values = graded(cfg)
    assert values["rollout_difference"] < 1e-4


@pytest.mark.slow
def test_stop_and_through_differ_in_the_gradient_alone():
    _, stopped, loss, _ = graded(config())
    _, through, same, _ = graded(config(gradient="through"))
    np.testing.assert_allclose(same, loss, rtol=1e-5)
    assert any(np.abs(stopped[place] - through[place]).max() > 1e-6 for place in stopped)


@pytest.mark.slow
def test_guidance_goes_away_from_doing_nothing():
    """real = r_c + 3 (r_c - r_u) + 2 (r_c - r_a), of the same clip."""
    cfg = config(action_guidance=2.0)
    inputs, *_ = graded(config())
    scores = parts_of(cfg).scores(inputs)
    conditioned, other, still = (
        np.asarray(getattr(scores, f"real_{name}_x0")) for name in ("cond", "uncond", "still")
    )
    assert np.abs(conditioned - still).max() > 1e-3
    real = conditioned + 3 * (conditioned - other) + 2 * (conditioned - still)
    x0 = np.asarray(inputs.clip.x0)
    normaliser = np.abs(x0 - real).mean(axis=(2, 3, 4, 5))
    g = (np.asarray(scores.fake_x0) - real) / normaliser[..., None, None, None, None]
    np.testing.assert_allclose(np.asarray(scores.g), g, atol=1e-4 * np.abs(g).max())


@pytest.mark.slow
def test_a_mesh_changes_nothing():
    _, expected, loss, _ = graded(config())
    _, found, same, values = graded(config(lib.Mesh(data=2, seq=2)))
    np.testing.assert_allclose(same, loss, rtol=1e-4)
    assert values["rollout_difference"] < 1e-4
    for place, x in expected.items():
        np.testing.assert_allclose(found[place], x, atol=1e-3 * np.abs(x).max(), err_msg=str(place))


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(InputError, match=r"actions\.guidance=3\.0 must be 1\.0: .*action_guidance"):
        config(own=dataclasses.replace(ACTIONS, guidance=3.0))
    with pytest.raises(
        InputError, match=r"distill\.action_guidance=1\.0 with actions\.kind='none'"
    ):
        tiny_distill.config(action_guidance=1.0)
