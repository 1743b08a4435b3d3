"""Rotary angles, exact at any position, in the original's layout."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.ops import rope

FREQUENCIES = np.concatenate(rope.axis_frequencies(128))
exact_angle = jax.jit(lambda p: rope.exact_angle(p, FREQUENCIES))


def error(angle, exact):
    return np.abs(np.exp(1j * np.asarray(angle, np.float64)) - np.exp(1j * exact)).max()


def test_frequencies_are_the_published_ones():
    time, row, column = rope.axis_frequencies(128)
    assert [len(f) for f in (time, row, column)] == [22, 21, 21]
    np.testing.assert_allclose(time[[0, 1, -1]], [1, 0.657933224657568, 1.519911082952933e-4])
    np.testing.assert_allclose(row[[0, 1, -1]], [1, 0.6449466771037624, 1.5505157798326253e-4])
    np.testing.assert_array_equal(row, column)


@pytest.mark.parametrize("position", [0, 1, 1023, 1024, 999_999, 1_000_000, 16_000_000, -7])
def test_angles_are_exact_under_jit(position):
    exact = position * FREQUENCIES.astype(np.longdouble)
    assert error(exact_angle(jnp.int32(position)[None])[0], np.asarray(exact, np.float64)) < 1e-6


@hypothesis.given(st.integers(-(2**24) + 1, 2**24 - 1))
@hypothesis.settings(max_examples=200, deadline=None)
def test_angles_are_exact_anywhere(position):
    exact = np.asarray(position * FREQUENCIES.astype(np.longdouble) % (2 * np.pi), np.float64)
    assert error(exact_angle(jnp.int32(position)[None])[0], exact) < 1e-6


def test_a_rotation_is_the_originals_complex_product():
    frames, height, width, heads, head_dim = np.asarray([3, 1_000_000]), 3, 5, 2, 24
    draw = np.random.default_rng(0)
    x = draw.standard_normal((2, height * width, heads, head_dim)).astype(np.float32)
    angle = rope.angles(jnp.asarray(frames, jnp.int32), height, width, head_dim)
    out = np.asarray(rope.rotate(jnp.asarray(x), angle))

    time, row, column = rope.axis_frequencies(head_dim)
    for f, frame in enumerate(frames):
        for r in range(height):
            for c in range(width):
                turn = np.exp(1j * np.concatenate([frame * time, r * row, c * column]))
                pairs = x[f, r * width + c].reshape(heads, -1, 2)
                z = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
                expected = np.stack([z.real, z.imag], axis=-1).reshape(heads, head_dim)
                np.testing.assert_allclose(out[f, r * width + c], expected, atol=5e-6)


def test_scores_depend_on_the_distance_alone():
    draw = np.random.default_rng(1)
    q, k = (jnp.asarray(draw.standard_normal((1, 1, 128)), jnp.float32) for _ in range(2))

    def score(a, b):
        angle = rope.angles(jnp.asarray([a, b], jnp.int32), 1, 1, 128)
        return float(jnp.sum(rope.rotate(q, angle[0]) * rope.rotate(k, angle[1])))

    assert abs(score(5, 2) - score(1_000_005, 1_000_002)) < 2e-5


def test_bfloat16_is_rotated_in_float32_and_rounded_once():
    draw = np.random.default_rng(2)
    x = jnp.asarray(draw.standard_normal((4, 2, 24)), jnp.bfloat16)
    angle = rope.angles(jnp.asarray([77], jnp.int32), 2, 2, 24)[0]
    expected = rope.rotate(x.astype(jnp.float32), angle).astype(jnp.bfloat16)
    np.testing.assert_array_equal(rope.rotate(x, angle), expected)
