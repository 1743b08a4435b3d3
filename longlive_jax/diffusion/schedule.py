"""Noise levels of flow matching, for sampling and for training.

x_sigma = (1 - sigma) data + sigma noise. Levels are equidistant, then shifted towards noise (Esser
et al., arXiv 2403.03206, equation 23); the constants are those the published models were trained
and distilled with.
"""

from typing import NamedTuple

import numpy as np

SIGMA_MAX = float(np.float32(0.999))
LEVELS = 1000  # noise levels that a trainer draws from


def sampling_schedule(steps: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Levels and timesteps of a sampler of `steps` steps.

    Returns:
      sigmas: float32 [steps + 1], falling to 0.
      timesteps: float32 [steps], what the model is told: 1000 sigma, cut to a whole number.
    """
    base = np.linspace(SIGMA_MAX, 0.0, steps + 1)[:-1]
    sigmas = shift * base / (1 + (shift - 1) * base)
    timesteps = np.floor(sigmas * 1000).astype(np.float32)
    return np.append(sigmas, 0.0).astype(np.float32), timesteps


class TrainingSchedule(NamedTuple):
    """By level, from pure noise (0) to the cleanest (LEVELS - 1); each float32 [LEVELS]."""

    sigmas: np.ndarray  # share of noise
    timesteps: np.ndarray  # 1000 sigma, what the model is told
    weights: np.ndarray  # of the loss, 1 on average


def training_schedule(shift: float) -> TrainingSchedule:
    """Levels of a trainer. Its loss weighs the middle: a Gaussian of the timestep, less its least.

    y = exp(-2 ((timestep - 500) / 1000)^2), weight = 1000 (y - min y) / sum(y - min y): the rule of
    the published models' training, which gives pure noise the weight 0.
    """
    base = np.linspace(1.0, 0.0, LEVELS + 1)[:-1]
    sigmas = shift * base / (1 + (shift - 1) * base)
    timesteps = 1000 * sigmas
    y = np.exp(-2 * ((timesteps - 500) / 1000) ** 2)
    weights = (y - y.min()) * LEVELS / np.sum(y - y.min())
    return TrainingSchedule(*(x.astype(np.float32) for x in (sigmas, timesteps, weights)))
