"""bfloat16 attention over a KV cache in place, on Hopper.

Softmax is float32, with a running maximum and sum, in one pass over the keys; both products add up
in float32. Only the probabilities are rounded, to bfloat16 after the running maximum is subtracted,
and the result. Probabilities go from the first product to the second in the same registers: an
accumulator, converted to bfloat16, is an operand.

`attention` has a program's structure and the compiler's constraints, `ops.cached_attention` the
oracle and the fallback.
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

from longlive_jax.kernels import attention as shared
from longlive_jax.kernels import mosaic
from longlive_jax.kernels.attention import HEAD_DIM, LOG2_SCALE, QUERIES, ROWS

DTYPE = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the kernel is scheduled; results do not depend on it, but for the order of sums.

    tile: keys a step, 64 or 128.
    stages: tiles of keys and of values in shared memory: 2 or 3 of 128 keys, 2 to 6 of 64.
    """

    tile: int = 128
    stages: int = 2


def supports(
    q: jax.Array, k: jax.Array, v: jax.Array, past_k: jax.Array, past_v: jax.Array
) -> bool:
    """Whether the kernel takes these: all bfloat16, local, in whole tiles, on a Hopper GPU."""
    return shared.supports(q, k.shape[1]) and all(x.dtype == DTYPE for x in (k, v, past_k, past_v))


def kernel(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    past_k: jax.Array,
    past_v: jax.Array,
    layer: jax.Array,
    filled: jax.Array,
    tuning: Tuning = Tuning(),
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """The kernel itself, on one device's arrays (on a mesh: in a manual `jax.shard_map`).

    Args:
      q: bfloat16 [row, query, head, 128], queries a multiple of 128.
      k, v: bfloat16 [row, token, head, 128], the chunk's, tokens a multiple of 128.
      past_k, past_v: bfloat16 [layer, row, slot, token, head, 128], the cache's.
      layer: int32 [], the layer to read.
      filled: int32 [row], how many of its slots are visible, from the first. Others are not read.
      interpret: run on the CPU, by JAX's interpreter.

    Returns:
      bfloat16 [row, query, head, 128].

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
    stages = tuning.stages

    def operand(*shape):
        return plgpu.SMEM(shape, DTYPE, transforms=mosaic.rows_of_128_bytes(DTYPE))

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

    def values(self, n):
        return self.smem.values.at[self.stage(n)]

    def softmax(self, x, scale, top):
        p = jnp.exp2(x * scale - shared.wide(top, self.tuning.tile))
        return p.astype(DTYPE), shared.fold(operator.add, p)
