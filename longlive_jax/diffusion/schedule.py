"""Noise levels of flow matching, for sampling and for training.

x_sigma = (1 - sigma) data + sigma noise. Sigmas are equidistant, then shifted towards noise (Esser
et al., arXiv 2403.03206, equation 23); the constants are those the published models were trained
and distilled with.
"""

from typing import NamedTuple

import numpy as np

from longlive_jax.config import TIMESTEPS

SIGMA_MAX = float(np.float32(0.999))


def sampling_schedule(steps: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Sigmas and timesteps of a sampler of `steps` steps.

    Returns:
      sigmas: float32 [steps + 1], falling to 0.
      timesteps: float32 [steps], the model's input: 1000 sigma, truncated to an integer.
    """
    base = np.linspace(SIGMA_MAX, 0.0, steps + 1)[:-1]
    sigmas = shift * base / (1 + (shift - 1) * base)
    timesteps = np.floor(sigmas * 1000).astype(np.float32)
    return np.append(sigmas, 0.0).astype(np.float32), timesteps


class TrainingSchedule(NamedTuple):
    """The noise table, from pure noise (entry 0) to the cleanest; each float32 [TIMESTEPS]."""

    sigmas: np.ndarray  # share of noise
    timesteps: np.ndarray  # 1000 sigma, the model's input
    weights: np.ndarray  # of the loss; their mean is 1


def training_schedule(shift: float) -> TrainingSchedule:
    """The noise table of training. The loss weight is a Gaussian of the timestep less its minimum.

    y = exp(-2 ((timestep - 500) / 1000)^2), weight = 1000 (y - min y) / sum(y - min y): the rule of
    the published models' training, which gives pure noise the weight 0.
    """
    base = np.linspace(1.0, 0.0, TIMESTEPS + 1)[:-1]
    sigmas = shift * base / (1 + (shift - 1) * base)
    timesteps = 1000 * sigmas
    y = np.exp(-2 * ((timesteps - 500) / 1000) ** 2)
    weights = (y - y.min()) * TIMESTEPS / np.sum(y - y.min())
    return TrainingSchedule(*(x.astype(np.float32) for x in (sigmas, timesteps, weights)))


def sigma_at(timesteps: np.ndarray, shift: float) -> np.ndarray:
    """float32, shape of timesteps: sigma of the training table's entry nearest to each timestep.

    What the published models were distilled with, where a timestep is no entry of the table.
    """
    table = training_schedule(shift)
    nearest = np.abs(table.timesteps - np.asarray(timesteps, np.float32)[..., None]).argmin(-1)
    return table.sigmas[nearest]


class ScoreLaw(NamedTuple):
    """Noise levels at which two scores are compared, by a number drawn from 0 to TIMESTEPS - 1."""

    timesteps: np.ndarray  # float32 [TIMESTEPS], the model's input
    sigmas: np.ndarray  # float32 [TIMESTEPS], share of noise


def score_law(shift: float, least: float, most: float) -> ScoreLaw:
    """t = 1000 s u / (1 + (s - 1) u), u = number / 1000, kept between `least` and `most`."""
    u = np.arange(TIMESTEPS) / TIMESTEPS
    t = np.clip(TIMESTEPS * shift * u / (1 + (shift - 1) * u), least, most).astype(np.float32)
    return ScoreLaw(t, sigma_at(t, shift))
