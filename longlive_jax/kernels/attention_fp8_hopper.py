"""The program of `attention_fp8` for Hopper, in Pallas Mosaic GPU.

A program takes 128 queries of one head. One warpgroup fetches tiles of 128 keys and values into a
ring in shared memory; two others, of 64 queries each, multiply. Probabilities go from the first
product to the second in registers.

The tensor cores are said to keep 13 bits of an FP8 sum; cut there at every instruction, an output
would be 2 % wrong after 28,160 keys. So they add up one tile of keys only (0.01 %), and tiles are
added in float32. That is free: the past is rescaled for the new maximum anyway, and the two make
one instruction.

What the compiler wants, found in its output: with a wait between the start of an accumulator and
its first product it clears 64 registers, so the waits come first. Registers are all but used up:
whether `ptxas` spills, or runs products one by one, must be looked up (MOSAIC_GPU_DUMP_PTXAS=1)
after every change, for results do not show it.
"""

import dataclasses
import functools
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

from longlive_jax.formats import FP8Tensor
from longlive_jax.kernels import attention_hopper as shared
from longlive_jax.kernels.attention_hopper import HEAD_DIM, LOG2_SCALE, QUERIES, ROWS, TILE

E4M3 = jnp.float8_e4m3fn
KEY_DTYPES = {jnp.dtype(E4M3): 448.0, jnp.dtype(jnp.int8): 127.0}  # and the largest code
TINY = 2.0**-100  # least magnitude of a query row that gets a scale of its own
GAIN = 8.0  # log2 of what probabilities are multiplied by
_WHOLE = 1.5 * 2**23  # float32 from here to 2^22 further, either way, are the whole numbers
_SPREAD = 2.0**-40  # scales of values further below the largest count as this far below it


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the kernel is scheduled; results do not depend on it.

    stages: tiles of keys and of values in shared memory, 2 to 5.
    overlap: a warpgroup's products run under its own softmax, not only under the other's.
    turns: the two warpgroups issue their products in turns.
    """

    stages: int = 4
    overlap: bool = True
    turns: bool = False


def attention(
    q: jax.Array,
    k: FP8Tensor,
    v: FP8Tensor,
    past_k: FP8Tensor,
    past_v: FP8Tensor,
    layer: jax.Array,
    filled: jax.Array,
    tuning: Tuning = Tuning(),
    interpret=None,
) -> jax.Array:
    """`attention_fp8.attention`; q bfloat16, multiples of 128 queries and of 128 tokens a slot.

    interpret: `plgpu.InterpretGPUParams()` to run it on a CPU; None: on the GPU.
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
    v_change, v_last = changes_of_scale(v_scale, filled)
    body = functools.partial(
        _body, tiles=tokens // TILE, slots=slots, tuning=tuning, interpret=interpret
    )
    scratch = _scratch(q.dtype, k.values.dtype, tuning, interpret)
    run = shared.program(body, q, scratch, interpret)
    return run(
        q,
        k.values,
        v.values.reshape(rows * heads, HEAD_DIM, tokens),
        past_k.values.reshape(layers * rows * slots, tokens, heads, HEAD_DIM),
        past_v.values.reshape(layers * rows * slots * heads, HEAD_DIM, tokens),
        k_scale,
        v_change,
        v_last,
        shared.place(layer, filled),
    )


def changes_of_scale(scale, filled):
    """Scales of values [row, slot, head] -> by what sums are multiplied at each slot, and at last.

    Sums are kept in the units of the slot being read.
    """
    real = jnp.arange(scale.shape[1])[None, :, None] <= filled[:, None, None]
    scale = jnp.where(real, scale, 0)
    # A slot of zeros has a scale near float32's smallest: a quotient of two would overflow.
    scale = jnp.maximum(scale, jnp.max(scale, axis=1, keepdims=True) * _SPREAD)
    scale = jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)
    change = jnp.concatenate([jnp.ones_like(scale[:, :1]), scale[:, :-1] / scale[:, 1:]], axis=1)
    last = jnp.take_along_axis(scale, filled[:, None, None], axis=1)[:, 0]
    return change, last


def _scratch(dtype, key_dtype, tuning, interpret):
    rows_of_128_bytes = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))
    stages = tuning.stages
    operand = functools.partial(plgpu.SMEM, transforms=rows_of_128_bytes)
    return {
        "io": plgpu.SMEM((2, ROWS, HEAD_DIM), dtype),
        "queries": operand((2, ROWS, HEAD_DIM), key_dtype),
        "keys": operand((stages, TILE, HEAD_DIM), key_dtype),
        "values": operand((stages, HEAD_DIM, TILE), E4M3),
        # On the GPU probabilities stay in registers, which the interpreter cannot multiply.
        "probabilities": None if interpret is None else operand((2, ROWS, TILE), E4M3),
        **shared.barriers(tuning),
    }


