"""Landmarks: past chunks that are kept with their poses, and shown where one is near again.

All of it is on the host, and a function of the stream's script and actions alone, so that a stream
that is played again is the same one. Before each chunk `Landmarks.show` looks where the player
stands: of the chunks that have left the window, those count that were made in the same shot and
under the same prompt, from near there and looking that way (`memory.distance`, `memory.angle`).
The nearest are put into the landmarks' slots (`sampling.memory`); what is there already stays.
"""

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import config as config_lib
from longlive_jax.config import TEMPORAL_COMPRESSION
from longlive_jax.data.sidecars import for_model
from longlive_jax.sampling import memory, reckoning, saved
from longlive_jax.sampling import window as window_lib
from longlive_jax.sampling.chunk import Direction
from longlive_jax.sampling.memory import Kept
from longlive_jax.sampling.reckoning import Reckoning
from longlive_jax.sampling.stream import ChunkInput, Sampler, StreamState
from longlive_jax.sampling.track import Track

_NOTHING_NEW = 0.25  # of the limits: a chunk as near as this to those kept is not kept too
Scene = tuple[Any, ...]  # shot and text, in which poses are of one place


@dataclasses.dataclass(frozen=True)
class _Place:
    """A kept chunk. scenes: of each row, None where it is not kept. poses: [row, latent, 7]."""

    kept: Kept
    scenes: tuple[Scene | None, ...]
    poses: np.ndarray


