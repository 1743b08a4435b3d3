"""Starts launch.train as several processes of one run, each with fake CPU devices of its own."""

import multiprocessing
import os
import pathlib
import signal
import socket
import time

from tests.launch import commands

_SERVER = multiprocessing.get_context("forkserver")


class Job:
    """Processes of `python -m launch.train FLAGS`; with several, they find each other.

    As a context manager it leaves none behind.
    """

    def __init__(
        self, folder: pathlib.Path, flags, processes: int = 1, devices: int = 4, patch=None,
        own=None, late=(),
    ):  # fmt: skip
        """
        Args:
          devices: of each process.
          patch: called in each process before the command.
          own: {process: patch} in the place of that.
          late: processes that `start` starts.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._outputs = [folder / f"{i}.txt" for i in range(processes)]
        together = ()
        if processes > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                address = f"localhost:{free.getsockname()[1]}"
            together = (f"--coordinator={address}", f"--num_processes={processes}")
        self.processes = [None] * processes
        self._words = ["launch.train", *map(str, flags), *together]
        self._devices, self._patch, self._own = devices, patch, own or {}
        for i in range(processes):
            if i not in late:
                self.start(i)

    def start(self, process: int) -> None:
        """Starts a process, for the first time or again."""
        several = [f"--process_id={process}"] if len(self.processes) > 1 else []
        output = [str(self._outputs[process])] * 2
        patch = self._own.get(process, self._patch)
        started = _SERVER.Process(
            target=commands.enter, args=(self._words + several, output, self._devices, patch)
        )
        started.start()
        self.processes[process] = started

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.kill()

    def wait(self, seconds: float = 240) -> list[int]:
        """The exit codes."""
        end = time.monotonic() + seconds
        for process in filter(None, self.processes):
            process.join(max(0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes if process]
        assert None not in codes, self.text()
        return codes

    def signal(self, number: int, process: int = 0) -> None:
        os.kill(self.processes[process].pid, number)

    def kill(self) -> None:
        """All of them, at once and without notice."""
        for process in filter(None, self.processes):
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            process.join()

    def text(self, process: int | None = None) -> str:
        """What was printed, by one or by all."""
        some = self._outputs if process is None else self._outputs[process : process + 1]
        return "\n".join(path.read_text() for path in some if path.exists())

    def wait_for(self, found, seconds: float = 240):
        """Waits until `found()` is true, for as long as all processes live; gives it."""
        end = time.monotonic() + seconds
        while not (result := found()):
            assert time.monotonic() < end, self.text()
            assert all(p.is_alive() for p in self.processes if p), self.text()
            time.sleep(0.01)
        return result


def steps(workdir: pathlib.Path) -> int:
    """Lines of metrics.jsonl so far."""
    file = workdir / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0
