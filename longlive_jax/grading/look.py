"""What the frames of a chunk show, without a look at its prompt."""

import dataclasses

import numpy as np
from scipy import ndimage

from longlive_jax.data.worlds.shapes import BACKGROUNDS, SHAPES
from longlive_jax.grading import fit, segment
from longlive_jax.grading.motion import Track, follow

_OFTEN = 0.4  # share of a chunk's frames with an object, for it to count
_LOOKS = 6  # frames that are looked at for a shape
_TINT = 0.6  # most area of a discoloured part, of the rest
_TOUCHES = 0.8  # share of frames in which it touches the rest
_OWN = 0.88  # score of a shape that is an object of its own, whatever it touches
CLEAR = 0.64  # least score of a shape; below, it is none
_CLEAR_GROUND = 22.0  # most error of a background, in RGB
_EDGE = 0.04  # least gradient of an edge, a pixel
_SQUARE = np.ones((3, 3), bool)


@dataclasses.dataclass(frozen=True, eq=False)
class Thing:
    """An object.

    shape: "" where it is none of the world's. scores: of each shape, 0 to 1. fit: of its clearest
    frame. track: its way. sharpness: edge width of a real clip over its own, NaN where unknown.
    rgb: its colour as measured, 0 to 255. extra: a second object of its colour is there.
    """

    shape: str
    colour: str
    motion: str
    scores: dict[str, float]
    track: Track
    sharpness: float
    rgb: np.ndarray
    extra: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """A chunk. background: number in BACKGROUNDS, None where it is none of the world's.

    error: its mean distance in RGB.
    """

    background: int | None
    error: float
    things: tuple[Thing, ...]


def look(frames: segment.Frames, original: np.ndarray) -> Seen:
    """Looks at a chunk. original: its frames before `segment.to_height`, uint8."""
    ground = int(np.bincount(frames.grounds, minlength=len(BACKGROUNDS)).argmax())
    same = np.flatnonzero(frames.grounds == ground)
    error = float(np.median(frames.errors[same]))
    often = frames.present[same].mean(0) > _OFTEN
    colours = [int(c) for c in np.flatnonzero(often)]
    regions = segment.regions(frames, ground, colours)
    while (tint := _tint(regions)) is not None:
        small, large = tint
        frames = frames.merged(small.colour, large.colour, large.rgb)
        colours.remove(small.colour)
        regions = segment.regions(frames, ground, colours)
    things = [_thing(region, ground, original) for region in regions]
    clear = error < _CLEAR_GROUND
    return Seen(ground if clear else None, error, tuple(thing for thing in things if thing))


def _tint(regions) -> tuple[segment.Region, segment.Region] | None:
    """A part of an object, in another colour, and the object's larger part."""
    solid = [region.alpha > 0.5 for region in regions]
    for small, inside in zip(regions, solid):
        for large, other in zip(regions, solid):
            if inside.sum() > _TINT * other.sum() or not small.there.any():
                continue
            around = ndimage.binary_dilation(inside, _SQUARE[None], iterations=3)
            touches = (around & other).any((1, 2))[small.there]
            if touches.mean() < _TOUCHES:
                continue
            views = _views(small)
            found = [fit.fits(views[i]) for i in _clearest(views)[:2]]
            if not found or max(f.score for one in found for f in one.values()) < _OWN:
                return small, large
    return None


def _thing(region: segment.Region, ground: int, original: np.ndarray) -> Thing | None:
    views = _views(region)
    best = _clearest(views)
    if not best:
        return None
    looked = [(i, fit.fits(views[i])) for i in best]
    # The better half: a few frames after a cut may be neither the old shot nor the new.
    looked.sort(key=lambda one: -max(f.score for f in one[1].values()))
    looked = looked[: (len(looked) + 1) // 2]
    scores = {shape: float(np.mean([f[shape].score for _, f in looked])) for shape in SHAPES}
    shape = max(scores, key=lambda name: scores[name])
    height = region.alpha.shape[1]
    track = follow(views, len(region.alpha), shape, height)
    sharp = [
        _sharpness(original[i], ground, region.rgb, shape, f[shape], region.alpha[i])
        for i, f in looked
        if views[i].whole
    ]
    return Thing(
        shape if scores[shape] >= CLEAR else "",
        segment.NAMES[region.colour],
        track.motion,
        scores,
        track,
        float(np.median(sharp)) if sharp else np.nan,
        region.rgb,
        bool(region.extra.mean() > _OFTEN),
    )


def _views(region: segment.Region) -> dict[int, fit.View]:
    """By the frame's number."""
    frames = np.flatnonzero(region.there).tolist()
    views = {i: fit.view(region.alpha[i], region.hidden[i]) for i in frames}
    return {i: view for i, view in views.items() if view is not None}


def _clearest(views: dict[int, fit.View]) -> list[int]:
    """Up to _LOOKS frames, far from each other, of those that show most."""
    whole = [i for i, view in views.items() if view.whole]
    if whole:
        return [whole[i] for i in np.unique(np.linspace(0, len(whole) - 1, _LOOKS).astype(int))]
    order = sorted(views, key=lambda i: -views[i].area + views[i].hidden.sum())
    return order[:3]


def _sharpness(frame, ground, rgb, shape, found, near) -> float:
    """Edge width of the shape as the world draws it, over that of the frame's."""
    scale = frame.shape[0] / near.shape[0]
    alpha = segment.alpha_of(frame.astype(np.float32), ground, rgb)
    ys, xs = np.mgrid[: alpha.shape[0], : alpha.shape[1]] + np.float32(0.5)
    x, y, radius = (scale * value for value in (found.x, found.y, found.size / 2))
    c, s = np.cos(found.angle), np.sin(found.angle)
    dx, dy = (xs - x) / radius, (ys - y) / radius
    far = fit.distance(shape, c * dx + s * dy, c * dy - s * dx) * radius
    drawn = np.clip(0.5 - far, 0, 1)
    inside = ndimage.binary_dilation(drawn > 0, _SQUARE, iterations=max(3, round(4 * scale)))
    return _edge_width(drawn, inside) / _edge_width(np.where(inside, alpha, 0), inside)


def _edge_width(alpha, inside) -> float:
    """Pixels: the sum of gradients over the sum of their squares, which of a ramp is its length."""
    dy, dx = np.gradient(alpha)
    steep = np.hypot(dx, dy)[inside]
    steep = steep[steep > _EDGE]
    return float(steep.sum() / max((steep**2).sum(), 1e-6))
