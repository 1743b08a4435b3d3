"""Queries, keys and values out of the fused projection: norm, rotation and split.

On a Hopper GPU `kernels.norm_rotate` makes them in one pass over memory, where its `supports` says
so: bfloat16, heads of 128, one device's arrays (on a mesh: in a manual `jax.shard_map`). Elsewhere
XLA runs `composed`.
"""

import functools

import jax
import jax.numpy as jnp

from longlive_jax.formats import PendingMatmul
from longlive_jax.kernels import norm_rotate as lib
from longlive_jax.ops import rope
from longlive_jax.ops.norm import rms_norm


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def norm_rotate(
    qkv: jax.Array | PendingMatmul,
    weight_q: jax.Array,
    weight_k: jax.Array,
    angle: jax.Array,
    eps: float = 1e-6,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries and keys by `rms_norm` over all heads, then `rope.rotate`; values as they are.

    With a gradient XLA runs too, since the kernel has none. Angles get no gradient.

    Args:
      qkv: [..., token, 3 * dim]. A PendingMatmul is rounded to its dtype once.
      weight_q, weight_k: [dim], of the norms.
      angle: float32 [..., token, head_dim / 2], same leading axes or 1.
      eps: of the norms.

    Returns:
      q, k, v, each [..., token, head, head_dim].
    """
    if lib.supports(qkv, weight_q, weight_k, angle):
        return lib.kernel(qkv, weight_q, weight_k, jnp.cos(angle), jnp.sin(angle), eps=eps)
    return composed(qkv, weight_q, weight_k, angle, eps)


def composed(
    qkv: jax.Array | PendingMatmul,
    weight_q: jax.Array,
    weight_k: jax.Array,
    angle: jax.Array,
    eps: float = 1e-6,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`norm_rotate` by XLA, with a gradient. Arguments and result: the same."""
    q, k, v = jnp.split(qkv.astype(qkv.dtype), 3, axis=-1)
    q, k = rms_norm(q, weight_q, eps), rms_norm(k, weight_k, eps)
    q, k, v = (x.reshape(*x.shape[:-1], -1, 2 * angle.shape[-1]) for x in (q, k, v))
    return rope.rotate(q, angle), rope.rotate(k, angle), v


def _forward(qkv, weight_q, weight_k, angle, eps):
    angle = jax.lax.stop_gradient(angle)
    return jax.vjp(lambda *x: composed(*x, angle=angle, eps=eps), qkv, weight_q, weight_k)


def _backward(eps, pull, g):
    return *pull(g), None


norm_rotate.defvjp(_forward, _backward)
