"""What a training objective is: data and a few functions, which the core (`step.py`) knows alone.

An objective says which networks are trained, what a batch is and what the loss is; accumulation,
gradients, several networks, resume and the log are the core's, once for all.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from longlive_jax import params as params_lib

Tree = Any  # nested dicts and `flax.struct` dataclasses of arrays


@dataclasses.dataclass(frozen=True)
class Network:
    """A network that is trained.

    specs: ParamSpecs of its parameters; their axes say how `mesh.RULES` shard them.
    optimizer: clips too, if gradients are to be clipped.
    ema_decay: float32 decay of the moving average from the int32 number of the step, which is 1 in
      the first; None: there is no moving average.
    period: it is trained in every such step, beginning with the first.
    """

    specs: params_lib.Tree
    optimizer: optax.GradientTransformation
    ema_decay: Callable[[jax.Array], jax.Array] | None = None
    period: int = 1


@dataclasses.dataclass(frozen=True)
class Moment:
    """Where a run stands when it trains on a batch. Arrays are global.

    step: int32, steps done. key: the step's, the same for all its networks and batches.
    params: parameters of all networks before the step, by name.
    ema: their moving averages, or None.
    over_step: `Objective.over_step` of all the step's batches. batch: one of them.
    rows: int32 [batch], numbers of the batch's samples within the step.
    """

    step: jax.Array
    key: jax.Array
    params: Mapping[str, params_lib.Tree]
    frozen: Tree
    carried: Tree
    over_step: Tree
    batch: Tree = None
    rows: jax.Array | None = None
    ema: Mapping[str, params_lib.Tree | None] = dataclasses.field(default_factory=dict)


class Cost(NamedTuple):
    """What a step processes, for the rates in the log; 0: no such rate."""

    tokens: int = 0
    flops: int = 0


class Objective:
    """The base of all objectives: what they must set, and what they may.

    Attributes:
      mesh: the devices.
      networks: by name.
      seed: of the step's keys. A key folded by (step, row, use) does not depend on the mesh.
      batch_size: samples of a batch, over the whole mesh. accumulation: batches of a step.
      batch: `jax.ShapeDtypeStruct`s with shardings of a step's batches, whose first axis is
        `accumulation`.
      frozen: the same of what is read and never changed: networks that are not trained, data.
      carried: the same of what one batch leaves to the next and checkpoints keep; None: nothing.
      outputs: PartitionSpecs of those results of `loss`, by name, that `after` is given.
      maxima: the metrics of which a step has the largest of its batches' values, not their sum.
      shown: the fields that the line on the screen shows beside loss and gradient norm.
    """

    mesh: jax.sharding.Mesh
    networks: Mapping[str, Network]
    seed: int = 0
    batch_size: int = 1
    accumulation: int = 1
    batch: Tree = ()
    frozen: Tree = ()
    carried: Tree = None
    outputs: Mapping[str, jax.P] = {}
    maxima: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()

    def loss(
        self,
        network: str,
        params: Mapping[str, params_lib.Tree],
        frozen: Tree,
        inputs: Tree,
        key: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """This device's part of the loss of one network, for one batch; it is differentiated.

        All arrays are local, inside a fully manual `shard_map`: this device's shards
        (`params.gather` makes a network whole). The loss is the sum of what all devices return,
        over all batches of the step.

        Args:
          inputs: of `before`. key: the step's.

        Returns:
          The loss, and metrics by name, summed likewise; or `outputs`, which stay as they are.
        """
        raise NotImplementedError

    def over_step(self, batches: Tree) -> Tree:
        """What depends on all batches of a step, as the number of samples that bear loss."""
        del batches

    def before(self, network: str, moment: Moment) -> Tree:
        """The inputs of `loss`, on global arrays and without gradient: draws, rollouts."""
        del network
        return moment.batch

    def after(
        self, network: str, moment: Moment, inputs: Tree, outputs: Mapping[str, jax.Array]
    ) -> tuple[Tree, dict[str, jax.Array]]:
        """What is carried on from a batch, and more metrics to sum over the step's batches."""
        del network, inputs, outputs
        return moment.carried, {}

    def carried_metrics(self, carried: Tree) -> dict[str, jax.Array]:
        """Scalars that describe what is carried after a step."""
        del carried
        return {}

    def fields(self, network: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of the log from a step's metrics, on the host: numbers, lists of them, None."""
        del network
        return dict(metrics)

    def cost(self, due: tuple[str, ...]) -> Cost:
        """Of a step that trains these networks."""
        del due
        return Cost()

    def init_params(self) -> dict[str, params_lib.Tree]:
        """Random initial parameters of every network, float32."""
        key = jax.random.key(self.seed)
        return {
            name: params_lib.init(network.specs, key, jnp.float32, self.mesh)
            for name, network in self.networks.items()
        }

    def init_carried(self) -> Tree:
        """What is carried into the first step."""

        def make():
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.carried)

        return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, self.carried))()
