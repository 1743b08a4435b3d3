"""Parameter trees with quantised weights, and their specs.

In such a tree a weight [layer, in, out] is replaced by an NVFP4Tensor or FP8Tensor
[layer, part, out, in], see `quant.linear`, and in the tree of specs by such a tensor of specs. So
functions that map over specs (shardings, `params.gather`) map over these too.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.errors import InputError
from longlive_jax.formats import Quantized
from longlive_jax.params import ParamSpec
from longlive_jax.quant import adapted
from longlive_jax.quant.adapted import Adapted
from longlive_jax.quant.linear import quantize_weight
from longlive_jax.recipes import LINEARS, Recipe


def quantize_specs(
    specs: params_lib.Tree, recipe: Recipe | None, dtype=jnp.bfloat16
) -> params_lib.Tree:
    """The specs of what `quantize_params` makes of parameters with these specs.

    Args:
      specs: of a transformer, with layers stacked in "blocks".
      dtype: as `quantize_params`.

    Raises:
      InputError: sides that the format's blocks do not divide.
    """

    return _map(functools.partial(_quantized_spec, dtype=dtype), recipe, specs)


def _quantized_spec(weight: ParamSpec, own: Recipe, dtype: Any) -> Any:
    layer, inputs, outputs = weight.axes
    shapes = _quantized_shape(weight.shape[1:], jnp.dtype(dtype), own)

    def leaf(x):
        axes = (None, outputs, inputs)[: x.ndim]
        # Each device has the values that a whole row shares.
        axes = tuple(None if n == 1 else name for n, name in zip(x.shape, axes))
        return ParamSpec((weight.shape[0], *x.shape), (layer, *axes), dtype=x.dtype)

    return jax.tree.map(leaf, shapes)


@functools.cache
def _quantized_shape(shape, dtype, recipe):
    array = jax.ShapeDtypeStruct(shape, dtype)
    return jax.eval_shape(functools.partial(quantize_weight, recipe=recipe), array)


def quantize_params(
    params: params_lib.Tree,
    specs: params_lib.Tree,
    recipe: Recipe | None,
    mesh: jax.sharding.Mesh | None = None,
    rules: dict = mesh_lib.RULES,
    dtype=jnp.bfloat16,
) -> params_lib.Tree:
    """The tree with the weights of the blocks' linear layers quantised.

    The numbers are those of weights quantised on use, on any mesh. Arrays are made one by one,
    layer by layer: besides argument and result, a device has one layer's whole weight.

    Args:
      specs: of `params`.
      mesh, rules: how they are sharded, and the result will be; None: on one device.
      dtype: the compute dtype, which weights are cast to first.
    """

    def one(weight: jax.Array, own: Recipe, spec: Any) -> Quantized:
        place = None if mesh is None else params_lib.shardings(spec, mesh, rules)
        # Layers of equal shape share a program.
        own = dataclasses.replace(own, index=0)
        return _program(own, jnp.dtype(dtype), place)(weight)

    return _map(one, recipe, params, quantize_specs(specs, recipe, dtype))


@functools.cache
def _program(recipe, dtype, place):
    def one(weight):  # [in, out]
        weight = weight.astype(dtype)
        if place is None:
            return quantize_weight(weight, recipe)
        whole = jax.NamedSharding(place.values.mesh, jax.P())
        q = quantize_weight(jax.sharding.reshard(weight, whole), recipe)
        # Without the layer.
        parts = jax.tree.map(lambda s: s.update(spec=jax.P(*s.spec[1:])), place)
        return jax.tree.map(jax.sharding.reshard, q, parts)

    return jax.jit(lambda stacked: jax.lax.map(one, stacked), out_shardings=place)


def specs_like(
    specs: params_lib.Tree, block: params_lib.Tree, recipe: Recipe | None, dtype=jnp.bfloat16
) -> params_lib.Tree:
    """The specs of a block's parameters, or of some, by their structure.

    Args:
      specs: of "blocks", of a transformer whose weights are plain.
      block: each linear layer's weight is plain, quantised by the recipe, or either with adapters.

    Raises:
      InputError: weights are quantised, and there is no recipe to multiply them by.
    """
    leaves = params_lib.flatten({name: specs[name] for name in block})
    found = params_lib.flatten(block)
    for path, parts in LINEARS.items():
        where = (*path.split("."), "weight")
        weight = found.get(where)
        if weight is None:
            continue
        spec = plain = leaves[where]
        base = weight.base if isinstance(weight, Adapted) else weight
        if isinstance(base, Quantized):
            if recipe is None:
                raise InputError(
                    f"quant: the weight of {path} is an {type(base).__name__}, and no recipe is "
                    "given; give the recipe that quantised it"
                )
            spec = _quantized_spec(plain, recipe.at(path), dtype)
        if isinstance(weight, Adapted):
            spec = adapted.like(weight, spec, plain, parts)
        leaves[where] = spec
    return params_lib.unflatten(leaves)


def is_quantized(tree: params_lib.Tree) -> bool:
    """Whether the tree has quantised weights."""
    return any(isinstance(leaf, Quantized) for leaf in jax.tree.leaves(tree, is_leaf=_is_leaf))


def map_quantized(
    function, tree: params_lib.Tree | Quantized, *others: params_lib.Tree
) -> params_lib.Tree:
    """`tree`, of arrays or of specs, with `function(weight, *others' weight)` of quantised ones."""

    def one(leaf, *rest):
        return function(leaf, *rest) if isinstance(leaf, Quantized) else leaf

    return jax.tree.map(one, tree, *others, is_leaf=_is_leaf)


def _is_leaf(x):
    return isinstance(x, Quantized) or params_lib.is_spec(x)


def as_dicts(tree: params_lib.Tree | Quantized) -> params_lib.Tree:
    """A tree of arrays, or of specs, with dicts for quantised weights: for a checkpoint's paths."""

    def one(q):
        fields = (f for f in dataclasses.fields(q) if f.metadata.get("pytree_node", True))
        return {f.name: getattr(q, f.name) for f in fields}

    return map_quantized(one, tree)


def from_dicts(tree: params_lib.Tree, specs: params_lib.Tree) -> params_lib.Tree:
    """The inverse of `as_dicts`. specs: `quantize_specs` of the recipe that quantised the tree."""

    def one(spec: Any, leaf):
        return dataclasses.replace(spec, **leaf) if isinstance(spec, Quantized) else leaf

    return jax.tree.map(one, specs, tree, is_leaf=_is_leaf)


def _map(function, recipe, tree, *others):
    """`tree` with `function(weight, its layer's recipe, *others' weight)` for each weight of it."""
    if recipe is None:
        return tree
    leaves = params_lib.flatten(tree)
    others = [params_lib.flatten(other) for other in others]
    for path in LINEARS:
        where = ("blocks", *path.split("."), "weight")
        leaves[where] = function(leaves[where], recipe.at(path), *(o[where] for o in others))
    return params_lib.unflatten(leaves)
