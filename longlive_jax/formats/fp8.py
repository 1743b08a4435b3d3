"""FP8: 8-bit floats with one float32 scale for a whole tensor or for every row of it.

A number is value * scale. The largest magnitude that shares a scale goes to the format's largest
number (E4M3: 448, for weights and activations; E5M2: 57344, for gradients).
"""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from longlive_jax.errors import InputError
from longlive_jax.formats import exact
from longlive_jax.formats.tensor import Format, Quantized, trailing

DTYPES = (jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2))


@struct.dataclass
class FP8Tensor(Quantized):
    """An array of 8 bits a number.

    values: float8_e4m3fn or float8_e5m2, [..., n].
    scale: float32. One for the tensor: [], or [layer] and so on where tensors were stacked by
      `jax.vmap` or `jax.lax.scan`. One for each row: as many axes as `values`, the row's of
      size 1.
    dtype: of the array that was quantised, and the default of `dequantize`.
    """

    values: jax.Array
    scale: jax.Array
    dtype: np.dtype = struct.field(pytree_node=False)

    rounds_sums: ClassVar[bool] = True

    def factor(self) -> jax.Array:
        return trailing(self.scale, self.ndim)

    def transposed(self) -> "FP8Tensor":
        if self.scale.ndim == self.ndim:
            return super().transposed()
        return dataclasses.replace(self, values=jnp.swapaxes(self.values, -1, -2))


@dataclasses.dataclass(frozen=True)
class FP8(Format):
    """How `quantize_fp8` is called. `rows`: a scale a row, instead of one a tensor."""

    dtype: str = "float8_e4m3fn"
    rows: bool = False

    title: ClassVar[str] = "FP8"
    tensor: ClassVar[type[Quantized]] = FP8Tensor
    native: ClassVar[float] = 8.9
    otherwise: ClassVar[str] = "by the compiler's own conversion"

    @property
    def per_tensor(self) -> bool:
        return not self.rows

    @property
    def fused(self) -> bool:
        return self == FP8(rows=True)

    def quantize(self, x, lead=0, agree=lambda amax: amax, keys=None) -> FP8Tensor:
        """x in FP8, to nearest. A tensor's scale is rounded up to a power of two."""
        if self.rows:
            return quantize_fp8(x, self.dtype, axis=-1)
        amax = agree(exact.largest_magnitude(x, tuple(range(lead, x.ndim))))
        one = functools.partial(quantize_fp8, dtype=jnp.dtype(self.dtype))
        for _ in range(lead):
            one = jax.vmap(one)
        return one(x, amax=_with_power_of_two_scale(amax, self.dtype))


@dataclasses.dataclass(frozen=True)
class FP8Pair(Format):
    """Keys and values in E4M3, one scale a head, packed as `kernels.attention_fp8` takes them."""

    tensor: ClassVar[type[Quantized]] = FP8Tensor
    tokens: ClassVar[int] = 16


def quantize_fp8(
    x: jax.Array, dtype=jnp.float8_e4m3fn, axis: int | None = None, amax: jax.Array | None = None
) -> FP8Tensor:
    """x in FP8, to nearest even: scale = amax / largest, value = x * (1 / scale), both rounded.

    The product has the same bits on every backend, unlike a quotient. It differs from
    x / scale by float32's last bit, so that a tie between two values may go the other way.

    Special cases:
      Zeros: a row, or a tensor, of zeros gets the smallest scale, 2^-126, and is 0.
      Inf, NaN: the row that has one decodes to NaN; with one scale, the whole tensor.
      Given amax: larger numbers saturate.

    Args:
      x: [..., n], bfloat16 or float32.
      dtype: float8_e4m3fn or float8_e5m2.
      axis: the axis over which numbers share a scale, such as the one that a product contracts;
        None: all of them share one.
      amax: float32, the largest magnitudes of the whole of which x is a part, such as a maximum
        over a mesh: [], or with `axis` of x's shape with 1 there. None: x's own.

    Raises:
      InputError: another dtype of x or of the result, an axis that x lacks, an empty x, an amax
        of another shape.
    """
    _validate(x, dtype, axis, amax)
    return _quantize(x, amax, jnp.dtype(dtype), axis)


@functools.partial(jax.jit, static_argnames=("dtype", "axis"))
def _quantize(x, amax, dtype, axis):
    largest = float(jnp.finfo(dtype).max)
    if amax is None:
        amax = exact.largest_magnitude(x, axis, axis is not None)
    y = exact.round_input(x)
    scale = jnp.maximum(exact.divide_by(jnp.asarray(amax, jnp.float32), largest), exact.TINY)
    inverse = jnp.where(jnp.isfinite(scale), exact.divide(jnp.float32(1), scale), jnp.nan)
    # Clipped because a conversion to float8_e4m3fn makes NaN of larger numbers.
    y = jnp.clip(y * inverse, -largest, largest)
    return FP8Tensor(values=y.astype(dtype), scale=scale, dtype=x.dtype)


def _with_power_of_two_scale(amax, dtype):
    """amax, or the next number above it whose FP8 scale is a power of two.

    A product of two such scales is exact in bfloat16, which `quant.matmul.scaled` multiplies in. At
    most one binade of the format is lost; in all others a float has the same relative precision.
    """
    largest = float(jnp.finfo(dtype).max)
    mantissa = jnp.uint32((1 << 23) - 1)
    bits = jax.lax.bitcast_convert_type(exact.divide_by(amax, largest), jnp.uint32)
    scale = jax.lax.bitcast_convert_type(bits + mantissa & ~mantissa, jnp.float32)
    enlarged = scale * largest  # exact
    return jnp.where(jnp.isfinite(amax) & jnp.isfinite(enlarged), enlarged, amax)


def _validate(x, dtype, axis, amax):
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise InputError(f"fp8: input is {x.dtype}; it must be bfloat16 or float32: cast it")
    if jnp.dtype(dtype) not in DTYPES:
        raise InputError(f"fp8: dtype {dtype}; it must be float8_e4m3fn or float8_e5m2")
    if math.prod(x.shape) == 0:
        raise InputError(f"fp8: shape {x.shape} is empty; it must hold at least one number")
    if axis is not None and not -x.ndim <= axis < x.ndim:
        raise InputError(f"fp8: axis {axis} of shape {x.shape}; it has {x.ndim} axes")
    if amax is None:
        return
    shape = (
        () if axis is None else tuple(1 if i == axis % x.ndim else n for i, n in enumerate(x.shape))
    )
    if jnp.shape(amax) != shape:
        raise InputError(
            f"fp8: amax has shape {jnp.shape(amax)}; with axis {axis} it must be {shape}"
        )
