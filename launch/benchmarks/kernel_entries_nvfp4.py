"""What `launch.bench kernels` runs of NVFP4's kernels: functions `(config) -> list[Entry]`."""

import functools
import math

import jax
import jax.numpy as jnp

from launch.benchmarks.kernel_entry import (
    SQUARE,
    Entry,
    interpret,
    on_cpu,
    relative_error,
    window,
)
from longlive_jax import config as config_lib
from longlive_jax import formats
from longlive_jax.formats import exact, nvfp4
from longlive_jax.kernels import dequantize_nvfp4 as dequantize_nvfp4_lib
from longlive_jax.kernels import quantize_nvfp4 as quantize_nvfp4_lib
from longlive_jax.kernels import quantize_nvfp4_columns as quantize_nvfp4_columns_lib
from longlive_jax.kernels import threefry
from longlive_jax.quant import kv, operands
from longlive_jax.quant import matmul as matmul_lib


def quantize_nvfp4(cfg: config_lib.Config) -> list[Entry]:
    m = cfg.model
    tokens = m.chunk_frames * (cfg.video.height // 32) * (cfg.video.width // 32)
    sizes = [((tokens, m.ffn_dim), "mse")]  # the largest activation of a block
    if not on_cpu():
        sizes = [(SQUARE, rule) for rule in ("mse", "static_6")] + sizes
    entries = [_quantize_nvfp4(*size) for size in sizes]
    return [*entries, _quantize_nvfp4_stochastic(cfg, "mse")]


def _quantize_nvfp4(shape, rule):
    lib = quantize_nvfp4_lib
    tilings = lib.TILINGS[:1] if on_cpu() else lib.TILINGS
    x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    kernel = functools.partial(lib.kernel, rule=rule, interpret=interpret())

    def given_amax(tiling):
        return lambda x: kernel(x, jnp.float32(4), tiling=tiling)

    def oracle(x):
        tensor = formats.quantize_nvfp4(x, rule)
        return tensor.packed(), tensor.scales

    return Entry(
        name=f"quantize_nvfp4 {rule} {shape[0]}x{shape[1]}",
        arguments=(x,),
        call=lambda x: kernel(x, exact.largest_magnitude(x)),
        baseline=lambda x: formats.quantize_nvfp4(x, rule),
        oracle=oracle,
        details={
            "amax": exact.largest_magnitude,
            "as NVFP4Tensor": lambda x: lib.quantize_nvfp4(x, rule),
            **{f"kernel, tiling {t}": given_amax(t) for t in tilings},
        },
        bytes=math.prod(shape) * 2 + math.prod(shape) * 9 // 16,  # x read once; codes, scales
    )


def _quantize_nvfp4_stochastic(cfg, rule):
    """A gradient of a chunk, as dgrad's operand."""
    lib = quantize_nvfp4_lib
    x, key = _gradient(cfg)
    kernel = functools.partial(lib.kernel, rule=rule, interpret=interpret())

    def oracle(x, key):
        tensor = formats.quantize_nvfp4(x, rule, key=key)
        return tensor.packed(), tensor.scales

    def given_amax(x, key):
        return kernel(x, jnp.float32(4), seeds=threefry.seeds(key))

    return Entry(
        name=f"quantize_nvfp4 {rule}, stochastic, {x.shape[0]}x{x.shape[1]}",
        arguments=(x, key),
        call=lambda x, key: kernel(x, exact.largest_magnitude(x), seeds=threefry.seeds(key)),
        baseline=lambda x, key: formats.quantize_nvfp4(x, rule, key=key),
        oracle=oracle,
        details={
            "kernel": given_amax,
            "kernel, to nearest": lambda x, _: kernel(x, jnp.float32(4)),
            "noise by XLA": lambda x, key: nvfp4.random_bits(key, x.shape),
        },
        bytes=x.size * 2 + x.size * 9 // 16,
    )


def quantize_nvfp4_columns(cfg: config_lib.Config) -> list[Entry]:
    """A chunk's operands of a weight's gradient: the activation, and the output's gradient."""
    return [_quantize_nvfp4_columns(cfg, "mse", stochastic) for stochastic in (False, True)]


def _quantize_nvfp4_columns(cfg, rule, stochastic):
    lib = quantize_nvfp4_columns_lib
    x, key = _gradient(cfg)
    tiles = lib.TILES[:1] if on_cpu() else lib.TILES
    kernel = functools.partial(lib.kernel, rule=rule, transform=True, interpret=interpret())
    largest = functools.partial(lib.largest_magnitude, interpret=interpret())

    def by_xla(x, key):
        columns = formats.random_hadamard(jnp.swapaxes(x, 0, 1))
        return formats.quantize_nvfp4(columns, rule, key=key if stochastic else None)

    def oracle(x, key):
        tensor = by_xla(x, key)
        return tensor.packed(), tensor.scales

    def call(x, key, amax=None, **how):
        seeds = threefry.seeds(key) if stochastic else None
        return kernel(x, largest(x) if amax is None else amax, seeds=seeds, **how)

    def given_amax(tile):
        return functools.partial(call, amax=jnp.float32(4), tile=tile)

    rounding = "stochastic, " if stochastic else ""
    return Entry(
        name=f"quantize_nvfp4_columns {rule}, Hadamard, {rounding}{x.shape[0]}x{x.shape[1]}",
        arguments=(x, key),
        call=call,
        baseline=by_xla,
        oracle=oracle,
        details={
            "largest magnitude": lambda x, _: largest(x),
            **{f"kernel, tile {tile}": given_amax(tile) for tile in tiles},
        },
        bytes=x.size * 2 + x.size * 9 // 16,
    )


def _gradient(cfg):
    """A chunk's numbers [token, dim], and a key."""
    rows = cfg.model.chunk_frames * (cfg.video.height // 32) * (cfg.video.width // 32)
    shape = (64, 128) if on_cpu() else (rows, cfg.model.dim)
    keys = jax.random.split(jax.random.key(0), 2)
    return jax.random.normal(keys[0], shape, jnp.bfloat16), keys[1]


def dequantize_nvfp4(cfg: config_lib.Config) -> list[Entry]:
    """The past keys or values of one layer, out of the cache."""
    if on_cpu():
        shape = (2, 1, 2, 128, 2, 16)
    else:
        _, k, _, slots = window(cfg)
        shape = (2, 1, slots, *k.shape[1:])
    x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    q = jax.jit(lambda x: kv.store(x.reshape(-1, *shape[3:]), "nvfp4"))(x)
    q = jax.tree.map(lambda leaf: leaf.reshape(*shape[:3], *leaf.shape[1:]), q)
    size = math.prod(shape[1:])
    return [
        Entry(
            name=f"dequantize_nvfp4 {math.prod(shape[1:4])}x{math.prod(shape[4:])}",
            arguments=(q, jnp.int32(1)),
            call=functools.partial(dequantize_nvfp4_lib.kernel, interpret=interpret()),
            baseline=lambda q, layer: q[layer].dequantize(),
            bytes=size * 2 + size * 9 // 16,  # codes and scales read
        )
    ]


def expand_nvfp4(cfg: config_lib.Config) -> list[Entry]:
    """The FFN's first product of a chunk, with NVFP4 weights that are expanded before it."""
    rows = cfg.model.chunk_frames * (cfg.video.height // 32) * (cfg.video.width // 32)
    depth, n = cfg.model.dim, cfg.model.ffn_dim
    if on_cpu():
        rows, depth, n = 8, 64, 64
    keys = jax.random.split(jax.random.key(0), 2)
    x, w = (
        jax.random.normal(key, (size, depth), jnp.bfloat16) for key, size in zip(keys, (rows, n))
    )
    w = jax.jit(formats.quantize_nvfp4)(w)
    expand = functools.partial(dequantize_nvfp4_lib.expand, interpret=interpret())

    def product(x, w):
        contract = (((1,), (1,)), ((), ()))
        return jax.lax.dot_general(x, w, contract, preferred_element_type=x.dtype)

    return [
        Entry(
            name=f"expand_nvfp4 and product {rows}x{depth}x{n}",
            arguments=(x, w, jax.jit(matmul_lib.expand_by_xla)(w)),
            call=lambda x, w, _: product(x, expand(w)),
            # In memory, as a library wants it: the sampler has XLA make no products itself.
            baseline=lambda x, w, _: product(x, operands.in_memory(matmul_lib.expand_by_xla(w))),
            error=relative_error,
            limit=2e-3,  # sums in another order, then rounded
            details={
                "bfloat16 weights": lambda x, _, w: product(x, w),
                "expansion": lambda _, w, __: expand(w),
                "expansion by XLA": lambda _, w, __: matmul_lib.expand_by_xla(w),
            },
            bytes=2 * (x.size + rows * n) + w.values.size * 9 // 16,
            flops=2 * rows * depth * n,
        )
    ]


ENTRIES = (quantize_nvfp4, quantize_nvfp4_columns, dequantize_nvfp4, expand_nvfp4)
