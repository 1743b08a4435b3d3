"""The KV cache: keys and values of the chunks in a window's slots.

Keys are stored rotated, at absolute positions, and attention does not care about the order of keys,
so nothing ever moves: a new chunk overwrites the slot whose chunk is visible no longer. Which one
that is, and which slots are visible, `sampling.window` says.
"""

import jax
import jax.numpy as jnp
from flax import struct

from longlive_jax import config as config_lib
from longlive_jax.kernels import attention_bf16, attention_fp8
from longlive_jax.ops.attention import attention
from longlive_jax.quant import kv


@struct.dataclass
class KVCache:
    """Keys and values, by slot.

    k, v: [layer, branch, batch, slot, token, head, head_dim]; two branches under classifier-free
      guidance (prompt, negative prompt), else one. Sharded by batch and by head. With `format`
      "fp8" or "nvfp4" (see `quant.kv`) FP8Tensors or NVFP4Tensors of that shape. Those in FP8 are
      packed (`kernels.attention_fp8.pack`): v [layer, branch, batch, slot, head, head_dim, token].
    """

    k: kv.Stored
    v: kv.Stored
    format: str = struct.field(pytree_node=False)

    # Logical axes, for the mesh. An array of fewer axes has the first of them.
    AXES = (None, None, "batch", None, None, "heads", None)
    PACKED_AXES = (None, None, "batch", None, "heads", None, None)

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
        # A number, not a mask: every kernel then skips what is not valid. (cuDNN reads all keys
        # under a mask: H200, a window a fifth full, 31 ms in place of 8.)
        filled = jnp.tile(jnp.sum(valid, axis=1, dtype=jnp.int32), branches)
        past = [jax.tree.map(_merge_rows, table) for table in (self.k, self.v)]

        if self.format == "fp8":
            fresh = kv.store_pair(k, v, "fp8")
            return attention_fp8.attention(q, *fresh, *past, layer, filled, attention)
        fresh = [kv.load(x, x.dtype) for x in (k, v)]
        if self.format == "nvfp4":
            # Not before q is there: the compiler would expand all layers at once, and hold them.
            layer, q = jax.lax.optimization_barrier((jnp.asarray(layer, jnp.int32), q))
            past = [kv.load_layer(table, layer, q.dtype) for table in past]
            layer = 0
        return attention_bf16.attention(q, *fresh, *past, layer, filled, attention)

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

        k, v = kv.store_pair(k, v, self.format, axis)
        return self.replace(k=jax.tree.map(into, self.k, k), v=jax.tree.map(into, self.v, v))


@struct.dataclass
class Past:
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
    stored = jax.eval_shape(lambda x: kv.store_pair(x, x, cfg.quant.kv), chunk)
    k, v = jax.tree.map(lambda x: jnp.zeros((*lead, *x.shape[1:]), x.dtype), stored)
    return KVCache(k, v, cfg.quant.kv)
