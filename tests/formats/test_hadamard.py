import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.errors import InputError
from longlive_jax.formats import hadamard
from tests import golden_files


def test_matrix_is_the_originals_and_orthogonal():
    r = hadamard.matrix()
    np.testing.assert_array_equal(r, golden_files.arrays("nvfp4")["rht_H"])
    np.testing.assert_array_equal(r @ r.T, np.eye(16))


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_transform_is_the_product_with_the_matrix(dtype, tolerance):
    x = jax.random.normal(jax.random.key(0), (3, 2, 48), dtype)
    y = jax.jit(hadamard.random_hadamard)(x)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    groups = np.asarray(x, np.float64).reshape(-1, 16)
    expected = (groups @ hadamard.matrix()).reshape(x.shape)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, tolerance, tolerance)
    whole = jax.jit(hadamard.random_hadamard)(jnp.round(x * 8))  # Sums of integers are exact.
    back = np.asarray(whole, np.float64).reshape(-1, 16) @ hadamard.matrix().T
    np.testing.assert_array_equal(back.reshape(x.shape), np.round(np.asarray(x, np.float64) * 8))


def test_it_cancels_in_a_product_and_spreads_an_outlier():
    a, b = jax.random.normal(jax.random.key(1), (2, 8, 64))
    ya, yb = jax.jit(hadamard.random_hadamard)(jnp.stack([a, b]))
    np.testing.assert_allclose(ya @ yb.T, a @ b.T, 1e-4, 1e-4)
    outlier = 4 * jnp.eye(16)
    np.testing.assert_array_equal(
        np.abs(jax.jit(hadamard.random_hadamard)(outlier)), np.ones((16, 16))
    )


@pytest.mark.parametrize("shape", [(), (8,), (16, 24)])
def test_other_lengths_are_refused(shape):
    with pytest.raises(InputError, match="multiple of 16; pad"):
        hadamard.random_hadamard(jnp.zeros(shape))
