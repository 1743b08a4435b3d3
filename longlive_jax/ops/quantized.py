"""Operations that write FP8 operands: one pass over memory where a kernel runs.

Each function is an operation of this package, rounding to bfloat16 included, followed by
`formats.quantize_fp8(axis=-1)`, and returns values and scales. On a Hopper GPU
`kernels.quantize_fp8` (for a PendingMatmul `gelu_fp8` and `add_norm_fp8`) runs, where its
`supports` says so: bfloat16, rows of a multiple of 1,024, one device's arrays (on a mesh: in a
manual `jax.shard_map`). Elsewhere XLA runs both. All refuse what `formats.quantize_fp8` refuses.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import formats
from longlive_jax.kernels import add_norm_fp8, gelu_fp8
from longlive_jax.kernels import quantize_fp8 as lib
from longlive_jax.ops import residual
from longlive_jax.ops.gelu import gelu
from longlive_jax.ops.norm import layer_norm


def quantize_rows(x: jax.Array) -> formats.FP8Tensor:
    """`formats.quantize_fp8(x, axis=-1)`, in E4M3: the same bits.

    x: [..., n], bfloat16 or float32. Values float8_e4m3fn [..., n], scale float32 [..., 1].
    """
    if not lib.supports(x):
        return formats.quantize_fp8(x, axis=-1)
    return _tensor(x, *lib.kernel(x))


@functools.singledispatch
def gelu_quantize_rows(x: jax.Array) -> formats.FP8Tensor:
    """`quantize_rows` of `gelu(x)`, which is computed in float32 and rounded to x's dtype once.

    The scales and bias of a PendingMatmul are part of that computation: nothing is rounded between.

    The kernel uses the chip's fast exponential: near a tie a number may become the neighbouring
    bfloat16, and its code the neighbouring E4M3 number.
    """
    if lib.supports(x):
        return _tensor(x, *lib.kernel(x, activation=lib.GELU))
    return _gelu_quantize_by_xla(x)


@gelu_quantize_rows.register
def _(x: formats.PendingMatmul):
    if gelu_fp8.supports(x):
        return _tensor(x, *gelu_fp8.kernel(x))
    return _gelu_quantize_by_xla(x)


def _gelu_quantize_by_xla(x):
    return formats.quantize_fp8(gelu(x.astype(jnp.float32)).astype(x.dtype), axis=-1)


def layer_norm_quantize_rows(
    x: jax.Array, scale: jax.Array, shift: jax.Array, eps: float = 1e-6
) -> formats.FP8Tensor:
    """`quantize_rows(layer_norm(x, scale, shift, eps))`.

    `scale` and `shift` broadcast against x and have its rank, as in `ops.norm`. The kernel takes
    one of each for a run of consecutive rows: with x's leading axes, then ones, then n.
    """
    if not lib.supports(x, scale, shift):
        return formats.quantize_fp8(layer_norm(x, scale, shift, eps), axis=-1)
    return _tensor(x, *lib.kernel(x, scale, shift, eps=eps))


def add_layer_norm_quantize_rows(
    x: jax.Array,
    y: jax.Array | formats.PendingMatmul,
    gate: jax.Array | None,
    scale: jax.Array,
    shift: jax.Array,
    eps: float = 1e-6,
) -> tuple[jax.Array, formats.FP8Tensor]:
    """`residual.add(x, y, gate)`, and `layer_norm_quantize_rows` of it.

    `gate`, `scale` and `shift` broadcast against x and have its rank. The kernel takes a
    PendingMatmul, and one of each for a run of rows, as `layer_norm_quantize_rows` does.
    """
    if isinstance(y, formats.PendingMatmul) and add_norm_fp8.supports(x, y, gate, scale, shift):
        total, *made = add_norm_fp8.kernel(x, y, gate, scale, shift, eps=eps)
        return total, _tensor(total, *made)
    total = residual.add(x, y, gate)
    return total, layer_norm_quantize_rows(total, scale, shift, eps)


def _tensor(x, values, scale):
    return formats.FP8Tensor(values=values, scale=scale, dtype=np.dtype(x.dtype))
