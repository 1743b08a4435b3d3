"""Small files, read whole: only files on a disk, and only up to a limit."""

import os
import stat

MAX_BYTES = 256 << 20  # the index of a model of a million tensors is a tenth of it


def read(path: str | os.PathLike) -> bytes:
    """The content of a file.

    Raises:
      OSError: it cannot be opened or read.
      ValueError: it is a pipe or a device, which may never end; or has more than MAX_BYTES.
    """
    check(path)
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
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
