"""bfloat16 attention over a KV cache where it lies: interface, plain-JAX oracle and fallback.

The kernel is in `attention_bf16_hopper`. Softmax is float32, with a running maximum and sum, in one
pass over the keys; both products add up in float32. Rounded are the probabilities, to bfloat16 once
the running maximum is taken off, and the result.

Keys come in slots of equal length: the chunk at hand, then the slots of a cache, of which the first
`filled` are real. The cache is read where it lies, all layers of it: nothing is copied, and slots
that are not real are not read.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from longlive_jax.errors import InputError
from longlive_jax.kernels import attention_bf16_hopper as hopper
from longlive_jax.kernels.attention_hopper import divides
from longlive_jax.kernels.chip import is_hopper, is_local


def supports(q: jax.Array, tokens: int) -> bool:
    """Whether the kernel runs such queries over slots of so many tokens on this machine."""
    return is_hopper() and is_local(q) and q.dtype == hopper.DTYPE and divides(q.shape, tokens)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    past_k: jax.Array,
    past_v: jax.Array,
    layer: jax.Array,
    filled: jax.Array,
    dense: Callable[..., jax.Array],
) -> jax.Array:
    """softmax(q keys^T / sqrt(head_dim)) values over a chunk's keys and values and the cached ones.

    By the kernel where `supports` says so and all is bfloat16, else by `dense` on the chunk's and
    the layer's keys and values, copied together in the chunk's dtypes.

    Args:
      q: [row, query, head, head_dim].
      k, v: [row, token, head, head_dim].
      past_k, past_v: the cache, all layers: [layer, row, slot, token, head, head_dim].
      layer: int32 [], the layer to read.
      filled: int32 [row], how many of its slots are real, from the first.
      dense: (q, k, v, kv_len) -> out, such as `ops.attention.attention`.

    Returns:
      [row, query, head, head_dim] in q's dtype.

    Raises:
      InputError: shapes that do not belong together.
    """
    _validate(q, k, v, past_k, past_v)
    arrays = (q, k, v, past_k, past_v)
    if supports(q, k.shape[1]) and all(x.dtype == hopper.DTYPE for x in arrays):
        return hopper.attention(*arrays, layer, filled)
    return by_dense(*arrays, layer, filled, dense)


def by_dense(q, k, v, past_k, past_v, layer, filled, dense) -> jax.Array:
    """`attention` without the kernel."""
    keys, values = _join(k, past_k, layer), _join(v, past_v, layer)
    return dense(q, keys, values, (1 + filled) * k.shape[1])


def reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    past_k: jax.Array,
    past_v: jax.Array,
    layer: jax.Array,
    filled: jax.Array,
) -> jax.Array:
    """What the kernel approaches: all in float32 but its result, in q's dtype, a head at a time.

    Arguments as `attention`'s.
    """
    _validate(q, k, v, past_k, past_v)
    keys, values = _join(k, past_k, layer), _join(v, past_v, layer)
    real = jnp.arange(keys.shape[1])[None, :] < ((1 + filled) * k.shape[1])[:, None]

    def attend(head):
        q, k, v = (x.astype(jnp.float32) for x in head)
        logits = jnp.einsum("rqd,rkd->rqk", q, k, precision="highest") * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(real[:, None], logits, -jnp.inf), axis=-1)
        # What is not real may be no number, which a weight of 0 would not stop.
        v = jnp.where(real[..., None], v, 0)
        return jnp.einsum("rqk,rkd->rqd", weights, v, precision="highest")

    out = lax.map(attend, tuple(jnp.moveaxis(x, 2, 0) for x in (q, keys, values)))
    return jnp.moveaxis(out, 0, 2).astype(q.dtype)


def _join(fresh, table, layer):
    """A chunk's and a layer's [row, token, ...] -> [row, (1 + slot) * token, ...], as the chunk."""
    past = lax.dynamic_index_in_dim(table, layer, keepdims=False).astype(fresh.dtype)
    return jnp.concatenate([fresh, past.reshape(len(fresh), -1, *fresh.shape[2:])], axis=1)


def _validate(q, k, v, past_k, past_v):
    rows, _, heads, head_dim = q.shape
    layers, _, slots, tokens = past_k.shape[:4]
    fresh = (rows, tokens, heads, head_dim)
    past = (layers, rows, slots, tokens, heads, head_dim)
    expected = {
        "k": (k, fresh),
        "v": (v, fresh),
        "past_k": (past_k, past),
        "past_v": (past_v, past),
    }
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise InputError(
                f"attention_bf16: {name} is {array.shape}; with q {q.shape} and {slots} slots of "
                f"{tokens} tokens it must be {shape}"
            )
