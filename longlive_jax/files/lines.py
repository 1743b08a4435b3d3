"""Files that lines are added to."""

import os

from longlive_jax.errors import InputError, StorageError
from longlive_jax.files import remote
from longlive_jax.files.remote import AnyPath, RemotePath


def of_process(path: AnyPath, process: int) -> AnyPath:
    """The file of a process: on object storage, where a file has one writer, each has its own."""
    if isinstance(path, RemotePath) and process:
        return path.with_name(f"{path.stem}-{process:05d}{path.suffix}")
    return path


def begin(path: str | os.PathLike) -> None:
    """Makes the file, empty if it is not there, and its folder.

    Raises:
      InputError: it cannot be written.
      StorageError: object storage refuses, or does not answer.
    """
    file = remote.path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(file, RemotePath):
            file.touch()
            return
        with file.open("a", encoding="utf-8"):
            pass
    except StorageError:
        raise
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error.strerror}") from error


def add(path: str | os.PathLike, text: str) -> None:
    """Adds whole lines, which stay whole where processes of one machine share the file.

    Raises:
      OSError, StorageError: it cannot be written.
    """
    file = remote.path(path)
    if isinstance(file, RemotePath):
        had = file.read_text() if file.is_file() else ""
        file.write_text(had + text)
        return
    with file.open("a", encoding="utf-8") as opened:
        opened.write(text)
