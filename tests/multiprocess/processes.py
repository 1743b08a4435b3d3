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
        self, folder: pathlib.Path, flags, processes: int = 1, devices: int = 4, patch=None
    ):
        """devices: of each process. patch(): called in each process before the command."""
        folder.mkdir(parents=True, exist_ok=True)
        self._outputs = [folder / f"{i}.txt" for i in range(processes)]
        together = ()
        if processes > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                address = f"localhost:{free.getsockname()[1]}"
            together = (f"--coordinator={address}", f"--num_processes={processes}")
        self.processes = []
        for i, output in enumerate(self._outputs):
            words = ["launch.train", *map(str, flags), *together]
            words += [f"--process_id={i}"] if together else []
            process = _SERVER.Process(
                target=commands.enter, args=(words, [str(output)] * 2, devices, patch)
            )
            process.start()
            self.processes.append(process)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.kill()

    def wait(self, seconds: float = 240) -> list[int]:
        """The exit codes."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        assert None not in codes, self.text()
        return codes

    def signal(self, number: int, process: int = 0) -> None:
        os.kill(self.processes[process].pid, number)

    def kill(self) -> None:
        """All of them, at once and without notice."""
        for i, process in enumerate(self.processes):
            if process.is_alive():
                self.signal(signal.SIGKILL, i)
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
            assert all(p.is_alive() for p in self.processes), self.text()
            time.sleep(0.01)
        return result


def steps(workdir: pathlib.Path) -> int:
    """Lines of metrics.jsonl so far."""
    file = workdir / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0
