"""Attention in FP8 over FP8 keys and values in place, on Hopper.

Softmax is float32, with a running maximum and sum, in one pass over the keys. These are rounded,
besides the given keys and values:

  q     to E4M3, one scale a token and head.
  P     the probabilities, to E4M3: 2^8 times exp(logit - running maximum), so that the largest is
        256 of E4M3's 448 and all down to 2^-14 of it have three bits of fraction.
  out   a slot's share of it, to bfloat16, before the next slot's is added.

E4M3 puts an error of 2.6 % on a channel of keys or values whatever its size. Errors of q and k add
up to 3.7 % of a logit's typical size, which peaked logits amplify to 6 % of an output. (8-bit
integers behind a Hadamard transform of q and k would have errors of 1 %.)

How they are stored. The second product contracts tokens and wants them contiguous: values are
[head, head_dim, token]. It also wants the probabilities of 16 tokens in another order than the
first product leaves them in registers; the order of keys being free, the keys' tokens are permuted
instead. `pack` does both, once, when they are stored, and no register moves between lanes.

The tensor cores keep 13 bits of an FP8 sum, cut at every instruction: summed there over 28,160
keys, outputs are 1.4 % too small (H200). So they sum a slot's keys only, a quarter of that, and
slots are summed outside, in bfloat16: float32 would not fit, registers are all but used up.

`attention` has a program's structure and the compiler's constraints, `ops.cached_attention` the
oracle and the fallback.
"""

import dataclasses
import functools
import operator
import types

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from longlive_jax.errors import InputError
from longlive_jax.formats import FP8Tensor
from longlive_jax.kernels import attention as shared
from longlive_jax.kernels import mosaic
from longlive_jax.kernels.attention import HEAD_DIM, LOG2_SCALE, QUERIES, ROWS, TILE

