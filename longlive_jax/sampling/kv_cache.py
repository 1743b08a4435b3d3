"""The KV cache: a table of chunk slots.

Keys are stored rotated, at absolute positions, and attention does not care about the order of keys,
so nothing ever moves: a new chunk overwrites the slot whose chunk is visible no longer. What stays
visible (paper section 4): the global sink, the newest shot's first chunk, the newest others.
"""

import jax
import jax.numpy as jnp
from flax import struct

from longlive_jax import config as config_lib
from longlive_jax.quant import kv

EMPTY = -1


@struct.dataclass
class KVCache:
    """Keys and values of the visible past.

    k, v: [layer, branch, batch, slot, token, head, head_dim]; two branches under classifier-free
      guidance (prompt, negative prompt), else one. Sharded by batch and by head. With `format`
      "fp8" or "nvfp4" (see `quant.kv`) an FP8Tensor or NVFP4Tensor of that shape.
    chunk: int32 [batch, slot], index of the chunk a slot holds, EMPTY if none. Filled slots come
      first, so the visible keys are a prefix.
    """

    k: kv.Stored
    v: kv.Stored
    chunk: jax.Array
    format: str = struct.field(pytree_node=False)

    # Logical axes, for the mesh. An array of fewer axes has the first of them.
    AXES = (None, None, "batch", None, None, "heads", None)

    def read(self, layer, k: kv.Stored, v: kv.Stored) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The visible past of one layer behind fresh k, v [branch * batch, token, head, head_dim].

        Returns, in the dtype that k and v are or stand for:
          k, v [branch * batch, token + slot * token, head, head_dim] and how many of those keys are
          real, int32 [branch * batch].
        """
        branches = self.k.shape[1]
        filled = jnp.sum(self.chunk != EMPTY, axis=1, dtype=jnp.int32)
        kv_len = jnp.tile((1 + filled) * k.shape[1], branches)

        def behind(fresh, table):
            past = jax.tree.map(
                lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), table
            )
            past = kv.load(past, fresh.dtype).reshape(fresh.shape[0], -1, *fresh.shape[2:])
            return jnp.concatenate([kv.load(fresh, fresh.dtype), past], axis=1)

        return behind(k, self.k), behind(v, self.v), kv_len

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

        def stored(table, fresh):
            return jax.tree.map(into, table, kv.store(fresh, self.format, axis))

        return self.replace(k=stored(self.k, k), v=stored(self.v, v))

    def oldest(self, protected: jax.Array) -> jax.Array:
        """The slot to overwrite, int32 [batch]: an empty one, else the oldest not `protected`.

        protected: bool [batch, slot].
        """
        age = jnp.where(protected, jnp.iinfo(jnp.int32).max, self.chunk)
        return jnp.argmin(age, axis=1).astype(jnp.int32)


def init(cfg: config_lib.Config, branches: int, batch: int, tokens: int, heads: int) -> KVCache:
    """An empty cache for chunks of `tokens` tokens and this device's `heads`."""
    slots = cfg.sample.window_frames // cfg.model.chunk_frames - 1
    lead = (cfg.model.num_layers, branches, batch, slots)
    chunk = jax.ShapeDtypeStruct((1, tokens, heads, cfg.model.head_dim), cfg.compute_dtype)
    stored = jax.eval_shape(lambda x: kv.store(x, cfg.quant.kv), chunk)

    def empty():
        return jax.tree.map(lambda x: jnp.zeros((*lead, *x.shape[1:]), x.dtype), stored)

    return KVCache(
        k=empty(),
        v=empty(),
        chunk=jnp.full((batch, slots), EMPTY, jnp.int32),
        format=cfg.quant.kv,
    )
