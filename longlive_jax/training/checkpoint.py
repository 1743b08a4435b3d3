"""The folder of a run: its lock, and its states, written in the background while it trains.

A state is the whole TrainState. It gets its name when it is whole, so what a killed process left
never hides an older one; and it is read onto any mesh, by any number of processes.
"""

import concurrent.futures
import contextlib
import pathlib
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from longlive_jax import config as config_lib
from longlive_jax.checkpoints import workdir
from longlive_jax.errors import InputError
from longlive_jax.files import folders, lease, remote
from longlive_jax.files.orbax import check_read, ocp
from longlive_jax.files.remote import AnyPath, RemotePath
from longlive_jax.training.plan import Plan
from longlive_jax.training.state import NetworkState, TrainState

_FULL = ("No space left", "ENOSPC", "Disk quota", "EDQUOT", "File too large", "EFBIG")


@contextlib.contextmanager
def acquire(
    root: AnyPath,
    settings: Mapping[str, Any],
    network: str | None,
    checkpoint: str | None = None,
    base: str | None = None,
) -> Iterator[None]:
    """Makes a run's folder, or refuses one that is another run's; keeps its lock meanwhile.

    Args:
      settings: what the run cannot be continued with another value of, by the names of the flags.
      network: the one that a sampler takes from this run; None: it trains none.
      checkpoint: where the run takes its other parts from; None: from where it did.
      base: where the frozen transformer is from, below what the network trains; None: it is whole.

    Raises:
      InputError: it holds a run with other settings, or something else, or another process trains
        in it, or it cannot be written.
    """
    if jax.process_index() == 0:
        folders.make(root, "--workdir", "training run", lambda _: workdir.is_run(root))
    old = workdir.read(root) if workdir.is_run(root) else workdir.Run(settings, None, None)
    had = {config_lib.renamed(name): value for name, value in old.settings.items()}
    folders.check_settings(f"--workdir={root}", had, settings)
    if jax.process_index() != 0:
        yield
        return
    with folders.locked(root, f"--workdir={root}: another process trains in it"):
        where = remote.absolute(checkpoint) if checkpoint else old.checkpoint
        below = remote.absolute(base) if base else None
        workdir.write(root, workdir.Run(settings, where, network, below))
        yield


