"""A training run, from its folder to its last step."""

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from longlive_jax import params as params_lib
from longlive_jax.errors import NotFiniteError, StorageError
from longlive_jax.files.remote import AnyPath
from longlive_jax.training import checkpoint, metrics, state, watch
from longlive_jax.training.objective import Objective
from longlive_jax.training.plan import Plan
from longlive_jax.training.state import NetworkState, TrainState
from longlive_jax.training.step import Step

_PATIENCE_SECONDS = 3600  # with others who compile
_INTERRUPTED = b"interrupted: saves after this step and ends; Ctrl-C again ends at once\n"


class DivergedError(NotFiniteError):
    """More steps in a row than the plan allows were left out as they were not finite, or the last
    ones of the run were.
    """


class Batches(Protocol):
    """Iterates over (batches, names) of steps: a step's batches as the objective says, and its
    samples' names as `prefetch.decode_names` reads them, or None.
    """

    def __next__(self) -> tuple[Any, jax.Array | None]: ...
    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run needs beside its objective and plan, made when it is needed.

    batches: of these steps, numbered from 0, one after the other.
    params: initial weights of a new run, by network, float32, sharded by `mesh.RULES`; None: the
      objective's own.
    frozen: arrays, as Objective.frozen says.
    evaluate: called after some steps with their number and the state of the networks; gives what
      to show. None: nothing is evaluated.
    """

    batches: Callable[[range], Batches]
    params: Callable[[], Mapping[str, params_lib.Tree]] | None = None
    frozen: Any = ()
    evaluate: Callable[[int, Mapping[str, NetworkState]], str] | None = None


@dataclasses.dataclass(frozen=True)
class Done:
    """How a run ended: after `step` steps, all of them or stopped by a signal."""

    step: int
    stopped: bool


def run(
    objective: Objective,
    plan: Plan,
    root: AnyPath,
    inputs: Inputs,
    show: Callable[[str], None],
) -> tuple[TrainState, Done]:
    """Trains to the last step, on from the newest state in `root`, locked by `checkpoint.acquire`.

    A run is a function of its config and its data: on the same mesh, one that was stopped anywhere
    and started again gives the same bits. SIGTERM or Ctrl-C, to any of the processes, makes all of
    them save after the same step and return; a second Ctrl-C ends its process at once.

    Raises:
      InputError: bad data, a damaged state, a full disk.
      StorageError: object storage refuses, or does not answer, for long. What was saved stands, and
        the state is in a local folder, if the run has one process.
      DivergedError: too many steps in a row were not finite; or the last step was, whose state is
        saved all the same.
    """
    with _Stop() as stop:
        return _run(objective, plan, root, inputs, show, stop)


def _run(objective, plan, root, inputs, show, stop) -> tuple[TrainState, Done]:
    evaluate, step = inputs.evaluate, Step(objective)
    entered = time.perf_counter()
    watch.at("compiles its programs")
    compiled = {due: _compile(step, due, show) for due in step.programs}
    watch.at("reads its state")
    saved = checkpoint.Checkpoints(root, plan)
    if saved.latest is not None:
        now = saved.restore(state.abstract(objective))
        show(f"on from step {saved.latest} of {root}")
    else:
        now = state.init(objective, inputs.params and inputs.params())
    done = saved.latest or 0

    with (
        contextlib.closing(inputs.batches(range(done, plan.steps))) as batches,
        contextlib.closing(metrics.Metrics(root, objective, plan, done, show, entered)) as log,
    ):
        stopped = False
        try:
            while done < plan.steps and not stopped:
                watch.at(f"reads the data of step {done + 1}")
                asked = time.perf_counter()
                batch, names = next(batches)
                watch.at(f"takes step {done + 1}", bounded=True)
                began = time.perf_counter()
                now, report = compiled[step.due(done)](now, inputs.frozen, batch)
                done += 1
                _refuse_divergence(plan, log.add(done, report, names, began, began - asked))

                last, stopped = done == plan.steps, stop.reached(done)
                saved.check()
                if done % plan.save_every == 0 or last or stopped:
                    watch.at(f"saves after step {done}")
                    # First its line, then the state: a run that goes on from it has the line.
                    _refuse_divergence(plan, log.flush())
                    log.sync(done)
                    saved.save(done, now)
                if evaluate is not None and not stopped and (done % plan.eval_every == 0 or last):
                    watch.at(f"evaluates after step {done}")
                    _refuse_divergence(plan, log.flush())
                    show(f"evaluation: {evaluate(done, now.networks)}")
            watch.at("waits for its last save")
            saved.close()
            log.sync(over=True)
        except StorageError as error:
            raise _rescued(error, root, saved, log, done, now) from error
    if done == plan.steps:
        _refuse_bad_end(plan, now)
    return now, Done(done, stopped)


def _rescued(error, root, saved, log, done, now) -> StorageError:
    """The error of a run whose storage is lost, after what can be saved is saved elsewhere."""
    reason = f"{error.strerror}. What it has of this run stands"
    folder = saved.rescue(done, now)
    try:
        log.lose(folder)
    except OSError:  # the disk is full
        folder = None
    if folder is not None:
        reason += f"; step {done} is in {folder}, and --workdir={folder} goes on from there"
    return StorageError(error.errno, reason, error.filename or str(root))


def _compile(step, due, show):
    """The compiled program of these networks' steps, when every process has it."""
    start = time.perf_counter()
    compiled = step.lower(due).compile()
    what = "" if len(step.programs) == 1 else f"{', '.join(due) or 'no network'}: "
    show(f"{what}compiled in {time.perf_counter() - start:.1f} s")
    if jax.process_count() > 1:
        # One may have found it in a cache. Those who wait inside a collective have less patience.
        key = f"compiled {'/'.join(due)}"
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=_PATIENCE_SECONDS * 1000)
    return compiled


