"""Chunk-causal attention without a mask: a few dense attentions, merged by log-sum-exp.

In teacher forcing a video is N chunks, each in a clean and a noisy copy. Clean chunk i sees clean
chunks <= i; noisy chunk i sees clean chunks < i and itself; inside a chunk every token sees every
other. Both copies of chunk i see the same clean past, so that past is one strictly lower triangle
of chunks with both copies as its queries, and the rest is a diagonal:

  diagonal    one dense call, every copy of every chunk a batch entry;
  triangle    cut into rectangles of power-of-two sizes (`schedule`), the equal ones one dense call.

That is N^2 + N chunk pairs and not one more, in O(log N) kernels. Pieces merge in float32:
out = sum_p exp(lse_p - lse) out_p with lse = log sum_p exp(lse_p).

The gradient is ours, since attention libraries drop the gradient of their lse: each piece's dense
backward runs with the lse and out of the whole, and the pieces add. Residuals are q, k, v, out and
lse. The last two bear the names `OUT` and `LSE`, so that a remat policy (`jax.checkpoint_policies.
save_only_these_names`) can keep them and never run the forward twice.

On a mesh, call these inside a fully manual `jax.shard_map`. Heads and batch entries are
independent, but a device must have all tokens of its own.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from longlive_jax.ops import dense_attention

OUT = "attention_out"
LSE = "attention_lse"


def teacher_forcing(
    q: jax.Array, k: jax.Array, v: jax.Array, backend: str | None = None
) -> jax.Array:
    """Clean chunk i attends to clean chunks <= i, noisy chunk i to clean chunks < i and itself.

    Args:
      q, k, v: [batch, chunk, 2, token, head, head_dim], all of one dtype; the axis of size 2 is
        (clean, noisy).
      backend: of `dense_attention.BACKENDS`; None: the fastest one here.

    Returns:
      [batch, chunk, 2, token, head, head_dim] in q's dtype; logits are scaled by
      1 / sqrt(head_dim), statistics are float32.
    """
    if q.ndim != 6 or q.shape[2] != 2 or not q.shape == k.shape == v.shape:
        raise ValueError(
            "teacher_forcing takes q, k, v of one shape [batch, chunk, 2, token, head, head_dim]; "
            f"got {q.shape}, {k.shape}, {v.shape}"
        )
    return _attention(q, k, v, backend)


def block_causal(q: jax.Array, k: jax.Array, v: jax.Array, backend: str | None = None) -> jax.Array:
    """Chunk i attends to chunks <= i: `teacher_forcing` without the noisy copy.

    Args:
      q, k, v: [batch, chunk, token, head, head_dim], all of one dtype.
      backend: as in `teacher_forcing`.

    Returns:
      [batch, chunk, token, head, head_dim] in q's dtype.
    """
    if q.ndim != 5 or not q.shape == k.shape == v.shape:
        raise ValueError(
            "block_causal takes q, k, v of one shape [batch, chunk, token, head, head_dim]; "
            f"got {q.shape}, {k.shape}, {v.shape}"
        )
    return _attention(q[:, :, None], k[:, :, None], v[:, :, None], backend)[:, :, 0]


class Rectangles(NamedTuple):
    """Equal rectangles of the triangle of chunks, done as one batched dense attention.

    From chunk `first` on lie `count` blocks of `keys + queries` chunks; in each, the last `queries`
    chunks attend to the first `keys`.
    """

    first: int
    count: int
    keys: int
    queries: int


def schedule(chunks: int) -> tuple[Rectangles, ...]:
    """Rectangles that cover each pair (query chunk > key chunk) exactly once.

    At size s = 1, 2, 4, .. the video is cut into aligned blocks of 2 s chunks whose later half
    attends to the earlier one; chunk pair (i, j) belongs to the size of the highest bit in which i
    and j differ. A last block cut short by the end of the video has its own, narrower rectangle.
    Six calls for 48 chunks, at most 2 log2(chunks) for any number.
    """
    calls = []
    size = 1
    while size < chunks:
        whole, rest = divmod(chunks, 2 * size)
        if whole:
            calls.append(Rectangles(first=0, count=whole, keys=size, queries=size))
        if rest > size:
            calls.append(Rectangles(chunks - rest, count=1, keys=size, queries=rest - size))
        size *= 2
    return tuple(calls)


# From here on arrays are [batch, chunk, copy, token, head, ...]. Copy 0 is what later chunks see:
# teacher forcing has two copies, plain block causality one. The lse is kept as
# [batch, chunk, copy, token, head], so that one set of functions cuts it like the rest.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(q, k, v, backend):
    return _attention_fwd(q, k, v, backend)[0]


def _attention_fwd(q, k, v, backend):
    out, lse = dense_attention.forward(_diagonal(q), _diagonal(k), _diagonal(v), backend)
    outs, lses = [out.reshape(q.shape)], [_tokens_first(lse).reshape(q.shape[:-1])]
    for part in schedule(q.shape[1]):
        out, lse = dense_attention.forward(
            _queries(q, part), _keys(k, part), _keys(v, part), backend
        )
        outs.append(_place_queries(out, part, q.shape, fill=0))
        lses.append(_place_queries(_tokens_first(lse), part, q.shape[:-1], fill=-jnp.inf))

    # One sum over all pieces rather than one merge after another: XLA fuses the padding in, reads
    # each piece once and writes no float32 array of out's size.
    lse = jax.nn.logsumexp(jnp.stack(lses), axis=0)
    out = _sum(
        jnp.exp(piece_lse - lse)[..., None] * piece.astype(jnp.float32)
        for piece, piece_lse in zip(outs, lses)
    )
    out = checkpoint_name(out.astype(q.dtype), OUT)
    return out, (q, k, v, out, checkpoint_name(lse, LSE))


def _attention_bwd(backend, residuals, dout):
    q, k, v, out, lse = residuals
    diagonal = dense_attention.backward(
        *(_diagonal(x) for x in (q, k, v, out)),
        lse=_tokens_last(_diagonal(lse)),
        dout=_diagonal(dout),
        backend=backend,
    )
    dqs, dks, dvs = ([x.reshape(q.shape)] for x in diagonal)
    for part in schedule(q.shape[1]):
        dq, dk, dv = dense_attention.backward(
            _queries(q, part),
            _keys(k, part),
            _keys(v, part),
            _queries(out, part),
            _tokens_last(_queries(lse, part)),
            _queries(dout, part),
            backend,
        )
        dqs.append(_place_queries(dq, part, q.shape, fill=0))
        dks.append(_place_keys(dk, part, q.shape))
        dvs.append(_place_keys(dv, part, q.shape))
    return tuple(
        _sum(piece.astype(jnp.float32) for piece in pieces).astype(q.dtype)
        for pieces in (dqs, dks, dvs)
    )


_attention.defvjp(_attention_fwd, _attention_bwd)


def _diagonal(x):
    """[batch, chunk, copy, token, ...] -> [batch * chunk * copy, token, ...]."""
    return x.reshape(-1, *x.shape[3:])


def _blocks(x, part):
    """[batch, chunk, ...] -> [batch, block, chunk of the block, ...]."""
    block = part.keys + part.queries
    x = jax.lax.slice_in_dim(x, part.first, part.first + part.count * block, axis=1)
    return x.reshape(x.shape[0], part.count, block, *x.shape[2:])


def _queries(x, part):
    """[batch, chunk, copy, token, ...] -> [batch * block, chunk * copy * token, ...]."""
    x = _blocks(x, part)[:, :, part.keys :]
    return x.reshape(x.shape[0] * part.count, -1, *x.shape[5:])


def _keys(x, part):
    """[batch, chunk, copy, token, ...] -> [batch * block, chunk * token, ...] of copy 0."""
    x = _blocks(x, part)[:, :, : part.keys, 0]
    return x.reshape(x.shape[0] * part.count, -1, *x.shape[4:])


def _place_queries(x, part, shape, fill):
    """The result of `_queries`, back in its place in an array of `shape` filled with `fill`."""
    x = x.reshape(shape[0], part.count, part.queries, *shape[2:])
    x = _pad(x, 2, part.keys, 0, fill)
    return _place_blocks(x, part, shape, fill)


def _place_keys(x, part, shape):
    """The result of `_keys`, back in its place in an array of zeros of `shape`."""
    x = x.reshape(shape[0], part.count, part.keys, 1, *shape[3:])
    x = _pad(_pad(x, 3, 0, shape[2] - 1, 0), 2, 0, part.queries, 0)
    return _place_blocks(x, part, shape, 0)


def _place_blocks(x, part, shape, fill):
    x = x.reshape(shape[0], -1, *shape[2:])
    return _pad(x, 1, part.first, shape[1] - part.first - x.shape[1], fill)


def _pad(x, axis, before, after, fill):
    padding = [(0, 0)] * x.ndim
    padding[axis] = (before, after)
    return jnp.pad(x, padding, constant_values=fill)


def _tokens_first(lse):
    """[batch, head, token] -> [batch, token, head]."""
    return jnp.swapaxes(lse, 1, 2)


_tokens_last = _tokens_first  # its own inverse


def _sum(arrays):
    return functools.reduce(jnp.add, arrays)
