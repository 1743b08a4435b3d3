"""NVFP4 to bfloat16 in one pass, on Hopper: the bits of `NVFP4Tensor.dequantize`, or without amax.

`kernel` is for a layer of a cache, `dequantize` for a whole tensor; `expand`, without amax, for an
operand of a product.

XLA expands a code by tens of integer instructions and stores two bytes a thread. Here a thread
expands a block of 16 numbers, and the copy engine stores a program's. Programs are short, and many
share a multiprocessor: they hide each other's latency, above all of loads.

A code and a scale become floats by their bits alone: below a fixed exponent these make v, and
min(v, 2 v - the number of that exponent) is theirs, subnormals included. Code times scale times
amax is exact, as amax is a bfloat16 number. So only the product with 1 / 3, out of the format's
1536, is rounded, and then to bfloat16: that is the oracle's number, for a third of so few
bits is either one that bfloat16 rounds at, and then the product is, too, or not near to one.
Without amax nothing is rounded: code times scale has 6 significant bits.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.errors import InputError
from longlive_jax.formats import NVFP4Tensor, nvfp4
from longlive_jax.kernels import mosaic
from longlive_jax.kernels.blocks import NAN, ROWS, fills
from longlive_jax.kernels.chip import takes

_WORDS = 2  # of 8 codes each: a block's
# Exponents, biased, under which a small float's bits make its number, divided by 4 and by 256.
_E2M1, _E4M3 = 124, 112


def dequantize(q: NVFP4Tensor, dtype: jnp.dtype) -> jax.Array:
    """`q.dequantize(dtype)`, by the kernel where `supports` says so."""
    table = jax.tree.map(lambda leaf: leaf[None], q)  # of one layer
    return kernel(table, jnp.int32(0)) if supports(table, dtype) else q.dequantize(dtype)


def supports(q: NVFP4Tensor, dtype: jnp.dtype) -> bool:
    """Whether the kernel expands q [layer, ...], a bfloat16 tensor's, to dtype: on Hopper GPUs."""
    return (
        takes(q.values)
        and q.dtype == jnp.bfloat16 == dtype
        and q.rule in nvfp4.ADAPTIVE
        and q.block == (1, nvfp4.BLOCK)
        and _divides(q)
    )


def expands(q: NVFP4Tensor) -> bool:
    """Whether `expand` takes q: local, on a Hopper GPU, in whole programs."""
    return takes(q.values) and fills(q.values.size)


def _divides(q):
    """Whether a tensor's blocks are whole programs."""
    return q.amax.ndim > 0 and q.amax.size > 0 and fills(q.values.size, q.amax.size)


