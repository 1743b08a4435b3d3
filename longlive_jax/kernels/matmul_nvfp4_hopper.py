"""The program of `matmul_nvfp4` for Hopper, in Pallas Mosaic GPU.

It computes y^T = w x^T, so that the weights are the operand that a tensor core takes from
registers: a warpgroup reads packed codes from shared memory and expands them in registers to where
they are multiplied. One warpgroup fetches tiles into a ring, two others expand and multiply, each
128 rows of the weight by 128 of x, in two halves: one is expanded under the products of the other,
so that tensor cores always have some. The sums are transposed on their way out.

A weight is exact in bfloat16. Its code's bits, at the place of a bfloat16's lowest two exponent
bits and highest of its mantissa, are the code times 2^-126, 0.5 as a subnormal number. One product,
of two numbers at a time, gives them their block's scale; 2^126 is split between the scales (2^119,
as 448 * 2^126 is none) and the sums (2^7).

Codes lie as registers want them, see `pack`: no thread fetches for another, and of a register's
four pairs of codes one needs a mask, one a shift and a mask, two twice that. XLA puts them so.

What the compiler wants, found in its output (CUDA 13.0; 4 and 6 stages: no spills, no product run
by itself, no weight moved; about 200 instructions a thread and step, of which the products are 8):
- A half's weights are used up where they are made. Were those of the next step carried round the
  loop, they would be made in the registers of an operand in flight, and all products would be run
  one by one (C7513); with two sets of registers and no wait in between as well (C7512).
- `bits` times scale is one HMUL2.BF16 for two weights. It keeps subnormal numbers, as PTX says.
Results show neither: look it up (MOSAIC_GPU_DUMP_PTXAS=1, MOSAIC_GPU_DUMP_SASS=1) after a change.
"""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith

from longlive_jax.kernels import mosaic

ROWS = 128  # of x, a tile
COLUMNS = 256  # of the result, a tile; half of them a warpgroup
DEPTH = 64  # a step
BLOCK = 16

_HALF = COLUMNS // 2
_OPERAND = 64  # columns of the result that a product makes
_BLOCKS = DEPTH // BLOCK  # whose codes share words
_SCALE = 2.0**119
_REST = 2.0**7
# Where a word of 16 bits has the code of its step's n-th block: (magnitude's lowest bit, sign).
_PLACES = ((6, 15), (3, 12), (0, 14), (9, 13))
_MAGNITUDE, _SIGN = (6, 15)  # where a bfloat16 has them
_OUT_BYTES = 64 * 1024  # of shared memory for results on their way out


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the kernel is scheduled; results do not depend on it.

    stages: steps of operands in shared memory, 2 to 6.
    group: tiles of columns that are gone through together, row by row of tiles.
    programs: as many as there are multiprocessors; each goes through tiles in turn.
    """

    stages: int = 4
    group: int = 12
    programs: int = 132


def divides(rows: int, columns: int, depth: int) -> bool:
    """Whether tiles divide a product of such sides, and there are any."""
    return (
        0 not in (rows, columns, depth) and rows % ROWS == columns % COLUMNS == depth % DEPTH == 0
    )


def pack(codes: jax.Array, scales: jax.Array) -> tuple[jax.Array, jax.Array]:
    """NVFP4 codes and scales as the kernel reads them; for weights that stay, once.

    Args:
      codes: uint8 [out, in / 2], the even column in the low four bits; in a multiple of 64.
      scales: float8_e4m3fn [out, in / 16].

    Returns:
      words: uint16 [out, in / 4]. Word c of a step's 16 has column c of each of its 4 blocks.
      scales: bfloat16 [in / 16, out], times 2^119.
    """
    out, half = codes.shape
    pairs = codes.reshape(out, 2 * half // DEPTH, _BLOCKS, BLOCK // 2).astype(jnp.uint32)

    def word(nibbles):
        fields = (_field(nibbles[:, :, i], *place) for i, place in enumerate(_PLACES))
        return functools.reduce(lax.bitwise_or, fields)

    two = word(pairs & np.uint32(15)) | word(pairs >> np.uint32(4)) << np.uint32(16)
    words = lax.bitcast_convert_type(two, jnp.uint16).reshape(out, half // 2)
    scaled = scales.astype(jnp.bfloat16) * jnp.bfloat16(_SCALE)
    return words, scaled.T


def _field(code, magnitude, sign):
    low = (code & np.uint32(7)) << np.uint32(magnitude)
    return low | (code >> np.uint32(3)) << np.uint32(sign)


def matmul(
    x: jax.Array,
    words: jax.Array,
    scales: jax.Array,
    dtype,
    tuning: Tuning = Tuning(),
    interpret: plgpu.InterpretGPUParams | None = None,
) -> jax.Array:
    """x bfloat16 [m, in] times packed weights (see `pack`) -> [m, out] in dtype.

    m, out and in as `divides` wants them; interpret: run on the CPU, by JAX's interpreter.
    """
    (m, depth), out = x.shape, len(words)
    grid = (m // ROWS, out // COLUMNS)
    programs = min(tuning.programs, math.prod(grid))
    return plgpu.kernel(
        functools.partial(
            _body, grid=grid, steps=depth // DEPTH, tuning=tuning, interpret=interpret
        ),
        out_type=jax.ShapeDtypeStruct((m, out), dtype),
        grid=(programs,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=_scratch(tuning, jnp.dtype(dtype), interpret),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret,
    )(x, words, scales)


def _rows_out(dtype):
    """Rows of a warpgroup's result that are on their way out at a time."""
    return _OUT_BYTES // (2 * _HALF * dtype.itemsize)


