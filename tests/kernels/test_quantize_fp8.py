"""FP8 rows by the kernel, in interpret mode, and its lowering for Hopper.

What is quantised alone has the oracle's bits. Norm and GELU have it within float32's rounding: that
takes a number to bfloat16's next one only where it is near a tie, one in about 2^12 with some bits
of error, and to another code where that in turn is at a tie of E4M3.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax import config as config_lib
from longlive_jax import formats
from longlive_jax import mesh as mesh_lib
from longlive_jax.errors import InputError
from longlive_jax.kernels import quantize_fp8 as lib
from longlive_jax.ops import quantized
from longlive_jax.ops.gelu import gelu
from longlive_jax.ops.norm import layer_norm
from tests.kernels.checks import check_quotients

N = 3072
ROWS = 7  # of which programs take 3, 3 and 1
OTHER_CODES = 1e-3  # the share that GELU and norm may have; each is one step away


def rows():
    """bfloat16 [7, N]: a row of each kind."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(N)
    data = (
        normal,
        normal * rng.choice(2.0 ** np.arange(-20, 4), N),
        np.zeros(N),
        normal * 2.0**-124,  # its scale is the smallest
        np.clip(normal, -1, 1) * 3.3e38,
        np.where(np.arange(N) == 5, np.nan, normal),
        np.where(np.arange(N) == 2000, -np.inf, normal),
    )
    return jnp.asarray(np.stack(data), jnp.bfloat16)


@functools.cache
def kernel(activation=None, tiling=(3, 2, 1)):
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    run = functools.partial(lib.kernel, tiling=tiling, interpret=interpret)
    return jax.jit(functools.partial(run, activation=activation))


def gelu_quantize(x):
    return formats.quantize_fp8(gelu(x.astype(jnp.float32)).astype(x.dtype), axis=-1)


def layer_norm_quantize(x, scale, shift):
    return formats.quantize_fp8(layer_norm(x, scale, shift), axis=-1)


