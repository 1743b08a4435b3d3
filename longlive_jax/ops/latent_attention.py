"""Attention over time of the action path: every position sees a few latents of its own past.

A chunk's queries see the chunk's own latents and `past` latents before them. Each position of a
picture is a sequence of its own; keys and values belong to a position, or, without the axis
`patch`, to all positions alike, and are then neither copied nor repeated. The sequences are a
dozen latents long: plain products, not a kernel for long ones.
"""

import jax
import jax.numpy as jnp


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, past_k: jax.Array, past_v: jax.Array, valid: jax.Array
) -> jax.Array:
    """softmax(q keys^T / sqrt(head_dim)) values over a chunk's latents and those before them.

    Args:
      q: [batch, chunk, copy, frame, patch, head, head_dim].
      k, v: the same, or without `patch`: each copy of a chunk sees its own.
      past_k, past_v: [batch, chunk, past, (patch,) head, head_dim]: both copies see them.
      valid: bool [batch or 1, chunk, past], the ones that are visible.

    Returns:
      As q, in its dtype; softmax is float32.
    """
    patch = "p" if k.ndim == q.ndim else ""
    own = _einsum(f"bcnfphd,bcng{patch}hd->bcnphfg", q, k)
    past = _einsum(f"bcnfphd,bcg{patch}hd->bcnphfg", q, past_k)
    past = jnp.where(valid[:, :, None, None, None, None], past * q.shape[-1] ** -0.5, -jnp.inf)
    logits = jnp.concatenate([past, own * q.shape[-1] ** -0.5], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    past, own = jnp.split(weights, [past.shape[-1]], axis=-1)
    out = _einsum(f"bcnphfg,bcng{patch}hd->bcnfphd", own, v)
    return (out + _einsum(f"bcnphfg,bcg{patch}hd->bcnfphd", past, past_v)).astype(q.dtype)


def of_chunks(
    q: jax.Array, k: jax.Array, v: jax.Array, window: int,
    clean: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:  # fmt: skip
    """`attend` of all chunks of a video to their clean past.

    Args:
      q, k, v: as of `attend`, with all chunks.
      window: latents that are visible, up to a chunk's last; 0: all, for which keys and values are
        copied once a chunk.
      clean: keys and values of the past, [batch, chunk, frame, ...]; None: those of the first copy.
    """
    chunks, frames = q.shape[1], q.shape[3]
    earlier = (chunks - 1) * frames
    past = min(window - frames, earlier) if window else earlier
    latent = jnp.arange(chunks)[:, None] * frames + jnp.arange(-past, 0)[None, :]
    clean = (k[:, :, 0], v[:, :, 0]) if clean is None else clean
    past_k, past_v = (_before(x, past) for x in clean)
    return attend(q, k, v, past_k, past_v, (latent >= 0)[None])


def _before(x, past):
    """The last `past` latents before each chunk of [batch, chunk, frame, ...]; zeros for none."""
    chunks, frames = x.shape[1:3]
    shifted = []
    for back in range(-(-past // frames), 0, -1):
        padding = [(0, 0)] * x.ndim
        padding[1] = (back, 0)
        shifted.append(jnp.pad(x[:, : chunks - back], padding))
    if not shifted:
        return x[:, :, :0]
    whole = jnp.concatenate(shifted, axis=2)
    return whole[:, :, whole.shape[2] - past :]


def _einsum(formula, x, y):
    return jnp.einsum(formula, x, y, preferred_element_type=jnp.float32)
