"""The product with NVFP4 weights: the program interpreted, its arithmetic, its fallback."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax import formats
from longlive_jax.errors import InputError
from longlive_jax.formats import nvfp4
from longlive_jax.kernels import matmul_nvfp4 as lib
from longlive_jax.kernels import matmul_nvfp4_hopper as hopper

CODES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float64)
CODES = np.concatenate([CODES, -CODES])
TUNINGS = {
    "default": hopper.Tuning(programs=2),
    "2 stages": hopper.Tuning(stages=2, programs=3, group=1),
    "3 stages": hopper.Tuning(stages=3, programs=2),
}


@functools.cache
def inputs(m=128, depth=128, out=256, seed=0):
    """x bfloat16 [m, in], codes uint8 [out, in / 2], scales float8_e4m3fn [out, in / 16]."""
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (m, depth), jnp.bfloat16)
    codes = jax.random.bits(keys[1], (out, depth // 2), jnp.uint8)
    scales = jnp.exp2(jax.random.uniform(keys[2], (out, depth // 16), minval=-9, maxval=8.8))
    return x, codes, scales.astype(jnp.float8_e4m3fn)


def weights(codes, scales):
    """float64 [out, in], from a table."""
    codes = np.asarray(codes)
    codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)
    return CODES[codes] * np.repeat(np.asarray(scales).astype(np.float64), 16, axis=1)


def expected(x, codes, scales):
    return np.asarray(x).astype(np.float64) @ weights(codes, scales).T


def check(y, expected, dtype=jnp.float32):
    assert y.dtype == dtype and y.shape == expected.shape
    y = np.asarray(y).astype(np.float64)
    limit = 2e-6 if dtype == jnp.float32 else 2**-8
    # Of a sum's terms, not of the sum, which may be small.
    size = np.sqrt(np.mean(expected**2, axis=0, keepdims=True))
    off = np.abs(y - expected) / (np.abs(expected) + 4 * size)
    assert off.max() < limit, off.max()


def interpreted(args, dtype=jnp.float32, tuning=TUNINGS["default"]):
    params = plgpu.InterpretGPUParams(detect_races=True)
    return lib.kernel(*args, dtype, tuning, params)


def tensor(codes, scales, parts=1):
    packed = codes.reshape(parts, -1, codes.shape[-1])
    scales = scales.reshape(parts, -1, scales.shape[-1])
    return nvfp4.from_packed(packed, scales, jnp.ones(parts), "mse")


# Interpreted, each of these takes seconds; what is left has float32 and bfloat16, either once.
@pytest.mark.parametrize(
    "tuning",
    [
        pytest.param(t, id=name, marks=() if name == "3 stages" else pytest.mark.slow)
        for name, t in TUNINGS.items()
    ],
)
def test_kernel_is_the_product(tuning):
    """2 x 2 tiles of 4 steps, and in bfloat16 by one of the schedules."""
    args = inputs(256, 256, 512)
    dtype = jnp.bfloat16 if tuning.stages == 3 else jnp.float32
    check(interpreted(args, dtype, tuning), expected(*args), dtype)


@pytest.mark.slow
def test_one_step_and_more_programs_than_tiles():
    args = inputs(128, 64, 256)
    y = interpreted(args, jnp.bfloat16, hopper.Tuning(programs=132))
    check(y, expected(*args), jnp.bfloat16)


def every_code_and_scale():
    """[256, 256]: row r has scale r and, twice in each 32 columns, every code."""
    codes = np.arange(16, dtype=np.uint8)
    codes = np.tile(np.concatenate([codes, codes[::-1]]), 8)
    codes = np.broadcast_to(codes[::2] | codes[1::2] << 4, (256, 128))
    scales = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    return jnp.asarray(codes), jnp.asarray(np.repeat(scales[:, None], 16, axis=1))


def test_every_code_and_scale_through_the_kernel():
    """By the rows of a unit matrix weights come out as they are; one that is NaN spoils its row."""
    codes, scales = every_code_and_scale()
    x = jnp.eye(256, dtype=jnp.bfloat16)
    y = np.asarray(interpreted((x, codes, scales))).astype(np.float64)
    np.testing.assert_array_equal(y, weights(codes, scales).T)
    assert np.isnan(y[:, [127, 255]]).all() and np.isfinite(y).sum() == 256 * 254


def test_the_bits_that_registers_hold_are_the_codes():
    """The arithmetic of the GPU, step by step, by numpy, which keeps subnormal numbers."""
    codes, scales = every_code_and_scale()
    words, scaled = hopper.pack(codes, scales)
    assert np.all(np.isfinite(np.asarray(scaled).astype(np.float64)[:, :127]))
    words = words.reshape(256, 4, 16)
    raw = np.stack([np.asarray(hopper.bits(words, i)) for i in range(4)], axis=2)
    raw = raw.reshape(256, 256).view(ml_dtypes.bfloat16)
    plain = weights(codes, jnp.ones_like(scales))
    np.testing.assert_array_equal(raw.astype(np.float64), plain * 2.0**-126)
    factors = np.repeat(np.asarray(scaled).T.astype(np.float64), 16, axis=1)
    product = raw.astype(np.float64) * factors
    # A product of bfloat16 is exact, and no result is subnormal.
    rounded = product.astype(ml_dtypes.bfloat16).astype(np.float64)
    np.testing.assert_array_equal(rounded, product)
    np.testing.assert_array_equal(product * 2**7, weights(codes, scales))
    magnitudes = np.abs(product[np.isfinite(product) & (product != 0)])
    assert magnitudes.min() >= 2.0**-126 and magnitudes.max() < 2.0**127


@pytest.mark.parametrize("place", [(0, 0), (5, 63), (64, 64), (127, 90), (127, 127)], ids=str)
def test_pack_puts_every_column_at_its_place(place):
    row, column = place
    codes = np.zeros((128, 64), np.uint8)
    codes[row, column // 2] = 0xB << 4 * (column % 2)
    words, _ = hopper.pack(jnp.asarray(codes), jnp.ones((128, 8), jnp.float8_e4m3fn))
    block = column % 64 // 16
    bits = np.asarray(hopper.bits(words, block))
    assert np.count_nonzero(words) == 1
    assert bits[row, column // 64 * 16 + column % 16] == 0x80C0


@pytest.mark.parametrize("m", [1, 37, 128])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_without_the_hardware_it_is_the_same_product(m, dtype):
    x, codes, scales = inputs(128, 128, 256)
    x, w = x[:m].reshape(1, m, 128), tensor(codes, scales, parts=2)
    assert not lib.supports(x, w)
    y = jax.jit(lib.matmul, static_argnums=2)(x, w, dtype)
    check(y[0], expected(x[0], codes, scales), dtype)
    y = jax.jit(lib.matmul)(x.astype(jnp.float32), w)
    check(y[0], expected(x[0], codes, scales))


def test_quantised_weights_are_what_dequantises():
    w = jax.random.normal(jax.random.key(0), (256, 128))
    q = formats.quantize_nvfp4(w)
    x = jax.random.normal(jax.random.key(1), (64, 128), jnp.bfloat16)
    code, scale = nvfp4.RULES[q.rule]
    y = lib.matmul(x, q) * (q.amax / (code * scale))
    check(y, np.asarray(x).astype(np.float64) @ np.asarray(q.dequantize(), np.float64).T)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_lowers_for_hopper(dtype):
    f = jax.jit(lambda *args: lib.kernel(*args, dtype))
    lowered = f.trace(*inputs(256, 256, 512)).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_a_tensor_lowers_for_hopper(monkeypatch):
    """Parts and leading axes included."""
    monkeypatch.setattr(lib, "supports", lambda x, w: True)
    x, codes, scales = inputs(256, 256, 512)
    args = (x.reshape(2, 1, 128, 256), tensor(codes, scales, parts=2))
    traced = jax.jit(lib.matmul).trace(*args)
    assert traced.out_info.shape == (2, 1, 128, 512)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, c, s: (x.astype(jnp.float32), c, s), r"x is float32 .* matrix of bfloat16"),
        (lambda x, c, s: (x[None], c, s), r"x is bfloat16 \(1, 128, 128\)"),
        (lambda x, c, s: (x, c.astype(jnp.int8), s), "codes is int8 .* matrix of uint8"),
        (lambda x, c, s: (x, c, s.astype(jnp.float32)), "scales is float32"),
        (lambda x, c, s: (x, c[:, :32], s), r"codes \(256, 32\) and scales \(256, 8\)"),
        (lambda x, c, s: (x, c, s[:128]), r"scales \(128, 8\) beside x \(128, 128\)"),
        (lambda x, c, s: (x[:37], c, s), "37 rows, 128 in, 256 out; .* multiples of 128, 64"),
        (lambda x, c, s: (x, c[:128], s[:128]), "128 out; .* and 256; use matmul"),
        (lambda x, c, s: (x[:, :96], c[:, :48], s[:, :6]), "128 rows, 96 in"),
    ],
)
def test_kernel_refuses(change, message):
    with pytest.raises(InputError, match=message):
        lib.kernel(*change(*inputs()))


def test_refuses():
    x, codes, scales = inputs()
    w = tensor(codes, scales)
    with pytest.raises(InputError, match=r"x \(128, 64\) and w \(1, 256, 128\)"):
        lib.matmul(x[:, :64], w)
    with pytest.raises(InputError, match="dtype float16; it must be bfloat16 or float32"):
        lib.matmul(x, w, jnp.float16)
