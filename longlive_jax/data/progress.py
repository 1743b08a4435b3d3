"""progress.jsonl of a dataset that is being written: its complete files, a line each.

On object storage it is written whole with each line; its folder is locked there, too.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

from longlive_jax.data.manifest import PROGRESS, SHARD, write_manifest
from longlive_jax.errors import InputError
from longlive_jax.files import folders, lease, remote, versioned
from longlive_jax.files import schema as schema_lib
from longlive_jax.files.remote import AnyPath, RemotePath

# Of progress.jsonl: its first line, and the others by their kind.
_BEGUN = {"settings": {str: object}, "clips_per_file?": int}
_DONE = {
    "latents": {
        "shard": SHARD,
        "prompts": [str],
        "chunks": [int],
        "read": [[(str, [[str]])]],
        "actions?": SHARD,
    },
    "text": {"shard": SHARD},
}


class Progress:
    """A folder that is being written: the settings it was begun with, and its complete files.

    A file of records first gets its name, then its line here; without a line it is written again.
    One process locks the folder, until it calls `close` or ends.

    Args:
      head: stored in a new folder. An unfinished folder must have the same "settings", and keeps
        the rest of its own head.

    Attributes:
      head: stored when the folder was begun.
      lines: one for each complete file, in the order they were added.

    Raises:
      InputError: the folder holds other files, was begun with other settings, cannot be written,
        or another process writes to it.
    """

    def __init__(self, folder: str | os.PathLike, head: Mapping[str, Any]):
        self.folder = remote.path(folder)
        self._file = _begin(self.folder)
        try:
            for partial in self.folder.glob(".*.partial-*"):  # of a process that was killed
                partial.unlink()
            lines = self._read()
            if not lines:
                self._append(head)
                lines = [json.loads(json.dumps(head))]
            self.head, *self.lines = lines
            folders.check_settings(
                f"--output={self.folder}", self.head["settings"], head["settings"]
            )
        except BaseException:
            self._file.close()
            raise

    def add(self, line: Mapping[str, Any]) -> None:
        """Adds the line of a complete file, with whatever later steps need to know about it."""
        self._append(line)
        self.lines.append(json.loads(json.dumps(line)))

    def finish(self, **manifest) -> None:
        """Writes the manifest, which completes the folder, and removes the progress file."""
        write_manifest(self.folder, **manifest)
        (self.folder / PROGRESS).unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Unlocks the folder. Closing twice does nothing."""
        self._file.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _read(self):
        whole, _, torn = self._file.read().rpartition(b"\n")
        if torn:  # its writer was killed
            self._file.truncate(len(whole) + bool(whole))
        try:
            lines = [versioned.parse(line) for line in whole.split(b"\n") if line]
            for i, line in enumerate(lines):
                if wrong := _wrong_line(line) if i else schema_lib.mismatch(line, _BEGUN):
                    raise ValueError(f"line {i + 1}: {wrong}")
            return lines
        except ValueError as error:
            raise InputError(
                f"{self._file.name}: is damaged ({error}); give a new --output"
            ) from error

    def _append(self, line):
        self._file.append(json.dumps(line).encode() + b"\n")


def _wrong_line(line: Any) -> str:
    """What is wrong with the line of a complete file; "" if nothing is."""
    if wrong := schema_lib.mismatch(line, {"kind": str}):
        return wrong
    if line["kind"] not in _DONE:
        return f"its kind is {line['kind'][:40]!r}"
    if wrong := schema_lib.mismatch(line, _DONE[line["kind"]]):
        return wrong
    for read in line.get("read", ()):  # a name, and a path and a reason of each failure
        pair = len(read) == 2 and isinstance(read[0], str) and isinstance(read[1], list)
        if not pair or any(len(failure) != 2 for failure in read[1]):
            return "read is no list of names with their failures"
    return ""


class _Lines(Protocol):
    """The file, locked until it is closed."""

    name: str

    def read(self) -> bytes: ...
    def truncate(self, size: int, /) -> Any: ...
    def append(self, text: bytes) -> None: ...
    def close(self) -> None: ...


class _Local:
    def __init__(self, folder: pathlib.Path, taken: str):
        self._file = folders.open_locked(folder / PROGRESS, taken, "a+b")
        self._file.seek(0)
        self.name = self._file.name
        self.read, self.truncate, self.close = (
            self._file.read, self._file.truncate, self._file.close,
        )  # fmt: skip

    def append(self, text: bytes) -> None:
        self._file.write(text)
        self._file.flush()
        os.fsync(self._file.fileno())


class _Remote:
    def __init__(self, folder: RemotePath, taken: str):
        self._path, self._held = folder / PROGRESS, contextlib.ExitStack()
        self._held.enter_context(lease.held(folder, taken))
        self.name = str(self._path)
        self._text = self._path.read_bytes() if self._path.is_file() else b""

    def read(self) -> bytes:
        return self._text

    def truncate(self, size: int, /) -> None:
        self._text = self._text[:size]

    def append(self, text: bytes) -> None:
        self._text += text
        self._path.write_bytes(self._text)

    def close(self) -> None:
        self._held.close()


def _begin(folder: AnyPath) -> _Lines:
    """Opens progress.jsonl of an unfinished or new folder, and locks it."""
    folders.make(
        folder,
        "--output",
        "cached training data",
        lambda files: any(file.name == PROGRESS for file in files),
    )
    taken = f"--output={folder}: another process is writing to it"
    return _Remote(folder, taken) if isinstance(folder, RemotePath) else _Local(folder, taken)
