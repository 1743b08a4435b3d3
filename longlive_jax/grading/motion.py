"""How an object moves, from its region in the frames of a chunk."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from longlive_jax.config import FRAMES_PER_SECOND
from longlive_jax.grading import fit

OTHER = "other"
_LAG = 2  # frames between those whose difference is a velocity
_STILL = 0.1  # heights a second: slower is no movement
_SPIN = 0.5  # radians a second
_GROWTH = 0.012  # of the size, a second
_STRAIGHT = 0.85  # share of the way that goes along one axis
_MIXED = 0.15  # share of the time that a straight movement may go the other way
_TURN = (0.7, 3.5)  # radians a second that the direction of an orbit turns by
_TURN_ERROR = 0.5  # radians that its direction is off by, in the median
_SURE = 0.8  # score of a shape that is partly covered
_FEW = 3  # frames that give a size
_SEEN = 6  # frames, at least, to speak of a motion


@dataclasses.dataclass(frozen=True, eq=False)
class Track:
    """An object's way through a chunk; lengths in heights of the frame, NaN where unknown.

    x, y, size: float [frame]. velocity: float [frame - 2, 2], heights a second. growth: share of
    the size, a second. spin: radians a second.
    """

    x: np.ndarray
    y: np.ndarray
    size: np.ndarray
    velocity: np.ndarray
    growth: float
    spin: float

    @property
    def middle(self) -> tuple[float, float]:
        """Its place, in the median."""
        return _median(self.x), _median(self.y)

    @property
    def middle_size(self) -> float:
        """Its size, in the median."""
        return _median(self.size)

    @property
    def motion(self) -> str:
        """One of shapes.MOTIONS, OTHER, or "" for too few frames."""
        known = self.velocity[np.isfinite(self.velocity).all(1)]
        if len(known) < _SEEN:
            return ""
        if np.median(np.hypot(*known.T)) < _STILL:
            return self._on_the_spot()
        way = np.abs(known).sum(0)
        for axis, names in enumerate((("right", "left"), ("down", "up"))):
            if way[axis] > _STRAIGHT * way.sum():
                return _straight(known[:, axis], names, bounces=axis == 1)
        return "orbit" if self._turns() else OTHER

    def _on_the_spot(self) -> str:
        if abs(self.spin) > _SPIN:
            return "spin"
        if abs(self.growth) > _GROWTH:
            return "grow" if self.growth > 0 else "shrink"
        return "still"

    def _turns(self) -> bool:
        known = np.isfinite(self.velocity).all(1)
        seconds = np.flatnonzero(known) / FRAMES_PER_SECOND
        heading = np.unwrap(np.arctan2(self.velocity[known, 1], self.velocity[known, 0]))
        slope, rest = _line(seconds, heading)
        return _TURN[0] < abs(slope) < _TURN[1] and rest < _TURN_ERROR


def _straight(velocity, names, bounces):
    forward = float((velocity > 0).mean())
    if min(forward, 1 - forward) > _MIXED:
        return "bounce" if bounces else OTHER
    return names[0] if forward > 0.5 else names[1]


def follow(views: Mapping[int, fit.View], count: int, shape: str, height: int) -> Track:
    """Follows a region whose shape is known through `count` frames of `height` pixels.

    views: of those frames in which something is seen, by their number.
    """
    fits = {i: fit.fit(view, shape) for i, view in views.items() if view.whole}
    whole = list(fits)
    cut = [i for i, view in views.items() if not view.whole and not view.hidden.any()]
    largest = sorted(cut, key=lambda i: -views[i].area)[:_FEW]
    usual = float(np.median([fit.fit(views[i], shape).size for i in largest])) if cut else 0.0
    for i in cut:
        known = len(whole) >= _FEW
        size = fits[min(whole, key=lambda j: abs(i - j))].size if known else usual
        fits[i] = fit.place(views[i], shape, size)
    for order in (range(1, count), range(count - 2, -1, -1)):
        for i in order:
            before = fits.get(i - order.step)
            if i not in fits and i in views and before is not None:
                found = fit.near(views[i], shape, before)
                if found.score > _SURE:
                    fits[i] = found
    values = np.full((count, 4), np.nan)  # x, y, size, angle
    for i, found in fits.items():
        values[i] = found[1:]
    velocity = (values[_LAG:, :2] - values[:-_LAG, :2]) * (FRAMES_PER_SECOND / _LAG / height)
    size, width = np.full(count, np.nan), np.full(count, np.nan)
    size[whole] = values[whole, 2]
    for i, view in views.items():
        if not view.hidden.any():
            width[i] = view.edges[2] - view.edges[0]
    growth = _growth(size if len(whole) >= _SEEN else width)
    if not whole:
        size[largest] = usual
    angle = np.full(count, np.nan)
    angle[whole] = values[whole, 3]
    x, y = values[:, :2].T / height
    return Track(x, y, size / height, velocity, growth, _spin(angle, shape))


def _growth(length):
    seen = np.isfinite(length) & (length > 0)
    if seen.sum() < _SEEN:
        return 0.0
    return _line(np.flatnonzero(seen) / FRAMES_PER_SECOND, np.log(length[seen]))[0]


def _spin(angle, shape):
    symmetry = fit.SYMMETRY[shape]
    seen = np.isfinite(angle)
    if not symmetry or seen.sum() < _SEEN:
        return 0.0
    turn = 2 * np.pi / symmetry
    unwrapped = np.unwrap(angle[seen], period=turn)
    slope, rest = _line(np.flatnonzero(seen) / FRAMES_PER_SECOND, unwrapped)
    return slope if rest < turn / 8 else 0.0


def _median(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else float("nan")


def _line(x, y) -> tuple[float, float]:
    """Slope of the line through points by the median of slopes (Theil 1950, Sen 1968), and how far
    the points are from it, in the median.
    """
    i, j = np.triu_indices(len(x), k=1)
    slope = float(np.median((y[j] - y[i]) / (x[j] - x[i])))
    rest = y - slope * x
    return slope, float(np.median(np.abs(rest - np.median(rest))))
