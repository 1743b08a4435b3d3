"""Small files, read whole: only files on a disk, and only up to a limit."""

import os
import stat

from longlive_jax.files import remote

MAX_BYTES = 256 << 20  # the index of a model of a million tensors is a tenth of it
MAX_TEXT = 64 << 20  # of prompts or a caption: 100,000 long ones


def read(path: str | os.PathLike, limit: int | None = None) -> bytes:
    """The content of a file.

    Args:
      limit: bytes; None: MAX_BYTES.

    Raises:
      OSError: it cannot be opened or read.
      ValueError: it is a pipe or a device, which may never end; or it has more bytes.
    """
    limit = MAX_BYTES if limit is None else limit
    if remote.is_remote(path):
        content = remote.path(path).read_bytes()
    else:
        check(path)
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it has more than {limit} bytes")
    return content


def check(path: str | os.PathLike) -> None:
    """Refuses what is neither a file on a disk nor a folder.

    Raises:
      OSError: there is no such file.
      ValueError: it is a pipe or a device.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError("it is a pipe or a device, not a file; save what it gives to a file first")
