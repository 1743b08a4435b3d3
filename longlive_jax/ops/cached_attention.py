"""A chunk's attention over itself and the KV cache: by kernel or by XLA and cuDNN, and the oracles.

Keys and values come in slots of equal length: the chunk's own, `fresh`, which all its queries see,
then the cache's, `past`, of which its queries see those that `visible` selects:

  int32 [row]        a number of slots, from the first. The kernels read them in place.
  bool [row, slot]   a mask. Attention does not depend on the order of slots, so the visible ones of
                     one layer are copied to the front and counted.
"""

import jax
import jax.numpy as jnp
from jax import lax

from longlive_jax.errors import InputError
from longlive_jax.formats import FP8Tensor
from longlive_jax.kernels import attention_bf16
from longlive_jax.kernels import attention_fp8 as fp8
from longlive_jax.ops.attention import attention

Arrays = tuple[jax.Array, jax.Array]  # keys and values
Packed = tuple[FP8Tensor, FP8Tensor]  # by `kernels.attention_fp8.pack`


def attend(
    q: jax.Array, fresh: Arrays, past: Arrays, layer: jax.Array, visible: jax.Array
) -> jax.Array:
    """softmax(q keys^T / sqrt(head_dim)) values, over the chunk and its visible past.

    By the kernel where its `supports` says so, else by `dense`.

    Args:
      q: [row, query, head, head_dim].
      fresh: the chunk's keys and values, each [row, token, head, head_dim].
      past: the cache's keys and values: each [layer, row, slot, token, head, head_dim].
      layer: int32 [], the layer to read.
      visible: the slots to read, a count or a mask.

    Returns:
      [row, query, head, head_dim] in q's dtype.

    Raises:
      InputError: shapes that do not match.
    """
    _validate(q, fresh, past, visible)
    past, layer, filled = _as_prefix(past, layer, visible)
    if attention_bf16.supports(q, *fresh, *past):
        return attention_bf16.kernel(q, *fresh, *past, layer, filled)
    return dense(q, fresh, past, layer, filled)


def attend_fp8(
    q: jax.Array, fresh: Packed, past: Packed, layer: jax.Array, visible: jax.Array,
    tokens: int | None = None,
) -> jax.Array:  # fmt: skip
    """`attend` over packed FP8, by the FP8 kernel, else by `dense_fp8`.

    Args:
      fresh: keys E4M3 [row, token, head, head_dim], scale [row, 1, head, 1]; values E4M3 [row,
        head, head_dim, token], scale [row, head, 1, 1].
      past: the cache's, likewise, [layer, row, slot, ...].
      q, layer, visible: as of `attend`.
      tokens: of each slot's tokens the first so many are attended to, the others are padding, which
        the kernel does not take; None: all.

    Returns:
      [row, query, head, head_dim] in q's dtype.

    Raises:
      InputError: shapes or dtypes that do not match.
    """
    _validate_fp8(q, fresh, past, visible)
    past, layer, filled = _as_prefix(past, layer, visible)
    whole = tokens in (None, fresh[0].shape[1])
    if whole and fp8.supports(q, *fresh, *past):
        return fp8.kernel(q, *fresh, *past, layer, filled)
    return dense_fp8(q, fresh, past, layer, filled, tokens)


def dense(
    q: jax.Array, fresh: Arrays, past: Arrays, layer: jax.Array, filled: jax.Array
) -> jax.Array:
    """`attend` by `ops.attention`, over copies of the keys and values in the chunk's dtypes.

    filled: int32 [row], a count.
    """
    keys, values = (_join(x, _at(layer, y)) for x, y in zip(fresh, past))
    return attention(q, keys, values, (1 + filled) * fresh[0].shape[1])


def dense_fp8(
    q: jax.Array, fresh: Packed, past: Packed, layer: jax.Array, filled: jax.Array,
    tokens: int | None = None,
) -> jax.Array:  # fmt: skip
    """`attend_fp8` by `ops.attention`, over the dequantised numbers. filled: int32 [row]."""
    tokens = fresh[0].shape[1] if tokens is None else tokens
    keys, values = (
        _join(*(unpack(z.dequantize(q.dtype))[..., :tokens, :, :] for z in (x, y)))
        for unpack, x, y in zip(_UNPACK, fresh, _at(layer, past))
    )
    return attention(q, keys, values, (1 + filled) * tokens)


