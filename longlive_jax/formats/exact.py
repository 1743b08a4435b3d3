"""Float32 arithmetic that has the same bits on every backend, in every fusion.

XLA may turn a division by a constant into a product with its reciprocal, divides on GPUs with an
error of two units in the last place, and lets LLVM contract a product and the sum it feeds into one
rounding. Bit-exact formats can allow none of that. So quotients here are computed in integers, and
the callers follow two rules: a rounded product never feeds a sum directly, and every other product
that does is exact (one factor is a power of two).
"""

import jax
import jax.numpy as jnp

_IMPLICIT = 1 << 23  # a normal float32's leading bit
TINY = 2.0**-126  # smallest normal float32: XLA's CPU backend flushes smaller ones to 0


def exponent(x: jax.Array) -> jax.Array:
    """Biased exponent of |x|, uint32: 0 for zero and subnormals, 255 for Inf and NaN."""
    return (_bits(x) >> 23) & 0xFF


def power_of_two(biased: jax.Array) -> jax.Array:
    """2^(biased - 127) from a biased exponent of 1 to 254."""
    return _float(biased.astype(jnp.uint32) << 23)


def divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b, rounded once to nearest. Both positive and normal, with a normal quotient.

    The hardware's quotient is a guess; the remainder, an integer that is small enough to be exact
    modulo 2^32, corrects it. A quotient of two float32 is never halfway between two float32.
    """
    over, under = _mantissa(a), _mantissa(b)
    less = over < under
    shift = jnp.where(less, jnp.uint32(24), jnp.uint32(23))
    ratio = over.astype(jnp.float32) / under.astype(jnp.float32)
    guess = (ratio * jnp.where(less, 2.0**24, 2.0**23)).astype(jnp.uint32) - 3
    rest = (over << shift) - guess * under
    quotient = guess + (2 * rest + under) // (2 * under)
    biased = exponent(a) - exponent(b) + 127 - less.astype(jnp.uint32)
    return _float((biased << 23) + quotient - _IMPLICIT)


def divide_by(x: jax.Array, divisor: float) -> jax.Array:
    """x / divisor, rounded once to nearest; results below 2^-126 are 0.

    `divisor` is a constant n * 2^k with n one of 3, 5, ... 127. Inf and NaN stay what they are.
    """
    odd, twos = _odd_part(divisor)
    mantissa, biased = _mantissa(x), exponent(x).astype(jnp.int32)
    # Shifted so that the quotient has 24 bits. It is never halfway: the divisor is odd.
    most = odd.bit_length()
    shift = most - (mantissa >= odd << (24 - most)).astype(jnp.uint32)
    quotient = ((mantissa << shift) + odd // 2) // odd
    biased_quotient = biased - shift.astype(jnp.int32) - twos
    bits = (biased_quotient.astype(jnp.uint32) << 23) + quotient - _IMPLICIT
    y = _float(bits | (_bits(x) & jnp.uint32(1 << 31)))
    return jnp.where(biased == 255, x, jnp.where((biased > 0) & (biased_quotient > 0), y, 0.0))


def round_to(
    x: jax.Array, mantissa_bits: int, min_exponent: int, largest: float, noise=None
) -> jax.Array:
    """x >= 0 on the grid of a small float format, saturated at its `largest` number. NaN stays NaN.

    To nearest, ties to even; with `noise`, uniform in (0, 1), up with a probability that is x's
    distance from the number below. `min_exponent`: the smallest normal number's.
    """
    x = jnp.minimum(x, largest)
    biased = jnp.maximum(exponent(x), jnp.uint32(127 + min_exponent))
    step = power_of_two(biased - mantissa_bits)
    steps = x * power_of_two(254 + mantissa_bits - biased)
    return (jnp.round(steps) if noise is None else jnp.floor(steps + noise)) * step


def largest_magnitude(
    x: jax.Array, axis: int | tuple[int, ...] | None = None, keepdims: bool = False
) -> jax.Array:
    """float32: the largest of |x|, bfloat16 or float32, over these axes; NaN where x has one.

    By the bits, which order as integers as magnitudes do, with NaN above all: XLA's CPU backend
    loses NaN in a maximum of float32 magnitudes.
    """
    unsigned = jnp.uint16 if x.dtype == jnp.bfloat16 else jnp.uint32
    bits = jax.lax.bitcast_convert_type(x, unsigned) & unsigned(jnp.iinfo(unsigned).max >> 1)
    bits = jnp.max(bits, axis=axis, keepdims=keepdims)
    return jax.lax.bitcast_convert_type(bits, x.dtype).astype(jnp.float32)


def round_input(x: jax.Array) -> jax.Array:
    """float32 of x, bfloat16 or float32, with the rounding to x's own dtype made explicit.

    XLA may drop a pair of conversions, float32 to bfloat16 and back, and quantise numbers that x
    never had. So bfloat16 is widened by its bits. (With `lax.reduce_precision` XLA would keep x in
    memory in float32.)
    """
    if x.dtype != jnp.bfloat16:
        return x.astype(jnp.float32)
    return _float(jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16)


def _bits(x):
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _float(bits):
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _mantissa(x):
    """The 24 bits of a normal float32's significand."""
    return (_bits(x) & (_IMPLICIT - 1)) | _IMPLICIT


def _odd_part(divisor: float) -> tuple[int, int]:
    """(n, k) with divisor == n * 2^k and n odd."""
    n, denominator = float(divisor).as_integer_ratio()
    k = 1 - denominator.bit_length()
    while n % 2 == 0:
        n, k = n // 2, k + 1
    return n, k
