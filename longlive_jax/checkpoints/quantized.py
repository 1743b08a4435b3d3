"""Quantised weights on disk: their arrays by name, 4-bit codes two a byte.

In the place of an array blocks/ffn/0/weight [layer, in, out] there are
  NVFP4  weight/values  uint8 [layer, part, out, in / 2], the even column in the low four bits
         weight/scales  float8_e4m3fn [layer, part, out, in / 16], row-major
         weight/amax    float32 [layer, part]
  FP8    weight/values  float8 [layer, part, out, in]
         weight/scale   float32 [layer, part, out, 1], or [layer, part]
Rule and block of NVFP4 are those of the recipe, which the checkpoint's metadata names.
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
from longlive_jax.formats import NVFP4Tensor, Quantized, from_packed
from longlive_jax.quant import weights as weights_lib
from longlive_jax.quant.linear import quantize_weight
from longlive_jax.quant.recipe import LINEARS, Recipe

_PATHS = {("blocks", *path.split("."), "weight"): path for path in LINEARS}


def is_field(path: params_lib.Path) -> bool:
    """Whether this is the path of one of a quantised weight's arrays."""
    return path[:-1] in _PATHS


def is_linear(path: params_lib.Path) -> bool:
    """Whether a recipe quantises the array of this path."""
    return path in _PATHS


def spec(specs: params_lib.Tree, recipe: Recipe | None) -> params_lib.Tree:
    """The specs of what lies on disk of parameters with these specs.

    Raises:
      InputError: sides that the format's blocks do not divide.
    """
    return weights_lib.as_dicts(_map_tensors(_pack_spec, weights_lib.quantize_specs(specs, recipe)))


def pieces(
    plain: Iterable[Any], recipe: Recipe | None, dtype: jnp.dtype, name: str
) -> Iterator[Any]:
    """A transformer's `store.Piece`s with those of linear layers' weights quantised, one at a time.

    The numbers are those of `quant.weights.quantize_params`.

    Args:
      dtype: the compute dtype, which weights are cast to first.
      name: of where they come from, for messages.

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


def _fields(tensor: Quantized) -> dict[str, jax.Array]:
    # Not in one program with the quantisation, which XLA would then repeat for the packing.
    fields = weights_lib.as_dicts(tensor)
    return fields | ({"values": tensor.packed()} if isinstance(tensor, NVFP4Tensor) else {})


def from_stored(
    tree: params_lib.Tree, specs: params_lib.Tree, place: params_lib.Tree
) -> params_lib.Tree:
    """The parameters, of arrays as they lie on disk, which it uses up.

    Args:
      specs: `quantize_specs` of the recipe.
      place: a sharding for each array of the result.
    """

    def unpack(tensor: Quantized, where: Quantized) -> Quantized:
        if not isinstance(tensor, NVFP4Tensor):
            return tensor
        result = _unpack(where)(tensor.values, tensor.scales, tensor.amax)
        tensor.values.delete()  # else all codes would be there twice
        return result

    return _map_tensors(unpack, weights_lib.from_dicts(tree, specs), place)


@functools.cache
def _unpack(where: NVFP4Tensor):
    one = functools.partial(from_packed, rule=where.rule, block=where.block, dtype=where.dtype)
    if isinstance(where.values, jax.NamedSharding):
        # Each device its own: the two codes of a byte are neighbours.
        result = jax.tree.map(lambda s: s.spec, where)
        own = (result.values, result.scales, result.amax)
        one = jax.shard_map(one, mesh=where.values.mesh, in_specs=own, out_specs=result)
    return jax.jit(one)


def check(params: params_lib.Tree, name: str) -> params_lib.Tree:
    """`params`, if all of their quantised weights are finite.

    Raises:
      InputError: naming the first that is not.
    """
    leaves, _ = jax.tree.flatten_with_path(params, is_leaf=lambda x: isinstance(x, Quantized))
    name_of = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    found = {name_of(p): _finite(leaf) for p, leaf in leaves if isinstance(leaf, Quantized)}
    for where, finite in jax.device_get(found).items():
        if not finite:
            raise InputError(
                f"{name}: {where} has values that are not finite (NaN or infinity), so it "
                "cannot be quantised; its training diverged, or the checkpoint is damaged: use an "
                "earlier one"
            )
    return params


@jax.jit
def _finite(tensor):
    if isinstance(tensor, NVFP4Tensor):
        return jnp.isfinite(tensor.amax).all() & jnp.isfinite(tensor.scales).all()
    # XLA's CPU backend (jaxlib 0.12.0) may lose a NaN in a row's maximum; the value stays one.
    return jnp.isfinite(tensor.scale).all() & ~jnp.isnan(tensor.values).any()


def _pack_spec(tensor: Quantized) -> Quantized:
    if not isinstance(tensor, NVFP4Tensor):
        return tensor
    values = tensor.values
    shape = (*values.shape[:-1], values.shape[-1] // 2)
    return tensor.replace(values=dataclasses.replace(values, shape=shape, dtype=jnp.uint8))


def _map_tensors(function, tree, *others):
    def one(leaf, *rest):
        return function(leaf, *rest) if isinstance(leaf, Quantized) else leaf

    def is_leaf(x):
        return isinstance(x, Quantized) or params_lib.is_spec(x)

    return jax.tree.map(one, tree, *others, is_leaf=is_leaf)
