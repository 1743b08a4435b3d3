"""Paths on object storage, gs:// and s3://: the one place that knows of schemes.

`path` makes an object of what a user gave: a pathlib.Path of a local path, a RemotePath of an
address. A RemotePath has pathlib's methods, and works on objects through TensorStore, whose drivers
also read and write the arrays of Orbax; there is no other client, and one set of credentials.

An object appears whole or not at all, and is never changed in part. A folder is what its objects'
names have in common: it needs no making, and is gone with the last of them. So nothing is renamed
into place; what belongs together is named by an object that is written last.

Credentials are those of the clouds' own tools: for s3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY,
~/.aws, or the machine's role; for gs GOOGLE_APPLICATION_CREDENTIALS, gcloud's, or the machine's
account. Other servers that speak s3: AWS_ENDPOINT_URL; that speak gs: TENSORSTORE_GCS_HTTP_URL.
"""

import fnmatch
import functools
import io
import os
import pathlib
import re
import shutil
import types
from collections.abc import Collection, Iterator
from typing import IO, Any, NamedTuple

import tensorstore as ts
from etils import epath

from longlive_jax.errors import InputError, StorageError

SCHEMES = ("gs", "s3")
TRIES_VARIABLE = "LONGLIVE_STORAGE_TRIES"  # of a request that fails, before it is an error
_TRIES = 12  # with the pauses between them, at most 16 seconds, two minutes
_QUICK = 4  # tries of the first request of a command: some seconds
MAX_OBJECT = 5 * 2**30 - 1  # bytes of one request that writes
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_ONE_SLASH = re.compile(r"(gs|s3):/(?!/)", re.IGNORECASE)
# TensorStore waits for ever for a server that has taken a request and says nothing. One that moves
# less than a byte a second for so long is given up, and tried again: storage answers within
# seconds, and a minute is less than what a save may keep others waiting for.
STALLED_SECONDS = 60
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", str(STALLED_SECONDS))
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", "30")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")


class Info(NamedTuple):
    """What `stat` says of an object: st_size in bytes, and whether it is a folder."""

    is_directory: bool
    st_size: int
    length: int
    mtime: int = 0


def scheme(given: str | os.PathLike) -> str | None:
    """The scheme of an address, "s3" of s3://BUCKET/KEY; None: a local path."""
    found = _SCHEME.match(os.fspath(given))
    return found[1] if found else None


def is_remote(given: str | os.PathLike | None) -> bool:
    """Whether this is an address on object storage."""
    return given is not None and scheme(given) in SCHEMES


def check(given: str | os.PathLike, name: str = "path") -> None:
    """Refuses addresses that nothing serves, which would be taken for local folders.

    Args:
      name: of the flag, for the message.

    Raises:
      InputError: another scheme; no bucket, or one that no bucket can be called.
    """
    text = os.fspath(given)
    served = " and ".join(f"{one}://" for one in SCHEMES)
    if _ONE_SLASH.match(text):
        raise InputError(f"{name}={text}: has one slash; give {text.replace(':/', '://', 1)}")
    found = scheme(text)
    if found is None:
        return
    if found not in SCHEMES:
        raise InputError(
            f"{name}={text}: nothing serves {found}://; give a local path, or an address that "
            f"begins with {served}"
        )
    bucket, _, key = text.partition("://")[2].partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise InputError(
            f"{name}={text}: {bucket!r} cannot be the name of a bucket; give "
            f"{found}://BUCKET/FOLDER"
        )
    if {".", ".."} & set(key.split("/")) or "" in key.rstrip("/").split("/")[1:]:
        raise InputError(f"{name}={text}: has '.', '..' or '//' in it; give the address without")


def path(given: str | os.PathLike, name: str = "path") -> "AnyPath":
    """The path of what a user gave. Errors as `check`."""
    if isinstance(given, RemotePath):
        return given
    check(given, name)
    return RemotePath(os.fspath(given)) if is_remote(given) else pathlib.Path(given)


def absolute(given: str | os.PathLike) -> str:
    """The path or address in full, without what does not change it. Errors as `check`."""
    check(given)
    return os.fspath(path(given)) if is_remote(given) else os.path.abspath(given)


def is_file(given: str | os.PathLike) -> bool:
    """Whether there is such a file or object; also of names that no file can have."""
    where = path(given) if is_remote(given) else given
    return where.is_file() if isinstance(where, RemotePath) else os.path.isfile(where)


