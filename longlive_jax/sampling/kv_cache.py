"""The KV cache: a table of chunk slots.

Keys are stored rotated, at absolute positions, and attention does not care about the order of keys,
so nothing ever moves: a new chunk overwrites the slot whose chunk is visible no longer. What stays
visible (paper section 4): the global sink, the newest shot's first chunk, the newest others.
"""

import jax
import jax.numpy as jnp
from flax import struct

from longlive_jax import config as config_lib
from longlive_jax import recipes as recipe_lib
from longlive_jax.formats import Format
from longlive_jax.quant import kv

EMPTY = -1


@struct.dataclass
class KVCache:
    """Keys and values of the visible past.

    k, v: [layer, branch, batch, slot, token, head, head_dim]; two branches under classifier-free
      guidance (prompt, negative prompt), else one. Sharded by batch and by head. With a `format`
      quantised arrays of that shape, or as `quant.kv.store_pair` packs them.
    chunk: int32 [batch, slot], index of the chunk a slot holds, EMPTY if none. Filled slots come
      first, so the visible keys are a prefix.
    """

    k: kv.Stored
    v: kv.Stored
    chunk: jax.Array
    format: Format | None = struct.field(pytree_node=False)

    AXES = (None, None, "batch", None)  # logical, for the mesh; then those of `quant.kv.axes`

    def attend(self, layer, q: kv.Stored, k: kv.Stored, v: kv.Stored) -> jax.Array:
        """Attention of one layer's chunk over its own keys and values and the visible past's.

        Args:
          q, k, v: [branch * batch, token, head, head_dim].

        Returns:
          [branch * batch, token, head, head_dim] in the dtype that q is or stands for.
        """
        q, branches = kv.load(q, q.dtype), self.k.shape[1]
        filled = jnp.tile(jnp.sum(self.chunk != EMPTY, axis=1, dtype=jnp.int32), branches)
        past = jax.tree.map(_merge_rows, (self.k, self.v))
        return kv.attend(self.format, q, (k, v), past, layer, filled)

    def write(
        self, layer, slot: jax.Array, k: kv.Stored, v: kv.Stored, axis: str | None = None
    ) -> "KVCache":
        """Stores one layer's k, v [branch * batch, token, head, head_dim] in slot int32 [batch].

        axis: mesh axis that heads are spread over, inside a manual `jax.shard_map`; None: none is.
        """
        branches, batch = self.k.shape[1:3]

        def into(table, fresh):
            for row in range(branches * batch):
                branch, sample = divmod(row, batch)
                where = (layer, branch, sample, slot[sample])
                where += (0,) * (table.ndim - len(where))
                update = fresh[row][None, None, None, None].astype(table.dtype)
                table = jax.lax.dynamic_update_slice(table, update, where)
            return table

        k, v = kv.store_pair(self.format, k, v, axis)
        return self.replace(k=jax.tree.map(into, self.k, k), v=jax.tree.map(into, self.v, v))

    def oldest(self, protected: jax.Array) -> jax.Array:
        """The slot to overwrite, int32 [batch]: an empty one, else the oldest not `protected`.

        protected: bool [batch, slot].
        """
        age = jnp.where(protected, jnp.iinfo(jnp.int32).max, self.chunk)
        return jnp.argmin(age, axis=1).astype(jnp.int32)


def _merge_rows(table):
    """[layer, branch, batch, ...] -> [layer, branch * batch, ...]."""
    return table.reshape(table.shape[0], -1, *table.shape[3:])


def init(cfg: config_lib.Config, branches: int, batch: int, tokens: int, heads: int) -> KVCache:
    """An empty cache for chunks of `tokens` tokens and this device's `heads`."""
    slots = cfg.sample.window_frames // cfg.model.chunk_frames - 1
    lead = (cfg.model.num_layers, branches, batch, slots)
    chunk = jax.ShapeDtypeStruct((1, tokens, heads, cfg.model.head_dim), cfg.compute_dtype)
    fmt = recipe_lib.KV_FORMATS[cfg.quant.kv]
    stored = jax.eval_shape(lambda x: kv.store_pair(fmt, x, x), chunk)
    k, v = jax.tree.map(lambda x: jnp.zeros((*lead, *x.shape[1:]), x.dtype), stored)
    return KVCache(
        k=k,
        v=v,
        chunk=jnp.full((batch, slots), EMPTY, jnp.int32),
        format=fmt,
    )
