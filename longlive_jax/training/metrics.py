"""The log of a run: of each step a line of JSON, scalars for TensorBoard, a line on the screen.

A step is reported when the next one has been given to the devices, so that they never wait for it.
"""

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorboardX

from longlive_jax.errors import InputError, StorageError
from longlive_jax.files import versioned
from longlive_jax.files.atomic import atomic_path
from longlive_jax.files.remote import AnyPath
from longlive_jax.files.scratch import Mirror
from longlive_jax.training import cost
from longlive_jax.training.objective import Objective
from longlive_jax.training.plan import Plan
from longlive_jax.training.prefetch import decode_names
from longlive_jax.training.step import StepMetrics

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"
_SYNC_SECONDS = 60  # between what is sent to object storage, beside each saved state


class _Pending(NamedTuple):
    """A step that was given to the devices, whose line is not written yet."""

    number: int
    metrics: StepMetrics
    names: jax.Array | None
    began: float  # when it was given to the devices
    waited: float  # for its data before that, seconds


class Metrics:
    """Every process calls every method; the first one writes.

    Args:
      root: gets metrics.jsonl and tensorboard/. Lines after step `start` are cut off. On object
        storage it gets them now and then: `sync`.
      show: prints a line a step.
    """

    def __init__(
        self,
        root: AnyPath,
        objective: Objective,
        plan: Plan,
        start: int,
        show: Callable[[str], None],
    ):
        self._objective, self._plan, self._show = objective, plan, show
        self._peak = cost.PEAK_TFLOPS.get(objective.mesh.devices.flat[0].device_kind)
        self._pending: _Pending | None = None
        self._start = self._ended = time.perf_counter()
        self._worked = 0.0
        self._file = self._board = None
        if jax.process_index() == 0:
            self._mirror, self._synced, self._lost = Mirror(root), self._start, False
            folder = self._mirror.folder
            self._mirror.fetch(METRICS)
            cut(folder / METRICS, start)
            self._file = (folder / METRICS).open("a", encoding="utf-8")
            self._board = tensorboardX.SummaryWriter(
                str(folder / TENSORBOARD), purge_step=start + 1, flush_secs=10
            )

    def add(
        self,
        number: int,
        metrics: StepMetrics,
        names: jax.Array | None,
        began: float,
        waited: float,
    ) -> dict[str, Any] | None:
        """Takes a step that was just given to the devices; reports the one before it.

        Returns:
          The line of the step before, or None: what `flush` returns.
        """
        # On its way before the next step is given: what is asked for later may come behind that.
        for array in jax.tree.leaves((metrics, names)):
            array.copy_to_host_async()
        line = self.flush()
        self._pending = _Pending(number, metrics, names, began, waited)
        return line

    def flush(self) -> dict[str, Any] | None:
        """Waits for the step that was added last, if that was not done yet, and reports it."""
        if self._pending is None:
            return None
        step, self._pending = self._pending, None
        metrics, names = jax.device_get((step.metrics, step.names))
        now = time.perf_counter()
        seconds = now - max(self._ended, step.began)
        self._ended = now
        self._worked += seconds
        line = self._line(step, metrics, names, seconds)
        due = step.number == self._plan.steps or step.number % self._plan.log_every == 0
        if self._file is not None and self._board is not None and due:
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()
            for name, value in line.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._board.add_scalar(f"train/{name}", value, step.number)
            self._show(self._text(line, metrics))
            if now - self._synced > _SYNC_SECONDS:
                self.sync()
        return line

    def sync(self) -> None:
        """Sends the log as it is to object storage, if the run's folder is there.

        Raises:
          StorageError: it refuses, or does not answer.
        """
        if self._file is not None and self._board is not None:
            self._board.flush()
            self._mirror.sync()
            self._synced = time.perf_counter()

    def lose(self, folder: pathlib.Path | None) -> None:
        """Sends nothing more to object storage that is lost; writes the lines to another folder."""
        self._lost = True
        if self._file is not None and folder is not None:
            (folder / METRICS).write_bytes((self._mirror.folder / METRICS).read_bytes())

    def close(self) -> None:
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()
            if not self._lost:  # of a run that diverged, too
                with contextlib.suppress(StorageError):
                    self._mirror.sync()

    def _line(self, step, metrics, names, seconds):
        line: dict[str, Any] = {"step": step.number}
        objective = self._objective
        for name, of_network in metrics.networks.items():
            fields = {"loss": of_network.loss, "grad_norm": of_network.grad_norm}
            fields |= objective.fields(name, of_network.values)
            line |= {self._field(name, key): value for key, value in fields.items()}
        line = {name: _json(value) for name, value in (line | metrics.carried).items()}
        line["seconds"] = round(seconds, 6)
        if names is not None:
            line["samples"] = decode_names(names)
        line |= {"bad_steps": int(metrics.bad[0]), "bad_in_row": int(metrics.bad[1])}
        tokens, flops = objective.cost(tuple(metrics.networks))
        if tokens:
            line["tokens_per_second"] = round(tokens / seconds, 3)
        if flops:
            tflops = flops / seconds / objective.mesh.size / 1e12
            line["tflops_per_device"] = float(f"{tflops:.6g}")
            if self._peak is not None:
                line["mfu"] = round(tflops / self._peak, 5)
        line["data_wait"] = round(step.waited, 6)
        # Of the time since the start: the rest compiled, saved, evaluated, waited for data.
        line["goodput"] = round(self._worked / (self._ended - self._start), 4)
        return line

    def _field(self, network, name):
        """Fields of several networks have the network's name before them."""
        return name if len(self._objective.networks) == 1 else f"{network}_{name}"

    def _text(self, line, metrics):
        parts = [f"step {line['step']}/{self._plan.steps}"]
        for network in metrics.networks:
            for name in ("loss", "grad_norm", *self._objective.shown):
                if (field := self._field(network, name)) in line:
                    parts.append(f"{field.replace('_', ' ')} {line[field]}")
        parts.append(f"{line['seconds']:.2f} s")
        if "tflops_per_device" in line:
            parts.append(f"{line['tflops_per_device']:.3g} TFLOP/s a device")
        if line["data_wait"] > 0.1 * line["seconds"]:
            parts.append(f"waited {line['data_wait']:.2f} s for data")
        if line["bad_in_row"]:
            parts.append(f"NOT FINITE, left out; {line['bad_in_row']} in a row")
        return "  ".join(parts)


