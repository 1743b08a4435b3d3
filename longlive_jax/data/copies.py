"""Files of a dataset on object storage, copied to this machine when they are first read.

They are kept for the next run, in LONGLIVE_CACHE_DIR, by default below TMPDIR, in a folder of the
dataset's address and manifest: processes that decode share them. Each is copied by one process, and
has its name when it is whole.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence

from longlive_jax.data.manifest import AGAIN, MANIFEST, Shard
from longlive_jax.errors import InputError, StorageError
from longlive_jax.files.remote import RemotePath

VARIABLE = "LONGLIVE_CACHE_DIR"


class Copies:
    """Local files of the shards in a folder.

    Raises:
      InputError: a shard is not there.
    """

    def __init__(self, folder: RemotePath, shards: Sequence[Shard]):
        self._folder = folder
        there = {path.name for path in folder.iterdir()} if shards else set()
        for shard in shards:
            if shard.file not in there:
                raise InputError(f"{folder / shard.file}: is gone; {AGAIN}")

    @functools.cached_property
    def _name(self) -> str:
        # Of its content too: a dataset may be written again at the same address.
        named = str(self._folder).encode() + (self._folder / MANIFEST).read_bytes()
        return hashlib.sha256(named).hexdigest()[:16]

    def get(self, shard: Shard) -> pathlib.Path:
        """The local file, copied if it is not here.

        Raises:
          InputError: it has another size than when it was written, or the disk is full.
          StorageError: object storage refuses, or does not answer.
        """
        source = self._folder / shard.file
        target = _root() / self._name / shard.file
        if target.is_file():
            return target
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _alone(target.with_suffix(".lock")):
                if not target.is_file():
                    self._copy(source, shard, target)
        except StorageError:
            raise
        except OSError as error:
            raise InputError(
                f"{source}: cannot be copied to {target.parent}: {error.strerror}; set {VARIABLE} "
                "to a folder with room for the dataset"
            ) from error
        return target

    def _copy(self, source: RemotePath, shard: Shard, target: pathlib.Path) -> None:
        free = shutil.disk_usage(target.parent).free
        if free < shard.bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        content = source.read_bytes()
        if len(content) != shard.bytes:
            raise InputError(
                f"{source}: {len(content)} bytes, {shard.bytes} were written: it is truncated or "
                f"damaged; {AGAIN}"
            )
        partial = target.with_suffix(f".partial-{os.getpid()}")
        partial.write_bytes(content)
        os.replace(partial, target)


def _root() -> pathlib.Path:
    given = os.environ.get(VARIABLE)
    return pathlib.Path(given or f"{tempfile.gettempdir()}/longlive_jax_cache-{os.getuid()}")


@contextlib.contextmanager
def _alone(file: pathlib.Path) -> Iterator[None]:
    with file.open("a") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
