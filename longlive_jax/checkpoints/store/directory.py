"""The folder of a checkpoint: one writer at a time, and its metadata.json."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from longlive_jax.errors import InputError
from longlive_jax.files import folders, remote, versioned
from longlive_jax.files import schema as schema_lib
from longlive_jax.files.names import is_plain
from longlive_jax.files.remote import AnyPath, RemotePath
from longlive_jax.models import tokenizer as tokenizer_lib

_FORMAT, _VERSION, _FILE = "longlive_jax weights", 1, "metadata.json"
_AGAIN = "convert again to a new directory"

UNFINISHED = ".unfinished"  # in a network's folder on object storage while it is written

Parts = dict[str, dict[str, Any]]  # by name: each network's entry in metadata.json

_SCHEMA = {"parts": {str: {"sources": [str]}}}
_NETWORK = {
    "directory": str,
    "config": {str: {str: object}},
    "network?": str,
    "recipe?": str,
    "index_checksum?": str,  # checkpoints of before it was written have none
}


@contextlib.contextmanager
def writing(directory: str | os.PathLike) -> Iterator[tuple[AnyPath, Parts]]:
    """Locks a checkpoint's folder, made if it is missing; yields its path and its parts.

    Raises:
      InputError: it is a file, or a folder of other files, or another process has the lock.
    """
    root = remote.path(remote.absolute(directory))
    folders.make(root, "--output", "checkpoint", _is_checkpoint)
    with folders.locked(root, f"--output={root}: another process is writing to it"):
        yield root, read(root) if (root / _FILE).exists() else {}


def _is_checkpoint(files: list[AnyPath]) -> bool:
    return any(file.name == _FILE for file in files) or all(map(_is_ours, files))


def _is_ours(path: AnyPath) -> bool:
    """Whether this is a network's folder or the tokenizer, named in metadata.json or not."""
    if (path / "index.json").is_file() or path.name == tokenizer_lib.FILE:
        return True
    return isinstance(path, RemotePath) and (path / UNFINISHED).is_file()


def remove_unused(root: AnyPath, name: str, parts: Parts) -> None:
    """Removes the folders of network `name` that metadata.json does not name."""
    used = {info.get("directory") for info in parts.values()}
    for path in list(root.iterdir()) if root.is_dir() else ():
        if re.fullmatch(rf"{name}(_\d+)?", path.name) and path.name not in used and _is_ours(path):
            # By these it is known to be ours.
            remote.remove(path, last=("index.json", UNFINISHED))


def read(root: AnyPath) -> Parts:
    """The entries of metadata.json for each network and for the tokenizer.

    Raises:
      InputError: there is no metadata.json, or it is damaged, or of another format.
    """
    file = root / _FILE
    if not remote.is_file(file):
        raise InputError(
            f"{root}: is no checkpoint (it has no metadata.json); make one with "
            "`python -m launch.convert --dit=FILE --vae=FILE --umt5=FILE --tokenizer=FILE "
            f"--output={root}`"
        )
    return versioned.read(file, _FORMAT, _VERSION, _AGAIN, schema=_SCHEMA)["parts"]


def network(root: AnyPath, name: str, info: dict[str, Any]) -> dict[str, Any]:
    """`info`, if it is the entry of a network with a folder in the checkpoint.

    Raises:
      InputError: it is another, or names a folder elsewhere.
    """
    wrong = schema_lib.mismatch(info, _NETWORK)
    if not wrong and not is_plain(info["directory"]):
        wrong = f"directory {info['directory'][:80]!r} is not the name of a folder in it"
    if wrong:
        raise InputError(f"{root / _FILE}: is damaged (of {name}: {wrong}); {_AGAIN}")
    return info


def write(root: AnyPath, parts: Mapping[str, Any]) -> None:
    """Writes metadata.json in one step."""
    versioned.write(root / _FILE, _FORMAT, _VERSION, {"parts": parts})
