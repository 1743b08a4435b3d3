"""Where a device stands inside a manual `shard_map`: what the transformer asks of the others."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.formats import Format, PendingMatmul, Quantized
from longlive_jax.ops import residual, ulysses
from longlive_jax.ops.gelu import gelu, gelu_of_product
from longlive_jax.ops.norm import layer_norm
from longlive_jax.ops.quantized import (
    add_layer_norm_quantize_rows,
    gelu_quantize_rows,
    layer_norm_quantize_rows,
)
from longlive_jax.quant import kv
from longlive_jax.quant import linear as quantized
from longlive_jax.recipes import Recipe


@dataclasses.dataclass(frozen=True)
class Parallel:
    """Where this device stands inside a manual `shard_map`; the default is outside of any.

    And in which formats its blocks multiply, since scales are agreed on with other devices.
    """

    seq: str | None = None  # mesh axis over which chunks or frames are sharded
    rules: tuple[tuple[str, str | tuple[str, ...]], ...] = ()  # how parameters are sharded
    dtype: jnp.dtype | None = None  # that sharded parameters are gathered in; None: their own
    recipe: Recipe | None = None  # of the blocks' linear layers; None: nothing is quantised
    payload: Format | None = None  # what the sampler's all-to-alls send; None: x as it is

    @classmethod
    def sampling(
        cls,
        dtype: jnp.dtype | None = None,
        recipe: Recipe | None = None,
        payload: Format | None = None,
    ) -> "Parallel":
        return cls(mesh_lib.SEQ, tuple(mesh_lib.SAMPLING_RULES.items()), dtype, recipe, payload)

    @classmethod
    def training(cls, dtype: jnp.dtype | None = None, recipe: Recipe | None = None) -> "Parallel":
        return cls(mesh_lib.SEQ, tuple(mesh_lib.RULES.items()), dtype, recipe)

    def linear(self, block, path: str, x, key=None) -> jax.Array:
        """The block's linear layer at this path, of `recipes.LINEARS`; key: for rounding."""
        return self._multiply(quantized.linear, block, path, x, key)

    def product(self, block, path: str, x, key=None) -> jax.Array | PendingMatmul:
        """`linear`, for what can take a product before its scales and bias, where that pays."""
        return self._multiply(quantized.product, block, path, x, key)

    def _multiply(self, by, block, path, x, key):
        p = block
        for name in path.split("."):
            p = p[name]
        recipe = None if self.recipe is None else self.recipe.at(path)
        axes = () if self.seq_axis is None else (self.seq_axis,)
        return by(p, x, recipe, key, axes)

    def layer_norm(self, path: str, x, scale, shift) -> jax.Array | Quantized:
        """`ops.norm.layer_norm`, as the block's linear layer at this path is given it."""
        if self._takes_rows(path):
            return layer_norm_quantize_rows(x, scale, shift)
        return layer_norm(x, scale, shift)

    def add_layer_norm(
        self, path: str, x, y: jax.Array | PendingMatmul, gate, scale, shift
    ) -> tuple[jax.Array, jax.Array | Quantized]:
        """`ops.residual.add(x, y, gate)`, and its `layer_norm` for the linear layer there."""
        if self._takes_rows(path):
            return add_layer_norm_quantize_rows(x, y, gate, scale, shift)
        x = residual.add(x, y, gate)
        return x, layer_norm(x, scale, shift)

    def gelu(self, path: str, x: jax.Array | PendingMatmul) -> jax.Array | Quantized:
        """`ops.gelu.gelu` of a linear layer's result, as the one at this path is given it."""
        if self._takes_rows(path):
            return gelu_quantize_rows(x)
        x = x.astype(x.dtype)  # a product that waits is due
        return gelu_of_product(x) if self.recipe is None else gelu(x)

    def made_once(self, x: jax.Array) -> jax.Array:
        """Hidden states that a kernel reads: XLA would add them up once more for who else does."""
        return jax.lax.optimization_barrier(x) if self._takes_rows("self_attn.qkv") else x

    def _takes_rows(self, path):
        """Whether what makes its x quantises it, by rows."""
        recipe = None if self.recipe is None else self.recipe.at(path)
        return recipe is not None and recipe.by_rows

    def to_heads(self, x: jax.Array) -> kv.Stored:
        """[batch, token / n, head, head_dim] -> [batch, token, head / n, head_dim], as sent."""
        if self.seq_axis is None:
            return x
        send = functools.partial(ulysses.to_heads, mesh_axis=self.seq_axis, token_axis=1)
        return kv.exchange(kv.store(self.payload, x, self.seq_axis), send)

    def to_tokens(self, x: jax.Array) -> jax.Array:
        """[batch, token, head / n, head_dim] -> [batch, token / n, head, head_dim]."""
        if self.seq_axis is None:
            return x
        send = functools.partial(ulysses.to_tokens, mesh_axis=self.seq_axis, token_axis=1)
        sent = kv.exchange(kv.store(self.payload, x, self.seq_axis), send)
        return kv.load(sent, x.dtype)

    def gather(self, tree: params_lib.Tree, specs: params_lib.Tree) -> params_lib.Tree:
        """Whole parameters on this device."""
        return params_lib.gather(tree, specs, self.shards, self.dtype)

    def sum(self, tree):
        """Each array's sum over all devices."""
        return _sum_over(tree, mesh_lib.AXES)

    def sum_gradients(self, gradient: params_lib.Tree, specs: params_lib.Tree) -> params_lib.Tree:
        """Gradients of `gather`'s argument, summed over the devices that hold equal parameters.

        Over the others `gather` has summed already.
        """
        shards = self.shards

        def one(spec, g):
            gathered = [shards[name] for name in spec.axes if name in shards]
            done = {a for axis in gathered for a in ((axis,) if isinstance(axis, str) else axis)}
            return _sum_over(g, [axis for axis in mesh_lib.AXES if axis not in done])

        return jax.tree.map(one, specs, gradient, is_leaf=params_lib.is_spec)

    @property
    def seq_axis(self) -> str | None:
        """`seq`, if other devices lie along it."""
        return _with_others(self.seq)

    @property
    def shards(self) -> dict[str, str | tuple[str, ...]]:
        """Of `rules`, those that put a part of a parameter on another device."""
        return {name: axis for name, axis in self.rules if _with_others(axis) is not None}


def _sum_over(tree, axes):
    axes = tuple(axis for axis in axes if _with_others(axis) is not None)
    return jax.lax.psum(tree, axes) if axes else tree


def _with_others(axis):
    """A collective over a mesh axis of one device would not be free: XLA makes it a copy."""
    return None if axis is None or jax.lax.axis_size(axis) == 1 else axis
