"""Products of quantised operands: how a machine multiplies them, and where scales are applied."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from longlive_jax.formats import Format, Quantized
from longlive_jax.recipes import Recipe


def matmul(
    x: Quantized, weight: Quantized, dtype: DTypeLike, sums: DTypeLike | None = None
) -> jax.Array:
    """x [..., in] times weight [part, out, in] -> [..., part * out], scaled in float32.

    sums: dtype of the product before its scales, which is accumulated in float32. None: float32,
      or `dtype` where the format may round it (`Quantized.rounds_sums`).
    """
    lead = x.shape[:-1]
    if sums is None:
        sums = dtype if x.rounds_sums else jnp.float32
    y = unscaled(x, weight, sums).reshape(*lead, -1).astype(jnp.float32)
    scales = [q.factor() for q in (x, weight)]
    if all(scale.size == 1 for scale in scales):
        # One number, which XLA's GemmRewriter gives to the library that makes the sums in float32.
        scales = [scale.reshape((1,) * y.ndim) for scale in scales]
    else:
        scales[1] = scales_of_rows(weight).reshape((1,) * len(lead) + (-1,))
    return (y * (scales[0] * scales[1])).astype(dtype)


@functools.singledispatch
def scaled(x: Quantized, weight: Quantized, dtype: DTypeLike) -> jax.Array:
    """`matmul` for results that are rounded to dtype next: in float32, or by a library in dtype."""
    del dtype
    return matmul(x, weight, jnp.float32)


def unscaled_by_dot(x: Quantized, weight: Quantized, dtype: DTypeLike) -> jax.Array:
    """The operands' products, [row, part * out], added up in float32 and left in this dtype."""
    a, b = (operand(q).reshape(-1, q.shape[-1]) for q in (x, weight))
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


unscaled = functools.singledispatch(unscaled_by_dot)


@functools.singledispatch
def operand(q: Quantized) -> jax.Array:
    """`q.operand()`."""
    return q.operand()


def scales_of_rows(q: Quantized) -> jax.Array:
    """float32 [..., 1] of q [..., in]: of a weight's rows, which are a product's columns, too."""
    return jnp.broadcast_to(q.factor(), (*q.shape[:-1], 1))


def backend(recipe: Recipe | None) -> str:
    """How this machine multiplies by the recipe, as text for reports."""
    if recipe is None:
        return "not quantised"
    weight = recipe.weight
    way = "as they are" if is_native(weight) else weight.otherwise
    return f"{recipe.name}: {weight.title}, multiplied {way}"


def is_native(fmt: Format | type[Format]) -> bool:
    """Whether the default device multiplies the format natively."""
    return _capability() >= fmt.native


def _capability() -> float:
    """Compute capability of an NVIDIA GPU; 0 for any other device."""
    device = jax.local_devices()[0]
    return float(getattr(device, "compute_capability", 0)) if device.platform == "gpu" else 0.0
