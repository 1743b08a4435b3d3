"""Checksums of the files of a checkpoint: written when they are saved, compared when they are read.

CRC-32, as zip has it: zlib computes it in hardware, without the interpreter's lock, so that some
threads keep ahead of what disks give. It finds damage; it does not tell who made a file.
"""

import collections
import concurrent.futures
import contextlib
import os
import pathlib
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping

from longlive_jax.errors import InputError
from longlive_jax.files.remote import AnyPath, RemotePath

_BLOCK = 4 << 20  # bytes read at once
_THREADS = 8  # more find no more bandwidth
_FETCHED = 4  # folders of object storage that are on the disk at a time

Checksums = Mapping[str, str]  # by the name of a file in a folder, with / between folders


def _fetched(
    folder: RemotePath, sums: Checksums, into: pathlib.Path | None, way_out: str
) -> pathlib.Path:
    """A local copy of the files of a folder on object storage, those that have checksums."""
    assert into is not None
    for name in sums:
        target = into / folder.name / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.write_bytes((folder / name).read_bytes())
        except FileNotFoundError as error:
            reason = f"{name}: {error.strerror}"
            raise InputError(f"{folder}: is damaged ({reason}); {way_out}") from error
    return into / folder.name


def of_file(file: AnyPath) -> str:
    """The checksum of a file's content, eight hexadecimal digits."""
    value = 0
    if isinstance(file, RemotePath):
        return f"{zlib.crc32(file.read_bytes()):08x}"
    with file.open("rb", buffering=0) as f:
        while block := f.read(_BLOCK):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def of_folder(folder: pathlib.Path) -> dict[str, str]:
    """The checksums of all files in a folder and those below it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): of_file(path) for path in files}


def check_links(folder: pathlib.Path) -> None:
    """Refuses a folder with links that lead out of it, and what is neither file nor folder.

    Raises:
      InputError: naming the first of them.
    """
    inside = os.path.realpath(folder)
    for top, folders, files in os.walk(folder):
        for path in (pathlib.Path(top, name) for name in (*folders, *files)):
            kind = path.lstat().st_mode
            if stat.S_ISLNK(kind):
                target = os.path.realpath(path)
                if os.path.commonpath([inside, target]) != inside:
                    raise InputError(
                        f"{path}: is a link out of its checkpoint, to {target}; copy the "
                        "checkpoint with what its links name: `cp -rL`"
                    )
            elif not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
                raise InputError(f"{path}: is neither a file nor a folder; remove it")


@contextlib.contextmanager
def checking(
    root: AnyPath, sums: Mapping[str, Checksums], way_out: str, into: pathlib.Path | None = None
) -> Iterator[Callable[[str], None]]:
    """Compares folders with their checksums, in threads, ahead of the reader.

    Args:
      root: where the folders are.
      sums: by folder, in the order in which they will be read.
      way_out: what to do about damage; ends the message.
      into: a folder that gets the folders of a `root` on object storage.

    Yields:
      a function that waits for a folder of `sums`, and raises InputError if it is damaged.
    """
    threads = min(_THREADS, os.cpu_count() or 1)
    pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="checksums")
    waiting = collections.deque(sums.items())
    jobs: dict[str, concurrent.futures.Future] = {}

    def ahead(number: int) -> None:
        """Begins with some more: of what is on object storage, the disk has few at a time."""
        for _ in range(min(number, len(waiting))):
            group, files = waiting.popleft()
            jobs[group] = pool.submit(_check, root / group, files, way_out, into)

    def wait(folder: str) -> None:
        while folder not in jobs and waiting:
            ahead(1)
        jobs[folder].result()
        if into is not None:
            ahead(1)

    ahead(_FETCHED if into is not None else len(waiting))
    try:
        yield wait
    finally:
        pool.shutdown(cancel_futures=True)


def _check(folder: AnyPath, sums: Checksums, way_out: str, into: pathlib.Path | None) -> None:
    if isinstance(folder, RemotePath):
        folder = _fetched(folder, sums, into, way_out)
    check_links(folder)
    for name, expected in sums.items():
        try:
            found = of_file(folder / name)
        except OSError as error:
            reason = f"{name}: {error.strerror}"
        else:
            reason = f"{name} has the checksum {found}, it was saved with {expected}"
            if found == expected:
                continue
        raise InputError(f"{folder}: is damaged ({reason}); {way_out}")
