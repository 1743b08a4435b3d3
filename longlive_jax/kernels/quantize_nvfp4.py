"""bfloat16 to NVFP4 in one read, on Hopper: the bits of `formats.quantize_nvfp4`."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax import formats
from longlive_jax.errors import InputError
from longlive_jax.formats import exact, nvfp4
from longlive_jax.kernels import blocks as lib
from longlive_jax.kernels import mosaic, threefry
from longlive_jax.kernels.chip import is_hopper, is_local

# (steps of 128 blocks that a program makes at most, of which are on their way from memory). The
# first is used; `launch.bench kernels` times them all.
TILINGS = ((32, 4), (8, 4), (16, 4), (64, 4), (32, 2), (64, 6))


def quantize_nvfp4(
    x: jax.Array,
    rule: str = "mse",
    block: tuple[int, int] = (1, nvfp4.BLOCK),
    hadamard: bool = False,
    key: jax.Array | None = None,
    amax: jax.Array | None = None,
) -> formats.NVFP4Tensor:
    """`formats.quantize_nvfp4`, by the kernel where `supports` says that it runs.

    On a mesh of explicit axes each device quantises its part, by the largest magnitude of all. In
    a manual `jax.shard_map` the default amax is the device's own part's, as in `formats`.

    Raises:
      InputError: what `formats.quantize_nvfp4` refuses.
    """
    if not supports(x, rule, block, key, amax):
        return formats.quantize_nvfp4(x, rule, block, hadamard, key, amax)
    if hadamard:
        x = formats.random_hadamard(x)
    if amax is None:
        amax = exact.largest_magnitude(x)
    amax = jnp.asarray(amax, jnp.float32)
    values, scales = _by_kernel(x, amax, rule, None if key is None else threefry.seeds(key))
    return formats.NVFP4Tensor(values, scales, amax, rule, (block[0], block[1]), x.dtype)


def _by_kernel(x, amax, rule, seeds):
    """Values and scales. seeds: `threefry.seeds`, or None."""
    sharding = jax.typeof(x).sharding
    if is_local(x):
        codes, scales = kernel(x, amax, rule, seeds=seeds)
    else:
        specs = {"in_specs": (sharding.spec, jax.P()), "out_specs": (sharding.spec,) * 2}
        run = functools.partial(kernel, rule=rule)
        codes, scales = jax.shard_map(run, mesh=sharding.mesh, **specs)(x, amax)
    return lax.bitcast_convert_type(codes, jnp.float4_e2m1fn).reshape(x.shape), scales


def quantize_each(
    x: jax.Array,
    amax: jax.Array,
    rule: str = "mse",
    block: tuple[int, int] = (1, nvfp4.BLOCK),
    keys: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`formats.nvfp4.quantize_each`, by the kernel where `supports` says that it runs."""
    drawn = keys is None or (is_local(x) and _divides(x.shape[keys.ndim :]))
    if supports(x[0], rule, block) and drawn:
        each = zip(x, amax, threefry.seeds_of_each(keys, len(x)))  # the kernel is for one
        values, scales = zip(*(_by_kernel(y, a, rule, s) for y, a, s in each))
        return jnp.stack(values), jnp.stack(scales)
    return nvfp4.quantize_each(x, amax, rule, block, keys)


def supports(
    x: jax.Array,
    rule: str = "mse",
    block: tuple[int, int] = (1, nvfp4.BLOCK),
    key: jax.Array | None = None,
    amax: jax.Array | None = None,
) -> bool:
    """Whether the kernel quantises x: bfloat16 in rows of blocks, on Hopper GPUs.

    With a key, which must be a single one, x must be local.
    """
    sharding = jax.typeof(x).sharding
    return (
        is_hopper()
        and x.dtype == jnp.bfloat16
        and rule in nvfp4.RULES
        and tuple(block) == (1, nvfp4.BLOCK)
        and (key is None or (jnp.shape(key) == () and is_local(x)))
        and (amax is None or jnp.shape(amax) == ())
        and (is_local(x) or sharding.mesh.are_all_axes_explicit)
        # In a manual `jax.shard_map` a sharding has no shard_shape: the array is the part.
        and _divides(x.shape if is_local(x) else sharding.shard_shape(x.shape))
    )


