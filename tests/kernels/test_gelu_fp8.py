"""GELU of an FP8 product, to codes, by the kernel in interpret mode, and its lowering for Hopper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax import formats
from longlive_jax.errors import InputError
from longlive_jax.kernels import gelu_fp8 as lib
from longlive_jax.ops import quantized
from tests.kernels.test_quantize_fp8 import OTHER_CODES, check, gelu_quantize

N = 3072


def product(rows, n=N):
    """Of sums in the hundreds and a scale and a bias for each column; numbers of about 3."""
    keys = jax.random.split(jax.random.key(0), 4)
    return formats.PendingMatmul(
        sums=256 * jax.random.normal(keys[0], (rows, n), jnp.bfloat16),
        row=jnp.exp(jax.random.normal(keys[1], (rows, 1))) / 256,
        column=jnp.exp(jax.random.normal(keys[2], (n,))),
        bias=jax.random.normal(keys[3], (n,), jnp.bfloat16),
    )


@functools.cache
def kernel():
    return jax.jit(
        functools.partial(lib.kernel, interpret=plgpu.InterpretGPUParams(detect_races=True))
    )


@pytest.mark.parametrize("rows, n", ((8, 3072), (6, 2048), (3, 1024)))  # of 4, 2 and 1 together
def test_codes_and_scales(rows, n):
    x = product(rows, n)
    check(kernel()(x), gelu_quantize(x), OTHER_CODES)


def test_rows_out_of_the_ordinary():
    x = product(8)
    x = x.replace(
        sums=x.sums.at[2].set(0).at[3, 7].set(jnp.nan).at[4, 9].set(jnp.inf),
        row=x.row.at[1].set(2.0**-100).at[5].set(jnp.nan),
    )
    check(kernel()(x), gelu_quantize(x), OTHER_CODES, no_scale=(3, 4, 5))


def test_it_lowers_for_hopper(monkeypatch):
    monkeypatch.setattr(lib, "supports", lambda *_: True)
    shape = (1, 1, 8, 880, 14336)
    x = formats.PendingMatmul(
        sums=jax.ShapeDtypeStruct(shape, jnp.bfloat16),
        row=jax.ShapeDtypeStruct((*shape[:-1], 1), jnp.float32),
        column=jax.ShapeDtypeStruct(shape[-1:], jnp.float32),
        bias=jax.ShapeDtypeStruct(shape[-1:], jnp.bfloat16),
    )
    traced = jax.jit(quantized.gelu_quantize_rows).trace(x)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
    monkeypatch.undo()
    expected = jax.eval_shape(lambda x: quantized.gelu_quantize_rows(x), x)
    assert jax.tree.map(jax.typeof, traced.out_info) == jax.tree.map(jax.typeof, expected)


@pytest.mark.parametrize("by_kernel", (True, False))
def test_the_public_function(monkeypatch, by_kernel):
    monkeypatch.setattr(lib, "supports", lambda *_: by_kernel)
    x = product(4, 1024)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        result = jax.jit(lambda x: quantized.gelu_quantize_rows(x))(x)
    expected = gelu_quantize(x)
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    check((result.values, result.scale), expected, OTHER_CODES if by_kernel else 0.0)


@pytest.mark.parametrize(
    "x, message",
    (
        (jax.tree.map(lambda y: y.astype(jnp.float32), product(4, 1024)), "sums: float32"),
        (product(4, 1000), "must hold rows of a multiple of 1024"),
        (product(1, 17408), "at most 16384"),
        (product(0, 1024), "must hold rows"),
    ),
)
def test_bad_input(x, message):
    assert not lib.supports(x)
    with pytest.raises(InputError, match=message):
        lib.kernel(x)


def test_only_where_it_pays():
    assert not lib.supports(product(4, 1024))  # a CPU
    assert np.isfinite(np.asarray(quantized.gelu_quantize_rows(product(4, 24)).scale)).all()
