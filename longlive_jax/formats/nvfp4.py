"""NVFP4: 4-bit floats, a scale for every 16 of them, and one number for the whole tensor.

A number is code * scale * amax / d: the code E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives),
the scale E4M3, shared by 16 values of the last axis (1-D blocks) or by 16 x 16 of the last two
(2-D blocks), amax the tensor's largest magnitude in float32. A scale rule says how a block's scale
comes from its largest magnitude. The static rules put it at code 6 or at code 4. The adaptive ones
("four over six", after the original) try both and keep the one whose dequantised values have the
smaller error over the block: the sum of squares (mse), of magnitudes (mae) or the largest
(abs_max); at a tie, 6.

Every step is rounded as the original's float32 arithmetic rounds it, on every backend (see
`exact`), so codes, scales and amax are the original's bit for bit.
"""

import dataclasses
import functools
import math
import operator
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.extend.random import threefry_2x32

from longlive_jax.errors import InputError
from longlive_jax.formats import exact
from longlive_jax.formats import hadamard as hadamard_lib
from longlive_jax.formats.tensor import Format, Quantized, trailing

BLOCK = 16
BLOCKS = ((1, BLOCK), (BLOCK, BLOCK))
CALLS = 4  # of a 64-bit generator for a block, which needs 16 bits a number
# Largest code and largest scale that a rule uses. An adaptive rule's scale grows by 1.5 where it
# picks 4, and 448, the largest E4M3 number, would leave no room for that.
RULES = {
    "static_6": (6, 448),
    "static_4": (4, 448),
    "mse": (6, 256),
    "mae": (6, 256),
    "abs_max": (6, 256),
}
ADAPTIVE = ("mse", "mae", "abs_max")
DTYPES = ("bfloat16", "float32")


@struct.dataclass
class NVFP4Tensor(Quantized):
    """An array of 4.5 bits a number.

    values: float4_e2m1fn [..., n].
    scales: float8_e4m3fn [..., n / 16], one for each 16 values; with 2-D blocks 16 rows have equal
      ones.
    amax: float32 []; [layer] and so on where tensors were stacked by `jax.vmap` or `jax.lax.scan`.
    rule, block: how it was quantised; decoding depends on the rule, too.
    dtype: of the array that was quantised, and the default of `dequantize`.
    """

    values: jax.Array
    scales: jax.Array
    amax: jax.Array
    rule: str = struct.field(pytree_node=False)
    block: tuple[int, int] = struct.field(pytree_node=False)
    dtype: np.dtype = struct.field(pytree_node=False)

    is_packed: ClassVar[bool] = True

    @functools.partial(jax.jit, static_argnames="dtype")
    def dequantize(self, dtype=None) -> jax.Array:
        """The numbers, in `dtype` (default: the tensor's own), computed in float32.

        Those below 2^-124 are 0.
        """
        groups = _split(self.values.astype(jnp.float32), -1, BLOCK)
        scaled = groups * self.scales.astype(jnp.float32)[..., None]
        # 2^-12 in both factors keeps the product finite for any amax.
        amax = trailing(self.amax, groups.ndim)
        y = exact.divide_by(scaled * 2.0**-12 * amax, _denominator(self.rule) * 2.0**-12)
        return y.reshape(self.shape).astype(self.dtype if dtype is None else dtype)

    def operand(self) -> jax.Array:
        """Codes times the scales of their blocks, bfloat16 [..., n].

        A 4-bit float times an E4M3 scale has 6 significant bits: exact in bfloat16.
        """
        blocks = self.values.astype(jnp.bfloat16).reshape(*self.scales.shape, BLOCK)
        return (blocks * self.scales.astype(jnp.bfloat16)[..., None]).reshape(self.shape)

    def factor(self) -> jax.Array:
        return trailing(self.amax / _denominator(self.rule), self.ndim)

    def codes(self) -> jax.Array:
        """uint8 [..., n]: sign << 3 | exponent << 1 | mantissa."""
        # Not a bitcast, which XLA's CPU backend cannot compile where it fuses it into a scan.
        y = self.values.astype(jnp.float32)
        return _code(jnp.abs(y), jnp.signbit(y))

    @jax.jit
    def packed(self) -> jax.Array:
        """uint8 [..., n / 2]: two codes a byte, the even column's in the low four bits."""
        if _lie_packed():
            return jax.lax.bitcast_convert_type(_split(self.values, -1, 2), jnp.uint8)
        pairs = _split(self.codes(), -1, 2)
        return pairs[..., 0] | pairs[..., 1] << 4

    def pack(self) -> "NVFP4Tensor":
        """The tensor with `packed` as its `values`."""
        return dataclasses.replace(self, values=self.packed())

    def unpack(self) -> "NVFP4Tensor":
        return from_packed(
            self.values, self.scales, self.amax, self.rule, self.block, dtype=self.dtype
        )

    @jax.jit
    def is_finite(self) -> jax.Array:
        return jnp.isfinite(self.amax).all() & jnp.isfinite(self.scales).all()

    def transposed(self) -> "NVFP4Tensor":
        if self.block != (BLOCK, BLOCK):
            return super().transposed()
        blocks = jnp.swapaxes(self.scales[..., ::BLOCK, :], -1, -2)
        scales = jnp.repeat(blocks, BLOCK, axis=-2)
        return dataclasses.replace(self, values=jnp.swapaxes(self.values, -1, -2), scales=scales)


