"""Which place, and which view, a picture shows: by the game's own pictures of each place."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from longlive_jax.data.worlds.doom import record
from longlive_jax.data.worlds.doom.game import VIEWS, Games
from longlive_jax.data.worlds.doom.places import PLACES
from longlive_jax.grading.walk import pictures

SHOTS, FRAMES, EVERY = 8, 121, 8  # films of each place and view, pictures of each, one of so many
_SEED = 731  # of those films: of no clip that `record.clips` draws
_BINS = 6  # of each colour
_NEIGHBOURS = 5
_STEADY = 0.35  # part of the figure's box that changes least from picture to picture


@dataclasses.dataclass(frozen=True)
class References:
    """features [picture, bin] of pictures and the place of each; and the figure of a third person.

    figure: float32 [row, column, 3], its middle picture; steady: bool [row, column], where it is.
    threshold: correlation from which on it is there.
    """

    features: np.ndarray
    place: np.ndarray
    names: tuple[str, ...]
    figure: np.ndarray
    steady: np.ndarray
    threshold: float

    def places(self, small: np.ndarray) -> list[str]:
        """The place of each reduced picture: that of most of the nearest references."""
        close = _features(small) @ self.features.T
        nearest = np.argsort(-close, axis=1)[:, :_NEIGHBOURS]
        votes = [np.bincount(self.place[row], minlength=len(self.names)) for row in nearest]
        return [self.names[int(vote.argmax())] for vote in votes]

    def views(self, small: np.ndarray) -> list[str]:
        """The view of each reduced picture: third where the figure is where it belongs."""
        found = [self._figure(one) for one in small]
        return [VIEWS[int(one >= self.threshold)] for one in found]

    def _figure(self, small: np.ndarray) -> float:
        return pictures.correlation(_box(small)[self.steady], self.figure[self.steady])


def references(games: Games, names: Sequence[str] = tuple(PLACES), shots: int = SHOTS):
    """Films each place from both views, and keeps some pictures of each film.

    Raises:
      InputError: the game is not installed.
    """
    small: dict[str, list[np.ndarray]] = {view: [] for view in VIEWS}
    place: dict[str, list[int]] = {view: [] for view in VIEWS}
    for number, name in enumerate(names):
        for view in VIEWS:
            for i in range(shots):
                key = (_SEED, number, VIEWS.index(view), i)
                take = record.film(games, record.Shot(name, view, "explore", FRAMES, key))
                found = pictures.small(take.frames[::EVERY])
                small[view].append(found)
                place[view] += [number] * len(found)
    first, third = (np.concatenate(small[view]) for view in VIEWS)
    boxes = np.stack([_box(one) for one in third])
    figure = np.median(boxes, axis=0)
    change = np.abs(boxes - figure).mean(axis=(0, 3))
    steady = change <= np.quantile(change, _STEADY)
    made = References(
        np.concatenate([_features(first), _features(third)]),
        np.asarray(place["first"] + place["third"]), tuple(names), figure, steady, 0.0,
    )  # fmt: skip
    without, with_it = ([made._figure(one) for one in part] for part in (first, third))
    return dataclasses.replace(made, threshold=_between(np.asarray(without), np.asarray(with_it)))


def _between(low: np.ndarray, high: np.ndarray) -> float:
    """The threshold that tells most of two sets apart."""
    tried = np.linspace(-1, 1, 401)
    right = [(low < x).mean() + (high >= x).mean() for x in tried]
    best = np.flatnonzero(np.asarray(right) >= max(right) - 1e-9)
    return float(tried[best].mean())


def _features(small: np.ndarray) -> np.ndarray:
    """Square roots of shares of colours, [picture, bin]: their product is 1 for equal ones."""
    bins = np.minimum((np.sqrt(np.clip(small, 0, 255) / 255) * _BINS).astype(int), _BINS - 1)
    code = (bins[..., 0] * _BINS + bins[..., 1]) * _BINS + bins[..., 2]
    halves = np.split(code, [code.shape[1] // 2], axis=1)
    counts = [
        np.stack([np.bincount(one.ravel(), minlength=_BINS**3) for one in half]) for half in halves
    ]
    shares = np.concatenate(counts, axis=1).astype(np.float32)
    return np.sqrt(shares / shares.sum(axis=1, keepdims=True))


def _box(small: np.ndarray) -> np.ndarray:
    return small[pictures.box(small.shape)]
