"""RMS norm of an FP8 product by the kernel."""

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.kernels import norm_product
from longlive_jax.ops import norm
from tests.kernels.checks import Case, Chunk, Public, f32, kernel_tests, next_numbers, shaped
from tests.kernels.rows import product, shaped_product

N = 2048


def arguments(rows, dtype=jnp.bfloat16):
    weight = 1 + jax.random.normal(jax.random.key(2), (N,), jnp.bfloat16) / 4
    return product(rows, N), weight.astype(dtype)


def out_of_the_ordinary():
    x, weight = arguments(4)
    sums = x.sums.at[1].set(0).at[2, 7].set(jnp.nan)
    return x.replace(sums=sums, bias=jnp.zeros_like(x.bias)), weight


def check(result, expected, kinds=False):
    """kinds: the second row is of zeros, the third has a NaN."""
    next_numbers(result, expected)
    if kinds:
        y = np.asarray(result, np.float32)
        assert not y[1].any() and np.isnan(y[2]).all() and np.isfinite(y[3]).all()


def oracle(x, weight):
    return norm.rms_norm(x.astype(jnp.float32), weight).astype(x.dtype)


REFUSED = [
    ("sums: float32", shaped_product(2, N, dtype=jnp.float32), shaped(N)),
    ("must hold rows of a multiple of 1024", shaped_product(2, 1000), shaped(1000)),
    ("at most 6144", shaped_product(1, 7168), f32(7168)),
    ("weight .* must be", shaped_product(2, N), shaped(1, N)),
]

TestNormProduct = kernel_tests(
    norm_product,
    oracle,
    check,
    cases={
        "bfloat16": Case(lambda: arguments(5)),
        "float32": Case(lambda: arguments(5, jnp.float32)),
        "out of the ordinary": Case(out_of_the_ordinary, kinds=True),
    },
    publics={"rms_norm_of": Public(norm.rms_norm_of, oracle, lambda: arguments(3))},
    chunks={"queries": Chunk(norm.rms_norm_of, (shaped_product(1, 1, 8, 880, 3072), shaped(3072)))},
    left=[x[1:] for x in REFUSED],
    refused=REFUSED,
)


def test_of_an_array_it_is_the_norm():
    x, weight = arguments(3)
    x = x.astype(jnp.bfloat16)
    np.testing.assert_array_equal(norm.rms_norm_of(x, weight), norm.rms_norm(x, weight))
