"""RMS norm of an FP8 product by the kernel in interpret mode, and its lowering for Hopper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.errors import InputError
from longlive_jax.formats import PendingMatmul
from longlive_jax.kernels import norm_product as lib
from longlive_jax.ops import norm
from tests.kernels.test_gelu_fp8 import product

N = 2048
WEIGHT = 1 + jax.random.normal(jax.random.key(2), (N,), jnp.bfloat16) / 4


@functools.cache
def kernel():
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    return jax.jit(functools.partial(lib.kernel, interpret=interpret))


def oracle(x, weight):
    return norm.rms_norm(x.astype(jnp.float32), weight).astype(x.dtype)


def check(made, expected):
    """But for bfloat16's next number, where float32's last bits differed."""
    assert made.dtype == jnp.bfloat16 and made.shape == expected.shape
    made, expected = (np.asarray(y, np.float32) for y in (made, expected))
    np.testing.assert_allclose(made, expected, rtol=2**-7, atol=1e-6)
    assert np.mean((made != expected) & ~np.isnan(expected)) < 1e-3


@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float32))
def test_numbers(dtype):
    x, weight = product(5, N), WEIGHT.astype(dtype)
    check(kernel()(x, weight), oracle(x, weight))


def test_rows_out_of_the_ordinary():
    x = product(4, N)
    x = x.replace(sums=x.sums.at[1].set(0).at[2, 7].set(jnp.nan), bias=jnp.zeros_like(x.bias))
    made = np.asarray(kernel()(x, WEIGHT), np.float32)
    assert not made[1].any() and np.isnan(made[2]).all() and np.isfinite(made[3]).all()
    check(made.astype(jnp.bfloat16), oracle(x, WEIGHT))


@pytest.mark.parametrize("by_kernel", (True, False))
def test_the_public_function(monkeypatch, by_kernel):
    monkeypatch.setattr(lib, "supports", lambda *_: by_kernel)
    x = product(3, N)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        # A function of its own: JAX would find the other parameter's program.
        made = jax.jit(lambda *z: norm.rms_norm_of(*z))(x, WEIGHT)
    check(made, oracle(x, WEIGHT))


def test_of_an_array_it_is_the_norm():
    x = product(3, N).astype(jnp.bfloat16)
    np.testing.assert_array_equal(norm.rms_norm_of(x, WEIGHT), norm.rms_norm(x, WEIGHT))


def test_it_lowers_for_hopper(monkeypatch):
    monkeypatch.setattr(lib, "supports", lambda *_: True)
    shape = (1, 1, 8, 880, 3072)
    x = PendingMatmul(
        sums=jax.ShapeDtypeStruct(shape, jnp.bfloat16),
        row=jax.ShapeDtypeStruct((*shape[:-1], 1), jnp.float32),
        column=jax.ShapeDtypeStruct(shape[-1:], jnp.float32),
        bias=jax.ShapeDtypeStruct(shape[-1:], jnp.bfloat16),
    )
    traced = jax.jit(lambda *z: norm.rms_norm_of(*z)).trace(x, x.bias)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert traced.out_info.shape == shape and traced.out_info.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "x, weight, message",
    (
        (jax.tree.map(lambda y: y.astype(jnp.float32), product(2, N)), WEIGHT, "sums: float32"),
        (product(2, 1000), WEIGHT[:1000], "must hold rows of a multiple of 1024"),
        (product(1, 7168), jnp.ones(7168), "at most 6144"),
        (product(2, N), WEIGHT[None], "weight .* must be"),
    ),
)
def test_bad_input(x, weight, message):
    assert not lib.supports(x, weight)
    with pytest.raises(InputError, match=message):
        lib.kernel(x, weight)
