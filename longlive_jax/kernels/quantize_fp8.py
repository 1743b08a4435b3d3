"""bfloat16 to FP8 (E4M3) by rows in one read, on Hopper, behind a norm or an activation or alone.

The scale of a row depends on its largest magnitude, so XLA writes the row and reads it again. Here
a row stays on the chip in between, as `rows` says. A program is one warpgroup that goes through a
run of rows; several share a multiprocessor and hide each other's latency. A run's scale and shift
stay in registers.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.errors import InputError
from longlive_jax.kernels import rows as lib
from longlive_jax.kernels.chip import takes

GELU = "gelu"
# By what `tilings` says: (rows that a program goes through at most, of which have their place in
# shared memory, slices that a thread works on at once where it holds no whole row). The first is
# used: for a chunk of 7,040 rows all programs run at once, as many on a multiprocessor as its
# registers (normed), its threads (short) or its shared memory (long) admit.
TILINGS = {
    "normed": ((11, 3, 1), (11, 2, 1), (11, 1, 1), (5, 2, 1), (22, 3, 1), (4, 2, 1)),
    "short": ((4, 2, 1), (4, 1, 3), (1, 1, 3), (2, 1, 3), (7, 2, 1), (14, 2, 1)),
    "long": ((2, 1, 2), (1, 1, 2), (8, 1, 2), (8, 1, 1), (18, 2, 2), (18, 2, 7), (4, 1, 7)),
}


def supports(x: jax.Array, scale: jax.Array | None = None, shift: jax.Array | None = None) -> bool:
    """Whether the kernel takes these: bfloat16 rows, local, on a Hopper GPU; scales for runs."""
    return takes(x) and not _misfit(x, scale, shift)


def _misfit(x, scale, shift, activation=None):
    """Why the kernel does not take the arguments; empty: it does."""
    normed = scale is not None
    if normed != (shift is not None) or (normed and activation):
        return "give scale and shift, or an activation, or neither"
    if activation not in (None, GELU):
        return f"unknown activation {activation!r}; it must be {GELU!r}"
    if misfit := lib.misfit("x", x, lib.MAX_NORMED if normed else lib.MAX_COLUMNS):
        return misfit
    if normed and not lib.runs(x.shape, scale.shape, shift.shape):
        return (
            f"scale {scale.shape} and shift {shift.shape} for {x.shape}; both must have x's "
            "leading axes, then ones, then x's last: broadcast them"
        )
    return ""


def kernel(
    x: jax.Array,
    scale: jax.Array | None = None,
    shift: jax.Array | None = None,
    activation: str | None = None,
    eps: float = 1e-6,
    tiling: tuple[int, int, int] | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The kernel itself, on one device's array (on a mesh: in a manual `jax.shard_map`).

    Args:
      x: [..., n], bfloat16, n a multiple of 1,024, at most 16,384; normalised, at most 6,144.
      scale, shift: float32 or bfloat16, of x's rank, with x's leading axes, then axes of size 1,
        then n. Given: x is normalised first, then `* scale + shift`.
      activation: "gelu", by tanh, or None.
      eps: of the norm.
      tiling: one of `tilings`, or another; None: the first.
      interpret: run on the CPU, by JAX's interpreter.

    Returns:
      values float8_e4m3fn [..., n], scales float32 [..., 1].

    Raises:
      InputError: another dtype or shape of x, an unknown activation, scales that do not fit.
    """
    if misfit := _misfit(x, scale, shift, activation):
        raise InputError(f"quantize_fp8 kernel: {misfit}; or use ops.quantized")
    number, operands = 1, [lib.tiled(x)]
    if scale is not None and shift is not None:
        number = lib.runs(x.shape, scale.shape, shift.shape)
        operands += [lib.tiled(y.astype(jnp.float32)) for y in (scale, shift)]
    at_most, in_flight, at_once = tiling or tilings(x.shape[-1], scale is not None)[0]
    rows = math.prod(x.shape[:-1]) // number
    at_most = min(at_most, rows)
    values, scales = plgpu.kernel(
        functools.partial(
            _kernel,
            rows=rows,
            at_most=at_most,
            in_flight=min(in_flight, at_most),
            at_once=at_once,
            activation=activation,
            eps=eps,
        ),
        out_type=lib.codes_of(x.shape),
        grid=(number, pl.cdiv(rows, at_most)),
        grid_names=("run", "part"),
        kernel_name=f"quantize_fp8_{activation or 'rows' if scale is None else 'norm'}",
        compiler_params=lib.COMPILER,
        interpret=interpret,
    )(*operands)
    return lib.untiled(values, scales, x.shape)


def tilings(n: int, normed: bool) -> tuple[tuple[int, int, int], ...]:
    """The `TILINGS` for rows of n numbers."""
    return TILINGS["normed" if normed else "short" if n <= 4 * lib.SLICE else "long"]


def _kernel(x_ref, *refs, rows, at_most, in_flight, at_once, activation, eps):
    affine, (values_ref, scales_ref) = refs[:-2], refs[-2:]
    run, part = lax.axis_index("run"), lax.axis_index("part")
    first = run * rows + part * at_most
    count = lax.min(jnp.int32(at_most), rows - part * at_most)
    tiles = x_ref.shape[1:]
    slices = range(tiles[0] // lib.LINES)
    # Of a run of rows: they stay in registers.
    affine = [[lib.load(ref.at[run, lib.lines(i), :]) for i in slices] for ref in affine]

    def normed(row, x_smem):
        x = [lib.load(x_smem.at[lib.lines(i), :]) for i in slices]
        gain, offset = affine
        lib.quantize_normed(x, gain, offset, eps, values_ref.at[row], scales_ref.at[row])

    def gelu(_, x):
        return lib.rounded(lib.gelu_by_logistic(x.astype(jnp.float32)))

    def activated(row, x_smem):
        make = gelu if activation == GELU else None
        lib.quantize_row(x_smem, values_ref.at[row], scales_ref.at[row], at_once, make)

    spec = plgpu.BlockSpec((1, *tiles), lambda i: (first + i, 0, 0))
    quantize = normed if affine else activated

    def step(index, x_smem):
        quantize(first + index[0], x_smem.at[0])
        plgpu.commit_smem()  # all threads have read and written: the next row may come

    plgpu.emit_pipeline(step, grid=(count,), in_specs=[spec], max_concurrent_steps=in_flight)(x_ref)
