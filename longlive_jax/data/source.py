"""Samples for a trainer: their type, their sources, their order, and how many cannot be read.

The samples of a step are a function of the seed and of the step's number alone. They depend on
neither the mesh, nor the number of hosts or of decoding processes, nor restarts.
"""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from longlive_jax.errors import InputError
from longlive_jax.files import lines, remote
from longlive_jax.files.names import as_text

LEAST_READ = 20  # samples read before the share of failed ones is judged
_SHARED_MEMORY = "/dev/shm"  # through which frames go from a decoding process to the trainer


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One training video, as pictures or as latents, with a prompt a chunk.

    name: of the folder it came from.
    prompts: one a chunk.
    chunks: valid ones; those after them are padding, to be masked.
    frames: uint8 [1 + 4 (latent_frames - 1), height, width, 3], or None.
    latents: [latent_frames, h, w, channel], normalised, or None.
    text: [chunk, text_len, text_dim], the prompts' embeddings, or None.
    actions: float32 [1 + 4 (latent_frames - 1), key + 2], of `data.action_rows`, or None.
    failures: (path, reason) of each file that could not be read while making this sample.
    skipped: records before its own that gave none, among them the one that was asked for.
    """

    name: str
    prompts: tuple[str, ...]
    chunks: int
    frames: np.ndarray | None = None
    latents: np.ndarray | None = None
    text: np.ndarray | None = None
    actions: np.ndarray | None = None
    failures: tuple[tuple[str, str], ...] = ()
    skipped: int = 0


class Source(Protocol):
    """Records, each of which gives samples. It is pickled to the processes that decode."""

    def __len__(self) -> int:
        """Number of records, at least one."""
        ...

    def sample(self, index: int, key: int) -> Sample:
        """A sample of record `index`; `key` seeds its random choices. A pure function of both.

        Raises:
          InputError: no record at all gives a sample.
        """
        ...


def batches(
    source: Source, rows: Sequence[int], batch: int, start: int, seed: int, workers: int
) -> Generator[list[Sample]]:
    """This process's samples of each step from `start` on, without end.

    Sample g of a run is row g % batch of step g // batch. The records are shuffled anew each epoch;
    g and the seed determine the sample's record and key.

    Args:
      rows: the rows of the global batch that lie on this process's devices.
      batch: number of rows of the global batch.
      start: the first step.
      workers: processes that decode ahead of the trainer; 0: a thread of this process decodes.

    Yields:
      A sample for each of `rows`, in their order. Close the generator, which ends the processes.

    Raises:
      InputError: from the source, or a decoding process died.
    """
    rows = tuple(rows)
    if not rows or not all(0 <= row < batch for row in rows):
        raise ValueError(f"{rows=} must be at least one of the {batch} rows of the batch")
    if not flags.FLAGS.is_parsed():  # in a notebook, say; Grain reads flags of its own
        flags.FLAGS.mark_as_parsed()
    load = _Load(source, rows, batch, start, seed % 2**32)
    # A sample can be a gigabyte, so only one is prefetched.
    read = grain.ReadOptions(num_threads=0 if workers else 1, prefetch_buffer_size=1)
    samples = grain.MapDataset.range(sys.maxsize).map(load).to_iter_dataset(read)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
    return _batches(samples.mp_prefetch(options, worker_init_fn=_start_worker), len(rows))


def _batches(dataset: grain.IterDataset, count: int) -> Generator[list[Sample]]:
    iterator = iter(dataset)
    try:
        while True:
            yield [_sample(next(iterator)) for _ in range(count)]
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        room = _SHARED_MEMORY
        if os.path.isdir(room):
            room = f"{room} ({shutil.disk_usage(room).free / 2**30:.1f} GiB free)"
        raise InputError(
            f"data: a process that decodes died: {error} Often memory or {room} is too small for "
            "some samples a process; enlarge it, or lower data.workers (0: none)"
        ) from error
    finally:
        iterator.close()


def _sample(fields: dict[str, Any]) -> Sample:
    # Grain wraps shared memory in a subclass of np.ndarray. A plain view keeps it alive.
    plain: dict[str, Any] = {
        k: np.asarray(v) if isinstance(v, np.ndarray) else v for k, v in fields.items()
    }
    return Sample(**plain)


@dataclasses.dataclass(frozen=True, eq=False)
class _Load:
    """Maps the number of a sample in this process to the sample, as a dict.

    Grain passes the arrays of a dict through shared memory; it would pickle a dataclass.
    """

    source: Source
    rows: tuple[int, ...]
    batch: int
    start: int
    seed: int

    def __call__(self, i: int) -> dict:
        step, row = divmod(i, len(self.rows))
        g = (self.start + step) * self.batch + self.rows[row]
        record = grain.MapDataset.range(len(self.source)).shuffle(self.seed).repeat()[g]
        assert record is not None  # nothing is filtered
        key = np.random.SeedSequence((self.seed, g)).generate_state(1, np.uint64)
        sample = self.source.sample(int(record), int(key[0]))
        return {field.name: getattr(sample, field.name) for field in dataclasses.fields(sample)}


def _start_worker(index: int, count: int) -> None:
    del index, count
    # A terminal's Ctrl-C and a scheduler's notice reach all processes of a job. The trainer still
    # needs samples to finish its step, and ends its workers itself.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """Ends this process when its parent has ended, for whatever reason."""
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(0)


class Health:
    """Counts the samples read and those with an unreadable file; stops when these are too many.

    Args:
      max_bad_share: largest share of failed samples among those read.
      report: JSON lines {"path": ..., "reason": ...} are added to this file, one a failure.

    Attributes:
      read, failed: numbers of samples.
      failures: (path, reason), each once, in the order of occurrence.

    Raises:
      InputError: `report` cannot be written.
    """

    def __init__(self, max_bad_share: float, report: str | os.PathLike):
        self.read = self.failed = 0
        self.failures: list[tuple[str, str]] = []
        self._max_bad_share = max_bad_share
        self._report = remote.path(report)
        self._seen: set[tuple[str, str]] = set()
        lines.begin(self._report)

    def add(self, sample: Sample) -> None:
        """Counts a sample that was read.

        Raises:
          InputError: too large a share of at least LEAST_READ samples has failed.
        """
        self.read += 1
        self.failed += bool(sample.failures)
        new = [f for f in dict.fromkeys(sample.failures) if f not in self._seen]
        self._seen.update(new)
        self.failures += new
        if new:
            texts = [{"path": as_text(p), "reason": as_text(r)} for p, r in new]
            added = (json.dumps(text, ensure_ascii=False) for text in texts)
            lines.add(self._report, "".join(f"{line}\n" for line in added))
        if self.read >= LEAST_READ and self.failed > self._max_bad_share * self.read:
            raise InputError(
                f"data: {self.failed} of {self.read} samples read met something unreadable, "
                f"{self.failed / self.read:.0%}; the limit is data.max_bad_share="
                f"{self._max_bad_share}. {first(self.failures)}. Mend or remove them (all are in "
                f"{self._report}), or raise the limit"
            )


def first(failures: Sequence[tuple[str, str]], count: int = 5) -> str:
    """The first `count` of the failures (path, reason), as a part of a message."""
    listed = "; ".join(f"{as_text(path)}: {as_text(why)}" for path, why in failures[:count])
    return f"The first {min(count, len(failures))} of {len(failures)}: {listed}"
