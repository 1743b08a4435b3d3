"""Teacher forcing with actions: the same on a mesh, gradients of the path, dropped actions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import config as lib
from longlive_jax import params as params_lib
from longlive_jax.training.objectives import randomness
from tests.training import tiny


@functools.cache
def config(mesh=lib.Mesh(), dropout=0.0):
    cfg = tiny.config(mesh)
    own = lib.Actions(
        kind="module", heads=4, head_dim=8, keyboard_embed=8, window=6, layers=1, dropout=dropout
    )
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, actions=own))


def trained(cfg):
    state, figures = tiny.run(cfg, 1)
    return params_lib.flatten(jax.device_get(tiny.params_of(state))), figures


@pytest.mark.slow
def test_a_mesh_changes_nothing_and_the_path_learns():
    expected, figures = trained(config())
    found, on_mesh = trained(config(lib.Mesh(fsdp=2, seq=4)))
    np.testing.assert_allclose(on_mesh, figures, rtol=1e-5)
    before = params_lib.flatten(jax.device_get(tiny.params_of(tiny.random_state(config()))))
    for path, weight in found.items():
        np.testing.assert_allclose(weight, expected[path], atol=2e-5, err_msg="/".join(path))
        if "action_model" in path:
            assert np.abs(weight - before[path]).max() > 1e-4, path


@pytest.mark.slow
def test_dropped_actions_are_no_actions():
    data = tiny.batches(config())
    still = jax.tree.map(jnp.zeros_like, data.actions)
    _, expected = tiny.run(config(), 1, data.replace(actions=still))
    _, found = tiny.run(config(dropout=1.0), 1, data)
    np.testing.assert_array_equal(found, expected)
    _, kept = tiny.run(config(), 1, data)
    assert (kept != expected).all()


def test_a_share_of_clips_is_dropped():
    objective = tiny.objective_of(config())
    rows = jnp.arange(512, dtype=jnp.int32)
    kept = np.asarray(randomness.kept(objective.mesh, jax.random.key(0), rows, 0.25))
    assert set(kept) == {0, 1} and 0.7 < kept.mean() < 0.8
