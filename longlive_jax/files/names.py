"""Names in folders: what is nobody's data, and names that are not UTF-8 as text."""

import os
import pathlib
import re

# What operating systems and servers leave in folders beside hidden files, in lower case.
_STRAYS = frozenset(
    (
        "__macosx", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "@eadir",
        "$recycle.bin", "system volume information", "lost+found", "icon\r", "network trash folder",
        "temporary items", "recycler", "#recycle", "@recycle", "#snapshot",
    )
)  # fmt: skip
MAX_NAME = 255  # bytes of a file's name; of every usual file system
# Characters that some readers of lines take for the end of one.
_ENDS = re.compile("[\\n\\r\\v\\f\\x1c-\\x1e\\x85\\u2028\\u2029]")


def is_stray(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or left by a system: not to be read."""
    return name.startswith(".") or name.lower() in _STRAYS


def is_plain(name: str) -> bool:
    """Whether this is the name of a file beside others, and leads nowhere else."""
    try:
        size = len(os.fsencode(name))
    except UnicodeError:
        return False
    return 0 < size <= MAX_NAME and name[0] != "." and not {"/", "\\", "\0"} & set(name)


def entries(folder: str | os.PathLike, *suffixes: str) -> list[pathlib.Path]:
    """What a folder holds, sorted, without strays; only these suffixes, in whatever case.

    Raises:
      OSError: the folder cannot be read.
    """
    paths = [path for path in pathlib.Path(folder).iterdir() if not is_stray(path.name)]
    return sorted(p for p in paths if not suffixes or p.suffix.lower() in suffixes)


def spelled(path: pathlib.Path) -> pathlib.Path:
    """The file whose suffix is spelled like that of `path` but for its case; else `path`."""
    if path.is_file():
        return path
    try:
        beside = entries(path.parent, path.suffix.lower())
    except OSError:
        return path
    return next((p for p in beside if p.stem == path.stem), path)


def as_bytes(name: str | os.PathLike) -> bytes:
    """A name or path as the file system has it."""
    try:
        return os.fsencode(name)
    except UnicodeEncodeError:  # no name of a file: from a JSON file that somebody edited
        return str(name).encode("utf-8", "backslashreplace")


def as_text(name: str | os.PathLike) -> str:
    r"""A name or path as one line of UTF-8: other bytes, and line ends, become \xNN or \uNNNN."""
    text = as_bytes(name).decode("utf-8", "backslashreplace")
    return _ENDS.sub(lambda m: m[0].encode("unicode_escape").decode(), text)
