import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from longlive_jax.data.worlds import poses
from longlive_jax.data.worlds.poses import Pose, wrap

LENGTHS = st.floats(-5000, 5000)
POSES = st.builds(Pose, LENGTHS, LENGTHS, LENGTHS, st.floats(-720, 720), st.floats(-80, 80))


def turn(quaternion, vector):
    """The vector in the world's axes, by the textbook's matrix of a quaternion w, x, y, z."""
    w, x, y, z = quaternion
    matrix = np.asarray([
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ])  # fmt: skip
    return matrix @ vector


@given(POSES)
def test_a_row_says_where_one_is_and_looks(pose):
    (row,) = poses.rows([pose])
    assert row.dtype == np.float32 and row.shape == (7,)
    np.testing.assert_allclose(row[:3], pose[:3], rtol=1e-6, atol=1e-6)
    yaw, pitch = math.radians(pose.yaw), math.radians(pose.pitch)
    ahead = [math.cos(yaw) * math.cos(pitch), math.sin(yaw) * math.cos(pitch), -math.sin(pitch)]
    np.testing.assert_allclose(turn(row[3:], [1, 0, 0]), ahead, atol=1e-5)  # z points down
    right = [-math.sin(yaw), math.cos(yaw), 0]
    np.testing.assert_allclose(turn(row[3:], [0, 1, 0]), right, atol=1e-5)


@given(POSES)
def test_yaw_and_pitch_come_back(pose):
    yaw, pitch = poses.yaw_pitch(poses.rows([pose]))
    assert abs(wrap(yaw[0] - pose.yaw)) < 1e-3 and abs(pitch[0] - pose.pitch) < 1e-3


@given(st.lists(POSES, min_size=2, max_size=9), st.floats(0, 9), st.floats(-9, 9))
def test_moves_are_those_of_who_walks(track, ahead, right):
    """A step ahead and to the right of the last pose is read back, whatever the yaw."""
    last = track[-1]._replace(x=0.0, y=0.0)
    c, s = math.cos(math.radians(last.yaw)), math.sin(math.radians(last.yaw))
    track[-1:] = [last, last._replace(x=c * ahead - s * right, y=s * ahead + c * right, yaw=0.0)]
    rows = poses.rows(track)
    np.testing.assert_allclose(poses.moved(rows)[-1], [ahead, right], atol=1e-4)
    expected = wrap(np.diff([pose.yaw for pose in track]))
    assert np.abs(wrap(poses.turned(rows) - expected)).max() < 1e-3


def test_angles_are_wrapped():
    np.testing.assert_array_equal(
        wrap(np.asarray([-180, 180, 190, -190, 720])), [-180, -180, -170, 170, 0]
    )
