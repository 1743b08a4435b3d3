"""What the transformer is conditioned on beside text, as the objectives' forwards take it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.models import actions


def inserted(
    cfg: config_lib.Model, given: Mapping[str, jax.Array] | None, *, copies: bool
) -> dict[str, Any] | None:
    """Conditioning of the action path of this device's chunks; None without one.

    A video's latents are counted through its cuts, which rotary positions of self-attention skip.

    Args:
      given: by path float32 [batch, chunk, frame, action, dim], as `Batch.actions`.
      copies: for both copies of teacher forcing, which share it.
    """
    if given is None:
        return None
    chunks, frames = next(iter(given.values())).shape[1:3]
    first = jax.lax.axis_index(mesh_lib.SEQ) * chunks
    chunk = (first + jnp.arange(chunks, dtype=jnp.int32))[:, None]
    latents = (chunk * frames + jnp.arange(frames, dtype=jnp.int32)[None])[None]
    if copies:
        given, latents = {k: x[:, :, None] for k, x in given.items()}, latents[:, :, None]
    return actions.conditioning(cfg.actions, given, latents)


def still(given: Mapping[str, jax.Array] | None) -> dict[str, jax.Array] | None:
    """The actions of one who does nothing: all zero."""
    return None if given is None else {name: jnp.zeros_like(x) for name, x in given.items()}
