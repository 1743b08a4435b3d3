"""The program of `attention_bf16` for Hopper, in Pallas Mosaic GPU.

A program takes 128 queries of one head. One warpgroup fetches tiles of keys and values into a ring
in shared memory; two others, of 64 queries each, multiply. Probabilities go from the first product
to the second in registers, as they lie: an accumulator, once bfloat16, is an operand.

A tile's steps, and what the compiler wants of them, are in `attention_hopper`.
"""

import dataclasses
import functools
import operator
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
    """

    tile: int = 128
    stages: int = 2


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
    run = shared.program("attention_bf16", body, q, _scratch(tuning, interpret), interpret)
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

        def tile(k, v, row, n):
            here = (row, pl.ds(n * tuning.tile, tuning.tile), head)
            return k.at[here], v.at[here]

        chunk, cache = (k, v, row), (past_k, past_v, first)
        shared.send_window(smem, tuning.stages, tiles, filled, tile, chunk, cache)

    @pl.when(warpgroup < 2)
    def multiply():
        plgpu.set_max_registers(240, action="increase")
        mine = (row, pl.ds(block * QUERIES + warpgroup * ROWS, ROWS), head)
        io = smem.queries.at[warpgroup]
        plgpu.copy_gmem_to_smem(q.at[mine], io, smem.q_here.at[warpgroup])
        plgpu.barrier_wait(smem.q_here.at[warpgroup])
        steps = _Steps(smem, warpgroup, tuning, interpret)
        total, mass = steps.over_window((1 + filled) * tiles)
        shared.write(total * shared.wide(1 / mass, HEAD_DIM), io, out.at[mine])


class _Steps(shared.Steps):
    """A warpgroup's work on the tiles of keys and values."""

    def __init__(self, smem, warpgroup, tuning, interpret):
        super().__init__(smem, warpgroup, tuning, interpret)
        self.logits = plgpu.ACC((ROWS, tuning.tile), jnp.float32)

    def over_window(self, tiles):
        """All tiles of the chunk and of the cache. Returns total and mass."""
        x = self.only_logits(0)
        top = self.largest(x, LOG2_SCALE)
        p, mass = self.softmax(x, LOG2_SCALE, top)
        self.await_values(0)

        def over_tile(n, carry):
            p, top, mass, total, decay = self.step(n, LOG2_SCALE, *carry)
            return p, top, mass, total * shared.wide(decay, HEAD_DIM)

        start = (p, top, mass, shared.zeros())
        p, _, mass, total = lax.fori_loop(1, tiles, over_tile, start)
        return self.only_product(tiles - 1, p, total), jnp.sum(mass, axis=1)

    def issue_logits(self, n, out):
        keys = self.smem.keys.at[self.stage(n)].transpose((1, 0))
        plgpu.wgmma(out, self.smem.queries.at[self.warpgroup], keys)

    def issue_product(self, n, p, total, out):
        if self.interpret is None:
            out[...] = total
        else:
            self.smem.probabilities[self.warpgroup] = p
            p = self.smem.probabilities.at[self.warpgroup]
        plgpu.wgmma(out, p, self.smem.values.at[self.stage(n)])

    def softmax(self, x, scale, top):
        p = jnp.exp2(x * scale - shared.wide(top, self.tuning.tile))
        return p.astype(DTYPE), shared.fold(operator.add, p)
