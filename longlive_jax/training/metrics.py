"""What a run tells of its steps: a line of JSON each, TensorBoard, and a line on the screen.

A step is reported when the next one has been given to the devices, so that they never wait for it.
"""

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

from longlive_jax import config as config_lib
from longlive_jax.files.atomic import atomic_path
from longlive_jax.training import cost
from longlive_jax.training.feed import decode_names
from longlive_jax.training.teacher_forcing import Report

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"


class _Step(NamedTuple):
    number: int
    report: Report
    names: jax.Array
    began: float  # when it was given to the devices
    waited: float  # for its data before that, seconds


class Metrics:
    """Every process calls every method; the first one writes.

    Args:
      root: gets metrics.jsonl and tensorboard/. Lines after step `start` are cut off.
      show: prints a line a step.
    """

    def __init__(
        self,
        root: pathlib.Path,
        cfg: config_lib.Config,
        mesh: jax.sharding.Mesh,
        start: int,
        show: Callable[[str], None],
    ):
        self._cfg, self._devices, self._show = cfg, mesh.size, show
        self._peak = cost.PEAK_TFLOPS.get(mesh.devices.flat[0].device_kind)
        self._held: _Step | None = None
        self._start = self._ended = time.perf_counter()
        self._worked = 0.0
        self._file = self._board = None
        if jax.process_index() == 0:
            cut(root / METRICS, start)
            self._file = (root / METRICS).open("a")
            self._board = tensorboardX.SummaryWriter(
                str(root / TENSORBOARD), purge_step=start + 1, flush_secs=10
            )

    def add(
        self, number: int, report: Report, names: jax.Array, began: float, waited: float
    ) -> dict[str, Any] | None:
        """Takes a step that was just given to the devices; reports the one before it.

        Returns:
          The line of the step before, or None: what `flush` returns.
        """
        # On its way before the next step is given: what is asked for later may come behind that.
        for array in jax.tree.leaves((report, names)):
            array.copy_to_host_async()
        line = self.flush()
        self._held = _Step(number, report, names, began, waited)
        return line

    def flush(self) -> dict[str, Any] | None:
        """Waits for the step that was added last, if that was not done yet, and reports it."""
        if self._held is None:
            return None
        step, self._held = self._held, None
        report, names = jax.device_get((step.report, step.names))
        now = time.perf_counter()
        seconds = now - max(self._ended, step.began)
        self._ended = now
        line = self._line(step, report, decode_names(names), seconds)
        if self._file is not None:
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()
            for name, value in line.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._board.add_scalar(f"train/{name}", value, step.number)
            self._show(self._text(line))
        return line

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()

    def _line(self, step, report, names, seconds):
        told = report.told
        self._worked += seconds
        tflops = cost.step_flops(self._cfg) / seconds / self._devices / 1e12
        videos = self._cfg.train.batch_size * self._cfg.train.accumulation
        line = {
            "step": step.number,
            "loss": number(told.loss),
            "grad_norm": number(report.grad_norm),
            "seconds": round(seconds, 6),
            "samples": names,
            # Unweighted, by timestep, noisiest last; null: no chunk had such a level.
            "error_by_level": [
                number(e / n) if n else None for e, n in zip(told.errors, told.counts)
            ],
            "bad_steps": int(report.bad[0]),
            "bad_in_row": int(report.bad[1]),
            "tokens_per_second": round(videos * cost.video_tokens(self._cfg) / seconds, 3),
            "tflops_per_device": float(f"{tflops:.6g}"),
        }
        if self._peak is not None:
            line["mfu"] = round(tflops / self._peak, 5)
        line["data_wait"] = round(step.waited, 6)
        # Of the time since the start: the rest compiled, saved, evaluated, waited for data.
        line["goodput"] = round(self._worked / (self._ended - self._start), 4)
        return line | {f"recycling_{k}": number(v) for k, v in report.recycling.items()}

    def _text(self, line):
        parts = [
            f"step {line['step']}/{self._cfg.train.steps}",
            f"loss {line['loss']}",
            f"grad norm {line['grad_norm']}",
            f"{line['seconds']:.2f} s",
            f"{line['tflops_per_device']:.3g} TFLOP/s a device",
        ]
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


def cut(log: str | os.PathLike, step: int) -> None:
    """Drops the lines after `step`, and one that a killed process left unfinished."""
    log = pathlib.Path(log)
    if not log.exists():
        return
    lines = log.read_text().splitlines(keepends=True)
    with atomic_path(log) as partial:
        partial.write_text("".join(line for line in lines if _step_of(line) <= step))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
