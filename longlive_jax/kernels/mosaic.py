"""Mosaic GPU for all kernels: compiler parameters, loads, stores, a layout, magnitudes, rings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LANE = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
# For kernels in which no thread reads another's stores: no barriers around stores.
NO_BARRIERS = dataclasses.replace(LANE, unsafe_no_auto_barriers=True)


def load(ref, layout) -> jax.Array:
    """The content of memory, in registers of this layout."""
    return plgpu.load(ref, layout=layout, optimized=False)


def store(ref, value: jax.Array) -> None:
    """Writes an array or a scalar of any layout to memory."""
    if hasattr(plgpu, "store"):  # from jax 0.12 on
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def a_row_a_thread(vector: int):
    """Layout of [128, columns]: a thread has a row, in registers of `vector` columns."""
    return plgpu.Layout.TCGEN05_TMEM_NATIVE(vector)


def rows_of_128_bytes(dtype) -> tuple:
    """Transforms of shared memory that the tensor cores read, and whose banks differ by row."""
    tile = (8, 128 // jnp.dtype(dtype).itemsize)
    tiling = plgpu.TilingTransform(tile)  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]


def magnitude(x: jax.Array) -> jax.Array:
    """The bits of |x|, bfloat16, as uint16: ordered as the magnitudes, with NaN above all."""
    return lax.bitcast_convert_type(x, jnp.uint16) & np.uint16(0x7FFF)


def stage(n, stages: int) -> jax.Array:
    """The stage of step n in a ring of `stages` stages: int32 []."""
    n = jnp.asarray(n, jnp.int32)
    if stages & (stages - 1) == 0:  # fewer instructions than a remainder, which might be negative
        return n & (stages - 1)
    return lax.rem(n, jnp.int32(stages))


def await_free(n, stages: int, free) -> jax.Array:
    """Waits until the stage of step n in a ring is free; returns it, int32 [].

    n: int32 []. free: a barrier for each stage, which is at once free the first time.
    """
    here = stage(n, stages)
    pl.when(n >= stages)(lambda: plgpu.barrier_wait(free.at[here]))
    return here
