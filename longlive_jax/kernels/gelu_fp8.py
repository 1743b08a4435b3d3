"""GELU of an FP8 product that waits for its scales and bias, and its codes by rows, on Hopper.

XLA's pass over the FFN's widest array, in which it applies scales and bias, would cost as much as
the kernel behind it, `quantize_fp8`.

A program is one warpgroup and takes one row through shared memory, where GELU replaces the sums.
Many programs share a multiprocessor and hide each other's latency.

Only GELU's result is rounded, to bfloat16: nothing between the product's sums and it.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.errors import InputError
from longlive_jax.formats import PendingMatmul
from longlive_jax.kernels import rows as lib
from longlive_jax.kernels.chip import takes

AT_ONCE = 2  # slices that a thread works on together, if they divide a row's


def supports(x: PendingMatmul) -> bool:
    """Whether the kernel takes such a product: bfloat16, rows of n * 1,024, local, on Hopper."""
    return takes(x) and not _misfit(x)


def _misfit(x):
    return lib.misfit("sums", x, lib.MAX_COLUMNS)


def kernel(
    x: PendingMatmul, interpret: plgpu.InterpretGPUParams | None = None
) -> tuple[jax.Array, jax.Array]:
    """The kernel itself, on one device's arrays (on a mesh: in a manual `jax.shard_map`).

    Args:
      x: [..., n], bfloat16, n a multiple of 1,024, at most 16,384.
      interpret: run on the CPU, by JAX's interpreter.

    Returns:
      Of gelu(x), by tanh: values float8_e4m3fn [..., n], scales float32 [..., 1].

    Raises:
      InputError: another dtype or shape.
    """
    if misfit := _misfit(x):
        raise InputError(f"gelu_fp8 kernel: {misfit}; or use ops.quantized.gelu_quantize_rows")
    sums = lib.tiled(x.sums)
    values, scales = plgpu.kernel(
        _kernel,
        out_type=lib.codes_of(x.shape),
        grid=sums.shape[:1],
        grid_names=("row",),
        kernel_name="gelu_fp8",
        scratch_types={
            "fetched": plgpu.SMEM(sums.shape[1:], jnp.bfloat16),
            "here": plgpu.Barrier(),
        },
        compiler_params=lib.COMPILER,
        interpret=interpret,
    )(sums, x.row.reshape(-1), *map(lib.tiled_columns, (x.column, x.bias)))
    return lib.untiled(values, scales, x.shape)


def _kernel(sums, rates, column, bias, values, scales, *, fetched, here):
    row = lax.axis_index("row")
    plgpu.copy_gmem_to_smem(sums.at[row], fetched, here)
    rate = rates[row]
    plgpu.barrier_wait(here)

    def gelu(i, x):
        c, b = (lib.load(ref.at[i, :]).astype(jnp.float32) for ref in (column, bias))
        return lib.rounded(lib.gelu_by_logistic(x.astype(jnp.float32) * rate * c + b))

    lib.quantize_row(fetched, values.at[row], scales.at[row], AT_ONCE, gelu)
