"""Flow matching: noisy latents, the clean latents that a velocity stands for, and its error.

The model predicts the velocity noise - data (Lipman et al., arXiv 2210.02747, along straight
paths). sigma [.., frame] broadcasts over [.., frame, h, w, channel].
"""

import jax
import jax.numpy as jnp


def add_noise(clean: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
    """(1 - sigma) clean + sigma noise, float32 [.., frame, h, w, channel]."""
    sigma = _over_latents(sigma)
    return (1 - sigma) * clean + sigma * noise


def clean_of(noisy: jax.Array, velocity: jax.Array, sigma: jax.Array) -> jax.Array:
    """x0, the clean latents that this velocity stands for: noisy - sigma velocity."""
    return noisy - _over_latents(sigma) * velocity


def squared_error(velocity: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared error of each frame: float32 [.., frame]."""
    difference = velocity.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.mean(difference**2, axis=(-3, -2, -1))


def _over_latents(x):
    return x[..., None, None, None]
