"""A tree of ParamSpecs describes a model's parameters completely.

It gives shapes for `jax.eval_shape`, shardings, initial values and the checkpoint template.
A parameter tree is a nested dict of arrays; paths follow the original's state-dict names, with the
layers of a transformer stacked on a leading axis named "layer".
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from longlive_jax import mesh as mesh_lib

Tree = Mapping[str, Any]
Path = tuple[str, ...]


def zeros(key, shape, dtype):
    del key
    return jnp.zeros(shape, dtype)


def ones(key, shape, dtype):
    del key
    return jnp.ones(shape, dtype)


@functools.cache  # equal initialisers are one object, so that `init` compiles each shape once
def normal(std: float) -> Callable:
    """Gaussian of this standard deviation."""
    return lambda key, shape, dtype: std * jax.random.normal(key, shape, dtype)


@functools.cache
def xavier(fan_in: int, fan_out: int) -> Callable:
    """Glorot and Bengio (2010), equation 16: uniform within sqrt(6 / (fan_in + fan_out))."""
    return uniform(math.sqrt(6 / (fan_in + fan_out)))


@functools.cache
def uniform(bound: float) -> Callable:
    """Uniform from -bound to bound."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Shape, logical axis names (None: never sharded) and initial value of one parameter.

    dtype: fixed for this parameter; None: the one that the caller asks for.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Callable[[jax.Array, tuple[int, ...], Any], jax.Array] = zeros
    dtype: Any = None

    def __post_init__(self):
        assert len(self.shape) == len(self.axes), (self.shape, self.axes)


def linear(
    inputs: int,
    outputs: int,
    axes: tuple[str | None, str | None],
    init: Callable | None = None,
) -> Tree:
    """The specs of `ops.linear`: weight [inputs, outputs], by default `xavier`, and bias, zero."""
    return {
        "weight": ParamSpec((inputs, outputs), axes, init or xavier(inputs, outputs)),
        "bias": ParamSpec((outputs,), (None,)),
    }


def stack(specs: Tree, num_layers: int) -> Tree:
    """The specs of `num_layers` equal layers, with a leading axis named "layer"."""

    def one(s: ParamSpec) -> ParamSpec:
        # Layers draw from their own keys, so that a layer does not depend on how many there are.
        def init(key, shape, dtype):
            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(shape[0]))
            return jax.vmap(lambda k: s.init(k, shape[1:], dtype))(keys)

        return ParamSpec((num_layers, *s.shape), ("layer", *s.axes), init, s.dtype)

    return jax.tree.map(one, specs, is_leaf=is_spec)


def layer_of(specs: Tree) -> Tree:
    """The specs of one of the layers that `stack` stacked."""

    def one(s: ParamSpec) -> ParamSpec:
        return ParamSpec(s.shape[1:], s.axes[1:], dtype=s.dtype)

    return jax.tree.map(one, specs, is_leaf=is_spec)


def is_spec(x) -> bool:
    return isinstance(x, ParamSpec)


def flatten(tree: Tree) -> dict[Path, Any]:
    """Leaves by path, a tuple of names."""
    return traverse_util.flatten_dict(tree)


def unflatten(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(leaves))


def init(
    specs: Tree,
    key: jax.Array,
    dtype=jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
    rules: dict = mesh_lib.RULES,
) -> Tree:
    """Initial values. Each depends on its path alone, not on the mesh or on other parameters.

    With a mesh each device makes its own shards and never has more.
    """

    def one(path: Path, s: ParamSpec):
        leaf_key = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
        where = mesh_lib.sharding(mesh, s.axes, rules) if mesh is not None else None
        return _draw(s.init, s.shape, jnp.dtype(dtype), where)(leaf_key)

    return unflatten({path: one(path, s) for path, s in flatten(specs).items()})


# A program for each shape: one program for a whole model takes XLA minutes to compile.
@functools.cache
def _draw(init, shape, dtype, where):
    return jax.jit(lambda key: init(key, shape, dtype), out_shardings=where)


def shardings[T](specs: T, mesh: jax.sharding.Mesh, rules: dict = mesh_lib.RULES) -> T:
    """A NamedSharding for each parameter."""
    return jax.tree.map(lambda s: mesh_lib.sharding(mesh, s.axes, rules), specs, is_leaf=is_spec)


def partition_specs(specs: Tree, rules: dict = mesh_lib.RULES) -> Tree:
    """A PartitionSpec for each parameter, for `jax.shard_map`."""
    return jax.tree.map(lambda s: mesh_lib.spec(s.axes, rules), specs, is_leaf=is_spec)


def abstract[T](
    specs: T,
    mesh: jax.sharding.Mesh | None = None,
    dtype=jnp.float32,
    rules: dict = mesh_lib.RULES,
) -> T:
    """`jax.ShapeDtypeStruct`s, sharded when there is a mesh: for eval_shape and checkpoints.

    dtype: of parameters whose spec names none.
    """

    def one(s: ParamSpec):
        where = mesh_lib.sharding(mesh, s.axes, rules) if mesh is not None else None
        return jax.ShapeDtypeStruct(s.shape, s.dtype or dtype, sharding=where)

    return jax.tree.map(one, specs, is_leaf=is_spec)


def count(specs: Tree) -> int:
    """Number of scalars."""
    return sum(math.prod(s.shape) for s in jax.tree.leaves(specs, is_leaf=is_spec))


def gather(tree: Tree, specs: Tree, rules: dict, dtype=None) -> Tree:
    """Inside a manual `shard_map`: whole parameters from this device's shards.

    Its transpose is a reduce-scatter, so gradients come back sharded. `specs` has the structure of
    `tree`; a leading "layer" axis may already be scanned away. With `dtype`, sharded parameters are
    cast before they are sent, and their gradients are summed in their own dtype.
    """

    def one(s: ParamSpec, w: jax.Array) -> jax.Array:
        axes = s.axes[-w.ndim :] if w.ndim else ()
        for i, name in enumerate(axes):
            if rules.get(name) is not None:
                w = _all_gather(w, rules[name], i, jnp.dtype(s.dtype or dtype or w.dtype))
        return w

    return jax.tree.map(one, specs, tree, is_leaf=is_spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _all_gather(w, mesh_axis, axis, dtype):
    return jax.lax.all_gather(w.astype(dtype), mesh_axis, axis=axis, tiled=True)


def _all_gather_fwd(w, mesh_axis, axis, dtype):
    return _all_gather(w, mesh_axis, axis, dtype), jnp.zeros((), w.dtype)


def _all_gather_bwd(mesh_axis, axis, dtype, like, g):
    del dtype
    g = g.astype(like.dtype)
    return (jax.lax.psum_scatter(g, mesh_axis, scatter_dimension=axis, tiled=True),)


_all_gather.defvjp(_all_gather_fwd, _all_gather_bwd)


def not_finite(tree: Any) -> list[str]:
    """The paths of arrays with NaN or infinity among a tree's, of any floating point dtype."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    }
    return [path for path, finite in jax.device_get(_finite(leaves)).items() if not finite]


@jax.jit
def _finite(arrays):
    # FP8 and FP4 are not compared as they are.
    return {k: jnp.isfinite(x.astype(jnp.float32)).all() for k, x in arrays.items()}
