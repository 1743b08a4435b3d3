"""Trees of quantised weights: on any mesh, through specs, checkpoints and a layer's gather."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax import recipes as recipe_lib
from longlive_jax.errors import InputError
from longlive_jax.formats import FP8Tensor, NVFP4Tensor
from longlive_jax.models import dit
from longlive_jax.quant import weights
from longlive_jax.quant.linear import linear

MODEL = config_lib.Model(
    dim=64, ffn_dim=64, num_heads=4, num_layers=2, in_dim=4, out_dim=4, text_dim=8, text_len=16,
    freq_dim=32,
)  # fmt: skip
SPECS = dit.spec(MODEL)


def equal(a, b):
    def bits(x):
        return np.asarray(x).view(np.uint8)

    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(bits(x), bits(y)), a, b)


@pytest.fixture(scope="module", params=["fp8", "nvfp4_te"])
def quantized(request):
    recipe = recipe_lib.get(request.param)
    params = params_lib.init(SPECS, jax.random.key(0))
    return recipe, params, weights.quantize_params(params, SPECS, recipe)


def test_specs_say_what_is_made(quantized):
    recipe, _, tree = quantized
    abstract = params_lib.abstract(weights.quantize_specs(SPECS, recipe))
    assert jax.tree.structure(abstract) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(tree)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    qkv = tree["blocks"]["self_attn"]["qkv"]["weight"]
    assert qkv.shape == (2, 3, 64, 64)
    assert isinstance(qkv, FP8Tensor if recipe.name == "fp8" else NVFP4Tensor)


def test_a_mesh_makes_the_same_where_it_belongs(quantized):
    recipe, params, tree = quantized
    mesh = mesh_lib.make_mesh(config_lib.Mesh(data=2, fsdp=2, seq=2))
    placed = jax.device_put(params, params_lib.shardings(SPECS, mesh))
    got = weights.quantize_params(placed, SPECS, recipe, mesh)
    equal(jax.device_get(got), jax.device_get(tree))
    specs = weights.quantize_specs(SPECS, recipe)
    for x, where in zip(jax.tree.leaves(got), jax.tree.leaves(params_lib.shardings(specs, mesh))):
        assert x.sharding == where

    # One layer, gathered whole inside a manual shard_map as the transformer does.
    where = params_lib.partition_specs(specs)["blocks"]
    own = specs["blocks"]["ffn"]["2"]
    recipe = recipe.at("ffn.2")
    x = jax.random.normal(jax.random.key(1), (4, 2, 8, 64), jnp.bfloat16)
    split = mesh_lib.spec(("batch", "chunk"))

    def local(p, x):
        p = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, 1, keepdims=False), p)
        return linear(params_lib.gather(p, own, mesh_lib.RULES), x, recipe, axes=("seq",))

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(where["ffn"]["2"], split), out_specs=split, check_vma=False
    )
    y = jax.jit(sharded)(
        got["blocks"]["ffn"]["2"], jax.device_put(x, jax.NamedSharding(mesh, split))
    )
    whole = {name: w[1] for name, w in params["blocks"]["ffn"]["2"].items()}
    want = jax.jit(linear, static_argnums=2)(whole, x, recipe)
    np.testing.assert_array_equal(y, want)


def test_dicts_of_arrays_and_back(quantized):
    recipe, _, tree = quantized
    specs = weights.quantize_specs(SPECS, recipe)
    flat, flat_specs = (params_lib.flatten(weights.as_dicts(t)) for t in (tree, specs))
    assert {p: x.shape for p, x in flat.items()} == {p: s.shape for p, s in flat_specs.items()}
    equal(weights.from_dicts(params_lib.unflatten(flat), specs), tree)


def test_the_whole_model_shrinks():
    specs = dit.spec(config_lib.Model())

    def gigabytes(recipe):
        tree = params_lib.abstract(weights.quantize_specs(specs, recipe_lib.get(recipe))["blocks"])
        bits = {"float4_e2m1fn": 4}
        return sum(
            math.prod(x.shape) * bits.get(x.dtype.name, 8 * x.dtype.itemsize) / 8e9
            for x in jax.tree.leaves(tree) if x.dtype.itemsize == 1 or x.ndim < 3
        )  # fmt: skip

    assert 2.76 < gigabytes("nvfp4_w4a4") < 2.78
    assert 4.9 < gigabytes("fp8") < 4.92


def test_nothing_changes_without_a_recipe():
    assert weights.quantize_specs(SPECS, None) is SPECS
    params = {"blocks": {}}
    assert weights.quantize_params(params, SPECS, None) is params


def test_sides_that_blocks_do_not_divide_are_refused():
    specs = dit.spec(config_lib.Model(dim=48, ffn_dim=72, num_heads=4, num_layers=1))
    with pytest.raises(InputError, match="16"):
        weights.quantize_specs(specs, recipe_lib.get("nvfp4_w4a4"))
