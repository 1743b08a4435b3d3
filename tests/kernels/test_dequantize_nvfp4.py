"""The NVFP4 expansion as a kernel: the oracle's bits in interpret mode, and its lowering for Hopper."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.errors import InputError
from longlive_jax.formats import NVFP4Tensor, from_packed, quantize_nvfp4
from longlive_jax.kernels import dequantize_nvfp4 as lib
from longlive_jax.quant import kv
from tests.kernels.checks import pretend_hopper

SHAPE = (2, 2, 4, 1024)  # layers of two tensors of 256 blocks: a program of two steps each


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


def run(q, layer):
    return lib.kernel(q, jnp.int32(layer), interpret=plgpu.InterpretGPUParams())


# The last of the finite ones is what no block of a finite tensor exceeds; with 2^-103 the least
# number is above 2^-124.
AMAX = (
    [[1, 1.5], [0.7, 1000]],
    [[3e-20, 5.7e17], [2.0**-103, 0]],
    [[1e38, 1.9e38], [np.inf, np.nan]],
)


@pytest.mark.parametrize("amax", AMAX)
def test_bits_are_the_oracles(amax):
    q = every_code_and_scale(amax)
    for layer in range(SHAPE[0]):
        check(run(q, layer), q[layer].dequantize())


def test_of_what_was_quantised():
    x = jax.random.normal(jax.random.key(0), SHAPE, jnp.bfloat16)
    q = jax.vmap(jax.vmap(quantize_nvfp4))(x)
    check(run(q, 1), q[1].dequantize())


def test_a_third_is_the_oracles_for_all_that_a_bfloat16_amax_makes():
    """Code times scale times amax has at most 2 + 4 + 8 bits: all of them."""
    exact = np.arange(2**13, 2**14, dtype=np.int64)
    quotient = (exact / 3).astype(np.float32)  # of so few bits, rounded twice as once
    product = exact.astype(np.float32) * np.float32(1 / 3)
    np.testing.assert_array_equal(product.astype(jnp.bfloat16), quotient.astype(jnp.bfloat16))


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


def lower(q, layer, dtype=jnp.bfloat16):
    traced = jax.jit(lambda q, layer: kv.load_layer(q, layer, dtype)).trace(q, layer)
    assert traced.out_info.shape == (1, *q.shape[1:]) and traced.out_info.dtype == dtype
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_the_cache_takes_it_on_hopper(monkeypatch):
    q, layer = abstract(), jax.ShapeDtypeStruct((), jnp.int32)
    assert "mosaic_gpu" not in lower(q, layer)
    pretend_hopper(monkeypatch)
    assert "mosaic_gpu" in lower(q, layer)
    assert "mosaic_gpu" not in lower(q, layer, jnp.float32)
    assert "mosaic_gpu" not in lower(q.replace(dtype=jnp.dtype(jnp.float32)), layer)
    assert "mosaic_gpu" not in lower(abstract((4, 1, 3, 5, 3, 128)), layer)


def test_elsewhere_a_layer_is_dequantised():
    q = every_code_and_scale(AMAX[0])
    check(kv.load_layer(q, 1, jnp.bfloat16)[0], q[1].dequantize())


def test_what_the_kernel_refuses():
    q = every_code_and_scale(AMAX[0])
    for wrong in (
        dataclasses.replace(q, rule="static_6"),
        dataclasses.replace(q, block=(16, 16)),
        every_code_and_scale(AMAX[0], (2, 2, 3, 512)),
    ):
        with pytest.raises(InputError, match="use dequantize"):
            run(wrong, 0)
