"""Shared by the NVFP4 kernels: blocks of 16 numbers of bfloat16, one a thread, on Hopper.

A thread owns whole blocks of 16 numbers, so that nothing is exchanged between threads; arrays here
are [blocks, columns], a block a row. Compares, selects and integer operations run at half the rate
of products and sums on this chip, and at 16 numbers a block they, not memory, set the speed. Hence:

- Tables replace the oracle's divisions. An E4M3 scale is one of eight mantissas times a
  power of two, which a quotient and its rounding pass through: eight inverses and eight decoded
  ones and one-and-a-halfs per tensor, divided exactly before, are all that blocks ever need.
- A number is rounded to the grid by adding a large constant of the grid's exponent and taking it
  away. The constant is such that its sum, in bits, holds the code.
- Rounded stochastically, a number is floored by dropping the bits below its code's: what is below
  1, where the grid is even, is first moved to where bits are a code, too.
- Mosaic GPU contracts a product and the sum that it feeds. As in `formats.exact`, such products
  are exact here, or a minimum or maximum stands between.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.errors import InputError
from longlive_jax.formats import exact, nvfp4
from longlive_jax.kernels import mosaic

ROWS = 128  # blocks that a warpgroup of 128 threads takes together, one a thread
NAN = 0x7F  # E4M3's

_MANTISSAS = 1 + np.arange(8, dtype=np.float32) / 8
_EXPONENT = 0x7F800000
_BYTES = (0, 8, 16, 24)
# 1 / 6 in two parts. The first has 15 bits, so that its product with a bfloat16 is exact, and the
# sum of both products is rounded once: to RN(b / 6), as fractions of a third are no near-ties. Both
# are positive: of an infinity they make one.
_SIXTH = (21845 / 2**17, float(np.float32(1 / 6 - 21845 / 2**17)))
# Large constants for a grid of exponent 0. Of their sum with a number the bits are, below a float's
# exponent E, the number in steps of the grid and an even offset, so that ties go where they would.
# The offset is such that, with the bits from the 22nd (E4M3: 20th) on added, which are 2 E (8 E),
# the low 16 (8) bits are the code.
_E2M1 = 2.0**22 + (2**16 - 2 * 149) / 2
_E4M3 = 2.0**20 + (5 * 2**8 - 8 * 141) / 8
# A float32 of this exponent has 16 bits of noise at its end. Less the second number, it is half
# the oracle's noise, exactly.
_NOISE = (0x42800000, 64 - 2.0**-18)
# Almost a half, so that no sum of it and half a number below 0.5 or 1 is rounded to 0.75 or 1.
_LOWEST = 0.5 - 2.0**-25
_UPPER = np.uint32(0xFFC00000)  # sign, exponent and E2M1's one bit of mantissa
_ZERO = 252  # the code 0 in those bits, from the 22nd on


def fills(numbers: int, groups: int = 1) -> bool:
    """Whether the blocks of `numbers` numbers, in groups of equal size, fill whole programs."""
    return numbers % (groups * ROWS * nvfp4.BLOCK) == 0 < numbers


def validate(x: jax.Array, rule: str, seeds: jax.Array | None) -> int:
    """The number of groups of x: one for each seed, or one.

    Raises:
      InputError: x of another dtype, an unknown rule, seeds of another dtype or shape.
    """
    if x.dtype != jnp.bfloat16:
        raise InputError(f"nvfp4 kernel: input is {x.dtype}; it must be bfloat16: cast it")
    if rule not in nvfp4.RULES:
        raise InputError(f"nvfp4: unknown rule {rule!r}; rules: {', '.join(nvfp4.RULES)}")
    if seeds is None:
        return 1
    if seeds.dtype != jnp.uint32 or seeds.ndim != 2 or seeds.shape[1] != 2 or len(seeds) == 0:
        raise InputError(
            f"nvfp4 kernel: seeds are {seeds.dtype} {seeds.shape}; they must be uint32 [group, 2]: "
            "threefry.seeds of a key for each group"
        )
    return len(seeds)


def constants_and(seeds: jax.Array | None, amax: jax.Array, rule: str, interpret) -> list:
    """A kernel's arguments besides x: `constants`, and seeds if there are any."""
    return [constants(amax, rule, interpret), *([] if seeds is None else [seeds])]


