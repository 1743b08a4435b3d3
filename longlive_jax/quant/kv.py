"""How the KV cache stores keys and values, as they are or quantised, and how devices exchange them.

A chunk's are quantised once, when the clean pass writes them, and stored as attention takes them:
keys rotated, neither smoothed nor transformed. (The original subtracts from the keys of the chunk
being denoised, and from no others, their mean over head_dim, which changes the attention.)

A format is a value of `recipes.KV_FORMATS` or `PAYLOADS`; None: nothing is quantised.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from longlive_jax.formats import Format, Quantized
from longlive_jax.ops import cached_attention
from longlive_jax.quant import operands

Stored = jax.Array | Quantized
Pair = tuple[Stored, Stored]


@functools.singledispatch
def store_pair(fmt: Format | None, k: Stored, v: Stored, axis: str | None = None) -> Pair:
    """k and v [row, token, head, head_dim] as the cache keeps them. Every leaf begins with `row`.

    axis: as `store`'s.
    """
    return store(fmt, k, axis), store(fmt, v, axis)


def store(fmt: Format | None, x: Stored, axis: str | None = None) -> Stored:
    """x [row, token, head, head_dim] as devices exchange it. Every leaf begins with `row`.

    Args:
      fmt: None: x itself, whatever its dtype.
      axis: mesh axis, inside a manual `jax.shard_map`, that shards heads or tokens, so that codes
        do not depend on the mesh; None: none does.
    """
    if fmt is not None and isinstance(x, fmt.tensor):  # as it came from another device
        return x
    x = load(x, x.dtype)
    if fmt is None:
        return x
    # A head that blocks do not divide is filled up with zeros, which `attend` leaves out.
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -x.shape[-1] % fmt.multiple)))
    return operands.quantize(fmt, x, 1, () if axis is None else (axis,))


def load(stored: Stored, dtype: jnp.dtype) -> jax.Array:
    """The numbers [..., token, head, head_dim] that were stored, rounded to `dtype`."""
    if isinstance(stored, Quantized):
        return operands.dequantize(stored, dtype)
    return stored.astype(dtype)


def load_slice(table: Stored, layer: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`load` of one layer of a table [layer, ..., token, head, head_dim]: [1, ..., head_dim]."""
    one = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, layer, 1), table)
    return load(one, dtype)


load_layer = functools.singledispatch(load_slice)


@functools.singledispatch
def axes(fmt: Format | None) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    """Logical axes of a chunk's keys, and of its values, as `store_pair` leaves them."""
    del fmt
    return (None, "heads", None), (None, "heads", None)


@functools.singledispatch
def attend(
    fmt: Format | None,
    q: jax.Array,
    own: Pair,
    past: Pair,
    layer: Any,
    visible: jax.Array,
) -> jax.Array:
    """Attention of q [row, token, head, head_dim] over a chunk's own keys and values and the past.

    Args:
      own: keys and values of the chunk, of q's shape.
      past: keys and values as `store_pair` makes them, [layer, row, slot, ...].
      layer: int or int32 [], the layer to read.
      visible: the slots to read, as `ops.cached_attention` takes it: a count or a mask.
    """
    k, v = (load(x, x.dtype) for x in own)
    if fmt is None:
        past_k, past_v = (load(table, table.dtype) for table in past)
    else:
        # Not before q is ready: the compiler would expand all layers at once, and keep them.
        layer, q = jax.lax.optimization_barrier((jnp.asarray(layer, jnp.int32), q))
        past_k, past_v = (load_layer(table, layer, q.dtype)[..., : q.shape[-1]] for table in past)
        layer = 0
    return cached_attention.attend(q, (k, v), (past_k, past_v), layer, visible)


@functools.singledispatch
def exchange(stored: Stored, send: Callable[[jax.Array], jax.Array]) -> Stored:
    """The result of `store` after `send`, an all-to-all that leaves head_dim alone."""
    return jax.tree.map(lambda x: send(x) if x.ndim == stored.ndim else x, stored)
