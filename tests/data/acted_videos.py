"""Videos whose pictures and rows of actions say the same number: which picture of which file it is."""

import json
import pathlib

import numpy as np

from longlive_jax.data import sidecars
from longlive_jax.data.video import VideoWriter

KEYS = ("KeyW", "KeyS", "KeyA", "KeyD")
GREY = 4  # levels from one picture to the next


def actions(count: int, first: int = 0, fps: float = 24, keys=KEYS, **given) -> sidecars.Actions:
    """Row f: the first key is held for f / 256, and the mouse turns right by f / 32 degrees."""
    number = first + np.arange(count)
    keyboard, mouse = np.zeros((count, len(keys))), np.zeros((count, 2))
    keyboard[:, 0], mouse[:, 1] = number / 256, number / 32
    return sidecars.Actions(keyboard=keyboard, mouse=mouse, fps=fps, keys=keys, **given)


def write(
    root: pathlib.Path, folders: dict[str, list[int]], fps: float = 24, sidecar: bool = True,
    keys=KEYS, **given,
) -> pathlib.Path:  # fmt: skip
    """A folder of training videos: `folders` has the pictures of each one's shots."""
    for name, counts in folders.items():
        (root / "caption" / name).mkdir(parents=True)
        first = 0
        for i, count in enumerate(counts):
            text = json.dumps({"caption": f"shot {i} of {name}"})
            (root / "caption" / name / f"{i:06d}.json").write_text(text)
            path = root / "video" / name / f"{i:06d}.mp4"
            grey = (GREY * (first + np.arange(count))).astype(np.uint8)
            with VideoWriter(path, 32, 64, fps=fps) as writer:
                writer.write(np.broadcast_to(grey[:, None, None, None], (count, 32, 64, 3)))
            if sidecar:
                made = actions(count, first, fps, keys, **given)
                sidecars.write(sidecars.path_for(path), made)
            first += count
    return root


def numbers(frames: np.ndarray) -> np.ndarray:
    """The number that each picture shows."""
    return np.round(frames.mean(axis=(1, 2, 3)) / GREY).astype(int)
