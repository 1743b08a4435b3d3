"""The NVFP4 expansion as kernels: the oracles' bits."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax import recipes
from longlive_jax.errors import InputError
from longlive_jax.formats import NVFP4Tensor, from_packed, quantize_nvfp4
from longlive_jax.kernels import dequantize_nvfp4
from longlive_jax.quant import kv, linear
from longlive_jax.quant import matmul as matmul_lib
from tests.kernels.checks import (
    RACES,
    Case,
    Chunk,
    alone,
    kernel_tests,
    lowered,
    pretend_hopper,
    shaped,
)

SHAPE = (2, 2, 4, 1024)  # layers of two tensors of 256 blocks: a program of two steps each
CODES = (0, 0.5, 1, 1.5, 2, 3, 4, 6)  # magnitudes


def every_code_and_scale(amax, shape=SHAPE):
    """All scales in turn, each with all codes, tensors of these amax [2, 2]."""
    rng = np.random.default_rng(0)
    blocks = np.prod(shape) // 16
    codes = rng.permuted(np.tile(np.arange(16, dtype=np.uint8), (blocks, 1)), axis=1)
    packed = jnp.asarray(codes[:, ::2] | codes[:, 1::2] << 4).reshape(*shape[:-1], -1)
    scales = (np.arange(blocks, dtype=np.uint8) & 0x7F).reshape(*shape[:-1], -1)  # none is negative
    amax = jnp.asarray(amax, jnp.bfloat16).astype(jnp.float32)
    return from_packed(packed, jnp.asarray(scales), amax, "mse")


def check(result, expected):
    """The same numbers: the same bits, but for the sign of 0 and for NaN, which are nobody's."""
    assert result.dtype == expected.dtype == jnp.bfloat16
    np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (result, expected)))


# The last of the finite ones is what no block of a finite tensor exceeds; with 2^-103 the least
# number is above 2^-124.
AMAX = (
    [[1, 1.5], [0.7, 1000]],
    [[3e-20, 5.7e17], [2.0**-103, 0]],
    [[1e38, 1.9e38], [np.inf, np.nan]],
)


def quantised():
    x = jax.random.normal(jax.random.key(0), SHAPE, jnp.bfloat16)
    return jax.vmap(jax.vmap(quantize_nvfp4))(x)


