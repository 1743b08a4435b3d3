"""Everything a training run is: each network's parameters, optimiser and EMA, and the step."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from longlive_jax import params as params_lib
from longlive_jax.training.objective import Objective


class NetworkState(struct.PyTreeNode):
    """One network that is trained. Trees are float32, sharded by `mesh.RULES`.

    ema: the moving average of params; None if the objective keeps none.
    """

    params: params_lib.Tree
    opt_state: Any
    ema: params_lib.Tree | None


class TrainState(struct.PyTreeNode):
    """step: int32, steps done. networks: by name. carried: the objective's own, or None.

    bad: int32 [2], steps in which the loss, the gradient, the updated weights or the moments of a
      network were not finite, so that it was left as it was: in all, and in a row.
    """

    step: jax.Array
    networks: dict[str, NetworkState]
    carried: Any
    bad: jax.Array


def init(objective: Objective, params: Mapping[str, params_lib.Tree] | None = None) -> TrainState:
    """The state before the first step. `params`: initial weights, sharded; they are donated."""
    params = objective.init_params() if params is None else dict(params)
    template = jax.tree.map(lambda x: x.sharding, abstract(objective).replace(carried=None))
    state = jax.jit(_begin(objective), out_shardings=template, donate_argnums=0)(params)
    if objective.carried is None:
        return state
    return state.replace(carried=objective.init_carried())


def _begin(objective):
    def make(params):
        networks = {
            name: NetworkState(
                params=params[name],
                opt_state=network.optimizer.init(params[name]),
                ema=jax.tree.map(jnp.copy, params[name]) if network.ema_decay else None,
            )
            for name, network in objective.networks.items()
        }
        return TrainState(jnp.int32(0), networks, None, jnp.zeros((2,), jnp.int32))

    return make


def abstract(objective: Objective) -> TrainState:
    """Shapes, dtypes and shardings of the state, without an array: the checkpoint's template."""
    params = {
        name: params_lib.abstract(network.specs, objective.mesh)
        for name, network in objective.networks.items()
    }
    whole = jax.NamedSharding(objective.mesh, jax.P())

    def place(like: params_lib.Tree, tree: Any) -> Any:
        """A tree of the parameters' structure lies where they do; the rest is small."""
        structure = jax.tree.structure(like)

        def like_params(x):
            return jax.tree.structure(x) == structure

        def one(x):
            if like_params(x):
                return like
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)

        return jax.tree.map(one, tree, is_leaf=like_params)

    state = jax.eval_shape(_begin(objective), params)
    networks = {name: place(params[name], state.networks[name]) for name in params}
    small = place({}, (state.step, state.bad))
    return TrainState(small[0], networks, objective.carried, small[1])
