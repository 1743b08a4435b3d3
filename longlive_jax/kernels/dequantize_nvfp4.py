"""NVFP4 to bfloat16 in one pass, on Hopper: the bits of `NVFP4Tensor.dequantize`.

XLA expands a code by tens of integer instructions and stores two bytes a thread. Here a thread
expands whole blocks of 16 numbers. A block has but 8 magnitudes: a thread rounds those to bfloat16
and looks all 16 up by their codes, a byte at a time and four codes an instruction (PRMT). A
program's loads come before its stores, none waits for another thread's, and the copy engine stores
what a program made.

A scale becomes a float by its bits alone: below a fixed exponent these make v, and
min(v, 2 v - the number of that exponent) is the scale's, subnormals included. Scale times amax is
exact, as amax is a bfloat16 number, and so are, out of the format's 1536, the numbers of the codes
1.5, 3 and 6. The others' are products with 1 / 3, rounded, and then rounded to bfloat16: that is
the oracle's number, for what is a third of so few bits is either one that bfloat16 rounds at, and
then the product is, too, or not near to one.
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
from longlive_jax.kernels.chip import is_hopper, is_local

ROWS = 128  # blocks that a warpgroup expands at a time, one a thread
STEPS = 4  # times that a program does so, at most

_WORDS = 2  # of 8 codes each: a block's
_PAIRS = 8  # of numbers: a block's
# Of the number that code 1.5 makes, what the codes from 0 to 6 make.
_MAGNITUDES = (0, 1 / 3, 2 / 3, 1, 4 / 3, 2, 8 / 3, 4)
_EXPONENT = 112  # biased; E4M3's bits under it make its number, divided by 256
_NAN = 0x7F  # E4M3's


def supports(q: NVFP4Tensor, dtype: jnp.dtype) -> bool:
    """Whether the kernel expands q [layer, ...], a bfloat16 tensor's, to dtype: on Hopper GPUs."""
    return (
        is_hopper()
        and is_local(q.values)
        and q.dtype == jnp.bfloat16 == dtype
        and q.rule in nvfp4.ADAPTIVE
        and q.block == (1, nvfp4.BLOCK)
        and _divides(q)
    )


def _divides(q):
    """Whether a tensor's blocks are whole steps of a program."""
    tensors = q.amax.size
    return (
        q.amax.ndim > 0
        and tensors > 0
        and q.values.size // tensors % (ROWS * nvfp4.BLOCK) == 0 < q.values.size
    )


@functools.partial(jax.jit, static_argnames="interpret")
def kernel(
    q: NVFP4Tensor,
    layer: jax.Array,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """One layer's numbers, read where they lie.

    Those of `q.dequantize`, but that what is below 2^-124 need not be 0, and that 0 has its code's
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
    tensors = q.amax[0].size
    blocks = q.scales[0].size
    steps = max(n for n in range(1, STEPS + 1) if blocks // tensors // ROWS % n == 0)
    out = plgpu.kernel(
        functools.partial(_body, tensors=tensors, steps=steps, interpret=interpret is not None),
        out_type=jax.ShapeDtypeStruct((blocks, _PAIRS), jnp.uint32),
        grid=(blocks // (ROWS * steps),),
        grid_names=("program",),
        scratch_types={"tile": plgpu.SMEM((steps * ROWS, _PAIRS), jnp.uint32)},
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            # No thread reads what another has stored: around stores nothing need wait.
            unsafe_no_auto_barriers=True,
        ),
        interpret=interpret,
    )(
        _words(q, interpret),
        lax.bitcast_convert_type(q.scales, jnp.uint8).reshape(-1, 1),
        q.amax.reshape(-1),
        jnp.reshape(layer, 1).astype(jnp.int32),
    )
    return lax.bitcast_convert_type(out, jnp.bfloat16).reshape(q.shape[1:])


def _words(q, interpret):
    """q's codes, uint32 [block, 2], the first column lowest: on a GPU the same bytes."""
    if interpret is None:
        eights = q.values.reshape(-1, _WORDS, nvfp4.BLOCK // _WORDS)
        return lax.bitcast_convert_type(eights, jnp.uint32)
    return lax.bitcast_convert_type(q.packed().reshape(-1, _WORDS, 4), jnp.uint32)


def _body(words_ref, scales_ref, amax_ref, layer_ref, out_ref, tile, *, tensors, steps, interpret):
    program, programs = lax.axis_index("program"), lax.axis_size("program")
    layer = layer_ref[0]
    first = (layer * programs + program) * (steps * ROWS)

    def load(ref, row):
        layout = mosaic.a_row_a_thread(ref.shape[1])
        return plgpu.load(ref.at[pl.ds(row, ROWS), :], layout=layout, optimized=False)

    # All of them before a store: the compiler moves no load over one.
    starts = [first + step * ROWS for step in range(steps)]
    loaded = [(load(words_ref, row), load(scales_ref, row)) for row in starts]
    factor = amax_ref[layer * tensors + program // (programs // tensors)] * 0.25
    for step, (words, scales) in enumerate(loaded):
        words = plgpu.layout_cast(words, mosaic.a_row_a_thread(1))
        y = _dequantize(words, scales.astype(jnp.uint32), factor, interpret)
        y = plgpu.layout_cast(y, mosaic.a_row_a_thread(4))
        mosaic.store(tile.at[pl.ds(step * ROWS, ROWS), :], y)
    plgpu.commit_smem()
    rows = pl.ds(program * (steps * ROWS), steps * ROWS)
    plgpu.copy_smem_to_gmem(tile, out_ref.at[rows, :])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _dequantize(words, scales, factor, interpret):
    """uint32 [rows, 2], uint32 [rows, 1], a quarter of amax -> uint32 [rows, 8], bfloat16 pairs."""
    permute = functools.partial(mosaic.permute_bytes, interpret=interpret)
    scale = _scale(scales) * factor
    table = jnp.concatenate([scale * np.float32(x) for x in _MAGNITUDES], axis=1)
    table = plgpu.layout_cast(mosaic.pairs(table, interpret), mosaic.a_row_a_thread(1))
    a, b, c, d = (table[:, i : i + 1] for i in range(4))
    low, high = ((permute(a, b, half), permute(c, d, half)) for half in (0x6420, 0x7531))
    columns = []
    for word in (words[:, :1], words[:, 1:]):
        magnitudes = word & np.uint32(0x77777777)
        lower = word << np.uint32(4)  # each byte's lower code, its sign on top
        for four, signs in ((0, 0x1504), (16, 0x3726)):
            codes = magnitudes >> np.uint32(four)
            sign = permute(word, lower, signs) & np.uint32(0x80808080)
            lows, highs = permute(*low, codes), permute(*high, codes) | sign
            columns += [permute(lows, highs, two) for two in (0x5140, 0x7362)]
    return jnp.concatenate(columns, axis=1)


def _scale(bits):
    """E4M3 by its bits, uint32, not negative -> float32, a 256th of it."""
    v = lax.bitcast_convert_type(bits << 20 | np.uint32(_EXPONENT << 23), jnp.float32)
    return jnp.where(bits == _NAN, jnp.nan, jnp.minimum(v, 2 * v - 2.0 ** (_EXPONENT - 126)))