@functools.partial(jax.jit, static_argnames=("rule", "interpret"))
def constants(
    amax: jax.Array, rule: str, interpret: plgpu.InterpretGPUParams | None = None
) -> jax.Array:
    """The constants of blocks, by the tensor's largest magnitude: float32 [26].

    A power of two that takes amax to [2, 4), the tensor's scale, three tables. By a block scale's
    mantissa: its inverse, and what the codes of 1 and 1.5 decode to. An amax that scales nothing
    (0, Inf, NaN) has the tensor scale 0.

    A kernel of one program: XLA takes seconds a call to compile the quotients' integers. (Mosaic
    GPU's own quotient is off by up to two units in the last place.)
    """
    return plgpu.kernel(
        functools.partial(_constants_body, denominator=float(np.prod(nvfp4.RULES[rule]))),
        out_type=jax.ShapeDtypeStruct((2 + 3 * len(_MANTISSAS),), jnp.float32),
        grid=(1,),
        grid_names=("program",),
        kernel_name="quantize_nvfp4_tables",
        # Of scalars, the other lowering does not take bits.
        compiler_params=mosaic.LANE,
        interpret=interpret,
    )(amax.reshape(1))


def _constants_body(amax_ref, out_ref, *, denominator):
    amax = amax_ref[0]
    biased = exact.exponent(amax)
    usable = (biased > 0) & (biased < 255)
    unit = exact.power_of_two(jnp.clip(255 - biased, 1, 254))
    scaled_amax = jnp.where(usable, amax * unit, 2.0)
    encode = exact.divide(jnp.float32(denominator), scaled_amax)
    decode = exact.divide(jnp.float32(1), encode)
    inverse = [exact.divide(jnp.float32(1), m * decode) for m in _MANTISSAS]
    decoded = [
        exact.divide_by(half * m * scaled_amax, denominator)
        for half in (1.0, 1.5)
        for m in _MANTISSAS
    ]
    for i, value in enumerate([unit, jnp.where(usable, encode, 0.0), *inverse, *decoded]):
        mosaic.store(out_ref.at[i], value)


def thread() -> jax.Array:
    """uint32 [ROWS, 1]: the number of each thread of a warpgroup, in its row."""
    layout = mosaic.a_row_a_thread(1)
    return plgpu.broadcasted_iota(jnp.uint32, (ROWS, 1), 0, layout=layout)


def quantize_blocks(
    x: jax.Array, noise: jax.Array | None = None, *, constants_ref, rule: str
) -> tuple[jax.Array, jax.Array]:
    """A block a thread: for the bodies of kernels.

    Args:
      x: float32 [rows, 16] with a register for each number.
      noise: uint32 [rows, 16], of 16 bits, to round stochastically.
      constants_ref: `constants`, in memory. They are read anew each time, by way of the cache:
        registers are scarce.

    Returns:
      codes uint8 [rows, 8], in registers of 8, scales uint8 [rows, 1].
    """
    unit, encode, *tables = (constants_ref[i] for i in range(26))
    tables = tables[:8], tables[8:16], tables[16:]
    if noise is not None:
        noise = _float(noise | np.uint32(_NOISE[0])) - _NOISE[1]
    words, scales = _quantize(x, noise, unit, encode, tables, rule)
    codes = [(word >> shift & 255).astype(jnp.uint8) for word in words for shift in _BYTES]
    codes = plgpu.layout_cast(jnp.concatenate(codes, axis=1), mosaic.a_row_a_thread(8))
    return codes, scales.astype(jnp.uint8)


def _quantize(x, noise, unit, encode, tables, rule):
    """float32 [rows, 16] -> the codes in two words, and scales: uint32 [rows, 1] each."""
    magnitude = jnp.abs(x) * unit
    largest = fold(jnp.maximum, magnitude)
    if nvfp4.RULES[rule][0] == 4:
        wanted = largest * 0.25
    else:
        wanted = largest * _SIXTH[0] + largest * _SIXTH[1]
    encode = jnp.broadcast_to(encode, wanted.shape)  # a scalar condition does not lower
    wanted = jnp.where(encode > 0, wanted * encode, 0.0)
    sums, scale_sums, scale, error = _candidate(magnitude, noise, wanted, tables, rule)
    if rule in nvfp4.ADAPTIVE:
        sums_4, scale_sums_4, scale_4, error_4 = _candidate(
            magnitude, noise, wanted * 1.5, tables, rule
        )
        assert error_4 is not None and error is not None  # of an adaptive rule
        four = error_4 < error
        sums = jnp.where(_wide(four), sums_4, sums)
        scale_sums = jnp.where(four, scale_sums_4, scale_sums)
        scale = jnp.where(four, scale_4, scale)

    bits = _bits(sums)
    codes = bits + (bits >> 22) if noise is None else bits >> 22
    offset = np.uint32(0 if noise is None else _ZERO * 0x1111)
    codes, signs = columns(codes), columns(_bits(x))
    words = []
    for i in (0, 8):
        # Bits above a code's four bits are above the bits of four codes, too.
        low, high = (functools.reduce(_append, codes[j : j + 4][::-1]) - offset for j in (i, i + 4))
        word = low & 0xFFFF | high << 16
        tops = functools.reduce(_append, [sign >> 28 for sign in signs[i : i + 8][::-1]])
        # A sign is a code's highest bit; 0 has none: only with 7 added a code reaches that bit.
        word = word | tops & (word + 0x77777777) & np.uint32(0x88888888)
        words.append(jnp.where(scale > 0, word, 0))
    bits = _bits(scale_sums)
    return words, jnp.where(scale == scale, (bits + (bits >> 20)) & 255, NAN)


