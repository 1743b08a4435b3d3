"""The program of `attention_bf16` for Hopper, in Pallas Mosaic GPU.

A program takes 128 queries of one head. One warpgroup fetches tiles of keys and values into a ring
in shared memory; two others, of 64 queries each, multiply. Probabilities go from the first product
to the second in registers, as they lie: an accumulator, once bfloat16, is an operand.

A tile's logits and the product of the tile before are issued together, so that the softmax of the
one runs under the other; the two warpgroups issue in turns.

What the compiler wants, found in its output (CUDA 13.0; every tuning: no spills, no product run by
itself, no accumulator moved or cleared):
- `ptxas` moves the wait for a product up, over the softmax that was to run under it, and no barrier
  of the optimiser's stops it. A branch does: the wait for the tile's values stands between.
- Probabilities become bfloat16 after that wait. Before, they would be written to the registers of
  the operand in flight, and all products would be run one by one (C7513).
Results show neither: look it up (MOSAIC_GPU_DUMP_PTXAS=1, MOSAIC_GPU_DUMP_SASS=1) after a change.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.kernels import attention_hopper as shared
from longlive_jax.kernels.attention_hopper import HEAD_DIM, LOG2_SCALE, QUERIES, ROWS

DTYPE = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the kernel is scheduled; results do not depend on it, but for the order of sums.

    tile: keys a step, 64 or 128.
    stages: tiles of keys and of values in shared memory: 2 or 3 of 128 keys, 2 to 6 of 64.
    overlap: a warpgroup's softmax runs under its own products, not only under the other's.
    turns: the two warpgroups issue their products in turns.
    """

    tile: int = 128
    stages: int = 2
    overlap: bool = True
    turns: bool = False


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    past_k: jax.Array,
    past_v: jax.Array,
    layer: jax.Array,
    filled: jax.Array,
    tuning: Tuning = Tuning(),
    interpret=None,
) -> jax.Array:
    """`attention_bf16.attention`; all bfloat16, multiples of 128 queries and of 128 tokens a slot.

    interpret: `plgpu.InterpretGPUParams()` to run it on a CPU; None: on the GPU.

    Raises:
      InputError: other numbers of queries, tokens or channels.
    """
    layers, rows, slots, tokens, heads = past_k.shape[:5]
    shared.validate("attention_bf16", q.shape, tokens)
    body = functools.partial(
        _body, tiles=tokens // tuning.tile, slots=slots, tuning=tuning, interpret=interpret
    )
    run = shared.program(body, q, _scratch(tuning, interpret), interpret)
    past = (layers * rows * slots, tokens, heads, HEAD_DIM)
    place = shared.place(layer, filled)
    return run(q, k, v, past_k.reshape(past), past_v.reshape(past), place)


def _scratch(tuning, interpret):
    rows_of_128_bytes = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    stages = tuning.stages

    def operand(*shape):
        return plgpu.SMEM(shape, DTYPE, transforms=rows_of_128_bytes)

    return {
        "queries": operand(2, ROWS, HEAD_DIM),  # at last the result
        "keys": operand(stages, tuning.tile, HEAD_DIM),
        "values": operand(stages, tuning.tile, HEAD_DIM),
        # On the GPU probabilities stay in registers, which the interpreter cannot multiply.
        "probabilities": None if interpret is None else operand(2, ROWS, tuning.tile),
        **shared.barriers(tuning),
    }


def _body(q, k, v, past_k, past_v, place, out, *, tiles, slots, tuning, interpret, **smem):
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
            here = (row, pl.ds(n * tuning.tile, tuning.tile), head)
            return k.at[here], v.at[here]

        sent = rings.send_window(
            tiles,
            filled,
            fresh=lambda n: tile(k, v, row, n),
            past=lambda slot, n: tile(past_k, past_v, first + slot, n),
        )
        rings.await_last(sent)

    @pl.when(warpgroup < 2)
    def multiply():
        plgpu.set_max_registers(240, action="increase")
        mine = (row, pl.ds(block * QUERIES + warpgroup * ROWS, ROWS), head)
        io = smem.queries.at[warpgroup]
        plgpu.copy_gmem_to_smem(q.at[mine], io, smem.q_here.at[warpgroup])
        plgpu.barrier_wait(smem.q_here.at[warpgroup])
        steps = _Steps(smem, warpgroup, tuning, interpret)
        total, mass = (steps.overlapped if tuning.overlap else steps.plain)((1 + filled) * tiles)
        shared.write(total * shared.wide(1 / mass, HEAD_DIM), io, out.at[mine])


