"""The parts of a distillation step, each a program of its own, with draws that a test chooses."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.training.batch import Scripts
from longlive_jax.training.objective import Moment
from longlive_jax.training.objectives import rollout
from longlive_jax.training.objectives.dmd import CRITIC, DMD, Inputs, Scores
from longlive_jax.training.step import Step


class Parts:
    """Rollouts, scores and gradients of one objective.

    params: of student and critic. frozen: `DMD.freeze`.
    """

    def __init__(self, goal: DMD, params: Any, frozen: Any):
        self.goal, self.params, self.frozen = goal, params, frozen
        self._step = Step(goal)
        self._roll = jax.jit(self._rolled)
        self._scores = jax.jit(self._scored)
        self._gradient = jax.jit(self._differentiated, static_argnums=0)

    def roll(self, scripts: Scripts, draws: rollout.Draws) -> Inputs:
        """The critic's inputs; the student's have g beside them."""
        with jax.set_mesh(self.goal.mesh):
            return self._roll(self.params, self.frozen, scripts, draws)

    def scores(self, inputs: Inputs) -> Scores:
        with jax.set_mesh(self.goal.mesh):
            return self._scores(self.params, self.frozen, inputs)

    def gradient(self, network: str, inputs: Inputs) -> tuple[Any, float, dict[str, float]]:
        """Gradient of the network's parameters, loss and metrics."""
        with jax.set_mesh(self.goal.mesh):
            out = self._gradient(network, self.params, self.frozen, inputs)
        gradient, (loss, values), _ = out
        return gradient, float(loss), {k: float(v) for k, v in values.items()}

    def _rolled(self, params, frozen, scripts, draws):
        return self.goal.inputs(CRITIC, _moment(params, frozen, scripts), draws)

    def _scored(self, params, frozen, inputs):
        return self.goal.scores(_moment(params, frozen), inputs)

    def _differentiated(self, network, params, frozen, inputs):
        return self._step.gradient(network, _moment(params, frozen), inputs)


def _moment(params, frozen, scripts=None):
    return Moment(
        step=jnp.int32(0), key=jax.random.key(0), params=params, frozen=frozen, carried=None,
        over_step=None, batch=scripts,
    )  # fmt: skip


def draws(
    cfg: config_lib.Config, mesh: jax.sharding.Mesh, noise: Any, eps: Any, level: Any,
    exit_step: Any, length: int | None = None, renoise: Any = None,
) -> rollout.Draws:  # fmt: skip
    """Draws of these numbers; exit_step: one, or one a chunk; level: [batch, 1 or chunk]."""
    batch, chunks = noise.shape[:2]

    def put(x, spec):
        return jax.device_put(x, jax.NamedSharding(mesh, spec))

    steps = np.broadcast_to(np.asarray(exit_step, np.int32), (chunks,))
    levels = np.broadcast_to(np.asarray(level, np.int32), (batch, chunks))
    later = mesh_lib.spec((None, "batch", "chunk", None, None, None, None))
    return rollout.Draws(
        noise=put(np.asarray(noise, np.float32), rollout.LATENTS),
        eps=put(np.asarray(eps, np.float32), rollout.LATENTS),
        level=put(levels, rollout.CHUNKS),
        exit_step=put(steps, jax.P(None)),
        length=jnp.int32(chunks if length is None else length),
        renoise=None if renoise is None else put(renoise, later),
    )


def scripts(goal: DMD, text: Any, cut: Any = None, first_frame: Any = None) -> Scripts:
    """One batch. text: [batch, chunk, token, dim]; cut: [chunk]."""
    if cut is None:
        cut = np.zeros(text.shape[1], bool)
    cut = np.broadcast_to(np.asarray(cut, bool), text.shape[:2])

    def put(like, x):
        spec = jax.P(*like.sharding.spec[1:])
        return jax.device_put(jnp.asarray(x, like.dtype), jax.NamedSharding(goal.mesh, spec))

    like = goal.batch
    return Scripts(
        text=put(like.text, text),
        cut=put(like.cut, cut),
        first_frame=None if like.first_frame is None else put(like.first_frame, first_frame),
    )


def place(goal: DMD, tree: params_lib.Tree) -> params_lib.Tree:
    """A whole transformer on the objective's mesh."""
    return jax.device_put(tree, params_lib.shardings(goal.specs, goal.mesh))


def error(a: Any, b: Any) -> float:
    """The largest difference, relative to the largest number of b."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.abs(a - b).max() / np.abs(b).max())
