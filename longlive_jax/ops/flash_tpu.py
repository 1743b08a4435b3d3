"""JAX's flash attention for TPUs, which gives and takes softmax statistics, on any sequence length.

Why private functions: the library's public one keeps its log-sum-exp to itself, and a piece of an
attention needs both to give its own and to run the backward with that of the whole. The kernel asks
for lengths that blocks divide: keys are padded and, by segment ids, not seen; padded queries are
zeros with a cotangent of zeros, and cut off. This file alone uses them; it fits jax 0.11.2 to 0.12.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention as flash

from longlive_jax.kernels import chip

_LANES = 128  # a block is a multiple of it
_BLOCK = 1024  # most rows of a block: its float32 logits, 4 MB, lie in a core's memory
_HEAD_DIM = 128  # no more was compiled


def supports(q: jax.Array) -> bool:
    """Whether q [batch, token, head, head_dim] is on a TPU, of a head_dim that the kernel takes."""
    return chip.platform(q) == "tpu" and q.shape[-1] <= _HEAD_DIM


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, kv_len: jax.Array | None = None
) -> jax.Array:
    """`ops.attention.attention`; JAX can differentiate it in q, k and v."""
    tokens, keys = q.shape[1], k.shape[1]
    q, k, v = (_padded(_heads_first(x)) for x in (q, k, v))
    seen = _hidden(q, k, keys) if kv_len is None else _segments(q, k, kv_len)
    sizes = _sizes(q.shape[2], k.shape[2])
    out = flash.flash_attention(
        q, k, v, segment_ids=seen, sm_scale=q.shape[-1] ** -0.5, block_sizes=sizes
    )
    return _heads_first(out[:, :, :tokens])


def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`dense_attention.forward`, of the same shapes."""
    tokens, keys = q.shape[1], k.shape[1]
    q, k, v = (_padded(_heads_first(x)) for x in (q, k, v))
    sizes = _sizes(q.shape[2], k.shape[2])
    seen = _hidden(q, k, keys)
    scale = q.shape[-1] ** -0.5
    out, total, top = flash._flash_attention(q, k, v, None, seen, True, False, scale, sizes, False)
    lse = top + jnp.log(total)
    return _heads_first(out[:, :, :tokens]), lse[:, :, :tokens]


def backward(
    q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array, lse: jax.Array, dout: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`dense_attention.backward`; out and lse may be over more keys than k has."""
    tokens, keys = q.shape[1], k.shape[1]
    delta = jnp.einsum("bthd,bthd->bht", out.astype(jnp.float32), dout.astype(jnp.float32))
    q, k, v, dout = (_padded(_heads_first(x)) for x in (q, k, v, dout))
    lse, delta = (_padded(x) for x in (lse, delta))
    seen = _hidden(q, k, keys)
    size_q, size_k = _block(q.shape[2]), _block(k.shape[2])
    shared: dict[str, Any] = dict(
        block_q_major=size_q, causal=False, sm_scale=q.shape[-1] ** -0.5,
        mask_value=flash.DEFAULT_MASK_VALUE, debug=False,
    )  # fmt: skip
    # exp(s - top) / total with the whole's lse as the top and 1 as the total.
    arguments = (q, k, v, None, seen, jnp.ones_like(lse), lse, dout, delta)
    dk, dv = flash._flash_attention_bwd_dkv(
        *arguments, block_q=size_q, block_k_major=size_k, block_k=size_k, **shared
    )
    # It writes delta as often as a block has keys.
    dq, _ = flash._flash_attention_bwd_dq(
        *arguments, block_k_major=_LANES, block_k=_LANES, **shared
    )
    dq, dk, dv = (_heads_first(x) for x in (dq, dk, dv))
    return dq[:, :tokens], dk[:, :keys], dv[:, :keys]


def _heads_first(x):
    """[batch, token, head, head_dim] -> [batch, head, token, head_dim], and back."""
    return jnp.swapaxes(x, 1, 2)


def _padded(x):
    """[batch, head, token, ...] with zeros up to a multiple of `_LANES` tokens."""
    padding = [(0, 0)] * x.ndim
    padding[2] = (0, -x.shape[2] % _LANES)
    return jnp.pad(x, padding)


def _hidden(q, k, keys):
    """Segments that hide the padding after `keys` keys; None where there is none."""
    return None if k.shape[2] == keys else _segments(q, k, jnp.full(len(q), keys, jnp.int32))


def _segments(q, k, kv_len):
    hidden = jnp.arange(k.shape[2])[None] >= kv_len[:, None]
    return flash.SegmentIds(jnp.zeros((len(q), q.shape[2]), jnp.int32), hidden.astype(jnp.int32))


def _block(length):
    """The largest multiple of `_LANES` up to `_BLOCK` that divides the length."""
    return max(n for n in range(_LANES, _BLOCK + 1, _LANES) if length % n == 0)


def _sizes(queries, keys):
    q, k = _block(queries), _block(keys)
    return flash.BlockSizes(
        block_q=q, block_k_major=k, block_k=k, block_b=1, block_q_major_dkv=q, block_q_dkv=q,
        block_k_major_dkv=k, block_k_dkv=k, block_k_major_dq=_LANES, block_k_dq=_LANES,
        block_q_dq=q,
    )  # fmt: skip
