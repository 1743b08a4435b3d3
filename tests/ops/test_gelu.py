"""GELU: its numbers, its rounding and its gradient, in both forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.ops.gelu import gelu, gelu_of_product

FORMS = (gelu, gelu_of_product)
X = np.linspace(-8, 8, 4001)


def exact(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


# 1 + tanh cancels where tanh is near -1: absolute errors, of x times float32's last bit.
LAST_BIT = 8 * 2.0**-23


@pytest.mark.parametrize("form", FORMS)
def test_float32(form):
    x = jnp.asarray(X, jnp.float32)
    np.testing.assert_allclose(jax.jit(form)(x), exact(np.float64(x)), rtol=1e-6, atol=LAST_BIT)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_is_rounded_once(form):
    """To half a step of bfloat16's 8 bits."""
    x = jnp.asarray(X, jnp.bfloat16)
    y = np.float64(jax.jit(form)(x))
    np.testing.assert_allclose(y, exact(np.float64(x)), rtol=1.01 * 2.0**-8, atol=2 * LAST_BIT)


@pytest.mark.parametrize("form", FORMS)
def test_its_gradient(form):
    x = jnp.asarray(X, jnp.float32)
    found = jax.jit(jax.grad(lambda x: form(x).sum()))(x)
    step = 1e-6
    slope = (exact(np.float64(x) + step) - exact(np.float64(x) - step)) / (2 * step)
    np.testing.assert_allclose(found, slope, rtol=1e-5, atol=1e-5)


def test_xla_is_shown_what_it_knows(monkeypatch):
    """Of bfloat16 on a GPU, without a gradient: no conversion stands between product and GELU."""
    x = jnp.asarray(X, jnp.bfloat16)

    def converts(f):
        return "convert_element_type" in str(jax.make_jaxpr(f)(x))

    assert converts(lambda x: gelu_of_product(x))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not converts(lambda x: gelu_of_product(x))
    assert converts(lambda x: gelu(x))
    assert converts(jax.grad(lambda x: gelu_of_product(x).sum()))