def _refuse_divergence(plan, line):
    if line is not None and line["bad_in_row"] >= plan.max_bad_steps:
        figures = {k: v for k, v in line.items() if k.endswith(("loss", "grad_norm"))}
        found = ", ".join(
            f"{name.replace('grad_norm', 'gradient norm').replace('_', ' ')} {value}"
            for name, value in figures.items()
        )
        why = "null: not finite"
        if None not in figures.values():
            why = "finite, but not the weights or moments that the step would write"
        samples = f"Its samples: {', '.join(line['samples'])}. " if "samples" in line else ""
        raise DivergedError(
            f"step {line['step']}: {found} ({why}), {line['bad_in_row']} "
            f"steps in a row as {plan.section}.max_bad_steps allows no more. {samples}Look at "
            f"them, or lower {plan.section}.learning_rate; the same command goes on from the last "
            "saved step"
        )


def _refuse_bad_end(plan, now):
    """A run that learned nothing at its end does not pass for one that is done."""
    in_row = int(np.asarray(now.bad)[1])
    if in_row:
        raise DivergedError(
            f"step {plan.steps}: the last {in_row} of {plan.steps} steps had a loss, gradient or "
            "updated weights that are not finite and were left out. What is saved are the weights "
            f"of step {plan.steps - in_row}. Sample from them, or raise {plan.section}.steps and "
            "give the same command to go on from there; look at the samples of these steps in "
            f"{metrics.METRICS}, or lower {plan.section}.learning_rate in a new run"
        )


class _Stop:
    """Knows when a run has to save and end: after SIGTERM or Ctrl-C to any of its processes.

    A second Ctrl-C ends the process at once. As a context manager it leaves the signals to who had
    them before.
    """

    def __init__(self):
        # With several processes JAX listens for SIGTERM, and finds a step that all can reach.
        self._alone = not jax.distributed.is_initialized()
        self._asked = False
        self._before = {}

    def __enter__(self) -> "_Stop":
        for number in (signal.SIGINT, signal.SIGTERM) if self._alone else (signal.SIGINT,):
            if signal.getsignal(number) != signal.SIG_IGN:  # as a shell's background jobs have it
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame):
        del frame
        self._asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            with contextlib.suppress(OSError):  # nobody reads it
                os.write(2, _INTERRUPTED)  # print may be what the signal broke off
            if not self._alone:
                os.kill(os.getpid(), signal.SIGTERM)

    def reached(self, step: int) -> bool:
        """Whether to end after this step; every process asks after each step."""
        return self._asked if self._alone else multihost_utils.reached_preemption_sync_point(step)
