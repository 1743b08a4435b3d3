"""Where a player is in each picture: as it is given, else by dead reckoning from the actions."""

import copy
import math

import numpy as np

from longlive_jax import config as config_lib
from longlive_jax.data.worlds import poses as poses_lib
from longlive_jax.data.worlds.poses import Pose

# W3C codes by where they move: ahead, to the right.
_WAYS = {"KeyW": (1, 0), "KeyS": (-1, 0), "KeyA": (0, -1), "KeyD": (0, 1)}
_PITCH = 90.0  # degrees up or down at most


class Reckoning:
    """The poses of one stream, a picture each.

    Reckoned are the keys W, S, A and D and the mouse; walls are not known, so that who pushes
    against one is reckoned to walk on. The speed glides: each picture keeps `memory.glide` of it,
    and gains what a held key leads to `memory.speed` by. A video begins at the origin, looking
    along x, and as the first given pose has it where there is one.

    keys: names of the keyboard's columns. lag: a row of actions drives the picture so much later.
    """

    def __init__(self, memory: config_lib.Memory, keys: tuple[str, ...], lag: int):
        self.memory, self.lag = memory, lag
        self._ways = np.asarray([_WAYS.get(key, (0, 0)) for key in keys], np.float64)
        self._ways = self._ways.reshape(len(keys), 2)
        self._rows: list[np.ndarray] = []
        self._pose, self._speed = Pose(0.0, 0.0), (0.0, 0.0)

    def extend(self, made: np.ndarray, given: np.ndarray | None, stop: int) -> None:
        """Poses of the pictures up to `stop`.

        Args:
          made: float32 [action, key + 2], the stream's from row `next_row` on.
          given: float32 [picture, 7], poses as sidecars have them, as far as they are known.
        """
        first = self.next_row
        for picture in range(len(self._rows), stop):
            if given is not None and picture < len(given):
                self._take(given[picture])
                continue
            if picture >= self.lag:
                self._advance(made[picture - self.lag - first])
            self._rows.append(poses_lib.rows([self._pose])[0])

    @property
    def next_row(self) -> int:
        """The row of actions that drives the next picture."""
        return max(0, len(self._rows) - self.lag)

    @property
    def rows(self) -> np.ndarray:
        """float32 [picture, 7], as sidecars have poses."""
        return np.asarray(self._rows, np.float32).reshape(-1, 7)

    def at(self, pictures: list[int]) -> np.ndarray:
        """float32 [picture, 7], of these pictures."""
        return np.stack([self._rows[picture] for picture in pictures])

    def _advance(self, row):
        memory, last = self.memory, self._pose
        yaw = last.yaw + float(row[-1])
        pitch = min(max(last.pitch + float(row[-2]), -_PITCH), _PITCH)
        ahead, right = np.asarray(row[:-2], np.float64) @ self._ways
        turn = math.radians(yaw)
        wanted = (
            math.cos(turn) * ahead - math.sin(turn) * right,
            math.sin(turn) * ahead + math.cos(turn) * right,
        )
        gain = (1 - memory.glide) * memory.speed
        vx, vy = (memory.glide * v + gain * w for v, w in zip(self._speed, wanted))
        self._speed = vx, vy
        self._pose = Pose(last.x + vx, last.y + vy, last.z, float(poses_lib.wrap(yaw)), pitch)

    def _take(self, row):
        yaw, pitch = (float(x[0]) for x in poses_lib.yaw_pitch(row[None]))
        x, y, z = map(float, row[:3])
        pose = Pose(x, y, z, yaw, pitch)
        if self._rows:
            self._speed = pose.x - self._pose.x, pose.y - self._pose.y
        self._pose = pose
        self._rows.append(np.asarray(row, np.float32))

    def copy(self) -> "Reckoning":
        other = copy.copy(self)
        other._rows = list(self._rows)
        return other

    def saved(self) -> tuple[list[float], np.ndarray]:
        """What JSON can hold, and an array, for `restore`."""
        return [*self._pose, *self._speed], self.rows

    def restore(self, facts: list[float], rows: np.ndarray) -> None:
        self._pose, self._speed = Pose._make(facts[:5]), (facts[5], facts[6])
        self._rows = list(rows)


def costs(poses: np.ndarray, here: np.ndarray, memory: config_lib.Memory) -> np.ndarray:
    """How far poses [pose, 7] are from `here` [7]: infinite past a limit of the config.

    Else the distance over its limit, and the angle between the directions of view over its own:
    0 to 2, float64 [pose].
    """
    distance = np.hypot(*(np.asarray(poses, np.float64)[:, :2] - here[:2]).T) / memory.distance
    cosine = np.clip(_facing(poses) @ _facing(here[None])[0], -1, 1)
    angle = np.degrees(np.arccos(cosine)) / memory.angle
    return np.where((distance <= 1) & (angle <= 1), distance + angle, np.inf)


def _facing(rows):
    """Unit vectors [pose, 3] along which who is there looks."""
    yaw, pitch = (np.radians(x) for x in poses_lib.yaw_pitch(rows))
    level = np.cos(pitch)
    return np.stack([level * np.cos(yaw), level * np.sin(yaw), np.sin(pitch)], axis=1)
