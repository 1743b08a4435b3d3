"""Poses as sidecars keep them: a position and a quaternion a picture, float32 [picture, 7].

x and y are in the plane in which one walks, z points down: of a pose with yaw 0, x points ahead and
y to the right. Yaw turns to the right and pitch looks up, as a mouse's moves do. The quaternion
(w, x, y, z) turns the axes of who walks (ahead, right, down) into those of the world.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Pose(NamedTuple):
    """Lengths in the world's own unit, angles in degrees."""

    x: float
    y: float
    z: float = 0.0
    yaw: float = 0.0
    pitch: float = 0.0


def rows(poses: Sequence[Pose]) -> np.ndarray:
    """float32 [picture, 7]: x, y, z and the quaternion w, x, y, z."""
    x, y, z, yaw, pitch = np.asarray(poses, np.float64).reshape(-1, 5).T
    half_yaw, half_pitch = np.radians(yaw) / 2, np.radians(pitch) / 2
    cos_yaw, sin_yaw = np.cos(half_yaw), np.sin(half_yaw)
    cos_pitch, sin_pitch = np.cos(half_pitch), np.sin(half_pitch)
    quaternion = (
        cos_yaw * cos_pitch,
        -sin_yaw * sin_pitch,
        cos_yaw * sin_pitch,
        sin_yaw * cos_pitch,
    )
    return np.stack([x, y, z, *quaternion], axis=1).astype(np.float32)


def yaw_pitch(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Yaw, -180 to 180, and pitch, -90 to 90, in degrees: float64 [picture] each."""
    w, x, y, z = np.asarray(rows, np.float64)[:, 3:].T
    yaw = np.degrees(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)))
    return yaw, np.degrees(np.arcsin(np.clip(2 * (w * y - z * x), -1, 1)))


def turned(rows: np.ndarray) -> np.ndarray:
    """Degrees by which yaw changed from each picture to the next, float64 [picture - 1]."""
    return wrap(np.diff(yaw_pitch(rows)[0]))


def moved(rows: np.ndarray) -> np.ndarray:
    """Way from each picture to the next, ahead and to the right of the first: [picture - 1, 2]."""
    yaw = np.radians(yaw_pitch(rows)[0][:-1])
    x, y = np.diff(np.asarray(rows, np.float64)[:, :2], axis=0).T
    return np.stack([np.cos(yaw) * x + np.sin(yaw) * y, np.cos(yaw) * y - np.sin(yaw) * x], axis=1)


def wrap(degrees):
    """The same angle, -180 or more and below 180."""
    return (degrees + 180) % 360 - 180
