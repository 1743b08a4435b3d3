"""A residual sum, its norm and codes by the kernel in interpret mode, and its lowering for Hopper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.errors import InputError
from longlive_jax.formats import PendingMatmul
from longlive_jax.kernels import add_norm_fp8 as lib
from longlive_jax.ops import quantized, residual
from tests.kernels.test_gelu_fp8 import product
from tests.kernels.test_quantize_fp8 import OTHER_CODES, check, layer_norm_quantize

SHAPE = (1, 2, 3, 2048)  # two runs of three rows


def arguments(shape=SHAPE, gated=True, of=(1, 2, 1), dtype=jnp.float32):
    """x, a product, a gate for each run, and a norm's scale and shift of these leading axes."""
    keys = jax.random.split(jax.random.key(1), 4)
    n = shape[-1]
    y = product(np.prod(shape[:-1]), n)
    y = y.replace(sums=y.sums.reshape(shape), row=y.row.reshape(*shape[:-1], 1))
    x = 3 * jax.random.normal(keys[0], shape, jnp.bfloat16)
    gate = jax.random.normal(keys[1], (*shape[:-2], 1, n)).astype(dtype) if gated else None
    scale, shift = (jax.random.normal(key, (*of, n)).astype(dtype) for key in keys[2:])
    return x, y, gate, 1 + scale, shift


@functools.cache
def kernel():
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    return jax.jit(functools.partial(lib.kernel, interpret=interpret))


def compare(x, y, gate, scale, shift, no_scale=()):
    """The sum may be bfloat16's next number, where a product was contracted into it."""
    total, *made = kernel()(x, y, gate, scale, shift)
    want = residual.add(x, y, gate)
    assert total.dtype == jnp.bfloat16 and total.shape == x.shape
    total, want = (np.asarray(z, np.float32) for z in (total, want))
    np.testing.assert_allclose(total, want, rtol=2**-7, atol=1e-6)
    assert np.mean((total != want) & ~np.isnan(want)) < 1e-3
    # Of the kernel's own sum, so that a number that is another does not count twice.
    expected = layer_norm_quantize(jnp.asarray(total, jnp.bfloat16), scale, shift)
    check(made, expected, OTHER_CODES, no_scale)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_gated_and_modulated(dtype):
    compare(*arguments(dtype=dtype))


def test_without_a_gate():
    compare(*arguments(gated=False))


def test_a_gate_by_runs_and_a_norm_of_one_weight():
    compare(*arguments((1, 2, 2, 1024), of=(1, 1, 1)))


def test_rows_out_of_the_ordinary():
    x, y, *rest = arguments()
    x = x.at[0, 0, 1].set(0).at[0, 1, 0, 5].set(jnp.nan)
    y = y.replace(
        sums=y.sums.at[0, 0, 1].set(0).at[0, 1, 1, 7].set(jnp.inf), bias=jnp.zeros_like(y.bias)
    )
    compare(x, y, *rest, no_scale=(3, 4))


@pytest.mark.parametrize("by_kernel", (True, False))
def test_the_public_function(monkeypatch, by_kernel):
    monkeypatch.setattr(lib, "supports", lambda *_: by_kernel)
    x, y, *rest = arguments((1, 2, 2, 1024))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        # A function of its own: JAX would find the other parameter's program.
        total, q = jax.jit(lambda *z: quantized.add_layer_norm_quantize_rows(*z))(x, y, *rest)
    want = residual.add(x, y, rest[0])
    np.testing.assert_allclose(*(np.asarray(z, np.float32) for z in (total, want)), rtol=2**-7)
    expected = layer_norm_quantize(total, *rest[1:])
    assert jax.tree.structure(q) == jax.tree.structure(expected)
    check((q.values, q.scale), expected, OTHER_CODES if by_kernel else 0.0)


def test_of_an_array_it_is_the_sum_and_its_norm():
    x, y, *rest = arguments((1, 2, 2, 1024))
    y = y.astype(x.dtype)
    total, q = quantized.add_layer_norm_quantize_rows(x, y, *rest)
    np.testing.assert_array_equal(total, residual.add(x, y, rest[0]))
    check((q.values, q.scale), layer_norm_quantize(total, *rest[1:]))


def test_it_lowers_for_hopper(monkeypatch):
    monkeypatch.setattr(lib, "supports", lambda *_: True)
    shape = (1, 1, 8, 880, 3072)

    def of(*lead, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((*lead, shape[-1]), dtype)

    x = of(*shape[:-1], dtype=jnp.bfloat16)
    row = jax.ShapeDtypeStruct((*shape[:-1], 1), jnp.float32)
    y = PendingMatmul(x, row, of(), of(dtype=jnp.bfloat16))
    frames, one = of(1, 1, 8, 1), of(1, 1, 1, 1, dtype=jnp.bfloat16)
    for gate, scale in ((frames, one), (None, frames)):
        traced = jax.jit(lambda *z: quantized.add_layer_norm_quantize_rows(*z)).trace(
            x, y, gate, scale, scale
        )
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
        assert [z.shape for z in jax.tree.leaves(traced.out_info)] == [shape, shape, row.shape]


X, Y, GATE, SCALE, SHIFT = arguments((2, 1024), of=(2,))


@pytest.mark.parametrize(
    "wrong, message",
    (
        ((X.astype(jnp.float32), Y, None, SCALE, SHIFT), "x: float32"),
        ((X[:1], Y, None, SCALE, SHIFT), "must have one shape"),
        (arguments((2, 1000), of=(2,)), "must hold rows of a multiple of 1024"),
        (arguments((1, 6144), of=(1,)), "at most 5120"),
        ((X, Y, None, SCALE[0], SHIFT), "broadcast them"),
        ((X, Y, None, SCALE, SHIFT[:, :1]), "broadcast them"),
        ((X, Y, jnp.ones((3, 1024)), SCALE, SHIFT), "broadcast them"),
    ),
)
def test_bad_input(wrong, message):
    assert not lib.supports(*wrong)
    with pytest.raises(InputError, match=message):
        lib.kernel(*wrong)
