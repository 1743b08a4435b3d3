"""The game as the truth: its pictures of the same actions from the same start."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from longlive_jax.data import sidecars
from longlive_jax.data.worlds.doom.game import EpisodeEndedError, Games, Size, Start
from longlive_jax.data.worlds.doom.record import play
from longlive_jax.data.worlds.poses import Pose, wrap
from longlive_jax.data.worlds.takes import held_of
from longlive_jax.errors import InputError
from longlive_jax.grading.walk import pictures
from longlive_jax.grading.walk.places import References

SAME = 0.75  # correlation of reduced pictures from which on a place is the same
_NEAR, _FACING, _LEVEL = 24.0, 6.0, 3.0  # units, degrees of yaw and of pitch: back at the start
_AWAY, _ASIDE = 100.0, 60.0  # units or degrees: gone from it
_EVERY = 8  # pictures: one of so many says the view and the place


class Simulator:
    """Engines of the game for one size of pictures, with what it shows of each place.

    references: None: views and places are not judged.
    """

    def __init__(self, games: Games, references: References | None):
        self.games, self.references = games, references

    @property
    def size(self) -> Size:
        return self.games.size

    def frames(self, start: Start, actions: sidecars.Actions) -> Iterator[tuple[np.ndarray, Pose]]:
        """The true picture and pose of each picture, one by one.

        Raises:
          InputError: nobody can stand at the start; the episode ends before the actions do.
        """
        shown = 0
        try:
            for pair in play(self.games, start, held_of(actions)):
                yield pair
                shown += 1
        except EpisodeEndedError:
            raise InputError(
                f"{actions.where}: the game's episode ends after picture {shown - 1} of "
                f"{len(actions)}; leave out --simulator"
            ) from None

    def compare(self, frames: np.ndarray, true: np.ndarray, start: Start) -> dict[str, Any]:
        """A second of video against the true one: both uint8 [picture, height, width, 3]."""
        found: dict[str, Any] = {
            "psnr": round(float(np.mean([pictures.psnr(a, b) for a, b in zip(frames, true)])), 3),
            "ssim": round(pictures.ssim(pictures.luma(frames), pictures.luma(true)), 4),
        }
        if self.references is not None:
            small = pictures.small(frames[::_EVERY])
            true_small = pictures.small(true[::_EVERY])
            for name, said, asked in (
                ("view", self.references.views, start.view),
                ("place", self.references.places, start.place),
            ):
                # Who looks at a wall from near sees no place: where the truth shows none, none is
                # asked for. How often it does is the accuracy of what says so.
                found[f"{name}_known"] = known = _most(said(true_small)) == asked
                found[name] = _most(said(small)) == asked if known else None
        return found


@dataclasses.dataclass
class Returns:
    """Whether a video shows the same where, in truth, who walks is back at the start.

    view: "first" or "third", whose figure is not compared.
    """

    view: str = "first"
    first: np.ndarray | None = None
    pose: Pose | None = None
    away: bool = False
    left: int = 0  # the last picture in which who walks was there
    best: tuple[float, int, np.ndarray] | None = None
    found: list[tuple[int, int, np.ndarray]] = dataclasses.field(default_factory=list)

    def see(self, number: int, frame: np.ndarray, pose: Pose) -> None:
        """Takes picture `number` of the video, and the true pose there."""
        if self.first is None or self.pose is None:
            self.first, self.pose = frame.copy(), pose
            return
        far = float(np.hypot(pose.x - self.pose.x, pose.y - self.pose.y))
        turned, up = abs(wrap(pose.yaw - self.pose.yaw)), abs(pose.pitch - self.pose.pitch)
        if far > _AWAY or turned > _ASIDE:
            self._keep()
            self.away = True
        elif far <= _NEAR and turned <= _FACING and up <= _LEVEL:
            if not self.away:
                self.left = number
                return
            cost = far / _NEAR + turned / _FACING + up / _LEVEL
            if self.best is None or cost < self.best[0]:
                self.best = cost, number, frame.copy()

    def records(self) -> list[dict[str, Any]]:
        """A record of each return: the picture, how alike it is, and whether it is the same.

        "gone": pictures since the last one in which who walks was there.
        """
        self._keep()
        return [self._record(*found) for found in self.found]

    def _keep(self) -> None:
        if self.best is not None:
            _, number, frame = self.best
            self.found.append((number, self.left, frame))
            self.best, self.away, self.left = None, False, number

    def _record(self, number: int, left: int, frame: np.ndarray) -> dict[str, Any]:
        assert self.first is not None
        pair = np.stack([self.first, frame])
        luma, small = pictures.luma(pair), pictures.small(pair)
        alike = pictures.alike(small[0], small[1], pictures.scenery(small[0].shape, self.view))
        return {
            "frame": number,
            "gone": number - left,
            "psnr": round(pictures.psnr(*pair), 3),
            "ssim": round(pictures.ssim(luma[:1], luma[1:]), 4),
            "alike": round(alike, 4),
            "same": alike >= SAME,
        }


def start_of(actions: sidecars.Actions) -> Start:
    """Where the game begins, by the sidecar's source.

    Raises:
      InputError: it names none.
    """
    try:
        return Start.of_text(actions.source)
    except InputError as error:
        raise InputError(
            f"{actions.where}: {error}; copy `source` of the sidecar whose actions were played, or "
            "leave out --simulator"
        ) from error


def _most(words: list[str]) -> str:
    return max(sorted(set(words)), key=words.count)
