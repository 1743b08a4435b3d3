"""Operands of quantised products, as tensors of their own, along the axis that is contracted.

A sample's activations and each of the original's matrices have their own largest magnitude; over
the devices that hold the rest of a sample it is a maximum.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from longlive_jax.errors import InputError
from longlive_jax.formats import (
    FP8Tensor,
    NVFP4Tensor,
    Quantized,
    exact,
    from_packed,
    nvfp4,
    quantize_fp8,
    random_hadamard,
)
from longlive_jax.kernels import quantize_nvfp4_columns, threefry
from longlive_jax.kernels.quantize_nvfp4 import quantize_each
from longlive_jax.ops.quantized import quantize_rows
from longlive_jax.quant.recipe import FP8, NVFP4, Format

# Name, for `jax.checkpoint`, of largest magnitudes: a few bytes, without which a tensor that is
# made and quantised again is read once more.
AMAX = "amax"


def quantize(x, fmt: Format, lead: int, axes=(), keys=None) -> Quantized:
    """x [.., n], in blocks or rows along the last axis; its `lead` first axes count tensors.

    keys: [.., group], for tensors and for groups within them; taken if the format is stochastic.
    """
    if isinstance(fmt, FP8):
        return in_memory(_quantize_fp8(x, fmt, lead, axes))
    if fmt.hadamard:
        x = random_hadamard(x)
    amax = _amax(x, tuple(range(lead, x.ndim)), axes)
    tensors = x.reshape(-1, *x.shape[lead:])
    keys = _by_tensor(keys, fmt, lead)
    values, scales = quantize_each(tensors, amax.reshape(-1), fmt.rule, fmt.block, keys)
    return NVFP4Tensor(
        values=values.reshape(x.shape),
        scales=scales.reshape(*x.shape[:-1], -1),
        amax=amax,
        rule=fmt.rule,
        block=fmt.block,
        dtype=x.dtype,
    )


def _by_tensor(keys, fmt, lead):
    """Keys [tensor, group] of [.., group]; None of none, and where nothing is drawn."""
    if keys is None or not fmt.stochastic:
        return None
    return keys.reshape(-1, *keys.shape[lead:])


def in_memory(q):
    """A GPU's library takes 8-bit operands that lie in memory.

    Left alone, the compiler draws the quantisation into the product, and then searches for a kernel
    for long.
    """
    return jax.lax.optimization_barrier(q)


def _quantize_fp8(x, fmt, lead, axes):
    if fmt.rows:
        return quantize_rows(x)
    amax = _with_power_of_two_scale(_amax(x, tuple(range(lead, x.ndim)), axes), fmt.dtype)
    one = functools.partial(quantize_fp8, dtype=jnp.dtype(fmt.dtype))
    for _ in range(lead):
        one = jax.vmap(one)
    return one(x, amax=amax)


def _with_power_of_two_scale(amax, dtype):
    """amax, or the next number above it whose FP8 scale is a power of two.

    A product of two such scales is exact in bfloat16, which `matmul.scaled` multiplies in. At most
    one binade of the format is given away; in all others a float has the same relative precision.
    """
    largest = float(jnp.finfo(dtype).max)
    mantissa = jnp.uint32((1 << 23) - 1)
    bits = jax.lax.bitcast_convert_type(exact.divide_by(amax, largest), jnp.uint32)
    scale = jax.lax.bitcast_convert_type(bits + mantissa & ~mantissa, jnp.float32)
    enlarged = scale * largest  # exact
    return jnp.where(jnp.isfinite(amax) & jnp.isfinite(enlarged), enlarged, amax)


def _amax(x, over, axes):
    return _over(exact.largest_magnitude(x, over), axes)


def _over(amax, axes):
    return checkpoint_name(jax.lax.pmax(amax, tuple(axes)) if axes else amax, AMAX)


def columns(y, fmt, lead, axes, keys=None):
    """y [.., sample, group, row, n] -> wgrad's operand [.., sample, n, group * row].

    Groups are filled up with rows of zeros to whole blocks, so that no block spans two. The kernel
    reads y as it lies, where it runs; elsewhere XLA transposes first.
    """
    if isinstance(fmt, NVFP4) and quantize_nvfp4_columns.supports(y, fmt.rule, fmt.block):
        return _columns_by_kernel(y, fmt, lead, axes, keys)
    y = jnp.pad(y, ((0, 0),) * (y.ndim - 2) + ((0, -y.shape[-2] % nvfp4.BLOCK), (0, 0)))
    return merge(quantize(jnp.swapaxes(y, -1, -2), fmt, lead, axes, keys))


def _columns_by_kernel(y, fmt, lead, axes, keys):
    """`columns` of groups that its tiles divide: in memory they lie one after the other."""
    lib = quantize_nvfp4_columns
    *_, group, row, n = y.shape
    tensors = y.reshape(-1, group * row, n)
    if fmt.hadamard:
        amax = jnp.stack([lib.largest_magnitude(x) for x in tensors]).reshape(y.shape[:lead])
        amax = _over(amax, axes)
    else:
        amax = _amax(y, tuple(range(lead, y.ndim)), axes)
    seeds = threefry.seeds_of_each(_by_tensor(keys, fmt, lead), len(tensors))
    each = zip(tensors, amax.reshape(-1), seeds)  # the kernel is for one
    each = [lib.kernel(x, a, fmt.rule, fmt.hadamard, s) for x, a, s in each]
    codes, scales = (jnp.stack(part).reshape(*y.shape[:lead], n, -1) for part in zip(*each))
    return from_packed(codes, scales, amax, fmt.rule, fmt.block, y.dtype)


def swap(q: FP8Tensor) -> FP8Tensor:
    """The last two axes exchanged, of tensors that have one scale each."""
    return q.replace(values=jnp.swapaxes(q.values, -1, -2))


def merge(q: Quantized) -> Quantized:
    """[.., sample, group, n, row] -> [.., sample, n, group * row]."""

    def one(leaf):
        leaf = jnp.moveaxis(leaf, -3, -2)
        return leaf.reshape(*leaf.shape[:-2], -1)

    if isinstance(q, NVFP4Tensor):
        return q.replace(values=one(q.values), scales=one(q.scales))
    return q.replace(values=one(q.values))


def transpose(q: Quantized) -> Quantized:
    """A weight [part, out, in] as dgrad's operand [part, in, out]: the same numbers.

    Raises:
      InputError: its scales are of single rows.
    """
    if isinstance(q, FP8Tensor):
        if q.scale.ndim < q.ndim:
            return swap(q)
    elif q.block == (nvfp4.BLOCK, nvfp4.BLOCK):
        blocks = jnp.swapaxes(q.scales[..., :: nvfp4.BLOCK, :], -1, -2)
        scales = jnp.repeat(blocks, nvfp4.BLOCK, axis=-2)
        return q.replace(values=jnp.swapaxes(q.values, -1, -2), scales=scales)
    raise InputError(
        "quant: a weight quantised by rows has no gradient of its input; quantise it by a recipe "
        "for training, whose blocks are square"
    )
