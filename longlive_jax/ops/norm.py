"""Normalisations, with float32 statistics and one rounding at the end.

Their gradients keep the input alone and compute the statistics again, in float32: autodiff would
keep float32 arrays of the input's size, and reading those costs more than the arithmetic.
"""

import functools

import jax
import jax.numpy as jnp

from longlive_jax.formats import PendingMatmul
from longlive_jax.kernels import norm_product


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: jax.Array, scale: jax.Array, shift: jax.Array, eps: float = 1e-6) -> jax.Array:
    """Layer norm over the last axis (biased variance), times `scale` plus `shift`.

    `scale` and `shift` broadcast against `x` and have its rank: the affine parameters of a norm, or
    (1 + scale, shift) of an adaptive one (Peebles and Xie, arXiv 2212.09748).
    """
    y, _ = _centred(x, eps)
    return (y * scale.astype(jnp.float32) + shift.astype(jnp.float32)).astype(x.dtype)


def _centred(x, eps):
    """(x - mean) / standard deviation, and 1 / standard deviation: float32."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    rate = jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y * rate, rate


def _layer_norm_fwd(x, scale, shift, eps):
    return layer_norm(x, scale, shift, eps), (x, scale, shift)


def _layer_norm_bwd(eps, residuals, g):
    x, scale, shift = residuals
    y, rate = _centred(x, eps)
    g = g.astype(jnp.float32)
    dy = g * scale.astype(jnp.float32)
    pull = y * jnp.mean(dy * y, axis=-1, keepdims=True) + jnp.mean(dy, axis=-1, keepdims=True)
    dx = (rate * (dy - pull)).astype(x.dtype)
    return dx, _sum_like(g * y, scale), _sum_like(g, shift)


layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, weight: jax.Array, eps: float = 1e-6) -> jax.Array:
    """x / rms(x) * weight over the last axis. `weight` [n] is the last axis's."""
    y, _ = _over_rms(x, eps)
    return (y * _last(weight, x)).astype(x.dtype)


def _over_rms(x, eps):
    y = x.astype(jnp.float32)
    rate = jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y * rate, rate


def _rms_norm_fwd(x, weight, eps):
    return rms_norm(x, weight, eps), (x, weight)


def _rms_norm_bwd(eps, residuals, g):
    x, weight = residuals
    y, rate = _over_rms(x, eps)
    g = g.astype(jnp.float32)
    dy = g * _last(weight, x)
    dx = (rate * (dy - y * jnp.mean(dy * y, axis=-1, keepdims=True))).astype(x.dtype)
    dweight = jnp.sum(g * y, axis=tuple(range(x.ndim - 1)))
    return dx, dweight.astype(weight.dtype)


rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


@functools.singledispatch
def rms_norm_of(x: jax.Array, weight: jax.Array, eps: float = 1e-6) -> jax.Array:
    """`rms_norm` of an array or a PendingMatmul, whose scales and bias it applies; rounded once.

    On a Hopper GPU `kernels.norm_product` takes a PendingMatmul, where its `supports` says so.
    """
    return rms_norm(x, weight, eps)


@rms_norm_of.register
def _(x: PendingMatmul, weight, eps=1e-6):
    if norm_product.supports(x, weight):
        return norm_product.kernel(x, weight, eps=eps)
    return rms_norm(x.astype(jnp.float32), weight, eps).astype(x.dtype)


def _last(weight, x):
    return weight.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + weight.shape)


def _sum_like(x, like):
    """Sum over the axes along which `like` was broadcast."""
    axes = tuple(i for i, n in enumerate(like.shape) if n == 1 and x.shape[i] != 1)
    return jnp.sum(x, axis=axes, keepdims=True).astype(like.dtype)
