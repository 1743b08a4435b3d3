"""Training steps in quantised recipes."""

import dataclasses

import jax
import numpy as np
import pytest

from longlive_jax import config as lib
from longlive_jax.errors import InputError
from tests.training import tiny

SLOW_NVFP4 = pytest.param("nvfp4_ar", marks=pytest.mark.slow)  # minutes, for XLA's CPU compiler


def config(recipe, mesh=lib.Mesh(), **train):
    return dataclasses.replace(tiny.config(mesh, **train), quant=lib.Quant(recipe=recipe))


def losses(recipe, steps, mesh=lib.Mesh(), **train):
    return tiny.run(config(recipe, mesh, **train), steps)[1]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp8_train", SLOW_NVFP4])
def test_the_loss_falls_as_unquantised(recipe):
    exact, quantised = losses("bf16", 20)[:, 0], losses(recipe, 20)[:, 0]
    assert not np.array_equal(exact, quantised)
    np.testing.assert_allclose(quantised, exact, rtol=0.05)
    assert quantised[-5:].mean() < 0.8 * quantised[:5].mean()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp8_train", SLOW_NVFP4])
def test_the_mesh_changes_nothing(recipe):
    """Scales are agreed on, and rounding is by keys that no device has a part in."""
    one = losses(recipe, 3)
    many = losses(recipe, 3, lib.Mesh(data=1, fsdp=2, seq=2))
    # A last bit of a sum may round a number to its neighbour, which in 4 bits is far away.
    np.testing.assert_allclose(many[:, 0], one[:, 0], rtol=2e-3)
    np.testing.assert_allclose(many[:, 1], one[:, 1], rtol=2e-2)


@pytest.mark.slow
def test_steps_round_their_gradients_by_their_number():
    """The same step again is the same; another seed's is another."""
    a, b = (tiny.params_of(tiny.run(config("nvfp4_ar"), 2)[0]) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_recipe_without_gradients_is_refused():
    with pytest.raises(
        InputError, match=r"quant\.recipe='fp8' is for sampling; train in one of bf16"
    ):
        lib.validate_training(config("fp8"))
