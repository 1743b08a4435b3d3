"""NVFP4 by kernels and libraries, registered for the functions of `quant`."""

import jax
import jax.numpy as jnp

from longlive_jax.formats import NVFP4, NVFP4Tensor, exact, from_packed
from longlive_jax.kernels import dequantize_nvfp4, threefry
from longlive_jax.kernels import quantize_nvfp4_columns as columns_lib
from longlive_jax.kernels.quantize_nvfp4 import quantize_each
from longlive_jax.quant import kv, matmul, operands

operands.dequantize.register(NVFP4Tensor, dequantize_nvfp4.dequantize)


@operands.quantize.register
def _(fmt: NVFP4, x, lead, axes=(), keys=None):
    return fmt.quantize(x, lead, operands.agreed(axes), keys, quantize_each)


@operands.columns.register
def _(fmt: NVFP4, y, lead, axes, keys=None):
    # The kernel reads y in place; XLA transposes first.
    if not columns_lib.supports(y, fmt.rule, fmt.block):
        return operands.columns_by_xla(fmt, y, lead, axes, keys)
    # In memory groups that its tiles divide lie one after the other.
    *_, group, row, n = y.shape
    tensors = y.reshape(-1, group * row, n)
    if fmt.hadamard:
        amax = jnp.stack([columns_lib.largest_magnitude(x) for x in tensors])
        amax = amax.reshape(y.shape[:lead])
    else:
        amax = exact.largest_magnitude(y, tuple(range(lead, y.ndim)))
    amax, keys = operands.agreed(axes)(amax), fmt.keys_of_each(keys, lead)
    each = zip(tensors, amax.reshape(-1), threefry.seeds_of_each(keys, len(tensors)))
    each = [columns_lib.kernel(x, a, fmt.rule, fmt.hadamard, s) for x, a, s in each]
    codes, scales = (jnp.stack(part).reshape(*y.shape[:lead], n, -1) for part in zip(*each))
    return from_packed(codes, scales, amax, fmt.rule, fmt.block, y.dtype)


@matmul.operand.register
def _(q: NVFP4Tensor):
    return dequantize_nvfp4.expand(q) if dequantize_nvfp4.expands(q) else q.operand()


@matmul.unscaled.register
def _(x: NVFP4Tensor, weight, dtype):
    if not matmul.is_native(NVFP4):
        return matmul.unscaled_by_dot(x, weight, dtype)
    arrays = (x.values, weight.values, x.scales, weight.scales)
    return jax.nn.scaled_matmul(*(y.reshape(1, -1, y.shape[-1]) for y in arrays))[0]


# ---------------------------------------------------------------------------------------------
# The KV cache: blocks along head_dim, and one largest magnitude a video and chunk, over tokens and
# heads, as in the original. 0.28 of bfloat16's bytes.


@kv.load_layer.register
def _(table: NVFP4Tensor, layer, dtype):
    if dequantize_nvfp4.supports(table, dtype):
        return dequantize_nvfp4.kernel(table, layer)[None]
    return kv.load_slice(table, layer, dtype)


@kv.exchange.register
def _(stored: NVFP4Tensor, send):
    """One message, and of bytes: not every backend sends floats of 4 or 8 bits."""
    codes, scales = stored.packed(), jax.lax.bitcast_convert_type(stored.scales, jnp.uint8)
    sent = send(jnp.concatenate([codes, scales], axis=-1))
    codes, scales = jnp.split(sent, [codes.shape[-1]], axis=-1)
    return from_packed(codes, scales, stored.amax, stored.rule, dtype=stored.dtype)
