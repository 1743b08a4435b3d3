"""GF-Minecraft of GameFactory: `metadata/NAME.json` beside `video/NAME.mp4`.

`actions` has an entry a picture, "0" being before the first and meaning nothing: `ws` (1 forward,
2 back), `ad` (1 left, 2 right), `scs` (1 jump, 2 sneak, 3 sprint), `pitch_delta` (down is positive)
and `yaw_delta` in units of 15 degrees, none of them in the part that has a keyboard alone. Where an
entry says that the player ran into something (`detection`), its keys moved nothing, and are not
held: what is learned is that a key moves.
"""

import pathlib

import numpy as np

from longlive_jax.data.sidecars.actions import Actions
from longlive_jax.data.sidecars.importers import recording
from longlive_jax.data.sidecars.importers.recording import Options, Recording
from longlive_jax.errors import InputError
from longlive_jax.files import versioned

_FPS = 16.0
_UNIT = 15.0  # degrees
_KEYS = {
    "ws": (None, "KeyW", "KeyS"),
    "ad": (None, "KeyA", "KeyD"),
    "scs": (None, "Space", "ShiftLeft", "ControlLeft"),
}
_MOVES = ("ws", "ad")
_ENTRY = {
    "ws?": float, "ad?": float, "scs?": float, "pitch_delta?": float, "yaw_delta?": float,
    "yaw?": float, "detection?": (bool, float),
}  # fmt: skip


def find(place: pathlib.Path) -> list[Recording]:
    """The .json files in folders "metadata", or in `place` itself."""
    found = recording.files(
        place, (".json",), lambda path: path.parent.name == "metadata" or path.parent == place
    )
    return [
        Recording(
            path,
            recording.video_of(
                path.parent.parent / "video" / f"{path.stem}.mp4", path.with_suffix(".mp4")
            ),
        )
        for path in found
    ]


def read(path: pathlib.Path, options: Options) -> Actions:
    """Raises InputError: entries that are missing, or of other values than above."""
    entries = versioned.read_json(path, {"actions": {str: _ENTRY}})["actions"]
    held, mouse, yaw = list[set[str]](), np.zeros((len(entries), 2)), list[float]()
    for i in range(len(entries)):
        entry = entries.get(str(i))
        if entry is None:
            raise InputError(f"{path}: {len(entries)} actions, and {str(i)!r} is not among them")
        names = {name: _key(path, i, name, entry.get(name, 0)) for name in _KEYS}
        if entry.get("detection"):
            names |= dict.fromkeys(_MOVES)
        held.append({key for key in names.values() if key} if i else set())
        if i:
            mouse[i] = -_UNIT * entry.get("pitch_delta", 0), _UNIT * entry.get("yaw_delta", 0)
        yaw.append(entry.get("yaw", np.nan))
    pad = 12 if np.isnan(yaw).any() else recording.alignment(np.asarray(yaw), mouse[:, 1])
    return recording.actions(
        path, held, mouse, options.fps or _FPS, view=options.view or "first", pad=pad,
        source="GF-Minecraft",
    )  # fmt: skip


def _key(path: pathlib.Path, i: int, name: str, value: float) -> str | None:
    choices = _KEYS[name]
    if value not in range(len(choices)):
        raise InputError(
            f"{path}: action {i} has {name}={value}; it must be 0 to {len(choices) - 1}"
        )
    return choices[int(value)]
