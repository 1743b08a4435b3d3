"""The number formats that a transformer block computes in, and the operations fused for them."""

import dataclasses

import jax
import jax.numpy as jnp

from longlive_jax import params as params_lib
from longlive_jax.formats import PendingMatmul, Quantized
from longlive_jax.ops import residual
from longlive_jax.ops.gelu import gelu, gelu_of_product
from longlive_jax.ops.norm import layer_norm
from longlive_jax.ops.quantized import (
    add_layer_norm_quantize_rows,
    gelu_quantize_rows,
    layer_norm_quantize_rows,
)
from longlive_jax.quant import linear as quantized
from longlive_jax.recipes import Recipe

Operand = jax.Array | Quantized  # of a linear layer: an array, or its FP8 rows
Result = jax.Array | PendingMatmul  # of a linear layer


@dataclasses.dataclass(frozen=True)
class Precision:
    """A recipe, and the dtype that sharded parameters are gathered in.

    Each operation takes a path of `recipes.LINEARS`: the linear layer that it runs, or that reads
    its result. If that layer quantises its input by rows, the operation before it writes FP8 rows.
    """

    recipe: Recipe | None = None  # of the blocks' linear layers; None: nothing is quantised
    dtype: jnp.dtype | None = None  # None: the parameters' own

    def linear(self, block: params_lib.Tree, path: str, x: Operand, key, axes) -> jax.Array:
        """The linear layer at this path of a block's parameters. key, axes: of `quant.linear`."""
        return quantized.linear(_at(block, path), x, self._recipe(path), key, axes)

    def product(self, block: params_lib.Tree, path: str, x: Operand, key, axes) -> Result:
        """`linear`, or a PendingMatmul where that is faster: for callers that take either."""
        return quantized.product(_at(block, path), x, self._recipe(path), key, axes)

    def layer_norm(self, path: str, x: jax.Array, scale, shift) -> Operand:
        """`ops.norm.layer_norm`, as the linear layer at this path takes it."""
        if self._takes_rows(path):
            return layer_norm_quantize_rows(x, scale, shift)
        return layer_norm(x, scale, shift)

    def add_layer_norm(
        self, path: str, x: jax.Array, y: Result, *, gate, scale, shift
    ) -> tuple[jax.Array, Operand]:
        """`ops.residual.add(x, y, gate)`, and its `layer_norm` for the layer at this path."""
        if self._takes_rows(path):
            return add_layer_norm_quantize_rows(x, y, gate, scale, shift)
        x = residual.add(x, y, gate)
        return x, layer_norm(x, scale, shift)

    def gelu(self, path: str, x: Result) -> Operand:
        """`ops.gelu.gelu` of a linear layer's result, as the layer at this path takes it."""
        if self._takes_rows(path):
            return gelu_quantize_rows(x)
        x = x.astype(x.dtype)  # applies a PendingMatmul's scales and bias
        return gelu_of_product(x) if self.recipe is None else gelu(x)

    def materialize(self, x: jax.Array) -> jax.Array:
        """Hidden states in memory, or XLA would compute a kernel's argument again for others."""
        return jax.lax.optimization_barrier(x) if self._takes_rows("self_attn.qkv") else x

    def _takes_rows(self, path):
        """Whether the operation before this layer quantises the layer's input by rows."""
        recipe = self._recipe(path)
        return recipe is not None and recipe.by_rows

    def _recipe(self, path):
        return None if self.recipe is None else self.recipe.at(path)


def _at(block, path):
    for name in path.split("."):
        block = block[name]
    return block
