"""FastVideo's arrays for Matrix-Game 2: `keyboard` [N, K] and perhaps `mouse` [N, 2].

They are an .npz, or one .npy of the keyboard alone. FastVideo's own .npy files are mostly pickles
of a dict, which could run code: these are refused, with the line that makes an .npz of them. Its
parquet files are not read. The mouse is pitch (up) and yaw (right), 1.0 being 15 degrees.
"""

import pathlib

import numpy as np

from longlive_jax import config as config_lib
from longlive_jax.data.sidecars.actions import Actions
from longlive_jax.data.sidecars.importers import recording
from longlive_jax.data.sidecars.importers.recording import Options, Recording
from longlive_jax.errors import InputError
from longlive_jax.files.arrays import load_npy, load_npz

_UNIT = 15.0  # degrees


def find(place: pathlib.Path) -> list[Recording]:
    """The .npz and .npy files that are no sidecars of our own."""
    found = recording.files(
        place, (".npz", ".npy"), lambda path: not path.name.endswith(".actions.npz")
    )
    return [Recording(path, recording.video_of(path.with_suffix(".mp4"))) for path in found]


def read(path: pathlib.Path, options: Options) -> Actions:
    """Raises InputError: pickles and other files; more columns than keys."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        arrays = {"keyboard": load_npy(path)}
    elif suffix == ".npz":
        arrays = load_npz(path, ("keyboard",), ("mouse",))
    else:
        raise InputError(f"{path}: only .npz and .npy are read; save keyboard and mouse as an .npz")
    keyboard = arrays["keyboard"]
    if keyboard.ndim != 2 or keyboard.dtype.kind not in "fiub":
        raise InputError(
            f"{path}: keyboard is {keyboard.dtype}{list(keyboard.shape)}; it must be numbers "
            "[picture, key]"
        )
    count = keyboard.shape[1]
    keys = options.keys or config_lib.Actions(keyboard_dim=max(count, 1)).key_names
    if len(keys) != count:
        raise InputError(
            f"{path}: keyboard has {count} columns, and {len(keys)} keys are known for them; give "
            "--keys, such as KeyW,KeyS,KeyA,KeyD, one a column"
        )
    if options.fps is None:
        raise InputError(
            f"{path}: nothing says how many pictures a second it has; give its video, or "
            "--source_fps"
        )
    mouse = arrays.get("mouse", np.zeros((len(keyboard), 2)))
    if mouse.dtype.kind in "fiub":
        mouse = _UNIT * mouse.astype(np.float64)
    return Actions(
        keyboard=keyboard, mouse=mouse, fps=options.fps, keys=keys, view=options.view or "first",
        source="FastVideo", where=str(path),
    )  # fmt: skip