def remove(folder: "AnyPath", last: Collection[str] = ()) -> None:
    """Removes a folder with all that is in it, as far as it can be; none there is no error.

    last: names of files that go after all others on object storage, where files go one by one.

    Raises:
      StorageError: object storage refuses, or does not answer.
    """
    if not isinstance(folder, RemotePath):
        shutil.rmtree(folder, ignore_errors=True)
        return
    for inner in sorted(folder.rglob("*"), key=lambda inner: inner.name in last):
        inner.unlink(missing_ok=True)


def join(folder: str | os.PathLike, *names: str) -> "AnyPath":
    """The path of a file in a folder."""
    return path(folder).joinpath(*names)


def reach(given: str | os.PathLike, name: str, *, write: bool = False) -> None:
    """Refuses an address that cannot be read, or written, before any work. A local path passes.

    Args:
      name: of the flag, for the message.
      write: whether it will be written to; an object is, and removed.

    Raises:
      InputError: as `check`; no such bucket, no credentials, no permission, no answer.
    """
    where = path(given, name)
    if not isinstance(where, RemotePath):
        return
    # Beside a file, in a folder: credentials may be for what begins with it alone.
    place = where.parent if where.suffix and where.parent.key else where
    key = f"{place.key}/.probe-{os.urandom(6).hex()}".lstrip("/")
    try:
        store = ts.KvStore.open(spec(f"{scheme(where)}://{where.bucket}", _QUICK)).result()
        store.list(ts.KvStore.KeyRange(f"{key}/", _after(f"{key}/"))).result()
        if write:
            store.write(key, b"").result()
            store.write(key, None).result()
    except (ValueError, RuntimeError, OSError) as error:
        raise InputError(f"{name}={given}: {_error(where, error).strerror}") from error


def spec(address: str | os.PathLike, tries: int | None = None) -> dict[str, Any]:
    """TensorStore's description of the store of an address; its keys go on from there.

    tries: of each request; None: those of a run that is under way.
    """
    kind, _, rest = os.fspath(address).partition("://")
    bucket, _, key = rest.partition("/")
    most = min(tries or _tries(), _tries())
    retries = {"max_retries": most, "initial_delay": "500ms", "max_delay": "16s"}
    if kind == "gs":
        driver = os.environ.get("TENSORSTORE_GCS_BACKEND", "gcs")  # Orbax reads it too
        found = {"driver": driver, "bucket": bucket, "path": key}
        return found | ({"gcs_request_retries": retries} if driver == "gcs" else {})
    found = {"driver": "s3", "bucket": bucket, "path": key, "s3_request_retries": retries}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        found["endpoint"], region = endpoint.rstrip("/"), region or "us-east-1"
    if region:
        found["aws_region"] = region
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # without a look at files that need not be there
        found["aws_credentials"] = {"type": "environment"}
    return found


def _tries() -> int:
    text = os.environ.get(TRIES_VARIABLE, str(_TRIES))
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise InputError(f"{TRIES_VARIABLE}={text}: must be a number from 1 to 100")
    return int(text)


@functools.lru_cache(maxsize=16)
def _opened(kind: str, bucket: str, process: int) -> ts.KvStore:
    del process  # a handle does not outlive a fork
    return ts.KvStore.open(spec(f"{kind}://{bucket}")).result()


