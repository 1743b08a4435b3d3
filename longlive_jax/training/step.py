"""One training step of any objective, as a pure function of state, frozen arrays and batches.

The loss and its gradient are one fully manual `shard_map`. What is the same for all objectives
stands here once: accumulation over batches, the sum of gradients over devices, the optimiser, the
moving average, several networks each with a period of its own, and the guard against steps whose
loss, gradient or result is not finite.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from longlive_jax import params as params_lib
from longlive_jax.models.sharding import Sharding
from longlive_jax.training import state as state_lib
from longlive_jax.training.objective import Moment, Objective
from longlive_jax.training.state import TrainState

Due = tuple[str, ...]  # names of the networks that a step trains

# cuBLASLt alone multiplies, and no tiling is weighed for Triton. Four H200, 5B, 96 latents: a step
# takes 7.29 s, as with both, and is compiled in 11 s, not 72 (jax 0.11.2, 2026-11-22).
_GPU_OPTIONS = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_disable_hlo_passes": "triton-softmax-rewriter",
}


class NetworkMetrics(struct.PyTreeNode):
    """Of one network in one step: float32 loss, and norm of the gradient before clipping.

    values: the objective's, summed over devices and batches.
    """

    loss: jax.Array
    grad_norm: jax.Array
    values: dict[str, jax.Array]


class StepMetrics(struct.PyTreeNode):
    """Of one step. networks: of those it trained. bad: int32 [2], TrainState's.

    carried: of Objective.carried_metrics.
    """

    networks: dict[str, NetworkMetrics]
    carried: dict[str, jax.Array]
    bad: jax.Array


class Step:
    """The programs of an objective's steps.

    Attributes:
      programs: a jitted `(state, frozen, batches) -> (state, StepMetrics)` for each set of networks
        that some step trains; the state is donated. Arrays lie as `state.abstract`,
        `Objective.frozen` and `Objective.batch` say.
    """

    def __init__(self, objective: Objective):
        self.objective = objective
        # Spelled out, or the state that comes back would be another entry in jit's cache.
        place = jax.tree.map(lambda x: x.sharding, state_lib.abstract(objective))
        gpu = objective.mesh.devices.flat[0].platform == "gpu"
        cycle = math.lcm(*(network.period for network in objective.networks.values()))
        self.programs = {
            due: jax.jit(
                functools.partial(self._step, due),
                donate_argnums=0,
                out_shardings=(place, None),
                compiler_options=_GPU_OPTIONS if gpu else None,
            )
            for due in dict.fromkeys(map(self.due, range(cycle)))
        }

    def due(self, done: int) -> Due:
        """The networks that are trained after `done` steps."""
        return tuple(name for name, n in self.objective.networks.items() if done % n.period == 0)

    def trace(self, due: Due) -> jax.stages.Traced:
        """The program of such a step, traced for the objective's shapes."""
        objective = self.objective
        return self.programs[due].trace(
            state_lib.abstract(objective), objective.frozen, objective.batch
        )

    def lower(self, due: Due) -> jax.stages.Lowered:
        """The same, lowered."""
        return self.trace(due).lower()

    # ---------------------------------------------------------------------------------------------
    # The step, on global arrays.

    def _step(
        self, due: Due, state: TrainState, frozen: Any, batches: Any
    ) -> tuple[TrainState, StepMetrics]:
        objective = self.objective
        moment = Moment(
            step=state.step,
            key=jax.random.fold_in(jax.random.key(objective.seed), state.step),
            params={name: network.params for name, network in state.networks.items()},
            frozen=frozen,
            carried=state.carried,
            over_step=objective.over_step(batches),
            ema={name: network.ema for name, network in state.networks.items()},
        )
        networks, metrics, good = dict(state.networks), {}, jnp.bool_(True)
        for name in due:
            carried, gradient, sums = self._accumulate(name, moment, batches)
            moment = dataclasses.replace(moment, carried=carried)
            networks[name], metrics[name], finite = self._update(name, state, gradient, sums)
            good &= finite
        in_row = jnp.where(good, 0, state.bad[1] + 1)
        bad = jnp.stack([state.bad[0] + jnp.where(good, 0, 1), in_row])
        metrics = StepMetrics(metrics, objective.carried_metrics(moment.carried), bad)
        return TrainState(state.step + 1, networks, moment.carried, bad), metrics

    def _accumulate(self, name, moment, batches):
        """What is carried on, the gradient, and (loss, metrics), all summed over the batches."""
        size, count = self.objective.batch_size, self.objective.accumulation

        def one(carried, number, batch):
            rows = number * size + jnp.arange(size, dtype=jnp.int32)
            now = dataclasses.replace(moment, carried=carried, batch=batch, rows=rows)
            return self._batch(name, now)

        if count == 1:
            batch = jax.tree.map(lambda x: jax.lax.squeeze(x, (0,)), batches)
            return one(moment.carried, jnp.int32(0), batch)

        def add(carry, numbered):
            carried, total = carry
            carried, gradient, sums = one(carried, *numbered)
            return (carried, jax.tree.map(jnp.add, total, gradient)), sums

        start = moment.carried, jax.tree.map(jnp.zeros_like, moment.params[name])
        numbers = jnp.arange(count, dtype=jnp.int32)
        (carried, gradient), sums = jax.lax.scan(add, start, (numbers, batches))
        loss, values = jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), sums)
        most = {k: jnp.max(sums[1][k], axis=0) for k in self.objective.maxima if k in values}
        return carried, gradient, (loss, values | most)

    def _batch(self, name, moment):
        """What `_accumulate` sums, of one batch."""
        inputs = self.objective.before(name, moment)
        gradient, (loss, values), outputs = self.gradient(name, moment, inputs)
        carried, more = self.objective.after(name, moment, inputs, outputs)
        return carried, gradient, (loss, values | more)

    def _update(self, name, state, gradient, sums):
        """Optimiser and EMA; or, where something is not finite, the network as it was."""
        network, old, (loss, values) = self.objective.networks[name], state.networks[name], sums
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradient)))
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an int32
            updates, opt_state = network.optimizer.update(gradient, old.opt_state, old.params)
        params, ema = optax.apply_updates(old.params, updates), None
        # A gradient that is finite may still overflow in the moments, or by the learning rate. XLA
        # computes the new values twice and keeps none: 10 of the 5B model's layers, 24 latents, one
        # H200: a step takes 1.262 s, 1.261 without, in the same memory (jax 0.11.2, 2026-11-30).
        good = jnp.isfinite(loss) & jnp.isfinite(norm) & _all_finite((params, opt_state))
        if network.ema_decay is not None:
            decay = network.ema_decay(state.step + 1)
            ema = optax.incremental_update(params, old.ema, 1 - decay)
        new = old.replace(params=params, opt_state=opt_state, ema=ema)
        new = jax.tree.map(lambda new, old: jnp.where(good, new, old), new, old)
        return new, NetworkMetrics(loss, norm, values), good

    # ---------------------------------------------------------------------------------------------
    # The loss and its gradient, on each device.

    def gradient(self, name: str, moment: Moment, inputs: Any) -> tuple[Any, Any, Any]:
        """Of a network's loss on the inputs of `Objective.before`: the gradient, and (loss,
        metrics), summed over devices; the outputs as they lie.
        """
        objective, specs = self.objective, self.objective.networks[name].specs

        def local(params, frozen, inputs, key):
            def loss(own):
                value, values = objective.loss(name, {**params, name: own}, frozen, inputs, key)
                outputs = {k: values[k] for k in objective.outputs}
                values = {k: v for k, v in values.items() if k not in outputs}
                return value, ((value, values), outputs)

            sharding = Sharding.training()
            (_, (sums, outputs)), gradient = jax.value_and_grad(loss, has_aux=True)(params[name])
            return sharding.sum_gradients(gradient, specs), sharding.sum(sums), outputs

        arguments = (moment.params, moment.frozen, inputs, moment.key)
        # Gradients are reduced by hand, so varying-axes types have nothing to do.
        return jax.shard_map(
            local,
            mesh=objective.mesh,
            in_specs=jax.tree.map(lambda x: jax.typeof(x).sharding.spec, arguments),
            out_specs=(params_lib.partition_specs(specs), jax.P(), dict(objective.outputs)),
            check_vma=False,
        )(*arguments)


def _all_finite(tree: Any) -> jax.Array:
    """Whether no float of a tree is NaN or infinite."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    whole = (jnp.all(jnp.isfinite(x)) for x in floats)
    return functools.reduce(jnp.logical_and, whole, jnp.bool_(True))
