"""bfloat16 to FP8 (E4M3) by rows in one read, on Hopper, behind what makes the rows.

The scale of a row waits for its largest magnitude, so that XLA writes the row and reads it again.
Here a row stays on the chip in between: it comes to shared memory, is activated or normalised,
rounded to bfloat16, measured, scaled, and leaves as E4M3. A program is one warpgroup that goes
through a run of rows; a multiprocessor holds several, and they fill each other's waits.

A thread takes 8 numbers, 16 bytes, of a slice of 1,024. A row that is normalised, which is read
three times, lies in registers, and so do the run's scale and shift. Any other stays in shared
memory, where its activation replaces it: held in registers, long rows leave room for too few
programs to hide what the exponentials wait for.

The bits are those of `formats.quantize_fp8` behind a bfloat16 array: a largest magnitude has 8
bits, and its quotient by 448 is a product with a seventh in two parts, see `_SEVENTH`.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.errors import InputError
from longlive_jax.formats import exact
from longlive_jax.kernels import mosaic
from longlive_jax.kernels.chip import is_hopper, is_local

SLICE = 1024  # numbers that a warpgroup of 128 threads takes at a time: 16 bytes a thread
# Of a row: as the bench has tried, in shared memory; in registers, without spilling any.
MAX_COLUMNS = 16 * SLICE
MAX_NORMED = 6 * SLICE
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

LANES = 128  # a copy takes at most 256 numbers along an axis: a row is [n / 128, 128]
LINES = SLICE // LANES
_LAYOUT = plgpu.Layout.WG_STRIDED((LINES, LANES), vec_size=8)
_INFINITY = 0x7F80  # of a bfloat16
# 1 / 7 in two parts. The first has 15 bits, so that its product with a bfloat16's mantissa m is
# exact, and the sum of both is RN(m / 7), contracted or not: sevenths are no near-ties.
_SEVENTH = (18725 / 2**17, float(np.float32(1 / 7 - 18725 / 2**17)))
# x / (1 + 2^(x (a + b x^2))) is x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
_A = -2 * (2 / math.pi) ** 0.5 / math.log(2)
_B = _A * 0.044715


def supports(x: jax.Array, scale: jax.Array | None = None, shift: jax.Array | None = None) -> bool:
    """Whether the kernel takes these: bfloat16 rows, local, on a Hopper GPU; scales for runs."""
    return (
        is_hopper()
        and is_local(x)
        and x.dtype == jnp.bfloat16
        and fits(x.shape, _most(scale is not None))
        and (scale is None or runs(x.shape, scale.shape, shift.shape) > 0)
    )


def _most(normed):
    return MAX_NORMED if normed else MAX_COLUMNS


def fits(shape: tuple[int, ...], most: int) -> bool:
    """Whether rows of at most so many columns can be taken, and there are any."""
    return len(shape) > 0 and shape[-1] % SLICE == 0 and 0 < shape[-1] <= most and 0 not in shape


def misfit(name: str, x, most: int) -> str:
    """What of x, rows of at most so many columns, a kernel does not take; empty: nothing."""
    if x.dtype != jnp.bfloat16:
        return f"{name}: {x.dtype}, which must be bfloat16: cast it"
    if not fits(x.shape, most):
        return f"{name}: {x.shape}, which must hold rows of a multiple of {SLICE}, at most {most}"
    return ""


def runs(shape, scale, shift):
    """How many runs of consecutive rows there are, one for each row of scale and of shift.

    0: they do not have x's leading axes, then ones, then x's last.
    """
    if scale != shift or len(shape) != len(scale) or shape[-1] != scale[-1]:
        return 0
    kept = next((i for i, (a, b) in enumerate(zip(shape, scale)) if a != b), len(shape) - 1)
    return math.prod(shape[:kept]) if set(scale[kept:-1]) <= {1} else 0


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
      activation: "gelu": of x, by tanh. None: none.
      eps: of the norm.
      tiling: one of `tilings`, or another; None: the first.
      interpret: run on the CPU, by JAX's interpreter.

    Returns:
      values float8_e4m3fn [..., n], scales float32 [..., 1].

    Raises:
      InputError: another dtype or shape of x, an unknown activation, scales that do not fit.
    """
    _validate(x, scale, shift, activation)
    n, rows = x.shape[-1], math.prod(x.shape[:-1])
    tiles = (n // LANES, LANES)
    number, operands = 1, [x.reshape(rows, *tiles)]
    if scale is not None:
        number = runs(x.shape, scale.shape, shift.shape)
        operands += [y.astype(jnp.float32).reshape(number, *tiles) for y in (scale, shift)]
    at_most, in_flight, at_once = tiling or tilings(n, scale is not None)[0]
    at_most = min(at_most, rows // number)
    values, scales = plgpu.kernel(
        functools.partial(
            _kernel,
            rows=rows // number,
            at_most=at_most,
            in_flight=min(in_flight, at_most),
            at_once=at_once,
            activation=activation,
            eps=eps,
        ),
        out_type=(
            jax.ShapeDtypeStruct((rows, *tiles), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((rows,), jnp.float32),
        ),
        grid=(number, pl.cdiv(rows // number, at_most)),
        grid_names=("run", "part"),
        kernel_name=f"quantize_fp8_{activation or 'rows' if scale is None else 'norm'}",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            # No thread reads what another has stored: around stores nothing need wait.
            unsafe_no_auto_barriers=True,
        ),
        interpret=interpret,
    )(*operands)
    return values.reshape(x.shape), scales.reshape(*x.shape[:-1], 1)


def tilings(n: int, normed: bool) -> tuple[tuple[int, int, int], ...]:
    """Those of `TILINGS` for rows of n."""
    return TILINGS["normed" if normed else "short" if n <= 4 * SLICE else "long"]


def _validate(x, scale, shift, activation):
    if x.dtype != jnp.bfloat16:
        raise InputError(f"fp8 kernel: input is {x.dtype}; it must be bfloat16: cast it")
    if (scale is None) != (shift is None) or (scale is not None and activation):
        raise InputError("fp8 kernel: give scale and shift, or an activation, or neither")
    if not fits(x.shape, _most(scale is not None)):
        raise InputError(
            f"fp8 kernel: shape {x.shape} must hold rows of a multiple of {SLICE} numbers, at most "
            f"{MAX_COLUMNS}, normalised {MAX_NORMED}; use formats.quantize_fp8"
        )
    if activation not in (None, GELU):
        raise InputError(f"fp8 kernel: unknown activation {activation!r}; it must be {GELU!r}")
    if scale is not None and not runs(x.shape, scale.shape, shift.shape):
        raise InputError(
            f"fp8 kernel: scale {scale.shape} and shift {shift.shape} for {x.shape}; both must "
            "have x's leading axes, then ones, then x's last: broadcast them, or use ops.norm"
        )


def _kernel(x_ref, *refs, rows, at_most, in_flight, at_once, activation, eps):
    affine, (values_ref, scales_ref) = refs[:-2], refs[-2:]
    run, part = lax.axis_index("run"), lax.axis_index("part")
    first = run * rows + part * at_most
    count = lax.min(jnp.int32(at_most), rows - part * at_most)
    tiles = x_ref.shape[1:]
    slices = range(tiles[0] // LINES)
    # Of a run of rows: they stay in registers.
    affine = [[load(ref.at[run, lines(i), :]) for i in slices] for ref in affine]

    def normed(row, x_smem):
        x = [load(x_smem.at[lines(i), :]) for i in slices]
        quantize_normed(x, *affine, eps, values_ref.at[row], scales_ref.at[row])

    def gelu(_, x):
        return rounded(gelu_by_logistic(x.astype(jnp.float32)))

    def activated(row, x_smem):
        make = gelu if activation == GELU else None
        quantize_row(x_smem, values_ref.at[row], scales_ref.at[row], at_once, make)

    spec = plgpu.BlockSpec((1, *tiles), lambda i: (first + i, 0, 0))
    quantize = normed if affine else activated

    def step(index, x_smem):
        quantize(first + index[0], x_smem.at[0])
        plgpu.commit_smem()  # all have read, and written: the next row may come

    plgpu.emit_pipeline(step, grid=(count,), in_specs=[spec], max_concurrent_steps=in_flight)(x_ref)


def quantize_normed(slices, gain, offset, eps, values, scale):
    """Writes codes and scale of a row behind its layer norm, which is multiplied and shifted.

    slices: of the row's numbers; gain, offset: float32, the same of a norm's scale and shift.
    """
    made = _layer_norm(slices, gain, offset, eps)
    found, inverse = _scale(functools.reduce(lax.max, map(mosaic.magnitude, made)))
    for i, y in enumerate(made):
        _store(values.at[lines(i), :], y, inverse)
    mosaic.store(scale, found)


def quantize_row(x, values, scale, at_once: int, make: Callable | None = None):
    """Writes codes and scale of a row, [n / 128, 128], that lies in shared memory.

    at_once: slices that a thread works on at a time, if they divide the row's.
    make: (a slice's lines, its numbers) -> those to quantise, bfloat16, which replace them.
    """
    slices = x.shape[0] // LINES
    at_once = math.gcd(at_once, slices)

    def group(step):
        return [lines(step * at_once + i) for i in range(at_once)]

    def measure(step, largest):
        for i in group(step):
            y = load(x.at[i, :])
            if make is not None:
                y = make(i, y)
                mosaic.store(x.at[i, :], y)  # by the thread that read it and will again
            largest = lax.max(largest, mosaic.magnitude(y))
        return largest

    def write(step, _):
        for i in group(step):
            _store(values.at[i, :], load(x.at[i, :]), inverse)

    zeros = plgpu.layout_cast(jnp.zeros((LINES, LANES), jnp.uint16), _LAYOUT)
    found, inverse = _scale(lax.fori_loop(0, slices // at_once, measure, zeros))
    lax.fori_loop(0, slices // at_once, write, None)
    mosaic.store(scale, found)


def lines(i):
    return pl.ds(i * LINES, LINES)


def load(ref):
    """A slice's numbers, 8 neighbours a thread."""
    return plgpu.load(ref, layout=_LAYOUT, optimized=False)


def _store(ref, x, inverse):
    mosaic.store(ref, (x.astype(jnp.float32) * inverse).astype(jnp.float8_e4m3fn))


def gelu_by_logistic(x):
    """As `ops.gelu.gelu` of float32, by the logistic function.

    Not by the chip's tanh: its error of 2^-11 is most of 1 + tanh where that is small, and many
    steps of E4M3. Those of the exponential and of the root are below 2^-21.
    """
    power = jnp.exp2(x * (_A + _B * (x * x)))
    # 1 / (1 + power), in two steps: there is no approximate quotient here.
    root = lax.rsqrt(1 + power)
    return x * root * root


def _layer_norm(slices, gain, offset, eps):
    """A row as by `ops.norm.layer_norm`, in slices: statistics in float32, of the mean first."""
    slices = [x.astype(jnp.float32) for x in slices]
    n = len(slices) * SLICE
    mean = total(slices) / n
    slices = [x - mean for x in slices]
    rate = lax.rsqrt(total([x * x for x in slices]) / n + eps)
    return [rounded(x * rate * a + b) for x, a, b in zip(slices, gain, offset)]


def rounded(x):
    """To bfloat16, two numbers an instruction.

    The barrier hides that float32 of the result is wanted next: the compiler would round each
    number by itself. (One slice, one register: of several it permutes numbers below 32 bits.)
    """
    return lax.optimization_barrier(x.astype(jnp.bfloat16))


def total(slices):
    return jnp.sum(functools.reduce(lax.add, slices))


def _scale(largest):
    """Magnitudes of which one is the largest -> scale and inverse as in `formats.quantize_fp8`."""
    bits = jnp.max(largest.astype(jnp.int32))
    mantissa = _float((bits & 0x7F) << 16 | 0x3F800000)
    power = _float((bits & _INFINITY) << 16)
    seventh = mantissa * _SEVENTH[0] + mantissa * _SEVENTH[1]
    scale = jnp.maximum(seventh * power * 2.0**-6, exact.TINY)
    scale = jnp.where(bits > _INFINITY, jnp.nan, scale)
    return scale, jnp.where(bits < _INFINITY, 1 / scale, jnp.nan)


def _float(bits):
    return lax.bitcast_convert_type(bits, jnp.float32)
