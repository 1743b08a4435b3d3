"""Poses by dead reckoning, and how far they are from each other."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlive_jax import config as config_lib
from longlive_jax.data import sidecars
from longlive_jax.data.worlds import poses as poses_lib
from longlive_jax.data.worlds.poses import Pose
from longlive_jax.grading.walk import asked
from longlive_jax.sampling import reckoning
from longlive_jax.sampling.reckoning import Reckoning

DOOM = config_lib.Memory()
KEYS = ("KeyW", "KeyS", "KeyA", "KeyD")


def reckoned(line, pictures, memory=DOOM, lag=1, pieces=1, known=None):
    """float32 [picture, 7], asked for in so many pieces."""
    actions = sidecars.parse(line, pictures)
    made = np.zeros((pictures, 6), np.float32)
    for column, key in enumerate(KEYS):
        if key in actions.keys:
            made[:, column] = actions.keyboard[:, actions.keys.index(key)]
    made[:, 4:] = actions.mouse
    one = Reckoning(memory, KEYS, lag)
    for stop in np.linspace(0, pictures, pieces + 1).astype(int)[1:]:
        one.extend(made[one.next_row :], known, int(stop))
    return one.rows


def test_the_defaults_are_dooms():
    """As `grading.walk.asked` says the game moves, from each picture to the next."""
    line = "w*40, w+d*20, yaw+5*30, a*20, s+yaw-2*30"
    ours, theirs = reckoned(line, 140), asked.of_actions(sidecars.parse(line, 140))
    np.testing.assert_allclose(poses_lib.turned(ours), theirs.yaw, atol=1e-3)
    facing = np.radians(np.cumsum(theirs.yaw))
    x, y = theirs.velocity.T
    way = np.stack(
        [np.cos(facing) * x - np.sin(facing) * y, np.sin(facing) * x + np.cos(facing) * y]
    )
    far = np.hypot(*way).sum()
    assert (
        np.hypot(*(ours[-1, :2] - way.sum(axis=1))) < 0.05 * far
    )  # aside they are a little slower


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.sampled_from(["w*9", "s*7", "a*5", "d*8", "yaw+7*9", "pitch-2*6"]), min_size=2,
             max_size=8),
    st.integers(1, 6), st.integers(0, 1),
)  # fmt: skip
def test_pieces_are_the_whole(parts, pieces, lag):
    line = ", ".join([*parts, "still"])
    np.testing.assert_array_equal(
        reckoned(line, 70, lag=lag), reckoned(line, 70, lag=lag, pieces=pieces)
    )


def test_a_row_moves_the_picture_that_it_drives():
    memory = config_lib.Memory(speed=2.0, glide=0.0)
    assert reckoned("w*1, still", 4, memory, lag=1)[:, 0].tolist() == [0, 2, 2, 2]
    assert reckoned("still*1, w*1, still", 4, memory, lag=0)[:, 0].tolist() == [0, 2, 2, 2]
    turned = reckoned("yaw+15*6, d*1, still", 9, memory)  # now right is back
    np.testing.assert_allclose(turned[-1, :2], [-2, 0], atol=1e-6)


def test_given_poses_are_taken_and_gone_on_from():
    memory = config_lib.Memory(speed=1.0, glide=0.5)
    known = poses_lib.rows([Pose(10.0 * i, 5.0, 0.0, 90.0) for i in range(3)])
    rows = reckoned("still", 6, memory, known=known)
    np.testing.assert_array_equal(rows[:3], known)
    np.testing.assert_allclose(rows[3:, 0], [25, 27.5, 28.75])  # it glides on
    np.testing.assert_allclose(poses_lib.yaw_pitch(rows)[0], 90, atol=1e-4)


@settings(deadline=None)
@given(*[st.floats(-200, 200)] * 2, *[st.floats(-180, 180)] * 2, *[st.floats(-60, 60)] * 2)
def test_costs(x, y, yaw, other, pitch, up):
    memory = config_lib.Memory(distance=100.0, angle=40.0)
    here, there = Pose(0.0, 0.0, 0.0, yaw, pitch), Pose(x, y, 7.0, other, up)
    (found,) = reckoning.costs(poses_lib.rows([there]), poses_lib.rows([here])[0], memory)
    a, b, up, pitch = (math.radians(v) for v in (yaw, other, up, pitch))
    cosine = math.sin(pitch) * math.sin(up) + math.cos(pitch) * math.cos(up) * math.cos(a - b)
    angle = math.degrees(math.acos(min(max(cosine, -1), 1))) / 40
    far = math.hypot(x, y) / 100
    if max(far, angle) < 0.99:
        assert found == pytest.approx(far + angle, abs=0.02)
    if max(far, angle) > 1.01:
        assert found == np.inf
