"""Pieces of Mosaic GPU that kernels share: stores, a layout, magnitudes, bytes, rings of stages."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir


def store(ref, value: jax.Array) -> None:
    """Writes an array or a scalar to memory, however its layout lies there."""
    if hasattr(plgpu, "store"):  # from jax 0.12 on
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def a_row_a_thread(vector: int):
    """Layout of [128, columns]: a thread has a row, in registers of so many columns."""
    return plgpu.Layout.TCGEN05_TMEM_NATIVE(vector)


def magnitude(x: jax.Array) -> jax.Array:
    """The bits of |x|, bfloat16, as uint16: in the order of the magnitudes, with NaN above all."""
    return lax.bitcast_convert_type(x, jnp.uint16) & np.uint16(0x7FFF)


def pairs(x: jax.Array, interpret: bool) -> jax.Array:
    """x, float32 [128, 2 n], a row a thread, as bfloat16: uint32 [128, n], the first of two lowest.

    interpret: with JAX's interpreter, which takes no code for the chip.
    """
    n = x.shape[1] // 2
    x = plgpu.layout_cast(x, a_row_a_thread(2 * n)).astype(jnp.bfloat16)
    if interpret:
        return lax.bitcast_convert_type(x.reshape(-1, n, 2), jnp.uint32)
    return _by_registers(
        lambda pairs: mgpu.utils.bitcast(pairs, ir.VectorType.get((n,), _int32())), n, x
    )


def permute_bytes(
    a: jax.Array, b: jax.Array, selector: int | jax.Array, interpret: bool
) -> jax.Array:
    """Four of the bytes of a and b by the chip's PRMT: uint32 [128, 1], a row a thread.

    Args:
      a, b: uint32 [128, 1], a row a thread.
      selector: such an array, or one for all. Its four lowest hexadecimal digits, of 0 to 7, say
        which bytes, the lowest first: 0 to 3 are a's, from the lowest, 4 to 7 are b's. What is
        above those digits does not matter.
      interpret: as in `pairs`.
    """
    if interpret:
        selector = jnp.asarray(selector, jnp.uint32)
        out = jnp.zeros_like(a)
        for i in range(4):
            digit = selector >> np.uint32(4 * i) & np.uint32(7)
            byte = jnp.where(digit < 4, a, b) >> (digit & np.uint32(3)) * np.uint32(8)
            out |= (byte & np.uint32(255)) << np.uint32(8 * i)
        return out
    if isinstance(selector, int):
        return _by_registers(
            lambda a, b: mgpu.utils.prmt(a, b, mgpu.utils.c(selector, _int32())), 1, a, b
        )
    return _by_registers(mgpu.utils.prmt, 1, a, b, selector)


def _by_registers(f, columns, *x):
    """f of arrays' registers, of which a row, a thread's, has one: uint32 [128, columns]."""
    layout = a_row_a_thread(columns)

    @plgpu.inline_mgpu(
        arg_types=tuple(a_row_a_thread(y.shape[1]) for y in x),
        return_type=plgpu.ShapeDtypeStruct((x[0].shape[0], columns), jnp.uint32, layout=layout),
    )
    def call(_, *x):
        registers = np.empty_like(x[0].registers)
        for i in np.ndindex(registers.shape):
            registers[i] = f(*(y.registers[i] for y in x))
        return mgpu.FragmentedArray(
            _registers=registers, _layout=layout.to_mgpu(), _is_signed=False
        )

    return call(*x)


def _int32():
    return ir.IntegerType.get_signless(32)


def stage(n, stages: int) -> jax.Array:
    """Where step n has its place in a ring of so many stages: int32 []."""
    n = jnp.asarray(n, jnp.int32)
    if stages & (stages - 1) == 0:  # fewer instructions than a remainder, which might be negative
        return n & (stages - 1)
    return lax.rem(n, jnp.int32(stages))


def await_free(n, stages: int, free) -> jax.Array:
    """Waits until the place of step n in a ring is free; returns it, int32 [].

    n: int32 []. free: a barrier for each stage, which is at once free the first time.
    """
    here = stage(n, stages)
    pl.when(n >= stages)(lambda: plgpu.barrier_wait(free.at[here]))
    return here
