"""One dense, unmasked attention as a pair of plain functions: what `teacher_forcing` is built of.

    s = q k^T / sqrt(head_dim),   lse = log sum_keys exp(s),   out = exp(s - lse) v

`forward` gives out and lse. `backward` takes them back, and they may belong to a softmax over more
keys than this call has: p = exp(s - lse) and D = sum(dout * out) are all that a piece needs of the
whole (FlashAttention-2, arXiv 2307.08691, section 3.1.2), so the gradients of the pieces add up.
JAX must not differentiate either function: the caller needs a custom_vjp.

Backends: "cudnn" on NVIDIA GPUs in half precision, "flash_tpu" on TPUs, "xla" anywhere.
"""

import jax
import jax.numpy as jnp

from longlive_jax.ops import cudnn, flash_tpu

BACKENDS = ("xla", "cudnn", "flash_tpu")
_LOGITS = 2**27  # most logits the XLA backend holds in one matrix: 512 MB of float32


def choose_backend(q: jax.Array) -> str:
    """The fastest backend for queries of this dtype and head_dim, on their devices."""
    if cudnn.supports(q):
        return "cudnn"
    return "flash_tpu" if flash_tpu.supports(q) else "xla"


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, backend: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Attention of every query to every key.

    Args:
      q: [batch, token, head, head_dim], float32, bfloat16 or float16.
      k, v: [batch, key, head, head_dim], of q's dtype.
      backend: one of `BACKENDS`; None: `choose_backend`.

    Returns:
      out [batch, token, head, head_dim] in q's dtype, and lse float32 [batch, head, token].
    """
    return _module(q, backend)[0](q, k, v)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The part of the gradients of q, k and v that flows through these keys.

    Args:
      q, k, v, backend: as in `forward`.
      out, lse: output and log-sum-exp of the whole softmax, which k may be only a part of; shapes
        and dtypes as `forward` returns them.
      dout: cotangent of out, of its shape and dtype.

    Returns:
      dq, dk, dv: of the shapes and dtype of q, k and v.
    """
    return _module(q, backend)[1](q, k, v, out, lse, dout)


def _module(q, backend):
    backend = backend or choose_backend(q)
    if backend == "cudnn":
        return cudnn.forward, cudnn.backward
    if backend == "flash_tpu":
        return flash_tpu.forward, flash_tpu.backward
    if backend == "xla":
        return _xla_forward, _xla_backward
    raise ValueError(f"attention backend {backend!r}; choose one of {', '.join(BACKENDS)}")


def _xla_forward(q, k, v):
    def attend(q):
        logits = _logits(q, k)
        lse = jax.nn.logsumexp(logits, axis=-1)
        weights = jnp.exp(logits - lse[..., None])
        return _einsum("bhts,bshd->bthd", weights.astype(v.dtype), v).astype(q.dtype), lse

    pieces, split, join = _query_pieces(q, k)
    if pieces == 1:
        return attend(q)
    out, lse = jax.lax.map(attend, split(q, axis=1))
    return join(out, axis=1), join(lse, axis=2)


def _xla_backward(q, k, v, out, lse, dout):
    scale = q.shape[-1] ** -0.5

    def gradients(q, out, lse, dout):
        weights = jnp.exp(_logits(q, k) - lse[..., None])
        delta = jnp.einsum(
            "bthd,bthd->bht", dout.astype(jnp.float32), out.astype(jnp.float32)
        )  # D: the gradient through the softmax's denominator, over all keys
        dweights = _einsum("bthd,bshd->bhts", dout, v)
        dlogits = (weights * (dweights - delta[..., None]) * scale).astype(q.dtype)
        dq = _einsum("bhts,bshd->bthd", dlogits, k).astype(q.dtype)
        dk = _einsum("bhts,bthd->bshd", dlogits, q)
        dv = _einsum("bhts,bthd->bshd", weights.astype(q.dtype), dout)
        return dq, dk, dv

    def add(carry, piece):
        dq, dk, dv = gradients(*piece)
        return (carry[0] + dk, carry[1] + dv), dq

    pieces, split, join = _query_pieces(q, k)
    if pieces == 1:
        dq, dk, dv = gradients(q, out, lse, dout)
    else:
        # Padded rows have dout = 0, so they add nothing to dk and dv.
        split_all = (split(q, 1), split(out, 1), split(lse, 2), split(dout, 1))
        zeros = (jnp.zeros_like(k, jnp.float32), jnp.zeros_like(v, jnp.float32))
        (dk, dv), dq = jax.lax.scan(add, zeros, split_all)
        dq = join(dq, axis=1)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)


def _logits(q, k):
    return _einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5


def _einsum(formula, x, y):
    return jnp.einsum(formula, x, y, preferred_element_type=jnp.float32)


def _query_pieces(q, k):
    """The number of query pieces that keeps logit matrices under `_LOGITS`, `split` and `join`.

    `split(x, axis)` gives [piece, ..., token of the piece, ...], the last piece padded with zeros;
    `join` undoes it.
    """
    batch, tokens, heads, _ = q.shape
    pieces = min(tokens, -(-batch * heads * tokens * k.shape[1] // _LOGITS))
    size = -(-tokens // pieces)
    pieces = -(-tokens // size)

    def split(x, axis):
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, pieces * size - tokens)
        x = jnp.pad(x, padding)
        x = x.reshape(*x.shape[:axis], pieces, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    def join(x, axis):
        x = jnp.moveaxis(x, 0, axis)
        x = x.reshape(*x.shape[:axis], pieces * size, *x.shape[axis + 2 :])
        return jax.lax.slice_in_dim(x, 0, tokens, axis=axis)

    return pieces, split, join