def number(value: Any) -> int | float | None:
    """A scalar for JSON: the shortest decimal that reads back as the same float32; None if it is
    not finite.
    """
    value = np.asarray(value)
    if value.dtype.kind in "iu":
        return int(value)
    return float(str(np.float32(value))) if np.isfinite(value) else None


def _json(value):
    if value is None:
        return None
    return [_json(x) for x in value] if np.ndim(value) else number(value)


def cut(log: str | os.PathLike, step: int) -> None:
    """Drops the lines after `step`, one that a killed process left unfinished, and damaged ones.

    Raises:
      InputError: it is no file that can be read.
    """
    log = pathlib.Path(log)
    if not log.exists():
        return
    try:
        lines = log.read_bytes().split(b"\n")[:-1]  # not splitlines: U+2028 ends no line here
    except OSError as error:
        raise InputError(
            f"{log}: {error.strerror}; move it away, the run goes on without"
        ) from error
    with atomic_path(log) as partial:
        partial.write_bytes(b"".join(x + b"\n" for x in lines if _step_of(x) <= step))


def _step_of(line: bytes) -> float:
    try:
        number = versioned.parse(line)["step"]
        return number if isinstance(number, int | float) else math.inf
    except (ValueError, KeyError, TypeError):  # of bytes that are not UTF-8 a ValueError too
        return math.inf