def _scratch(tuning, dtype, interpret):
    stages = tuning.stages

    def smem(shape, dtype, swizzle):
        tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
        transforms = (tiling, plgpu.SwizzleTransform(swizzle))
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    return {
        "x_ring": smem((stages, ROWS, DEPTH), jnp.bfloat16, 128),
        "word_ring": smem((stages, COLUMNS, DEPTH // _BLOCKS), jnp.uint16, 32),
        "scale_ring": plgpu.SMEM((stages, _BLOCKS, COLUMNS), jnp.bfloat16),
        "result": smem((2, _rows_out(dtype), _HALF), dtype, 128),
        # On the GPU weights stay in registers, which the interpreter cannot multiply.
        "weights": None if interpret is None else smem((2, 2, _OPERAND, DEPTH), jnp.bfloat16, 128),
        "x_here": plgpu.Barrier(num_barriers=stages),
        "w_here": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    }


def _body(x, words, scales, out, *, grid, steps, tuning, interpret, **smem):
    """One program: every `programs`-th tile. Two warpgroups multiply, the third fetches."""
    smem = types.SimpleNamespace(**smem)
    program, programs = lax.axis_index("program"), lax.axis_size("program")
    warpgroup = lax.axis_index("warpgroup")
    tiles = (math.prod(grid) - program + programs - 1) // programs

    def place(n):
        return plgpu.planar_snake(program + n * programs, grid, 1, min(tuning.group, grid[1]))

    @pl.when(warpgroup == 2)
    def fetch():
        plgpu.set_max_registers(24, action="decrease")

        def fetch_tile(n, _):
            row, column = place(n)
            rows, columns = pl.ds(row * ROWS, ROWS), pl.ds(column * COLUMNS, COLUMNS)

            def fetch_step(k, _):
                stage = mosaic.await_free(n * steps + k, tuning.stages, smem.free)
                w_here, x_here = smem.w_here.at[stage], smem.x_here.at[stage]
                here = pl.ds(k * (DEPTH // _BLOCKS), DEPTH // _BLOCKS)
                plgpu.copy_gmem_to_smem(words.at[columns, here], smem.word_ring.at[stage], w_here)
                here = pl.ds(k * _BLOCKS, _BLOCKS)
                plgpu.copy_gmem_to_smem(scales.at[here, columns], smem.scale_ring.at[stage], w_here)
                here = pl.ds(k * DEPTH, DEPTH)
                plgpu.copy_gmem_to_smem(x.at[rows, here], smem.x_ring.at[stage], x_here)

            lax.fori_loop(0, steps, fetch_step, None)

        lax.fori_loop(0, tiles, fetch_tile, None)
        # jax 0.11's interpreter wants whoever waits on a barrier to see its last phase.
        last = tiles * steps

        def await_last(n, _):
            mosaic.await_free(n, tuning.stages, smem.free)

        lax.fori_loop(last, last + tuning.stages, await_last, None)

    @pl.when(warpgroup < 2)
    def multiply():
        plgpu.set_max_registers(240, action="increase")
        passes = _Steps(smem, warpgroup, tuning, interpret)

        def multiply_tile(n, _):
            row, column = place(n)
            total = passes.sums(n * steps, steps)
            passes.write(total, out, row * ROWS, column * COLUMNS + warpgroup * _HALF)

        lax.fori_loop(0, tiles, multiply_tile, None)
        plgpu.wait_smem_to_gmem(0)


class _Steps:
    """A warpgroup's passes over steps. Steps count on from tile to tile."""

    def __init__(self, smem, warpgroup, tuning, interpret):
        self.smem, self.warpgroup = smem, warpgroup
        self.tuning, self.interpret = tuning, interpret

    def sums(self, first, steps):
        """The sums of so many steps: two arrays [64 columns, rows].

        Half of a warpgroup's weights are expanded under the products of the other half.
        """

        def scope(*sums):
            def multiply(n, half):
                if half == 0:
                    plgpu.barrier_wait(self.smem.w_here.at[self.stage(n)])
                w = self.expanded(n, half)
                if half == 0:
                    plgpu.barrier_wait(self.smem.x_here.at[self.stage(n)])
                self.issue(n, w, half, sums[half])
                plgpu.wgmma_wait(1)  # those of the other half are done

            def step(n, _):
                multiply(n, 0)
                self.free(n - 1)
                multiply(n, 1)

            multiply(first, 0)
            multiply(first, 1)
            lax.fori_loop(first + 1, first + steps, step, None)
            total = [plgpu.wgmma_accumulator_load(x) for x in sums]
            self.free(first + steps - 1)
            return tuple(total)

        zeros = plgpu.ACC((_OPERAND, ROWS), jnp.float32)
        return pl.run_scoped(scope, zeros, zeros)

    def expanded(self, n, half):
        """Half of a step's weights: bfloat16 [64, 64], times 2^-7."""
        stage = self.stage(n)
        mine = pl.ds(self.warpgroup * _HALF + half * _OPERAND, _OPERAND)
        layout = plgpu.Layout.WGMMA
        words = plgpu.load(self.smem.word_ring.at[stage, mine], layout=layout, optimized=False)
        scales = [
            plgpu.load(
                self.smem.scale_ring.at[stage, i, mine], layout=layout.reduce(1), optimized=False
            )
            for i in range(_BLOCKS)
        ]
        # What was read so may be overwritten by a copy, which is another proxy's write.
        plgpu.commit_smem()
        scales = [lax.broadcast_in_dim(s, (_OPERAND, BLOCK), (0,)) for s in scales]
        return (_expand if self.interpret is None else expand)(words, *scales)

    def issue(self, n, w, half, sums):
        if self.interpret is not None:
            self.smem.weights[self.warpgroup, half] = w
            w = self.smem.weights.at[self.warpgroup, half]
        plgpu.wgmma(sums, w, self.smem.x_ring.at[self.stage(n)].transpose((1, 0)))

    def write(self, total, out, row, column):
        """The sums, transposed, to their place in the result."""
        io = self.smem.result.at[self.warpgroup]
        rows = io.shape[0]
        for first in range(0, ROWS, rows):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for i, x in enumerate(total):
                part = (x[:, first : first + rows] * _REST).astype(io.dtype)
                part = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
                here = io.at[:, pl.ds(i * _OPERAND, _OPERAND)]
                mosaic.store(here.transpose((1, 0)), part)
            plgpu.commit_smem()
            place = out.at[pl.ds(row + first, rows), pl.ds(column, _HALF)]
            plgpu.copy_smem_to_gmem(io, place)

    def stage(self, n):
        return mosaic.stage(n, self.tuning.stages)

    def free(self, n):
        plgpu.barrier_arrive(self.smem.free.at[self.stage(n)])


def bits(words: jax.Array, block: int) -> jax.Array:
    """The bfloat16, as uint16, that are a block's codes times 2^-126."""
    magnitude, sign = _PLACES[block]
    low = (words >> np.uint16(magnitude) & np.uint16(7)) << np.uint16(_MAGNITUDE)
    return low | (words >> np.uint16(sign) & np.uint16(1)) << np.uint16(_SIGN)


def expand(words: jax.Array, *scales: jax.Array) -> jax.Array:
    """A step's weights times 2^-7, as the interpreter makes them.

    words: uint16 [n, 16]; scales: bfloat16 [n, 16] for each block; -> bfloat16 [n, 64].
    """
    blocks = []
    for i, scale in enumerate(scales):
        x = bits(words, i)
        # Not as a bfloat16, which a CPU takes for 0 where it is subnormal.
        code = (x >> np.uint16(_MAGNITUDE) & np.uint16(7)).astype(jnp.float32)
        magnitude = jnp.maximum(jnp.maximum(code * 0.5, code - 2), code * 2 - 8)
        value = jnp.where(x >> np.uint16(_SIGN) > 0, -magnitude, magnitude)
        scale = scale.astype(jnp.float32) * (1 / _SCALE)
        blocks.append(value * scale * (1 / _REST))
    return jnp.concatenate(blocks, axis=1).astype(jnp.bfloat16)


@plgpu.inline_mgpu(
    arg_types=(plgpu.Layout.WGMMA,) * (1 + _BLOCKS),
    return_type=plgpu.ShapeDtypeStruct((_OPERAND, DEPTH), jnp.bfloat16, plgpu.Layout.WGMMA),
)
def _expand(_, words, *scales):
    """`expand`, two numbers an instruction: a register holds two words."""
    integer = ir.IntegerType.get_signless(32)
    pair = ir.VectorType.get((2,), ir.BF16Type.get())

    def constant(x):
        return mgpu.utils.c(int(np.uint32(x).view(np.int32)), integer)

    def moved(x, by):
        if by == 0:
            return x
        return (arith.shli if by > 0 else arith.shrui)(x, constant(abs(by)))

    def block(register, magnitude, sign):
        x = mgpu.utils.bitcast(register, integer)
        up, sign_up = _MAGNITUDE - magnitude, _SIGN - sign
        low, high = constant(0x00010001 * (7 << _MAGNITUDE)), constant(0x00010001 << _SIGN)
        if up == sign_up:
            bits = arith.andi(moved(x, up), arith.ori(low, high))
        else:
            bits = arith.ori(arith.andi(moved(x, up), low), arith.andi(moved(x, sign_up), high))
        return mgpu.utils.bitcast(bits, pair)

    def array(registers):
        return mgpu.FragmentedArray(_registers=registers, _layout=words.layout, _is_signed=None)

    blocks = []
    for place, scale in zip(_PLACES, scales):
        registers = np.empty_like(words.registers)
        for index, register in np.ndenumerate(words.registers):
            registers[index] = block(register, *place)
        blocks.append((array(registers) * scale).registers)
    return array(np.concatenate(blocks, axis=1))
