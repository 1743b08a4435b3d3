"""The folder of a run: whose it is, and its states, written in the background while it trains.

A state is the whole TrainState. It gets its name when it is whole, so what a killed process left
never hides an older one; and it is read onto any mesh, by any number of processes.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from longlive_jax import config as config_lib
from longlive_jax.checkpoints import workdir
from longlive_jax.errors import InputError
from longlive_jax.files import folders
from longlive_jax.training.state import TrainState

_DATA = ("cached", "max_chunks_per_shot", "single_shot", "allow_padding", "min_chunks")
_TRAIN = ("seed", "batch_size", "accumulation", "latent_frames", "teacher_forcing",
          "context_levels", "text_encoder")  # fmt: skip
_VIDEO = ("height", "width", "shift", "image_to_video")
_RINGS = ("buckets", "slots", "positions")
_FULL = ("No space left", "ENOSPC", "Disk quota", "EDQUOT", "File too large", "EFBIG")


def settings(cfg: config_lib.Config, data: str) -> dict[str, Any]:
    """What a run cannot be continued with another value of, by the names of the flags.

    The mesh is not among them, nor what only later steps depend on, as the learning rate.

    Args:
      data: what tells this training data from other.
    """
    t = cfg.train
    names = {"data": _DATA, "train": _TRAIN, "video": _VIDEO, "model": vars(cfg.model)}
    if t.text_encoder:
        names["umt5"] = vars(cfg.umt5)
    values = {f"{s}.{k}": getattr(getattr(cfg, s), k) for s in names for k in names[s]}
    values |= {
        "dtype": cfg.dtype,
        "the training data": data,
        # These decide which arrays the optimiser has.
        "train.beta1 == 0": t.beta1 == 0,
        "train.weight_decay == 0": t.weight_decay == 0,
        "train.error_recycling.enabled": t.error_recycling.enabled,
    }
    if t.error_recycling.enabled:
        rings = {k: getattr(t.error_recycling, k) for k in _RINGS}
        values |= {f"train.error_recycling.{k}": v for k, v in rings.items()}
    return values


@contextlib.contextmanager
def claimed(
    root: pathlib.Path, wanted: Mapping[str, Any], checkpoint: str | None
) -> Iterator[None]:
    """Makes a run's folder, or refuses one that is another run's; holds its lock meanwhile.

    Args:
      wanted: of `settings`.
      checkpoint: where the run takes its other parts from; None: from where it did.

    Raises:
      InputError: it holds a run with other settings, or something else, or another process trains
        in it, or it cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        strangers = [] if workdir.is_run(root) else [
            p.name for p in root.iterdir() if not p.name.startswith(".")
        ]  # fmt: skip
    except OSError as error:
        raise InputError(f"--workdir={root}: {error.strerror}; give a folder to write") from error
    if strangers and jax.process_index() == 0:
        raise InputError(
            f"--workdir={root}: holds {strangers[0]!r} and no training run; give a new folder"
        )
    had = workdir.read(root) if workdir.is_run(root) else {"settings": wanted, "checkpoint": None}
    _compare(root, had["settings"], json.loads(json.dumps(wanted)))
    if jax.process_index() != 0:
        yield
        return
    with folders.locked(root, f"--workdir={root}: another process trains in it"):
        where = os.path.abspath(checkpoint) if checkpoint else had["checkpoint"]
        workdir.write(root, wanted, where)
        yield


def _compare(root, had, has):
    had = {config_lib.renamed(name): value for name, value in had.items()}
    for name in sorted({*had, *has}):
        if had.get(name) != has.get(name):
            raise InputError(
                f"--workdir={root}: holds a run with {name}={had.get(name)!r}, this one has "
                f"{has.get(name)!r}; give the same again, or a new --workdir"
            )


class Checkpoints:
    """The states of a run, in `<root>/checkpoints`. Every process calls every method.

    The last `keep_last` are kept, and those of every step that `keep_every` divides.
    """

    def __init__(self, root: pathlib.Path, cfg: config_lib.Train):
        self._path = root / workdir.STATES
        policies = ocp.training.preservation_policies
        keep = [policies.LatestN(cfg.keep_last)]
        if cfg.keep_every:
            keep.append(policies.EveryNSteps(cfg.keep_every))
        try:
            self._saved = ocp.training.Checkpointer(
                self._path,
                preservation_policy=policies.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=True,  # what killed processes left
            )
        except (ValueError, KeyError, TypeError) as error:
            raise workdir.damaged(self._path, error) from error
        self._saving: tuple[int, ocp.AsyncResponse] | None = None

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
        try:
            return self._saved.load(self.latest, abstract)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise workdir.damaged(self._path / str(self.latest), error) from error

    def save(self, step: int, state: TrainState) -> None:
        """Copies the state to the host, and writes it in the background.

        When it returns, the state may be donated. Waits for the state before to be written.

        Raises:
          InputError: as `check`.
        """
        self.wait()
        with self._explained(step):
            self._saving = step, self._saved.save_async(step, state, force=True)

    def check(self) -> None:
        """Looks whether the last save has failed by now.

        Raises:
          InputError: it has; the disk is full. Older states are as they were.
        """
        self._finish(0)

    def wait(self) -> None:
        """Waits until all is on disk. Errors as `check`."""
        self._finish(None)

    def close(self) -> None:
        """Waits, and ends. Errors as `check`."""
        self.wait()
        self._saved.close()

    def _finish(self, timeout):
        if self._saving is None:
            return
        step, response = self._saving
        with self._explained(step):
            try:
                response.result(timeout=timeout)
            except TimeoutError:
                if timeout is None:
                    raise
                return
            self._saving = None

    @contextlib.contextmanager
    def _explained(self, step):
        try:
            yield
        except Exception as error:
            self._saving = None
            reason = str(error)
            if not any(words in reason for words in _FULL):
                raise
            whole = [c.step for c in self._saved.checkpoints if c.step != step]
            left = f"step {whole[-1]} is whole, and" if whole else "nothing was saved before, so"
            raise InputError(
                f"{self._path}: no space for the state of step {step} ({_first_line(reason)}); "
                f"{left} the same command goes on from there; free some space first"
            ) from error


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:200]
