"""Normalisations, with float32 statistics and one rounding at the end."""

import jax
import jax.numpy as jnp


def layer_norm(x: jax.Array, scale: jax.Array, shift: jax.Array, eps: float = 1e-6) -> jax.Array:
    """Layer norm over the last axis (biased variance), times `scale` plus `shift`.

    `scale` and `shift` broadcast against `x` and have its rank: the affine parameters of a norm, or
    (1 + scale, shift) of an adaptive one (Peebles and Xie, arXiv 2212.09748).
    """
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32) + shift.astype(jnp.float32)).astype(x.dtype)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float = 1e-6) -> jax.Array:
    """x / rms(x) * weight over the last axis. `weight` [n] is the last axis's."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    weight = weight.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + weight.shape)
    return (y * weight).astype(x.dtype)
