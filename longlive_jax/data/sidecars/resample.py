"""Actions at another rate: every degree of the mouse is kept, and every key that was touched."""

import dataclasses

import numpy as np

from longlive_jax.data.sidecars.actions import Actions

_SLACK = 1e-6  # of a picture: edges that are equal but for rounding


def to_rate(actions: Actions, fps: float, frames: int | None = None) -> Actions:
    """The actions of the same video at `fps` pictures a second.

    A picture's mouse is what was moved while it was shown; a key has the largest value of that
    time. Poses are those of the nearest picture before.

    Args:
      frames: how many pictures; None: as many as the rows last, and a rest belongs to the last.
    """
    ratio = actions.fps / fps  # rows a new picture
    count = len(actions)
    whole = max(1, round(count / ratio))
    edges = np.arange((whole if frames is None else frames) + 1) * ratio
    if frames is None:
        edges[-1] = max(edges[-1], count)
    moved = np.concatenate([np.zeros((1, 2)), np.cumsum(actions.mouse, axis=0, dtype=np.float64)])
    at = np.arange(count + 1)
    mouse = np.stack([np.diff(np.interp(edges, at, moved[:, i])) for i in range(2)], axis=1)
    first = np.minimum(np.floor(edges[:-1] + _SLACK).astype(int), count - 1)
    stop = np.clip(np.ceil(edges[1:] - _SLACK).astype(int), first + 1, count)
    keyboard = actions.keyboard[first]
    for more in range(1, int((stop - first).max())):
        later = np.minimum(first + more, stop - 1)
        keyboard = np.maximum(keyboard, actions.keyboard[later])
    pose = None if actions.pose is None else actions.pose[first]
    return dataclasses.replace(actions, keyboard=keyboard, mouse=mouse, pose=pose, fps=fps)