def reference(
    q: jax.Array, fresh: Arrays, past: Arrays, layer: jax.Array, visible: jax.Array
) -> jax.Array:
    """The oracle of the kernel: in float32, head by head; the result is in q's dtype.

    Arguments as of `attend`.
    """
    _validate(q, fresh, past, visible)
    keys, values = (_join(x, _at(layer, y)) for x, y in zip(fresh, past))
    valid = jnp.repeat(_mask(visible, past[0].shape[2]), fresh[0].shape[1], axis=1)

    def attend_head(head):
        q, k, v = (x.astype(jnp.float32) for x in head)
        logits = jnp.einsum("rqd,rkd->rqk", q, k, precision="highest") * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(valid[:, None], logits, -jnp.inf), axis=-1)
        # An invalid slot may have NaN, which a weight of 0 would not stop.
        v = jnp.where(valid[..., None], v, 0)
        return jnp.einsum("rqk,rkd->rqd", weights, v, precision="highest")

    out = lax.map(attend_head, tuple(jnp.moveaxis(x, 2, 0) for x in (q, keys, values)))
    return jnp.moveaxis(out, 0, 2).astype(q.dtype)


def reference_fp8(
    q: jax.Array, fresh: Packed, past: Packed, layer: jax.Array, visible: jax.Array
) -> jax.Array:
    """The oracle of the FP8 kernel: in float32, rounded where the kernel rounds.

    Arguments as of `attend_fp8`.
    """
    _validate_fp8(q, fresh, past, visible)
    x = q.astype(jnp.float32)
    amax = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), fp8.TINY)
    codes = _rounded(x * (fp8.LARGEST / amax), fp8.E4M3)
    logits_scale = jnp.moveaxis(amax, 1, 2) * (fp8.LOG2_SCALE / fp8.LARGEST)

    def tiled(codes):
        """[row, slot, token, head, d] -> [slot, tile, row, key, head, d], float32."""
        rows, slots, _, heads, d = codes.shape
        codes = codes.astype(jnp.float32).reshape(rows, slots, -1, fp8.TILE, heads, d)
        return jnp.moveaxis(codes, 0, 2)

    def over_tile(carry, tile):
        sums, top, mass, k_scale = carry
        k, v = tile
        logits = jnp.einsum("rqhd,rkhd->rhqk", codes, k, precision="highest")
        logits = logits * (logits_scale * k_scale[:, :, None, None])
        new = jnp.maximum(top, jnp.max(logits, axis=-1, keepdims=True))
        decay, p = jnp.exp2(top - new), jnp.exp2(logits - (new - fp8.GAIN))
        p_codes = _rounded(p, fp8.E4M3)
        out = jnp.einsum("rhqk,rkhd->rhqd", p_codes, v, precision="highest")
        mass = mass * decay + jnp.sum(p, axis=-1, keepdims=True)
        return (sums * decay + out, new, mass, k_scale), None

    def over_slot(carry, slot):
        n, valid, k, v, k_scale, v_scale = slot
        total, top, mass = carry
        start = (jnp.zeros_like(total), top, mass, k_scale)
        (sums, new, new_mass, _), _ = lax.scan(over_tile, start, (k, v))
        decay = jnp.where(n == 0, 0, jnp.exp2(top - new))
        total = _rounded(total, jnp.bfloat16) * decay + sums * v_scale[:, :, None, None]
        updated = (total, new, new_mass)
        valid = valid[:, None, None, None]
        return jax.tree.map(lambda a, b: jnp.where(valid, a, b), updated, carry), None

    slots = []
    for unpack, x, y in zip(_UNPACK, fresh, _at(layer, past)):
        both = jax.tree.map(lambda x, y: jnp.concatenate([x[:, None], y], axis=1), x, y)
        scale = both.scale.reshape(len(q), -1, q.shape[2])  # [row, slot, head]
        slots.append((tiled(unpack(both.values)), jnp.moveaxis(scale, 1, 0)))
    (keys, k_scale), (values, v_scale) = slots
    valid = _mask(visible, past[0].shape[2]).T
    shape = (len(q), q.shape[2], q.shape[1], 1)
    start = (
        jnp.zeros((*shape[:3], fp8.HEAD_DIM), jnp.float32),
        jnp.full(shape, -jnp.inf, jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )
    over = (jnp.arange(len(keys)), valid, keys, values, k_scale, v_scale)
    (total, _, mass), _ = lax.scan(over_slot, start, over)
    return jnp.moveaxis(total / mass, 1, 2).astype(q.dtype)


_UNPACK = (fp8.unpack_keys, fp8.unpack_values)


def _as_prefix(past, layer, visible):
    """(past, layer, count) with the visible slots first; unchanged if `visible` is a count."""
    if visible.dtype != jnp.bool_:
        return past, layer, visible
    order = jnp.argsort(~visible, axis=1, stable=True)

    def visible_first(leaf):
        leaf = lax.dynamic_index_in_dim(leaf, layer)
        index = order.reshape(1, *order.shape, *(1,) * (leaf.ndim - 3))
        return jnp.take_along_axis(leaf, index, axis=2)

    count = jnp.sum(visible, axis=1, dtype=jnp.int32)
    return jax.tree.map(visible_first, past), jnp.int32(0), count


def _mask(visible, slots):
    """bool [row, 1 + slot]: the slots that queries see; the first is the chunk's own."""
    if visible.dtype != jnp.bool_:
        visible = jnp.arange(slots)[None, :] < visible[:, None]
    return jnp.pad(visible, ((0, 0), (1, 0)), constant_values=True)


def _at(layer, past):
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, layer, keepdims=False), past)


