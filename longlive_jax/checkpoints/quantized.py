"""Quantised weights on disk: their arrays by name, 4-bit codes two a byte.

An array blocks/ffn/0/weight [layer, in, out] is replaced by
  NVFP4  weight/values  uint8 [layer, part, out, in / 2], the even column in the low four bits
         weight/scales  float8_e4m3fn [layer, part, out, in / 16], row-major
         weight/amax    float32 [layer, part]
  FP8    weight/values  float8 [layer, part, out, in]
         weight/scale   float32 [layer, part, out, 1], or [layer, part]
Rule and block of NVFP4 come from the recipe, which the checkpoint's metadata names.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from longlive_jax import params as params_lib
from longlive_jax.checkpoints.tensor import check_finite
from longlive_jax.errors import InputError
from longlive_jax.formats import Quantized
from longlive_jax.quant import weights as weights_lib
from longlive_jax.quant.linear import quantize_weight
from longlive_jax.recipes import LINEARS, Recipe

_PATHS = {("blocks", *path.split("."), "weight"): path for path in LINEARS}


def is_field(path: params_lib.Path) -> bool:
    """Whether this is the path of one of a quantised weight's arrays."""
    return path[:-1] in _PATHS


def is_linear(path: params_lib.Path) -> bool:
    """Whether a recipe quantises the array of this path."""
    return path in _PATHS


def spec(specs: params_lib.Tree, recipe: Recipe | None) -> params_lib.Tree:
    """The specs of the arrays on disk of parameters with these specs.

    Raises:
      InputError: sides that the format's blocks do not divide.
    """
    specs = weights_lib.quantize_specs(specs, recipe)
    return weights_lib.as_dicts(weights_lib.map_quantized(_pack_spec, specs))


def pieces(
    plain: Iterable[Any], recipe: Recipe | None, dtype: jnp.dtype, name: str
) -> Iterator[Any]:
    """A transformer's `store.Piece`s, with the linear layers' weights quantised one by one.

    The numbers equal those of `quant.weights.quantize_params`.

    Args:
      dtype: the compute dtype, which weights are cast to first.
      name: of the weights' source, for messages.

    Raises:
      InputError: a weight has values that are not finite, in `dtype`.
    """
    for piece in plain:
        if recipe is None or not is_linear(piece.path):
            yield piece
            del piece  # before the next one is read
            continue
        # Layers of equal shape share a program.
        own = dataclasses.replace(recipe.at(_PATHS[piece.path]), index=0)
        for layer, weight in enumerate(piece.array, piece.start):
            weight = weight.astype(dtype, copy=False)
            check_finite(weight, f"{name}: {'/'.join(piece.path)} of layer {layer} in {dtype}")
            for field, array in jax.device_get(_fields(_quantize(weight, own))).items():
                yield type(piece)((*piece.path, field), layer, array[None])
            del array
        del piece, weight


_quantize = jax.jit(quantize_weight, static_argnames="recipe")


def _fields(tensor: Quantized) -> params_lib.Tree:
    # A program of its own: in one with the quantisation XLA would quantise again for the packing.
    return weights_lib.as_dicts(tensor.pack())


def from_stored(
    tree: params_lib.Tree, specs: params_lib.Tree, place: params_lib.Tree
) -> params_lib.Tree:
    """The parameters from the arrays on disk, which are consumed.

    Args:
      specs: `quantize_specs` of the recipe.
      place: a sharding for each array of the result.
    """

    def unpack(tensor: Quantized, where: Quantized) -> Quantized:
        if not tensor.is_packed:
            return tensor
        result = _unpack(where)(tensor)
        tensor.values.delete()  # else all codes would be in memory twice
        return result

    return weights_lib.map_quantized(unpack, weights_lib.from_dicts(tree, specs), place)


@functools.cache
def _unpack(where: Quantized):
    one = type(where).unpack
    if isinstance(where.values, jax.NamedSharding):
        # Each device unpacks its own: the two codes of a byte are neighbours.
        own = jax.tree.map(lambda s: s.spec, where)
        one = jax.shard_map(one, mesh=where.values.mesh, in_specs=(own,), out_specs=own)
    return jax.jit(one)


def check(params: params_lib.Tree, name: str) -> params_lib.Tree:
    """`params`, if all of their quantised weights are finite.

    Raises:
      InputError: naming the first that is not.
    """
    leaves, _ = jax.tree.flatten_with_path(params, is_leaf=lambda x: isinstance(x, Quantized))
    name_of = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    found = {name_of(p): leaf.is_finite() for p, leaf in leaves if isinstance(leaf, Quantized)}
    for where, finite in jax.device_get(found).items():
        if not finite:
            raise InputError(
                f"{name}: {where} has values that are not finite (NaN or infinity), so it "
                "cannot be quantised; its training diverged, or the checkpoint is damaged: use an "
                "earlier one"
            )
    return params


def _pack_spec(tensor: Quantized) -> Quantized:
    packed = jax.eval_shape(type(tensor).pack, params_lib.abstract(tensor))

    def one(spec, array):
        return dataclasses.replace(spec, shape=array.shape, dtype=array.dtype)

    return jax.tree.map(one, tensor, packed)
