"""UniPC of order 2 (Zhao et al., arXiv 2302.04867; B(h) = exp(h) - 1, data prediction).

Corrector and predictor are linear in what they combine, and the schedule is fixed, so a step is two
weighted sums whose weights are worked out once, on the host, in float64.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@struct.dataclass
class History:
    """Results of earlier steps that a step needs; each [batch, ...] float32, like the sample."""

    corrected: jax.Array  # the sample at the previous level, corrected
    data: jax.Array  # data predicted at the previous level
    data_before: jax.Array  # and at the one before that

    @classmethod
    def start(cls, noise: jax.Array) -> "History":
        # The first step's weights of the two predictions are 0; any finite array will do.
        return cls(corrected=noise, data=jnp.zeros_like(noise), data_before=jnp.zeros_like(noise))


def weights(sigmas: np.ndarray) -> np.ndarray:
    """The weights of every step.

    Args:
      sigmas: [steps + 1], falling, the last one 0.

    Returns:
      float32 [steps, 8]: sigma; then the corrector's weights of (corrected, data, data_before, data
      now); then the predictor's of (corrected now, data now, data before).
    """
    sigmas = np.asarray(sigmas, np.float64)
    steps = len(sigmas) - 1
    lam = [math.log((1 - s) / s) if s > 0 else math.inf for s in sigmas]
    table = np.zeros((steps, 8))
    for i in range(steps):
        order = min(2, steps - i, i + 1)
        table[i, 0] = sigmas[i]
        table[i, 1:5] = _corrector(sigmas, lam, i, min(2, steps - i + 1, i))
        table[i, 5:8] = _predictor(sigmas, lam, i, order)
    return table.astype(np.float32)


def _corrector(sigmas, lam, i, order):
    """Paper algorithm 2 (UniC) from level i - 1 to level i; `order` is the last predictor's."""
    if i == 0:
        return 1.0, 0.0, 0.0, 0.0
    h = lam[i] - lam[i - 1]
    b = math.expm1(-h)
    scale = (1 - sigmas[i]) * b
    if order == 1:
        now, before, r = 0.5, 0.0, 1.0
    else:
        r = (lam[i - 2] - lam[i - 1]) / h
        phi1 = b / -h - 1
        rhs = (phi1 / b, 2 * (phi1 / -h - 0.5) / b)
        before, now = np.linalg.solve([[1.0, 1.0], [r, 1.0]], rhs)
    before = before / r
    return (
        sigmas[i] / sigmas[i - 1],
        -scale * (1 - before - now),
        -scale * before,
        -scale * now,
    )


def _predictor(sigmas, lam, i, order):
    """Paper algorithm 1 (UniP) from level i to level i + 1."""
    if sigmas[i + 1] == 0:
        return 0.0, 1.0, 0.0
    h = lam[i + 1] - lam[i]
    scale = (1 - sigmas[i + 1]) * math.expm1(-h)
    before = 0.0 if order == 1 else 0.5 / ((lam[i - 1] - lam[i]) / h)
    return sigmas[i + 1] / sigmas[i], -scale * (1 - before), -scale * before


def step(
    row: jax.Array, sample: jax.Array, velocity: jax.Array, history: History
) -> tuple[jax.Array, History]:
    """One step: the sample at the next noise level.

    Args:
      row: float32 [8], a row of `weights`.
      sample: float32 [batch, ...], the model's input.
      velocity: [batch, ...], the model's output: noise minus data.
    """
    data = sample - row[0] * velocity.astype(jnp.float32)
    corrected = (
        row[1] * history.corrected
        + row[2] * history.data
        + row[3] * history.data_before
        + row[4] * data
    )
    following = row[5] * corrected + row[6] * data + row[7] * history.data
    return following, History(corrected=corrected, data=data, data_before=history.data)
