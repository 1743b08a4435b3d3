"""The directory of a checkpoint: its lock, its metadata.json, and replacing things in one step."""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

from longlive_jax.data import versioned
from longlive_jax.errors import InputError
from longlive_jax.models import tokenizer as tokenizer_lib

_FORMAT, _VERSION = "longlive_jax weights", 1
_AGAIN = "convert again to a new directory"


@contextlib.contextmanager
def writing(root: pathlib.Path) -> Iterator[None]:
    """Makes a checkpoint's directory if it is not there, and holds its lock.

    Raises:
      InputError: it is a file, or a directory of something else, or another process holds the lock.
    """
    if root.exists() and not root.is_dir():
        raise InputError(f"--output={root}: is a file; give a directory")
    try:
        root.mkdir(parents=True, exist_ok=True)
        known = (root / "metadata.json").exists()
        strangers = [] if known else [p.name for p in root.iterdir() if not p.name.startswith(".")]
        if strangers and not all(_orphan(root / n) for n in strangers):
            raise InputError(
                f"--output={root}: holds {strangers[0]!r} and no checkpoint; give a new directory"
            )
        (root / ".lock").touch()
    except (PermissionError, NotADirectoryError) as error:
        raise InputError(f"--output={root}: {error.strerror}") from error
    with locked(root, f"--output={root}: another process is writing to it"):
        yield


@contextlib.contextmanager
def locked(root: pathlib.Path, taken: str) -> Iterator[None]:
    """Holds the lock of a folder, for as long as this process lives at most.

    Raises:
      InputError: `taken`, and what to do: another process holds it.
    """
    with open(root / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{taken}; wait for it, or give another") from error
        yield


def _orphan(path: pathlib.Path) -> bool:
    """Whether this is a part that was written, or its tokenizer, but never entered in metadata."""
    return (path / "index.json").is_file() or path.name == tokenizer_lib.FILE


def remove_others(root: pathlib.Path, part: str, keep: str | None) -> None:
    """Removes the directories of a part but the one named `keep`."""
    for path in root.iterdir():
        if re.fullmatch(rf"{part}(_\d+)?", path.name) and path.name != keep and _orphan(path):
            shutil.rmtree(path, ignore_errors=True)


def read_metadata(root: pathlib.Path, new: bool = False) -> dict:
    """The content of metadata.json; of a checkpoint without parts if there is none and it is `new`.

    Raises:
      InputError: there is none, or a damaged one, or one of another format.
    """
    file = root / "metadata.json"
    if new and not file.exists():
        return {"format": _FORMAT, "version": _VERSION, "parts": {}}
    if not file.is_file():
        raise InputError(
            f"{root}: is no checkpoint (it has no metadata.json); make one with "
            "`python -m launch.convert --dit=FILE --vae=FILE --umt5=FILE --tokenizer=FILE "
            f"--output={root}`"
        )
    metadata = versioned.read(file, _FORMAT, _VERSION, _AGAIN)
    if not isinstance(metadata.get("parts"), dict):
        raise InputError(f"{file}: is damaged (no parts in it); {_AGAIN}")
    return metadata


def write_json(file: pathlib.Path, value: Any) -> None:
    """Writes a JSON file in one step: it has its old content or the new, whatever happens."""
    partial = file.with_name(f".{file.name}.partial")
    with open(partial, "w") as f:
        json.dump(value, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, file)
