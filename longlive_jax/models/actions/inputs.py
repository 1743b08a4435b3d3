"""What the branches are conditioned on: for each latent the last actions, one vector a picture.

Latent j shows pictures 4j - 3 to 4j (the first one picture alone) and depends on the 12 actions
from 4j - pad on; actions before the first are copies of it. With `pad` 12 action f drives picture
f + 1, and a video's last action nothing.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from longlive_jax import config as config_lib
from longlive_jax.config import TEMPORAL_COMPRESSION
from longlive_jax.config.actions import ROTATED
from longlive_jax.errors import InputError
from longlive_jax.models.branch import Layer
from longlive_jax.ops import rope

KEYBOARD, MOUSE = "keyboard", "mouse"
_BASE = 256.0  # of the rotary positions
_WINDOW = 12  # actions a latent of the module: those of three latents
_TOKEN_WINDOW = 20  # and of the token residual, whose two convolutions see four latents before


class Given(struct.PyTreeNode):
    """Conditioning of one branch; leading axes are [batch, chunk, (copy,)].

    vectors: [.., frame, action, dim], the latent's last actions, the newest last.
    angle: float32 [.., frame, 1, head_dim / 2], of the latent's rotary position.
    """

    vectors: jax.Array
    angle: jax.Array


def given(layer: Layer, name: str) -> Given | None:
    """A branch's conditioning; None: there is no such array, as without a mouse.

    Raises:
      InputError: a forward without any actions.
    """
    assert layer.given is not None
    if layer.given.inserted is None:
        raise InputError(
            f"actions: none given to a model with an action path (actions.kind="
            f"{layer.cfg.actions.kind!r}); pass inserted=models.actions.conditioning(...)"
        )
    return layer.given.inserted.get(name)


def vectors_of(cfg: config_lib.Actions) -> int:
    """How many actions each latent depends on."""
    return _WINDOW if cfg.kind == "module" else _TOKEN_WINDOW


def dims(cfg: config_lib.Actions) -> dict[str, int]:
    """The dimension of each path's vectors; empty without an action path."""
    if cfg.kind == "none":
        return {}
    return {KEYBOARD: cfg.keyboard_dim} | ({MOUSE: cfg.mouse_dim} if cfg.mouse_dim else {})


def shapes(cfg: config_lib.Actions, frames: int) -> dict[str, tuple[int, int, int]]:
    """By path: frame, action, dim of the actions of each latent of a chunk."""
    return {name: (frames, vectors_of(cfg), dim) for name, dim in dims(cfg).items()}


def needed(cfg: config_lib.Actions, latents: int) -> int:
    """How many actions, from the video's first on, `latents` latents depend on."""
    return (latents - 1) * TEMPORAL_COMPRESSION + _WINDOW - cfg.pad


def windows[T: (jax.Array, np.ndarray)](
    vectors: T, cfg: config_lib.Actions, latents: int, *, first_latent: int = 0,
    first_action: int = 0,
) -> T:  # fmt: skip
    """The actions of each latent of a video, or of a part of one.

    Args:
      vectors: [batch, action, dim], from the video's action `first_action` on. An array of NumPy
        gives one of NumPy.
      latents: how many, from `first_latent` on.

    Returns:
      [batch, latent, `vectors_of(cfg)`, dim]; what was before `first_action` is a copy of it.

    Raises:
      InputError: there are fewer actions than the latents depend on.
    """
    least = max(1, needed(cfg, first_latent + latents) - first_action)
    if vectors.shape[1] < least:
        raise InputError(
            f"actions: {vectors.shape[1]} vectors for {latents} latents; with actions.pad="
            f"{cfg.pad} there must be at least {least}, one a picture"
        )
    number = vectors_of(cfg)
    end = TEMPORAL_COMPRESSION * (first_latent + np.arange(latents)) + _WINDOW - cfg.pad
    index = np.maximum(end[:, None] + np.arange(-number, 0)[None] - first_action, 0)
    if isinstance(vectors, np.ndarray):
        return vectors[:, index]
    return jnp.take(vectors, jnp.asarray(index), axis=1)


def newest(windows: jax.Array) -> jax.Array:
    """Of each latent's actions, by `windows`, its own: what `of_chunk` gives.

    windows: [.., frame, action, dim] -> [.., 4 * frame, dim].
    """
    own = windows[..., -TEMPORAL_COMPRESSION:, :]
    return own.reshape(*own.shape[:-3], -1, own.shape[-1])


def of_chunk(vectors: np.ndarray, cfg: config_lib.Actions, chunk: int, frames: int) -> np.ndarray:
    """The actions that chunk `chunk` of `frames` latents brings, as `advance` takes them.

    vectors: [batch, action, dim], of a whole video; beyond its ends are copies.

    Returns:
      [batch, 4 * frame, dim]: with `pad` 12 those from the one that drives the chunk's first
      picture on; in a video's first chunk copies of the first come before.
    """
    size = TEMPORAL_COMPRESSION
    index = size * frames * chunk + _WINDOW - size - cfg.pad + np.arange(size * frames)
    return np.asarray(vectors)[:, np.clip(index, 0, vectors.shape[1] - 1)]


def start(cfg: config_lib.Actions, batch: int) -> dict[str, jax.Array]:
    """What a stream keeps of the actions before it, float32 [batch, action, dim] by path."""
    before = vectors_of(cfg) - TEMPORAL_COMPRESSION
    return {name: jnp.zeros((batch, before, dim), jnp.float32) for name, dim in dims(cfg).items()}


def advance(before: jax.Array, fresh: jax.Array, begins: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The actions of each latent of a stream's next chunk.

    Args:
      before: [batch, action, dim], of `start` or the last call.
      fresh: [batch, 4 * frame, dim], the chunk's own, four a latent.
      begins: bool [batch], streams whose first chunk this is: before it are copies of its first.

    Returns:
      [batch, frame, action, dim], and what the chunk after it takes as `before`.
    """
    first = jnp.broadcast_to(fresh[:, :1], before.shape).astype(before.dtype)
    before = jnp.where(begins[:, None, None], first, before)
    both = jnp.concatenate([before, fresh.astype(before.dtype)], axis=1)
    number = before.shape[1] + TEMPORAL_COMPRESSION
    begin = np.arange(fresh.shape[1] // TEMPORAL_COMPRESSION) * TEMPORAL_COMPRESSION
    index = begin[:, None] + np.arange(number)[None]
    return jnp.take(both, jnp.asarray(index), axis=1), both[:, fresh.shape[1] :]


def conditioning(
    cfg: config_lib.Actions, actions: Mapping[str, jax.Array], latents: jax.Array
) -> dict[str, Given]:
    """`inserted` of `models.dit`'s functions, by branch.

    Args:
      actions: of KEYBOARD and MOUSE, [.., frame, action, dim] each, by `windows` or `advance`. A
        mouse that is not there leaves out the mouse path.
      latents: int32 [.., frame], below 2**24: the video's latents, through all its cuts.
    """
    if KEYBOARD not in actions:
        raise InputError("actions: there is no keyboard array, which the action path needs")
    turn = ROTATED // 2
    angle = rope.exact_angle(latents, _BASE ** (-np.arange(turn) / turn))
    padding = [(0, 0)] * (angle.ndim - 1) + [(0, cfg.head_dim // 2 - turn)]
    angle = jnp.pad(angle, padding)[..., None, :]
    return {name: Given(vectors, angle) for name, vectors in actions.items()}
