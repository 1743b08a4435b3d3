"""Schedule and solver, against the original's trajectories and against what must hold."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.diffusion import schedule, unipc
from tests import golden_files


def solve(sigmas, x, velocity):
    weights = unipc.weights(sigmas)
    history, trajectory = unipc.History.start(x), [x]
    step = jax.jit(unipc.step)
    for i in range(len(weights)):
        x, history = step(jnp.asarray(weights[i]), x, velocity(i, x), history)
        trajectory.append(x)
    return trajectory


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_trajectories_are_the_originals(steps):
    g = golden_files.arrays("dit_tiny")
    sigmas, timesteps = schedule.sampling_schedule(steps, 5.0)
    np.testing.assert_array_equal(sigmas, g[f"unipc{steps}_sigmas"])
    np.testing.assert_array_equal(timesteps, g[f"unipc{steps}_timesteps"])
    expected, velocities = g[f"unipc{steps}_f32_traj"], g[f"unipc{steps}_f32_v"]
    out = solve(sigmas, jnp.asarray(expected[0]), lambda i, x: jnp.asarray(velocities[i]))
    for got, want in zip(out, expected):
        assert np.abs(np.asarray(got) - want).max() <= 1e-6 * np.abs(expected).max()


def test_50_steps_have_the_originals_timesteps():
    _, timesteps = schedule.sampling_schedule(50, 5.0)
    assert timesteps[:8].tolist() == [999, 995, 991, 987, 982, 978, 973, 968]
    assert timesteps[-4:].tolist() == [302, 241, 172, 92]


def test_one_step_jumps_to_the_prediction():
    sigmas, timesteps = schedule.sampling_schedule(1, 5.0)
    assert timesteps.tolist() == [999] and sigmas[1] == 0
    x, v = jnp.ones((1, 3)), jnp.full((1, 3), 0.25)
    np.testing.assert_allclose(
        solve(sigmas, x, lambda i, x: v)[-1], 1 - 0.25 * sigmas[0], rtol=1e-6
    )


def test_two_steps_are_eulers():
    sigmas, _ = schedule.sampling_schedule(2, 5.0)
    x, v = jnp.ones((1, 4)), [jnp.full((1, 4), 0.3), jnp.full((1, 4), -0.7)]
    out = solve(sigmas, x, lambda i, x: v[i])
    euler = 1 + (sigmas[1] - sigmas[0]) * 0.3 + (0 - sigmas[1]) * -0.7
    np.testing.assert_allclose(out[-1], euler, rtol=1e-5)


@hypothesis.given(st.integers(1, 60), st.floats(1, 12))
@hypothesis.settings(max_examples=40, deadline=None)
def test_an_exact_model_is_solved_exactly(steps, shift):
    """Where the velocity is that of one data point, any solver step must stay on the line to it."""
    sigmas, _ = schedule.sampling_schedule(steps, shift)
    assert (np.diff(sigmas) < 0).all() and sigmas[-1] == 0 and sigmas[0] < 1
    data, noise = np.float64(0.6), np.float64(-1.3)
    weights = unipc.weights(sigmas).astype(np.float64)
    assert np.isfinite(weights).all()
    x = (1 - sigmas[0]) * data + sigmas[0] * noise
    history = unipc.History(corrected=x, data=data, data_before=data)
    for i in range(steps):
        row = weights[i]
        corrected = row[1] * history.corrected + row[2:5].sum() * data
        assert abs(corrected - ((1 - sigmas[i]) * data + sigmas[i] * noise)) < 1e-4
        x = row[5] * corrected + (row[6] + row[7]) * data
        assert abs(x - ((1 - sigmas[i + 1]) * data + sigmas[i + 1] * noise)) < 1e-4
        history = unipc.History(corrected=corrected, data=data, data_before=data)


def test_the_state_is_float32_whatever_the_model_says_in():
    x = jnp.zeros((1, 2))
    sigmas, _ = schedule.sampling_schedule(4, 5.0)
    out = solve(sigmas, x, lambda i, x: jnp.ones((1, 2), jnp.bfloat16))
    assert all(y.dtype == jnp.float32 for y in out)


def test_four_steps_have_the_known_constants():
    """The unrolled 4-step solver at shift 5, worked out by hand from the paper."""
    weights = unipc.weights(schedule.sampling_schedule(4, 5.0)[0])
    np.testing.assert_allclose(weights[0, 5:], [0.937453089, 0.062546911, 0], atol=1e-6)
    np.testing.assert_allclose(
        weights[1, 1:5], [0.937453089, 0.031273455, 0, 0.031273455], atol=1e-6
    )
    np.testing.assert_allclose(weights[1, 5:], [0.888814766, 0.121674207, -0.010488974], atol=1e-6)
    np.testing.assert_allclose(
        weights[2, 1:5], [0.888814766, 0.049058171, -0.000544149, 0.062671212], atol=1e-6
    )
    np.testing.assert_allclose(weights[2, 5:], [0.749874967, 0.375339187, -0.125214154], atol=1e-6)
    np.testing.assert_allclose(weights[3, 5:], [0, 1, 0], atol=0)