class Landmarks:
    """The landmarks of a session's rows.

    references: reference images that its window begins with.

    Attributes:
      shown: of each row, the chunks in its landmarks' slots.
    """

    def __init__(self, cfg: config_lib.Config, track: Track, rows: int, references: int):
        self.cfg, self.memory = cfg, cfg.sample.memory
        self.shown: list[list[int]] = [[] for _ in range(rows)]
        lag = for_model.lag(track.cfg.pad)
        self._reckonings = [Reckoning(self.memory, track.keys, lag) for _ in range(rows)]
        self._given = [False] * rows  # whether any pose was
        self._places: dict[int, _Place] = {}
        self._shots = [0] * rows
        self._scenes: list[Scene] = [() for _ in range(rows)]
        with jax.default_device(_host()):  # a table without latents: the one policy of the window
            table = window_lib.init(cfg, rows, 0, 0).replace(actions=None)
            self._table = table.with_references(references)

    def show(
        self, sampler: Sampler, params: Any, state: StreamState, inputs: ChunkInput,
        direction: Direction, track: Track,
    ) -> StreamState:  # fmt: skip
        """The state with the landmarks of the next chunk, whose actions the track has taken."""
        self._enter(direction, track)
        programs, rows = memory.programs(sampler), range(len(self.shown))
        if not direction.chunk:
            state = programs.ready(params, state, inputs)
        wanted = [self._choose(row, direction.chunk) for row in rows]
        placed = [_placed(*pair) for pair in zip(self.shown, wanted)]
        count = np.asarray([len(chunks) for chunks in placed], np.int32)
        had, self.shown = self.shown, placed
        written = False
        for index in range(max(count)):
            if all(new[index : index + 1] in ([], old[index : index + 1])
                   for new, old in zip(placed, had)):  # fmt: skip
                continue
            kept = programs.place(self._stack(index), programs.kept_specs)
            where = jnp.int32(index), programs.place(count, memory.BATCH)
            state, written = programs.show(params, state, inputs, kept, *where), True
        if not written and any(map(_fewer, placed, had)):
            state = programs.hide(state, programs.place(count, memory.BATCH))
        return state

    def hide(self, sampler: Sampler, state: StreamState) -> StreamState:
        """The state without landmarks, as the window must be to be brought under another prompt."""
        if any(self.shown):
            programs = memory.programs(sampler)
            none = programs.place(np.zeros(len(self.shown), np.int32), memory.BATCH)
            state, self.shown = programs.hide(state, none), [[] for _ in self.shown]
        return state

    def keep(self, sampler: Sampler, state: StreamState, direction: Direction) -> None:
        """Takes over the chunk that was committed last, made under `direction`."""
        with jax.default_device(_host()):
            self._table = _commit(self._table, np.asarray(direction.cut), self.cfg)
        frames = self.cfg.model.chunk_frames
        latents = range(direction.chunk * frames, (direction.chunk + 1) * frames)
        pictures = [TEMPORAL_COMPRESSION * latent for latent in latents]
        poses = np.stack([one.at(pictures) for one in self._reckonings])
        news = [self._is_new(row, poses[row]) for row in range(len(poses))]
        if not any(news):
            return
        kept = memory.programs(sampler).newest(state)
        for x in jax.tree.leaves(kept):
            x.copy_to_host_async()
        scenes = tuple(scene if new else None for scene, new in zip(self._scenes, news))
        self._places[direction.chunk] = _Place(kept, scenes, poses)
        in_use = {chunk for chunks in self.shown for chunk in chunks}
        if len(self._places) > self.memory.kept:
            del self._places[min(self._places.keys() - in_use)]

    def poses(self, row: int) -> np.ndarray | None:
        """float32 [picture, 7] of all chunks so far, if any pose was given; else they follow."""
        return self._reckonings[row].rows if self._given[row] else None

    def _enter(self, direction, track):
        """The poses and the scene of the next chunk."""
        size = TEMPORAL_COMPRESSION * self.cfg.model.chunk_frames
        stop = size * (direction.chunk + 1) - TEMPORAL_COMPRESSION + 1
        prefix = self.cfg.sample.scene_cut_prefix
        for row, one in enumerate(self._reckonings):
            given = track.poses(row)
            self._given[row] |= given is not None
            one.extend(track.made(one.next_row, row), given, stop)
            if direction.cut[row] and direction.chunk:
                self._shots[row] = direction.chunk
            blend = [x[row] for x in (direction.toward, direction.weights) if x]
            text = direction.prompts[row].removeprefix(prefix).strip()
            self._scenes[row] = (self._shots[row], text, *blend)

    def _choose(self, row: int, chunk: int) -> list[int]:
        """The landmarks of a row for chunk `chunk`, the nearest first."""
        size = TEMPORAL_COMPRESSION * self.cfg.model.chunk_frames
        begins = max(0, size * chunk - TEMPORAL_COMPRESSION)  # the last picture before it
        visible = set(np.asarray(self._table.chunk)[row].tolist())
        near = self._near(row, self._reckonings[row].at([begins])[0])
        near = sorted((cost, kept) for kept, cost in near.items() if kept not in visible)
        return [kept for _, kept in near[: self.memory.landmarks]]

    def _near(self, row: int, here: np.ndarray) -> dict[int, float]:
        """The costs of the kept chunks of this scene that are near a pose, the least of each."""
        scene = self._scenes[row]
        own = {chunk: p.poses[row] for chunk, p in self._places.items() if p.scenes[row] == scene}
        if not own:
            return {}
        each = reckoning.costs(np.concatenate(list(own.values())), here, self.memory)
        least = each.reshape(len(own), -1).min(axis=1)
        return {chunk: float(x) for chunk, x in zip(own, least) if np.isfinite(x)}

    def _is_new(self, row, poses):
        """Whether a chunk shows what none of those kept does."""
        nearest = (min(self._near(row, pose).values(), default=np.inf) for pose in poses)
        return any(cost > _NOTHING_NEW for cost in nearest)

    def _stack(self, index):
        """A Kept of the rows' landmarks `index`; of rows that have none, of any other's."""
        chosen = [chunks[index] if index < len(chunks) else None for chunks in self.shown]
        some = next(chunk for chunk in chosen if chunk is not None)
        parts = [
            jax.tree.map(
                lambda x, row=row: np.asarray(x)[row],
                self._places[some if chunk is None else chunk].kept,
            )
            for row, chunk in enumerate(chosen)
        ]
        return jax.tree.map(lambda *x: np.stack(x), *parts)

    def copy(self) -> "Landmarks":
        other = copy.copy(self)
        other.shown = [list(chunks) for chunks in self.shown]
        other._reckonings = [one.copy() for one in self._reckonings]
        other._places = dict(self._places)
        for name in ("_given", "_shots", "_scenes"):
            setattr(other, name, list(getattr(self, name)))
        return other

    def saved(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Facts that JSON can hold, and arrays, for `restore`."""
        poses = [one.saved() for one in self._reckonings]
        facts = {
            "shown": self.shown, "given": self._given, "shots": self._shots,
            "scenes": self._scenes, "reckonings": [fact for fact, _ in poses],
            "places": {chunk: place.scenes for chunk, place in self._places.items()},
        }  # fmt: skip
        arrays = {f"poses/{row}": x for row, (_, x) in enumerate(poses)}
        arrays |= {f"table/{name}": x for name, x in saved.leaves(self._table).items()}
        for chunk, place in self._places.items():
            arrays[f"at/{chunk}"] = place.poses
            arrays |= {f"place/{chunk}/{k}": x for k, x in saved.leaves(place.kept).items()}
        return facts, arrays

    def restore(
        self, path: Any, facts: Mapping[str, Any], arrays: Mapping[str, Any], state: StreamState
    ) -> None:
        """Takes over what `saved` gave. `state`: of the stream, or its shapes.

        Raises:
          InputError: arrays of other shapes. It names `path`.
        """
        self.shown, self._given = facts["shown"], facts["given"]
        self._shots, self._scenes = facts["shots"], [tuple(x) for x in facts["scenes"]]
        for row, one in enumerate(self._reckonings):
            one.restore(facts["reckonings"][row], arrays[f"poses/{row}"])
        with jax.default_device(_host()):
            self._table = jax.tree.map(jnp.asarray, saved.tree(path, self._table, "table/", arrays))
        like = jax.eval_shape(memory.newest, state)
        self._places = {
            int(chunk): _Place(
                saved.tree(path, like, f"place/{chunk}/", arrays),
                tuple(x and tuple(x) for x in scenes),
                arrays[f"at/{chunk}"],
            )
            for chunk, scenes in facts["places"].items()
        }


def _placed(had: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """The chunks `wanted`, in the slots where they are already as far as these are the first."""
    slots = [chunk if chunk in wanted else None for chunk in had[: len(wanted)]]
    slots += [None] * (len(wanted) - len(slots))
    rest = iter([chunk for chunk in wanted if chunk not in slots])
    return [next(rest) if chunk is None else chunk for chunk in slots]


def _fewer(new, old):
    return len(new) < len(old)


@functools.partial(jax.jit, static_argnums=2)
def _commit(table, cut, cfg):
    """The window's table after one more chunk."""
    size = cfg.sample.window(cfg.model)
    table = table.enter_shot(cut, cfg)
    return table.commit(table.next_slot(size), table.latents[:, 0], cfg)


def _host() -> Any:
    """A device that waits for no other: a table there is known at once."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names others alone
        return jax.local_devices()[0]