def _body(
    q, k, v, past_k, past_v, k_scale, v_change, v_last, place, out, *, tiles, slots, tuning,
    interpret, **smem
):  # fmt: skip
    """One program: 128 queries of one head. Two warpgroups multiply, the third fetches."""
    smem = types.SimpleNamespace(**smem)
    row, head, block = (lax.axis_index(name) for name in ("row", "head", "block"))
    warpgroup = lax.axis_index("warpgroup")
    first, filled = (place[0] + row) * slots, place[1 + row]

    @pl.when(warpgroup == 2)
    def fetch():
        plgpu.set_max_registers(24, action="decrease")
        rings = shared.Rings(smem, tuning.stages)

        def tile(k, v, row, n):
            keys = pl.ds(n * TILE, TILE)
            return k.at[row, keys, head], v.at[row * q.shape[2] + head, :, keys]

        sent = rings.send_window(
            tiles,
            filled,
            fresh=lambda n: tile(k, v, row, n),
            past=lambda slot, n: tile(past_k, past_v, first + slot, n),
        )
        if tuning.overlap:
            rings.send_keys(sent, k.at[row, pl.ds(0, TILE), head])
        rings.await_last(sent, spare=int(tuning.overlap))

    @pl.when(warpgroup < 2)
    def multiply():
        plgpu.set_max_registers(240, action="increase")
        mine = (row, pl.ds(block * QUERIES + warpgroup * ROWS, ROWS), head)
        logits_scale = _load_queries(q.at[mine], smem, warpgroup)
        steps = _Steps(smem, warpgroup, tuning, interpret)
        sums = (steps.overlapped if tuning.overlap else steps.plain)(
            lambda slot: (logits_scale * k_scale[row, slot, head], v_change[row, slot, head]),
            tiles,
            1 + filled,
        )
        total, mass = sums
        total = total * shared.wide(v_last[row, head] / mass, HEAD_DIM)
        shared.write(total, smem.io.at[warpgroup], out.at[mine])


def _load_queries(q, smem, warpgroup):
    """Leaves this warpgroup's queries in shared memory as codes. Returns the scale of each row."""
    plgpu.copy_gmem_to_smem(q, smem.io.at[warpgroup], smem.q_here.at[warpgroup])
    plgpu.barrier_wait(smem.q_here.at[warpgroup])
    x = plgpu.load(smem.io.at[warpgroup], layout=plgpu.Layout.WGMMA_8BIT).astype(jnp.float32)
    amax = jnp.maximum(jnp.max(jnp.abs(x), axis=1), TINY)
    largest = KEY_DTYPES[smem.queries.dtype]
    x = x * shared.wide(largest / amax, HEAD_DIM)
    if smem.queries.dtype == jnp.int8:
        x = lax.bitcast_convert_type(x + _WHOLE, jnp.int32)  # rounded; the lowest byte is the code
    smem.queries[warpgroup] = x.astype(smem.queries.dtype)
    plgpu.commit_smem()
    return plgpu.layout_cast(amax, plgpu.Layout.WGMMA.reduce(1)) * (LOG2_SCALE / largest)


