"""The entries of `launch.bench kernels`: each kernel at the sizes of a config, with its oracle.

A kernel's entry is a function `(config) -> list[Entry]` in `ENTRIES`, one Entry a case.
"""

import math

import jax
import jax.numpy as jnp

from launch.benchmarks import kernel_entries_nvfp4
from launch.benchmarks import kernel_entry as entry
from launch.benchmarks.kernel_entry import Entry, by_interpreter, nbytes
from longlive_jax import config as config_lib
from longlive_jax import formats
from longlive_jax.kernels import add_norm_fp8 as add_norm_fp8_lib
from longlive_jax.kernels import attention_bf16 as attention_bf16_lib
from longlive_jax.kernels import attention_fp8 as attention_fp8_lib
from longlive_jax.kernels import gelu_fp8 as gelu_fp8_lib
from longlive_jax.kernels import norm_product as norm_product_lib
from longlive_jax.kernels import norm_rotate as norm_rotate_lib
from longlive_jax.kernels import pack_fp8 as pack_fp8_lib
from longlive_jax.kernels import quantize_fp8 as quantize_fp8_lib
from longlive_jax.ops import cached_attention, quantized, residual, rope, rotated
from longlive_jax.ops.gelu import gelu
from longlive_jax.ops.norm import layer_norm, rms_norm

# Of an exponential or a sum that is off by float32's last bit, before two roundings; of a sum's
# order alone, before one.
TWICE, ONCE = 1e-2, 1e-3


def quantize_fp8(cfg: config_lib.Config) -> list[Entry]:
    """A chunk's activations by rows: as they are, behind a block's norm, behind its GELU."""
    frames, patches = entry.chunk(cfg)
    widths = dim, _ = entry.width(cfg.model.dim), entry.width(cfg.model.ffn_dim, 2)
    keys = jax.random.split(jax.random.key(0), 4)
    x, wide = (
        jax.random.normal(key, (1, 1, frames, patches, n), jnp.bfloat16)
        for key, n in zip(keys, widths)
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
    x = arguments[0]
    rows, n = _matrix(x)
    tilings = () if entry.on_cpu() else quantize_fp8_lib.tilings(n, len(arguments) > 1)

    def kernel(**more):
        return by_interpreter(quantize_fp8_lib.kernel, **how, **more)

    def oracle(x, *rest):
        """The operation in float32, rounded once."""
        return _by_rows(operation(x.astype(jnp.float32), *rest).astype(x.dtype))

    return Entry(
        name=f"quantize_fp8 {name}{rows}x{n}",
        arguments=arguments,
        call=kernel(),
        baseline=lambda *x: _by_rows(operation(*x)),
        oracle=oracle,
        limit=TWICE if name else 0.0,
        details={
            "as FP8Tensor": lambda *x: public(*x),
            **{f"kernel, tiling {t}": kernel(tiling=t) for t in tilings},
        },
        # All read once; codes and scales written.
        bytes=nbytes(arguments) + _codes(x),
    )


def _matrix(x):
    return x.size // x.shape[-1], x.shape[-1]


def _codes(x):
    """Bytes of x's codes and of its rows' scales."""
    return x.size + 4 * _matrix(x)[0]


def _by_rows(x):
    q = formats.quantize_fp8(x, axis=-1)
    return q.values, q.scale


def gelu_fp8(cfg: config_lib.Config) -> list[Entry]:
    """The FFN's first product of a chunk, before its scales and bias."""
    x = entry.product(1, math.prod(entry.chunk(cfg)), entry.width(cfg.model.ffn_dim, 2))
    rows, n = _matrix(x.sums)
    return [
        Entry(
            name=f"gelu_fp8 {rows}x{n}",
            arguments=(x,),
            call=by_interpreter(gelu_fp8_lib.kernel),
            baseline=lambda x: _by_rows(gelu(x.astype(x.dtype))),
            oracle=lambda x: _by_rows(gelu(x.astype(jnp.float32)).astype(x.dtype)),
            limit=TWICE,
            bytes=nbytes(x) + _codes(x.sums),
        )
    ]


def add_norm_fp8(cfg: config_lib.Config) -> list[Entry]:
    """A chunk's hidden states and a layer's product, its gate, and a norm's modulation."""
    (frames, patches), dim = entry.chunk(cfg), entry.width(cfg.model.dim)
    y = entry.product(1, frames, patches, dim)
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
            call=by_interpreter(add_norm_fp8_lib.kernel),
            baseline=by_xla,
            oracle=oracle,
            limit=TWICE,
            bytes=nbytes((x, y, affine)) + x.nbytes + _codes(x),
        )
    ]


