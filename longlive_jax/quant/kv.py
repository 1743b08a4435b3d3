"""How the KV cache stores keys and values, as they are, in FP8 or in NVFP4; what devices exchange.

A chunk's are quantised once, when the clean pass writes them, and stored as attention takes them:
keys rotated, neither smoothed nor transformed. (The original subtracts from the keys of the chunk
being denoised, and from no others, their mean over head_dim, which changes what is attended to.)

  nvfp4  blocks of 16 along head_dim by the rule "mse", and one largest magnitude a video and chunk,
         over tokens and heads, as in the original. 0.28 of bfloat16's bytes.
  fp8    E4M3, one scale a video, chunk and head: a float has the same relative precision at any
         size, so that finer scales would gain nothing. 0.50 of bfloat16's bytes.
"""

import jax
import jax.numpy as jnp

from longlive_jax.formats import (
    NVFP4Tensor,
    Quantized,
    exact,
    from_packed,
    nvfp4,
)
from longlive_jax.kernels import dequantize_nvfp4, pack_fp8
from longlive_jax.kernels.quantize_nvfp4 import quantize_each

Stored = jax.Array | Quantized


def store_pair(k: Stored, v: Stored, name: str, axis: str | None = None) -> tuple[Stored, Stored]:
    """k and v [row, token, head, head_dim] as the cache keeps them. Every leaf begins with `row`.

    Args:
      name: one of `config.KV_FORMATS`; "fp8": packed, as `kernels.attention_fp8` takes them.
      axis: as `store`'s.
    """
    if name == "fp8":
        return pack_fp8.pack(*(load(x, x.dtype) for x in (k, v)))
    return store(k, name, axis), store(v, name, axis)


def store(x: Stored, name: str, axis: str | None = None) -> Stored:
    """x [row, token, head, head_dim] as devices exchange it. Every leaf begins with `row`.

    Args:
      name: one of `config.PAYLOADS`; "bf16": x itself, whatever its dtype.
      axis: mesh axis, inside a manual `jax.shard_map`, over which heads (or tokens, with "nvfp4")
        are spread; None: none is.
    """
    if isinstance(x, NVFP4Tensor):  # as it came from another device
        if name == "nvfp4":
            return x
        x = load(x, x.dtype)
    if name == "nvfp4":
        amax = exact.largest_magnitude(x, (1, 2, 3))
        # So that codes do not depend on the mesh.
        amax = amax if axis is None else jax.lax.pmax(amax, axis)
        values, scales = quantize_each(x, amax, "mse")
        return NVFP4Tensor(values, scales, amax, "mse", (1, nvfp4.BLOCK), x.dtype)
    return x


def load(stored: Stored, dtype: jnp.dtype) -> jax.Array:
    """The numbers [..., token, head, head_dim] that were stored, rounded to `dtype`."""
    if isinstance(stored, NVFP4Tensor):
        return dequantize_nvfp4.dequantize(stored, dtype)
    if isinstance(stored, Quantized):
        return stored.dequantize(dtype)
    return stored.astype(dtype)


def load_layer(table: Stored, layer: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`load` of one layer of a table [layer, ..., token, head, head_dim]: [1, ..., head_dim]."""
    if isinstance(table, NVFP4Tensor) and dequantize_nvfp4.supports(table, dtype):
        return dequantize_nvfp4.kernel(table, layer)[None]
    one = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, layer, 1), table)
    return load(one, dtype)


def exchange(send, stored: Stored) -> Stored:
    """`send`, an all-to-all that leaves head_dim alone, of what `store` made of tokens or heads."""
    if not isinstance(stored, NVFP4Tensor):
        return send(stored)
    # One message, and of bytes: not every backend sends floats of 4 or 8 bits.
    codes, scales = stored.packed(), jax.lax.bitcast_convert_type(stored.scales, jnp.uint8)
    sent = send(jnp.concatenate([codes, scales], axis=-1))
    codes, scales = jnp.split(sent, [codes.shape[-1]], axis=-1)
    return from_packed(codes, scales, stored.amax, stored.rule, dtype=stored.dtype)