def quantize_nvfp4(
    x: jax.Array,
    rule: str = "mse",
    block: tuple[int, int] = (1, BLOCK),
    hadamard: bool = False,
    key: jax.Array | None = None,
    amax: jax.Array | None = None,
) -> NVFP4Tensor:
    """x in NVFP4, in blocks along the last axis.

    Special cases:
      Zeros: a block whose scale rounds to 0 (all of it below amax / 2^18 or so) is 0. A tensor with
        amax below 2^-126 is all 0. There is no negative zero.
      Inf, NaN: one makes amax Inf or NaN, and the whole tensor decodes to NaN.
      Huge: any finite amax works. What decodes above it does so by float32's last bit.
      Given amax: a block above it saturates, at 448 / 256 of amax where the rule leaves that room
        and at amax where it does not; one with a NaN decodes to NaN, alone.

    Args:
      x: [..., n], bfloat16 or float32; n a multiple of 16.
      rule: a key of `RULES`.
      block: (1, 16), or (16, 16) for [..., rows, n] with rows a multiple of 16 too.
      hadamard: quantise `random_hadamard(x)`; the decoded numbers are transformed as well.
      key: round stochastically; None: to nearest even. A number between two codes becomes one of
        them, with the number as the mean, but for the bias of an adaptive rule, which compares the
        errors of the drawn codes.
      amax: float32 [], the largest magnitude of the whole of which x is a part, such as a maximum
        over a mesh; None: x's own.

    Raises:
      InputError: an unknown rule or block, a shape that blocks do not divide, another dtype, an
        amax that is not a scalar.
    """
    _validate(x, rule, block, amax)
    if hadamard:
        x = hadamard_lib.random_hadamard(x)
    return _quantize(x, amax, key, rule, tuple(block))


