"""What drives videos that nobody recorded: their own actions, recorded ones, or a random walk.

A script's entries may have actions. A folder of captions may have sidecars, one a shot in the order
of the captions' files, in video/NAME/ or beside the captions in caption/NAME/; videos need not be
there. Anything else is driven by a walker (`data.walker`).
"""

import itertools
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from longlive_jax import config as config_lib
from longlive_jax.config import TEMPORAL_COMPRESSION
from longlive_jax.data import action_rows, sidecars, walker
from longlive_jax.data.sidecars import canonical
from longlive_jax.errors import InputError
from longlive_jax.files import names
from longlive_jax.prompts import actions as actions_lib
from longlive_jax.prompts.shots import Video

_ENDS = canonical.ENDS


class Walks:
    """The actions of the videos that `shots.read` found at `path`.

    Attributes:
      files: the sidecars of each video's shots, by the video's name; empty: there are none.

    Raises:
      InputError: nothing names the model's keys; one video has sidecars and another has not, or has
        too few for its shots; one that is looked at does not fit the model.
    """

    def __init__(self, cfg: config_lib.Config, path: str | os.PathLike, videos: Sequence[Video]):
        self._cfg = cfg
        sidecars.model_keys(cfg.model.actions)
        self._own = {video.name for video in videos if _has_own(video)}
        self.files = {
            video.name: _sidecars(pathlib.Path(path), video.name)
            for video in videos
            if video.name not in self._own
        }
        if not any(self.files.values()):
            self.files = {}
        for video in videos:
            found, shots = self.files.get(video.name), len(_lengths(video))
            if found is not None and len(found) < shots:
                raise InputError(
                    f"{path}: video {video.name!r} has {len(found)} sidecar(s) for {shots} "
                    "shot(s), and others have theirs; give each shot one, or none"
                )
        for found in itertools.islice(self.files.values(), 8):
            self._read(found[0])

    def rows(self, video: Video, latents: int, rng: np.random.Generator) -> np.ndarray:
        """float32 [picture, key + 2], of `data.action_rows`, of a video of so many latents.

        A shot's rows begin at a random one of its sidecar, and start over at its end.

        Raises:
          InputError: a sidecar cannot be read, or does not fit the model.
        """
        pictures = 1 + TEMPORAL_COMPRESSION * (latents - 1)
        cfg = self._cfg.model
        if video.name in self._own:
            own = action_rows.of(actions_lib.of_video(self._cfg, video), cfg.actions)
            return _around(own, pictures, 0)
        if not self.files:
            return action_rows.of(walker.walk(cfg.actions, pictures, rng), cfg.actions)
        parts, done = [], 0
        chunk = TEMPORAL_COMPRESSION * cfg.chunk_frames
        for file, chunks in zip(self.files[video.name], _lengths(video)):
            # A video's first latent is one picture, not four.
            count = chunk * chunks - (0 if parts else TEMPORAL_COMPRESSION - 1)
            own = self._read(file)
            parts.append(_around(own, count, int(rng.integers(max(1, len(own) - count + 1)))))
            done += count
        rows = np.concatenate(parts)
        if done < pictures:  # the last shot goes on
            last = len(parts[-1])
            rows = np.concatenate([rows, _around(parts[-1], pictures - done, last)])
        return rows[:pictures]

    def actions(self, video: Video, latents: int, rng: np.random.Generator) -> sidecars.Actions:
        """`rows`, as a stream's plan."""
        cfg = self._cfg.model.actions
        rows = self.rows(video, latents, rng)
        return action_rows.actions(rows, sidecars.model_keys(cfg), cfg.pad, video.name)

    def _read(self, file: pathlib.Path) -> np.ndarray:
        return action_rows.of(sidecars.read(file), self._cfg.model.actions)


def _has_own(video: Video) -> bool:
    return bool(video.actions or (video.script or {}).get("actions"))


def _lengths(video: Video) -> list[int]:
    """Chunks of each shot."""
    starts = [i for i, chunk in enumerate(video.chunks) if chunk.cut or i == 0]
    return [stop - start for start, stop in itertools.pairwise([*starts, len(video.chunks)])]


def _around(rows: np.ndarray, count: int, start: int) -> np.ndarray:
    """So many rows from `start` on; behind the last comes the first."""
    return rows[(start + np.arange(count)) % len(rows)]


def _sidecars(path: pathlib.Path, name: str) -> tuple[pathlib.Path, ...]:
    """The sidecars of a video's shots, by their numbers; other names come first, as captions do."""
    for folder in (path / "video" / name, path / "caption" / name, path / name):
        if not folder.is_dir():
            continue
        files = [p for p in names.entries(folder, ".npz", ".jsonl") if p.name.endswith(_ENDS)]
        stems = {p.name.removesuffix(end) for p in files for end in _ENDS if p.name.endswith(end)}
        found = (sidecars.beside(folder / f"{stem}.mp4") for stem in sorted(stems, key=_order))
        if files:
            return tuple(filter(None, found))
    return ()


def _order(stem: str):
    return stem.isdecimal(), int(stem) if stem.isdecimal() else 0, stem
