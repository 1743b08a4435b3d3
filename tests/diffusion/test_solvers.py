"""The solver that renoises, against a plain loop; and the schedule that both solvers share."""

import numpy as np
import pytest

from longlive_jax import config as lib
from longlive_jax.diffusion import schedule, solvers, unipc


def velocity(x, step):
    return np.sin(3 * x) + np.float32(0.1 * step)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_renoising_is_consistency_sampling(steps):
    """x0 of each level, then noise of the next (arXiv 2303.01469, algorithm 1); the last is x0."""
    draw = np.random.default_rng(0)
    noise, *fresh = draw.standard_normal((steps + 1, 2, 3, 5)).astype(np.float32)
    solver = solvers.solver(lib.Sample(steps=steps, solver="x0_renoise"), lib.Video(shift=5.0))
    sample, history = noise, unipc.History.start(noise)
    for step, row in enumerate(solver.rows):
        sample, history = solver.step(row, sample, velocity(sample, step), history, fresh[step])
    sigmas = schedule.sigma_at(schedule.sampling_schedule(steps, 5.0)[1], 5.0)
    x = noise
    for step, sigma in enumerate(sigmas):
        x0 = x - sigma * velocity(x, step)
        following = sigmas[step + 1] if step + 1 < steps else 0
        x = (1 - following) * x0 + following * fresh[step]
    np.testing.assert_allclose(sample, x, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(sample, x0, rtol=1e-6, atol=1e-6)


def test_both_solvers_have_the_models_inputs_in_common():
    video = lib.Video(shift=5.0)
    one, other = (solvers.solver(lib.Sample(solver=s), video) for s in ("unipc", "x0_renoise"))
    np.testing.assert_array_equal(one.timesteps, other.timesteps)
    np.testing.assert_array_equal(one.exit_sigmas, other.exit_sigmas)
    np.testing.assert_array_equal(one.timesteps, [999, 937, 833, 624])
    # Sigma of the training table's nearest entry: within half an entry of the timestep.
    np.testing.assert_allclose(one.exit_sigmas, one.timesteps / 1000, atol=1e-3)
