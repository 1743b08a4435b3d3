"""Grades a video of a walk, second by second, against what was held while it was made."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from longlive_jax.data import sidecars
from longlive_jax.data.worlds import poses as poses_lib
from longlive_jax.grading.walk import asked as asked_lib
from longlive_jax.grading.walk import motion, pictures, truth
from longlive_jax.grading.walk.asked import SECOND, Asked
from longlive_jax.grading.walk.flow import FOCAL, Lens

Read = Callable[[int, int], np.ndarray]  # (start, stop) -> uint8 [frame, height, width, 3]
LEAST = 13  # pairs of pictures of a second that is judged; a shorter rest is left out
_PITCH = 40.0  # degrees that the horizon is looked for, at most


def grade(
    name: str,
    read: Read,
    actions: sidecars.Actions,
    *,
    simulator: truth.Simulator | None = None,
    focal: float = FOCAL,
) -> dict[str, Any]:
    """The record of a video, of numbers, texts and lists alone; see docs/grading.md.

    Args:
      read: its frames, asked for once and in order, as many as the actions have rows.
      simulator: the game at the video's size; None: pixels alone. Where the sidecar has poses
        these are then the truth about walls.
      focal: focal length, in heights.

    Raises:
      InputError: as `asked.of_actions`, `truth.start_of` and `Simulator.frames`.
    """
    asked = asked_lib.of_actions(actions)
    start = truth.start_of(actions) if simulator else None
    real = simulator.frames(start, actions) if simulator and start else None
    rows = actions.pose
    returns = truth.Returns(actions.view)
    level = np.clip(np.r_[0, np.cumsum(asked.pitch)], -_PITCH, _PITCH)
    lens: Lens | None = None
    seconds: list[dict[str, Any]] = []
    last: list[np.ndarray] = []  # the picture before, of the video
    poses = []  # of the truth, with the one before
    for begin, stop in _seconds(len(actions)):
        frames = read(begin, stop)
        lens = lens or Lens(frames.shape[1], frames.shape[2], focal)
        shown = np.concatenate([*last, frames])
        first = stop - len(shown)
        luma = pictures.luma(shown)
        seen = motion.measure(lens, lens.unroll(luma), level[first:stop], actions.view)
        pairs = slice(first, stop - 1)
        record: dict[str, Any] = {"second": len(seconds)}
        true = None
        if simulator and real and start:
            pairs_of = [next(real) for _ in range(stop - begin)]
            true_frames = np.stack([frame for frame, _ in pairs_of])
            poses = [*poses[-1:], *(pose for _, pose in pairs_of)]
            true = asked_lib.of_poses(poses_lib.rows(poses))
            for number, (frame, pose) in enumerate(zip(frames, poses[-len(frames) :])):
                returns.see(begin + number, frame, pose)
            record |= simulator.compare(frames, true_frames, start)
        elif rows is not None:
            true = asked_lib.of_poses(rows[first:stop])
        here = Asked(asked.yaw[pairs], asked.pitch[pairs], asked.velocity[pairs])
        record |= asked_lib.judge(here, true, seen, actions.view)
        limit = asked_lib.LIMITS[actions.view].sharpness
        sharp = float(pictures.sharpness(luma[-len(frames) :]).mean())
        record["sharpness"] = round(sharp / limit, 4)
        record["contrast"] = round(float(pictures.contrast(luma[-len(frames) :]).mean()), 2)
        seconds.append(record)
        last = [frames[-1:]]
    return {
        "name": name,
        "frames": len(actions),
        "view": actions.view,
        "place": start.place if start else None,
        "seconds": seconds,
        "returns": returns.records() if simulator else [],
    }


def _seconds(frames: int) -> Iterator[tuple[int, int]]:
    """(first, stop) of the pictures of each second: the first one has a picture more."""
    begin = 0
    while frames - begin > LEAST:
        stop = min(begin + SECOND + (begin == 0), frames)
        yield begin, stop
        begin = stop
