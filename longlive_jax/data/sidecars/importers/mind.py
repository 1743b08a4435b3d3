"""MIND: `action.json` beside `video.mp4`, in folders `1st_data` and `3rd_data`; 24 a second.

`data` has an object a picture: `ws`, `ad` (keys), `ud`, `lr` (the view), and the angles of the
actor and, in third person, of the camera. There are two editions. In the first 0 is forward (left,
up), 1 back (right, down), and a field that is not there is none of both; in the second all fields
are there, 0 is none, 1 and 2 are these. How far the view turns is in the angles alone: pitch up and
yaw to the right are positive, and a row has the turn to the picture after it.
"""

import pathlib

import numpy as np

from longlive_jax.data.sidecars.actions import Actions
from longlive_jax.data.sidecars.importers import recording
from longlive_jax.data.sidecars.importers.recording import Options, Recording
from longlive_jax.errors import InputError
from longlive_jax.files import versioned

_FPS = 24.0
_KEYS = {"ws": ("KeyW", "KeyS"), "ad": ("KeyA", "KeyD")}
_FIELDS = ("ws", "ad", "ud", "lr")
_ANGLES = {"x": float, "y": float, "z": float}  # roll, pitch, yaw
_ROW = {
    **{f"{name}?": int for name in _FIELDS},
    "actor_rpy?": _ANGLES,
    "camera_rpy?": _ANGLES,
}
_FOLDERS = {"1st_data": "first", "3rd_data": "third"}


def find(place: pathlib.Path) -> list[Recording]:
    """The files action.json."""
    found = recording.files(place, (".json",), lambda path: path.name == "action.json")
    return [Recording(path, recording.video_of(path.with_name("video.mp4"))) for path in found]


def read(path: pathlib.Path, options: Options) -> Actions:
    """Raises InputError: other objects than above, or angles in some pictures alone."""
    content = versioned.read_json(path, {"data": [_ROW], "total_time?": int})
    rows = content["data"]
    if (total := content.get("total_time", len(rows))) != len(rows):
        raise InputError(f"{path}: {len(rows)} rows of data, total_time is {total}")
    second = all(name in row for row in rows for name in _FIELDS)
    held = [_held(path, i, row, int(second)) for i, row in enumerate(rows)]
    above = {_FOLDERS[part] for part in path.parts if part in _FOLDERS}
    view = options.view or (above.pop() if len(above) == 1 else "first")
    return recording.actions(
        path, held, _moves(path, rows), options.fps or _FPS, view=view, source="MIND"
    )


def _held(path, i, row, none: int) -> set[str]:
    """The keys of a row; `none`: how many values, from 0 on, mean that none is held."""
    held = set()
    for name in _FIELDS:
        value = row.get(name, -1)
        if name in row and not 0 <= value < none + 2:
            raise InputError(f"{path}: data[{i}].{name} is {value}; it must be 0 to {none + 1}")
        if name in _KEYS and value >= none:
            held.add(_KEYS[name][value - none])
    return held


def _moves(path, rows) -> np.ndarray:
    """Degrees of (pitch, yaw) from each picture to the next; none after the last."""
    which = "camera_rpy" if rows and "camera_rpy" in rows[0] else "actor_rpy"
    having = [i for i, row in enumerate(rows) if which in row]
    if having and len(having) != len(rows):
        missing = next(i for i, row in enumerate(rows) if which not in row)
        raise InputError(f"{path}: data[{missing}] has no {which}, as others have")
    mouse = np.zeros((len(rows), 2))
    if having:
        angles = np.asarray([[row[which]["y"], row[which]["z"]] for row in rows], np.float64)
        mouse[:-1] = (np.diff(angles, axis=0) + 180) % 360 - 180
    return mouse