def abstract(shape=(4, 1, 3, 7040, 24, 128)):
    leaf = jax.ShapeDtypeStruct
    return NVFP4Tensor(
        leaf(shape, jnp.float4_e2m1fn),
        leaf((*shape[:-1], shape[-1] // 16), jnp.float8_e4m3fn),
        leaf(shape[:3], jnp.float32),
        rule="mse",
        block=(1, 16),
        dtype=jnp.dtype(jnp.bfloat16),
    )


def load_layer(q, layer, dtype=jnp.bfloat16):
    return kv.load_layer(q, layer, dtype)


def by_layer(name, make):
    return {
        f"{name}, layer {layer}": Case(lambda layer=layer: (make(), jnp.int32(layer)))
        for layer in range(SHAPE[0])
    }


def refused(**changes):
    q = dataclasses.replace(every_code_and_scale(AMAX[0]), **changes)
    return "use dequantize", q, 0


CACHE, LAYER = abstract(), shaped(dtype=jnp.int32)

TestDequantizeNVFP4 = kernel_tests(
    dequantize_nvfp4,
    lambda q, layer: q[layer].dequantize(),
    check,
    supports=lambda q, _, dtype=jnp.bfloat16: dequantize_nvfp4.supports(q, dtype),
    interpret=plgpu.InterpretGPUParams(),
    cases=functools.reduce(
        dict.__or__,
        (by_layer(str(amax), functools.partial(every_code_and_scale, amax)) for amax in AMAX),
        by_layer("quantised", quantised),
    ),
    chunks={"cache": Chunk(load_layer, (CACHE, LAYER))},
    left=[
        (CACHE, LAYER, jnp.float32),
        (CACHE.replace(dtype=jnp.dtype(jnp.float32)), LAYER),
        (abstract((4, 1, 3, 5, 3, 128)), LAYER),
    ],
    refused=[
        refused(rule="static_6"),
        refused(block=(16, 16)),
        ("use dequantize", every_code_and_scale(AMAX[0], (2, 2, 3, 512)), 0),
    ],
)


def test_elsewhere_a_layer_is_dequantised():
    q = every_code_and_scale(AMAX[0])
    check(load_layer(q, 1)[0], q[1].dequantize())


def test_a_third_is_the_oracles_for_all_that_a_bfloat16_amax_makes():
    """Code times scale times amax has at most 2 + 4 + 8 bits: all of them."""
    exact = np.arange(2**13, 2**14, dtype=np.int64)
    quotient = (exact / 3).astype(np.float32)  # of so few bits, rounded twice as once
    product = exact.astype(np.float32) * np.float32(1 / 3)
    np.testing.assert_array_equal(product.astype(jnp.bfloat16), quotient.astype(jnp.bfloat16))


# ---------------------------------------------------------------------------------------------
# Without amax.


def square():
    x = jax.random.normal(jax.random.key(0), (3, 32, 64), jnp.bfloat16)
    return jax.vmap(lambda x: quantize_nvfp4(x, "static_6", (16, 16)))(x)


OPERANDS = {
    "weight": lambda: every_code_and_scale([1, 0, np.nan], (3, 64, 512)),
    "activation": lambda: every_code_and_scale([[1], [np.inf]], (2, 1, 6, 32, 256)),
    "one tensor": lambda: every_code_and_scale(1, (2048,)),
    "static rule": lambda: every_code_and_scale(1, (64, 512)).replace(rule="static_4"),
    "square blocks": square,
    "transposed": lambda: jax.jit(NVFP4Tensor.transposed)(square()),
    "columns": lambda: jax.jit(NVFP4Tensor.merged)(every_code_and_scale([1], (1, 8, 48, 80))),
}


TestExpandNVFP4 = kernel_tests(
    dequantize_nvfp4,
    NVFP4Tensor.operand,
    check,
    kernel=dequantize_nvfp4.expand,
    cases={name: Case(lambda make=make: (make(),)) for name, make in OPERANDS.items()},
)


def test_expanded_numbers_are_codes_times_scales():
    q = every_code_and_scale(1, (64, 512))
    scales = np.repeat(np.asarray(q.scales, np.float64), 16, axis=1)
    assert np.isnan(scales).any() and set(np.abs(q.values.astype(jnp.float32)).flat) == set(CODES)
    result = alone(dequantize_nvfp4.expand)(q, interpret=RACES)
    np.testing.assert_array_equal(
        np.asarray(result, np.float64), np.asarray(q.values, np.float64) * scales
    )


def test_expanding_maps():
    q = every_code_and_scale([1, 2], (2, 4, 1024))
    result = alone(jax.vmap(lambda q: dequantize_nvfp4.expand(q, interpret=RACES)))(q)
    check(result, q.operand())


def test_expand_refuses_what_programs_do_not_divide():
    q = every_code_and_scale([1], (1, 3, 512))
    with pytest.raises(InputError, match=r"holds 1536 numbers; it must be a multiple of 2048"):
        dequantize_nvfp4.expand(q)


def operand(*shape):
    leaf = jax.ShapeDtypeStruct
    scales = leaf((*shape[:-1], shape[-1] // 16), jnp.float8_e4m3fn)
    amax, dtype = leaf(shape[:1], jnp.float32), jnp.dtype(jnp.bfloat16)
    return NVFP4Tensor(leaf(shape, jnp.float4_e2m1fn), scales, amax, "mse", (1, 16), dtype)


def expansions(f, *arguments):
    """How many operands f expands by the kernel, lowered for a GPU."""
    return len(re.findall(r"call @expand(_\d+)?\(", lowered(f, *arguments)[0]))


@pytest.fixture
def hopper(monkeypatch):
    pretend_hopper(monkeypatch)
    monkeypatch.setattr(matmul_lib, "_capability", lambda: 9.0)


W4A4 = recipes.get("nvfp4_w4a4").at("ffn.0")


def layer(weight, x):
    bias = jnp.zeros(weight.shape[1], jnp.bfloat16)
    return linear.linear({"weight": weight, "bias": bias}, x, W4A4)


def product(x, weight):
    return matmul_lib.matmul(x, weight, jnp.bfloat16)


def test_products_expand_by_it_on_hopper(hopper):
    assert expansions(product, operand(1, 1, 880, 3072), operand(3, 3072, 3072)) == 2
    assert expansions(product, operand(1, 3, 48), operand(1, 128, 48)) == 1  # 3 rows of 48
    assert expansions(product, operand(1, 3, 48), operand(1, 32, 48)) == 0
    x = jax.ShapeDtypeStruct((1, 8, 880, 3072), jnp.bfloat16)
    assert expansions(layer, operand(1, 14336, 3072), x) == 2
    assert expansions(layer, operand(1, 32, 48), jax.ShapeDtypeStruct((1, 3, 48), x.dtype)) == 0
    mapped = jax.vmap(product), operand(2, 1, 880, 3072), operand(2, 1, 3072, 3072)
    assert expansions(*mapped) == 2


def test_elsewhere_products_do_not():
    assert expansions(product, operand(1, 1, 880, 3072), operand(3, 3072, 3072)) == 0