class Checkpoints:
    """The states of a run, in `<root>/checkpoints`. Every process calls every method.

    The last `keep_last` are kept, and those of every step that `keep_every` divides.
    """

    def __init__(self, root: AnyPath, plan: Plan):
        self._root, self._path = root, root / workdir.STATES
        elsewhere = isinstance(root, RemotePath) and workdir.is_run(root)
        self._begun = workdir.read(root) if elsewhere else None  # for `rescue`
        policies = ocp.training.preservation_policies
        latest, every = policies.LatestN(plan.keep_last), plan.keep_every
        keep = policies.AnyPreservationPolicy(
            [latest, policies.EveryNSteps(every)] if every else [latest]
        )
        try:
            self._saved = ocp.training.Checkpointer(
                str(self._path),
                preservation_policy=keep,  # pyright: ignore[reportArgumentType]
                cleanup_tmp_directories=True,  # what killed processes left
            )
        except (ValueError, KeyError, TypeError) as error:
            raise workdir.damaged(self._path, error) from error
        # The step of the last save, and its end; or that of this process's part, where it failed.
        self._saving: tuple[int, concurrent.futures.Future] | None = None
        _hear_failures(self._saved, self._failed)

    @property
    def latest(self) -> int | None:
        """The newest whole state's step."""
        latest = self._saved.latest
        return None if latest is None else latest.step

    def restore(self, abstract: TrainState) -> TrainState:
        """The newest state, as `abstract` says: its shardings may be another mesh's.

        Raises:
          InputError: it is damaged.
        """
        path = self._path / str(self.latest)
        try:
            flat = workdir.is_flat(path)
            loaded = self._saved.load(self.latest, _flat(abstract) if flat else abstract)
            check_read(loaded)
            return _of_flat(loaded) if flat else loaded
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # the library raises bare Exception
            raise workdir.damaged(path, error) from error

    def save(self, step: int, state: TrainState) -> None:
        """Copies the state to the host, and writes it in the background.

        When it returns, the state may be donated. Waits for the state before to be written.

        Raises:
          InputError, StorageError: as `check`; or another process has taken the folder over.
        """
        lease.check(self._root)
        self.wait()
        with self._explained(step):
            ended = concurrent.futures.Future()
            self._saving = step, ended
            response = self._saved.save_async(step, state, force=True)
            if response is None:
                self._saving = None
                return
        threading.Thread(target=_wait, args=(response, ended), daemon=True).start()

    def check(self) -> None:
        """Looks whether the last save has failed by now.

        Raises:
          InputError: it has; the disk is full. Older states are as they were.
          StorageError: it has; object storage refuses, or does not answer. So are they then.
        """
        self._finish(0)

    def wait(self) -> None:
        """Waits until all is on disk. Errors as `check`."""
        self._finish(None)

    def rescue(self, step: int, state: TrainState) -> pathlib.Path | None:
        """Writes a state to a local folder, from which the run can go on, as its own is lost.

        Returns:
          the folder; None: the processes have none in common, or it cannot be written.
        """
        if jax.process_count() > 1:
            return None
        try:
            folder = pathlib.Path(tempfile.mkdtemp(prefix="longlive_jax_rescued-"))
            ocp.save(str(folder / workdir.STATES / str(step)), state)
            if self._begun is not None:
                workdir.write(folder, self._begun)
            return folder
        except Exception:  # the error to raise is the storage's
            return None

    def close(self) -> None:
        """Waits, and ends. Errors as `check`."""
        self.wait()
        self._saved.close()

    def _finish(self, timeout):
        if self._saving is None:
            return
        step, ended = self._saving
        with self._explained(step):
            try:
                ended.result(timeout)
            except TimeoutError:
                if ended.done():
                    raise
                return
            self._saving = None

    def _failed(self, error: Exception) -> None:
        if self._saving is not None:
            _end(self._saving[1], error)

    @contextlib.contextmanager
    def _explained(self, step):
        try:
            yield
        except Exception as error:
            self._saving = None
            if (lost := remote.lost(self._path, error)) is not None:
                raise lost from error
            reason = str(error)
            if not any(words in reason for words in _FULL):
                raise
            whole = [c.step for c in self._saved.checkpoints if c.step != step]
            left = f"step {whole[-1]} is whole, and" if whole else "nothing was saved before, so"
            raise InputError(
                f"{self._path}: no space for the state of step {step} ({_first_line(reason)}); "
                f"{left} the same command goes on from there; free some space first"
            ) from error


def _wait(response: ocp.AsyncResponse, ended: concurrent.futures.Future) -> None:
    try:
        response.result()
    except Exception as error:
        _end(ended, error)
    else:
        _end(ended)


def _end(ended: concurrent.futures.Future, error: Exception | None = None) -> None:
    with contextlib.suppress(concurrent.futures.InvalidStateError):  # it has ended before
        if error is None:
            ended.set_result(None)
        else:
            ended.set_exception(error)


def _hear_failures(saved: ocp.training.Checkpointer, hear: Callable[[Exception], None]) -> None:
    """Calls `hear` with what fails of a save in the background, at once.

    A process whose part fails then waits for the others, which wait for it: the library's result
    has the error only after its limit of 20 minutes. What waits for the part is private to it.
    """
    manager = getattr(saved, "_manager", None)
    wait = getattr(manager, "_wait_for_checkpointers", None)
    if wait is None:
        return

    def wait_and_tell() -> None:
        try:
            wait()
        except Exception as error:
            hear(error)
            raise

    manager._wait_for_checkpointers = wait_and_tell  # pyright: ignore


# States of one network, as they were written before a run could have several.


def _flat(abstract: TrainState) -> dict[str, Any]:
    ((name, network),) = abstract.networks.items()
    assert name == workdir.FLAT_NETWORK, name
    return {
        "step": abstract.step,
        "params": network.params,
        "optimizer": network.opt_state,
        "average": network.ema,
        "errors": abstract.carried,
        "bad": abstract.bad,
    }


def _of_flat(flat: dict[str, Any]) -> TrainState:
    network = NetworkState(flat["params"], flat["optimizer"], flat["average"])
    return TrainState(flat["step"], {workdir.FLAT_NETWORK: network}, flat["errors"], flat["bad"])


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:200]
