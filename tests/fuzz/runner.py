"""Reads mutated files in forked children, and counts what comes of it.

A child reads one file after another and says so in a pipe; where it dies, hangs or eats memory, the
next child begins with the next file. What went wrong is tried once more, in a child of its own.
"""

import dataclasses
import os
import pathlib
import pickle
import random
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from longlive_jax.errors import InputError
from tests.fuzz.kind import Kind
from tests.fuzz.mutate import mutated

OK, REFUSED = "ok", "refused"
BAD = ("traceback", "hang", "memory", "abort", "silent")
SECONDS = 20  # of the wall clock, a file
MEMORY = 1500 << 20  # bytes that a reader may take beyond those of reading the seeds
_BATCH = 64  # files a child; what is left of one is no burden for long
_POLL = 0.02  # seconds between looks at a child's memory


@dataclasses.dataclass(frozen=True)
class Outcome:
    number: int  # of the mutation
    what: str
    detail: str = ""


def mutate(kind: Kind, seeds: Sequence[pathlib.Path], seed: int, number: int, to: pathlib.Path):
    """Writes mutation `number` below the folder `to`.

    Returns:
      its path; the seed's place in `seeds`; whether only bytes were changed.
    """
    draw = random.Random(f"{seed}:{kind.name}:{number}")
    which = draw.randrange(len(seeds))
    path = to / seeds[which].name
    if seeds[which].is_dir():
        shutil.copytree(seeds[which], path)
        if kind.outer and draw.random() < 0.4:
            draw.choice(kind.outer)(draw, path)
            return path, which, False
        files = sorted(p for p in path.rglob("*") if p.is_file())
        file = draw.choice(files)
        others = [p.read_bytes() for p in files]
    else:
        shutil.copyfile(seeds[which], path)
        file, others = path, [s.read_bytes() for s in seeds if s.is_file()]
    data = file.read_bytes()
    inner = [change for end, change in kind.inner if file.name.endswith(end)]
    by_bytes = not inner or draw.random() < 0.4
    new = mutated(draw, data, others) if by_bytes else draw.choice(inner)(draw, data)
    file.write_bytes(new)
    return path, which, by_bytes


class Runner:
    """Runs mutations of one kind.

    Args:
      folder: for seeds and mutated files.
      keep: a folder for the files that went wrong, or None.
    """

    def __init__(self, kind: Kind, folder: pathlib.Path, seed: int, keep: pathlib.Path | None):
        self._kind, self._seed, self._keep = kind, seed, keep
        self._seeds_folder, self._work = folder / "seeds", folder / "work"
        self._seeds_folder.mkdir(parents=True)
        self._seeds = _in_child(lambda: kind.seeds(self._seeds_folder))

    def run(self, numbers: Sequence[int]) -> list[Outcome]:
        """Outcomes in the order of `numbers`.

        Raises:
          RuntimeError: a seed cannot be read.
        """
        outcomes: list[Outcome] = []
        size = 1 if self._kind.apart else _BATCH
        while len(outcomes) < len(numbers):
            batch = numbers[len(outcomes) : len(outcomes) + size]
            for outcome in self._child(batch):
                if outcome.what in BAD and len(batch) > 1:
                    outcome = self._child([outcome.number])[0]
                if outcome.what in BAD and self._keep is not None:
                    self.keep(outcome.number)
                outcomes.append(outcome)
        return outcomes

    def keep(self, number: int) -> None:
        """Writes a mutated file to the folder for such."""
        to = self._keep / f"{self._kind.name}-{number}"
        shutil.rmtree(to, ignore_errors=True)
        to.mkdir(parents=True)
        mutate(self._kind, self._seeds, self._seed, number, to)

    def _child(self, numbers: Sequence[int]) -> list[Outcome]:
        """Outcomes of the first of `numbers`, at least one: all up to one that ends the child."""
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir()
        reader, writer = os.pipe()
        sys.stdout.flush(), sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            self._be_child(numbers, writer)
        os.close(writer)
        killed, outcomes = "", []
        base = began = None
        with os.fdopen(reader, "rb") as pipe:
            while True:
                ready, _, _ = select.select([pipe], [], [], _POLL)
                if ready:
                    try:
                        message = pickle.load(pipe)
                    except EOFError:
                        break
                    if isinstance(message, Outcome):
                        outcomes.append(message)
                    began, base = time.monotonic(), base or _resident(pid)
                elif began is not None and not killed:
                    if time.monotonic() - began > SECONDS:
                        killed = "hang"
                    elif _resident(pid) - base > MEMORY:
                        killed = "memory"
                    if killed:
                        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if began is None:
            raise RuntimeError(f"{self._kind.name}: a seed cannot be read (status {status})")
        if len(outcomes) < len(numbers):
            number = numbers[len(outcomes)]
            code = os.waitstatus_to_exitcode(status)
            if self._kind.apart and not killed and code == 2:
                outcomes.append(Outcome(number, REFUSED))
            else:
                outcomes.append(Outcome(number, killed or "abort", f"exit code {code}"))
        return outcomes

    def _be_child(self, numbers, writer):
        """Reads the seeds, then one mutated file after another. Does not return."""
        null = os.open(os.devnull, os.O_RDWR)
        if not os.environ.get("FUZZ_SHOW"):
            os.dup2(null, 1), os.dup2(null, 2)
        code = 0
        with os.fdopen(writer, "wb") as pipe:
            try:
                values = [] if self._kind.apart else [self._kind.read(s) for s in self._seeds]
                pickle.dump("ready", pipe), pipe.flush()
                for number in numbers:
                    pickle.dump(self._one(number, values), pipe), pipe.flush()
            except BaseException:
                traceback.print_exc()
                code = 1
        os._exit(code)

    def _one(self, number, values) -> Outcome:
        folder = self._work / str(number)
        folder.mkdir()
        path, which, by_bytes = mutate(self._kind, self._seeds, self._seed, number, folder)
        try:
            got = self._kind.read(path)
        except InputError as error:
            return Outcome(number, REFUSED, str(error)[:200])
        except MemoryError as error:
            return Outcome(number, "memory", _last_lines(error))
        except BaseException as error:
            return Outcome(number, "traceback", _last_lines(error))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if self._kind.silent and by_bytes and got != values[which]:
            return Outcome(number, "silent", "it reads, and as other values")
        return Outcome(number, OK)


def _in_child(call: Callable[[], Any]) -> Any:
    """What `call` returns; what it imports and starts (JAX's threads) is gone with its process."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with os.fdopen(writer, "wb") as pipe:
            try:
                pickle.dump(call(), pipe)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        content = pipe.read()
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("seeds could not be written")
    return pickle.loads(content)


def _last_lines(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "longlive_jax" in f.filename and "tests" not in f.filename]
    where = f"{pathlib.Path(ours[-1].filename).name}:{ours[-1].lineno}: " if ours else ""
    return f"{where}{type(error).__name__}: {str(error)[:200]}"


def _resident(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0
