"""ABot-World: `action.json` with `fps` and an object a frame, {"keys": {"W": true, ...}}.

I, J, K and L turn the view: they are keys here, too.
"""

import pathlib

import numpy as np

from longlive_jax.data.sidecars import keys as keys_lib
from longlive_jax.data.sidecars.actions import Actions
from longlive_jax.data.sidecars.importers import recording
from longlive_jax.data.sidecars.importers.recording import Options, Recording
from longlive_jax.errors import InputError
from longlive_jax.files import names, versioned

_FRAME = {"keys": {str: bool}, "frame_id?": int}


def find(place: pathlib.Path) -> list[Recording]:
    """The .json files that are called action.json, each with the one video beside it."""
    found = recording.files(place, (".json",), lambda path: path.name == "action.json")
    return [Recording(path, _only_video(path.parent)) for path in found]


def read(path: pathlib.Path, options: Options) -> Actions:
    """Raises InputError: other objects than above, frames that are missing, an unknown key."""
    content = versioned.read_json(path, {"frames": [_FRAME], "fps?": float, "total_frames?": int})
    frames = content["frames"]
    if (total := content.get("total_frames", len(frames))) != len(frames):
        raise InputError(f"{path}: {len(frames)} frames, total_frames is {total}")
    first = frames[0].get("frame_id", 0) if frames else 0
    held = list[set[str]]()
    for i, frame in enumerate(frames):
        if frame.get("frame_id", first + i) != first + i:
            raise InputError(
                f"{path}: frames[{i}] is frame {frame['frame_id']}, after {first + i - 1}; they "
                "must follow each other"
            )
        held.append({_key(path, i, name) for name, down in frame["keys"].items() if down})
    fps = content.get("fps", options.fps)
    if options.fps and abs(fps / options.fps - 1) > 1e-3:
        raise InputError(f"{path}: fps is {fps:g}, its video has {options.fps:g} a second")
    return recording.actions(
        path, held, np.zeros((len(frames), 2)), fps, view=options.view or "first",
        source="ABot-World",
    )  # fmt: skip


def _only_video(folder: pathlib.Path) -> pathlib.Path | None:
    videos = names.entries(folder, ".mp4")
    return videos[0] if len(videos) == 1 else None


def _key(path: pathlib.Path, i: int, name: str) -> str:
    code = keys_lib.named(name)
    if code is None:
        raise InputError(f"{path}: frames[{i}] has key {name!r:.60}, which has no W3C code here")
    return code
