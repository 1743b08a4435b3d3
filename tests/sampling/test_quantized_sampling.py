"""Sampling with quantised linear layers."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax import recipes as recipe_lib
from longlive_jax.errors import InputError
from longlive_jax.formats import PendingMatmul
from longlive_jax.models import dit
from longlive_jax.quant import linear as linear_lib
from longlive_jax.sampling import stream
from tests.sampling import test_stream
from tests.sampling.test_quantized_cache import error

SIZE = test_stream.SIZE
MODEL = dataclasses.replace(test_stream.MODEL, dim=128, ffn_dim=192)


def make_config(recipe, kv="bf16", **others):
    cfg = test_stream.make_config(**others)
    return dataclasses.replace(cfg, model=MODEL, quant=config_lib.Quant(recipe=recipe, kv=kv))


@functools.cache
def random_params():
    return test_stream.draw_params(MODEL)


@functools.cache
def run(cfg, chunks=3, batch=1):
    sampler = stream.Sampler(cfg, mesh_lib.make_mesh(cfg.mesh))
    params = sampler.prepare(random_params())
    jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(str(s)),
                 params, sampler.param_shardings)  # fmt: skip
    state = sampler.init_state(batch, *SIZE)
    inputs = test_stream.make_inputs(cfg, chunks, batch, cuts=(2,))
    return np.concatenate(
        [np.asarray(latents) for _, latents in test_stream.steps(sampler, params, state, inputs)],
        axis=1,
    )


@pytest.mark.parametrize(
    "recipe, limit", [("fp8", 0.06), pytest.param("nvfp4_w4a4", 0.25, marks=pytest.mark.slow)]
)
def test_the_error_is_that_of_the_format(recipe, limit):
    assert 0 < error(run(make_config(recipe)), run(make_config("bf16"))) < limit


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp8", "nvfp4_w4a4"])
def test_the_mesh_changes_nothing(recipe):
    """But for last bits of sums, which now and then round to another code."""
    mesh = config_lib.Mesh(fsdp=2, seq=2)
    one, many = (run(make_config(recipe, mesh=m), batch=2) for m in (config_lib.Mesh(), mesh))
    assert error(many, one) < 5e-3


@pytest.mark.slow
def test_products_before_their_scales(monkeypatch):
    """What a Hopper GPU is given, by its fallbacks: but for roundings, and the codes they move."""
    cfg = make_config("fp8")
    expected = run(cfg)
    given, make = [], linear_lib.product

    def product(*args):
        given.append(make(*args))
        return given[-1]

    with monkeypatch.context() as m:
        m.setattr(linear_lib, "is_hopper", lambda: True)
        m.setattr(linear_lib, "product", product)
        jax.clear_caches()  # a layer is traced once
        latents = run.__wrapped__(cfg)
    jax.clear_caches()
    assert {type(y) for y in given} == {PendingMatmul}
    assert 0 < error(latents, expected) < 0.03


@pytest.mark.slow
def test_with_a_quantised_cache():
    both = run(make_config("nvfp4_w4a4", kv="nvfp4"))
    assert 0 < error(both, run(make_config("nvfp4_w4a4"))) < 0.1


@pytest.mark.parametrize("recipe, share", [("fp8", 0.51), ("nvfp4_w4a4", 0.29)])
def test_bytes_of_the_full_size_blocks(recipe, share):
    def size(recipe):
        specs = dit.sampling_spec(config_lib.Model(), recipe_lib.get(recipe), np.dtype("bfloat16"))
        leaves = jax.tree.leaves(params_lib.abstract(specs["blocks"], dtype="bfloat16"))
        bits = (4 if x.dtype == "float4_e2m1fn" else 8 * x.dtype.itemsize for x in leaves)
        return sum(b * x.size for b, x in zip(bits, leaves))

    assert size(recipe) / size("bf16") < share


def test_bad_settings():
    with pytest.raises(InputError, match=r"quant\.recipe='int4' must be one of bf16, fp8,"):
        make_config("int4")
    with pytest.raises(InputError, match=r"model\.ffn_dim=100 must be a multiple of numbers a bl"):
        dataclasses.replace(make_config("nvfp4_ar"), model=dataclasses.replace(MODEL, ffn_dim=100))
