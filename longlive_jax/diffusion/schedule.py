"""Noise levels of the flow-matching sampler.

x_sigma = (1 - sigma) data + sigma noise. Levels are equidistant, then shifted towards noise (Esser
et al., arXiv 2403.03206, equation 23); the constants are those the published models were trained
and distilled with.
"""

import numpy as np

SIGMA_MAX = float(np.float32(0.999))


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
