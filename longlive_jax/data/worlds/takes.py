"""Takes: shots of a world that somebody walks through, and the folders that training reads."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from longlive_jax.config import FRAMES_PER_SECOND
from longlive_jax.data import sidecars
from longlive_jax.data.video import VideoWriter
from longlive_jax.data.worlds import poses as poses_lib
from longlive_jax.data.worlds.poses import Pose
from longlive_jax.data.worlds.walkers import KEYS, STILL, Held


@dataclasses.dataclass(frozen=True)
class Take:
    """A shot: frames uint8 [frame, height, width, 3], what was held and where, and its caption."""

    frames: np.ndarray
    actions: sidecars.Actions
    caption: str


def actions_of(
    held: Sequence[Held], poses: Sequence[Pose], *, view: str, source: str
) -> sidecars.Actions:
    """What a sidecar keeps of a shot: entry f was held while frame f was shown, at pose f."""
    return sidecars.Actions(
        keyboard=np.asarray([one.keys for one in held], np.float32),
        mouse=np.asarray([(one.pitch, one.yaw) for one in held], np.float32),
        fps=FRAMES_PER_SECOND,
        keys=KEYS,
        view=view,
        pose=poses_lib.rows(poses),
        pad=12,
        source=source,
    )


def held_of(actions: sidecars.Actions) -> list[Held]:
    """What makes the next picture of each, as our worlds read it (`pad` 12), the last one nothing.

    A key counts from half way down; keys that are not in KEYS do nothing.

    Raises:
      InputError: they are of another rate than a world's pictures.
    """
    actions.check_video(fps=FRAMES_PER_SECOND)
    columns = [actions.keys.index(key) if key in actions.keys else None for key in KEYS]
    down = actions.keyboard >= 0.5
    held = [
        Held(tuple(i is not None and bool(keys[i]) for i in columns), float(pitch), float(yaw))
        for keys, (pitch, yaw) in zip(down, actions.mouse)
    ]
    return held if actions.pad == 12 else [*held[1:], STILL]  # otherwise row f makes picture f


def write(folder: pathlib.Path, name: str, takes: Sequence[Take]) -> int:
    """Writes a clip, a file a shot, and returns the number of its frames.

    folder/video/NAME/000000.mp4 with 000000.actions.npz, folder/caption/NAME/000000.json.
    """
    videos, captions = folder / "video" / name, folder / "caption" / name
    captions.mkdir(parents=True, exist_ok=True)
    for number, take in enumerate(takes):
        path, (count, height, width, _) = videos / f"{number:06d}.mp4", take.frames.shape
        with VideoWriter(path, height, width, FRAMES_PER_SECOND, frames=count) as writer:
            writer.write(take.frames)
        sidecars.write(sidecars.path_for(path), take.actions)
        caption = json.dumps({"caption": take.caption})
        (captions / f"{number:06d}.json").write_text(f"{caption}\n")
    return sum(len(take.frames) for take in takes)


def write_durations(folder: pathlib.Path, frames: Sequence[int], chunk: int) -> None:
    """Says in a folder of captions how many chunks of `chunk` frames each shot has."""
    durations = " ".join(str(max(1, count // chunk)) for count in frames)
    (folder / "shot_durations.txt").write_text(f"{durations}\n")
