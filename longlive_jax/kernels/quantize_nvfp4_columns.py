"""Columns of a bfloat16 array to NVFP4, with or without the Hadamard transform, on Hopper.

The operands of a weight's gradient lie in memory as [token, n] and are multiplied along tokens. XLA
transposes them, transforms them and then quantises; here one kernel reads them as they lie and
writes codes and scales of the transposed array, the bits of

  formats.quantize_nvfp4(x.T, rule, hadamard=hadamard, key=key, amax=amax).

A program is one warpgroup and takes a tile through shared memory; several programs share a
multiprocessor and hide each other's latency. A thread owns a channel: of a token, neighbouring
threads read neighbouring numbers. It transforms and quantises one block of 16 tokens after another,
as `quantize_nvfp4` does.

The largest magnitude of the transform takes a read of its own, and the transform is then computed
again: to keep it would take a write, and the same read.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.errors import InputError
from longlive_jax.formats import hadamard, nvfp4
from longlive_jax.kernels import blocks, mosaic, threefry
from longlive_jax.kernels.chip import takes

CHANNELS = 128  # of a tile: one a thread
TILES = (64, 128)  # tokens of a tile. The first is used, and must divide the tokens of a group.

_BITS = 0x7FFFFFFF  # of a float32's magnitude


def supports(x: jax.Array, rule: str = "mse", block: tuple[int, int] = (1, nvfp4.BLOCK)) -> bool:
    """Whether the kernels take the columns of x [.., token, n]: bfloat16, local, on a Hopper GPU.

    Tokens must be a multiple of `TILES[0]`, n of 128, and a block one column's.
    """
    return (
        takes(x)
        and x.dtype == jnp.bfloat16
        and rule in nvfp4.RULES
        and tuple(block) == (1, nvfp4.BLOCK)
        and _divides(x.shape, TILES[0])
    )


def _divides(shape, tile):
    return len(shape) > 1 and 0 not in shape and shape[-2] % tile == 0 == shape[-1] % CHANNELS


@functools.partial(jax.jit, static_argnames=("rule", "transform", "tile", "interpret"))
def kernel(
    x: jax.Array,
    amax: jax.Array,
    rule: str,
    transform: bool = False,
    seeds: jax.Array | None = None,
    tile: int = TILES[0],
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The kernel itself, on one device's array (on a mesh: in a manual `jax.shard_map`).

    Args:
      x: [token, n], bfloat16, tokens a multiple of `tile`, n of 128.
      amax: float32 [], the largest magnitude to be quantised, see `largest_magnitude`, or of
        the whole of which it is a part.
      rule: a key of `nvfp4.RULES`.
      transform: quantise `formats.random_hadamard` of the columns.
      seeds: uint32 [group, 2], `threefry.seeds`, to round equal groups of tokens stochastically,
        each as a [n, token] of its own, tokens a multiple of `tile`; None: round to nearest.
      tile: one of `TILES`.
      interpret: run on the CPU, by JAX's interpreter.

    Returns:
      codes uint8 [n, token / 2] as in `NVFP4Tensor.packed`, scales float8_e4m3fn [n, token / 16].

    Raises:
      InputError: another dtype, a shape that tiles do not divide, an unknown rule, seeds of another
        dtype or shape.
    """
    groups = blocks.validate(x, rule, seeds)
    _validate(x, tile, groups)
    (tokens, n), of_tile = x.shape, tile // nvfp4.BLOCK
    tiles = tokens // (tile * groups)
    codes, scales = plgpu.kernel(
        functools.partial(_kernel, rule=rule, transform=transform, tiles=tiles),
        out_type=(
            jax.ShapeDtypeStruct((n, tokens // 2), jnp.uint8),
            jax.ShapeDtypeStruct((n, tokens // nvfp4.BLOCK), jnp.uint8),
        ),
        grid=(tokens // tile, n // CHANNELS),  # neighbours in memory together
        grid_names=("tile", "channels"),
        kernel_name="quantize_nvfp4_columns" + ("" if seeds is None else "_stochastic"),
        scratch_types={
            "tile": plgpu.SMEM((tile, CHANNELS), x.dtype),
            # A block's after the other's: in either threads write to neighbouring places.
            "codes": plgpu.SMEM((of_tile, CHANNELS, nvfp4.BLOCK // 2), jnp.uint8),
            "scales": plgpu.SMEM((of_tile, CHANNELS, 1), jnp.uint8),
            "here": plgpu.Barrier(),
        },
        compiler_params=mosaic.NO_BARRIERS,
        interpret=interpret,
    )(*blocks.constants_and(seeds, amax, rule, interpret), x)
    return codes, lax.bitcast_convert_type(scales, jnp.float8_e4m3fn)


@functools.partial(jax.jit, static_argnames=("tile", "interpret"))
def largest_magnitude(
    x: jax.Array, tile: int = TILES[0], interpret: plgpu.InterpretGPUParams | None = None
) -> jax.Array:
    """float32 []: the largest magnitude of `formats.random_hadamard` of x's columns; NaN of one.

    Args and raises: as `kernel`.
    """
    if x.dtype != jnp.bfloat16:
        raise InputError(f"nvfp4 columns: input is {x.dtype}; it must be bfloat16: cast it")
    _validate(x, tile)
    tokens, n = x.shape
    bits = plgpu.kernel(
        _largest_body,
        out_type=jax.ShapeDtypeStruct((tokens // tile, n, 1), jnp.uint32),
        grid=(tokens // tile, n // CHANNELS),
        grid_names=("tile", "channels"),
        kernel_name="quantize_nvfp4_columns_largest",
        scratch_types={
            "tile": plgpu.SMEM((tile, CHANNELS), x.dtype),
            "largest": plgpu.SMEM((CHANNELS, 1), jnp.uint32),
            "here": plgpu.Barrier(),
        },
        compiler_params=mosaic.NO_BARRIERS,
        interpret=interpret,
    )(x)
    # Rounded last: rounding keeps the order, so this is the largest of the rounded numbers.
    largest = lax.bitcast_convert_type(jnp.max(bits), jnp.float32)
    info = jnp.finfo(x.dtype)
    return lax.reduce_precision(largest, info.nexp, info.nmant)


def _validate(x, tile, groups=1):
    if x.ndim != 2 or not _divides(x.shape, tile * groups):
        raise InputError(
            f"nvfp4 columns: shape {x.shape} must be [token, n], tokens a multiple of {tile} in "
            f"each of {groups} groups, n of {CHANNELS}; use formats.quantize_nvfp4 of the "
            "transposed array"
        )


def _kernel(constants_ref, *refs, tile, codes, scales, here, rule, transform, tiles):
    *seeds_ref, x, codes_ref, scales_ref = refs
    _fetch(x, tile, here)
    of_tile = len(codes)

    def step(i, _):
        y = _block(tile, i)
        if transform:
            y = _transform(y).astype(jnp.bfloat16).astype(jnp.float32)
        noise = _noise(seeds_ref[0], tiles, of_tile, i) if seeds_ref else None
        block_codes, block_scales = blocks.quantize_blocks(
            y, noise, constants_ref=constants_ref, rule=rule
        )
        mosaic.store(codes.at[i], block_codes)
        mosaic.store(scales.at[i], block_scales)

    lax.fori_loop(0, of_tile, step, None)
    _, channels = _place(tile)
    for whole, of_blocks in ((codes_ref, codes), (scales_ref, scales)):
        _write(whole, of_blocks, channels)


def _noise(seeds_ref, tiles, of_tile, i):
    """For the tile's block i in each channel; a group has `tiles` tiles, of `of_tile` blocks."""
    group = lax.div(lax.axis_index("tile"), jnp.int32(tiles))
    within = (lax.axis_index("tile") - group * tiles) * of_tile + i
    channel = blocks.thread() + (lax.axis_index("channels") * CHANNELS).astype(jnp.uint32)
    block = channel * np.uint32(tiles * of_tile) + within.astype(jnp.uint32)
    return threefry.random_bits(seeds_ref, group, block)


def _write(ref, of_blocks, channels):
    """A thread's bytes [block, thread, byte], which it has stored itself, to its row of `ref`."""
    count, _, size = of_blocks.shape
    layout = mosaic.a_row_a_thread(size)
    parts = [mosaic.load(of_blocks.at[i], layout) for i in range(count)]
    row = jnp.concatenate(parts, axis=1)
    row = plgpu.layout_cast(row, mosaic.a_row_a_thread(min(count * size, 16)))
    here = pl.ds(lax.axis_index("tile") * count * size, count * size)
    mosaic.store(ref.at[channels, here], row)


def _largest_body(x, out, *, tile, largest, here):
    _fetch(x, tile, here)
    layout = mosaic.a_row_a_thread(1)
    mosaic.store(largest, plgpu.layout_cast(jnp.zeros(largest.shape, jnp.uint32), layout))

    def step(i, _):
        y = _transform(_block(tile, i))
        bits = lax.bitcast_convert_type(y, jnp.uint32) & np.uint32(_BITS)
        so_far = mosaic.load(largest, layout)
        mosaic.store(largest, jnp.maximum(so_far, blocks.fold(jnp.maximum, bits)))

    lax.fori_loop(0, tile.shape[0] // nvfp4.BLOCK, step, None)
    _, channels = _place(tile)
    result = mosaic.load(largest, layout)
    mosaic.store(out.at[lax.axis_index("tile"), channels], result)


def _place(tile):
    """Where in the array a program's tile lies: its tokens and its channels."""
    places = zip(("tile", "channels"), tile.shape)
    return tuple(pl.ds(lax.axis_index(name) * size, size) for name, size in places)


def _fetch(x, tile, here):
    plgpu.copy_gmem_to_smem(x.at[_place(tile)], tile, here)
    plgpu.barrier_wait(here)


def _block(tile, i):
    """16 tokens of a channel a thread: float32 [channels, 16]."""
    columns = tile.at[pl.ds(i * nvfp4.BLOCK, nvfp4.BLOCK), :].transpose((1, 0))
    x = mosaic.load(columns, mosaic.a_row_a_thread(1))
    return x.astype(jnp.float32)


def _transform(x):
    """`random_hadamard` of float32 [channels, 16] before its rounding, by sums in that order.

    Of the first 2^k terms there are 2^k different sums, which the other columns repeat.
    """
    signs = np.sign(hadamard.matrix())
    x = [column * (1 / 4) for column in blocks.columns(x)]
    sums = x[:1]  # all signs of the first are positive
    for i in range(1, hadamard.POINTS):
        width = 1 << i.bit_length()
        sums = sums * (width // len(sums))
        sums = [y + x[i] if sign > 0 else y - x[i] for y, sign in zip(sums, signs[i])]
    return jnp.concatenate(sums, axis=1)
