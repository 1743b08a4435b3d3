"""Shared by the attention kernels, `attention_bf16` and `attention_fp8`, on Hopper.

Keys come in slots of equal length: the chunk's own, then those of a cache, of which the first
`filled` are visible. The cache of all layers is read in place: nothing is copied, and other slots
are not read.

A program takes 128 queries of one head and has three warpgroups. Number 2 fetches tiles of keys and
of values into two rings in shared memory; 0 and 1 multiply, 64 queries each.

In shared memory (`smem`) both have `keys` and `values`, the rings [stage, ...], and the barriers
that `barriers` makes; a tuning's `stages` is how many tiles the rings hold. Each kernel has its own
formats, and so its own products and softmax of a tile.

A tile's logits and the product of the tile before are issued together: the search for the largest
logit runs under that product, and the rest of the softmax under the other warpgroup's.

Constraints of the compiler, found in its output (CUDA 13.0):
- `ptxas` moves the wait for a product up, above the work that was to overlap it. An optimisation
  barrier does not stop it, but a branch does: here the wait for the tile's values.
- No product may be in flight from one step of the loop to the next (C7514).
- Probabilities are rounded after the wait for the product that reads the last ones (C7513).
- Reductions over columns are trees (`fold`): in order, each would wait for the one before.
Results show neither these nor spills of `ptxas`: read its output (MOSAIC_GPU_DUMP_PTXAS=1,
MOSAIC_GPU_DUMP_SASS=1) after every change.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax.errors import InputError
from longlive_jax.kernels import mosaic
from longlive_jax.kernels.chip import takes

HEAD_DIM = 128
TILE = 128  # a slot's tokens are a multiple of it
QUERIES = 128  # a program's: 64 for each of the two warpgroups that multiply
ROWS = QUERIES // 2
LOG2_SCALE = math.log2(math.e) / math.sqrt(HEAD_DIM)  # softmax in powers of two


def supports(q: jax.Array, tokens: int) -> bool:
    """Whether programs run these queries over slots of `tokens` tokens on this machine."""
    return takes(q) and q.dtype == jnp.bfloat16 and divides(q.shape, tokens)


def divides(shape: tuple[int, ...], tokens: int) -> bool:
    """Whether programs divide q's shape [row, query, head, head_dim], and tiles a slot's tokens."""
    return shape[1] % QUERIES == tokens % TILE == 0 and shape[-1] == HEAD_DIM


def validate(name: str, shape: tuple[int, ...], tokens: int) -> None:
    """Refuses what `divides` does not take.

    Raises:
      InputError: other numbers of queries, tokens or channels.
    """
    if not divides(shape, tokens):
        raise InputError(
            f"{name}: {shape[1]} queries and slots of {tokens} tokens, head_dim {shape[-1]}; "
            f"the kernel takes multiples of {QUERIES} and {TILE}, and {HEAD_DIM}"
        )


def program(name: str, body: Callable, q: jax.Array, scratch: dict, interpret) -> Callable:
    """The kernel of a body with this scratch memory; its result has q's shape and dtype."""
    rows, queries, heads, _ = q.shape
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(rows, heads, queries // QUERIES),  # the queries of a head together: keys stay in L2
        grid_names=("row", "head", "block"),
        kernel_name=name,
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({} if interpret is None else {"interpret": interpret}),
    )


def place(layer: jax.Array, filled: jax.Array) -> jax.Array:
    """int32 [1 + row], as programs read it: the layer's first row, then `filled` of each row."""
    return jnp.concatenate([jnp.reshape(layer, 1).astype(jnp.int32) * len(filled), filled])


