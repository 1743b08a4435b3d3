"""What `launch.bench kernels` runs: each kernel at the sizes of a config, with its oracle.

A kernel's entry is a function `(config) -> list[Entry]` in `ENTRIES`, one Entry a case.
"""

import functools
import math

import jax
import jax.numpy as jnp

from launch.benchmarks import kernel_entries_nvfp4
from launch.benchmarks.kernel_entry import Entry, interpret, on_cpu, relative_error, window
from longlive_jax import config as config_lib
from longlive_jax import formats
from longlive_jax.kernels import add_norm_fp8 as add_norm_fp8_lib
from longlive_jax.kernels import attention_bf16 as attention_bf16_lib
from longlive_jax.kernels import attention_bf16_hopper, attention_fp8_hopper
from longlive_jax.kernels import attention_fp8 as attention_fp8_lib
from longlive_jax.kernels import gelu_fp8 as gelu_fp8_lib
from longlive_jax.kernels import norm_product as norm_product_lib
from longlive_jax.kernels import norm_rotate as norm_rotate_lib
from longlive_jax.kernels import pack_fp8 as pack_fp8_lib
from longlive_jax.kernels import quantize_fp8 as quantize_fp8_lib
from longlive_jax.ops import quantized, residual, rope, rotated
from longlive_jax.ops.attention import attention
from longlive_jax.ops.gelu import gelu
from longlive_jax.ops.norm import layer_norm, rms_norm


def quantize_fp8(cfg: config_lib.Config) -> list[Entry]:
    """A chunk's activations by rows: as they are, behind a block's norm, behind its GELU."""
    m = cfg.model
    patches = (cfg.video.height // 32) * (cfg.video.width // 32)
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
    rows = cfg.model.chunk_frames * (cfg.video.height // 32) * (cfg.video.width // 32)
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
    patches = (cfg.video.height // 32) * (cfg.video.width // 32)
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
    rows = cfg.model.chunk_frames * (cfg.video.height // 32) * (cfg.video.width // 32)
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
    patches = (cfg.video.height // 32) * (cfg.video.width // 32)
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
    q, k, v, slots = window(cfg)
    return [_attention("attention_bf16", lib, hopper, q, (k, v), slots)]


def attention_fp8(cfg: config_lib.Config) -> list[Entry]:
    lib, hopper = attention_fp8_lib, attention_fp8_hopper
    q, k, v, slots = window(cfg)
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
        error=relative_error,
        limit=1e-2,
        bytes=rows * heads * head_dim * (4 * tokens + (2 if fp8 else 4) * keys),
        flops=4 * rows * heads * tokens * keys * head_dim,
        fp8=fp8,
    )


def pack_fp8(cfg: config_lib.Config) -> list[Entry]:
    """A chunk's fresh keys and values, for FP8 attention and its cache."""
    _, k, v, _ = window(cfg)
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


def _cache_of(x, slots):
    """One layer's cache [1, row, slot, ...] with these keys or values in every slot."""

    def one(leaf):
        return jnp.broadcast_to(leaf[None, :, None], (1, len(leaf), slots, *leaf.shape[1:])).copy()

    return jax.tree.map(one, x)


ENTRIES = (
    *kernel_entries_nvfp4.ENTRIES,
    quantize_fp8,
    gelu_fp8,
    add_norm_fp8,
    norm_product,
    norm_rotate,
    attention_bf16,
    pack_fp8,
    attention_fp8,
)
