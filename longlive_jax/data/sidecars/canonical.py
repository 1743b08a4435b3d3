"""Our own sidecars: NAME.actions.npz, or NAME.actions.jsonl, beside NAME.mp4.

An .npz has the fields of `Actions` as arrays. A .jsonl has an object a picture with `keyboard`,
`mouse` and perhaps `pose`; the first one has the other fields too. Both keep every bit.
"""

import json
import os
import pathlib
from typing import Any

import numpy as np

from longlive_jax.data.sidecars.actions import Actions
from longlive_jax.errors import InputError
from longlive_jax.files import regular, remote, versioned
from longlive_jax.files import schema as schema_lib
from longlive_jax.files.arrays import load_npz, save_npz
from longlive_jax.files.atomic import atomic_path
from longlive_jax.files.remote import AnyPath

_SUFFIXES = (".npz", ".jsonl")
ENDS = (".actions.npz", ".actions.jsonl")
_ROWS = {"keyboard": [float], "mouse": [float], "pose?": [float]}
_FACTS = {"fps": float, "keys": [str], "view?": str, "pad?": int, "source?": str}


def path_for(video: str | os.PathLike, end: str = ENDS[0]) -> AnyPath:
    """The sidecar of a video: its name, with ".actions.npz" for its suffix."""
    video = remote.path(video)
    return video.with_name(video.stem + end)


def beside(video: str | os.PathLike) -> pathlib.Path | None:
    """The sidecar that a video on a local disk has, or None.

    Raises:
      InputError: there are two.
    """
    paths = [path_for(video, end) for end in ENDS]
    found = [path for path in paths if isinstance(path, pathlib.Path) and path.is_file()]
    if len(found) > 1:
        raise InputError(f"{found[0]}: and {found[1].name} beside it; remove one")
    return found[0] if found else None


def is_file(text: str) -> bool:
    """Whether a text is the name of a sidecar, and not actions in words."""
    return text.lower().endswith(_SUFFIXES)


def write(path: str | os.PathLike, actions: Actions) -> None:
    """Writes a sidecar, in one step, that `read` reads back to the bit.

    Raises:
      InputError: the name ends otherwise than in .npz or .jsonl, or nothing can be written there.
      OSError: ENOSPC, naming `path`.
    """
    if _end(path) == ".npz":
        arrays = {name: value for name, value in _fields(actions).items() if value is not None}
        save_npz(path, **arrays)
        return
    with atomic_path(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row in rows(actions):
            file.write(json.dumps(row) + "\n")


def read(path: str | os.PathLike, frames: int | None = None, fps: float | None = None) -> Actions:
    """The actions of a sidecar.

    Args:
      frames: pictures of its video; None: any number. fps: the video's rate; None: any.

    Raises:
      InputError: no such file, a damaged one, wrong numbers, another number of pictures or rate.
    """
    if _end(path) == ".npz":
        actions = _of_arrays(path)
    else:
        try:
            lines = regular.read(path).decode("utf-8-sig").split("\n")
            objects = [versioned.parse(line) for line in lines if line.strip()]
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(f"{path}: cannot be read: {reason}; one object a line") from error
        actions = of_rows(objects, str(path))
    actions.check_video(frames, fps)
    return actions


def rows(actions: Actions) -> list[dict[str, Any]]:
    """An object a picture, which JSON can hold; the first one with all that holds for all."""
    fields = _fields(actions)
    names = [name for name in ("keyboard", "mouse", "pose") if fields[name] is not None]
    columns = [fields[name].tolist() for name in names]
    out: list[dict[str, Any]] = [dict(zip(names, row)) for row in zip(*columns)]
    facts = {name.rstrip("?"): fields[name.rstrip("?")] for name in _FACTS}
    out[0] = facts | {"keys": list(actions.keys)} | out[0]
    return out


def of_rows(objects: Any, where: str) -> Actions:
    """The actions of such objects.

    Raises:
      InputError: they are not. `where` is for the message.
    """
    wrong = schema_lib.mismatch(objects, [_ROWS])
    if not wrong and not objects:
        wrong = "there is no object in it"
    if wrong := wrong or schema_lib.mismatch(objects[0], _FACTS, "[0]"):
        raise InputError(f"{where}: {wrong}; one object a picture, see docs/actions.md")
    known = {name.rstrip("?") for name in (*_ROWS, *_FACTS)}
    for i, row in enumerate(objects):
        if unknown := sorted(set(row) - (known if i == 0 else {"keyboard", "mouse", "pose"})):
            raise InputError(f"{where}: [{i}] has {unknown[0]!r:.60}, which no sidecar has")
    names = ("keyboard", "mouse", *(("pose",) if "pose" in objects[0] else ()))
    fields = {name: _column(objects, name, where) for name in names}
    facts = {name.rstrip("?"): objects[0].get(name.rstrip("?")) for name in _FACTS}
    given = {name: value for name, value in facts.items() if value is not None}
    return Actions(**fields, **given, where=where)


def _column(objects, name: str, where: str) -> np.ndarray:
    """[picture, dim] of one field of all objects."""
    dim = len(objects[0][name])
    for i, row in enumerate(objects):
        if len(row.get(name, ())) != dim:
            raise InputError(
                f"{where}: [{i}] has {len(row.get(name, ()))} numbers of {name}, the first "
                f"picture has {dim}"
            )
    return np.asarray([row[name] for row in objects], np.float64).reshape(len(objects), dim)


def _of_arrays(path) -> Actions:
    arrays: dict[str, Any] = load_npz(
        path, ("keyboard", "mouse", "fps", "keys"), ("view", "pose", "pad", "source")
    )
    for name, kinds, ndim in (
        ("fps", "fiu", 0), ("pad", "iu", 0), ("view", "U", 0), ("source", "U", 0), ("keys", "U", 1),
    ):  # fmt: skip
        array = arrays.get(name)
        if array is None:
            continue
        # Without keys there is nothing that says what an empty array is of.
        if array.ndim != ndim or (array.size and array.dtype.kind not in kinds):
            what = "a text" if "U" in kinds else "a number"
            raise InputError(
                f"{path}: {name!r} is {array.dtype}{list(array.shape)}; it must be "
                f"{'texts' if ndim else what}"
            )
        arrays[name] = tuple(map(str, array)) if ndim else array.item()
    return Actions(**arrays, where=str(path))


def _fields(actions: Actions) -> dict[str, Any]:
    fields: dict[str, Any] = {name: getattr(actions, name) for name in (
        "keyboard", "mouse", "pose", "fps", "view", "pad", "source")}  # fmt: skip
    return fields | {"keys": np.asarray(actions.keys, np.str_)}


def _end(path: str | os.PathLike) -> str:
    end = pathlib.Path(path).suffix.lower()
    if end not in _SUFFIXES:
        raise InputError(f"{path}: a sidecar's name must end in .actions.npz or .actions.jsonl")
    return end
