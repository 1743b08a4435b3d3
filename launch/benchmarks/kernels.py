"""The Pallas kernels: right or wrong, then fast or slow beside XLA and the roofline.

A kernel's entry is a function `(config) -> list[Entry]` in `ENTRIES`, one Entry a case. On a CPU
kernels run in JAX's interpreter, at the config's sizes: give a tiny one, and heed no times there.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from launch.benchmarks import measure
from longlive_jax import config as config_lib
from longlive_jax import formats
from longlive_jax.errors import InputError
from longlive_jax.formats import exact
from longlive_jax.kernels import add_norm_fp8 as add_norm_fp8_lib
from longlive_jax.kernels import attention_bf16 as attention_bf16_lib
from longlive_jax.kernels import attention_bf16_hopper, attention_fp8_hopper, chip
from longlive_jax.kernels import attention_fp8 as attention_fp8_lib
from longlive_jax.kernels import dequantize_nvfp4 as dequantize_nvfp4_lib
from longlive_jax.kernels import gelu_fp8 as gelu_fp8_lib
from longlive_jax.kernels import norm_product as norm_product_lib
from longlive_jax.kernels import norm_rotate as norm_rotate_lib
from longlive_jax.kernels import pack_fp8 as pack_fp8_lib
from longlive_jax.kernels import quantize_fp8 as quantize_fp8_lib
from longlive_jax.kernels import quantize_nvfp4 as quantize_nvfp4_lib
from longlive_jax.kernels import quantize_nvfp4_columns as quantize_nvfp4_columns_lib
from longlive_jax.ops import quantized, residual, rope, rotated
from longlive_jax.ops.attention import attention
from longlive_jax.ops.gelu import gelu
from longlive_jax.ops.norm import layer_norm, rms_norm
from longlive_jax.quant import kv, operands
from longlive_jax.quant import matmul as matmul_lib
from longlive_jax.training import cost

# The issue of a quantiser's speed is settled at this size.
SQUARE = (8192, 8192)
TOGETHER = 4  # calls a program: to launch one takes as long as a short kernel


def differing_bytes(result, expected) -> float:
    """The share of bytes that differ, over all arrays."""
    pairs = zip(map(_bytes, jax.tree.leaves(result)), map(_bytes, jax.tree.leaves(expected)))
    counts = [(np.count_nonzero(a != b), a.size) for a, b in pairs]
    return sum(n for n, _ in counts) / sum(n for _, n in counts)


def _bytes(x):
    return np.atleast_1d(np.asarray(x)).view(np.uint8)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A kernel at one size. All calls are compiled with `arguments` as their arguments.

    name: the kernel and the size.
    call: what users get of it, start to end.
    baseline: the same by XLA, which is timed.
    oracle: what `call` must give; None: `baseline`.
    error, limit: (result, expected) -> a number, and the largest right one.
    details: more calls to time, by name: parts of `call`, other tilings.
    bytes, flops: the least that `call` moves between chip and memory, and multiplies and adds.
    fp8: whether the flops are those of FP8 products, of which a chip does twice as many.
    """

    name: str
    arguments: tuple
    call: Callable
    baseline: Callable
    bytes: int
    flops: int = 0
    fp8: bool = False
    oracle: Callable | None = None
    error: Callable = differing_bytes
    limit: float = 0.0
    details: dict[str, Callable] = dataclasses.field(default_factory=dict)


