"""Attention in FP8 over FP8 keys and values: interface, plain-JAX oracle and fallback.

The kernel is in `attention_fp8_hopper`. Softmax is float32, with a running maximum and sum, in one
pass over the keys. What is rounded, besides the keys and values that are handed in:

  q     to E4M3, one scale a token and head.
  P     the probabilities, to E4M3: 2^8 times exp(logit - running maximum), so that the largest is
        256 of E4M3's 448 and all down to 2^-14 of it have three bits of fraction.
  out   a slot's share of it, to bfloat16, before the next slot's is added.

Keys and values are E4M3: a channel is wrong by 2.6 % whatever its size, and that of q and k by
3.7 % of a logit's typical size, which peaked logits turn into 6 % of an output. (8-bit integers
behind a Hadamard transform of q and k would be wrong by 1 %.)

How they are stored. The second product contracts tokens and wants them contiguous: values are
[head, head_dim, token]. It also wants the probabilities of 16 tokens in another order than the
first product leaves them in registers; the order of keys being free, the keys' tokens are permuted
instead. `pack` does both, once, when they are stored, and no register moves between lanes.

Keys come in slots of equal length: the chunk at hand, then the slots of a cache, of which the first
`filled` are real. The cache is read where it lies, all layers of it: nothing is copied.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from longlive_jax.errors import InputError
from longlive_jax.formats import FP8Tensor
from longlive_jax.kernels import attention_fp8_hopper as hopper
from longlive_jax.kernels.attention_hopper import divides
from longlive_jax.kernels.chip import is_hopper, is_local


def pack(k: FP8Tensor, v: FP8Tensor) -> tuple[FP8Tensor, FP8Tensor]:
    """Keys and values [..., token, head, head_dim], scale [..., 1, head, 1], as they are stored.

    Returns:
      k of the same shape, its tokens permuted, and v [..., head, head_dim, token], scale
      [..., head, 1, 1].

    Raises:
      InputError: tokens that are not a multiple of 16.
    """
    v = v.replace(values=jnp.moveaxis(v.values, -3, -1), scale=jnp.swapaxes(v.scale, -3, -2))
    return k.replace(values=pack_keys(k.values)), v


def pack_keys(k: jax.Array) -> jax.Array:
    """[..., token, head, head_dim]: of every 16 tokens the order becomes 0 1 4 5 8 9 12 13 2 3 ..

    Raises:
      InputError: tokens that are not a multiple of 16.
    """
    return _permute(k, (4, 2))


def unpack_keys(k: jax.Array) -> jax.Array:
    """The inverse of `pack_keys`."""
    return _permute(k, (2, 4))


def unpack_values(v: jax.Array) -> jax.Array:
    """Stored values [..., head, head_dim, token] as [..., token, head, head_dim]."""
    return jnp.moveaxis(v, -1, -3)


def _permute(x, split):
    """Pairs of tokens, in every 16 a matrix of `split`, transposed."""
    *lead, tokens, heads, head_dim = x.shape
    if tokens % 16:
        raise InputError(f"attention_fp8: {tokens} tokens; they must be a multiple of 16")
    pairs = x.reshape(*lead, tokens // 16, *split, 2, heads, head_dim)
    return jnp.swapaxes(pairs, -5, -4).reshape(x.shape)


def supports(q: jax.Array, tokens: int) -> bool:
    """Whether the kernel runs such queries over slots of so many tokens on this machine."""
    return is_hopper() and is_local(q) and q.dtype == jnp.bfloat16 and divides(q.shape, tokens)


def attention(
    q: jax.Array,
    k: FP8Tensor,
    v: FP8Tensor,
    past_k: FP8Tensor,
    past_v: FP8Tensor,
    layer: jax.Array,
    filled: jax.Array,
    dense: Callable[..., jax.Array],
) -> jax.Array:
    """softmax(q keys^T / sqrt(head_dim)) values over a chunk's keys and values and the cached ones.

    By the kernel where `supports` says so, else by `dense` on what the codes stand for.

    Args:
      q: [row, query, head, head_dim].
      k, v: packed (`pack`): k's values E4M3 [row, token, head, head_dim], scale
        [row, 1, head, 1]; v's values E4M3 [row, head, head_dim, token], scale [row, head, 1, 1].
      past_k, past_v: packed, the cache, all layers: [layer, row, slot, ...] of the same.
      layer: int32 [], the layer to read.
      filled: int32 [row], how many of its slots are real, from the first.
      dense: (q, k, v, kv_len) -> out, such as `ops.attention.attention`.

    Returns:
      [row, query, head, head_dim] in q's dtype.

    Raises:
      InputError: shapes or dtypes that do not belong together.
    """
    _validate(q, k, v, past_k, past_v)
    if supports(q, k.shape[1]):
        return hopper.attention(q, k, v, past_k, past_v, layer, filled)
    return by_dense(q, k, v, past_k, past_v, layer, filled, dense)


def by_dense(q, k, v, past_k, past_v, layer, filled, dense) -> jax.Array:
    """`attention` without the kernel."""
    past_k, past_v = _layer_of(past_k, layer), _layer_of(past_v, layer)
    keys = _join(*(unpack_keys(x.dequantize(q.dtype)) for x in (k, past_k)))
    values = _join(*(unpack_values(x.dequantize(q.dtype)) for x in (v, past_v)))
    return dense(q, keys, values, (1 + filled) * k.shape[1])


def _layer_of(x, layer):
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, layer, keepdims=False), x)


def _join(fresh, past):
    """[row, token, ...] and [row, slot, token, ...] -> [row, (1 + slot) * token, ...]."""
    return jnp.concatenate([fresh, past.reshape(len(fresh), -1, *fresh.shape[2:])], axis=1)


def reference(
    q: jax.Array,
    k: FP8Tensor,
    v: FP8Tensor,
    past_k: FP8Tensor,
    past_v: FP8Tensor,
    layer: jax.Array,
    filled: jax.Array,
) -> jax.Array:
    """What the kernel computes, in float32, rounded where it rounds. Arguments as `attention`'s."""
    _validate(q, k, v, past_k, past_v)
    past_k, past_v = _layer_of(past_k, layer), _layer_of(past_v, layer)
    x = q.astype(jnp.float32)
    amax = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), hopper.TINY)
    codes = _rounded(x * (hopper.LARGEST / amax), hopper.E4M3)
    logits_scale = jnp.moveaxis(amax, 1, 2) * (hopper.LOG2_SCALE / hopper.LARGEST)

    def tiled(codes):
        """[row, slot, token, head, d] -> [slot, tile, row, key, head, d], float32."""
        rows, slots, _, heads, d = codes.shape
        codes = codes.astype(jnp.float32).reshape(rows, slots, -1, hopper.TILE, heads, d)
        return jnp.moveaxis(codes, 0, 2)

    def slots(fresh, past):
        return jnp.concatenate([fresh[:, None], past], axis=1)

    def over_tile(carry, tile):
        sums, top, mass, k_scale = carry
        k, v = tile
        logits = jnp.einsum("rqhd,rkhd->rhqk", codes, k, precision="highest")
        logits = logits * (logits_scale * k_scale[:, :, None, None])
        new = jnp.maximum(top, jnp.max(logits, axis=-1, keepdims=True))
        decay, p = jnp.exp2(top - new), jnp.exp2(logits - (new - hopper.GAIN))
        p_codes = _rounded(p, hopper.E4M3)
        out = jnp.einsum("rhqk,rkhd->rhqd", p_codes, v, precision="highest")
        mass = mass * decay + jnp.sum(p, axis=-1, keepdims=True)
        return (sums * decay + out, new, mass, k_scale), None

    def over_slot(carry, slot):
        n, k, v, k_scale, v_scale = slot
        total, top, mass = carry
        start = (jnp.zeros_like(total), top, mass, k_scale)
        (sums, new, new_mass, _), _ = lax.scan(over_tile, start, (k, v))
        decay = jnp.where(n == 0, 0, jnp.exp2(top - new))
        total = _rounded(total, jnp.bfloat16) * decay + sums * v_scale[:, :, None, None]
        real = (n <= filled)[:, None, None, None]
        updated = (total, new, new_mass)
        return jax.tree.map(lambda a, b: jnp.where(real, a, b), updated, carry), None

    def by_slot(fresh, past):
        """Scales [row, slot, head] -> [slot, row, head]."""
        return jnp.moveaxis(slots(fresh, past).reshape(len(q), -1, q.shape[2]), 1, 0)

    keys = tiled(slots(unpack_keys(k.values), unpack_keys(past_k.values)))
    values = tiled(slots(unpack_values(v.values), unpack_values(past_v.values)))
    scales = by_slot(k.scale, past_k.scale), by_slot(v.scale, past_v.scale)
    shape = (len(q), q.shape[2], q.shape[1], 1)
    start = (
        jnp.zeros((*shape[:3], hopper.HEAD_DIM), jnp.float32),
        jnp.full(shape, -jnp.inf, jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )
    (total, _, mass), _ = lax.scan(over_slot, start, (jnp.arange(len(keys)), keys, values, *scales))
    return jnp.moveaxis(total / mass, 1, 2).astype(q.dtype)


def _rounded(x, dtype):
    # On a GPU XLA drops a conversion and its way back: the barrier stands between them.
    return lax.optimization_barrier(x.astype(dtype)).astype(jnp.float32)


def _validate(q, k, v, past_k, past_v):
    rows, _, heads, head_dim = q.shape
    layers, _, slots, tokens = past_k.shape[:4]
    expected = {
        "k": (k.values, (rows, tokens, heads, head_dim)),
        "k's scale": (k.scale, (rows, 1, heads, 1)),
        "v": (v.values, (rows, heads, head_dim, tokens)),
        "v's scale": (v.scale, (rows, heads, 1, 1)),
        "past_k": (past_k.values, (layers, rows, slots, tokens, heads, head_dim)),
        "past_k's scale": (past_k.scale, (layers, rows, slots, 1, heads, 1)),
        "past_v": (past_v.values, (layers, rows, slots, heads, head_dim, tokens)),
        "past_v's scale": (past_v.scale, (layers, rows, slots, heads, 1, 1)),
    }
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise InputError(
                f"attention_fp8: {name} is {array.shape}; with q {q.shape} and {slots} slots of "
                f"{tokens} tokens it must be {shape}"
            )
    for name, x in {"k": k, "v": v, "past_k": past_k, "past_v": past_v}.items():
        if x.values.dtype != hopper.E4M3:
            raise InputError(f"attention_fp8: {name} is {x.values.dtype}; it must be float8_e4m3fn")
