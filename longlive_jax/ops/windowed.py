"""Teacher forcing for videos longer than the sampler's window.

As `ops.teacher_forcing`, but chunk i sees of the clean past only the chunks that were visible when
a sampler denoised it: sinks, a shot's first chunk, recent ones. Which ones these are depends on
where a video's cuts are, how many does not: until the window is full all earlier chunks, then
always as many as it has slots. So the first chunks are plain teacher forcing, and each later one is
a dense attention over keys that are gathered. There is no mask.
"""

import jax
import jax.numpy as jnp

from longlive_jax.ops.attention import attention
from longlive_jax.ops.teacher_forcing import teacher_forcing


def windowed_teacher_forcing(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array
) -> jax.Array:
    """Both copies of chunk i attend to the clean chunks `visible[:, i]` and to their own chunk.

    Args:
      q, k, v: [batch, chunk, 2, token, head, head_dim]; the axis of size 2 is (clean, noisy).
      visible: int32 [batch, chunk, slot], earlier chunks by their number. Rows before chunk `slot`
        are not read: there all earlier chunks are visible.

    Returns:
      [batch, chunk, 2, token, head, head_dim] in q's dtype.
    """
    chunks, slots = q.shape[1], visible.shape[-1]
    plain = min(chunks, slots + 1)
    first = teacher_forcing(q[:, :plain], k[:, :plain], v[:, :plain])
    if plain == chunks:
        return first
    visible = visible[:, plain:]

    def keys(x):
        """[batch * chunk * copy, (slot + 1) * token, ...]: the visible chunks', then the own."""
        past = jax.vmap(lambda clean, own: clean[own])(x[:, :, 0], visible)
        past = jnp.broadcast_to(past[:, :, None], (*past.shape[:2], 2, *past.shape[2:]))
        both = jnp.concatenate([past, x[:, plain:, :, None]], axis=3)
        return both.reshape(-1, both.shape[3] * both.shape[4], *both.shape[5:])

    own = q[:, plain:]
    later = attention(own.reshape(-1, *own.shape[3:]), keys(k), keys(v))
    return jnp.concatenate([first, later.reshape(own.shape)], axis=1)