def quantize_nvfp4(cfg: config_lib.Config) -> list[Entry]:
    m = cfg.model
    tokens = m.chunk_frames * (cfg.sample.height // 32) * (cfg.sample.width // 32)
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
    x, key, noise = _gradient(cfg)
    kernel = functools.partial(lib.kernel, rule=rule, interpret=interpret())

    def oracle(x, key, _):
        tensor = formats.quantize_nvfp4(x, rule, key=key)
        return tensor.packed(), tensor.scales

    def call(x, key, _):
        noise = lib.random_bits(key, x.shape)
        return kernel(x, exact.largest_magnitude(x), noise=noise)

    return Entry(
        name=f"quantize_nvfp4 {rule}, stochastic, {x.shape[0]}x{x.shape[1]}",
        arguments=(x, key, noise),
        call=call,
        baseline=lambda x, key, _: formats.quantize_nvfp4(x, rule, key=key),
        oracle=oracle,
        details={
            "noise": lambda x, key, _: lib.random_bits(key, x.shape),
            "kernel, given noise": lambda x, _, noise: kernel(x, jnp.float32(4), noise=noise),
        },
        bytes=x.size * 2 + x.size * 9 // 16,  # noise might be made where it is used
    )


def quantize_nvfp4_columns(cfg: config_lib.Config) -> list[Entry]:
    """A chunk's operands of a weight's gradient: the activation, and the output's gradient."""
    return [_quantize_nvfp4_columns(cfg, "mse", stochastic) for stochastic in (False, True)]


def _quantize_nvfp4_columns(cfg, rule, stochastic):
    lib = quantize_nvfp4_columns_lib
    x, key, noise = _gradient(cfg)
    tiles = lib.TILES[:1] if on_cpu() else lib.TILES
    kernel = functools.partial(lib.kernel, rule=rule, transform=True, interpret=interpret())
    largest = functools.partial(lib.largest_magnitude, interpret=interpret())

    def by_xla(x, key, _):
        columns = formats.random_hadamard(jnp.swapaxes(x, 0, 1))
        return formats.quantize_nvfp4(columns, rule, key=key if stochastic else None)

    def oracle(*arguments):
        tensor = by_xla(*arguments)
        return tensor.packed(), tensor.scales

    def bits(x, key, _):
        return jnp.swapaxes(quantize_nvfp4_lib.random_bits(key, x.shape[::-1]), 0, 1)

    def call(x, key, _):
        return kernel(x, largest(x), noise=bits(x, key, _) if stochastic else None)

    def given(tile):
        def run(x, _, noise):
            noise = noise if stochastic else None
            return kernel(x, jnp.float32(4), noise=noise, tile=tile)

        return run

    details = {"largest magnitude": lambda x, *_: largest(x)}
    if stochastic:
        details["noise"] = bits
    rounding = "stochastic, " if stochastic else ""
    return Entry(
        name=f"quantize_nvfp4_columns {rule}, Hadamard, {rounding}{x.shape[0]}x{x.shape[1]}",
        arguments=(x, key, noise),
        call=call,
        baseline=by_xla,
        oracle=oracle,
        details=details | {f"kernel, tile {tile}": given(tile) for tile in tiles},
        bytes=x.size * 2 + x.size * 9 // 16,
    )


def _gradient(cfg):
    """A chunk's numbers [token, dim], a key, and noise for as many numbers."""
    rows = cfg.model.chunk_frames * (cfg.sample.height // 32) * (cfg.sample.width // 32)
    shape = (64, 128) if on_cpu() else (rows, cfg.model.dim)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], shape, jnp.bfloat16)
    return x, keys[1], quantize_nvfp4_lib.random_bits(keys[2], shape)


