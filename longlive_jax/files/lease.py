"""The lock of a folder on object storage: an object that its holder renews.

Whoever finds the lock of another watches it: if it changes, its holder lives, and the folder is
taken; if it stays as it is for EXPIRES seconds of the watcher's own clock, its holder is gone. No
two clocks are compared. The lock of a process of this machine that has ended is taken at once. All
writes are conditional, so that of two who take it one fails.
"""

import contextlib
import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator

from longlive_jax.errors import InputError, StorageError
from longlive_jax.files.remote import RemotePath

FILE = ".lock"
RENEWS, EXPIRES = 10.0, 45.0  # seconds
_POLL = 1.0
_LOST: set[str] = set()  # folders whose locks others have taken


@contextlib.contextmanager
def held(folder: RemotePath, taken: str) -> Iterator[None]:
    """Holds the lock of a folder until the block ends.

    Raises:
      InputError: a process that lives has it: `taken`, and the way out.
      StorageError: the storage refuses, or does not answer.
    """
    lock = folder / FILE
    generation = _acquire(lock, taken)
    _LOST.discard(str(folder))
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(lock, generation, ended), daemon=True)
    renewing.start()
    try:
        yield
    except StorageError:  # it does not answer: it is not asked to give the lock back, which expires
        ended.set()
        raise
    except BaseException:
        _give_back(lock, ended, renewing)
        raise
    _give_back(lock, ended, renewing)


def check(folder: object) -> None:
    """Refuses to go on in a folder whose lock this process had, and another one has taken.

    Raises:
      StorageError: that is so. This process was stopped, or cut off, for EXPIRES seconds.
    """
    if str(folder) in _LOST:
        raise StorageError(
            errno.EBUSY,
            f"another process has taken it over, as this one did not renew its lock for "
            f"{EXPIRES:.0f} seconds",
            str(folder),
        )


def _give_back(lock: RemotePath, ended: threading.Event, renewing: threading.Thread) -> None:
    ended.set()
    renewing.join()
    with contextlib.suppress(StorageError):
        if _holder(lock.read_generation()[0]).get("token") == _token():
            lock.unlink(missing_ok=True)


def _acquire(lock: RemotePath, taken: str) -> bytes:
    content, generation = lock.read_generation()
    since = time.monotonic()
    while True:
        waited = time.monotonic() - since
        if content is None or _is_gone(_holder(content)) or waited > EXPIRES:
            ours = _content()
            made = lock.compare_and_write(ours, generation)
            if made is not None:
                return made
            found, now = lock.read_generation()
            if found == ours:  # it was written, and the answer was lost
                return now
        else:
            found, now = lock.read_generation()
        if now != generation and found is not None:
            holder = _holder(found)
            raise InputError(
                f"{taken} ({holder.get('host', 'unknown')}, process {holder.get('process', '?')}); "
                "wait for it, or give another"
            )
        if now != generation:  # its holder has just ended
            content, generation, since = found, now, time.monotonic()
            continue
        time.sleep(_POLL)


def _renew(lock: RemotePath, generation: bytes, ended: threading.Event) -> None:
    """Shows that this process lives. Storage that does not answer is asked again later."""
    while not ended.wait(RENEWS):
        with contextlib.suppress(StorageError):
            made = lock.compare_and_write(_content(), generation)
            if made is None:  # by an answer that was lost, or by somebody who took us for gone
                found, now = lock.read_generation()
                if _holder(found).get("token") != _token():
                    _LOST.add(str(lock.parent))
                    return
                made = now
            generation = made


_TOKENS: dict[int, str] = {}


def _token() -> str:
    return _TOKENS.setdefault(os.getpid(), secrets.token_hex(8))


def _content() -> bytes:
    return json.dumps(
        {"host": socket.gethostname(), "process": os.getpid(), "token": _token(),
         "renewal": secrets.token_hex(4)}
    ).encode()  # fmt: skip


def _holder(content: bytes | None) -> dict:
    try:
        holder = json.loads(content or b"{}")
        return holder if isinstance(holder, dict) else {}
    except ValueError:
        return {}


def _is_gone(holder: dict) -> bool:
    """Whether this is a process of this machine that has ended, or the content is nobody's."""
    if holder.get("host") != socket.gethostname():
        return "token" not in holder
    try:
        os.kill(int(holder["process"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return False
    return False