def norm_product(cfg: config_lib.Config) -> list[Entry]:
    """The queries of a chunk's cross-attention."""
    x = entry.product(1, math.prod(entry.chunk(cfg)), entry.width(cfg.model.dim))
    rows, n = _matrix(x.sums)
    weight = 1 + jax.random.normal(jax.random.key(1), (n,), jnp.bfloat16) / 4
    return [
        Entry(
            name=f"norm_product {rows}x{n}",
            arguments=(x, weight),
            call=by_interpreter(norm_product_lib.kernel),
            baseline=lambda x, w: rms_norm(x.astype(x.dtype), w),
            oracle=lambda x, w: rms_norm(x.astype(jnp.float32), w).astype(x.dtype),
            limit=ONCE,
            bytes=nbytes((x, weight)) + x.sums.nbytes,
        )
    ]


def norm_rotate(cfg: config_lib.Config) -> list[Entry]:
    """A chunk's queries, keys and values out of a layer's fused projection, array and product."""
    tokens, dim = math.prod(entry.chunk(cfg)), entry.width(cfg.model.dim)
    head_dim = norm_rotate_lib.HEAD_DIM
    product = entry.product(1, tokens, 3 * dim)
    keys = jax.random.split(jax.random.key(1), 2)
    weights = (1 + jax.random.normal(keys[0], (2, dim)) / 4).astype(jnp.bfloat16)
    angle = jax.random.uniform(keys[1], (1, tokens, head_dim // 2), maxval=2 * math.pi)
    kernel = by_interpreter(norm_rotate_lib.kernel)

    def oracle(qkv, weight_q, weight_k, angle, *_):
        q, k, v = jnp.split(qkv.astype(qkv.dtype), 3, axis=-1)
        # XLA may otherwise leave out the rounding behind the norm.
        q, k = jax.lax.optimization_barrier((rms_norm(q, weight_q), rms_norm(k, weight_k)))
        q, k, v = (x.reshape(*x.shape[:-1], -1, head_dim) for x in (q, k, v))
        return rope.rotate(q, angle), rope.rotate(k, angle), v

    return [
        Entry(
            name=f"norm_rotate {name}{tokens}x{dim}",
            arguments=(qkv, *weights, angle, jnp.cos(angle), jnp.sin(angle)),
            call=lambda *x: kernel(*x[:3], jnp.cos(x[3]), jnp.sin(x[3])),
            baseline=lambda *x: rotated.composed(*x[:4]),
            oracle=oracle,
            limit=ONCE,  # of a contracted sum's, too
            details={"given cosines": lambda *x: kernel(*x[:3], *x[4:])},
            # Cosines and sines read; q, k and v written.
            bytes=nbytes((qkv, weights)) + 2 * (angle.nbytes + tokens * 3 * dim),
        )
        for name, qkv in (("", product.astype(jnp.bfloat16)), ("of a product ", product))
    ]


def attention_bf16(cfg: config_lib.Config) -> list[Entry]:
    q, *fresh, slots = entry.window(cfg)
    how = {"baseline": cached_attention.dense, "oracle": cached_attention.reference}
    return [_attention(attention_bf16_lib.kernel, q, tuple(fresh), slots, **how)]


def attention_fp8(cfg: config_lib.Config) -> list[Entry]:
    q, *fresh, slots = entry.window(cfg)
    fresh = jax.jit(pack_fp8_lib.pack)(*fresh)
    how = {"baseline": cached_attention.dense_fp8, "oracle": cached_attention.reference_fp8}
    return [_attention(attention_fp8_lib.kernel, q, fresh, slots, fp8=True, **how)]


def _attention(kernel, q, fresh, slots, fp8=False, **how):
    """A steady chunk's self-attention of one layer over the cache, window full."""
    rows, tokens, heads, head_dim = q.shape
    keys = (1 + slots) * tokens
    kernel, filled = by_interpreter(kernel), jnp.full(rows, slots, jnp.int32)
    return Entry(
        name=f"attention_{'fp8' if fp8 else 'bf16'} {tokens}x{keys}, {heads} heads",
        arguments=(q, fresh, _cache_of(fresh, slots), jnp.int32(0), filled),
        call=lambda q, fresh, past, layer, filled: kernel(q, *fresh, *past, layer, filled),
        error=entry.relative_error,
        limit=1e-2,
        bytes=rows * heads * head_dim * (4 * tokens + (2 if fp8 else 4) * keys),
        flops=4 * rows * heads * tokens * keys * head_dim,
        fp8=fp8,
        **how,
    )


def pack_fp8(cfg: config_lib.Config) -> list[Entry]:
    """A chunk's fresh keys and values, for FP8 attention and its cache."""
    _, k, v, _ = entry.window(cfg)
    return [
        Entry(
            name=f"pack_fp8 {k.shape[1]} tokens, {k.shape[2]} heads",
            arguments=(k, v),
            call=by_interpreter(pack_fp8_lib.kernel),
            baseline=lambda *kv: attention_fp8_lib.pack(*map(pack_fp8_lib.quantize_heads, kv)),
            bytes=2 * k.size * 3,
        )
    ]


def _cache_of(x, slots):
    """One layer's cache [1, row, slot, ...] with these keys and values in every slot."""

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
