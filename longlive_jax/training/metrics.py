"""The log of a run: of each step a line of JSON, scalars for TensorBoard, a line on the screen.

A step is reported when the next one has been given to the devices, so that they never wait for it.
"""

import concurrent.futures
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
from longlive_jax.training import cost, goodput
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
    done: concurrent.futures.Future[float]  # when the devices had done it


class Metrics:
    """Every process calls every method; the first one writes.

    Args:
      root: gets metrics.jsonl and tensorboard/. Lines after step `start` are cut off. On object
        storage it gets them now and then: `sync`.
      show: prints a line a step.
      began: when this start of the run began, by time.perf_counter; None: now.
    """

    def __init__(
        self,
        root: AnyPath,
        objective: Objective,
        plan: Plan,
        start: int,
        show: Callable[[str], None],
        began: float | None = None,
    ):
        self._objective, self._plan, self._show = objective, plan, show
        self._peak = cost.PEAK_TFLOPS.get(objective.mesh.devices.flat[0].device_kind)
        self._pending: _Pending | None = None
        self._ended = self._idle = time.perf_counter()
        self._waits = concurrent.futures.ThreadPoolExecutor(1, "metrics")
        self._file = self._board = self._goodput = None
        if jax.process_index() == 0:
            self._mirror, self._synced, self._lost = Mirror(root), self._ended, False
            folder = self._mirror.folder
            self._mirror.fetch(METRICS)
            self._mirror.fetch(goodput.FILE)
            cut(folder / METRICS, start)
            entered = self._ended if began is None else began
            self._goodput = goodput.Goodput(folder, start, entered, time.time())
            self._file = (folder / METRICS).open("a", encoding="utf-8")
            self._board = tensorboardX.SummaryWriter(
                str(folder / TENSORBOARD), purge_step=start + 1, flush_secs=10
            )
            self.sync()  # from now on this start counts, however it ends

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
        done = self._waits.submit(_when_done, metrics)
        self._pending = _Pending(number, metrics, names, began, waited, done)
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
        # Its seconds may hold a wait for the next step's data: it is looked at when that is given.
        done = step.done.result()
        worked, self._idle = done - max(self._idle, step.began), done
        if self._goodput is not None and not int(metrics.bad[1]):
            self._goodput.useful += worked
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

    def sync(self, saves: int | None = None, over: bool = False) -> None:
        """Writes the run's goodput; sends the log to object storage, if the run's folder is there.

        Args:
          saves: the step whose state is saved next. over: the run ends here, by itself.

        Raises:
          StorageError: it refuses, or does not answer.
        """
        if self._file is not None and self._board is not None and self._goodput is not None:
            self._goodput.write(time.time(), saves, over)
            self._board.flush()
            self._mirror.sync()
            self._synced = time.perf_counter()

    def lose(self, folder: pathlib.Path | None) -> None:
        """Sends nothing more to object storage that is lost; writes the lines to another folder."""
        self._lost = True
        if self._file is not None and folder is not None:
            for name in (METRICS, goodput.FILE):
                (folder / name).write_bytes((self._mirror.folder / name).read_bytes())

    def close(self) -> None:
        self._waits.shutdown(wait=False, cancel_futures=True)
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
        if self._goodput is not None:
            line["goodput"] = float(f"{self._goodput.share(self._ended):.4g}")
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


def _when_done(metrics: StepMetrics) -> float:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # who reads the metrics has it, too
        jax.block_until_ready(metrics)
    return time.perf_counter()


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
