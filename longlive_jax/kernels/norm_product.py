"""RMS norm of an FP8 product that waits for its scales and bias, in one pass, on Hopper.

XLA applies scales and bias in a pass of its own, and writes a float32 array for the norm. Here a
program, one warpgroup, takes a row through its registers. Arrays of columns are read through the
cache. Many programs share a multiprocessor and hide each other's latency.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.errors import InputError
from longlive_jax.formats import PendingMatmul
from longlive_jax.kernels import mosaic
from longlive_jax.kernels import rows as lib
from longlive_jax.kernels.chip import takes


def supports(x: PendingMatmul, weight: jax.Array) -> bool:
    """Whether the kernel takes these: bfloat16, rows of n * 1,024, local, on a Hopper GPU."""
    return takes(x) and not _misfit(x, weight)


def _misfit(x, weight):
    """Why the kernel does not take the arguments; empty: it does."""
    if misfit := lib.misfit("sums", x, lib.MAX_NORMED):
        return misfit
    return "" if weight.shape == x.shape[-1:] else f"weight {weight.shape} must be {x.shape[-1:]}"


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def kernel(
    x: PendingMatmul,
    weight: jax.Array,
    eps: float = 1e-6,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """The kernel itself, on one device's arrays (on a mesh: in a manual `jax.shard_map`).

    Jitted: a model of many layers lowers it once.

    Args:
      x: [..., n], bfloat16, n a multiple of 1,024, at most 6,144. Nothing is rounded between its
        sums and the norm's result.
      weight: [n], of the norm, bfloat16 or float32.
      eps: of the norm.
      interpret: run on the CPU, by JAX's interpreter.

    Returns:
      bfloat16 [..., n].

    Raises:
      InputError: other dtypes or shapes.
    """
    if misfit := _misfit(x, weight):
        raise InputError(f"norm_product kernel: {misfit}; or use ops.norm")
    sums = lib.tiled(x.sums)
    out = plgpu.kernel(
        functools.partial(_kernel, eps=eps),
        out_type=jax.ShapeDtypeStruct(sums.shape, x.dtype),
        grid=sums.shape[:1],
        grid_names=("row",),
        kernel_name="norm_product",
        compiler_params=lib.COMPILER,
        interpret=interpret,
    )(sums, x.row.reshape(-1), *map(lib.tiled_columns, (x.column, x.bias, weight)))
    return out.reshape(x.shape)


def _kernel(sums, rates, column, bias, weight, out, *, eps):
    row = lax.axis_index("row")
    slices = [lib.lines(i) for i in range(sums.shape[1] // lib.LINES)]
    x = [lib.load(sums.at[row, i, :]) for i in slices]
    rate = rates[row]

    def of_columns(ref, i):
        return lib.load(ref.at[i, :]).astype(jnp.float32)

    x = [
        y.astype(jnp.float32) * rate * of_columns(column, i) + of_columns(bias, i)
        for y, i in zip(x, slices)
    ]
    rate = lax.rsqrt(lib.total([y * y for y in x]) / (len(slices) * lib.SLICE) + eps)
    for y, i in zip(x, slices):
        mosaic.store(out.at[row, i, :], (y * rate * of_columns(weight, i)).astype(out.dtype))