@functools.partial(jax.jit, static_argnames=("rule", "tiling", "interpret"))
def kernel(
    x: jax.Array,
    amax: jax.Array,
    rule: str,
    tiling: tuple[int, int] = TILINGS[0],
    interpret: plgpu.InterpretGPUParams | None = None,
    seeds: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The kernel itself, on one device's array (on a mesh: in a manual `jax.shard_map`).

    Jitted: it takes seconds to lower, so a program with many calls shares one of each shape.

    Args:
      x: [..., n], bfloat16, n a multiple of 16 and x's size one of 2048.
      amax: float32 [], the largest magnitude of x, or of the whole of which it is a part.
      rule: a key of `nvfp4.RULES`.
      tiling: one of `TILINGS`, or another.
      interpret: run on the CPU, by JAX's interpreter.
      seeds: uint32 [group, 2], `threefry.seeds`, to round the equal parts that x's first axes
        count stochastically; each must have a multiple of 2048 numbers. None: round to nearest.

    Returns:
      codes uint8 [..., n / 2] as in `NVFP4Tensor.packed`, scales float8_e4m3fn [..., n / 16].

    Raises:
      InputError: another dtype, a shape that blocks and threads do not divide, an unknown rule,
        seeds of another dtype or shape.
    """
    groups = lib.validate(x, rule, seeds)
    if not _divides(x.shape, groups):
        raise InputError(
            f"nvfp4 kernel: shape {x.shape} must end in a multiple of {nvfp4.BLOCK} and hold a "
            f"multiple of {lib.ROWS * nvfp4.BLOCK} numbers for each of {groups} groups; use "
            "formats.quantize_nvfp4"
        )
    blocks = x.size // nvfp4.BLOCK
    at_most, in_flight = tiling
    tiles = blocks // (lib.ROWS * groups)
    steps = max(n for n in range(1, at_most + 1) if tiles % n == 0)
    body = functools.partial(
        _kernel, rule=rule, steps=steps, in_flight=min(in_flight, steps), tiles=tiles
    )
    codes, scales = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((blocks, nvfp4.BLOCK // 2), jnp.uint8),
            jax.ShapeDtypeStruct((blocks, 1), jnp.uint8),
        ),
        grid=(blocks // (lib.ROWS * steps),),
        grid_names=("program",),
        kernel_name="quantize_nvfp4" if seeds is None else "quantize_nvfp4_stochastic",
        interpret=interpret,
    )(*lib.constants_and(seeds, amax, rule, interpret), x.reshape(blocks, nvfp4.BLOCK))
    scales = lax.bitcast_convert_type(scales, jnp.float8_e4m3fn)
    rows, n = x.shape[:-1], x.shape[-1]
    return codes.reshape(*rows, n // 2), scales.reshape(*rows, n // nvfp4.BLOCK)


def _divides(shape, groups=1):
    """Whether threads divide the blocks of each group."""
    rows = len(shape) > 0 and shape[-1] % nvfp4.BLOCK == 0
    return rows and lib.fills(math.prod(shape), groups)


def _kernel(constants_ref, *refs, rule, steps, in_flight, tiles):
    *seeds_ref, x_ref, codes_ref, scales_ref = refs
    program = lax.axis_index("program")
    first = program * steps

    def step(index, x_smem):
        # A thread loads 8 numbers, 16 bytes, together; each then has a register to itself.
        x = mosaic.load(x_smem, mosaic.a_row_a_thread(8))
        x = plgpu.layout_cast(x.astype(jnp.float32), mosaic.a_row_a_thread(1))
        tile = first + index[0]
        noise = None
        if seeds_ref:
            group = lax.div(program, jnp.int32(tiles // steps))
            block = lib.thread() + ((tile - group * tiles) * lib.ROWS).astype(jnp.uint32)
            noise = threefry.random_bits(seeds_ref[0], group, block)
        codes, scales = lib.quantize_blocks(x, noise, constants_ref=constants_ref, rule=rule)
        rows = pl.ds(tile * lib.ROWS, lib.ROWS)
        mosaic.store(codes_ref.at[rows, :], codes)
        mosaic.store(scales_ref.at[rows, :], scales)

    run = plgpu.emit_pipeline(
        step,
        grid=(steps,),
        in_specs=[plgpu.BlockSpec((lib.ROWS, nvfp4.BLOCK), lambda i: (first + i, 0))],
        max_concurrent_steps=in_flight,
    )
    run(x_ref)
