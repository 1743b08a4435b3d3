"""Turns of a camera in the middle of a painted cylinder are measured; nothing is there to walk to."""

import numpy as np
import pytest
from scipy import ndimage

from longlive_jax.grading.walk import motion
from longlive_jax.grading.walk.flow import FOCAL, Lens


def panorama(seed=0):
    """float32 [row, column]: what is round the camera, 4 columns and rows a degree."""
    noise = np.random.default_rng(seed).uniform(0, 255, (720, 1440)).astype(np.float32)
    soft = ndimage.gaussian_filter(noise, 6, mode="wrap") + ndimage.gaussian_filter(noise, 2) / 4
    return (soft - soft.min()) / (soft.max() - soft.min()) * 255


def views(yaws, pitches=None, height=160, width=256, seed=0):
    """float32 [picture, height, width]: the cylinder, seen at angles in degrees."""
    around, focal = panorama(seed), FOCAL * height
    x = (np.arange(width) - (width - 1) / 2) / focal
    y = (np.arange(height) - (height - 1) / 2)[:, None] / focal
    pictures = []
    for yaw, pitch in zip(yaws, pitches if pitches is not None else np.zeros(len(yaws))):
        bearing = np.degrees(np.arctan(x)) + yaw
        slope = (y - 1.2 * np.tan(np.radians(pitch))) * np.cos(np.arctan(x))
        at = np.broadcast_arrays(360 + 240 * slope, 4 * bearing[None])
        pictures.append(ndimage.map_coordinates(around, at, order=1, mode="grid-wrap"))
    return np.stack(pictures).astype(np.float32)


def measured(lumas, pitches, view="first"):
    lens = Lens(*lumas.shape[1:])
    return motion.measure(lens, lens.unroll(lumas), np.asarray(pitches, float), view)


@pytest.mark.parametrize("rate", [-9.0, -2.5, -0.7, 1.3, 6.0])
def test_a_turn_is_measured_to_some_percent(rate):
    found = measured(views(rate * np.arange(7)), np.zeros(7))
    np.testing.assert_allclose(found.yaw, rate, rtol=0.04, atol=0.05)
    assert np.abs(found.pitch).max() < 0.1 and np.hypot(found.ahead, found.right).max() < 1
    assert found.clear.min() > 0.5


def test_the_size_of_the_picture_makes_no_difference():
    found = measured(views(3.0 * np.arange(7), height=240, width=384), np.zeros(7))
    np.testing.assert_allclose(found.yaw, 3, rtol=0.04)


def test_looking_up_is_positive():
    pitches = 1.5 * np.arange(7)
    found = measured(views(np.zeros(7), pitches), pitches)
    np.testing.assert_allclose(found.pitch, 1.5, rtol=0.1)
    assert np.abs(found.yaw).max() < 0.2


def test_what_stands_still_does():
    found = measured(views(np.zeros(4)), np.zeros(4))
    assert np.abs(found.yaw).max() < 0.01 and np.hypot(found.ahead, found.right).max() < 0.1


@pytest.mark.parametrize("frames", [np.zeros((4, 160, 256), np.float32), None])
def test_pictures_without_a_pattern_or_a_link_say_nothing(frames):
    if frames is None:  # each of another world
        frames = np.concatenate([views([0], seed=seed) for seed in range(4)])
    assert measured(frames, np.zeros(len(frames))).clear.max() < 0.45