class _Steps(shared.Steps):
    """A warpgroup's passes over tiles of keys: logits, softmax, product with values."""

    def __init__(self, smem, warpgroup, tuning, interpret):
        super().__init__(smem, warpgroup, tuning, interpret)
        self.whole = smem.keys.dtype == jnp.int8
        self.logits = plgpu.ACC((ROWS, TILE), jnp.int32 if self.whole else jnp.float32)

    def plain(self, scales, tiles, slots):
        """Logits, softmax, product, each after the other. Returns total and mass."""

        def step(n, scale, change, carry):
            total, top, mass = carry
            self.await_keys(n)

            def logits(out):
                self.issue_logits(n, out)
                self.end_turn()
                return self.load_logits(out)

            x = pl.run_scoped(logits, self.logits)
            self.free(self.smem.k_free, n)
            p, top, decay, mass = self.softmax(x, scale, top, mass)
            self.await_values(n)
            self.begin_turn()

            def product(out):
                self.issue_product(n, p, out)
                return plgpu.wgmma_accumulator_load(out)

            part = pl.run_scoped(product, self.product)
            self.free(self.smem.v_free, n)
            return total * shared.wide(decay * change, HEAD_DIM) + part, top, mass

        self.first_turn()
        total, _, mass = _over_tiles(
            step, scales, tiles, slots, (shared.zeros(), *shared.nothing())
        )
        self.last_turn()
        return total, mass

    def overlapped(self, scales, tiles, slots):
        """The logits of the next tile are made under the softmax of this one.

        There is a next tile after the last one, too: a spare. Returns total and mass.
        """

        def first(out):
            self.issue_logits(0, out)
            return self.load_logits(out)

        self.first_turn()
        self.await_keys(0)
        x = pl.run_scoped(first, self.logits)
        self.free(self.smem.k_free, 0)

        def step(n, scale, change, carry):
            x, total, top, mass = carry
            self.await_keys(n + 1)

            def under_logits(logits):
                self.issue_logits(n + 1, logits)
                self.end_turn()
                p, new_top, decay, new_mass = self.softmax(x, scale, top, mass)
                self.await_values(n)
                self.begin_turn()

                def product(out):
                    self.issue_product(n, p, out)
                    part = plgpu.wgmma_accumulator_load(out)
                    return self.load_logits(logits, wait_n=None), part

                x_next, part = pl.run_scoped(product, self.product)
                self.free(self.smem.k_free, n + 1)
                self.free(self.smem.v_free, n)
                new_total = total * shared.wide(decay * change, HEAD_DIM) + part
                return x_next, new_total, new_top, new_mass

            return pl.run_scoped(under_logits, self.logits)

        _, total, _, mass = _over_tiles(
            step, scales, tiles, slots, (x, shared.zeros(), *shared.nothing())
        )
        self.last_turn()
        return total, mass

    def issue_logits(self, n, out):
        keys = self.smem.keys.at[self.stage(n)].transpose((1, 0))
        if self.whole and self.interpret is None:
            bits = int(np.float32(_WHOLE).view(np.int32))
            start = jnp.full((ROWS, TILE), bits, jnp.int32)
            out[...] = plgpu.layout_cast(start, plgpu.Layout.WGMMA)
        plgpu.wgmma(out, self.smem.queries.at[self.warpgroup], keys)

    def load_logits(self, out, wait_n=0):
        """As float32; those of int8 are _WHOLE too large.

        Their sums begin at _WHOLE's bits and so are its bits plus the sum, a float32 as they stand:
        a conversion would take as long as the exponential. (The interpreter converts.)
        """
        x = plgpu.wgmma_accumulator_load(out, wait_n=wait_n)
        if not self.whole:
            return x
        if self.interpret is not None:
            return x.astype(jnp.float32) + _WHOLE
        return plgpu.layout_cast(lax.bitcast_convert_type(x, jnp.float32), plgpu.Layout.WGMMA)

    def issue_product(self, n, p, out):
        if self.interpret is not None:
            self.smem.probabilities[self.warpgroup] = p
            p = self.smem.probabilities.at[self.warpgroup]
        plgpu.wgmma(out, p, self.smem.values.at[self.stage(n)].transpose((1, 0)))

    def softmax(self, x, scale, top, mass):
        """Logits in units of `scale` -> probabilities, top, what the past decays by, mass."""
        largest, zero = jnp.max(x, axis=1), 0.0
        if self.whole:
            largest, zero = largest - _WHOLE, scale * _WHOLE
        new = jnp.maximum(top, largest * scale)
        decay = jnp.exp2(top - new)
        p = jnp.exp2(x * shared.wide(scale, TILE) - shared.wide(new - GAIN + zero, TILE))
        mass = mass * decay + jnp.sum(p, axis=1)
        if self.interpret is None:
            return _operand(p), new, decay, mass
        # The same order of tokens that `_operand` gives.
        p = p.reshape(ROWS, TILE // 16, 2, 4, 2).swapaxes(2, 3).reshape(ROWS, TILE)
        return p.astype(E4M3), new, decay, mass


def _over_tiles(step, scales, tiles, slots, carry):
    """`step` over the tiles of each slot: (n, scale, change, carry) -> carry."""

    def over_slot(slot, carry):
        scale, change = scales(slot)

        def at(i, carry):
            # Sums change units with the first tile of a slot.
            return step(slot * tiles + i, scale, jnp.where(i == 0, change, 1.0), carry)

        return lax.fori_loop(0, tiles, at, carry)

    return lax.fori_loop(0, slots, over_slot, carry)


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

    return convert(p)


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
