"""Folders that a command fills: made if missing, refused if of another kind, locked."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

from longlive_jax.errors import InputError
from longlive_jax.files import lease, remote
from longlive_jax.files.atomic import no_space
from longlive_jax.files.names import is_stray
from longlive_jax.files.remote import AnyPath, RemotePath


def make(
    folder: str | os.PathLike,
    flag: str,
    what: str = "",
    is_ours: Callable[[list[Any]], bool] = lambda files: True,
) -> None:
    """Makes a folder, if it is missing. On object storage there is nothing to make.

    Args:
      flag: the flag that names the folder, such as "--output", for messages.
      what: the folder's kind, such as "checkpoint".
      is_ours: whether files that are already in it belong to this kind.

    Raises:
      InputError: the folder cannot be made, or it holds other files.
      OSError: ENOSPC, naming `folder`.
    """
    folder = remote.path(folder, flag)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = [path for path in _entries(folder) if not is_stray(path.name)]
    except FileExistsError as error:
        raise InputError(f"{flag}={folder}: is a file; give a folder") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise no_space(folder) from error
        raise InputError(f"{flag}={folder}: {error.strerror}; give a folder to write") from error
    if files and not is_ours(files):
        raise InputError(
            f"{flag}={folder}: holds {files[0].name!r} and no {what}; give a new folder"
        )


def _entries(folder: AnyPath) -> list[Any]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        if isinstance(folder, RemotePath):
            return []
        raise


@contextlib.contextmanager
def locked(folder: str | os.PathLike, taken: str) -> Iterator[None]:
    """Locks an existing folder, until the block or this process ends.

    Raises:
      InputError: as `open_locked`.
      StorageError: object storage refuses, or does not answer.
    """
    if remote.is_remote(folder):
        with lease.held(RemotePath(folder), taken):
            yield
        return
    with open_locked(pathlib.Path(folder) / ".lock", taken):
        yield


def open_locked(file: pathlib.Path, taken: str, mode: str = "w") -> IO:
    """Opens a file and locks it until it is closed.

    Raises:
      InputError: it cannot be written; or another process has the lock: `taken`, and the way out.
      OSError: ENOSPC, naming the file.
    """
    lock = opened(file, mode)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise InputError(f"{taken}; wait for it, or give another") from error
    return lock


def opened(file: pathlib.Path, mode: str) -> IO:
    """Opens a file to write to.

    Raises:
      InputError: it cannot be written.
      OSError: ENOSPC, naming the file.
    """
    try:
        return file.open(mode)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise no_space(file) from error
        raise InputError(f"{file}: cannot be written: {error.strerror}") from error


def check_settings(where: str, had: Mapping[str, Any], has: Mapping[str, Any]) -> None:
    """Refuses settings that differ from those that a folder or a file was begun with.

    Args:
      where: flag and folder, "--output=DIR", or a file.
      had: its settings, as read from JSON, or as `has`.

    Raises:
      InputError: names the first setting that differs, with both values.
    """
    had, has = (json.loads(json.dumps(x)) for x in (had, has))  # tuples are lists there
    other = where.partition("=")[0] if where.startswith("--") else "file"
    for name in sorted({*had, *has}):
        if had.get(name) != has.get(name):
            raise InputError(
                f"{where}: was begun with {name}={had.get(name)!r}, now it is {has.get(name)!r}; "
                f"give the same again, or another {other}"
            )
