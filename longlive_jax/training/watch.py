"""Which process of a run keeps the others waiting, or has failed: all learn it, and end.

JAX ends every process when one is dead or stopped, since that one sends no heartbeats. A process
that lives and gets no further (a disk that hangs, a decoder that waits) does send them; and one
that ends by an error of its own leaves the others in a collective, whose error names nobody. So
each process publishes every few seconds, in the key-value store of JAX's distributed service, which
stage of the run it is in. The first two compare. What they find, or what a process says of its own
error, ends all processes with the same line and exit code.
"""

import contextlib
import faulthandler
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax._src import distributed

from longlive_jax import mesh as mesh_lib
from longlive_jax.errors import InputError, NotFiniteError, StorageError
from longlive_jax.files import scratch

# Between two looks. A failure is known everywhere after two of them; of 4,096 processes the first
# one answers 1,600 requests of some bytes in a second.
POLL_SECONDS = 5.0
_JUDGES = 2  # processes that compare: one more than could hang
_AT, _CAUSE = "longlive_jax/at/", "longlive_jax/cause"
_NAMED = 8  # processes in a message


class Stage(NamedTuple):
    """Where a process is.

    number: of the stages it has begun: all processes go through the same ones.
    name: what it does there. seconds: for how long so far.
    bounded: whether it lasts no longer than one step, in every run.
    """

    number: int
    name: str
    seconds: float
    bounded: bool
    host: str = ""


class Cause(NamedTuple):
    """Why a run ends: an exit code, and a line that names the process."""

    code: int
    line: str
    processes: tuple[int, ...]


def late(stages: Mapping[int, Stage], limit: float) -> Cause | None:
    """The processes that others have been waiting for, for longer than `limit` seconds.

    stages: of every process, by its number.
    """
    least = min(stage.number for stage in stages.values())
    behind = {p: stage for p, stage in stages.items() if stage.number == least}
    ahead = [stage.seconds for stage in stages.values() if stage.number > least]
    seconds = min(stage.seconds for stage in behind.values())
    if seconds <= limit or (ahead and max(ahead) <= limit):
        return None
    if ahead:
        who = _processes(behind)
        waiting = f"{len(ahead)} of {len(stages)} processes wait for {who}"
        name = next(iter(behind.values())).name
        return Cause(1, f"{waiting}, in the stage '{name}' for {seconds:.0f} s", tuple(behind))
    stage = next(iter(behind.values()))
    if not stage.bounded:
        return None
    return Cause(
        1,
        f"all {len(stages)} processes have been in the stage '{stage.name}' for {seconds:.0f} s: a "
        "device, or the network between them, hangs",
        (),
    )


def _processes(some: Mapping[int, Stage]) -> str:
    names = [f"{p} ({stage.host})" if stage.host else str(p) for p, stage in some.items()]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"process {', '.join(names[:_NAMED])}{more}"


_current: "_Watch | None" = None


def at(name: str, *, bounded: bool = False) -> None:
    """Begins the next stage of this process; all processes begin the same stages in their order.

    bounded: see Stage.
    """
    if _current is not None:
        _current.at(name, bounded)


@contextlib.contextmanager
def watched(limit: float, code: Callable[[Exception], int]) -> Iterator[None]:
    """Watches the processes of a run meanwhile; a process that is alone is not watched.

    The process ends in here, with a line and an exit code, when another one has failed, or any has
    kept the others waiting for longer than `limit` seconds. An error that leaves the block is
    published to the others. One that another process is likely to have caused leaves it only when
    no such process has been found, after JAX would have ended this one.

    code: the exit code of an error that leaves the block.
    """
    global _current
    if jax.process_count() == 1:
        yield
        return
    client = distributed.global_state.client
    _current = watch = _Watch(client, jax.process_index(), jax.process_count(), limit)
    try:
        yield
    except Exception as error:
        watch.fail(error, code(error))
        raise
    finally:
        watch.stop()
        _current = None


