"""Operands of quantised products, each quantised along the contracted axis.

A sample's activations and each of the original's matrices have their own largest magnitude; devices
that share a sample use the largest of theirs.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from longlive_jax.formats import Format, Quantized

# Name, for `jax.checkpoint`, of largest magnitudes: a few bytes, without which a tensor that is
# made and quantised again is read once more.
AMAX = "amax"


@functools.singledispatch
def quantize(
    fmt: Format, x: jax.Array, lead: int, axes: Sequence[str] = (), keys: jax.Array | None = None
) -> Quantized:
    """x [.., n], in blocks or rows along the last axis; its `lead` first axes count tensors.

    Args:
      axes: mesh axes, inside a manual `jax.shard_map`, that shard a tensor.
      keys: [.., group], for tensors and for groups within them; taken if the format is stochastic.
    """
    return fmt.quantize(x, lead, agreed(axes), keys)


@functools.singledispatch
def dequantize(q: Quantized, dtype: jnp.dtype) -> jax.Array:
    """`q.dequantize(dtype)`."""
    return q.dequantize(dtype)


def columns_by_xla(
    fmt: Format, y: jax.Array, lead: int, axes: Sequence[str], keys: jax.Array | None = None
) -> Quantized:
    """y [.., sample, group, row, n] -> wgrad's operand [.., sample, n, group * row].

    Groups are filled up with rows of zeros to whole blocks, so that no block spans two.
    """
    y = jnp.pad(y, ((0, 0),) * (y.ndim - 2) + ((0, -y.shape[-2] % fmt.multiple), (0, 0)))
    return quantize(fmt, jnp.swapaxes(y, -1, -2), lead, axes, keys).merged()


columns = functools.singledispatch(columns_by_xla)


def agreed(axes: Sequence[str]) -> Callable[[jax.Array], jax.Array]:
    """`agree` of `Format.quantize`, for tensors sharded over these mesh axes."""
    return lambda amax: checkpoint_name(jax.lax.pmax(amax, tuple(axes)) if axes else amax, AMAX)


def in_memory(x):
    """x in memory, where a GPU's library needs 8-bit operands.

    Left alone, the compiler fuses the quantisation into the product, and then takes long to find a
    kernel.
    """
    return jax.lax.optimization_barrier(x)
