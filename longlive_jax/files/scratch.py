"""A folder of this process on a local disk, for what is on its way to or from object storage.

It is in TMPDIR, and is gone when the process ends; what killed processes left of theirs is removed
by the next one.
"""

import atexit
import contextlib
import functools
import itertools
import os
import pathlib
import re
import shutil
import tempfile

from longlive_jax.files.remote import RemotePath

_PREFIX = "longlive_jax-"
_NUMBERS = itertools.count()


def folder() -> pathlib.Path:
    """A new empty folder in this process's."""
    made = _root(os.getpid()) / str(next(_NUMBERS))
    made.mkdir()
    return made


def remove() -> None:
    """Removes all of it; for a process that ends without running what Python runs at its end."""
    if _root.cache_info().currsize:
        shutil.rmtree(_root(os.getpid()), ignore_errors=True)
        _root.cache_clear()


@functools.cache
def _root(process: int) -> pathlib.Path:
    above = pathlib.Path(tempfile.gettempdir())
    for path in above.glob(f"{_PREFIX}*"):
        match = re.fullmatch(rf"{_PREFIX}(\d+)-\w+", path.name)
        if match and not _runs(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)
    made = pathlib.Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{process}-"))
    atexit.register(_remove_at_end, made, process)
    return made


def _remove_at_end(made: pathlib.Path, process: int) -> None:
    if os.getpid() == process:  # not in a child that was forked
        shutil.rmtree(made, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


class Mirror:
    """A local folder whose files go to one of object storage when `sync` is called.

    For files that grow while a process runs: objects do not. A local `target` is its own mirror.

    Args:
      target: the folder, a pathlib.Path or a RemotePath.

    Attributes:
      folder: where to write.
    """

    def __init__(self, target: pathlib.Path | RemotePath):
        self._target = target if isinstance(target, RemotePath) else None
        self.folder = folder() if isinstance(target, RemotePath) else target
        self._sent: dict[str, tuple[int, int]] = {}

    def fetch(self, name: str) -> None:
        """Brings a file of the target here, if there is one."""
        if self._target is not None:
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name).write_bytes((self._target / name).read_bytes())

    def sync(self) -> None:
        """Sends what has changed since the last time.

        Raises:
          StorageError: the storage refuses, or does not answer.
        """
        if self._target is None:
            return
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            name, found = path.relative_to(self.folder).as_posix(), path.stat()
            state = (found.st_size, found.st_mtime_ns)
            if self._sent.get(name) != state:
                (self._target / name).write_bytes(path.read_bytes())
                self._sent[name] = state
