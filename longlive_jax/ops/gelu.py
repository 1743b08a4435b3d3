"""GELU by tanh (Hendrycks and Gimpel, arXiv 1606.08415, section 2)."""

import jax
import jax.numpy as jnp

_C = (2 / jnp.pi) ** 0.5
_CUBE = 0.044715


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), in float32, rounded once to x's dtype.

    As x times a logistic function, which is the same and does not cancel where tanh is near -1; its
    quotient by two roots, which a GPU has an instruction for.
    Its gradient keeps x alone and is computed in float32: autodiff would keep the inner products,
    each as large as the widest array of the model.
    """
    y = x.astype(jnp.float32)
    root = jax.lax.rsqrt(1 + jnp.exp(-2 * _C * (y + _CUBE * (y * y * y))))
    return (y * root * root).astype(x.dtype)


def _forward(x):
    return gelu(x), x


def _backward(x, g):
    y = x.astype(jnp.float32)
    t = jnp.tanh(_C * (y + _CUBE * y**3))
    slope = 0.5 * (1 + t) + 0.5 * y * (1 - t * t) * _C * (1 + 3 * _CUBE * y * y)
    return ((g.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(_forward, _backward)
