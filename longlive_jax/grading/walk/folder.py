"""Walks to grade: a folder's videos with the sidecars beside them, or the game's own clips."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from longlive_jax.data import sidecars
from longlive_jax.data.video_reader import VideoFile
from longlive_jax.data.worlds.doom import game, record
from longlive_jax.data.worlds.doom.game import Games, Size
from longlive_jax.errors import InputError
from longlive_jax.grading import folder as folder_lib
from longlive_jax.grading.walk import asked, places, truth, video
from longlive_jax.grading.walk.flow import FOCAL

SIZE = (160, 256)  # of the game's own clips
FRAMES = 241  # of each: ten seconds
_SPLITS = ("routes", "map")  # they take turns


class Simulators:
    """A simulator for each size of pictures. A context manager closes their engines."""

    def __init__(self, shots: int = places.SHOTS):
        self._shots, self._made = shots, dict[tuple[int, int], truth.Simulator]()
        self._open = contextlib.ExitStack()

    def of(self, height: int, width: int) -> truth.Simulator:
        """The one for pictures of this size, which films its references first."""
        size = (height, width)
        if size not in self._made:
            games = self._open.enter_context(Games(Size(height, width)))
            found = places.references(games, shots=self._shots)
            self._made[size] = truth.Simulator(games, found)
        return self._made[size]

    def __enter__(self) -> "Simulators":
        return self

    def __exit__(self, *error) -> None:
        self._open.close()


def videos(
    folder: pathlib.Path, *, simulate: bool = False, focal: float = FOCAL
) -> Iterator[dict[str, Any]]:
    """The record of each video of a folder; all videos and sidecars are checked before the first.

    Raises:
      InputError: no videos; one without a sidecar, or of another length or rate; with `simulate`
        also a source that is no start, a size that the game does not draw, the game missing.
    """
    found = []
    for file in folder_lib.videos(folder):
        path = sidecars.beside(file)
        if path is None:
            raise InputError(
                f"{file}: has no sidecar ({sidecars.path_for(file).name}); launch.sample --actions "
                "and launch.record_doom write it beside the video"
            )
        with VideoFile(file) as one:
            actions = sidecars.read(path, len(one), float(one.info.fps))
            height, width = one.info.height, one.info.width
        asked.of_actions(actions.cut(0, 1))  # its rate
        if len(actions) <= video.LEAST:
            raise InputError(
                f"{file}: has {len(actions)} frames; give {video.LEAST + 1} or more to grade"
            )
        if simulate:
            truth.start_of(actions)
            try:
                Size(height, width).drawn(game.sizes())
            except InputError as error:
                raise InputError(f"{file}: {error}") from error
        found.append((file, actions))
    return _videos(folder, found, simulate, focal)


def check_same(folder: pathlib.Path, other: pathlib.Path) -> None:
    """Refuses two folders whose videos do not have the same names.

    Raises:
      InputError: names the first one that is in one of them alone.
    """
    found = [{str(x.relative_to(f)) for x in folder_lib.videos(f)} for f in (folder, other)]
    for name in sorted(found[0] ^ found[1]):
        one, none = (folder, other) if name in found[0] else (other, folder)
        raise InputError(
            f"{one / name}: {none} has no video of that name; to be compared, both folders need "
            "the same walks"
        )


def clips(
    seed: int,
    count: int,
    *,
    size: tuple[int, int] = SIZE,
    simulate: bool = False,
    change: Callable[[np.ndarray], np.ndarray] = lambda frames: frames,
) -> Iterator[dict[str, Any]]:
    """Records of the game's held-out clips, in turn of routes and of the held-out map.

    Args:
      size: height, width. change: what is made of a clip's frames before they are graded.

    Raises:
      InputError: the game is missing, or does not draw this size.
    """
    Size(*size).drawn(game.sizes())
    return _clips(seed, count, size, simulate, change)


def _videos(folder, found, simulate, focal):
    with Simulators() as simulators:
        for file, actions in found:
            name = str(file.relative_to(folder).with_suffix(""))
            with VideoFile(file) as one:
                size = one.info.height, one.info.width
                simulator = simulators.of(*size) if simulate else None
                yield video.grade(name, one.read, actions, simulator=simulator, focal=focal)


def _clips(seed, count, size, simulate, change):
    each = [-(-count // 2), count // 2]
    drawn = [
        record.clips(seed, n, frames=FRAMES, split=split, cuts=0) for split, n in zip(_SPLITS, each)
    ]
    with Games(Size(*size)) as games, Simulators() as simulators:
        simulator = simulators.of(*size) if simulate else None
        for number in range(count):
            shot = next(drawn[number % 2])[0]
            take = record.film(games, shot)
            frames = change(take.frames)
            name = f"{_SPLITS[number % 2]}-{number // 2:06d} {shot.view} {shot.walk}"
            yield video.grade(
                name, lambda a, b, f=frames: f[a:b], take.actions, simulator=simulator
            )
