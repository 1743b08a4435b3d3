"""Files that appear under their name complete, or not at all."""

import contextlib
import errno
import os
import pathlib
from collections.abc import Iterator

from longlive_jax.errors import InputError


def partial_file(path: str | os.PathLike) -> pathlib.Path:
    """Creates the empty file, beside `path`, to write before renaming it to `path`.

    It is hidden, so that `*.mp4` does not find it, and keeps the suffix, from which numpy and PIL
    derive the format. Folders that are missing are made.

    Raises:
      InputError: nothing can be written at `path`.
      OSError: ENOSPC, naming `path`.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the name of a file in it")
    partial = path.parent / f".{path.stem}.partial-{os.getpid()}{path.suffix}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.open("wb").close()  # the only test of permission that also holds for root
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise no_space(path) from error
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    return partial


def no_space(path: str | os.PathLike) -> OSError:
    """The error for a full disk; it names the file that the user asked for."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields an empty file beside `path`; renames it to `path` after the block.

    An exception inside the block, KeyboardInterrupt included, removes the file and leaves an older
    file at `path` unchanged.

    Raises:
      InputError: nothing can be written at `path`. Raised before the block is entered.
      OSError: ENOSPC, naming `path`.
    """
    partial = partial_file(path)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise no_space(path) from error
        raise
