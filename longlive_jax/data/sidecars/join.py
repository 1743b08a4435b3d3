"""The actions of videos that follow each other."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from longlive_jax.data.sidecars.actions import Actions
from longlive_jax.errors import InputError


def join(parts: Sequence[Actions]) -> Actions:
    """Those of one video of all their pictures, with the keys of all.

    View, alignment and source are the last one's; poses stay if all have some.

    Raises:
      InputError: other rates or alignments than the last one's.
    """
    last = parts[-1]
    keys = tuple(dict.fromkeys(key for part in parts for key in part.keys))
    for part in parts:
        if (part.fps, part.pad) != (last.fps, last.pad):
            raise InputError(
                f"{part.where}: fps={part.fps:g}, pad={part.pad}, and {last.where} has "
                f"fps={last.fps:g}, pad={last.pad}; they must be equal to be joined"
            )
    keyboard = np.zeros((sum(map(len, parts)), len(keys)), np.float32)
    start, poses = 0, []
    for part in parts:
        columns = [keys.index(key) for key in part.keys]
        keyboard[start : start + len(part), columns] = part.keyboard
        start += len(part)
        poses += [] if part.pose is None else [part.pose]
    return dataclasses.replace(
        last, keyboard=keyboard, mouse=np.concatenate([part.mouse for part in parts]), keys=keys,
        pose=np.concatenate(poses) if len(poses) == len(parts) else None,
    )  # fmt: skip
