"""The NVFP4 kernels of `launch.bench kernels`: functions `(config) -> list[Entry]`."""

import functools
import math

import jax
import jax.numpy as jnp

from launch.benchmarks import kernel_entry as entry
from launch.benchmarks.kernel_entry import Entry, by_interpreter
from longlive_jax import config as config_lib
from longlive_jax import formats
from longlive_jax.formats import exact, nvfp4
from longlive_jax.kernels import dequantize_nvfp4 as dequantize_nvfp4_lib
from longlive_jax.kernels import quantize_nvfp4 as quantize_nvfp4_lib
from longlive_jax.kernels import quantize_nvfp4_columns as quantize_nvfp4_columns_lib
from longlive_jax.kernels import threefry
from longlive_jax.quant import kv, operands


def quantize_nvfp4(cfg: config_lib.Config) -> list[Entry]:
    """The largest activation of a block, and a chunk's gradient as dgrad's operand."""
    sizes = [((entry.tokens(cfg), cfg.model.ffn_dim), "mse")]
    if not entry.on_cpu():
        sizes = [(entry.SQUARE, rule) for rule in ("mse", "static_6")] + sizes
    entries = [_quantize_nvfp4(*size) for size in sizes]
    return [*entries, _quantize_nvfp4_stochastic(cfg, "mse")]


def _quantize_nvfp4(shape, rule):
    lib = quantize_nvfp4_lib
    tilings = lib.TILINGS[:1] if entry.on_cpu() else lib.TILINGS
    x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    kernel = by_interpreter(lib.kernel, rule=rule)

    def given_amax(tiling):
        return lambda x: kernel(x, jnp.float32(4), tiling=tiling)

    by_xla = functools.partial(formats.quantize_nvfp4, rule=rule)
    return Entry(
        name=f"quantize_nvfp4 {rule} {shape[0]}x{shape[1]}",
        arguments=(x,),
        call=lambda x: kernel(x, exact.largest_magnitude(x)),
        baseline=by_xla,
        oracle=lambda x: _packed(by_xla(x)),
        details={
            "amax": exact.largest_magnitude,
            "as NVFP4Tensor": lambda x: lib.quantize_nvfp4(x, rule),
            **{f"kernel, tiling {t}": given_amax(t) for t in tilings},
        },
        bytes=x.nbytes + _codes(x),
    )


def _packed(tensor):
    return tensor.packed(), tensor.scales


def _codes(x):
    """Bytes of x's codes and scales."""
    return x.size * 9 // 16


def _quantize_nvfp4_stochastic(cfg, rule):
    x, key = _gradient(cfg)
    kernel = by_interpreter(quantize_nvfp4_lib.kernel, rule=rule)

    def by_xla(x, key):
        return formats.quantize_nvfp4(x, rule, key=key)

    return Entry(
        name=f"quantize_nvfp4 {rule}, stochastic, {x.shape[0]}x{x.shape[1]}",
        arguments=(x, key),
        call=lambda x, key: kernel(x, exact.largest_magnitude(x), seeds=threefry.seeds(key)),
        baseline=by_xla,
        oracle=lambda x, key: _packed(by_xla(x, key)),
        details={
            "kernel": lambda x, key: kernel(x, jnp.float32(4), seeds=threefry.seeds(key)),
            "kernel, to nearest": lambda x, _: kernel(x, jnp.float32(4)),
            "noise by XLA": lambda x, key: nvfp4.random_bits(key, x.shape),
        },
        bytes=x.nbytes + _codes(x),
    )


def quantize_nvfp4_columns(cfg: config_lib.Config) -> list[Entry]:
    """A chunk's operands of a weight's gradient: the activation, and the output's gradient."""
    return [_quantize_nvfp4_columns(cfg, "mse", stochastic) for stochastic in (False, True)]