def _join(fresh, past):
    """[row, token, ..], [row, slot, token, ..] -> [row, (1 + slot) * token, ..], as fresh."""
    past = past.astype(fresh.dtype).reshape(len(fresh), -1, *fresh.shape[2:])
    return jnp.concatenate([fresh, past], axis=1)


def _rounded(x, dtype):
    # On a GPU XLA drops a conversion and its inverse: the barrier separates them.
    return lax.optimization_barrier(x.astype(dtype)).astype(jnp.float32)


def _validate(q, fresh, past, visible):
    rows, _, heads, head_dim = q.shape
    layers, _, slots, tokens = past[0].shape[:4]
    shapes = ((rows, tokens, heads, head_dim), (layers, rows, slots, tokens, heads, head_dim))
    names = ("k", "v", "past_k", "past_v")
    arrays = zip(names, (*fresh, *past), (shape for shape in shapes for _ in range(2)))
    _match("attention_bf16", q, past, visible, arrays)


def _validate_fp8(q, fresh, past, visible):
    rows, _, heads, head_dim = q.shape
    layers, _, slots, tokens = past[0].shape[:4]
    of_slot = (
        ((tokens, heads, head_dim), (1, heads, 1)),
        ((heads, head_dim, tokens), (heads, 1, 1)),
    )
    arrays = []
    for lead, prefix, pair in (((rows,), "", fresh), ((layers, rows, slots), "past_", past)):
        for name, x, (values, scale) in zip("kv", pair, of_slot):
            name = prefix + name
            arrays += [(name, x.values, lead + values), (f"{name}'s scale", x.scale, lead + scale)]
            if x.values.dtype != fp8.E4M3:
                raise InputError(
                    f"attention_fp8: {name} is {x.values.dtype}; it must be float8_e4m3fn"
                )
    _match("attention_fp8", q, past, visible, arrays)


def _match(kernel, q, past, visible, arrays):
    """Refuses arrays (name, array, shape) whose shape does not match q and the cache."""
    slots, tokens = past[0].shape[2:4]
    a_mask = visible.dtype == jnp.bool_
    arrays = (*arrays, ("visible", visible, (len(q), slots) if a_mask else (len(q),)))
    for name, array, shape in arrays:
        if array.shape != shape:
            raise InputError(
                f"{kernel}: {name} is {array.shape}; with q {q.shape} and {slots} slots of "
                f"{tokens} tokens it must be {shape}"
            )
