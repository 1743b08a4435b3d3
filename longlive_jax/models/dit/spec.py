"""The transformer's parameters, and the transformer as one device computes it."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.config import PATCH
from longlive_jax.errors import InputError
from longlive_jax.models import actions, lora
from longlive_jax.models.branch import Branch, Layer, insert
from longlive_jax.models.dit.block import BRANCHES
from longlive_jax.models.dit.conditioning import BlockModulation
from longlive_jax.models.precision import Precision
from longlive_jax.models.sharding import Sharding
from longlive_jax.params import ParamSpec
from longlive_jax.quant import weights as quantized_weights
from longlive_jax.recipes import Recipe

Branches = tuple[Branch, ...]


def branches_of(cfg: config_lib.Model) -> Branches:
    """The branches that a config asks for; optional ones are inserted here."""
    branches = BRANCHES
    for branch, before in actions.branches(cfg.actions):
        branches = insert(branches, branch, before=before)
    return branches


def spec(cfg: config_lib.Model, branches: Branches | None = None) -> params_lib.Tree:
    """Parameter specs; paths follow the original's.

    "blocks" holds each branch's parameters, stacked over the layers that have it. So the plain
    branches have the same tree, in memory and in a checkpoint, whatever else is inserted.

    branches: of a block; None: the config's.

    Raises:
      InputError: a branch asks for more layers than the model has.
    """
    d = cfg.dim
    patch = cfg.in_dim * PATCH * PATCH
    small = params_lib.normal(0.02)
    linear = params_lib.linear
    square = linear(d, d, ("embed", None), small)
    blocks = {}
    for branch in branches or branches_of(cfg):
        number = branch.layers or cfg.num_layers
        if number > cfg.num_layers:
            raise InputError(
                f"branch {branch.name!r} is in the first {number} layers, more than "
                f"model.num_layers={cfg.num_layers}"
            )
        blocks |= params_lib.stack(branch.spec(cfg), number)
    return {
        "patch_embedding": linear(patch, d, (None, None)),
        "text_embedding": {"0": linear(cfg.text_dim, d, (None, "embed"), small), "2": square},
        "time_embedding": {"0": linear(cfg.freq_dim, d, (None, "embed"), small), "2": square},
        "time_projection": {"1": linear(d, BlockModulation.ROWS * d, ("embed", None))},
        "blocks": blocks,
        "head": {
            "modulation": ParamSpec((2, d), (None, None), params_lib.normal(d**-0.5)),
            "head": linear(d, cfg.out_dim * PATCH * PATCH, (None, None), params_lib.zeros),
        },
    }


def sampling_spec(
    cfg: config_lib.Model,
    recipe: Recipe | None,
    dtype: jnp.dtype | None,
    branches: Branches | None = None,
    adapters: config_lib.LoRA | None = None,
) -> params_lib.Tree:
    """`spec` of the parameters of `denoise` and `commit`: layers apart, quantised by the recipe.

    adapters: of those that are attached; None: there are none.
    """
    plain = spec(cfg, branches)
    specs = quantized_weights.quantize_specs(plain, recipe, dtype)
    if adapters is not None:
        specs = lora.attach(specs, lora.specs(plain, adapters), adapters.scale)
    one = params_lib.layer_of(specs["blocks"])
    names = [names_at_layer(specs["blocks"], i) for i in range(cfg.num_layers)]
    return {**specs, "blocks": tuple({name: one[name] for name in own} for own in names)}


def layers(params: params_lib.Tree) -> params_lib.Tree:
    """Parameters of `spec`, quantised or not, with a tuple of layers for the stacked "blocks".

    A GPU's library needs each weight as an array of its own: each pass would copy a stack's.
    """
    blocks = params["blocks"]

    def layer(i):
        own = {name: blocks[name] for name in names_at_layer(blocks, i)}
        return jax.tree.map(lambda w: jax.lax.index_in_dim(w, i, keepdims=False), own)

    number = max(_rows(tree) for tree in blocks.values())
    return {**params, "blocks": tuple(layer(i) for i in range(number))}


def rows(blocks: params_lib.Tree, start: int, stop: int) -> params_lib.Tree:
    """Layers `start` to `stop` of the stacked parameters of equal layers."""

    def cut(w):
        return w if (start, stop) == (0, len(w)) else jax.lax.slice_in_dim(w, start, stop)

    return jax.tree.map(cut, {name: blocks[name] for name in names_at_layer(blocks, start)})


def names_at_layer(blocks: params_lib.Tree, i: int) -> list[str]:
    """Names of the parameters that layer i has, of stacked parameters or specs."""
    return [name for name, tree in blocks.items() if i < _rows(tree)]


def _rows(tree):
    return jax.tree.leaves(tree, is_leaf=params_lib.is_spec)[0].shape[0]


@dataclasses.dataclass(frozen=True)
class Network:
    """The transformer as this device computes it: a static argument of `jax.jit`, by value."""

    cfg: config_lib.Model
    sharding: Sharding
    precision: Precision
    branches: Branches

    def layer(self, given=None, attend=None, key=None) -> Layer:
        """The `Layer` that branches are applied in."""
        return Layer(self.cfg, self.sharding, self.precision, given, attend, key)

    def branch(self, name: str) -> Branch:
        """The branch of this name."""
        return next(branch for branch in self.branches if branch.name == name)

    def branches_at(self, i: int) -> Branches:
        """The branches of layer i."""
        return tuple(b for b in self.branches if b.layers is None or i < b.layers)

    def groups(self) -> list[tuple[int, int]]:
        """First layer and end of each run of layers that have the same branches."""
        edges = sorted({0, *(b.layers or self.cfg.num_layers for b in self.branches)})
        return list(itertools.pairwise(edges))

    def gather_globals(self, params: params_lib.Tree) -> params_lib.Tree:
        """Everything outside the blocks, whole on this device."""
        specs = spec(self.cfg, self.branches)
        names = [name for name in params if name != "blocks"]
        return {**params, **self._gather(params, specs, names)}

    def gather_block(self, p: params_lib.Tree) -> params_lib.Tree:
        """A layer's parameters, or some of them, whole on this device."""
        specs = quantized_weights.specs_like(
            spec(self.cfg, self.branches)["blocks"], p, self.precision.recipe, self.precision.dtype
        )
        return self._gather(p, specs, p)

    def _gather(self, tree, specs, names):
        tree, specs = ({name: x[name] for name in names} for x in (tree, specs))
        return self.sharding.gather(tree, specs, self.precision.dtype)
