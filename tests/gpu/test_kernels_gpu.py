"""The Pallas kernels on a Hopper GPU, against their oracles there.

LONGLIVE_TEST_PLATFORM=gpu python -m pytest -m gpu -s tests/gpu/test_kernels_gpu.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import config as config_lib
from longlive_jax import formats
from longlive_jax import mesh as mesh_lib
from longlive_jax import recipes as recipe_lib
from longlive_jax.formats import exact, nvfp4
from longlive_jax.kernels import dequantize_nvfp4, threefry
from longlive_jax.kernels import quantize_nvfp4 as lib
from longlive_jax.kernels import quantize_nvfp4_columns as columns_lib
from longlive_jax.quant import linear, matmul, operands
from tests.kernels import test_dequantize_nvfp4 as dequantized
from tests.kernels import test_quantize_nvfp4 as cpu
from tests.kernels import test_quantize_nvfp4_columns as columns
from tests.kernels.checks import same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("needs_hopper")]
SHAPE = (512, 4096)


def check(x, rule, amax=None, key=None):
    """The public function, by the kernel, against the oracle: values, scales and amax."""
    assert lib.supports(x, rule, key=key, amax=amax)
    tensor = jax.jit(lambda x: lib.quantize_nvfp4(x, rule, key=key, amax=amax))(x)
    expected = formats.quantize_nvfp4(x, rule, key=key, amax=amax)
    same_bits(tensor, expected)
    np.testing.assert_array_equal(np.asarray(tensor.packed()), np.asarray(expected.packed()))


@pytest.mark.parametrize("stochastic", (False, True))
@pytest.mark.parametrize("rule", nvfp4.RULES)
def test_quantize_nvfp4(rule, stochastic):
    key = jax.random.key(2) if stochastic else None
    x = jax.random.normal(jax.random.key(0), SHAPE, jnp.bfloat16)
    by_block = jax.random.randint(jax.random.key(1), (512, 256), -20, 1).astype(jnp.float32)
    check(x, rule, key=key)
    check(x * jnp.repeat(2.0**by_block, 16, axis=1).astype(jnp.bfloat16), rule, key=key)
    for name, small in cpu.arrays().items():
        print(name)
        if name not in ("nan", "inf"):  # of a tensor of NaN, the bits are nobody's business
            check(jnp.tile(small, (16, 16)), rule, key=key)


@pytest.mark.parametrize("rule", nvfp4.RULES)
def test_quantize_nvfp4_by_a_given_amax(rule):
    x = cpu.arrays()["normal"]
    for amax in (0.3, 1.7, 1000.0):
        check(x, rule, jnp.float32(amax))
    # A NaN takes its own block with it, and no other.
    expected = formats.quantize_nvfp4(x.at[0, 48:64].set(0), rule, amax=jnp.float32(1.7))
    tensor = lib.quantize_nvfp4(x.at[0, 53].set(jnp.nan), rule, amax=jnp.float32(1.7))
    decoded = np.array(tensor.dequantize(jnp.float32))
    assert np.isnan(decoded[0, 48:64]).all()
    decoded[0, 48:64] = 0
    np.testing.assert_array_equal(decoded, np.asarray(expected.dequantize(jnp.float32)))


def test_quantize_nvfp4_of_nothing_that_has_a_scale():
    for value in (jnp.nan, jnp.inf):
        tensor = lib.quantize_nvfp4(jnp.ones(SHAPE, jnp.bfloat16).at[5, 5].set(value))
        assert np.isnan(np.asarray(tensor.dequantize(jnp.float32))).all()


@pytest.mark.parametrize("tiling", lib.TILINGS)
def test_quantize_nvfp4_in_every_tiling(tiling):
    x = jax.random.normal(jax.random.key(0), SHAPE, jnp.bfloat16)
    expected = formats.quantize_nvfp4(x)
    codes, scales = jax.jit(lambda x, amax: lib.kernel(x, amax, "mse", tiling))(x, expected.amax)
    np.testing.assert_array_equal(np.asarray(codes), np.asarray(expected.packed()))
    np.testing.assert_array_equal(np.asarray(scales), np.asarray(expected.scales))


def test_quantize_nvfp4_on_a_mesh_of_one_device():
    mesh = mesh_lib.make_mesh(config_lib.Mesh(data=1, fsdp=1, seq=1))
    x = jax.random.normal(jax.random.key(0), SHAPE, jnp.bfloat16)
    with jax.set_mesh(mesh):
        check(jax.device_put(x, jax.NamedSharding(mesh, jax.P("fsdp", "seq"))), "mse")


@pytest.mark.parametrize("stochastic", (False, True))
@pytest.mark.parametrize("transform", (False, True))
@pytest.mark.parametrize("rule", nvfp4.RULES)
def test_quantize_nvfp4_columns(rule, transform, stochastic):
    key = jax.random.key(5)

    @jax.jit
    def run(x, amax):
        seeds = threefry.seeds(key) if stochastic else None
        return columns_lib.kernel(x, amax, rule, transform, seeds)

    large = jax.random.normal(jax.random.key(0), (7040, 3072), jnp.bfloat16)
    for name, x in {"large": large, **columns.arrays()}.items():
        print(name)
        y = formats.random_hadamard(x.T) if transform else jnp.asarray(x.T)
        amax = exact.largest_magnitude(y)
        if transform:
            np.testing.assert_array_equal(
                np.asarray(columns_lib.largest_magnitude(x)), np.asarray(amax)
            )
        # Of a tensor of NaN, the bits are nobody's business.
        for given in (jnp.float32(0.3), *([amax] if jnp.isfinite(amax) else [])):
            expected = columns.oracle(x, given, key, rule, transform, stochastic)
            same_bits(run(x, given), expected)


@pytest.mark.parametrize("use", ("wgrad", "activation"))
def test_operands_of_a_weights_gradient(monkeypatch, use):
    fmt = getattr(recipe_lib.get("nvfp4_ar").gradients, use)
    y = jax.random.normal(jax.random.key(0), (3, 2, 2, 1280, 1024), jnp.bfloat16)
    keys = jax.random.split(jax.random.key(1), (3, 2, 2))

    def run():
        return jax.jit(lambda y, keys: operands.columns(fmt, y, 2, (), keys))

    assert columns_lib.supports(y) and "mosaic_gpu" in run().lower(y, keys).as_text()
    result = run()(y, keys)
    monkeypatch.setattr(columns_lib, "supports", lambda *_: False)
    monkeypatch.setattr(lib, "supports", lambda *_: False)
    same_bits(result, run()(y, keys))


@pytest.mark.parametrize("samples", [1, 2])
def test_the_quantised_linear_layer_takes_the_kernel(samples):
    """Each sample is a tensor of its own, with its own largest magnitude."""
    recipe = recipe_lib.get("nvfp4_w4a4").at("ffn.0")
    x = jax.random.normal(jax.random.key(0), (samples, *SHAPE), jnp.bfloat16)
    run = jax.jit(functools.partial(linear.quantize_activation, recipe=recipe))
    assert "mosaic_gpu" in run.lower(x).as_text()
    q = run(x)
    for i in range(samples):
        same_bits(q[i], formats.quantize_nvfp4(x[i]))


@pytest.mark.parametrize("amax", dequantized.AMAX)
def test_dequantize_nvfp4(amax):
    q = dequantized.every_code_and_scale(amax)
    assert dequantize_nvfp4.supports(q, jnp.bfloat16)
    for layer in range(len(q.amax)):
        result = dequantize_nvfp4.kernel(q, jnp.int32(layer))
        dequantized.check(result, q[layer].dequantize())


def test_dequantize_nvfp4_of_a_cache():
    x = jax.random.normal(jax.random.key(0), (2, 3, 7040, 24, 128), jnp.bfloat16)
    q = jax.vmap(jax.vmap(formats.quantize_nvfp4))(x)
    result = dequantize_nvfp4.kernel(q, jnp.int32(1))
    dequantized.check(result, q[1].dequantize())


@pytest.mark.parametrize("name", dequantized.OPERANDS)
def test_expand_nvfp4(name):
    q = dequantized.OPERANDS[name]()
    assert dequantize_nvfp4.expands(q)
    dequantized.check(dequantize_nvfp4.expand(q), jax.jit(formats.NVFP4Tensor.operand)(q))


def test_products_of_nvfp4_are_the_same_by_either_expansion(monkeypatch):
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (1, 7040, 3072), jnp.bfloat16)
    w = jax.random.normal(keys[1], (1, 14336, 3072), jnp.bfloat16)
    x, w = (jax.jit(jax.vmap(formats.quantize_nvfp4))(y) for y in (x, w))

    def product(x, w):
        return matmul.matmul(x, w, jnp.bfloat16)

    assert "mosaic_gpu" in jax.jit(product).lower(x, w).as_text()
    result = np.asarray(jax.jit(product)(x, w), np.float32)
    monkeypatch.setattr(dequantize_nvfp4, "expands", lambda _: False)
    expected = np.asarray(jax.jit(lambda *x: product(*x))(x, w), np.float32)
    # But for the order of float32 sums, which the library may choose anew.
    assert np.linalg.norm(result - expected) < 2e-3 * np.linalg.norm(expected)