class _Watch:
    def __init__(self, client: Any, process: int, processes: int, limit: float):
        self._client, self._process, self._processes = client, process, processes
        self._limit, self._began = limit, time.monotonic()
        # Replaced as one: a new stage with the time of the old one would be a false alarm.
        self._stage = Stage(0, "begins", 0.0, False, socket.gethostname()), self._began
        self._beat = 0
        self._heard: dict[int, tuple[int, float]] = {}  # the last beat of each process, and when
        self._ended, self._answered = threading.Event(), self._began
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        threading.Thread(target=self._listen, name="watch of process 0", daemon=True).start()

    def at(self, name: str, bounded: bool) -> None:
        stage = self._stage[0]
        stage = stage._replace(number=stage.number + 1, name=name, bounded=bounded)
        self._stage = stage, time.monotonic()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def fail(self, error: Exception, code: int) -> None:
        """Announces to the others why this process ends, once no other process is the cause."""
        if _by_others(error):
            print(
                f"process {self._process}: {_first_line(error)}; waits to learn which process is "
                "lost",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            # The thread ends this process when the cause is known, or JAX does.
            time.sleep(mesh_lib.HEARTBEAT_SECONDS + 3 * POLL_SECONDS)
        self.stop()  # or, where it ends the process at this moment, waits for that
        who = _processes({self._process: self._stage[0]})
        self._announce(Cause(code, f"{who} failed: {_first_line(error)}", (self._process,)))
        self._linger()

    def _run(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            # Without the first process there is no store, and JAX ends this one.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._publish()
                self._answered = time.monotonic()
                if cause := self._cause() or self._judge():
                    self._end(cause)

    def _listen(self) -> None:
        """Names the process that has the store when it is silent: JAX ends this one without."""
        while not self._ended.wait(POLL_SECONDS):
            silent = time.monotonic() - self._answered
            if silent > mesh_lib.HEARTBEAT_SECONDS / 2 + POLL_SECONDS:
                where = distributed.global_state.coordinator_address
                print(
                    f"process 0 ({where}) has not answered for {silent:.0f} s: it is stopped, or "
                    "the network to it is. Soon all processes end",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
                return

    def _publish(self) -> None:
        self._beat += 1
        stage, since = self._stage
        content = [self._beat, *stage._replace(seconds=time.monotonic() - since)]
        key = f"{_AT}{self._process}"
        self._client.key_value_set(key, json.dumps(content), allow_overwrite=True)

    def _cause(self) -> Cause | None:
        try:
            code, line, processes = json.loads(self._client.key_value_try_get(_CAUSE))
            return Cause(code, line, tuple(processes))
        except jax.errors.JaxRuntimeError:  # there is none
            return None

    def _judge(self) -> Cause | None:
        if self._process >= _JUDGES:
            return None
        cause = late(self._stages(self._client.key_value_dir_get(_AT)), self._limit)
        if cause is not None:
            self._announce(cause)
        return cause and self._cause()

    def _stages(self, found: Sequence[tuple[str, str]]) -> dict[int, Stage]:
        """By process, each older by the time since it was heard of."""
        now = time.monotonic()
        stages = dict.fromkeys(
            range(self._processes), Stage(-1, "starts", now - self._began, False)
        )
        for key, text in found:
            process = int(key.rpartition("/")[2])
            beat, *rest = json.loads(text)
            if self._heard.get(process, (None,))[0] != beat:
                self._heard[process] = (beat, now)
            stage = Stage(*rest)
            silent = now - self._heard[process][1]
            stages[process] = stage._replace(seconds=stage.seconds + silent)
        return stages

    def _announce(self, cause: Cause) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was first
            self._client.key_value_set(_CAUSE, json.dumps(cause))

    def _end(self, cause: Cause) -> None:
        """Ends this process, whatever its main thread waits for."""
        way_out = "All processes end; the same command goes on from the last save"
        print(f"error: {cause.line}. {way_out}", file=sys.stderr, flush=True)
        if self._process in cause.processes:
            faulthandler.dump_traceback(file=sys.__stderr__ or 2)
        scratch.remove()
        self._linger()
        sys.stdout.flush()
        os._exit(cause.code)

    def _linger(self) -> None:
        """The first process has the store: the others read in it why they end."""
        if self._process == 0:
            time.sleep(2 * POLL_SECONDS)


# Of errors in collectives and at barriers, which JAX raises by several types.
_COLLECTIVE = re.compile(r"Gloo|NCCL|[Bb]arrier|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED")


def _by_others(error: BaseException | None) -> bool:
    """Whether this may be what a process meets when another one is lost."""
    if isinstance(error, InputError | NotFiniteError | StorageError):
        return False
    while error is not None:
        if _COLLECTIVE.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    if isinstance(error, StorageError):
        text = f"{error.filename}: {error.strerror}"
    return text.splitlines()[0][:500] if text else type(error).__name__
