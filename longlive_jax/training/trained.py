"""What of a transformer is trained, and what is frozen below it.

A network that is not trained whole has two parts: LORA, adapters of the backbone's linear layers,
and DIT, the action path alone, with the paths that it has in the whole. The weights below are
frozen: held once, in the compute dtype or quantised by a recipe, without an optimiser's state.
"""

from collections.abc import Mapping
from typing import Any

import jax

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax import recipes as recipe_lib
from longlive_jax.checkpoints.grown import DIT, LORA
from longlive_jax.models import actions, dit, lora
from longlive_jax.quant import weights as weights_lib


def specs(model: config_lib.Model, adapters: config_lib.LoRA | None) -> dict[str, Any]:
    """ParamSpecs of the parts of a network that is not trained whole.

    adapters: None: the action path alone.
    """
    whole = dit.spec(model)
    found = {} if adapters is None else {LORA: lora.specs(whole, adapters)}
    path = actions.split(whole, model)[1]
    return found | ({DIT: path} if path else {})


def transformer(
    frozen: params_lib.Tree, own: Mapping[str, params_lib.Tree], adapters: config_lib.LoRA | None
) -> params_lib.Tree:
    """The transformer as `models.dit` takes it: of whole arrays, of shards, or of specs.

    Args:
      frozen: weights of the transformer, or of its backbone; they get no gradient.
      own: the parts that are trained, of `specs`; an action path replaces that of `frozen`.
    """
    if LORA in own:
        assert adapters is not None
        tree = lora.attach(frozen, own[LORA], adapters.scale)
    else:
        tree = jax.tree.map(_frozen, frozen)
    return actions.join(tree, own.get(DIT, {}))


def merged(
    frozen: params_lib.Tree, own: Mapping[str, params_lib.Tree], adapters: config_lib.LoRA | None
) -> params_lib.Tree:
    """As `transformer`, plain weights with the adapters merged into them; global arrays."""
    if LORA in own:
        assert adapters is not None
        frozen = lora.merge(frozen, own[LORA], adapters.scale)
    return actions.join(frozen, own.get(DIT, {}))


def abstract(
    tree: params_lib.Tree, recipe: str, mesh: jax.sharding.Mesh, cfg: config_lib.Config
) -> params_lib.Tree:
    """Shapes, dtypes and shardings of frozen weights with these specs, held by a recipe."""
    held = weights_lib.quantize_specs(tree, recipe_lib.get(recipe), cfg.compute_dtype)
    return params_lib.abstract(held, mesh, cfg.compute_dtype)


def freeze(
    weights: params_lib.Tree, tree: params_lib.Tree, recipe: str, mesh: jax.sharding.Mesh,
    cfg: config_lib.Config,
) -> params_lib.Tree:  # fmt: skip
    """Weights in the compute dtype as `abstract` says; `tree`: their specs."""
    return weights_lib.quantize_params(
        weights, tree, recipe_lib.get(recipe), mesh, dtype=cfg.compute_dtype
    )


def _frozen(x):
    return jax.lax.stop_gradient(x) if isinstance(x, jax.Array) else x
