"""FP8 by kernels and libraries, registered for the functions of `quant`."""

import jax.numpy as jnp

from longlive_jax.formats import FP8, FP8Pair, FP8Tensor
from longlive_jax.kernels import pack_fp8
from longlive_jax.ops import cached_attention
from longlive_jax.ops.quantized import quantize_rows
from longlive_jax.quant import kv, matmul, operands


@operands.quantize.register
def _(fmt: FP8, x, lead, axes=(), keys=None):
    del keys
    made = quantize_rows(x) if fmt.fused else fmt.quantize(x, lead, operands.agreed(axes))
    return operands.in_memory(made)


@matmul.scaled.register
def _(x: FP8Tensor, weight, dtype):
    """XLA's GemmRewriter passes a factor that is one number to the GPU's library.

    So sums are scaled, and rounded once, before they are written. The factor in dtype is exact: see
    `formats.FP8.quantize`.
    """
    if not (x.scale.size == weight.scale.size == 1 and matmul.is_native(FP8)):
        return matmul.matmul(x, weight, jnp.float32)
    # A number behind a barrier: of an array's, reshaped, the rounding would stay.
    scale = operands.in_memory(x.scale.reshape(()) * weight.scale.reshape(()))
    y = matmul.unscaled(x, weight, dtype) * scale.astype(dtype)
    return y.reshape(*x.shape[:-1], -1)


# ---------------------------------------------------------------------------------------------
# The KV cache: E4M3, one scale a video, chunk and head. A float has the same relative precision at
# any size, so that finer scales would gain nothing. 0.50 of bfloat16's bytes.


@kv.store_pair.register
def _(fmt: FP8Pair, k, v, axis=None):
    del axis
    return _pack(fmt, k, v)


def _pack(fmt, k, v):
    """Tokens are filled up with zeros to what the packed order needs; attention leaves them out."""
    k, v = (kv.load(x, x.dtype) for x in (k, v))
    padding = ((0, 0), (0, -k.shape[1] % fmt.tokens), (0, 0), (0, 0))
    return pack_fp8.pack(jnp.pad(k, padding), jnp.pad(v, padding))


@kv.axes.register
def _(fmt: FP8Pair):
    del fmt
    return (None, "heads", None), ("heads", None, None)


@kv.attend.register
def _(fmt: FP8Pair, q, own, past, layer, visible):
    tokens = own[0].shape[1]
    return cached_attention.attend_fp8(q, _pack(fmt, *own), past, layer, visible, tokens)