def _candidate(magnitude, noise, wanted, tables, rule):
    """Codes and scales, as their sums with the large constants; scales; errors (adaptive rules).

    With noise, the numbers returned for codes have the codes as their upper bits.

    wanted: float32 [rows, 1], the blocks' scales before their rounding.
    """
    inverses, ones, one_and_a_halfs = tables
    wanted = jnp.minimum(wanted, 448.0)
    large = _power(jnp.maximum(wanted, 2.0**-6)) * _E4M3
    scale_sums = wanted + large
    scale = scale_sums - large
    bits = _bits(scale)
    power = bits & _EXPONENT
    inverse = _pick(inverses, bits) * _float((254 << 23) - power)
    # A zero scale has no inverse; its block is 0.
    inverse = jnp.where(scale > 0, inverse, 0.0)

    y = jnp.minimum(magnitude * _wide(inverse), 6.0)
    grid = _power(jnp.maximum(y, 1.0))
    if noise is None:
        large = grid * _E2M1
        sums = y + large
    else:
        sums = _lift(y + noise * grid)  # an exact product: noise has 17 bits
    if rule not in nvfp4.ADAPTIVE:
        return sums, scale_sums, scale, None
    if noise is None:
        value = sums - large
    else:
        value = _floor(sums)
    # A code's number is a power of two or, then `grid` is that, one and a half times one.
    one, one_and_a_half = (
        _wide(_pick(table, bits) * _float(power)) for table in (ones, one_and_a_halfs)
    )
    half = (_bits(value) & 0x400000) > 0
    error = jnp.where(half, grid * one_and_a_half, value * one) - magnitude
    if rule == "abs_max":
        return sums, scale_sums, scale, fold(jnp.maximum, jnp.abs(error))
    if rule == "mse":
        # A square of which the compiler does not know that it is one: it must not go into the sum
        # unrounded, and the outer magnitude, which is free, keeps it from that. (The oracle has a
        # maximum with 2^-126 there. Errors that differ between candidates are far above it.)
        error = error * jnp.abs(error)
    error = jnp.abs(error)
    error = columns(error[:, :8] + error[:, 8:])
    return sums, scale_sums, scale, functools.reduce(operator.add, error)


def _lift(x):
    """x, but what is below 1 as (x + 1) / 2: a code is then upper bits, less `_ZERO`.

    x in [2^-18, 7): noise is at least so much.
    """
    return jnp.maximum(x, x * 0.5 + _LOWEST)


def _floor(lifted):
    """The number of the code."""
    x = _float(_bits(lifted) & _UPPER)
    return jnp.minimum(x, x * 2 - 1)


def _append(word, code):
    return (word << 4) + code


def _pick(table, bits):
    """The number of a table of eight by the upper three bits of a float32's mantissa."""
    for i in range(3):
        bit = (bits & (1 << 20 + i)) > 0
        table = [jnp.where(bit, odd, even) for even, odd in zip(table[::2], table[1::2])]
    return table[0]


def fold(operation, x: jax.Array) -> jax.Array:
    """[rows, 2^k] -> [rows, 1]: over the columns, whose order must not matter."""
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        x = operation(x[:, :half], x[:, half:])
    return x


def columns(x: jax.Array) -> list[jax.Array]:
    """[rows, n] -> n arrays [rows, 1]."""
    return [x[:, i : i + 1] for i in range(x.shape[1])]


def _wide(x):
    """[rows, 1] -> [rows, 16]."""
    return jnp.concatenate([x] * nvfp4.BLOCK, axis=1)


def _power(x):
    """The power of two at or below a positive normal x."""
    return _float(_bits(x) & _EXPONENT)


def _bits(x):
    return lax.bitcast_convert_type(x, jnp.uint32)


def _float(bits):
    return lax.bitcast_convert_type(bits, jnp.float32)