def barriers(tuning) -> dict:
    """Barriers in scratch memory: queries and tiles have arrived, tiles are free."""
    stages = tuning.stages
    return {
        "q_here": plgpu.Barrier(num_barriers=2),
        "k_here": plgpu.Barrier(num_barriers=stages),
        "v_here": plgpu.Barrier(num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    }


def send_window(smem, stages: int, tiles: int, filled: jax.Array, tile, chunk, cache) -> None:
    """Fetches the tiles of the chunk and of the filled slots, one after another, into the rings.

    Returns when the warpgroups that multiply have used them all.

    Args:
      tiles: of a slot, and of the chunk.
      tile: (k, v, row, n) -> the row's n-th tile of keys, and of values, in device memory.
      chunk: k, v, row.
      cache: k, v, the row of its first slot.
    """
    *past, first = cache

    def send(n, keys, values):
        stage = mosaic.await_free(n, stages, smem.k_free)
        plgpu.copy_gmem_to_smem(keys, smem.keys.at[stage], smem.k_here.at[stage])
        stage = mosaic.await_free(n, stages, smem.v_free)
        plgpu.copy_gmem_to_smem(values, smem.values.at[stage], smem.v_here.at[stage])

    def send_fresh(n, _):
        send(n, *tile(*chunk, n))

    def send_slot(slot, _):
        def send_past(n, _):
            send((1 + slot) * tiles + n, *tile(*past, first + slot, n))

        lax.fori_loop(0, tiles, send_past, None)

    def wait(n, _):
        mosaic.await_free(n, stages, smem.k_free)
        mosaic.await_free(n, stages, smem.v_free)

    lax.fori_loop(0, tiles, send_fresh, None)
    lax.fori_loop(0, filled, send_slot, None)
    # jax 0.11's interpreter wants whoever waits on a barrier to see its last phase.
    sent = (1 + filled) * tiles
    lax.fori_loop(sent, sent + stages, wait, None)


class Steps:
    """A warpgroup that multiplies: for each tile of keys logits, softmax, product with values."""

    def __init__(self, smem, warpgroup, tuning, interpret):
        self.smem, self.warpgroup = smem, warpgroup
        self.tuning, self.interpret = tuning, interpret
        accumulator = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
        self.product = accumulator((ROWS, HEAD_DIM), jnp.float32)
        self.logits = accumulator((ROWS, smem.keys.shape[1]), jnp.float32)

    def values(self, n):
        """The n-th tile of values, [key, head_dim], in shared memory: the subclass's."""
        raise NotImplementedError

    def softmax(self, x, scale, top):
        """Probabilities as the product's operand, and their `fold`ed sums: the subclass's."""
        raise NotImplementedError

    def issue_logits(self, n: jax.Array | int, out) -> None:
        keys = self.smem.keys.at[self.stage(n)].transpose((1, 0))
        plgpu.wgmma(out, self.smem.queries.at[self.warpgroup], keys)

    def issue_product(self, n: jax.Array | int, p: jax.Array, sums: jax.Array, out) -> None:
        """out = sums + p values; in the interpreter, whose accumulators start at 0, p values."""
        if self.interpret is None:
            out[...] = sums
        else:
            self.smem.probabilities[self.warpgroup] = p
            p = self.smem.probabilities.at[self.warpgroup]
        plgpu.wgmma(out, p, self.values(n))

    def await_keys(self, n: jax.Array | int) -> None:
        plgpu.barrier_wait(self.smem.k_here.at[self.stage(n)])

    def await_values(self, n: jax.Array | int) -> None:
        plgpu.barrier_wait(self.smem.v_here.at[self.stage(n)])

    def stage(self, n: jax.Array | int) -> jax.Array:
        """Where the n-th tiles are in their rings."""
        return mosaic.stage(n, self.tuning.stages)

    def free(self, barrier, n: jax.Array | int) -> None:
        """Frees the n-th tile of keys (`smem.k_free`) or of values, for this warpgroup."""
        plgpu.barrier_arrive(barrier.at[self.stage(n)])

    def step(self, n, scale, p, top, mass, sums):
        """The n-th tile's softmax, under the product of the tile before.

        Returns the n-th tile's p, top, mass; sums with that product; the decay of sums.
        """
        self.await_keys(n)

        def under_logits(logits):
            self.issue_logits(n, logits)

            def under_product(out):
                self.issue_product(n - 1, p, sums, out)
                x = plgpu.wgmma_accumulator_load(logits, wait_n=1)
                self.free(self.smem.k_free, n)
                new = jnp.maximum(top, self.largest(x, scale))
                new, x = lax.optimization_barrier((new, x))
                self.await_values(n)
                new_sums = self.load_sums(out, sums)
                self.free(self.smem.v_free, n - 1)
                new_sums, x = lax.optimization_barrier((new_sums, x))
                new_p, fresh = self.softmax(x, scale, new)
                decay = jnp.exp2(top - new)
                return new_p, new, mass * wide(decay, 8) + fresh, new_sums, decay

            return pl.run_scoped(under_product, self.product)

        return pl.run_scoped(under_logits, self.logits)

    def only_logits(self, n: jax.Array | int) -> jax.Array:
        """The n-th tile's logits, by themselves."""

        def logits(out):
            self.issue_logits(n, out)
            return plgpu.wgmma_accumulator_load(out)

        self.await_keys(n)
        x = pl.run_scoped(logits, self.logits)
        self.free(self.smem.k_free, n)
        return x

    def only_product(self, n: jax.Array | int, p: jax.Array, sums: jax.Array) -> jax.Array:
        """sums + p times the n-th tile's values, by themselves."""

        def product(out):
            self.issue_product(n, p, sums, out)
            return self.load_sums(out, sums)

        sums = pl.run_scoped(product, self.product)
        self.free(self.smem.v_free, n)
        return sums

    def largest(self, x: jax.Array, scale: jax.Array | float) -> jax.Array:
        """The largest logit of each row, in powers of two: [64]."""
        return jnp.max(fold(jnp.maximum, x), axis=1) * scale

    def load_sums(self, out, sums: jax.Array) -> jax.Array:
        """Waits for what `issue_product` issued."""
        out = plgpu.wgmma_accumulator_load(out)
        return out if self.interpret is None else sums + out


def zeros() -> jax.Array:
    """A total before any key: float32 [64, 128], as a product lies."""
    return plgpu.layout_cast(jnp.zeros((ROWS, HEAD_DIM), jnp.float32), plgpu.Layout.WGMMA)


def fold(operation: Callable, x: jax.Array) -> jax.Array:
    """[64, columns] -> [64, 8], as a tree; a thread's own columns, so that nothing is exchanged."""
    while x.shape[1] > 8:
        half = x.shape[1] // 2
        x = operation(x[:, :half], x[:, half:])
    return x


def wide(x: jax.Array, columns: int) -> jax.Array:
    """[64] -> [64, columns]."""
    return lax.broadcast_in_dim(x, (ROWS, columns), (0,))


def write(total: jax.Array, io, out) -> None:
    """A warpgroup's result to device memory, rounded, by way of its place `io` in shared memory."""
    io[...] = total.astype(io.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(io, out)
    plgpu.wait_smem_to_gmem(0)
