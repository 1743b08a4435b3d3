"""Sums of a residual stream."""

import jax
import jax.numpy as jnp

from longlive_jax.formats import PendingMatmul


def add(x: jax.Array, y: jax.Array | PendingMatmul, gate: jax.Array | None = None) -> jax.Array:
    """x + y * gate in float32, rounded to x's dtype once. gate broadcasts; None: 1."""
    if gate is None:
        return x + y  # the same number, and XLA may let the library that computes y add x
    y = y.astype(jnp.float32) * gate.astype(jnp.float32)
    return (x.astype(jnp.float32) + y).astype(x.dtype)
