"""A recipe of known formats is data: one entry of a table. It trains, samples and is configured."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import config as config_lib
from longlive_jax import recipes
from longlive_jax.formats import FP8, NVFP4
from longlive_jax.recipes import Gradients, Recipe
from tests.quant.test_linear import error, layer, step, tokens
from tests.sampling import test_quantized_sampling as sampling

FP8_EVERYWHERE = Recipe("fp8_e4m3", FP8(), FP8(), Gradients(dgrad=FP8("float8_e4m3fn")))
# Weights at code 4; gradients to nearest, and weights' gradients without the transform.
NVFP4_NEAREST = Recipe(
    "nvfp4_nearest",
    activation=NVFP4("static_6"),
    weight=NVFP4("static_4", (16, 16)),
    gradients=Gradients(NVFP4("static_6"), NVFP4("static_6"), NVFP4("static_6")),
)


@pytest.fixture(params=[FP8_EVERYWHERE, NVFP4_NEAREST], ids=lambda recipe: recipe.name)
def recipe(request, monkeypatch):
    monkeypatch.setitem(recipes.RECIPES, request.param.name, request.param)
    return request.param


def test_a_layer_and_its_gradients(recipe):
    p, x, dy = layer(64, 96), tokens(2, 32, 64), tokens(2, 32, 96, seed=8)
    got = step(recipes.get(recipe.name).at("self_attn.qkv"), p, x, dy)
    bound = 0.06 if recipe is FP8_EVERYWHERE else 0.22
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(step(None, p, x, dy)), strict=True):
        assert a.dtype == b.dtype == jnp.bfloat16 and 0 < error(a, b) < bound


def test_the_config_takes_it(recipe):
    config_lib.validate_training(config_lib.Config(quant=config_lib.Quant(recipe=recipe.name)))


def test_a_sampler(monkeypatch):
    monkeypatch.setitem(recipes.RECIPES, FP8_EVERYWHERE.name, FP8_EVERYWHERE)
    latents = sampling.run.__wrapped__(sampling.make_config(FP8_EVERYWHERE.name), chunks=1)
    assert np.isfinite(latents).all()
