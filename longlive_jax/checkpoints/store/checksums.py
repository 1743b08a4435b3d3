"""Checksums of the files of a checkpoint: written when they are saved, compared when they are read.

CRC-32, as zip has it: zlib computes it in hardware, without the interpreter's lock, so that some
threads keep ahead of what disks give. It finds damage; it does not tell who made a file.
"""

import concurrent.futures
import contextlib
import os
import pathlib
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping

from longlive_jax.errors import InputError

_BLOCK = 4 << 20  # bytes read at once
_THREADS = 8  # more find no more bandwidth

Checksums = Mapping[str, str]  # by the name of a file in a folder, with / between folders


def of_file(file: pathlib.Path) -> str:
    """The checksum of a file's content, eight hexadecimal digits."""
    value = 0
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
    root: pathlib.Path, sums: Mapping[str, Checksums], way_out: str
) -> Iterator[Callable[[str], None]]:
    """Compares folders with their checksums, in threads, ahead of the reader.

    Args:
      root: where the folders are.
      sums: by folder, in the order in which they will be read.
      way_out: what to do about damage; ends the message.

    Yields:
      a function that waits for a folder of `sums`, and raises InputError if it is damaged.
    """
    threads = min(_THREADS, os.cpu_count() or 1)
    pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="checksums")
    jobs = {g: pool.submit(_check, root / g, files, way_out) for g, files in sums.items()}
    try:
        yield lambda folder: jobs[folder].result()
    finally:
        pool.shutdown(cancel_futures=True)


def _check(folder: pathlib.Path, sums: Checksums, way_out: str) -> None:
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
