"""A chunk's fresh keys and values to FP8, packed for attention, on Hopper: two reads and a write.

XLA takes several passes: largest magnitudes, codes, the keys' permutation, the values'
transposition. Here one kernel reads keys and values for the largest magnitudes of the heads, and
one each, of keys and of values, reads them again and writes the codes where attention wants them.

A program is one warpgroup and takes one head's tile of 128 tokens through shared memory. Several
programs share a multiprocessor and hide each other's latency.

  keys    The order of tokens is a matter of addresses alone. Of 16 tokens as [4, 2, 2] the copy
          engine fetches [4, 2] for either half of the middle axis, and stores one half after
          the other.
  values  A thread owns a channel. Of a token, neighbouring threads read neighbouring numbers; a
          thread's codes of 16 tokens are one word of 16 bytes, which it stores.

The bits equal those of `formats.quantize_fp8`, which also computes scales from the magnitudes.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.errors import InputError
from longlive_jax.formats import FP8Tensor, exact, quantize_fp8
from longlive_jax.kernels import attention_fp8, mosaic
from longlive_jax.kernels.chip import takes

TILE = 128  # tokens
HEAD_DIM = 128

_SPLIT = (4, 2, 2)  # of keys that are permuted among themselves; stored in the order [2, 4, 2]
_GROUP = math.prod(_SPLIT)
_GROUPS = TILE // _GROUP
_WORD = 16  # bytes that a thread stores at once
# Of one column's words, those of 8 rows lie in different banks.
_SPREAD = mosaic.rows_of_128_bytes(jnp.float8_e4m3fn)
_LINES = 8  # tokens that a warpgroup measures together: 16 bytes a thread
_E4M3 = jnp.dtype(jnp.float8_e4m3fn)
_GRID = ("row", "tile", "head")


def pack(k: jax.Array, v: jax.Array) -> tuple[FP8Tensor, FP8Tensor]:
    """Keys and values [row, token, head, head_dim] as FP8 attention takes them.

    By the kernel where `supports` says so, else by `attention_fp8.pack` of `quantize_heads`: the
    same bits.

    Args:
      k, v: of one shape and dtype, bfloat16 or float32; tokens a multiple of 16.

    Returns:
      k: values float8_e4m3fn [row, token, head, head_dim], the tokens of every 16 permuted
        (`attention_fp8.pack_keys`), scale float32 [row, 1, head, 1].
      v: values float8_e4m3fn [row, head, head_dim, token], scale float32 [row, head, 1, 1].

    Raises:
      InputError: other shapes or dtypes.
    """
    if k.shape != v.shape or k.dtype != v.dtype or k.ndim != 4:
        raise InputError(
            f"pack_fp8: k is {k.dtype} {k.shape}, v {v.dtype} {v.shape}; both must be "
            "[row, token, head, head_dim] of one shape and dtype"
        )
    if not supports(k):
        return attention_fp8.pack(quantize_heads(k), quantize_heads(v))
    return kernel(k, v)


def quantize_heads(x: jax.Array) -> FP8Tensor:
    """[row, token, head, head_dim] in E4M3 with one scale a row and head.

    Returns:
      values of x's shape, scale float32 [row, 1, head, 1].

    Raises:
      InputError: what `formats.quantize_fp8` refuses.
    """
    rows, tokens, heads, head_dim = x.shape
    by_head = jnp.swapaxes(x, 1, 2).reshape(rows, heads, -1)
    q = quantize_fp8(by_head, axis=-1)
    values = jnp.swapaxes(q.values.reshape(rows, heads, tokens, head_dim), 1, 2)
    return dataclasses.replace(q, values=values, scale=q.scale.reshape(rows, 1, heads, 1))


def supports(x: jax.Array) -> bool:
    """Whether the kernel takes such keys and values: bfloat16, local, on a Hopper GPU, in tiles."""
    return takes(x) and x.dtype == jnp.bfloat16 and _divides(x.shape)


def _divides(shape):
    return len(shape) == 4 and 0 not in shape and shape[1] % TILE == 0 and shape[3] == HEAD_DIM


def kernel(
    k: jax.Array, v: jax.Array, interpret: plgpu.InterpretGPUParams | None = None
) -> tuple[FP8Tensor, FP8Tensor]:
    """The kernels themselves, on one device's arrays (on a mesh: in a manual `jax.shard_map`).

    Args:
      k, v: bfloat16 [row, token, head, 128], tokens a multiple of 128.
      interpret: run on the CPU, by JAX's interpreter.

    Returns:
      As `pack`.

    Raises:
      InputError: another dtype, or shapes that are not alike or that tiles do not divide.
    """
    if k.dtype != jnp.bfloat16 or v.dtype != jnp.bfloat16:
        raise InputError(f"pack_fp8 kernel: {k.dtype}, {v.dtype}; it takes bfloat16: cast, or pack")
    if k.shape != v.shape or not _divides(k.shape):
        raise InputError(
            f"pack_fp8 kernel: k {k.shape}, v {v.shape} must be alike, tokens a multiple of {TILE} "
            f"and head_dim {HEAD_DIM}; use pack"
        )
    # As rows of one number: a scale depends on the largest magnitude alone.
    scale = quantize_fp8(_largest(k, v, interpret)[..., None], axis=-1).scale[..., 0]
    inverse = jnp.where(jnp.isfinite(scale), exact.divide(jnp.float32(1), scale), jnp.nan)
    k_codes = _keys(k, inverse[0], interpret)
    v_codes = _values(v, inverse[1], interpret)
    return (
        FP8Tensor(k_codes, scale[0][:, None, :, None], k.dtype),
        FP8Tensor(v_codes, scale[1][:, :, None, None], v.dtype),
    )


def _largest(k, v, interpret):
    """bfloat16 [2, row, head]: the largest magnitudes of k's and v's heads; NaN of one with NaN."""
    rows, tokens, heads, _ = k.shape
    tiles = tokens // TILE
    bits = plgpu.kernel(
        _largest_body,
        out_type=jax.ShapeDtypeStruct((2, rows, tiles, heads), jnp.int32),
        grid=(2, rows, tiles, heads),  # the heads of a tile together: in memory they are neighbours
        grid_names=("which", *_GRID),
        kernel_name="pack_fp8_largest",
        scratch_types={"tile": plgpu.SMEM((TILE, HEAD_DIM), k.dtype), "here": plgpu.Barrier()},
        compiler_params=mosaic.LANE,
        interpret=interpret,
    )(k, v)
    return lax.bitcast_convert_type(jnp.max(bits, axis=2).astype(jnp.uint16), jnp.bfloat16)


def _largest_body(k, v, out, *, tile, here):
    which, (row, n, head) = lax.axis_index("which"), _place()

    def fetch(x):
        plgpu.copy_gmem_to_smem(x.at[row, pl.ds(n * TILE, TILE), head], tile, here)

    for i, x in enumerate((k, v)):
        pl.when(which == i)(functools.partial(fetch, x))
    plgpu.barrier_wait(here)

    def magnitudes(first):
        layout = plgpu.Layout.WG_STRIDED((_LINES, HEAD_DIM), vec_size=8)
        x = mosaic.load(tile.at[pl.ds(first, _LINES), :], layout)
        return mosaic.magnitude(x)

    largest = functools.reduce(lax.max, map(magnitudes, range(0, TILE, _LINES)))
    mosaic.store(out.at[which, row, n, head], jnp.max(largest.astype(jnp.int32)))


def _keys(k, inverse, interpret):
    """The codes of k [row, token, head, 128] with their tokens permuted. inverse: [row, head]."""
    rows, tokens, heads, _ = k.shape
    groups, columns = rows * tokens // _GROUP, heads * HEAD_DIM
    a, b, c = _SPLIT
    codes = plgpu.kernel(
        _keys_body,
        out_type=jax.ShapeDtypeStruct((groups, b, a, c, columns), _E4M3),
        grid=(rows, tokens // TILE, heads),
        grid_names=_GRID,
        kernel_name="pack_fp8_keys",
        scratch_types={
            "tile": plgpu.SMEM((b, _GROUPS, a, c, HEAD_DIM), k.dtype),
            "codes": plgpu.SMEM((b, _GROUPS, a, c, HEAD_DIM), _E4M3),
            "here": plgpu.Barrier(num_arrivals=b),
        },
        compiler_params=mosaic.LANE,
        interpret=interpret,
    )(k.reshape(groups, a, b, c, columns), inverse)
    return codes.reshape(k.shape)


def _keys_body(k, inverse, out, *, tile, codes, here):
    row, n, head = _place()
    groups = pl.ds((row * lax.axis_size("tile") + n) * _GROUPS, _GROUPS)
    columns = pl.ds(head * HEAD_DIM, HEAD_DIM)
    halves = range(_SPLIT[1])
    for i in halves:
        plgpu.copy_gmem_to_smem(k.at[groups, :, i, :, columns], tile.at[i], here)
    inverse = inverse[row, head]
    plgpu.barrier_wait(here)
    layout = plgpu.Layout.WG_STRIDED(tile.shape[1:], vec_size=8)
    for i in halves:
        x = mosaic.load(tile.at[i], layout)
        mosaic.store(codes.at[i], _encode(x, inverse))
    plgpu.commit_smem()
    for i in halves:
        plgpu.copy_smem_to_gmem(codes.at[i], out.at[groups, i, :, :, columns])
    plgpu.wait_smem_to_gmem(0)


def _values(v, inverse, interpret):
    """The codes of v [row, token, head, 128] as [row, head, 128, token]. inverse: [row, head]."""
    rows, tokens, heads, _ = v.shape
    codes = plgpu.kernel(
        _values_body,
        out_type=jax.ShapeDtypeStruct((rows * heads, HEAD_DIM, tokens), _E4M3),
        grid=(rows, tokens // TILE, heads),
        grid_names=_GRID,
        kernel_name="pack_fp8_values",
        scratch_types={
            "tile": plgpu.SMEM((TILE, HEAD_DIM), v.dtype),
            "codes": plgpu.SMEM((HEAD_DIM, TILE), _E4M3, transforms=_SPREAD),
            "here": plgpu.Barrier(),
        },
        compiler_params=mosaic.LANE,
        interpret=interpret,
    )(v, inverse)
    return codes.reshape(rows, heads, HEAD_DIM, tokens)


def _values_body(v, inverse, out, *, tile, codes, here):
    row, n, head = _place()
    tokens = pl.ds(n * TILE, TILE)
    plgpu.copy_gmem_to_smem(v.at[row, tokens, head], tile, here)
    inverse = inverse[row, head]
    plgpu.barrier_wait(here)
    channels = tile.transpose((1, 0))
    x = mosaic.load(channels, mosaic.a_row_a_thread(1)).astype(jnp.float32)
    mosaic.store(codes, _encode(plgpu.layout_cast(x, mosaic.a_row_a_thread(_WORD)), inverse))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(codes, out.at[row * lax.axis_size("head") + head, :, tokens])
    plgpu.wait_smem_to_gmem(0)


def _place():
    return tuple(map(lax.axis_index, _GRID))


def _encode(x, inverse):
    return (x.astype(jnp.float32) * inverse).astype(_E4M3)
