"""Shared by kernels on rows of bfloat16 or of products, one warpgroup a row, on Hopper.

A row [n] is [n / 128, 128] here, in slices of 1,024, of which a thread takes 8 numbers, 16 bytes.
It is normalised, activated or added up in float32, rounded to bfloat16, measured, scaled, and
leaves as E4M3. A row that is normalised is read three times and lies in registers. Any other row
stays in shared memory, where its activation replaces it: long rows in registers would leave room
for too few programs to hide the latency of the exponentials.

The codes' bits are those of `formats.quantize_fp8` behind a bfloat16 array: a largest magnitude has
8 bits, and its quotient by 448 is a product with a seventh in two parts, see `_SEVENTH`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.formats import exact
from longlive_jax.kernels import mosaic

SLICE = 1024  # numbers that a warpgroup of 128 threads takes together: 16 bytes a thread
# Most columns of a row: in shared memory, as benchmarked; in registers, without spills.
MAX_COLUMNS = 16 * SLICE
MAX_NORMED = 6 * SLICE
LANES = 128  # a copy takes at most 256 numbers along an axis
LINES = SLICE // LANES
COMPILER = dataclasses.replace(mosaic.NO_BARRIERS, approx_math=True)

_LAYOUT = plgpu.Layout.WG_STRIDED((LINES, LANES), vec_size=8)
_INFINITY = 0x7F80  # of a bfloat16
# 1 / 7 in two parts. The first has 15 bits, so that its product with a bfloat16's mantissa m is
# exact, and the sum of both is RN(m / 7), contracted or not: sevenths are no near-ties.
_SEVENTH = (18725 / 2**17, float(np.float32(1 / 7 - 18725 / 2**17)))
# x / (1 + 2^(x (a + b x^2))) is x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
_A = -2 * (2 / math.pi) ** 0.5 / math.log(2)
_B = _A * 0.044715


def misfit(name: str, x, most: int) -> str:
    """Why a kernel does not take x, rows of at most `most` columns; empty: it does."""
    if x.dtype != jnp.bfloat16:
        return f"{name}: {x.dtype}, which must be bfloat16: cast it"
    if not x.shape or x.shape[-1] % SLICE or x.shape[-1] > most or 0 in x.shape:
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


def tiled(x: jax.Array) -> jax.Array:
    """[..., n] -> [row, n / 128, 128]."""
    return x.reshape(-1, x.shape[-1] // LANES, LANES)


def tiled_columns(x: jax.Array) -> jax.Array:
    """[n] -> [n / 128, 128]."""
    return x.reshape(-1, LANES)


def codes_of(shape: tuple[int, ...]) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """The outputs of a kernel for [..., n]: values [row, n / 128, 128] and scales [row]."""
    rows = math.prod(shape[:-1])
    values = jax.ShapeDtypeStruct((rows, shape[-1] // LANES, LANES), jnp.float8_e4m3fn)
    return values, jax.ShapeDtypeStruct((rows,), jnp.float32)


def untiled(
    values: jax.Array, scales: jax.Array, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """The outputs of `codes_of`, as [..., n] and [..., 1]."""
    return values.reshape(shape), scales.reshape(*shape[:-1], 1)


def quantize_normed(slices, gain, offset, eps, values, scale):
    """Writes codes and scale of a row behind its layer norm with this gain and offset.

    slices: the row's numbers; gain, offset: float32, slices of the norm's scale and shift.
    """
    made = _layer_norm(slices, gain, offset, eps)
    found, inverse = _scale(functools.reduce(lax.max, map(mosaic.magnitude, made)))
    for i, y in enumerate(made):
        _store(values.at[lines(i), :], y, inverse)
    mosaic.store(scale, found)


def quantize_row(x, values, scale, at_once: int, make: Callable | None = None):
    """Writes codes and scale of a row, [n / 128, 128], that lies in shared memory.

    at_once: slices that a thread works on together, if they divide the row's.
    make: (a slice's lines, its numbers) -> numbers to quantise, bfloat16, which replace them.
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


def load(ref) -> jax.Array:
    """A slice's numbers, 8 neighbours a thread."""
    return mosaic.load(ref, _LAYOUT)


def _store(ref, x, inverse):
    mosaic.store(ref, (x.astype(jnp.float32) * inverse).astype(jnp.float8_e4m3fn))


def gelu_by_logistic(x: jax.Array) -> jax.Array:
    """As `ops.gelu.gelu` of float32, by the logistic function.

    Not by the chip's tanh: its error of 2^-11 is most of 1 + tanh where that is small, and many
    steps of E4M3. Those of the exponential and of the root are below 2^-21.
    """
    power = jnp.exp2(x * (_A + _B * (x * x)))
    # 1 / (1 + power), in two steps: there is no approximate quotient here.
    root = lax.rsqrt(1 + power)
    return x * root * root


def _layer_norm(slices, gain, offset, eps):
    """A row as by `ops.norm.layer_norm`, in slices: statistics in float32, the mean first."""
    slices = [x.astype(jnp.float32) for x in slices]
    n = len(slices) * SLICE
    mean = total(slices) / n
    slices = [x - mean for x in slices]
    rate = lax.rsqrt(total([x * x for x in slices]) / n + eps)
    return [rounded(x * rate * a + b) for x, a, b in zip(slices, gain, offset)]


def rounded(x: jax.Array) -> jax.Array:
    """To bfloat16, two numbers an instruction.

    The barrier hides that the result is widened to float32 next: the compiler would then round
    each number by itself. (One slice, one register: of several it permutes numbers below 32 bits.)
    """
    return lax.optimization_barrier(x.astype(jnp.bfloat16))


def total(slices: Sequence[jax.Array]) -> jax.Array:
    return jnp.sum(functools.reduce(lax.add, slices))


def _scale(largest):
    """Magnitudes -> scale and inverse of the largest, as in `formats.quantize_fp8`."""
    bits = jnp.max(largest.astype(jnp.int32))
    mantissa = _float((bits & 0x7F) << 16 | 0x3F800000)
    power = _float((bits & _INFINITY) << 16)
    seventh = mantissa * _SEVENTH[0] + mantissa * _SEVENTH[1]
    scale = jnp.maximum(seventh * power * 2.0**-6, exact.TINY)
    scale = jnp.where(bits > _INFINITY, jnp.nan, scale)
    return scale, jnp.where(bits < _INFINITY, 1 / scale, jnp.nan)


def _float(bits):
    return lax.bitcast_convert_type(bits, jnp.float32)
