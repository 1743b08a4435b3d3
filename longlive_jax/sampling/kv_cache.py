"""The KV cache: keys and values of the chunks in a window's slots.

Keys are stored rotated, at absolute positions, and attention does not care about the order of keys,
so nothing ever moves: a new chunk overwrites the slot whose chunk is visible no longer. Which one
that is, and which slots are visible, `sampling.window` says.
"""

import jax
import jax.numpy as jnp
from flax import struct

from longlive_jax import config as config_lib
from longlive_jax import recipes as recipe_lib
from longlive_jax.formats import Format
from longlive_jax.quant import kv


class KVCache(struct.PyTreeNode):
    """Keys and values, by slot.

    k, v: [layer, branch, batch, slot, token, head, head_dim]; two branches under classifier-free
      guidance (prompt, negative prompt), else one. Sharded by batch and by head. With a `format`
      quantised arrays of that shape, or as `quant.kv.store_pair` packs them.
    """

    k: kv.Stored
    v: kv.Stored
    format: Format | None = struct.field(pytree_node=False)

    AXES = (None, None, "batch", None)  # logical, for the mesh; then those of `quant.kv.axes`

    def attend(
        self, layer, q: kv.Stored, k: kv.Stored, v: kv.Stored, valid: jax.Array
    ) -> jax.Array:
        """Attention of one layer's chunk over its own keys and values and the visible past's.

        Args:
          q, k, v: [branch * batch, token, head, head_dim].
          valid: bool [batch, slot], the slots that are visible: a prefix.

        Returns:
          [branch * batch, token, head, head_dim] in the dtype that q is or stands for.
        """
        q, branches = kv.load(q, q.dtype), self.k.shape[1]
        # A count, not a mask, which attention takes too, but only by copying the slots it reads.
        visible = jnp.tile(jnp.sum(valid, axis=1, dtype=jnp.int32), branches)
        past = jax.tree.map(_merge_rows, (self.k, self.v))
        return kv.attend(self.format, q, (k, v), past, layer, visible)

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


class Past(struct.PyTreeNode):
    """A cache and its visible slots, `valid` bool [batch, slot]: what the transformer is given."""

    cache: KVCache
    valid: jax.Array

    def attend(self, layer, q: kv.Stored, k: kv.Stored, v: kv.Stored) -> jax.Array:
        """As `KVCache.attend`."""
        return self.cache.attend(layer, q, k, v, self.valid)

    def write(
        self, layer, slot: jax.Array, k: kv.Stored, v: kv.Stored, axis: str | None = None
    ) -> "Past":
        """As `KVCache.write`. What is written becomes visible when the whole chunk is."""
        return self.replace(cache=self.cache.write(layer, slot, k, v, axis))


def _merge_rows(table):
    """[layer, branch, batch, ...] -> [layer, branch * batch, ...]."""
    return table.reshape(table.shape[0], -1, *table.shape[3:])


def init(cfg: config_lib.Config, branches: int, batch: int, tokens: int, heads: int) -> KVCache:
    """An empty cache for chunks of `tokens` tokens and this device's `heads`."""
    slots = cfg.sample.window(cfg.model).slots
    lead = (cfg.model.num_layers, branches, batch, slots)
    chunk = jax.ShapeDtypeStruct((1, tokens, heads, cfg.model.head_dim), cfg.compute_dtype)
    fmt = recipe_lib.KV_FORMATS[cfg.quant.kv]
    stored = jax.eval_shape(lambda x: kv.store_pair(fmt, x, x), chunk)
    k, v = jax.tree.map(lambda x: jnp.zeros((*lead, *x.shape[1:]), x.dtype), stored)
    return KVCache(k, v, fmt)