class RemotePath(type(epath.Path("gs://bucket"))):
    """An object or a folder on object storage.

    Raises:
      StorageError: the storage refuses a request, or does not answer. It is an OSError.
      FileNotFoundError, IsADirectoryError, FileExistsError: as pathlib.
    """

    @property
    def bucket(self) -> str:
        return os.fspath(self).partition("://")[2].partition("/")[0]

    @property
    def key(self) -> str:
        """The object's name in its bucket."""
        return os.fspath(self).partition("://")[2].partition("/")[2]

    def _store(self) -> ts.KvStore:
        kind = os.fspath(self).partition("://")[0]
        try:
            return _opened(kind, self.bucket, os.getpid())
        except (ValueError, RuntimeError, OSError) as error:
            raise _error(self, error) from error

    def _wait(self, future: Any) -> Any:
        try:
            return future.result()
        except (ValueError, RuntimeError, OSError) as error:
            raise _error(self, error) from error

    @property
    def _prefix(self) -> str:
        return f"{self.key}/" if self.key else ""

    def _below(self) -> list[str]:
        """The names of all objects below, from here."""
        start = self._prefix
        range_ = ts.KvStore.KeyRange(start, _after(start)) if start else ts.KvStore.KeyRange()
        names = map(os.fsdecode, self._wait(self._store().list(range_)))
        # A name that ends with a slash is an object that other tools make for a folder.
        inside = (name[len(start) :] for name in names if name.startswith(start))
        return sorted(name for name in inside if name and not name.endswith("/"))

    # What is there.

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        del follow_symlinks
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        if not self.key:
            return False
        read = self._store().read(self.key, byte_range=slice(0, 0))
        return self._wait(read).state == "value"

    def is_dir(self) -> bool:
        return not self.key or bool(self._below())

    def is_symlink(self) -> bool:
        return False

    def stat(self, *, follow_symlinks: bool = True) -> Info:
        del follow_symlinks
        if self.key and (size := self._size()) is not None:
            return Info(False, size, size)
        if self.is_dir():
            return Info(True, 0, 0)
        raise FileNotFoundError(2, "no such object", str(self))

    def _size(self) -> int | None:
        store = self._store()
        if self._wait(store.read(self.key, byte_range=slice(0, 0))).state != "value":
            return None
        return len(self.read_bytes())

    def iterdir(self) -> "Iterator[RemotePath]":
        below = self._below()
        if not below and self.key:
            raise FileNotFoundError(2, "no such folder", str(self))
        for name in dict.fromkeys(name.partition("/")[0] for name in below):
            yield self / name

    def glob(self, pattern: str) -> "Iterator[RemotePath]":
        """What lies below, by a pattern without `**`, in the order of names."""
        parts = pattern.split("/")
        found = {}
        for name in self._below():
            levels = name.split("/")
            if len(levels) >= len(parts) and all(map(fnmatch.fnmatchcase, levels, parts)):
                found["/".join(levels[: len(parts)])] = None
        for name in found:
            yield self / name

    def rglob(self, pattern: str) -> "Iterator[RemotePath]":
        """The objects below, at any depth, whose last name fits."""
        for name in self._below():
            if fnmatch.fnmatchcase(name.rpartition("/")[2], pattern):
                yield self / name

    def walk(self, *, top_down: bool = True, on_error: Any = None) -> Iterator[Any]:
        del top_down, on_error
        folders: dict[str, tuple[list[str], list[str]]] = {"": ([], [])}
        for name in self._below():
            *above, last = name.split("/")
            for depth, inner in enumerate(above):
                place = "/".join(above[:depth])
                if inner not in folders[place][0]:
                    folders[place][0].append(inner)
                folders.setdefault("/".join(above[: depth + 1]), ([], []))
            folders["/".join(above)][1].append(last)
        for place, (inner, files) in folders.items():
            yield (self / place if place else self), inner, files

    # Reading and writing.

    def read_bytes(self) -> bytes:
        found = self._wait(self._store().read(self.key))
        if found.state != "value":
            if self.is_dir():
                raise IsADirectoryError(21, "is a folder", str(self))
            raise FileNotFoundError(2, "no such object", str(self))
        return found.value

    def read_range(self, start: int, size: int) -> bytes:
        """So many bytes of an object, which must be there."""
        read = self._store().read(self.key, byte_range=slice(start, start + size))
        found = self._wait(read)
        if found.state != "value":
            raise FileNotFoundError(2, "no such object", str(self))
        return found.value

    def read_text(self, encoding: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8")

    def write_bytes(self, data: Any) -> int:
        if not self.key:
            raise IsADirectoryError(21, "is a bucket", str(self))
        size = memoryview(data).nbytes
        if size > MAX_OBJECT:
            raise StorageError(27, f"{size} bytes, an object has at most {MAX_OBJECT}", str(self))
        self._wait(self._store().write(self.key, bytes(data)))
        return size

    def write_text(self, data: str, encoding: str | None = None, errors: Any = None) -> int:
        del errors
        return self.write_bytes(data.encode(encoding or "utf-8"))

    def touch(self, *, exist_ok: bool = True) -> None:
        if not exist_ok or not self.is_file():
            self.write_bytes(b"")

    def open(self, mode: str = "r", *, encoding: str | None = None, **kwargs: Any) -> IO:
        """Reads the whole object at once; writes it when the file is closed without an error."""
        del kwargs
        kind = mode.replace("b", "").replace("t", "")
        if kind not in ("r", "w"):
            raise ValueError(f"{self}: mode {mode!r}: objects are read whole or written whole")
        raw = io.BytesIO(self.read_bytes()) if kind == "r" else _Written(self)
        return raw if "b" in mode else _Text(raw, encoding or "utf-8", newline="")

    def compare_and_write(self, data: bytes, generation: bytes) -> bytes | None:
        """Writes, if the object is still as `generation` says; its new generation, else None."""
        stamp = self._wait(self._store().write(self.key, data, if_equal=generation))
        return stamp.generation or None

    def read_generation(self) -> tuple[bytes | None, bytes]:
        """The content, None if there is none, and its generation for `compare_and_write`."""
        found = self._wait(self._store().read(self.key))
        return (found.value if found.state == "value" else None), found.stamp.generation

    # Changing what is there.

    def mkdir(self, mode: Any = None, parents: bool = False, exist_ok: bool = False) -> None:
        del mode, parents
        if not exist_ok and self.exists():
            raise FileExistsError(17, "is there already", str(self))

    def unlink(self, missing_ok: bool = False) -> None:
        if not missing_ok and not self.is_file():
            raise FileNotFoundError(2, "no such object", str(self))
        self._wait(self._store().write(self.key, None))

    def rmdir(self) -> None:
        if self._below():
            raise OSError(39, "the folder is not empty", str(self))

    def rmtree(self, missing_ok: bool = False) -> None:
        below = self._below()
        if not below and not missing_ok and not self.is_file():
            raise FileNotFoundError(2, "no such folder", str(self))
        store = self._store()
        for future in [store.write(self._prefix + name, None) for name in below]:
            self._wait(future)
        self._wait(store.write(self.key, None))

    def copy(self, dst: Any, overwrite: bool = False) -> Any:
        target = path(dst)
        if not overwrite and target.exists():
            raise FileExistsError(17, "is there already", str(target))
        target.write_bytes(self.read_bytes())
        return target

    def rename(self, target: Any) -> Any:
        raise NotImplementedError(f"{self}: objects are not renamed, to {target} or anywhere")

    replace = rename


AnyPath = pathlib.Path | RemotePath
epath.register_path_cls(tuple(f"{one}://" for one in SCHEMES))(RemotePath)


class _Written(io.BytesIO):
    """A file that becomes an object when it is closed, unless by an error."""

    def __init__(self, target: RemotePath):
        super().__init__()
        self._target: RemotePath | None = target

    def __exit__(self, kind: type[BaseException] | None, *rest: types.TracebackType | Any) -> None:
        if kind is not None:
            self.abandon()
        self.close()

    def abandon(self) -> None:
        self._target = None

    def close(self) -> None:
        target, self._target = self._target, None
        if target is not None:
            target.write_bytes(self.getbuffer())
        super().close()


class _Text(io.TextIOWrapper):
    """Text of an object, likewise."""

    def __exit__(self, kind: type[BaseException] | None, *rest: types.TracebackType | Any) -> None:
        if kind is not None and isinstance(self.buffer, _Written):
            self.buffer.abandon()
        self.close()


def _after(prefix: str) -> str:
    """The first name that does not begin with the prefix, which ends with a slash."""
    return prefix[:-1] + chr(ord("/") + 1)


def lost(where: str | os.PathLike, error: Exception) -> StorageError | None:
    """An error of a library that used the storage at `where`, if the storage is what failed."""
    if isinstance(error, StorageError):
        return error
    if not is_remote(where):
        return None
    words = ("retry attempts failed", *(word for words, _ in _REASONS for word in words))
    return _error(where, error) if any(word in str(error) for word in words) else None


_REASONS = (
    (("NoSuchBucket", "NOT_FOUND"), "there is no bucket of this name; make it first"),
    (
        ("UNAUTHENTICATED", "InvalidAccessKeyId", "SignatureDoesNotMatch", "response_code='401'",
         "Failed to get credentials", "ExpiredToken", "InvalidToken"),
        "no credentials, or wrong ones; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3, "
        "GOOGLE_APPLICATION_CREDENTIALS for gs, or log in with the cloud's tool",
    ),
    (
        ("PERMISSION_DENIED", "AccessDenied", "response_code='403'"),
        "no permission: it is read-only for these credentials, or there are none",
    ),
    # A conditional write that was done, and is refused when it is made again.
    (("ALREADY_EXISTS: Error writing",), "the storage has lost its answer to a write"),
)  # fmt: skip


def _error(where: str | os.PathLike, error: Exception) -> StorageError:
    """What TensorStore raises, as an error that names the address and the way out."""
    text = str(error)
    for words, reason in _REASONS:
        if any(word in text for word in words):
            return StorageError(13, reason, str(where))
    first = text.strip().splitlines()[0][:200] if text.strip() else type(error).__name__
    return StorageError(5, f"the storage does not answer ({first})", str(where))
