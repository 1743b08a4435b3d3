"""A source's samples as a step's batches on the mesh, one step ahead of the trainer.

A thread reads, tokenises and moves arrays to the devices. What runs on several devices at once, as
the VAE does, is dispatched by the trainer's own thread: in every process in the same order.
"""

import concurrent.futures
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.data import action_rows
from longlive_jax.data.source import Health, Sample, Source, batches
from longlive_jax.files.names import as_bytes, as_text
from longlive_jax.models import actions as actions_lib
from longlive_jax.prompts.encoder import PromptEncoder

_NAME_BYTES = 128  # of a sample's name, on its way to the first process

Like = jax.Array | jax.ShapeDtypeStruct  # an array to be made: its shape, dtype and sharding


class Prefetcher:
    """Yields (batch, names) of each of `steps`; reads one step ahead.

    A subclass builds a batch from samples. names: uint8 [accumulation, batch, byte], the samples'
    names in UTF-8, whole on every device; `decode_names` reads them.

    Args:
      like: an array [accumulation, batch, ...] of a step's batches.

    Raises:
      InputError: from the source; too many samples are bad.
    """

    def __init__(
        self, like: Like, source: Source, seed: int, workers: int, health: Health, steps: range
    ):
        assert isinstance(like.sharding, jax.NamedSharding)
        mesh = like.sharding.mesh
        self._health, self._left = health, len(steps)
        self._names = jax.ShapeDtypeStruct(
            (*like.shape[:2], _NAME_BYTES), jnp.uint8,
            sharding=jax.NamedSharding(mesh, jax.P(None, *mesh_lib.spec(("batch", None)))),
        )  # fmt: skip
        self._collect = jax.jit(lambda x: x, out_shardings=jax.NamedSharding(mesh, jax.P()))
        self._rows = local_rows(like)
        total = like.shape[0] * like.shape[1]
        self._samples = batches(source, self._rows, total, steps.start, seed, workers)
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "prefetcher")
        self._next = self._pool.submit(self._load) if self._left else None

    def build(self, samples: Mapping[int, Sample]) -> Any:
        """A step's batches from the samples of this process's rows, on the prefetching thread."""
        raise NotImplementedError

    def finish(self, batch: Any) -> Any:
        """The batches as the trainer takes them, on the trainer's thread."""
        return batch

    def __iter__(self) -> Iterator[tuple[Any, jax.Array]]:
        return self

    def __next__(self) -> tuple[Any, jax.Array]:
        if not self._left or self._next is None:
            raise StopIteration
        batch, names = self._next.result()
        self._left -= 1
        self._next = self._pool.submit(self._load) if self._left else None
        return self.finish(batch), self._collect(names)

    def close(self) -> None:
        """Ends the thread and the processes that decode."""
        self._left = 0
        self._pool.shutdown(cancel_futures=True)
        self._samples.close()

    def _load(self) -> tuple[Any, jax.Array]:
        samples = dict(zip(self._rows, next(self._samples)))
        for sample in samples.values():
            self._health.add(sample)
        return self.build(samples), place(samples, self._names, _name)


def texts(
    samples: Mapping[int, Sample], encoder: PromptEncoder | None
) -> Callable[[Sample], np.ndarray | None]:
    """Gives a sample's embeddings [chunk, text_len, text_dim]: its own, or the encoder's."""
    if encoder is None:
        return lambda sample: sample.text
    rows = {id(sample): encoder(sample.prompts) for sample in samples.values()}
    return lambda sample: rows[id(sample)]


def actions(
    cfg: config_lib.Model, like: Mapping[str, Like] | None, samples: Mapping[int, Sample]
) -> dict[str, jax.Array] | None:
    """`Batch.actions` of these samples, whose arrays are `like`; None without an action path.

    Raises:
      InputError: a sample has too few for its latents.
    """
    if like is None:
        return None

    @functools.cache
    def of(row):
        sample, shape = samples[row], next(iter(like.values())).shape
        assert sample.actions is not None
        vectors = action_rows.vectors(sample.actions, cfg.actions)
        windows = {
            name: actions_lib.windows(x, cfg.actions, shape[2] * shape[3])[0]
            for name, x in vectors.items()
        }
        return {name: x.reshape(*shape[2:4], *x.shape[1:]) for name, x in windows.items()}

    rows = {id(sample): row for row, sample in samples.items()}
    return {
        name: place(samples, x, lambda sample, name=name: of(rows[id(sample)])[name])
        for name, x in like.items()
    }


def decode_names(names: np.ndarray) -> list[str]:
    """The names of a step's samples in their order: what `Prefetcher` yields, on the host."""
    rows = names.reshape(-1, names.shape[-1])
    return [as_text(os.fsdecode(bytes(row).rstrip(b"\0"))) for row in rows]


def _name(sample: Sample) -> np.ndarray:
    text, end = as_bytes(sample.name), _NAME_BYTES
    while end < len(text) and text[end] & 0xC0 == 0x80:  # inside a character
        end -= 1
    return np.frombuffer(text[:end].ljust(_NAME_BYTES, b"\0"), np.uint8)


def local_rows(like: Like) -> tuple[int, ...]:
    """The rows of a step's samples that lie on this process's devices."""
    accumulation, batch = like.shape[:2]
    own = set()
    places = like.sharding.addressable_devices_indices_map(like.shape).values()
    for _, rows, *_ in filter(None, places):
        own.update(range(*rows.indices(batch)))
    return tuple(sorted(a * batch + row for a in range(accumulation) for row in own))


def place(
    samples: Mapping[int, Sample],
    like: Like,
    pick: Callable[[Sample], Any],
) -> jax.Array:
    """The array [accumulation, batch, ...] of what `pick` makes of each sample: something that a
    tuple of slices indexes.
    """
    picked = functools.cache(lambda row: pick(samples[row]))
    batch = like.shape[1]

    def local(index):
        accumulated, rows, *rest = index
        shape = [len(range(*s.indices(n))) for s, n in zip(index, like.shape)]
        out = np.empty(shape, like.dtype)
        for i, a in enumerate(range(*accumulated.indices(like.shape[0]))):
            for j, row in enumerate(range(*rows.indices(batch))):
                out[i, j] = picked(a * batch + row)[tuple(rest)]
        return out

    return jax.make_array_from_callback(like.shape, like.sharding, local)