E4M3 = jnp.dtype(jnp.float8_e4m3fn)
LARGEST = 448.0  # E4M3's
TINY = 2.0**-100  # least magnitude of a query row that gets a scale of its own
GAIN = 8.0  # log2 of what probabilities are multiplied by


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the kernel is scheduled; results do not depend on it.

    stages: tiles of keys and of values in shared memory, 2 to 5.
    """

    stages: int = 4


def pack(k: FP8Tensor, v: FP8Tensor) -> tuple[FP8Tensor, FP8Tensor]:
    """Keys and values [..., token, head, head_dim], scale [..., 1, head, 1], as they are stored.

    Returns:
      k of the same shape, its tokens permuted, and v [..., head, head_dim, token], scale
      [..., head, 1, 1].

    Raises:
      InputError: tokens that are not a multiple of 16.
    """
    values, scale = jnp.moveaxis(v.values, -3, -1), jnp.swapaxes(v.scale, -3, -2)
    v = dataclasses.replace(v, values=values, scale=scale)
    return dataclasses.replace(k, values=pack_keys(k.values)), v


def pack_keys(k: jax.Array) -> jax.Array:
    """[..., token, head, head_dim]: of every 16 tokens the order becomes 0 1 4 5 8 9 12 13 2 3 ..

    Raises:
      InputError: tokens that are not a multiple of 16.
    """
    return _permute(k, (4, 2))


def unpack_keys(k: jax.Array) -> jax.Array:
    """The inverse of `pack_keys`."""
    return _permute(k, (2, 4))


def unpack_values(v: jax.Array) -> jax.Array:
    """Stored values [..., head, head_dim, token] as [..., token, head, head_dim]."""
    return jnp.moveaxis(v, -1, -3)


def _permute(x, split):
    """Pairs of tokens, in every 16 a matrix of `split`, transposed."""
    *lead, tokens, heads, head_dim = x.shape
    if tokens % 16:
        raise InputError(f"attention_fp8: {tokens} tokens; they must be a multiple of 16")
    pairs = x.reshape(*lead, tokens // 16, *split, 2, heads, head_dim)
    return jnp.swapaxes(pairs, -5, -4).reshape(x.shape)


def supports(
    q: jax.Array, k: FP8Tensor, v: FP8Tensor, past_k: FP8Tensor, past_v: FP8Tensor
) -> bool:
    """Whether the kernel takes these: bfloat16 queries, local, in whole tiles, on a Hopper GPU."""
    return shared.supports(q, k.shape[1])


def kernel(
    q: jax.Array,
    k: FP8Tensor,
    v: FP8Tensor,
    past_k: FP8Tensor,
    past_v: FP8Tensor,
    layer: jax.Array,
    filled: jax.Array,
    tuning: Tuning = Tuning(),
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """The kernel itself, on one device's arrays (on a mesh: in a manual `jax.shard_map`).

    Args:
      q: bfloat16 [row, query, head, 128], queries a multiple of 128.
      k, v: the chunk's, packed (`pack`), in E4M3, tokens a multiple of 128: k [row, token, head,
        128], scale [row, 1, head, 1]; v [row, head, 128, token], scale [row, head, 1, 1].
      past_k, past_v: the cache's, packed: [layer, row, slot, ...] of the same.
      layer: int32 [], the layer to read.
      filled: int32 [row], how many of its slots are visible, from the first. Others are not read.
      interpret: run on the CPU, by JAX's interpreter.

    Returns:
      bfloat16 [row, query, head, 128].

    Raises:
      InputError: other numbers of queries, tokens or channels.
    """
    layers, rows, slots, tokens, heads = past_k.shape[:5]
    shared.validate("attention_fp8", q.shape, tokens)
    at_layer = functools.partial(lax.dynamic_index_in_dim, index=layer, keepdims=False)
    k_scale = jnp.concatenate(
        [k.scale.reshape(rows, 1, heads), at_layer(past_k.scale)[:, :, 0, :, 0]], axis=1
    )
    v_scale = jnp.concatenate(
        [v.scale.reshape(rows, 1, heads), at_layer(past_v.scale)[..., 0, 0]], axis=1
    )
    body = functools.partial(
        _body, tiles=tokens // TILE, slots=slots, tuning=tuning, interpret=interpret
    )
    scratch = _scratch(q.dtype, tuning, interpret)
    run = shared.program("attention_fp8", body, q, scratch, interpret)
    return run(
        q,
        k.values,
        v.values.reshape(rows * heads, HEAD_DIM, tokens),
        past_k.values.reshape(layers * rows * slots, tokens, heads, HEAD_DIM),
        past_v.values.reshape(layers * rows * slots * heads, HEAD_DIM, tokens),
        k_scale,
        v_scale,
        shared.place(layer, filled),
    )


def _scratch(dtype, tuning, interpret):
    stages = tuning.stages
    operand = functools.partial(plgpu.SMEM, transforms=mosaic.rows_of_128_bytes(E4M3))
    return {
        "io": plgpu.SMEM((2, ROWS, HEAD_DIM), dtype),
        "queries": operand((2, ROWS, HEAD_DIM), E4M3),
        "keys": operand((stages, TILE, HEAD_DIM), E4M3),
        "values": operand((stages, HEAD_DIM, TILE), E4M3),
        # On the GPU probabilities stay in registers, which the interpreter cannot multiply.
        "probabilities": None if interpret is None else operand((2, ROWS, TILE), E4M3),
        **shared.barriers(tuning),
    }


def _body(
    q, k, v, past_k, past_v, k_scale, v_scale, place, out, *, tiles, slots, tuning, interpret,
    **smem
):  # fmt: skip
    """One program: 128 queries of one head. Two warpgroups multiply, the third fetches."""
    smem = types.SimpleNamespace(**smem)
    row, head, block = (lax.axis_index(name) for name in ("row", "head", "block"))
    warpgroup = lax.axis_index("warpgroup")
    first, filled = (place[0] + row) * slots, place[1 + row]

    @pl.when(warpgroup == 2)
    def fetch():
        plgpu.set_max_registers(24, action="decrease")

        def tile(k, v, row, n):
            keys = pl.ds(n * TILE, TILE)
            return k.at[row, keys, head], v.at[row * q.shape[2] + head, :, keys]

        chunk, cache = (k, v, row), (past_k, past_v, first)
        shared.send_window(smem, tuning.stages, tiles, filled, tile, chunk, cache)

    @pl.when(warpgroup < 2)
    def multiply():
        plgpu.set_max_registers(240, action="increase")
        mine = (row, pl.ds(block * QUERIES + warpgroup * ROWS, ROWS), head)
        logits_scale = _load_queries(q.at[mine], smem, warpgroup)
        steps = _Steps(smem, warpgroup, tuning, interpret)
        total, mass = steps.over_window(
            lambda slot: (logits_scale * k_scale[row, slot, head], v_scale[row, slot, head]),
            tiles,
            1 + filled,
        )
        total = total * shared.wide(1 / mass, HEAD_DIM)
        shared.write(total, smem.io.at[warpgroup], out.at[mine])


def _load_queries(q, smem, warpgroup):
    """Leaves this warpgroup's queries in shared memory as codes. Returns the scale of each row."""
    plgpu.copy_gmem_to_smem(q, smem.io.at[warpgroup], smem.q_here.at[warpgroup])
    plgpu.barrier_wait(smem.q_here.at[warpgroup])
    x = plgpu.load(smem.io.at[warpgroup], layout=plgpu.Layout.WGMMA_8BIT).astype(jnp.float32)
    amax = jnp.maximum(jnp.max(jnp.abs(x), axis=1), TINY)
    x = x * shared.wide(LARGEST / amax, HEAD_DIM)
    smem.queries[warpgroup] = x.astype(E4M3)
    plgpu.commit_smem()
    return plgpu.layout_cast(amax, plgpu.Layout.WGMMA.reduce(1)) * (LOG2_SCALE / LARGEST)