def quantize_each(
    x: jax.Array,
    amax: jax.Array,
    rule: str = "mse",
    block: tuple[int, int] = (1, BLOCK),
    keys: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Values and scales of tensors [n, ...] by `quantize_nvfp4`, each with its own amax [n].

    keys: [n, group, ..], to round stochastically: for tensors, and for groups that x's next axes
      count; None: to nearest.
    """

    def one(x, amax, key=None):
        q = quantize_nvfp4(x, rule, block, key=key, amax=amax)
        return q.values, q.scales

    for _ in range(0 if keys is None else keys.ndim - 1):
        one = jax.vmap(one, (0, None, 0))
    return jax.vmap(one)(x, amax, keys)


@dataclasses.dataclass(frozen=True)
class NVFP4(Format):
    """How `quantize_nvfp4` is called. `stochastic`: rounding by a key, not to nearest."""

    rule: str = "mse"
    block: tuple[int, int] = (1, BLOCK)
    hadamard: bool = False
    stochastic: bool = False

    title: ClassVar[str] = "NVFP4"
    tensor: ClassVar[type[Quantized]] = NVFP4Tensor
    native: ClassVar[float] = 10.0
    multiple: ClassVar[int] = BLOCK

    def quantize(
        self, x, lead=0, agree=lambda amax: amax, keys=None, each=quantize_each
    ) -> NVFP4Tensor:
        """x in NVFP4. `each`: does it, such as `kernels.quantize_nvfp4.quantize_each`."""
        if self.hadamard:
            x = hadamard_lib.random_hadamard(x)
        amax = agree(exact.largest_magnitude(x, tuple(range(lead, x.ndim))))
        tensors, keys = x.reshape(-1, *x.shape[lead:]), self.keys_of_each(keys, lead)
        values, scales = each(tensors, amax.reshape(-1), self.rule, self.block, keys)
        return NVFP4Tensor(
            values=values.reshape(x.shape),
            scales=scales.reshape(*x.shape[:-1], -1),
            amax=amax,
            rule=self.rule,
            block=self.block,
            dtype=x.dtype,
        )

    def keys_of_each(self, keys: jax.Array | None, lead: int) -> jax.Array | None:
        """Keys [tensor, group] of [.., group]; None without keys, or if rounding needs none."""
        if keys is None or not self.stochastic:
            return None
        return keys.reshape(-1, *keys.shape[lead:])


def seed(key: jax.Array) -> jax.Array:
    """uint32 [2]: the seed of `random_bits`, of a key of any kind."""
    return jax.random.bits(key, (2,), jnp.uint32)


def random_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint16 of a tensor's shape, of whole blocks: the noise of `quantize_nvfp4`, by rows.

    The bits of b round by (b + 1/2) / 2^16. They depend on a number's place in row-major order
    alone: in block b of 16, the call 4 b + i of Threefry-2x32 is for the numbers i, i + 4, i + 8
    and i + 12. (`jax.random.bits` makes a call for each number. Kernels make theirs themselves.)
    """
    call = jax.lax.iota(jnp.uint32, math.prod(shape) // (BLOCK // CALLS))
    words = threefry_2x32(tuple(seed(key)), jnp.concatenate([jnp.zeros_like(call), call]))
    return halves(*words.reshape(2, -1, CALLS)).reshape(shape).astype(jnp.uint16)


def halves(x: jax.Array, y: jax.Array) -> jax.Array:
    """Both words of blocks' calls, uint32 [block, CALLS] each -> 16 bits a number, [block, 16]."""
    return jnp.concatenate([x & 0xFFFF, x >> 16, y & 0xFFFF, y >> 16], axis=1)


def from_packed(
    packed: jax.Array,
    scales: jax.Array,
    amax: jax.Array,
    rule: str,
    block: tuple[int, int] = (1, BLOCK),
    dtype=jnp.bfloat16,
) -> NVFP4Tensor:
    """The inverse of `NVFP4Tensor.packed`.

    Args:
      packed: uint8 [..., n / 2].
      scales: float8_e4m3fn, or its bits as uint8, [..., n / 16] in row-major order (for the
        hardware's see `from_hardware_order`).
      amax: float32 with one number, or [layer] and so on for a stack.
      rule: the one it was quantised by: a wrong one is off by a factor of up to 1.75.

    Raises:
      InputError: an unknown rule or block, other dtypes, shapes that do not match.
    """
    shape = (*packed.shape[:-1], 2 * packed.shape[-1])
    if packed.dtype != jnp.uint8:
        raise InputError(f"nvfp4: packed codes are {packed.dtype}; they must be uint8")
    if scales.dtype not in (jnp.uint8, jnp.float8_e4m3fn):
        raise InputError(f"nvfp4: scales are {scales.dtype}; they must be float8_e4m3fn or uint8")
    _validate_layout(shape, rule, block)
    if scales.shape != (*shape[:-1], shape[-1] // BLOCK):
        raise InputError(
            f"nvfp4: scales of shape {scales.shape} beside codes for {shape}; they must be "
            f"{(*shape[:-1], shape[-1] // BLOCK)}, in row-major order"
        )
    amax = jnp.asarray(amax, jnp.float32)
    if amax.shape != shape[: amax.ndim]:
        if amax.size != 1:
            raise InputError(f"nvfp4: amax of shape {amax.shape} beside codes for {shape}")
        amax = amax.reshape(())
    if _lie_packed():
        values = jax.lax.bitcast_convert_type(packed, jnp.float4_e2m1fn).reshape(shape)
    else:
        values = _values(jnp.stack([packed & 15, packed >> 4], axis=-1).reshape(shape))
    if scales.dtype == jnp.uint8:
        scales = jax.lax.bitcast_convert_type(scales, jnp.float8_e4m3fn)
    return NVFP4Tensor(
        values=values,
        scales=scales,
        amax=amax,
        rule=rule,
        block=(block[0], block[1]),
        dtype=jnp.dtype(dtype),
    )


def to_hardware_order(scales: jax.Array) -> jax.Array:
    """Scales [rows, columns] in row-major order -> flat, as in the original's files.

    Padded with zeros to whole tiles of 128 rows by 4 columns. In a tile, as tensor cores want it,
    the rows r, r + 32, r + 64 and r + 96 lie side by side, 4 columns each.
    """
    rows, columns = scales.shape
    scales = jnp.pad(scales, ((0, -rows % 128), (0, -columns % 4)))
    tiles = scales.reshape(-(-rows // 128), 4, 32, -(-columns // 4), 4)
    return tiles.transpose(0, 3, 2, 1, 4).reshape(-1)


def from_hardware_order[A: (jax.Array, np.ndarray)](flat: A, rows: int, columns: int) -> A:
    """The inverse of `to_hardware_order`: scales [rows, columns], the padding cut off.

    Raises:
      InputError: `flat` has another size than `rows` by `columns`, padded.
    """
    down, across = -(-rows // 128), -(-columns // 4)
    if flat.size != down * across * 512:
        raise InputError(
            f"nvfp4: {flat.size} scales in hardware order; {rows} rows of {columns}, in tiles of "
            f"128 x 4, are {down * across * 512}"
        )
    tiles = flat.reshape(down, across, 32, 4, 4).transpose(0, 3, 2, 1, 4)
    return tiles.reshape(down * 128, across * 4)[:rows, :columns]


@functools.partial(jax.jit, static_argnames=("rule", "block"))
def _quantize(x, amax, key, rule, block):
    shape, dtype = x.shape, x.dtype
    x = exact.round_input(x)
    amax = exact.largest_magnitude(x) if amax is None else jnp.asarray(amax, jnp.float32)
    # XLA multiplies constants first: it must not see that an amax is one.
    amax = jax.lax.optimization_barrier(amax)
    # Scaled by a power of two so that amax is in [2, 4): no step under- or overflows, and no
    # rounding changes.
    biased = exact.exponent(amax)
    usable = (biased > 0) & (biased < 255)
    unit = exact.power_of_two(jnp.clip(255 - biased, 1, 254))
    scaled_amax = jnp.where(usable, amax * unit, 2.0)
    # [..., rows / r, r, n / 16, 16], with blocks along the axes -3 and -1.
    x = _split(jnp.atleast_2d(x * unit), -1, BLOCK)
    x = _split(x, -3, block[0])
    noise = None
    if key is not None:
        # Uniform in (0, 1), in steps of 2^-16: finer than any use of 4-bit numbers can resolve.
        noise = (random_bits(key, x.shape).astype(jnp.float32) + 0.5) * 2.0**-16
    largest_code, _ = RULES[rule]
    encode = exact.divide(jnp.float32(_denominator(rule)), scaled_amax)
    decode = exact.divide(jnp.float32(1), encode)
    largest = exact.largest_magnitude(x, (-3, -1), keepdims=True)
    wanted = largest / 4 if largest_code == 4 else exact.divide_by(largest, 6)
    wanted = jnp.where(usable, wanted * encode, 0.0)

    codes, scale = _candidate(x, wanted, decode, noise)
    if rule in ADAPTIVE:
        # 1.5 times the scale puts the block's largest magnitude at code 4.
        codes_4, scale_4 = _candidate(x, wanted * 1.5, decode, noise)
        error = _error(x, codes, scale, scaled_amax, rule)
        four = _error(x, codes_4, scale_4, scaled_amax, rule) < error
        codes, scale = jnp.where(four, codes_4, codes), jnp.where(four, scale_4, scale)

    # From blocks back to rows, one axis at a time, as `_split`.
    rows = (*shape[:-1], shape[-1] // BLOCK, BLOCK)
    scales = jnp.broadcast_to(scale.squeeze(-1).astype(jnp.float8_e4m3fn), x.shape[:-1])
    return NVFP4Tensor(
        values=_values(_code(codes, (x < 0) & (codes > 0)).reshape(rows).reshape(shape)),
        scales=scales.reshape(rows[:-1]),
        amax=amax,
        rule=rule,
        block=block,
        dtype=dtype,
    )


def _candidate(x, wanted, decode, noise):
    """Magnitudes of the codes, and the scale, for a block's scale before its rounding: float32."""
    scale = exact.round_to(wanted, mantissa_bits=3, min_exponent=-6, largest=448.0)
    # A zero scale has no inverse; its block is 0.
    inverse = exact.divide(jnp.float32(1), jnp.where(scale > 0, decode * scale, 1.0))
    codes = exact.round_to(jnp.abs(x) * inverse, 1, 0, 6.0, noise)
    return jnp.where(scale > 0, codes, 0.0), scale


def _error(x, codes, scale, amax, rule):
    """A block's error. x here is scaled as amax is."""
    y = exact.divide_by(codes * scale * amax, _denominator(rule))
    error = jnp.abs(y - jnp.abs(x))
    if rule == "abs_max":
        return jnp.max(error, axis=(-3, -1), keepdims=True)
    # The floor is far below what can matter here. It stands between the square and the sum, which
    # could otherwise be contracted.
    return _sum(error if rule == "mae" else jnp.maximum(error * error, exact.TINY))


def _sum(x):
    """Sum over the axes -3 and -1, in the order of the original: near-ties depend on it.

    Vectors of 8 numbers go round robin to 4 (one-row blocks: 2) accumulators; then accumulators are
    added, then the 8 lanes.
    """
    x = _split(_split(x, -1, 8), -4, min(x.shape[-3], 2))
    x = _add(x[..., i, :, :, :, :] for i in range(x.shape[-5]))
    x = _add(x[..., i, :, j, :] for i in range(x.shape[-4]) for j in range(2))
    return _add(x[..., i] for i in range(8))[..., None, :, None]


def _split(x, axis, size):
    """x with `axis`, counted from the end, split in two, the second of `size`.

    One axis at a time, so that shardings carry over.
    """
    at = x.ndim + axis
    return x.reshape(*x.shape[:at], x.shape[at] // size, size, *x.shape[at + 1 :])


def _add(terms):
    return functools.reduce(operator.add, terms)


def _denominator(rule):
    code, scale = RULES[rule]
    return code * scale


def _code(magnitude, negative):
    """uint8 codes of E2M1 numbers: from 1 up, they are a float32's bits from the 22nd on."""
    high = (jax.lax.bitcast_convert_type(magnitude, jnp.uint32) >> 22) - 252
    code = jnp.where(magnitude >= 1, high, (magnitude == 0.5).astype(jnp.uint32))
    return (code | negative.astype(jnp.uint32) << 3).astype(jnp.uint8)


def _values(codes):
    return jax.lax.bitcast_convert_type(codes.astype(jnp.uint4), jnp.float4_e2m1fn)


def _lie_packed():
    """Whether the default backend keeps two 4-bit floats a byte: packing is free there."""
    return jax.default_backend() == "gpu"


def _validate(x, rule, block, amax):
    if x.dtype not in DTYPES:
        raise InputError(f"nvfp4: input is {x.dtype}; it must be {' or '.join(DTYPES)}: cast it")
    if amax is not None and jnp.shape(amax) != ():
        raise InputError(
            f"nvfp4: amax has shape {jnp.shape(amax)}; it must be one number: map over stacks with "
            "jax.vmap"
        )
    _validate_layout(x.shape, rule, block)


def _validate_layout(shape, rule, block):
    if rule not in RULES:
        raise InputError(f"nvfp4: unknown rule {rule!r}; rules: {', '.join(RULES)}")
    if tuple(block) not in BLOCKS:
        raise InputError(f"nvfp4: block {block} must be one of {BLOCKS}")
    if 0 in shape:
        raise InputError(f"nvfp4: shape {shape} is empty; it must hold at least one block")
    if not shape or shape[-1] % BLOCK:
        raise InputError(
            f"nvfp4: shape {shape} must end in a multiple of {BLOCK}; pad the last axis with zeros"
        )
    if block[0] == BLOCK and (len(shape) < 2 or shape[-2] % BLOCK):
        raise InputError(
            f"nvfp4: shape {shape} in {BLOCK} x {BLOCK} blocks must have a multiple of {BLOCK} "
            f"rows; pad them with zeros or use block (1, {BLOCK})"
        )
