"""Products of quantised operands: by which means a machine multiplies, and where scales come in."""

import jax
import jax.numpy as jnp

from longlive_jax.formats import FP8Tensor, NVFP4Tensor, Quantized, nvfp4
from longlive_jax.kernels import dequantize_nvfp4
from longlive_jax.quant.operands import in_memory
from longlive_jax.quant.recipe import NVFP4, Recipe


def matmul(x: Quantized, weight: Quantized, dtype, sums=None) -> jax.Array:
    """x [..., in] times weight [part, out, in] -> [..., part * out], scaled in float32.

    sums: dtype that the codes' products, added up in float32, leave the product in. None: float32,
      of 8-bit codes `dtype`: they are wrong by more than bfloat16's rounding, which halves what is
      written and read here.
    """
    lead = x.shape[:-1]
    if isinstance(x, NVFP4Tensor) and _has_fp4():
        operands = (x.values, weight.values, x.scales, weight.scales)
        y = jax.nn.scaled_matmul(*(y.reshape(1, -1, y.shape[-1]) for y in operands))
    else:
        if sums is None:
            sums = dtype if isinstance(x, FP8Tensor) else jnp.float32
        y = unscaled(x, weight, sums)
    y = y.reshape(*lead, -1).astype(jnp.float32)
    scales = [_scale(q) for q in (x, weight)]
    if all(scale.size == 1 for scale in scales):
        # One number, which XLA's GemmRewriter gives to the library that makes the sums in float32.
        scales = [scale.reshape((1,) * y.ndim) for scale in scales]
    else:
        scales[1] = column_scales(weight).reshape((1,) * len(lead) + (-1,))
    return (y * (scales[0] * scales[1])).astype(dtype)


def scaled(x, weight, dtype):
    """`matmul` for what is rounded to dtype next, where a GPU's library multiplies FP8 in float32.

    XLA's GemmRewriter gives that library a factor of its sums that is one number. So sums are
    scaled, and rounded once, before they are written. The factor in dtype is exact: see `operands`.
    """
    one = isinstance(x, FP8Tensor) and x.scale.size == weight.scale.size == 1
    if not (one and multiplies_fp8()):
        return matmul(x, weight, jnp.float32)
    # A number behind a barrier: of an array's, reshaped, the rounding would stay.
    scale = in_memory(x.scale.reshape(()) * weight.scale.reshape(()))
    return (unscaled(x, weight, dtype) * scale.astype(dtype)).reshape(*x.shape[:-1], -1)


def unscaled(x, weight, dtype):
    """The codes' products, [row, part * out], added up in float32 and left in this dtype."""
    a, b = (_codes(q).reshape(-1, q.shape[-1]) for q in (x, weight))
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


def row_scales(x):
    """float32 [..., 1]: of the rows of a product by x [..., in]."""
    return jnp.broadcast_to(_scale(x), (*x.shape[:-1], 1))


def column_scales(weight):
    """float32 [part, out, 1]: of the columns of a product by weight [part, out, in]."""
    return jnp.broadcast_to(_scale(weight), (*weight.shape[:-1], 1))


def _codes(q: Quantized) -> jax.Array:
    """[..., n] that one scale a row or tensor is missing from, in the dtype to multiply in."""
    if isinstance(q, FP8Tensor):
        return q.values
    if dequantize_nvfp4.expands(q):
        return dequantize_nvfp4.expand(q)
    return expand_by_xla(q)


def expand_by_xla(q: NVFP4Tensor) -> jax.Array:
    """Codes times the scales of their blocks, bfloat16 [..., n]; a kernel's fallback and oracle.

    A 4-bit float times an E4M3 scale has 6 significant bits: exact in bfloat16.
    """
    blocks = q.values.astype(jnp.bfloat16).reshape(*q.scales.shape, nvfp4.BLOCK)
    return (blocks * q.scales.astype(jnp.bfloat16)[..., None]).reshape(q.shape)


def _scale(q: Quantized) -> jax.Array:
    """What `_codes` must be multiplied with, float32 [..., 1], of q's rank."""
    if isinstance(q, FP8Tensor):
        scale = q.scale
    else:
        code, scale = nvfp4.RULES[q.rule]
        scale = q.amax / (code * scale)
    return scale.reshape(scale.shape + (1,) * (q.ndim - scale.ndim))


def backend(recipe: Recipe | None) -> str:
    """How this machine multiplies by the recipe, for people."""
    if recipe is None:
        return "not quantised"
    if isinstance(recipe.weight, NVFP4):
        way = "as they are" if _has_fp4() else "as bfloat16, which holds them exactly"
        return f"{recipe.name}: NVFP4, multiplied {way}"
    way = "as they are" if multiplies_fp8() else "by the compiler's own conversion"
    return f"{recipe.name}: FP8, multiplied {way}"


def _has_fp4() -> bool:
    """Whether the default device multiplies 4-bit floats with block scales."""
    return _capability() >= 10


def multiplies_fp8() -> bool:
    """Whether the default device multiplies 8-bit floats."""
    return _capability() >= 8.9


def _capability() -> float:
    """Of an NVIDIA GPU; 0 for any other device."""
    device = jax.local_devices()[0]
    return float(getattr(device, "compute_capability", 0)) if device.platform == "gpu" else 0.0
