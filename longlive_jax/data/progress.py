"""progress.jsonl of a dataset that is being written: its complete files, a line each.

On object storage it is written whole with each line; its folder is locked there, too.
"""

import contextlib
import fcntl
import json
import logging
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from longlive_jax.data.manifest import MANIFEST, PROGRESS, SHARD, write_manifest
from longlive_jax.errors import InputError
from longlive_jax.files import folders, lease, remote, versioned
from longlive_jax.files import schema as schema_lib
from longlive_jax.files.remote import AnyPath, RemotePath

_log = logging.getLogger(__name__)

# Of progress.jsonl: its first line, and the others by their kind.
_BEGUN = {"settings": {str: object}, "clips_per_file?": int}
_DONE = {
    "latents": {
        "shard": SHARD,
        "prompts": [str],
        "chunks": [int],
        "read": [[(str, [[str]])]],
        "actions?": SHARD,
        "by?": str,
        "seconds?": float,
    },
    "text": {"shard": SHARD},
}  # by, seconds: the process that made the file, and how long it took


class Progress:
    """A folder that is being written: the settings it was begun with, and its complete files.

    A file of records first gets its name, then its line here; without a line it is written again.
    On a disk any number of processes, of any hosts that share it, write a folder together: `work`
    deals the files out, and those of a process that ends are taken by the others. Object storage
    has one process, which locks the folder until it calls `close` or ends.

    Args:
      head: stored in a new folder. An unfinished folder must have the same "settings", and keeps
        the rest of its own head.

    Attributes:
      finished: whether the folder has its manifest; then nothing is to be done.
      head: stored when the folder was begun.
      lines: one for each complete file, by kind and number; those of other processes as of the last
        `refresh`, which `add` and `work` do too.

    Raises:
      InputError: the folder holds other files, was begun with other settings or cannot be written;
        on object storage, another process writes to it.
    """

    def __init__(self, folder: str | os.PathLike, head: Mapping[str, Any]):
        self.folder = remote.path(folder)
        self._file = _begin(self.folder)
        try:
            with self._file.locked():
                # Another process may have completed it since it was looked at.
                self.finished = (self.folder / MANIFEST).is_file()
                lines = [] if self.finished else self._read()
                if self.finished:
                    remove(self.folder)
                elif not lines:
                    self._append(head)
            self.head, *self.lines = lines or [json.loads(json.dumps(head))]
            folders.check_settings(
                f"--output={self.folder}", self.head["settings"], head["settings"]
            )
        except BaseException:
            self._file.close()
            raise

    def add(self, line: Mapping[str, Any]) -> None:
        """Adds the line of a complete file, with whatever later steps need to know about it."""
        with self._file.locked():
            _, *self.lines = self._read()
            self._append(line)
            self.lines = _sorted([*self.lines, json.loads(json.dumps(line))])

    def refresh(self) -> None:
        """Reads the lines that other processes have added."""
        with self._file.locked():
            _, *self.lines = self._read()

    def work(self, kind: str, count: int) -> Iterator[int]:
        """Deals out files of a kind: the numbers of those that this process is to write, and `add`.

        Ends when all of them have a line. A number belongs to this process while it is the newest
        that was given. Processes begin far from each other, so that each has files in a row.

        Args:
          kind: "latents" or "text". count: how many files there are of it.
        """
        last, warned = -1, False
        while missing := self._missing(kind, count):
            for number in _order(missing, last):
                with self._file.acquire(f".lock-{kind}-{number:05d}") as ours:
                    if not ours:
                        continue
                    if number in self._missing(kind, count):
                        last = number
                        yield number
                    break
            else:
                if not warned:
                    _log.warning("%s: waiting for %d files of others", self.folder, len(missing))
                    warned = True
                time.sleep(1)

    def _missing(self, kind: str, count: int) -> list[int]:
        self.refresh()
        done = {file_number(line) for line in self.lines if line["kind"] == kind}
        return [number for number in range(count) if number not in done]

    def finish(self, make: Callable[[], Mapping[str, Any]]) -> None:
        """Writes the manifest of `make`, which completes the folder, if no other process has.

        Removes the progress file. `make` is called while the folder is locked.
        """
        with self._file.locked():
            if not (self.folder / MANIFEST).is_file():
                _, *self.lines = self._read()
                write_manifest(self.folder, **make())
            remove(self.folder)
        self.close()

    def close(self) -> None:
        """On object storage, unlocks the folder. Closing twice does nothing."""
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
            return [*lines[:1], *_sorted(lines[1:])]
        except ValueError as error:
            raise InputError(
                f"{self._file.name}: is damaged ({error}); give a new --output"
            ) from error

    def _append(self, line):
        self._file.append(json.dumps(line).encode() + b"\n")


