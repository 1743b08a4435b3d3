"""The two ways from a velocity to the next noise level, with one face.

unipc        UniPC of order 2 (`diffusion.unipc`), which LongLive-2.0 trains and samples with
x0_renoise   the predicted clean latents with new noise: how most few-step models are distilled
             and sampled (consistency models, arXiv 2303.01469, algorithm 1)
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.config import Sample, Video
from longlive_jax.diffusion import schedule, unipc


@dataclasses.dataclass(frozen=True, eq=False)
class Solver:
    """A schedule, and its steps. All sigmas are shares of noise.

    timesteps: float32 [steps], the model's input.
    rows: float32 [steps, 8], weights of each step: `unipc.weights`, or sigma and the next sigma.
    exit_sigmas: float32 [steps], at which a step's velocity is read as clean latents in
      distillation: the training table's entry at the step's timestep.
    """

    renoises: bool
    timesteps: np.ndarray
    rows: np.ndarray
    exit_sigmas: np.ndarray

    def step(
        self, row: jax.Array, sample: jax.Array, velocity: jax.Array, history: unipc.History,
        fresh: jax.Array | None,
    ) -> tuple[jax.Array, unipc.History]:  # fmt: skip
        """The sample at the next level.

        Args:
          row: float32 [8], the step's of `rows`.
          sample, velocity: float32 [batch, ...], the model's input and output.
          fresh: noise of sample's shape, if the solver renoises; else it is not read.
        """
        if not self.renoises:
            return unipc.step(row, sample, velocity, history)
        assert fresh is not None
        clean = sample - row[0] * velocity.astype(jnp.float32)
        return (1 - row[1]) * clean + row[1] * fresh, history


def solver(sample: Sample, video: Video) -> Solver:
    """The solver of a config, of `sample.steps` steps."""
    return _solver(sample.solver, sample.steps, video.shift)


@functools.cache
def _solver(name: str, steps: int, shift: float) -> Solver:
    sigmas, timesteps = schedule.sampling_schedule(steps, shift)
    exits = schedule.sigma_at(timesteps, shift)
    if name == "unipc":
        return Solver(False, timesteps, unipc.weights(sigmas), exits)
    rows = np.zeros((steps, 8), np.float32)
    rows[:, 0], rows[:-1, 1] = exits, exits[1:]
    return Solver(True, timesteps, rows, exits)