@functools.partial(jax.jit, static_argnames="interpret")
def kernel(
    q: NVFP4Tensor,
    layer: jax.Array,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """One layer's numbers, read in place.

    As `q.dequantize`, except that numbers below 2^-124 need not be 0, and that 0 has its code's
    sign, which `quantize_nvfp4` never sets.

    Args:
      q: [layer, ..., n] by an adaptive rule from bfloat16 arrays, each of whose tensors holds a
        multiple of 2048 numbers; amax [layer, ...].
      layer: int32 [].
      interpret: run on the CPU, by JAX's interpreter.

    Returns:
      bfloat16 [..., n].

    Raises:
      InputError: another rule or block, a size that blocks and threads do not divide.
    """
    if q.rule not in nvfp4.ADAPTIVE or q.block != (1, nvfp4.BLOCK) or not _divides(q):
        raise InputError(
            f"dequantize_nvfp4 kernel: {q.shape} by rule {q.rule!r} in blocks {q.block}, amax "
            f"{q.amax.shape}; it takes rules {', '.join(nvfp4.ADAPTIVE)}, blocks (1, 16), and "
            f"tensors of a multiple of {ROWS * nvfp4.BLOCK} numbers; use dequantize"
        )
    body = functools.partial(_a_layer, tensors=q.amax[0].size)
    given = q.amax.reshape(-1), jnp.reshape(layer, 1).astype(jnp.int32)
    return _call("dequantize_nvfp4", body, q, given, q.scales[0].size, interpret).reshape(
        q.shape[1:]
    )


@functools.partial(jax.jit, static_argnames="interpret")
def expand(q: NVFP4Tensor, interpret: plgpu.InterpretGPUParams | None = None) -> jax.Array:
    """Codes times the scales of their blocks, exactly: q as the operand of a bfloat16 product.

    amax and the rule's denominator are left out. A scale that is NaN makes its block NaN. Scales
    must not be negative, as no quantiser's are: a sign is dropped.

    Args:
      q: [..., n] by any rule, in any blocks, a multiple of 2048 numbers on one device (on a mesh:
        in a manual `jax.shard_map`).
      interpret: run on the CPU, by JAX's interpreter.

    Returns:
      bfloat16 [..., n].

    Raises:
      InputError: another size.
    """
    if not fills(q.values.size):
        raise InputError(
            f"dequantize_nvfp4 expand: {q.shape} holds {q.values.size} numbers; it must be a "
            f"multiple of {ROWS * nvfp4.BLOCK}: multiply codes and scales by XLA"
        )
    return _call("expand_nvfp4", _all, q, (), q.scales.size, interpret).reshape(q.shape)


def _call(name, body, q, given, blocks, interpret):
    """bfloat16 [block, 16] by the body of a kernel, which gets codes, scales and `given`.

    blocks: their number.
    """
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((blocks, nvfp4.BLOCK), jnp.bfloat16),
        grid=(blocks // ROWS,),
        grid_names=("program",),
        kernel_name=name,
        scratch_types={"tile": plgpu.SMEM((ROWS, nvfp4.BLOCK), jnp.bfloat16)},
        compiler_params=mosaic.NO_BARRIERS,  # the one that is needed comes before the copy
        interpret=interpret,
    )(_words(q), lax.bitcast_convert_type(q.scales, jnp.uint8).reshape(-1, 1), *given)


def _words(q):
    """q's codes, uint32 [block, 2], the first column lowest: on a GPU the same bytes."""
    return lax.bitcast_convert_type(q.packed().reshape(-1, _WORDS, 4), jnp.uint32)


def _a_layer(words_ref, scales_ref, amax_ref, layer_ref, out_ref, tile, *, tensors):
    program, programs = lax.axis_index("program"), lax.axis_size("program")
    layer = layer_ref[0]
    factor = amax_ref[layer * tensors + program // (programs // tensors)] * 0.25
    first = layer * programs
    _program(words_ref, scales_ref, out_ref, tile, first, factor, np.float32(8 / 3))


def _all(words_ref, scales_ref, out_ref, tile):
    _program(words_ref, scales_ref, out_ref, tile, 0, np.float32(1024), np.float32(1))


def _program(words_ref, scales_ref, out_ref, tile, first, factor, rest):
    """Expands ROWS blocks.

    first: times ROWS, the blocks before the first program's. factor, rest: as of `_dequantize`.
    """
    program = lax.axis_index("program")
    rows = pl.ds((first + program) * ROWS, ROWS)
    words, scales = (
        mosaic.load(ref.at[rows, :], mosaic.a_row_a_thread(ref.shape[1]))
        for ref in (words_ref, scales_ref)
    )
    words = plgpu.layout_cast(words, mosaic.a_row_a_thread(1))
    y = _dequantize(words, scales.astype(jnp.uint32), factor, rest)
    # In registers of 8 numbers, of which pairs are rounded together.
    mosaic.store(tile, plgpu.layout_cast(y, mosaic.a_row_a_thread(8)).astype(jnp.bfloat16))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile, out_ref.at[pl.ds(program * ROWS, ROWS), :])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _dequantize(words, scales, factor, rest):
    """uint32 [rows, 2], uint32 [rows, 1] -> float32 [rows, 16]: code times scale / 1024.

    That times factor, by way of the scale, and then times rest.
    """
    scale = jnp.where(scales == NAN, jnp.nan, _small_float(scales << 20, _E4M3)) * factor
    columns = []
    for word in (words[:, :1], words[:, 1:]):
        for i in range(8):
            code = word << np.uint32(28 - 4 * i)  # sign first
            magnitude = _small_float(code >> 6 & np.uint32(7 << 22), _E2M1) * scale
            y = lax.bitcast_convert_type(magnitude * rest, jnp.uint32)
            columns.append(y | code & np.uint32(1 << 31))
    return lax.bitcast_convert_type(jnp.concatenate(columns, axis=1), jnp.float32)


def _small_float(bits, exponent):
    """The number of a small float, times a power of two, by its bits at the top of a mantissa.

    exponent: biased; its low bits, on which the small float's exponent lies, are 0.
    """
    v = lax.bitcast_convert_type(bits | np.uint32(exponent << 23), jnp.float32)
    return jnp.minimum(v, 2 * v - 2.0 ** (exponent - 126))
