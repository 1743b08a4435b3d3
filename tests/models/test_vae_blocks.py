import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from longlive_jax.models import vae_blocks as blocks


def convolved(params, x):
    """By one convolution over time, height and width, which is the definition."""
    y = lax.conv_general_dilated(
        x,
        params["weight"],
        window_strides=(1, 1, 1),
        padding=((0, 0), *((n // 2, n // 2) for n in params["weight"].shape[1:3])),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )
    return y + params["bias"].reshape(1, 1, 1, 1, -1)


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1)])
@pytest.mark.parametrize("frames", [1, 5])
def test_a_causal_convolution_is_one_over_three_axes(kernel, frames):
    """On a CPU it is one of each frame, see `_time_taps`; values and gradients are the same."""
    keys = jax.random.split(jax.random.key(0), 4)
    cache = jax.random.normal(keys[0], (2, 2, 4, 6, 3))
    x = jax.random.normal(keys[1], (2, frames, 4, 6, 3))
    params = {
        "weight": jax.random.normal(keys[2], (*kernel, 3, 5)),
        "bias": jax.random.normal(keys[3], (5,)),
    }

    def ours(params, x):
        new, y = blocks.causal_conv(params, cache, x, axis=None)
        return y, new

    def expected(params, x):
        whole = jnp.concatenate([cache, x], axis=1)
        return convolved(params, whole), whole[:, -2:]

    y, back, new = jax.vjp(ours, params, x, has_aux=True)
    y_expected, back_expected, new_expected = jax.vjp(expected, params, x, has_aux=True)
    np.testing.assert_array_equal(new, new_expected)
    np.testing.assert_allclose(y, y_expected, rtol=1e-5, atol=1e-5)
    for got, wanted in zip(jax.tree.leaves(back(y)), jax.tree.leaves(back_expected(y))):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-3)


def test_bfloat16_is_rounded_once():
    x = jax.random.normal(jax.random.key(0), (1, 6, 4, 6, 8)).astype(jnp.bfloat16)
    weight = jax.random.normal(jax.random.key(1), (3, 3, 3, 8, 4)).astype(jnp.bfloat16)
    params = {"weight": weight, "bias": jnp.zeros(4, jnp.bfloat16)}
    got = blocks.causal_conv(params, x[:, :2], x[:, 2:], axis=None)[1]
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), params)
    expected = convolved(wide, x.astype(jnp.float32)).astype(jnp.bfloat16)
    different = np.asarray(got != expected)
    assert different.mean() < 0.01  # sums in another order
    np.testing.assert_allclose(got.astype(jnp.float32), expected.astype(jnp.float32), rtol=0.01)
