"""A linear layer's weight with low-rank adapters beside it: W + scale A B, not added up.

The weight may be plain or quantised, and is frozen: only A and B have gradients. A fused weight
(q, k, v) has an adapter for each of the original's matrices, so that the numbers are theirs.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from longlive_jax import params as params_lib
from longlive_jax.params import ParamSpec


@struct.dataclass
class Adapted:
    """A weight and its adapters; the layer axis that stacked weights have first is all arrays'.

    base: [in, part * out], or `quant.linear.quantize_weight` of one.
    a: [in, part, rank]. b: [part, rank, out]. Their products are in the dtype of activations.
    scale: of the product of both: alpha / rank.
    """

    base: Any
    a: Any
    b: Any
    scale: float = struct.field(pytree_node=False)

    def product(self, x: jax.Array) -> jax.Array:
        """scale (x A) B for x [..., in] -> [..., part * out], in x's dtype."""
        a, b = self.a.astype(x.dtype), self.b.astype(x.dtype)
        inputs, parts, rank = a.shape
        h = jnp.matmul(x, a.reshape(inputs, parts * rank))
        if self.scale != 1:
            h = h * jnp.asarray(self.scale, h.dtype)
        each = [jnp.matmul(h[..., i * rank : (i + 1) * rank], b[i]) for i in range(parts)]
        return each[0] if parts == 1 else jnp.concatenate(each, axis=-1)


def specs(weight: ParamSpec, parts: int, rank: int) -> params_lib.Tree:
    """The specs of a and b of a plain weight [(layer,) in, part * out].

    They are sharded as the weight is, along the axes whose sizes its mesh divides for sure: those
    that are a multiple of the weight's own sharded axis.
    """
    *layer, inputs, outputs = weight.shape
    *layer_axes, into, out = weight.axes
    outputs //= parts
    sharded, size = (into, inputs) if into is not None else (out, outputs)

    def axis(n):
        return sharded if n % size == 0 else None

    return {
        "a": ParamSpec(
            (*layer, inputs, parts, rank), (*layer_axes, axis(inputs), None, None), _init(inputs)
        ),
        "b": ParamSpec((*layer, parts, rank, outputs), (*layer_axes, None, None, axis(outputs))),
    }


def _init(inputs):
    """PEFT's: Kaiming-uniform with a = sqrt(5), within 1 / sqrt(in)."""
    return params_lib.uniform(1 / math.sqrt(inputs))


def like(weight: Adapted, base: Any, plain: ParamSpec, parts: int) -> Adapted:
    """`weight` with specs for arrays. base: of its base. plain: of that, were it not quantised."""
    own = specs(plain, parts, weight.a.shape[-1])
    return weight.replace(base=base, **own)  # pyright: ignore[reportAttributeAccessIssue]
