"""Arithmetic that is rounded once, checked against NumPy's, which is."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from longlive_jax.formats import exact


def random_floats(seed: int, n: int = 50_000, low: int = 65, high: int = 190) -> np.ndarray:
    """Positive float32 with random mantissas and biased exponents from `low` to `high`."""
    rng = np.random.default_rng(seed)
    mantissa = rng.integers(0, 1 << 23, n)
    # A third of them beside a power of two, where quotients are next to a change of exponent.
    mantissa = np.where(rng.random(n) < 0.33, mantissa % 5 - 2 & (1 << 23) - 1, mantissa)
    return (rng.integers(low, high, n) << 23 | mantissa).astype(np.uint32).view(np.float32)


def test_divide_rounds_once():
    a, b = random_floats(0), random_floats(1)
    np.testing.assert_array_equal(jax.jit(exact.divide)(a, b), a / b)
    ones = np.float32(1)
    np.testing.assert_array_equal(jax.jit(exact.divide)(ones, b), ones / b)
    np.testing.assert_array_equal(jax.jit(exact.divide)(b, b), np.ones_like(b))


@pytest.mark.parametrize("divisor", [6, 448, 57344, 1536, 1792, 2688, 2688 / 4096])
def test_divide_by_a_constant_rounds_once(divisor):
    x = random_floats(2, low=20, high=250)
    x = np.concatenate([x, -x, np.float32([0, np.inf, -np.inf, np.nan])])
    y = jax.jit(lambda x: exact.divide_by(x, divisor))(x)
    np.testing.assert_array_equal(y, x / np.float32(divisor))


def test_divide_by_flushes_what_is_below_the_normal_numbers():
    x = np.float32([2**-126, 2**-120, 2**-117.1, 2**-117, 2**-116])
    y = np.asarray(exact.divide_by(jnp.asarray(x), 448))
    expected = x / np.float32(448)
    np.testing.assert_array_equal(y, np.where(expected < 2.0**-126, 0, expected))


@pytest.mark.parametrize(
    "dtype, mantissa_bits, min_exponent, largest",
    [(ml_dtypes.float8_e4m3fn, 3, -6, 448.0), (ml_dtypes.float4_e2m1fn, 1, 0, 6.0)],
)
def test_round_to_every_number_every_tie_and_their_neighbours(
    dtype, mantissa_bits, min_exponent, largest
):
    bits = 8 if dtype == ml_dtypes.float8_e4m3fn else 4
    grid = np.arange(1 << bits - 1, dtype=np.uint8).view(dtype).astype(np.float32)
    grid = grid[np.isfinite(grid)]
    ties = (grid[1:] + grid[:-1]) / 2
    x = np.concatenate([grid, ties])
    x = np.concatenate([x, np.nextafter(x, np.float32(0)), np.nextafter(x, np.float32(1e9))])
    # What NumPy gives below the smallest normal float32, XLA takes for zero.
    x = np.where(x < 2.0**-126, 0, np.minimum(x, largest)).astype(np.float32)
    y = jax.jit(lambda x: exact.round_to(x, mantissa_bits, min_exponent, largest))(x)
    np.testing.assert_array_equal(y, x.astype(dtype).astype(np.float32))
    above = exact.round_to(jnp.float32([7e4, np.inf]), mantissa_bits, min_exponent, largest)
    np.testing.assert_array_equal(above, [largest, largest])
    assert np.isnan(exact.round_to(jnp.float32(np.nan), mantissa_bits, min_exponent, largest))


def test_round_input_keeps_the_rounding_that_xla_drops():
    a = jax.random.normal(jax.random.key(0), (4096,))

    def product(a):
        return (a * jnp.float32(0.3)).astype(jnp.bfloat16)

    y = jax.jit(lambda a: exact.round_input(product(a)) * 1000)(a)
    np.testing.assert_array_equal(y, jax.jit(product)(a).astype(jnp.float32) * 1000)


def test_round_input_of_every_bfloat16():
    every = jax.lax.bitcast_convert_type(jnp.arange(1 << 16).astype(jnp.uint16), jnp.bfloat16)
    result = jax.jit(exact.round_input)(every)
    np.testing.assert_array_equal(result, np.asarray(every, np.float32))
    assert exact.round_input(jnp.float32(0.1)) == jnp.float32(0.1)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("value, expected", [(-3.5, 3.5), (-np.inf, np.inf), (np.nan, np.nan)])
def test_largest_magnitude(dtype, value, expected):
    """Of sizes at which XLA's CPU backend loses a NaN in a maximum of magnitudes."""
    x = jnp.ones((32, 256), dtype).at[5, 5].set(value)
    assert exact.largest_magnitude(x).dtype == jnp.float32
    np.testing.assert_array_equal(exact.largest_magnitude(x), np.float32(expected))
    rows = np.where(np.arange(32) == 5, np.float32(expected), 1)
    np.testing.assert_array_equal(exact.largest_magnitude(x, -1, keepdims=True)[:, 0], rows)
