"""Which shape a region has, where, how large and how it is turned: by the world's own shapes.

Every shape is drawn at many sizes, places and angles over the region, sharp and blurred; the best
has the largest share of common area (intersection over union, of partly covered pixels too).
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from longlive_jax.data.worlds.shapes import SHAPES, distance

# Each shape looks the same again after this part of a turn.
SYMMETRY = {"circle": 0, "ring": 0, "square": 4, "cross": 4, "triangle": 3, "star": 5, "moon": 1}
_ANGLE = np.pi / 36  # radians between angles that are tried
_POINTS = 44  # about: along each side of a region
_RATIO = 1.03  # between sizes that are tried
_BLURS = (0.0, 0.12, 0.24, 0.36)  # standard deviations of the blur, in radii
_TILTED = 0.95  # what an angle costs a blurred region: few shapes spin, and blobs fit at any
_REACH, _GRID = 2.0, 64  # of the tables of blurred shapes: radii, points a radius


class Fit(NamedTuple):
    """score: 0 to 1. x, y, size: pixels; size is the diameter. angle: radians."""

    score: float
    x: float
    y: float
    size: float
    angle: float


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A region of one frame: what is known of its place.

    alpha: float32 [height, width]. hidden: bool [height, width]; nothing is known there.
    area: pixels. centre: (x, y) of the area. edges: (left, top, right, bottom), where its middle
    levels are. cut: bool, which of the four lie outside the frame.
    """

    alpha: np.ndarray
    hidden: np.ndarray
    area: float
    centre: tuple[float, float]
    edges: tuple[float, float, float, float]
    cut: tuple[bool, bool, bool, bool]

    @property
    def whole(self) -> bool:
        """Whether all of it is seen."""
        return not any(self.cut) and not self.hidden.any()


def view(alpha: np.ndarray, hidden: np.ndarray) -> View | None:
    """The region's measures; None if there is none."""
    height, width = alpha.shape
    columns, rows = alpha.max(0), alpha.max(1)
    if columns.max() < 0.5:
        return None
    area = float(alpha.sum())
    x = float((alpha.sum(0) * (np.arange(width) + 0.5)).sum() / area)
    y = float((alpha.sum(1) * (np.arange(height) + 0.5)).sum() / area)
    left, right = _edge(columns), width - _edge(columns[::-1])
    top, bottom = _edge(rows), height - _edge(rows[::-1])
    cut = (left < 0.6, top < 0.6, right > width - 0.6, bottom > height - 0.6)
    return View(alpha, hidden, area, (x, y), (left, top, right, bottom), cut)


def _edge(profile: np.ndarray) -> float:
    """Where a profile first passes one half, in pixels."""
    i = int((profile >= 0.5).argmax())
    if i == 0:
        return 0.0
    before, after = float(profile[i - 1]), float(profile[i])
    return i + 0.5 - (after - 0.5) / max(after - before, 1e-6)


def fit(view: View, shape: str, blurred: bool = False) -> Fit:
    """The best place, size and angle of a shape; upright where not all of the region is seen.

    blurred: also of blurred shapes.
    """
    if view.whole:
        return _best(view, shape, _of_moments(view, shape, _angles(shape)), blurred)
    found = _best(view, shape, _of_edges(view, shape), blurred)
    return _best(view, shape, _around(found, 0.03), blurred)


def place(view: View, shape: str, size: float) -> Fit:
    """The best place of an upright shape of known size, of which a part is outside the frame."""
    found = _best(view, shape, _of_edges(view, shape, np.asarray([size / 2])))
    # What is cut off changes the extent along the cut, so the shape may be far along it.
    along = np.linspace(-0.4, 0.4, 9) * size
    cut = [view.cut[0] or view.cut[2], view.cut[1] or view.cut[3]]
    return _search(view, shape, found, along if cut[1] else 0, along if cut[0] else 0)


def near(view: View, shape: str, before: Fit) -> Fit:
    """The best place of an upright shape that was seen just before, and is partly covered."""
    along = np.linspace(-0.4, 0.4, 9) * before.size
    return _search(view, shape, before._replace(angle=0.0), along, along)


def _search(view, shape, found, along_x, along_y):
    x, y = (found_at + far for found_at, far in zip(found[1:3], np.meshgrid(along_x, along_y)))
    radius = found.size / 2
    same = np.full(x.size, radius), np.zeros(x.size)
    found = _best(view, shape, np.stack([x.ravel(), y.ravel(), *same], axis=1))
    for step in (0.06, 0.02):
        around = _around(found, step)
        found = _best(view, shape, around[np.isclose(around[:, 2], radius)])
    return found


def fits(view: View) -> dict[str, Fit]:
    """`fit` of every shape, sharp or blurred."""
    return {shape: fit(view, shape, blurred=True) for shape in SHAPES}


def _of_moments(view, shape, angles):
    """Candidates [n, 4] (x, y, radius, angle) with the region's own area and centre."""
    area, u, v, *_ = _measures(shape)
    radius = np.sqrt(view.area / area)
    c, s = np.cos(angles), np.sin(angles)
    x, y = view.centre[0] - radius * (c * u - s * v), view.centre[1] - radius * (s * u + c * v)
    return np.stack([x, y, np.full_like(angles, radius), angles], axis=1)


