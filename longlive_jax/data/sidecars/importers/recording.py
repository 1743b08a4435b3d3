"""What the importers share: where recordings are, and columns of keys and moves."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from longlive_jax.data.sidecars.actions import Actions
from longlive_jax.errors import InputError
from longlive_jax.files import names


@dataclasses.dataclass(frozen=True)
class Recording:
    """actions: the file of a recording. video: its video, or None: there is none."""

    actions: pathlib.Path
    video: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """What a recording does not say.

    fps: pictures a second, those of its video if it has one; None: unknown.
    keys: of arrays, the name of each column; None: those of Matrix-Game 2.
    view: "first" or "third"; None: as the format has it.
    """

    fps: float | None = None
    keys: tuple[str, ...] | None = None
    view: str | None = None


def files(place: pathlib.Path, suffixes: Sequence[str], own: Callable[[pathlib.Path], bool]):
    """The files of a recording at `place`: itself, or those below a folder, without strays.

    Raises:
      InputError: there is nothing at `place`, or nothing of the kind below it.
    """
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise InputError(f"{place}: no such file or folder")
    found = [path for path in _below(place) if path.suffix.lower() in suffixes and own(path)]
    if not found:
        raise InputError(
            f"{place}: no recording of this format in it; give a folder of "
            f"{' or '.join(suffixes)} files, or another --format"
        )
    return found


def _below(folder: pathlib.Path) -> Iterable[pathlib.Path]:
    for path in names.entries(folder):
        if path.is_dir():
            yield from _below(path)
        else:
            yield path


def video_of(*candidates: pathlib.Path) -> pathlib.Path | None:
    """The first of these that is there."""
    return next((path for path in candidates if path.is_file()), None)


def actions(
    path: pathlib.Path,
    held: Sequence[set[str]],
    mouse: np.ndarray,
    fps: float | None,
    **fields: Any,
) -> Actions:
    """Actions of the keys that are held in each picture; columns in the order of their names."""
    if not held:
        raise InputError(f"{path}: there is no picture in it")
    keys = tuple(sorted(set().union(*held)))
    column = {key: i for i, key in enumerate(keys)}
    keyboard = np.zeros((len(held), len(keys)), np.float32)
    for row, names_ in enumerate(held):
        keyboard[row, [column[name] for name in names_]] = 1
    if fps is None:
        raise InputError(
            f"{path}: nothing says how many pictures a second it has; give its video, or "
            "--source_fps"
        )
    return Actions(keyboard=keyboard, mouse=mouse, fps=fps, keys=keys, where=str(path), **fields)


def alignment(yaw: np.ndarray, moves: np.ndarray) -> int:
    """`pad` of rows whose moves turn these angles, both float64 [picture], in degrees.

    By the data: the turn from picture f - 1 to f is either row f's (11) or row f - 1's (12).
    """
    turned = (np.diff(yaw) + 180) % 360 - 180
    same, before = float(turned @ moves[1:]), float(turned @ moves[:-1])
    return 11 if same > before else 12
