"""A linear layer with adapters beside its weight, plain and quantised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import params as params_lib
from longlive_jax import recipes
from longlive_jax.formats import Quantized
from longlive_jax.quant.adapted import Adapted, specs
from longlive_jax.quant.linear import linear, product, quantize_activation, quantize_weight

DIM, PARTS, RANK = 32, 3, 4


def drawn(*shape, seed=0):
    return np.random.default_rng((*shape, seed)).standard_normal(shape).astype(np.float32)


WEIGHT, BIAS = drawn(DIM, PARTS * DIM) / 6, drawn(PARTS * DIM)
A, B = drawn(DIM, PARTS, RANK) / 6, drawn(PARTS, RANK, DIM)
X = drawn(2, 5, DIM)


def layer(base=WEIGHT, scale=2.0, a=A, b=B):
    return {"weight": Adapted(base, jnp.asarray(a), jnp.asarray(b), scale), "bias": BIAS}


def test_a_fused_layer_is_three_with_their_own_adapters():
    """y = x W + bias + scale (x A) B for each of q, k and v, against float64."""
    y = np.split(np.asarray(linear(layer(), X)), PARTS, axis=-1)
    for i, (w, bias) in enumerate(zip(np.split(WEIGHT, PARTS, -1), np.split(BIAS, PARTS))):
        x, a, b = (v.astype(np.float64) for v in (X, A[:, i], B[i]))
        np.testing.assert_allclose(y[i], x @ w + bias + 2 * (x @ a) @ b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bf16", "fp8_train", "nvfp4_w4a4"])
def test_the_weight_is_quantised_and_the_adapters_are_not(name):
    recipe = recipes.get(name)
    own = None if recipe is None else recipe.at("self_attn.qkv")
    key = jax.random.key(0)
    run = jax.jit(linear, static_argnums=2)
    alone = run({"weight": WEIGHT, "bias": BIAS}, X, own, key)
    expected = np.asarray(alone) + np.asarray(layer()["weight"].product(X))
    bases = [WEIGHT] if own is None else [WEIGHT, quantize_weight(jnp.asarray(WEIGHT), own)]
    for base in bases:
        got = np.asarray(run(layer(base), X, own, key))
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    if own is None:
        np.testing.assert_array_equal(
            np.asarray(product(layer(), X)), np.asarray(linear(layer(), X))
        )


def test_only_adapters_have_a_gradient():
    recipe = recipes.get("nvfp4_dmd")
    assert recipe is not None
    recipe = recipe.at("self_attn.qkv")

    def loss(weight, bias, a, b, x, own):
        y = linear(layer(weight, a=a, b=b) | {"bias": bias}, x, own, jax.random.key(0))
        return jnp.sum(y**2)

    arguments = WEIGHT, BIAS, A, B, X
    for own in (None, recipe):
        gradient = jax.jit(jax.grad(loss, range(5)), static_argnums=5)
        weight, bias, a, b, x = gradient(*arguments, own)
        assert not np.any(weight) and not np.any(bias)
        assert np.all(a) and np.all(b) and np.all(x)
    quantized = quantize_weight(jnp.asarray(WEIGHT), recipe)
    got = jax.jit(jax.grad(loss, 2), static_argnums=5)(quantized, *arguments[1:], recipe)
    np.testing.assert_allclose(got, a, rtol=1e-5, atol=1e-5)


def test_adapters_read_quantised_activations_as_they_are():
    recipe = recipes.get("fp8")
    assert recipe is not None
    own = recipe.at("self_attn.qkv")
    x = quantize_activation(jnp.asarray(X), own)
    assert isinstance(x, Quantized)
    got = linear(layer(), x, own)
    alone = linear({"weight": WEIGHT, "bias": BIAS}, x, own)
    expected = np.asarray(alone) + np.asarray(layer()["weight"].product(x.dequantize()))
    np.testing.assert_array_equal(np.asarray(got), expected)


def test_products_are_in_the_activations_dtype():
    y = linear(layer(WEIGHT.astype(jnp.bfloat16)), jnp.asarray(X, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    expected = np.asarray(linear(layer(), X))
    assert np.linalg.norm(np.asarray(y, np.float32) - expected) < 0.01 * np.linalg.norm(expected)


def test_adapters_are_sharded_where_any_mesh_divides_them():
    """The model's dim is divided by every mesh; the FFN's need not be."""
    for axes, shape in ((("embed", None), (48, 64)), ((None, "embed"), (64, 48))):
        own = specs(params_lib.ParamSpec(shape, axes), 1, RANK)
        sizes = {"a": shape[0], "b": shape[1]}
        for side, spec in own.items():
            place = spec.axes[0 if side == "a" else 2]
            assert place == ("embed" if sizes[side] == 48 else None)