def _of_edges(view, shape, radius=None):
    """Candidates that keep to the edges that are seen, upright, of many sizes."""
    left, top, right, bottom = view.edges
    _, _, _, low_u, low_v, high_u, high_v = _measures(shape)
    if radius is None:
        seen = max(right - left, bottom - top)
        least, most = 0.42 * seen, max(0.36 * view.alpha.shape[0], 0.6 * seen)
        radius = least * _RATIO ** np.arange(np.ceil(np.log(most / least) / np.log(_RATIO)) + 1)
    x = _placed(left, right, view.cut[0], view.cut[2], low_u, high_u, radius)
    y = _placed(top, bottom, view.cut[1], view.cut[3], low_v, high_v, radius)
    return np.stack([x, y, radius, np.zeros_like(radius)], axis=1)


def _placed(low, high, low_cut, high_cut, least, most, radius):
    if low_cut and not high_cut:
        return high - radius * most
    if high_cut and not low_cut:
        return low - radius * least
    return np.full_like(radius, (low + high) / 2) - radius * (least + most) / 2


def _around(found: Fit, step: float):
    """Candidates near a fit, a step (in radii) away: a blurred edge is not quite where it seems."""
    radius = found.size / 2
    steps = np.stack(np.meshgrid(*[(-1, 0, 1)] * 3, indexing="ij"), -1).reshape(-1, 3)
    candidates = np.empty((len(steps), 4))
    candidates[:, :2] = (found.x, found.y) + steps[:, :2] * step * radius
    candidates[:, 2] = radius * _RATIO ** (steps[:, 2] / 2)
    candidates[:, 3] = found.angle
    return candidates


def _best(view, shape, candidates, blurred=False) -> Fit:
    alpha, hidden = view.alpha, view.hidden
    left, top, right, bottom = view.edges
    margin = 3 + 0.08 * max(right - left, bottom - top)
    x0, x1 = max(0, int(left - margin)), min(alpha.shape[1], int(right + margin) + 1)
    y0, y1 = max(0, int(top - margin)), min(alpha.shape[0], int(bottom + margin) + 1)
    stride = max(1, round(max(x1 - x0, y1 - y0) / _POINTS))
    part = np.s_[y0:y1:stride, x0:x1:stride]
    seen = ~hidden[part]
    ys, xs = np.mgrid[part]
    ys, xs, seen_alpha = (a[seen].astype(np.float32) for a in (ys + 0.5, xs + 0.5, alpha[part]))
    x, y, radius, angle = (c[:, None].astype(np.float32) for c in candidates.T)
    dx, dy = (xs - x) / radius, (ys - y) / radius
    c, s = np.cos(angle), np.sin(angle)
    u, v = c * dx + s * dy, c * dy - s * dx
    top = (0.0, 0)
    for blur in _BLURS if blurred else _BLURS[:1]:
        if blur:
            drawn = _blurred(shape, blur)[_index(v), _index(u)]
        else:
            drawn = np.clip(0.5 - distance(shape, u, v) * radius, 0, 1)
        common, union = np.minimum(drawn, seen_alpha).sum(1), np.maximum(drawn, seen_alpha).sum(1)
        scores = common / np.maximum(union, 1e-6)
        if blurred:
            scores = np.where(candidates[:, 3] == 0, scores, _TILTED * scores)
        top = max(top, (float(scores.max()), int(scores.argmax())))
    score, i = top
    x, y, radius, angle = candidates[i]
    return Fit(score, float(x), float(y), float(2 * radius), float(angle))


def _index(x):
    return np.clip((x + _REACH) * _GRID, 0, 2 * _REACH * _GRID - 1).astype(np.int32)


@functools.cache
def _blurred(shape: str, blur: float) -> np.ndarray:
    """How far a blurred shape of radius 1 covers each point within _REACH."""
    axis = (np.arange(2 * _REACH * _GRID, dtype=np.float32) + 0.5) / _GRID - _REACH
    v, u = np.meshgrid(axis, axis, indexing="ij")
    inside = np.clip(0.5 - distance(shape, u, v) * _GRID, 0, 1)
    return ndimage.gaussian_filter(inside, blur * _GRID)


def _angles(shape: str) -> np.ndarray:
    if not SYMMETRY[shape]:
        return np.zeros(1)
    turn = 2 * np.pi / SYMMETRY[shape]
    return np.arange(0, turn - 1e-6, turn / np.ceil(turn / _ANGLE))


@functools.cache
def _measures(shape: str) -> tuple[float, ...]:
    """Of the shape of radius 1: area, centre of it (u, v), least u and v, greatest u and v."""
    axis = (np.arange(1200, dtype=np.float32) + 0.5) / 500 - 1.2
    v, u = np.meshgrid(axis, axis, indexing="ij")
    inside = distance(shape, u, v) < 0
    u, v = u[inside], v[inside]
    values = len(u) / 500**2, u.mean(), v.mean(), u.min(), v.min(), u.max(), v.max()
    return tuple(map(float, values))
