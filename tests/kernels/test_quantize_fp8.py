"""FP8 rows by the kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.errors import InputError
from longlive_jax.kernels import quantize_fp8, rows
from longlive_jax.ops import quantized
from tests.kernels.checks import (
    Case,
    Chunk,
    Public,
    check_quotients,
    f32,
    kernel_tests,
    shaped,
)  # fmt: skip
from tests.kernels.rows import (
    OTHER_CODES,
    check,
    gelu_quantize,
    layer_norm_quantize,
    quantize,
)  # fmt: skip

N = 3072


def kinds():
    """bfloat16 [7, N]: a row of each kind. Programs take 3, 3 and 1 of them."""
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


def largest_magnitudes():
    """Exponents from end to end; `test_a_seventh_is_rounded_once` has all mantissas."""
    exponents = np.array([0, 1, 8, 9, 10, 33, 127, 200, 254])[:, None] << 7
    bits = (exponents | np.array([0, 1, 64, 127])).astype(np.uint16).reshape(-1)
    x = np.zeros((bits.size, 1024), np.uint16)
    x[:, 17], x[:, 100] = bits, bits // 2 | 1 << 15
    return (jax.lax.bitcast_convert_type(jnp.asarray(x), jnp.bfloat16),)


def modulated(dtype):
    """A scale and a shift for each of three runs of seven rows."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = 3 + jax.random.normal(keys[0], (1, 3, 7, 2048), jnp.bfloat16)
    x = x.at[0, 1, 4, 2].set(jnp.nan).at[0, 1, 5].set(0).at[0, 2, 6].multiply(1e20)
    scale, shift = (jax.random.normal(k, (1, 3, 1, 2048)).astype(dtype) for k in keys[1:])
    return x, 1 + scale, shift


def of_one_weight():
    x = kinds()[:5]
    weight, bias = jax.random.normal(jax.random.key(0), (2, 1, N), jnp.bfloat16)
    return x.at[4].set(x[1]), weight, bias  # squares of the huge have no sum


def other(make, tiling=(3, 2, 1), activation=None, **how):
    options = {"tiling": tiling, "activation": activation}
    return Case(make, options, other_codes=OTHER_CODES, **how)


def gelu(scale):
    # Of the tiny, halves would be subnormal: a matter of the order of products.
    x = kinds().at[0].multiply(scale).at[3].multiply(2.0**20)
    return (x,)


def long_rows():
    return (jax.random.normal(jax.random.key(0), (3, 4096), jnp.bfloat16),)


def check_signs(result, expected, signs=False, **how):
    """signs: those of zeros, too, and the smallest scale, of `kinds`."""
    check(result, expected, **how)
    if signs:
        values, scales = result
        assert np.asarray(scales)[2:4, 0].tolist() == [2.0**-126] * 2
        bits = (np.asarray(y)[:5].view(np.uint8) for y in (values, expected.values))
        np.testing.assert_array_equal(*bits)


def oracle(x, *affine, activation=None, tiling=None):
    if affine:
        return layer_norm_quantize(x, *affine)
    return gelu_quantize(x) if activation else quantize(x)


def public(function, oracle, affine=0):
    def make():
        return kinds()[:2], *[jnp.ones((1, N))] * affine

    return Public(function, oracle, make, {"other_codes": OTHER_CODES})


CHUNK, FFN = shaped(1, 1, 8, 880, N), shaped(1, 1, 8, 880, 14336)
FRAMES = f32(1, 1, 8, 1, N)
SPEC = jax.P(None, None, "seq")
X, LONG = shaped(4, 1024), shaped(1, 7168)
NORM = quantized.layer_norm_quantize_rows


REFUSED = [
    ("must be bfloat16", f32(4, 1024)),
    ("multiple of 1024", shaped(4, 1000)),
    ("multiple of 1024", shaped(0, 1024)),
    ("at most 16384", shaped(1, 17408)),
    ("at most 6144", LONG, LONG, LONG),
    ("broadcast them", X, f32(2, 1024), f32(2, 1024)),
    ("scale and shift", X, f32(1, 1024)),
    ("unknown activation 'relu'", X, None, None, "relu"),
]

TestQuantizeFP8 = kernel_tests(
    quantize_fp8,
    oracle,
    check_signs,
    cases={
        "rows": Case(lambda: (kinds(),), {"tiling": (3, 2, 1)}, no_scale=(5, 6), signs=True),
        "largest magnitudes": Case(largest_magnitudes, {"tiling": (12, 4, 1)}),
        **{
            f"gelu of {n}": other(lambda n=n: gelu(n), activation="gelu", no_scale=(5, 6))
            for n in (1, 4)
        },
        **{  # a group of 3 does not divide 4 slices
            f"long rows, {t}": other(long_rows, t, "gelu")
            for t in ((2, 1, 2), (2, 2, 4), (1, 1, 3))
        },
        "modulated": other(lambda: modulated(jnp.float32), no_scale=(11,)),
        "modulated, bfloat16": other(lambda: modulated(jnp.bfloat16), no_scale=(11,)),
        "norm of one weight": other(of_one_weight),
    },
    publics={
        "quantize_rows": public(quantized.quantize_rows, quantize),
        "gelu_quantize_rows": public(quantized.gelu_quantize_rows, gelu_quantize),
        "layer_norm_quantize_rows": public(NORM, layer_norm_quantize, affine=2),
    },
    chunks={
        "rows": Chunk(quantized.quantize_rows, (CHUNK,)),
        "gelu": Chunk(quantized.gelu_quantize_rows, (FFN,)),
        "norm": Chunk(NORM, (CHUNK, FRAMES, FRAMES), specs=(SPEC,) * 3, out_specs=SPEC),
    },
    left=[x[1:] for x in REFUSED[:-1]],
    refused=REFUSED,
)


def test_a_seventh_is_rounded_once():
    check_quotients(rows._SEVENTH, 7)


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
    assert rows.runs(shape, scale, scale) == runs
    assert rows.runs(shape, scale, (*scale[:-1], 5)) == 0


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
@pytest.mark.parametrize("name", TestQuantizeFP8.publics)
def test_rows_of_other_sizes_are_left_to_xla(name, dtype):
    public = TestQuantizeFP8.publics[name]
    x = jax.random.normal(jax.random.key(0), (2, 3, 24)).astype(dtype)
    arguments = (x, *(jnp.full((1, 3, 24), 2.0) for _ in public.make()[1:]))
    result, expected = public.function(*arguments), public.oracle(*arguments)
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, result, expected)


def test_other_dtypes_are_refused():
    with pytest.raises(InputError, match="must be bfloat16 or float32"):
        quantized.quantize_rows(jnp.zeros((2, 24), jnp.float16))