class _Steps(shared.Steps):
    """A warpgroup's work on the tiles of keys and values."""

    def over_window(self, scales, tiles, slots):
        """All tiles of the chunk and of the cache. Returns total and mass.

        scales: slot -> of its logits, [64], and of its values.
        """
        scale, _ = scales(0)
        x = self.only_logits(0)
        top = self.largest(x, scale)
        p, mass = self.softmax(x, scale, top)
        self.await_values(0)

        def over_slot(slot, *carry):
            """A slot's tiles but the first."""
            scale, _ = scales(slot)

            def over_tile(i, carry):
                p, top, mass, sums, decay = self.step(slot * tiles + i, scale, *carry)
                return p, top, mass, sums * shared.wide(decay, HEAD_DIM)

            return lax.fori_loop(1, tiles, over_tile, carry)

        def next_slot(slot, carry):
            """Adds a slot's sums to the total when those of the next slot's first tile begin."""
            *carry, total, total_top = carry
            p, top, mass, sums = over_slot(slot, *carry)
            first = (slot + 1) * tiles
            p, new, mass, sums, _ = self.step(first, scales(slot + 1)[0], p, top, mass, sums)
            total = added(slot, total, total_top, sums, top)
            return p, new, mass, shared.zeros(), total.astype(jnp.bfloat16), top

        def added(slot, total, total_top, sums, top):
            decay = shared.wide(jnp.exp2(total_top - top), HEAD_DIM)
            return total.astype(jnp.float32) * decay + sums * scales(slot)[1]

        total = shared.zeros().astype(jnp.bfloat16)
        start = (p, top, mass, shared.zeros(), total, top)
        *carry, total, total_top = lax.fori_loop(0, slots - 1, next_slot, start)
        p, top, mass, sums = over_slot(slots - 1, *carry)
        sums = self.only_product(slots * tiles - 1, p, sums)
        return added(slots - 1, total, total_top, sums, top), jnp.sum(mass, axis=1)

    def values(self, n):
        return self.smem.values.at[self.stage(n)].transpose((1, 0))

    def softmax(self, x, scale, top):
        p = jnp.exp2(x * shared.wide(scale, TILE) - shared.wide(top - GAIN, TILE))
        sums = shared.fold(operator.add, p)
        if self.interpret is None:
            return _operand(p), sums
        # The same order of tokens that `_operand` gives.
        p = p.reshape(ROWS, TILE // 16, 2, 4, 2).swapaxes(2, 3).reshape(ROWS, TILE)
        return p.astype(E4M3), sums


def _operand(p):
    """Probabilities as a product left them, rounded to E4M3, as the left operand of the next.

    A lane holds, of every 16 columns, 2c, 2c + 1, 2c + 8 and 2c + 9, and the operand's layout puts
    4c to 4c + 3 there. The registers are taken as they are: columns change their order, lanes keep
    their numbers.
    """
    layout = plgpu.Layout.WGMMA_8BIT

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,),
        return_type=plgpu.ShapeDtypeStruct(p.shape, E4M3, layout=layout),
    )
    def convert(_, p):
        pairs = registers_of_operand(p.registers, p.shape)
        codes = np.empty(pairs.shape[:-1], dtype=object)
        for index in np.ndindex(codes.shape):
            codes[index] = _round4(
                *(vector.extract(pair, [], [i]) for pair in pairs[index] for i in range(2))
            )
        return mgpu.FragmentedArray(
            _registers=codes.reshape(layout.to_mgpu().registers_shape(p.shape)),
            _layout=layout.to_mgpu(),
            _is_signed=None,
        )

    return convert(p)  # pyright: ignore[reportCallIssue]  # the compiler gives the context


def registers_of_operand(registers, shape):
    """Registers of a product (pairs of columns) by those of an operand: [..., low and high pair].

    Both lie by 64 rows, by columns (8, or 16 in the operand), by upper and lower 8 rows of 16.
    """
    rows, columns = shape[0] // 64, shape[1] // 16
    return registers.reshape(rows, columns, 2, 2).swapaxes(2, 3)


def _round4(*x):
    """Four float32 to a register of four E4M3, the first lowest."""
    i32 = ir.IntegerType.get_signless(32)
    ptx = (
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;"
        " cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }"
    )
    packed = vector.broadcast(
        ir.VectorType.get((1,), i32), llvm.inline_asm(i32, list(x), ptx, "=r,f,f,f,f")
    )
    return vector.bitcast(ir.VectorType.get((4,), ir.Float8E4M3FNType.get()), packed)
