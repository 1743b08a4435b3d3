"""A residual sum with an FP8 product, and its layer norm in FP8 by rows: one pass, on Hopper.

XLA would write the sum, and `quantize_fp8`, which normalises it, would read it again. Here a row of
the sum stays in registers in between, and is written twice, in bfloat16 and as codes.

A program is one warpgroup that goes through a run of rows, fetched by TMA. The arrays that a run's
rows share (gate, scale, shift, the product's scales and bias of columns) stay in registers.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.errors import InputError
from longlive_jax.formats import PendingMatmul
from longlive_jax.kernels import mosaic
from longlive_jax.kernels import rows as lib
from longlive_jax.kernels.chip import takes

MAX_COLUMNS = 5 * lib.SLICE  # with the arrays that a run's rows share, in registers, without spills
# Rows that a program goes through at most, and that have their place in its shared memory: all
# programs of a chunk of 7,040 rows run at once, three on a multiprocessor.
AT_MOST, IN_FLIGHT = 18, 2


def supports(
    x: jax.Array, y: PendingMatmul, gate: jax.Array | None, scale: jax.Array, shift: jax.Array
) -> bool:
    """Whether the kernel takes these: bfloat16, rows of n * 1,024, local, on a Hopper GPU."""
    return takes(x, y) and not _misfit(x, y, gate, scale, shift)


def _misfit(x, y, gate, scale, shift):
    """Why the kernel does not take the arguments; empty: it does."""
    for name, z in (("x", x), ("sums", y)):
        if misfit := lib.misfit(name, z, MAX_COLUMNS):
            return misfit
    if x.shape != y.shape:
        return f"x {x.shape} and the product {y.shape} must have one shape"
    shapes = [z.shape for z in (gate, scale, shift) if z is not None]
    if any(len(shape) != x.ndim or shape[-1] != x.shape[-1] for shape in shapes) or not _runs(
        x.shape, shapes
    ):
        return (
            f"gate, scale and shift are {shapes} for {x.shape}; each must have x's rank and last "
            "axis, and together x's leading axes, then ones: broadcast them"
        )
    return ""


def _runs(shape, shapes):
    """How many runs of consecutive rows of x share one row of each; 0: they do not fit."""
    try:
        together = jnp.broadcast_shapes(*shapes)
    except ValueError:
        return 0
    return lib.runs(shape, together, together)


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def kernel(
    x: jax.Array,
    y: PendingMatmul,
    gate: jax.Array | None,
    scale: jax.Array,
    shift: jax.Array,
    eps: float = 1e-6,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The kernel itself, on one device's arrays (on a mesh: in a manual `jax.shard_map`).

    Jitted: a model of many layers lowers it once.

    Args:
      x: [..., n], bfloat16, n a multiple of 1,024, at most 5,120.
      y: [..., n], bfloat16. Nothing is rounded between its sums and the sum with x.
      gate: of y, float32 or bfloat16, of x's rank, with x's leading axes or ones, then ones, then
        n. None: 1.
      scale, shift: of the norm, as gate.
      eps: of the norm.
      interpret: run on the CPU, by JAX's interpreter.

    Returns:
      x + y * gate, bfloat16 [..., n]; of its layer norm times `scale` plus `shift`, rounded to
      bfloat16, values float8_e4m3fn [..., n] and scales float32 [..., 1].

    Raises:
      InputError: other dtypes or shapes.
    """
    if misfit := _misfit(x, y, gate, scale, shift):
        raise InputError(f"add_norm_fp8 kernel: {misfit}; or use ops.quantized")
    shapes = [z.shape for z in (gate, scale, shift) if z is not None]
    runs, shared = _runs(x.shape, shapes), jnp.broadcast_shapes(*shapes)
    gate = jnp.float32(1) if gate is None else gate.astype(jnp.float32)
    column, bias = (z.reshape((1,) * (x.ndim - 1) + z.shape) for z in (y.column, y.bias))

    def of_runs(z):
        """[run, n / 128, 128], of what broadcasts."""
        return lib.tiled(jnp.broadcast_to(z.astype(jnp.float32), shared))

    rows = math.prod(x.shape[:-1]) // runs
    at_most = min(AT_MOST, rows)
    values, scales = lib.codes_of(x.shape)
    total, values, scales = plgpu.kernel(
        functools.partial(_kernel, rows=rows, at_most=at_most, eps=eps),
        out_type=(jax.ShapeDtypeStruct(values.shape, x.dtype), values, scales),
        grid=(runs, pl.cdiv(rows, at_most)),
        grid_names=("run", "part"),
        kernel_name="add_norm_fp8",
        compiler_params=lib.COMPILER,
        interpret=interpret,
    )(
        lib.tiled(x),
        lib.tiled(y.sums),
        y.row.reshape(-1),
        of_runs(column * gate),
        of_runs(bias.astype(jnp.float32) * gate),
        of_runs(scale),
        of_runs(shift),
    )
    return total.reshape(x.shape), *lib.untiled(values, scales, x.shape)


def _kernel(x, sums, rates, *refs, rows, at_most, eps):
    shared, (total, values, scales) = refs[:-3], refs[-3:]
    run, part = lax.axis_index("run"), lax.axis_index("part")
    first = run * rows + part * at_most
    count = lax.min(jnp.int32(at_most), rows - part * at_most)
    slices = range(x.shape[1] // lib.LINES)
    weight, offset, scale, shift = (
        [lib.load(ref.at[run, lib.lines(i), :]) for i in slices] for ref in shared
    )

    def step(index, *fetched):
        row = first + index[0]
        rate = rates[row]
        made = []
        for i in slices:
            a, b = (lib.load(ref.at[0, lib.lines(i), :]).astype(jnp.float32) for ref in fetched)
            made.append(lib.rounded(a + (b * rate * weight[i] + offset[i])))
            mosaic.store(total.at[row, lib.lines(i), :], made[-1])
        lib.quantize_normed(made, scale, shift, eps, values.at[row], scales.at[row])
        plgpu.commit_smem()  # all threads have read and written: the next row may come

    spec = plgpu.BlockSpec((1, *x.shape[1:]), lambda i: (first + i, 0, 0))
    plgpu.emit_pipeline(
        step, grid=(count,), in_specs=[spec, spec], max_concurrent_steps=min(IN_FLIGHT, at_most)
    )(x, sums)