def _quantize_nvfp4_columns(cfg, rule, stochastic):
    lib = quantize_nvfp4_columns_lib
    x, key = _gradient(cfg)
    tiles = lib.TILES[:1] if entry.on_cpu() else lib.TILES
    kernel = by_interpreter(lib.kernel, rule=rule, transform=True)
    largest = by_interpreter(lib.largest_magnitude)

    def by_xla(x, key):
        columns = formats.random_hadamard(jnp.swapaxes(x, 0, 1))
        return formats.quantize_nvfp4(columns, rule, key=key if stochastic else None)

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
        oracle=lambda x, key: _packed(by_xla(x, key)),
        details={
            "largest magnitude": lambda x, _: largest(x),
            **{f"kernel, tile {tile}": given_amax(tile) for tile in tiles},
        },
        bytes=x.nbytes + _codes(x),
    )


def _gradient(cfg):
    """A chunk's numbers [token, dim], and a key."""
    shape = (64, 128) if entry.on_cpu() else (entry.tokens(cfg), cfg.model.dim)
    keys = jax.random.split(jax.random.key(0), 2)
    return jax.random.normal(keys[0], shape, jnp.bfloat16), keys[1]


def dequantize_nvfp4(cfg: config_lib.Config) -> list[Entry]:
    """The past keys or values of one layer, out of the cache."""
    _, k, _, slots = entry.window(cfg)
    shape = (2, 1, 2, 128, 2, 16) if entry.on_cpu() else (2, 1, slots, *k.shape[1:])
    x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    q = jax.jit(lambda x: kv.store(formats.NVFP4("mse"), x.reshape(-1, *shape[3:])))(x)
    q = jax.tree.map(lambda leaf: leaf.reshape(*shape[:3], *leaf.shape[1:]), q)
    return [
        Entry(
            name=f"dequantize_nvfp4 {math.prod(shape[1:4])}x{math.prod(shape[4:])}",
            arguments=(q, jnp.int32(1)),
            call=by_interpreter(dequantize_nvfp4_lib.kernel),
            baseline=lambda q, layer: q[layer].dequantize(),
            bytes=x[0].nbytes + _codes(x[0]),
        )
    ]


def expand_nvfp4(cfg: config_lib.Config) -> list[Entry]:
    """The FFN's first product of a chunk, with NVFP4 weights that are expanded before it."""
    rows, depth, n = entry.tokens(cfg), cfg.model.dim, cfg.model.ffn_dim
    if entry.on_cpu():
        rows, depth, n = 8, 64, 64
    keys = jax.random.split(jax.random.key(0), 2)
    x, w = (
        jax.random.normal(key, (size, depth), jnp.bfloat16) for key, size in zip(keys, (rows, n))
    )
    w = jax.jit(formats.quantize_nvfp4)(w)
    expand = by_interpreter(dequantize_nvfp4_lib.expand)

    def product(x, w):
        contract = (((1,), (1,)), ((), ()))
        return jax.lax.dot_general(x, w, contract, preferred_element_type=x.dtype)

    return [
        Entry(
            name=f"expand_nvfp4 and product {rows}x{depth}x{n}",
            arguments=(x, w, jax.jit(formats.NVFP4Tensor.operand)(w)),
            call=lambda x, w, _: product(x, expand(w)),
            # In memory, as a library wants it: the sampler has XLA make no products itself.
            baseline=lambda x, w, _: product(x, operands.in_memory(w.operand())),
            error=entry.relative_error,
            limit=2e-3,  # sums in another order, then rounded
            details={
                "bfloat16 weights": lambda x, _, w: product(x, w),
                "expansion": lambda _, w, __: expand(w),
                "expansion by XLA": lambda _, w, __: w.operand(),
            },
            bytes=2 * (x.size + rows * n) + _codes(w.values),
            flops=2 * rows * depth * n,
        )
    ]


ENTRIES = (quantize_nvfp4, quantize_nvfp4_columns, dequantize_nvfp4, expand_nvfp4)
