"""Files that appear under their name complete, or not at all."""

import contextlib
import errno
import os
import pathlib
import re
import socket
import time
import zlib
from collections.abc import Iterator

from longlive_jax.errors import InputError
from longlive_jax.files import remote, scratch


def partial_file(path: str | os.PathLike) -> pathlib.Path:
    """Creates the empty file, beside `path`, to write before renaming it to `path`.

    It is hidden, so that `*.mp4` does not find it, and keeps the suffix, from which numpy and PIL
    derive the format. Folders that are missing are made. For an address on object storage it is on
    a local disk; `put` sends it.

    Raises:
      InputError: nothing can be written at `path`.
      OSError: ENOSPC, naming `path`.
    """
    if remote.is_remote(path):
        partial = scratch.folder() / remote.path(path).name
        partial.touch()
        return partial
    remote.check(path)  # an address that was made a local path has one slash
    path = pathlib.Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the name of a file in it")
    partial = path.parent / f".{path.stem}.partial-{_HOST}-{os.getpid()}{path.suffix}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.open("wb").close()  # the only test of permission that also holds for root
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise no_space(path) from error
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    return partial


def put(partial: pathlib.Path, path: str | os.PathLike) -> None:
    """Gives a whole `partial_file` the name that it is for.

    Raises:
      StorageError: object storage refuses it, or does not answer.
    """
    if not remote.is_remote(path):
        os.replace(partial, path)
        return
    remote.path(path).write_bytes(partial.read_bytes())
    discard(partial, path)


def discard(partial: pathlib.Path, path: str | os.PathLike) -> None:
    """Removes a `partial_file` that is not wanted; one that is gone already is no error."""
    partial.unlink(missing_ok=True)
    if remote.is_remote(path):
        with contextlib.suppress(OSError):
            partial.parent.rmdir()


def remove_abandoned(path: str | os.PathLike) -> None:
    """Removes what killed runs left of `path`, and of its numbered siblings: path-000, ...

    The files of runs that may still write are left: on this machine, of processes that are there;
    of other machines that share the folder, those of the last ABANDONED_SECONDS.
    """
    if remote.is_remote(path):
        return  # there is nothing beside an object
    path = pathlib.Path(path)
    stem, suffix = re.escape(path.stem), re.escape(path.suffix)
    name = re.compile(rf"\.{stem}(-\d{{3,}})?\.partial-(?:([0-9a-f]{{8}})-)?(\d+){suffix}")
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if (match := name.fullmatch(entry.name)) and _is_abandoned(entry, *match.groups()[1:]):
                with contextlib.suppress(OSError):  # another run may be as quick
                    os.unlink(entry.path)


ABANDONED_SECONDS = 24 * 3600  # no writer pauses for a day
_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _is_abandoned(entry: os.DirEntry, host: str | None, pid: str) -> bool:
    if host not in (None, _HOST):
        return time.time() - entry.stat(follow_symlinks=False).st_mtime > ABANDONED_SECONDS
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:  # another user's process
        return False
    return False


def no_space(path: str | os.PathLike) -> OSError:
    """The error for a full disk; it names the file that the user asked for."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def named(error: OSError, path: str | os.PathLike, partial: pathlib.Path) -> OSError:
    """The error of writing `partial`, naming the file that the user asked for."""
    if error.errno is None or error.filename not in (None, str(partial)):
        return error  # it is about something else
    return OSError(error.errno, os.strerror(error.errno), str(path))


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields an empty file beside `path`; renames it to `path` after the block, or sends it there.

    An exception inside the block, KeyboardInterrupt included, removes the file and leaves an older
    file at `path` unchanged.

    Raises:
      InputError: nothing can be written at `path`. Raised before the block is entered.
      OSError: ENOSPC, naming `path`.
    """
    partial = partial_file(path)
    try:
        yield partial
        put(partial, path)
    except BaseException as error:
        discard(partial, path)
        if isinstance(error, OSError) and (better := named(error, path, partial)) is not error:
            raise better from error
        raise
