"""A training run, from its folder to its last step."""

import contextlib
import dataclasses
import pathlib
import signal
import time
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.data.source import Health, Source
from longlive_jax.training import checkpoint, feed, metrics, state
from longlive_jax.training.evaluate import Evaluator
from longlive_jax.training.teacher_forcing import Step

FAILURES = "failures.jsonl"
_PATIENCE_SECONDS = 3600  # with others who compile


class DivergedError(Exception):
    """train.max_bad_steps steps in a row had a loss or a gradient that is not finite."""


@dataclasses.dataclass(frozen=True)
class Done:
    """How a run ended: after `step` steps, all of them or stopped by a signal."""

    step: int
    stopped: bool


def run(
    cfg: config_lib.Config,
    mesh: jax.sharding.Mesh,
    root: pathlib.Path,
    source: Source,
    encoders: feed.Encoders,
    initial: Callable[[], params_lib.Tree],
    evaluator: Evaluator | None,
    show: Callable[[str], None],
) -> Done:
    """Trains to the last step, on from the newest state in `root`; `checkpoint.claimed` holds it.

    A run is a function of its config and its data: on the same mesh, one that was stopped anywhere
    and started again gives the same bits. SIGTERM, to any of the processes, makes all of them save
    after the same step and return.

    Args:
      initial: makes the weights of a new run, float32, sharded by `mesh.RULES`.

    Raises:
      InputError: bad data, a damaged state, a full disk.
      DivergedError: the steps' samples are in the message.
    """
    stop = _Stop()
    step = Step(cfg, mesh)
    like = step.batch_abstract()
    compiled = _compile(step, state.abstract(cfg, mesh), like, show)
    saved = checkpoint.Checkpoints(root, cfg.train)
    if saved.latest is not None:
        now = saved.restore(state.abstract(cfg, mesh))
        show(f"on from step {saved.latest} of {root}")
    else:
        now = state.init(cfg, mesh, initial())
    done = saved.latest or 0

    health = Health(cfg.data.max_bad_share, root / FAILURES)
    with (
        contextlib.closing(
            feed.Feed(cfg, like, source, encoders, health, done, cfg.train.steps)
        ) as batches,
        contextlib.closing(metrics.Metrics(root, cfg, mesh, done, show)) as told,
    ):
        stopped = False
        while done < cfg.train.steps and not stopped:
            asked = time.perf_counter()
            batch, names = next(batches)
            began = time.perf_counter()
            now, report = compiled(now, batch)
            done += 1
            _refuse_divergence(cfg, told.add(done, report, names, began, began - asked))

            last, stopped = done == cfg.train.steps, stop.reached(done)
            saved.check()
            if done % cfg.train.save_every == 0 or last or stopped:
                # First its line, then the state: a run that goes on from it has the line.
                _refuse_divergence(cfg, told.flush())
                saved.save(done, now)
            if evaluator is not None and not stopped and (done % cfg.train.eval_every == 0 or last):
                _refuse_divergence(cfg, told.flush())
                show(f"evaluation: {evaluator(done, now.average)}")
        saved.close()
    return Done(done, stopped)


def _compile(step, now, batch, show):
    """The compiled step, when every process has it."""
    start = time.perf_counter()
    compiled = step.step.lower(now, batch).compile()
    show(f"compiled in {time.perf_counter() - start:.1f} s")
    if jax.process_count() > 1:
        # One may have found it in a cache. Those who wait inside a collective have less patience.
        multihost.get_barrier_sync_fn()(key="compiled", timeout_ms=_PATIENCE_SECONDS * 1000)
    return compiled


def _refuse_divergence(cfg, line):
    if line is not None and line["bad_in_row"] >= cfg.train.max_bad_steps:
        raise DivergedError(
            f"step {line['step']}: loss {line['loss']}, gradient norm {line['grad_norm']} (null: "
            f"not finite), {line['bad_in_row']} steps in a row as train.max_bad_steps allows no "
            f"more. Its samples: {', '.join(line['samples'])}. Look at them, or lower "
            "train.learning_rate; the same command goes on from the last saved step"
        )


class _Stop:
    """Knows when a run has to save and end: after SIGTERM to any of its processes."""

    def __init__(self):
        # With several processes JAX listens for the signal, and finds a step that all can reach.
        self._alone = not jax.distributed.is_initialized()
        self._asked = False
        if self._alone:
            signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number, frame):
        del number, frame
        self._asked = True

    def reached(self, step: int) -> bool:
        """Whether to end after this step; every process asks after each step."""
        return self._asked if self._alone else multihost_utils.reached_preemption_sync_point(step)
