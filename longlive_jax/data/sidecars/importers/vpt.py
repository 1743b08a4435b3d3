"""Minecraft of VPT's contractors: `NAME.jsonl` beside `NAME.mp4`, an object a picture, 20 a second.

The mouse is in counts, 2,400 a turn, down being positive. Keys are named as the game's library
does, "key.keyboard.left.shift", buttons by its numbers: 0 left, 1 right, 2 middle. While a menu is
open (`isGuiOpen`) they move no player: nothing is held then. In some recordings the left button
seems held from the first picture on, until it is pressed anew: until then it is not held.
"""

import pathlib

import numpy as np

from longlive_jax.data.sidecars import keys as keys_lib
from longlive_jax.data.sidecars.actions import Actions
from longlive_jax.data.sidecars.importers import recording
from longlive_jax.data.sidecars.importers.recording import Options, Recording
from longlive_jax.errors import InputError
from longlive_jax.files import regular, schema, versioned

_FPS = 20.0
_DEGREES = 360 / 2400  # a count
_BUTTONS = {0: "Mouse0", 1: "Mouse2", 2: "Mouse1", 3: "Mouse3", 4: "Mouse4"}
_PREFIX = "key.keyboard."
_ROW = {
    "mouse": {"dx": float, "dy": float, "buttons": [int], "newButtons?": [int]},
    "keyboard": {"keys": [str]},
    "isGuiOpen?": bool,
    "yaw?": float,
}


def find(place: pathlib.Path) -> list[Recording]:
    """The .jsonl files that are no sidecars of our own."""
    found = recording.files(
        place, (".jsonl",), lambda path: not path.name.endswith(".actions.jsonl")
    )
    return [Recording(path, recording.video_of(path.with_suffix(".mp4"))) for path in found]


def read(path: pathlib.Path, options: Options) -> Actions:
    """Raises InputError: other objects than above, or a key that has no code."""
    rows = _rows(path)
    held, mouse, stuck = list[set[str]](), np.zeros((len(rows), 2)), False
    for i, row in enumerate(rows):
        new = row["mouse"].get("newButtons", [])
        stuck = new == [0] if i == 0 else stuck and 0 not in new
        if row.get("isGuiOpen"):
            held.append(set())
            continue
        buttons = [n for n in row["mouse"]["buttons"] if n or not stuck]
        held.append({_button(path, i, n) for n in buttons} | _keys(path, i, row))
        mouse[i] = -_DEGREES * row["mouse"]["dy"], _DEGREES * row["mouse"]["dx"]
    yaw = np.asarray([row.get("yaw", np.nan) for row in rows])
    return recording.actions(
        path, held, mouse, options.fps or _FPS, view=options.view or "first", source="VPT",
        pad=12 if np.isnan(yaw).any() else recording.alignment(yaw, mouse[:, 1]),
    )  # fmt: skip


def _rows(path: pathlib.Path) -> list[dict]:
    try:
        lines = regular.read(path).decode("utf-8-sig").split("\n")
        rows = [versioned.parse(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path}: cannot be read: {reason}; one object a line") from error
    if wrong := schema.mismatch(rows, [_ROW]):
        raise InputError(f"{path}: {wrong}; it is no recording of VPT")
    return rows


def _button(path: pathlib.Path, i: int, number: int) -> str:
    if number not in _BUTTONS:
        raise InputError(f"{path}: picture {i} has button {number}; known are 0 to 4")
    return _BUTTONS[number]


def _keys(path: pathlib.Path, i: int, row: dict) -> set[str]:
    return {_key(path, i, name) for name in row["keyboard"]["keys"]}


def _key(path: pathlib.Path, i: int, name: str) -> str:
    """The code of "key.keyboard.left.shift": the side is behind, and words have no points."""
    words = name.removeprefix(_PREFIX).split(".")
    if words[0] in ("left", "right") and len(words) > 1:
        words = [*words[1:], words[0]]
    word = "".join(words)
    code = keys_lib.named(_OTHER.get(word, word.replace("keypad", "numpad")))
    if code is None or not name.startswith(_PREFIX):
        raise InputError(f"{path}: picture {i} has key {name!r:.60}, which has no W3C code here")
    return code


# Where the game's library has another word than the W3C.
_OTHER = {
    "graveaccent": "Backquote", "apostrophe": "Quote", "bracketleft": "BracketLeft",
    "bracketright": "BracketRight", "winleft": "MetaLeft", "winright": "MetaRight",
    "menu": "ContextMenu", "world1": "IntlBackslash",
}  # fmt: skip