def dequantize_nvfp4(cfg: config_lib.Config) -> list[Entry]:
    """The past keys or values of one layer, out of the cache."""
    if on_cpu():
        shape = (2, 1, 2, 128, 2, 16)
    else:
        _, k, _, slots = _window(cfg)
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
    rows = cfg.model.chunk_frames * (cfg.sample.height // 32) * (cfg.sample.width // 32)
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
            error=_relative_error,
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


def quantize_fp8(cfg: config_lib.Config) -> list[Entry]:
    """A chunk's activations by rows: as they are, behind a block's norm, behind its GELU."""
    m = cfg.model
    patches = (cfg.sample.height // 32) * (cfg.sample.width // 32)
    frames, dim, ffn_dim = m.chunk_frames, m.dim, m.ffn_dim
    if on_cpu():
        frames, patches, dim, ffn_dim = 2, 3, quantize_fp8_lib.SLICE, 2 * quantize_fp8_lib.SLICE
    keys = jax.random.split(jax.random.key(0), 4)
    x, wide = (
        jax.random.normal(key, (1, 1, frames, patches, n), jnp.bfloat16)
        for key, n in zip(keys, (dim, ffn_dim))
    )
    scale, shift = (jax.random.normal(key, (1, 1, frames, 1, dim)) for key in keys[2:])
    norm = (x, 1 + scale, shift)
    return [
        _quantize_fp8("", (x,), lambda x: x, quantized.quantize_rows),
        _quantize_fp8("", (wide,), lambda x: x, quantized.quantize_rows),
        _quantize_fp8("layer_norm ", norm, layer_norm, quantized.layer_norm_quantize_rows),
        _quantize_fp8("gelu ", (wide,), gelu, quantized.gelu_quantize_rows, activation="gelu"),
    ]


def _quantize_fp8(name, arguments, operation, public, **how):
    lib = quantize_fp8_lib
    x = arguments[0]
    kernel = functools.partial(lib.kernel, interpret=interpret(), **how)
    tilings = () if on_cpu() else lib.tilings(x.shape[-1], len(arguments) > 1)

    def oracle(x, *rest):
        """The operation in float32, rounded once."""
        return _by_rows(operation(x.astype(jnp.float32), *rest).astype(x.dtype))

    return Entry(
        name=f"quantize_fp8 {name}{x.size // x.shape[-1]}x{x.shape[-1]}",
        arguments=arguments,
        call=kernel,
        baseline=lambda *x: _by_rows(operation(*x)),
        oracle=oracle,
        # An exponential or a sum that is off by float32's last bit, before two roundings.
        limit=1e-2 if name else 0.0,
        details={
            "as FP8Tensor": lambda *x: public(*x),
            **{f"kernel, tiling {t}": functools.partial(kernel, tiling=t) for t in tilings},
        },
        # All read once; codes and scales written.
        bytes=sum(y.nbytes for y in arguments) + x.size + 4 * x.size // x.shape[-1],
    )


def gelu_fp8(cfg: config_lib.Config) -> list[Entry]:
    """The FFN's first product of a chunk, before its scales and bias."""
    rows = cfg.model.chunk_frames * (cfg.sample.height // 32) * (cfg.sample.width // 32)
    n = cfg.model.ffn_dim
    if on_cpu():
        rows, n = 6, 2 * quantize_fp8_lib.SLICE
    x = _product(rows, n)

    return [
        Entry(
            name=f"gelu_fp8 {rows}x{n}",
            arguments=(x,),
            call=functools.partial(gelu_fp8_lib.kernel, interpret=interpret()),
            baseline=lambda x: _by_rows(gelu(x.astype(x.dtype))),
            oracle=lambda x: _by_rows(gelu(x.astype(jnp.float32)).astype(x.dtype)),
            limit=1e-2,  # as of quantize_fp8 behind GELU
            bytes=_nbytes(x) + rows * (n + 4),
        )
    ]


def _by_rows(x):
    q = formats.quantize_fp8(x, axis=-1)
    return q.values, q.scale


def _product(rows, n):
    keys = jax.random.split(jax.random.key(0), 4)
    return formats.Product(
        sums=128 * jax.random.normal(keys[0], (1, rows, n), jnp.bfloat16),
        row=jnp.exp(jax.random.normal(keys[1], (1, rows, 1)) / 4) / 128,
        column=jnp.exp(jax.random.normal(keys[2], (n,)) / 4),
        bias=jax.random.normal(keys[3], (n,), jnp.bfloat16),
    )


def _nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def add_norm_fp8(cfg: config_lib.Config) -> list[Entry]:
    """A chunk's hidden states and a layer's product, its gate, and a norm's modulation."""
    lib = add_norm_fp8_lib
    patches = (cfg.sample.height // 32) * (cfg.sample.width // 32)
    frames, dim = cfg.model.chunk_frames, cfg.model.dim
    if on_cpu():
        frames, patches, dim = 2, 3, quantize_fp8_lib.SLICE
    lead = (1, frames, patches)
    y = _product(frames * patches, dim)
    y = y.replace(sums=y.sums.reshape(*lead, dim), row=y.row.reshape(*lead, 1))
    keys = jax.random.split(jax.random.key(1), 4)
    x = jax.random.normal(keys[0], y.shape, jnp.bfloat16)
    affine = [jax.random.normal(key, (1, frames, 1, dim)) for key in keys[1:]]

    def by_xla(x, y, gate, scale, shift):
        x = residual.add(x, y, gate)
        return x, *_by_rows(layer_norm(x, scale, shift))

    def oracle(x, y, gate, scale, shift):
        x = jax.lax.optimization_barrier(residual.add(x, y, gate))
        return x, *_by_rows(layer_norm(x.astype(jnp.float32), scale, shift).astype(x.dtype))

    return [
        Entry(
            name=f"add_norm_fp8 {frames * patches}x{dim}",
            arguments=(x, y, *affine),
            call=functools.partial(lib.kernel, interpret=interpret()),
            baseline=by_xla,
            oracle=oracle,
            limit=1e-2,  # as of quantize_fp8 behind a norm
            bytes=_nbytes((x, y, affine)) + x.nbytes + x.size + 4 * x.size // dim,
        )
    ]


def norm_product(cfg: config_lib.Config) -> list[Entry]:
    """The queries of a chunk's cross-attention."""
    rows = cfg.model.chunk_frames * (cfg.sample.height // 32) * (cfg.sample.width // 32)
    dim = cfg.model.dim
    if on_cpu():
        rows, dim = 6, quantize_fp8_lib.SLICE
    x = _product(rows, dim)
    weight = 1 + jax.random.normal(jax.random.key(1), (dim,), jnp.bfloat16) / 4
    return [
        Entry(
            name=f"norm_product {rows}x{dim}",
            arguments=(x, weight),
            call=functools.partial(norm_product_lib.kernel, interpret=interpret()),
            baseline=lambda x, w: rms_norm(x.astype(x.dtype), w),
            oracle=lambda x, w: rms_norm(x.astype(jnp.float32), w).astype(x.dtype),
            limit=1e-3,  # of the order of the norm's sum
            bytes=_nbytes((x, weight)) + x.sums.nbytes,
        )
    ]


def norm_rotate(cfg: config_lib.Config) -> list[Entry]:
    """A chunk's queries, keys and values out of a layer's fused projection, array and product."""
    lib, m = norm_rotate_lib, cfg.model
    patches = (cfg.sample.height // 32) * (cfg.sample.width // 32)
    tokens, dim = m.chunk_frames * patches, m.dim
    if on_cpu():
        tokens, dim = 4, lib.SLICE
    product = _product(tokens, 3 * dim)
    keys = jax.random.split(jax.random.key(1), 2)
    weights = (1 + jax.random.normal(keys[0], (2, dim)) / 4).astype(jnp.bfloat16)
    angle = jax.random.uniform(keys[1], (1, tokens, lib.HEAD_DIM // 2), maxval=2 * math.pi)
    kernel = functools.partial(lib.kernel, interpret=interpret())

    def oracle(qkv, weight_q, weight_k, angle, *_):
        q, k, v = jnp.split(qkv.astype(qkv.dtype), 3, axis=-1)
        # XLA may otherwise leave out the rounding behind the norm.
        q, k = jax.lax.optimization_barrier((rms_norm(q, weight_q), rms_norm(k, weight_k)))
        q, k, v = (x.reshape(*x.shape[:-1], -1, lib.HEAD_DIM) for x in (q, k, v))
        return rope.rotate(q, angle), rope.rotate(k, angle), v

    def given_cosines(qkv, weight_q, weight_k, _, *x):
        return kernel(qkv, weight_q, weight_k, *x)

    return [
        Entry(
            name=f"norm_rotate {name}{tokens}x{dim}",
            arguments=(qkv, *weights, angle, jnp.cos(angle), jnp.sin(angle)),
            call=lambda *x: kernel(*x[:3], jnp.cos(x[3]), jnp.sin(x[3])),
            baseline=lambda *x: rotated.composed(*x[:4]),
            oracle=oracle,
            limit=1e-3,  # of the order of the norm's sum, and of a contracted one
            details={"given cosines": given_cosines},
            # Cosines and sines read; q, k and v written.
            bytes=_nbytes((qkv, weights)) + 2 * (angle.nbytes + tokens * 3 * dim),
        )
        for name, qkv in (("", product.astype(jnp.bfloat16)), ("of a product ", product))
    ]


def attention_bf16(cfg: config_lib.Config) -> list[Entry]:
    lib, hopper = attention_bf16_lib, attention_bf16_hopper
    q, k, v, slots = _window(cfg)
    return [_attention("attention_bf16", lib, hopper, q, (k, v), slots)]


def attention_fp8(cfg: config_lib.Config) -> list[Entry]:
    lib, hopper = attention_fp8_lib, attention_fp8_hopper
    q, k, v, slots = _window(cfg)
    fresh = jax.jit(pack_fp8_lib.pack)(k, v)
    return [_attention("attention_fp8", lib, hopper, q, fresh, slots, fp8=True)]


def _attention(name, lib, hopper, q, fresh, slots, fp8=False):
    """A steady chunk's self-attention of one layer over the cache, window full."""
    rows, tokens, heads, head_dim = q.shape
    keys = (1 + slots) * tokens
    past = (_cache_of(x, slots) for x in fresh)
    return Entry(
        name=f"{name} {tokens}x{keys}, {heads} heads",
        arguments=(q, *fresh, *past, jnp.int32(0), jnp.full((rows,), slots, jnp.int32)),
        call=functools.partial(hopper.attention, interpret=interpret()),
        baseline=functools.partial(lib.by_dense, dense=attention),
        oracle=lib.reference,
        error=_relative_error,
        limit=1e-2,
        bytes=rows * heads * head_dim * (4 * tokens + (2 if fp8 else 4) * keys),
        flops=4 * rows * heads * tokens * keys * head_dim,
        fp8=fp8,
    )


def pack_fp8(cfg: config_lib.Config) -> list[Entry]:
    """A chunk's fresh keys and values, for FP8 attention and its cache."""
    _, k, v, _ = _window(cfg)
    lib = pack_fp8_lib

    def by_xla(k, v):
        return attention_fp8_lib.pack(lib.quantize_heads(k), lib.quantize_heads(v))

    return [
        Entry(
            name=f"pack_fp8 {k.shape[1]} tokens, {k.shape[2]} heads",
            arguments=(k, v),
            call=functools.partial(lib.kernel, interpret=interpret()),
            baseline=by_xla,
            bytes=2 * k.size * 3,
        )
    ]


def _window(cfg):
    """A chunk's q, k, v [1, token, head, head_dim], and the cache's slots."""
    if on_cpu():
        tokens, slots, heads = attention_fp8_hopper.TILE, 1, 1
    else:
        heads = cfg.model.num_heads
        patches = (cfg.sample.height // 32) * (cfg.sample.width // 32)
        tokens = cfg.model.chunk_frames * patches
        slots = cfg.sample.window_frames // cfg.model.chunk_frames - 1
    shape = (1, tokens, heads, attention_fp8_hopper.HEAD_DIM)
    keys = jax.random.split(jax.random.key(0), 3)
    return *(jax.random.normal(key, shape, jnp.bfloat16) for key in keys), slots


def _cache_of(x, slots):
    """One layer's cache [1, row, slot, ...] with these keys or values in every slot."""

    def one(leaf):
        return jnp.broadcast_to(leaf[None, :, None], (1, len(leaf), slots, *leaf.shape[1:])).copy()

    return jax.tree.map(one, x)


def _relative_error(result, expected) -> float:
    a, b = (np.asarray(x, np.float32) for x in (result, expected))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


ENTRIES = (
    quantize_nvfp4,
    quantize_nvfp4_columns,
    dequantize_nvfp4,
    expand_nvfp4,
    quantize_fp8,
    gelu_fp8,
    add_norm_fp8,
    norm_product,
    norm_rotate,
    attention_bf16,
    pack_fp8,
    attention_fp8,
)


def run(cfg: config_lib.Config) -> dict:
    if not on_cpu() and not chip.is_hopper():
        capability = getattr(jax.devices()[0], "compute_capability", "")
        raise InputError(
            f"bench kernels: {jax.devices()[0].device_kind}, of capability {capability or 'none'}; "
            "kernels need a Hopper GPU (9.0), or a CPU (JAX_PLATFORMS=cpu) to be interpreted"
        )
    copied = jax.ShapeDtypeStruct((64, 64) if on_cpu() else SQUARE, jnp.bfloat16)
    copy = _milliseconds(jnp.negative, (jnp.ones(copied.shape, copied.dtype),))
    figures = {"copy_ms": copy, "copy_gb_s": 4 * math.prod(copied.shape) / copy / 1e6}
    print(f"copy of {copied.shape} bfloat16: {copy:.4f} ms, {figures['copy_gb_s']:.0f} GB/s")
    for entries in ENTRIES:
        for entry in entries(cfg):
            figures[entry.name] = _measure(entry, figures["copy_gb_s"])
    return figures | measure.device_figures()


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def interpret() -> plgpu.InterpretGPUParams | None:
    """The `interpret` of a kernel: set where there is no GPU."""
    return plgpu.InterpretGPUParams() if on_cpu() else None


def _measure(entry, copy_gb_s):
    result = jax.jit(entry.call)(*entry.arguments)
    expected = jax.jit(entry.oracle or entry.baseline)(*entry.arguments)
    error = float(entry.error(result, expected))
    del result, expected
    ms = _milliseconds(entry.call, entry.arguments)
    # The data sheet's peak for products; for memory what a copy does, which is below its.
    peak = cost.PEAK_TFLOPS.get(jax.devices()[0].device_kind, math.inf) * (1 + entry.fp8)
    bounds = {"memory": entry.bytes / copy_gb_s / 1e6, "products": entry.flops / peak / 1e9}
    bound = max(bounds, key=bounds.get)
    figures = {
        "error": error,
        "right": error <= entry.limit,
        "ms": ms,
        "gb_s": entry.bytes / ms / 1e6,
        "tflops": entry.flops / ms / 1e9,
        "bound_by": bound,
        "bound_ms": bounds[bound],
        "roofline_share": bounds[bound] / ms,
        "xla_ms": _milliseconds(entry.baseline, entry.arguments),
        "copy_of_the_same_bytes_ms": bounds["memory"],
        "details_ms": {},
    }
    print(
        f"{entry.name}: {'right' if figures['right'] else 'WRONG'}, error {error:.3g}", flush=True
    )
    print(
        f"  {ms:.4f} ms, {figures['gb_s']:.0f} GB/s, {figures['tflops']:.0f} TFLOP/s: "
        f"{100 * figures['roofline_share']:.0f} % of what {bound} allows; "
        f"XLA {figures['xla_ms']:.4f} ms; a copy of as many bytes {bounds['memory']:.4f} ms"
    )
    for name, call in entry.details.items():
        figures["details_ms"][name] = _milliseconds(call, entry.arguments)
        print(f"  {name:28} {figures['details_ms'][name]:.4f} ms", flush=True)
    return figures


def _milliseconds(call, arguments):
    calls, repeats = (1, 1) if on_cpu() else (TOGETHER, 15)
    program = functools.partial(_several(call), [arguments] * calls)
    measure.seconds(program, 1 if on_cpu() else 3)
    return 1e3 * measure.mean_seconds(program, repeats) / calls


def _several(call):
    """All results of a call of each of some arguments, as one program.

    They are parameters of their own: of the same, the compiler would make one call.
    """
    call = jax.jit(call)  # lowered once
    return jax.jit(lambda several: [call(*arguments) for arguments in several])