def check(result, expected, other_codes=0.0, no_scale=()):
    """Scales are equal, NaN included; so are codes but for a share, and they are one step away.

    With such a share, a row in a hundred may have another scale, whose largest number was at a tie.

    no_scale: indices of the rows that must decode to NaN, and are the only ones.
    """
    values, scale = (np.asarray(x) for x in result)
    assert values.dtype == jnp.float8_e4m3fn and scale.dtype == np.float32
    assert values.shape == expected.values.shape and scale.shape == expected.scale.shape
    values, scale = values.reshape(-1, values.shape[-1]), scale.reshape(-1)
    wanted = np.asarray(expected.scale).reshape(-1)
    moved = [i for i in np.flatnonzero(scale != wanted) if i not in no_scale]
    assert len(moved) <= (len(scale) // 100 if other_codes else 0)
    np.testing.assert_allclose(scale, wanted, rtol=2**-7 if other_codes else 0)
    decoded = values.astype(np.float32) * scale[:, None]
    for i, row in enumerate(decoded):
        assert np.isnan(row).all() if i in no_scale else np.isfinite(row).all(), i
    kept = [i for i in range(len(scale)) if i not in (*no_scale, *moved)]
    codes = [np.asarray(x).reshape(values.shape)[kept] for x in (values, expected.values)]
    steps = np.abs(np.subtract(*(_ordered(x.view(np.uint8)) for x in codes)))
    assert steps.max() <= (other_codes > 0)
    assert (steps > 0).mean() <= other_codes


def _ordered(codes):
    """Codes of E4M3 as integers in the order of their numbers; both zeros are 0."""
    magnitude = (codes & 0x7F).astype(int)
    return np.where(codes >= 0x80, -magnitude, magnitude)


def test_bits_are_the_oracles():
    x = rows()
    expected = formats.quantize_fp8(x, axis=-1)
    check(kernel()(x), expected, no_scale=(5, 6))
    assert np.asarray(kernel()(x)[1])[2:4, 0].tolist() == [2.0**-126] * 2
    finite = np.r_[:5]
    np.testing.assert_array_equal(  # signs of zeros, too
        np.asarray(kernel()(x)[0])[finite].view(np.uint8),
        np.asarray(expected.values)[finite].view(np.uint8),
    )


def test_every_largest_magnitude():
    """Exponents from end to end; `test_a_seventh_is_rounded_once` has all mantissas."""
    exponents = np.array([0, 1, 8, 9, 10, 33, 127, 200, 254])[:, None] << 7
    bits = (exponents | np.array([0, 1, 64, 127])).astype(np.uint16).reshape(-1)
    x = np.zeros((bits.size, 1024), np.uint16)
    x[:, 17], x[:, 100] = bits, bits // 2 | 1 << 15
    x = jax.lax.bitcast_convert_type(jnp.asarray(x), jnp.bfloat16)
    check(kernel(tiling=(12, 4, 1))(x), formats.quantize_fp8(x, axis=-1))


def test_a_seventh_is_rounded_once():
    check_quotients(lib._SEVENTH, 7)


@pytest.mark.parametrize("scale", (1, 4))
def test_gelu(scale):
    # Of the tiny, halves would be subnormal: a matter of the order of products.
    x = rows().at[0].multiply(scale).at[3].multiply(2.0**20)
    check(kernel("gelu")(x), gelu_quantize(x), OTHER_CODES, no_scale=(5, 6))


def test_long_rows_in_groups_of_slices():
    x = jax.random.normal(jax.random.key(0), (3, 4096), jnp.bfloat16)
    for tiling in ((2, 1, 2), (2, 2, 4), (1, 1, 3)):  # a group of 3 does not divide 4 slices
        check(kernel("gelu", tiling)(x), gelu_quantize(x), OTHER_CODES)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_layer_norm_modulated(dtype):
    """A scale and a shift for each of three runs of seven rows."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = 3 + jax.random.normal(keys[0], (1, 3, 7, 2048), jnp.bfloat16)
    x = x.at[0, 1, 4, 2].set(jnp.nan).at[0, 1, 5].set(0).at[0, 2, 6].multiply(1e20)
    scale, shift = (jax.random.normal(k, (1, 3, 1, 2048)).astype(dtype) for k in keys[1:])
    expected = layer_norm_quantize(x, 1 + scale, shift)
    check(kernel()(x, 1 + scale, shift), expected, OTHER_CODES, no_scale=(11,))


def test_layer_norm_of_one_weight():
    x = rows()[:5]
    weight, bias = jax.random.normal(jax.random.key(0), (2, 1, N), jnp.bfloat16)
    x = x.at[4].set(x[1])  # squares of the huge have no sum
    check(kernel()(x, weight, bias), layer_norm_quantize(x, weight, bias), OTHER_CODES)


@pytest.mark.parametrize(
    "shape, scale, runs",
    (
        ((1, 1, 8, 880, 3072), (1, 1, 8, 1, 3072), 8),
        ((2, 3, 8, 880, 3072), (2, 3, 8, 1, 3072), 48),
        ((2, 3, 8, 880, 3072), (1, 1, 1, 1, 3072), 1),
        ((7, 3072), (7, 3072), 7),
        ((3072,), (3072,), 1),
        ((2, 3, 3072), (1, 3, 3072), 0),
        ((2, 3, 3072), (3, 3072), 0),
        ((2, 3, 3072), (2, 1, 1), 0),
    ),
)
def test_runs_of_rows(shape, scale, runs):
    assert lib.runs(shape, scale, scale) == runs
    assert lib.runs(shape, scale, (*scale[:-1], 5)) == 0


CHUNK = jax.ShapeDtypeStruct((1, 1, 8, 880, 3072), jnp.bfloat16)
FFN = jax.ShapeDtypeStruct((1, 1, 8, 880, 14336), jnp.bfloat16)
FRAMES = jax.ShapeDtypeStruct((1, 1, 8, 1, 3072), jnp.float32)
FUNCTIONS = (
    (quantized.quantize_rows, (CHUNK,)),
    (quantized.gelu_quantize_rows, (FFN,)),
    (quantized.layer_norm_quantize_rows, (CHUNK, FRAMES, FRAMES)),
)


@pytest.mark.parametrize("function, arguments", FUNCTIONS)
def test_it_lowers_for_hopper(monkeypatch, function, arguments):
    monkeypatch.setattr(lib, "supports", lambda *_: True)
    traced = jax.jit(lambda *x: function(*x)).trace(*arguments)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
    monkeypatch.undo()
    expected = jax.eval_shape(function, *arguments)
    assert jax.tree.map(jax.typeof, traced.out_info) == jax.tree.map(jax.typeof, expected)


def test_it_lowers_in_a_manual_shard_map(monkeypatch):
    monkeypatch.setattr(lib, "supports", lambda *_: True)
    mesh = mesh_lib.make_mesh(config_lib.Mesh(fsdp=1, seq=8))
    spec = jax.P(None, None, "seq")
    run = jax.shard_map(
        quantized.layer_norm_quantize_rows, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec
    )
    arguments = (
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))
        for x in (CHUNK, FRAMES, FRAMES)
    )
    with jax.set_mesh(mesh):
        text = jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def test_the_public_functions_by_the_kernel(monkeypatch):
    monkeypatch.setattr(lib, "supports", lambda *_: True)
    x, weight = rows()[:2], jnp.ones((1, N))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        results = (
            jax.jit(quantized.quantize_rows)(x),
            jax.jit(quantized.gelu_quantize_rows)(x),
            jax.jit(quantized.layer_norm_quantize_rows)(x, weight, weight),
        )
    expected = (
        formats.quantize_fp8(x, axis=-1), gelu_quantize(x), layer_norm_quantize(x, weight, weight)
    )  # fmt: skip
    for a, b in zip(results, expected):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        check((a.values, a.scale), b, OTHER_CODES)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_the_public_functions_elsewhere(dtype):
    x = jax.random.normal(jax.random.key(0), (2, 3, 24)).astype(dtype)
    weight = jnp.full((1, 3, 24), 2.0)
    assert not lib.supports(x) and not lib.supports(x, weight, weight)
    pairs = (
        (quantized.quantize_rows(x), formats.quantize_fp8(x, axis=-1)),
        (quantized.gelu_quantize_rows(x), gelu_quantize(x)),
        (quantized.layer_norm_quantize_rows(x, weight, weight), layer_norm_quantize(x, weight, weight)),
    )  # fmt: skip
    for a, b in pairs:
        assert jax.tree.structure(a) == jax.tree.structure(b)
        jax.tree.map(np.testing.assert_array_equal, a, b)
    with pytest.raises(InputError, match="must be bfloat16 or float32"):
        quantized.quantize_rows(x.astype(jnp.float16))


X = jnp.zeros((4, 1024), jnp.bfloat16)


@pytest.mark.parametrize(
    "arguments, message",
    (
        ((X.astype(jnp.float32),), "must be bfloat16"),
        ((X[:, :1000],), "multiple of 1024"),
        ((X[:0],), "multiple of 1024"),
        ((jnp.zeros((1, 17408), jnp.bfloat16),), "at most 16384"),
        ((jnp.zeros((1, 7168), jnp.bfloat16), *[jnp.zeros((1, 7168))] * 2), "normalised 6144"),
        ((X, None, None, "relu"), "unknown activation 'relu'"),
        ((X, jnp.zeros((1, 1024))), "scale and shift"),
        ((X, jnp.zeros((2, 1024)), jnp.zeros((2, 1024))), "broadcast them"),
    ),
)
def test_what_the_kernel_refuses(arguments, message):
    with pytest.raises(InputError, match=message):
        lib.kernel(*arguments)
