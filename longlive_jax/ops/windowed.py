"""Teacher forcing as a sampler's cache gives it: over a window, and without gradient to the past.

A sampler sees sinks, a shot's first chunk and recent chunks. Which ones these are depends on where
a video's cuts are, how many does not: until the window is full all earlier chunks, then always as
many as it has slots. So each chunk is a dense attention, over earlier chunks that are sliced or
gathered; there is no mask.

`visible` is int32 [batch, chunk, slot], the earlier chunks that each chunk sees, by their number.
Its rows before chunk `slot` are not read: there all earlier chunks are visible.
"""

import jax
import jax.numpy as jnp

from longlive_jax.ops.attention import attention
from longlive_jax.ops.teacher_forcing import teacher_forcing


def windowed_teacher_forcing(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array
) -> jax.Array:
    """Both copies of chunk i attend to the clean chunks that it sees and to their own chunk.

    Args:
      q, k, v: [batch, chunk, 2, token, head, head_dim]; the axis of size 2 is (clean, noisy).

    Returns:
      [batch, chunk, 2, token, head, head_dim] in q's dtype.
    """
    chunks, plain = q.shape[1], min(q.shape[1], visible.shape[-1] + 1)
    first = teacher_forcing(q[:, :plain], k[:, :plain], v[:, :plain])
    if plain == chunks:
        return first
    clean, seen = (k[:, :, 0], v[:, :, 0]), visible[:, plain:]
    later = [
        _gathered(q[:, plain:, i], k[:, plain:, i], v[:, plain:, i], clean, seen) for i in (0, 1)
    ]
    return jnp.concatenate([first, jnp.stack(later, axis=2)], axis=1)


def over_past(
    q: jax.Array, k: jax.Array, v: jax.Array, past: tuple[jax.Array, jax.Array],
    visible: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Chunk i attends to its own k, v and to the earlier chunks of `past` that it sees.

    Args:
      q, k, v: [batch, chunk, token, head, head_dim], of one copy of a video.
      past: keys and values of the clean copy, of the shape of k.
      visible: None: all earlier chunks.

    Returns:
      [batch, chunk, token, head, head_dim] in q's dtype.
    """
    chunks = q.shape[1]
    plain = chunks if visible is None else min(chunks, visible.shape[-1] + 1)
    outs = []
    for i in range(plain):
        keys = (_tokens(jnp.concatenate([old[:, :i], own[:, i : i + 1]], axis=1))
                for old, own in zip(past, (k, v)))  # fmt: skip
        outs.append(attention(q[:, i], *keys)[:, None])
    if visible is not None and plain < chunks:
        rest = _gathered(q[:, plain:], k[:, plain:], v[:, plain:], past, visible[:, plain:])
        outs.append(rest)
    return jnp.concatenate(outs, axis=1)


def _gathered(q, k, v, past, visible):
    """As `over_past`, of chunks that all see as many: one batched attention."""

    def keys(clean, own):
        seen = jax.vmap(lambda clean, numbers: clean[numbers])(clean, visible)
        both = jnp.concatenate([seen, own[:, :, None]], axis=2)
        return _tokens(both.reshape(-1, *both.shape[2:]))

    own = q.reshape(-1, *q.shape[2:])
    return attention(own, keys(past[0], k), keys(past[1], v)).reshape(q.shape)


def _tokens(x):
    """[batch, chunk, token, ...] -> [batch, chunk * token, ...]."""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])
