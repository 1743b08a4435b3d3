"""The transformer's two ends: latents to tokens, tokens to velocity."""

from collections.abc import Mapping
from typing import Any

import jax

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.config import PATCH
from longlive_jax.models.dit.conditioning import Conditioning, head_modulation, time_vectors
from longlive_jax.ops import rope
from longlive_jax.ops.linear import linear
from longlive_jax.ops.norm import layer_norm


def embed(
    params: params_lib.Tree, cfg: config_lib.Model, latents: jax.Array, timesteps: jax.Array,
    positions: jax.Array, inserted: Mapping[str, Any] | None,
) -> tuple[jax.Array, jax.Array, Conditioning]:  # fmt: skip
    """Tokens, time vectors for `head`, and the layers' conditioning without the text.

    Args:
      latents: [.., frame, h, w, channel], with leading axes [batch, chunk, (copy,)].
      timesteps: float32 [.., frame], in [0, 1000].
      positions: int32 [.., frame], temporal indices; leading axes may be 1.
      inserted: as in `Conditioning`.

    Returns:
      [.., frame, patch, dim], [.., frame, 1, dim] and a Conditioning.
    """
    x = linear(params["patch_embedding"], _patchify(latents))
    e, time = time_vectors(params, cfg, timesteps, x.dtype)
    angle = rope.angles(positions, *grid(latents), cfg.head_dim)
    return x, e, Conditioning(time=time, angle=angle, inserted=inserted)


def _patchify(latents):
    """[.., frame, h, w, c] -> [.., frame, patch, c * 4], ordered (channel, row, column)."""
    *lead, h, w, c = latents.shape
    x = latents.reshape(*lead, h // PATCH, PATCH, w // PATCH, PATCH, c)
    n = len(lead)
    x = x.transpose(*range(n), n, n + 2, n + 4, n + 1, n + 3)
    return x.reshape(*lead, (h // PATCH) * (w // PATCH), c * PATCH * PATCH)


def head(
    p: params_lib.Tree, cfg: config_lib.Model, x: jax.Array, e: jax.Array, grid: tuple[int, int]
) -> jax.Array:
    """Tokens [batch, chunk, frame, patch, dim] -> velocity [batch, chunk, frame, h, w, channel].

    e: time vectors [batch, chunk, frame, 1, dim]. grid: a frame's tokens by rows and columns.
    """
    y = linear(p["head"], layer_norm(x, *head_modulation(p["modulation"], e).affine()))
    lead, (h, w) = y.shape[:-2], grid
    y = y.reshape(*lead, h, w, PATCH, PATCH, cfg.out_dim)
    n = len(lead)
    y = y.transpose(*range(n), n, n + 2, n + 1, n + 3, n + 4)
    return y.reshape(*lead, h * PATCH, w * PATCH, cfg.out_dim)


def grid(latents: jax.Array) -> tuple[int, int]:
    """Tokens of a frame of latents [.., h, w, channel], by rows and columns."""
    return latents.shape[-3] // PATCH, latents.shape[-2] // PATCH
