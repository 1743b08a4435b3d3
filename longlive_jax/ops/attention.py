"""Dense attention over a valid prefix of keys: cross-attention and the streaming sampler's.

cuDNN on NVIDIA GPUs, JAX's flash attention on TPUs, XLA elsewhere. Softmax statistics are float32.
"""

import functools

import jax
import jax.numpy as jnp

from longlive_jax.ops import cudnn, flash_tpu

_LOGITS = 2**27  # most logits the XLA path holds at once: 512 MB of float32


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, kv_len: jax.Array | None = None
) -> jax.Array:
    """softmax(q k^T / sqrt(head_dim)) v.

    Args:
      q: [batch, token, head, head_dim].
      k, v: [batch, key, head, head_dim].
      kv_len: int32 [batch], number of valid keys, from the first; None: all. cuDNN skips the rest.

    Returns:
      [batch, token, head, head_dim] in q's dtype.
    """
    if flash_tpu.supports(q):
        return flash_tpu.attention(q, k, v, kv_len)
    # For its gradient JAX refuses cuDNN odd lengths, as it does those with a bias.
    if not cudnn.supports(q) or q.shape[1] % 2 or k.shape[1] % 2:
        return _xla(q, k, v, kv_len)
    if kv_len is None:
        return _cudnn(q, k, v)
    # Lengths cost cuDNN an eighth of its speed, and a stream's window is full from its fourth
    # chunk on.
    full = jnp.all(kv_len == k.shape[1])
    return jax.lax.cond(full, _cudnn, functools.partial(_cudnn, kv_len=kv_len), q, k, v)


def _cudnn(q, k, v, kv_len=None):
    q_len = None if kv_len is None else jnp.full(q.shape[:1], q.shape[1], jnp.int32)
    return jax.nn.dot_product_attention(
        q, k, v, query_seq_lengths=q_len, key_value_seq_lengths=kv_len, implementation="cudnn"
    )


def _xla(q, k, v, kv_len):
    batch, tokens, heads, head_dim = q.shape
    keys = k.shape[1]
    valid = None
    if kv_len is not None:
        valid = jnp.arange(keys)[None, :] < kv_len[:, None]

    def attend(q):
        logits = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
        logits = logits * head_dim**-0.5
        if valid is not None:
            logits = jnp.where(valid[:, None, None, :], logits, -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        return jnp.einsum("bhts,bshd->bthd", weights, v, preferred_element_type=jnp.float32).astype(
            q.dtype
        )

    # Queries in equal pieces, so that a long chunk does not need its whole logit matrix at once.
    pieces = min(tokens, -(-batch * heads * tokens * keys // _LOGITS))
    while tokens % pieces:
        pieces += 1
    if pieces == 1:
        return attend(q)
    split = jnp.moveaxis(q.reshape(batch, pieces, tokens // pieces, heads, head_dim), 1, 0)
    out = jax.lax.map(attend, split)
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)
