"""The caches of the action path: keys and values of a few latents before the next chunk.

Its window is counted in latents and smaller than self-attention's, so that it has a table of its
own: the last latents, the oldest first. Keys are rotated at absolute positions.
"""

import jax
import jax.numpy as jnp
from flax import struct

from longlive_jax.ops import latent_attention

EMPTY = -1


class LatentCache(struct.PyTreeNode):
    """One branch's keys and values, by latent.

    k, v: [layer, branch, batch, latent, (patch,) head, head_dim]; branches of guidance. Sharded by
      batch and by head.
    """

    k: jax.Array
    v: jax.Array


class LatentPast(struct.PyTreeNode):
    """A cache, and which of its latents the next chunk sees: what the transformer is given.

    latent: int32 [batch, latent], numbers of those that are stored; EMPTY: none.
    first: int32 [batch], number of the chunk's first latent.
    frames: of a chunk.
    """

    cache: LatentCache
    latent: jax.Array
    first: jax.Array
    frames: int = struct.field(pytree_node=False)

    def attend(self, layer, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Attention over time of one layer's chunk over its own latents and the visible past's.

        Args:
          q: [branch * batch, token, head, head_dim].
          k, v: the same, or one token a latent.

        Returns:
          As q.
        """
        stored = (_layer(x, layer) for x in self._tables)
        patch = self.cache.k.shape[4:-2]
        past_k, past_v = (x.reshape(len(q), 1, *x.shape[2:]) for x in stored)
        k, v = (x.reshape(len(x), 1, 1, self.frames, *patch, *x.shape[2:]) for x in (k, v))
        queries = q.reshape(len(q), 1, 1, self.frames, -1, *q.shape[2:])
        valid = jnp.tile(self._valid(), (self.cache.k.shape[1], 1))[:, None]
        return latent_attention.attend(queries, k, v, past_k, past_v, valid).reshape(q.shape)

    def write(
        self, layer, slot: jax.Array, k: jax.Array, v: jax.Array, axis: str | None = None
    ) -> "LatentPast":
        """Stores one layer's k, v. They become visible when the whole chunk is, by `advance`.

        slot, axis: of other caches.
        """
        del slot, axis
        k, v = (_store(table, layer, x, self.frames) for table, x in zip(self._tables, (k, v)))
        return self.replace(cache=LatentCache(k, v))

    @property
    def _tables(self):
        return self.cache.k, self.cache.v

    def _valid(self):
        """bool [batch, latent]: no gap of a window that was brought under another prompt."""
        first, size = self.first[:, None], self.latent.shape[1]
        return (self.latent != EMPTY) & (self.latent >= first - size) & (self.latent < first)


def advance(latent: jax.Array, first: jax.Array, frames: int) -> jax.Array:
    """`LatentPast.latent` after a chunk of `frames` latents from `first`, int32 [batch], on."""
    fresh = first[:, None] + jnp.arange(frames, dtype=jnp.int32)[None]
    return jnp.concatenate([latent, fresh], axis=1)[:, frames:]


def _layer(table, layer):
    return jax.lax.dynamic_index_in_dim(table, layer, keepdims=False)


def _store(table, layer, fresh, frames):
    old = _layer(table, layer)
    fresh = fresh.reshape(*old.shape[:2], frames, *old.shape[3:]).astype(table.dtype)
    new = jnp.concatenate([old, fresh], axis=2)[:, :, frames:]
    return jax.lax.dynamic_update_index_in_dim(table, new, layer, 0)