class _Steps(shared.Steps):
    """A warpgroup's passes over tiles of keys: logits, softmax, product with values."""

    def __init__(self, smem, warpgroup, tuning, interpret):
        super().__init__(smem, warpgroup, tuning, interpret)
        self.logits = plgpu.ACC((ROWS, tuning.tile), jnp.float32)

    def plain(self, tiles):
        """Logits, softmax, product, each after the other. Returns total and mass."""

        def step(n, carry):
            total, top, mass = carry
            x = self.only_logits(n)
            p, top, decay, mass = self.softmax(x, top, mass)
            total = total * shared.wide(decay, HEAD_DIM)
            p, total, mass = lax.optimization_barrier((p.astype(DTYPE), total, mass))
            self.await_values(n)
            self.begin_turn()
            return self.only_product(n, p, total), top, mass

        self.first_turn()
        total, _, mass = lax.fori_loop(0, tiles, step, (shared.zeros(), *shared.nothing()))
        self.last_turn()
        return total, mass

    def overlapped(self, tiles):
        """The product of the last tile runs under the softmax of this one.

        Returns total and mass.
        """
        self.first_turn()
        p, top, _, mass = self.softmax(self.only_logits(0), *shared.nothing())
        self.await_values(0)

        def step(n, carry):
            p, total, top, mass = carry
            self.await_keys(n)
            self.begin_turn()

            def under_logits(logits):
                self.issue_logits(n, logits)

                def under_product(out):
                    self.issue_product(n - 1, p, total, out)
                    self.end_turn()
                    x = plgpu.wgmma_accumulator_load(logits, wait_n=1)
                    self.free(self.smem.k_free, n)
                    new_p, new_top, decay, new_mass = self.softmax(x, top, mass)
                    # All of the softmax before this wait, its rounding after the next: see the top.
                    new_p, decay, new_mass = lax.optimization_barrier((new_p, decay, new_mass))
                    self.await_values(n)
                    new_total = self.load_total(out, total)
                    self.free(self.smem.v_free, n - 1)
                    new_p, new_total = lax.optimization_barrier((new_p, new_total))
                    new_total = new_total * shared.wide(decay, HEAD_DIM)
                    return new_p.astype(DTYPE), new_total, new_top, new_mass

                return pl.run_scoped(under_product, self.product)

            return pl.run_scoped(under_logits, self.logits)

        p, total, _, mass = lax.fori_loop(
            1, tiles, step, (p.astype(DTYPE), shared.zeros(), top, mass)
        )
        self.begin_turn()
        total = self.only_product(tiles - 1, p, total)
        self.last_turn()
        return total, mass

    def only_logits(self, n):
        """Gives the turn away."""

        def logits(out):
            self.issue_logits(n, out)
            self.end_turn()
            return plgpu.wgmma_accumulator_load(out)

        self.await_keys(n)
        x = pl.run_scoped(logits, self.logits)
        self.free(self.smem.k_free, n)
        return x

    def only_product(self, n, p, total):
        def product(out):
            self.issue_product(n, p, total, out)
            return self.load_total(out, total)

        total = pl.run_scoped(product, self.product)
        self.free(self.smem.v_free, n)
        return total

    def issue_logits(self, n, out):
        keys = self.smem.keys.at[self.stage(n)].transpose((1, 0))
        plgpu.wgmma(out, self.smem.queries.at[self.warpgroup], keys)

    def issue_product(self, n, p, total, out):
        """out = total + p values. (The interpreter's accumulators cannot be given a start.)"""
        if self.interpret is None:
            out[...] = total
        else:
            self.smem.probabilities[self.warpgroup] = p
            p = self.smem.probabilities.at[self.warpgroup]
        plgpu.wgmma(out, p, self.smem.values.at[self.stage(n)])

    def load_total(self, out, total):
        out = plgpu.wgmma_accumulator_load(out)
        return out if self.interpret is None else total + out

    def softmax(self, x, top, mass):
        """Logits -> probabilities of the new top, top, what the past decays by, mass."""
        new = jnp.maximum(top, jnp.max(x, axis=1) * LOG2_SCALE)
        decay = jnp.exp2(top - new)
        p = jnp.exp2(x * LOG2_SCALE - shared.wide(new, self.tuning.tile))
        return p, new, decay, mass * decay + jnp.sum(p, axis=1)
