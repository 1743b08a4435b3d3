"""What actions ask for, and whether a second of video does it."""

import dataclasses

import numpy as np

from longlive_jax.config import FRAMES_PER_SECOND
from longlive_jax.data import sidecars
from longlive_jax.data.worlds import poses as poses_lib
from longlive_jax.data.worlds.takes import held_of
from longlive_jax.grading.walk.motion import Motion

SECOND = FRAMES_PER_SECOND  # pictures
_KEPT = 0.90625  # of the speed, from a picture to the next: the game's friction
_AHEAD, _SIDE = 0.78125, 0.75  # units a picture that a key adds
_TURN, _STRAIGHT = 10.0, 2.0  # degrees a second: least of a turn, most of none
_YAW_ERROR, _YAW_DRIFT = 0.2, 5.0  # of what is asked; degrees a second that are none yet
_MOVING, _STANDING = 4.0, 0.5  # units a picture, the mean of a second: least, most
_ANGLE = 45.0  # degrees between the asked and the measured direction


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of a view, calibrated on the game's pictures (docs/grading.md).

    clear, turn: least `Motion.clear`, the mean of a second, that is judged, and of a turn.
    moves: least measured speed of who moves; stands: most of who stands. Units a picture.
    sharpness: `pictures.sharpness` of the game's pictures, in the mean.
    """

    clear: float
    turn: float
    moves: float
    stands: float
    sharpness: float


LIMITS = {
    "first": Limits(clear=0.5, turn=0.6, moves=1.0, stands=1.5, sharpness=0.63),
    "third": Limits(clear=0.45, turn=0.55, moves=0.3, stands=2.0, sharpness=0.68),
}


@dataclasses.dataclass(frozen=True)
class Asked:
    """From each picture to the next: yaw, pitch [pair], degrees; velocity [pair, 2], units."""

    yaw: np.ndarray
    pitch: np.ndarray
    velocity: np.ndarray


def of_actions(actions: sidecars.Actions) -> Asked:
    """What the game would make of the actions where nothing is in the way.

    Raises:
      InputError: they are of another rate than 24.
    """
    held = held_of(actions)[:-1]
    yaw = np.asarray([one.yaw for one in held])
    facing = np.radians(np.cumsum(yaw))
    speed, velocity = np.zeros(2), np.zeros((len(held), 2))
    for i, one in enumerate(held):
        w, s, a, d = one.keys
        push = np.asarray([_AHEAD * (w - s), _SIDE * (d - a)])
        turn = np.asarray(
            [[np.cos(facing[i]), -np.sin(facing[i])], [np.sin(facing[i]), np.cos(facing[i])]]
        )
        speed = _KEPT * speed + turn @ push
        velocity[i] = turn.T @ speed
    return Asked(yaw, np.asarray([one.pitch for one in held]), velocity)


def of_poses(rows: np.ndarray) -> Asked:
    """What happened, of poses [picture, 7]."""
    return Asked(
        poses_lib.turned(rows), np.diff(poses_lib.yaw_pitch(rows)[1]), poses_lib.moved(rows)
    )


def judge(asked: Asked, true: Asked | None, seen: Motion, view: str) -> dict:
    """The record of a second, of the pairs of pictures in it.

    turn, straight, move, wall: whether it is right; None where it is not asked, or not clear.
      Where who walks is stopped by a wall in truth, `wall` says whether they are here; `true` says
      the direction of a move, where it is known.
    """
    limits, clear = LIMITS[view], float(seen.clear.mean())
    wanted, yaw = float(asked.yaw.sum()), float(seen.yaw.sum())
    goal = asked.velocity.mean(axis=0)
    went = np.asarray([seen.ahead.mean(), seen.right.mean()], float)
    speed = float(np.hypot(*went))
    right: dict[str, bool | None] = dict.fromkeys(("turn", "straight", "move", "wall"))
    if clear >= limits.clear:
        if abs(wanted) >= _TURN:
            if clear >= limits.turn:
                right["turn"] = abs(yaw - wanted) <= _YAW_ERROR * abs(wanted)
        elif np.abs(asked.yaw).sum() <= _STRAIGHT:
            right["straight"] = abs(yaw) <= _YAW_DRIFT
        blocked = False
        if true is not None:
            truth = true.velocity.mean(axis=0)
            blocked = np.hypot(*goal) >= _MOVING and np.hypot(*truth) <= _STANDING
            goal = truth
        if blocked:
            right["wall"] = speed <= limits.stands
        elif np.hypot(*goal) >= _MOVING:
            right["move"] = speed >= limits.moves and _between(goal, went) <= _ANGLE
        elif np.hypot(*asked.velocity.T).max() <= _STANDING and np.hypot(*goal) <= _STANDING:
            right["move"] = speed <= limits.stands
    return {
        "right": {name: None if x is None else bool(x) for name, x in right.items()},
        "clear": round(clear, 4),
        "asked_yaw": round(wanted, 2),
        "yaw": round(yaw, 2),
        "pitch": round(float(seen.pitch.sum()), 2),
        "asked_velocity": [round(float(x), 2) for x in goal],
        "velocity": [round(float(x), 2) for x in went],
    }


def _between(one: np.ndarray, other: np.ndarray) -> float:
    """Degrees between two directions."""
    cosine = one @ other / max(float(np.hypot(*one) * np.hypot(*other)), 1e-9)
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