def remove(folder: AnyPath) -> None:
    """Removes the progress file and locks of a folder that has its manifest."""
    for lock in folder.glob(".lock-*"):  # of processes that were killed
        lock.unlink(missing_ok=True)
    (folder / PROGRESS).unlink(missing_ok=True)


def file_number(line: Mapping[str, Any]) -> int:
    """Of a line's file among those of its kind: 12 of latents-00012.arrayrecord."""
    return int(line["shard"]["file"].partition("-")[2].partition(".")[0])


def _sorted(lines):
    return sorted(lines, key=lambda line: (line["kind"], file_number(line)))


def _order(missing: list[int], last: int) -> Iterator[int]:
    """The order in which a process that wrote file `last` tries to acquire missing ones.

    The next one; else the longest row of missing ones, from its start and, where others are at work
    there, from its middle; at last all.
    """
    if last + 1 in missing:
        yield last + 1
    rows = [[missing[0]]]
    for number in missing[1:]:
        if number == rows[-1][-1] + 1:
            rows[-1].append(number)
        else:
            rows.append([number])
    for row in sorted(rows, key=len, reverse=True):
        yield row[0]
        yield row[len(row) // 2]
    yield from missing


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
    try:
        file_number(line)
    except ValueError:
        return f"its file is named {line['shard']['file'][:40]!r}"
    return ""


class _Lines(Protocol):
    """The file. What it holds is read and changed while it is locked."""

    name: str

    def locked(self) -> contextlib.AbstractContextManager[None]: ...
    def acquire(self, name: str) -> contextlib.AbstractContextManager[bool]: ...
    def read(self) -> bytes: ...
    def truncate(self, size: int, /) -> Any: ...
    def append(self, text: bytes) -> None: ...
    def close(self) -> None: ...


class _Local:
    """Locked while it is read or changed, which is short: others wait."""

    def __init__(self, folder: pathlib.Path):
        self._folder, self.name = folder, str(folder / PROGRESS)
        self._file = folders.opened(folder / PROGRESS, "a+b")
        self.truncate, self.close = self._file.truncate, self._file.close

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def acquire(self, name: str) -> Iterator[bool]:
        """Whether no other process has the file of this name, which then is ours in the block."""
        path = self._folder / name
        with folders.opened(path, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)  # while it is locked

    def read(self) -> bytes:
        self._file.seek(0)
        return self._file.read()

    def append(self, text: bytes) -> None:
        self._file.write(text)
        self._file.flush()
        os.fsync(self._file.fileno())


class _Remote:
    """Locked until it is closed, since no two processes may change an object."""

    def __init__(self, folder: RemotePath):
        taken = f"--output={folder}: another process is writing to it"
        self._path, self._held = folder / PROGRESS, contextlib.ExitStack()
        self._held.enter_context(lease.held(folder, taken))
        self.name = str(self._path)
        self._text = self._path.read_bytes() if self._path.is_file() else b""

    def locked(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def acquire(self, name: str) -> contextlib.AbstractContextManager[bool]:
        del name
        return contextlib.nullcontext(True)

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
    """Opens progress.jsonl of an unfinished or new folder."""
    folders.make(
        folder,
        "--output",
        "cached training data",
        lambda files: any(file.name in (PROGRESS, MANIFEST) for file in files),
    )
    return _Remote(folder) if isinstance(folder, RemotePath) else _Local(folder)
