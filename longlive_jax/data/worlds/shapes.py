"""A small world of moving shapes: frames, and captions that describe them exactly.

A clip is a row of shots; a shot shows one or two objects over a background, each with a shape, a
colour and a motion. Some (shape, colour, motion) never occur in training: they are held out, to
test whether a model that has learnt the parts can combine them. Everything follows from a seed.
Lengths are in heights of the frame, times in seconds; x points right, y down.
"""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Iterator

import numpy as np

from longlive_jax.config import FRAMES_PER_SECOND

HEIGHT, WIDTH = 128, 192
ASPECT = WIDTH / HEIGHT  # where objects move; a frame of another aspect ratio shows more or less
SHOTS = (2, 4)  # of a clip, least and most
FRAMES = (64, 125)  # of a shot: two always give a sample of four chunks

COLOURS = {
    "red": (226, 38, 38),
    "orange": (255, 146, 20),
    "yellow": (250, 226, 50),
    "green": (52, 190, 70),
    "cyan": (64, 216, 232),
    "blue": (40, 84, 240),
    "purple": (142, 50, 186),
    "pink": (255, 140, 196),
}
GROUNDS = {
    "black": (10, 10, 12),
    "white": (244, 244, 240),
    "grey": (132, 134, 138),
    "dark blue": (18, 26, 78),
    "dark green": (14, 62, 34),
    "brown": (98, 62, 36),
}
_CONTRAST = 100  # least distance in RGB between an object and any colour of the background
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "moon")
_ROUND = ("circle", "ring")  # their spin is invisible
# Two phrases of equal meaning for each motion.
MOTIONS = {
    "left": ("moves left", "moves to the left"),
    "right": ("moves right", "moves to the right"),
    "up": ("moves up", "rises"),
    "down": ("moves down", "falls"),
    "bounce": ("bounces", "bounces up and down"),
    "orbit": ("circles round", "goes round and round"),
    "spin": ("spins", "turns on the spot"),
    "grow": ("grows", "gets bigger"),
    "shrink": ("shrinks", "gets smaller"),
    "still": ("stands still", "does not move"),
}
_PLAINS = tuple(("plain", name, name) for name in GROUNDS)
_GRADIENTS = (
    ("gradient", "dark blue", "black"), ("gradient", "black", "brown"),
    ("gradient", "white", "grey"), ("gradient", "dark green", "black"),
)  # fmt: skip
_STRIPES = (
    ("stripes", "black", "grey"), ("stripes", "white", "grey"),
    ("stripes", "dark blue", "dark green"), ("stripes", "black", "brown"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Background:
    """`kind`: "plain", "gradient" from `first` at the top to `second`, or upright "stripes"."""

    kind: str
    first: str
    second: str

    @property
    def words(self) -> str:
        if self.kind == "plain":
            return f"a {self.first} background"
        if self.kind == "gradient":
            return f"a background that fades from {self.first} to {self.second}"
        return f"a background of {self.first} and {self.second} stripes"


BACKGROUNDS = tuple(Background(*names) for names in (*_PLAINS, *_GRADIENTS, *_STRIPES))


@dataclasses.dataclass(frozen=True)
class Object:
    """A visible object. `size` is its diameter, (x, y) the centre of its motion.

    phase: where in its motion it begins, 0 to 1. rate: speed of the motion, about 1.
    """

    shape: str
    colour: str
    motion: str
    size: float
    x: float
    y: float
    phase: float
    rate: float

    @property
    def words(self) -> str:
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self.colour} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Shot:
    """`frames` frames, 24 a second, without a cut. The first object is in front."""

    background: Background
    objects: tuple[Object, ...]
    frames: int
    caption: str


def held_out(shape: str, colour: str, motion: str) -> bool:
    """Whether this combination is for evaluation only; about one in eight is."""
    return zlib.crc32(f"{shape} {colour} {motion}".encode()) % 8 == 0


def clips(seed: int, count: int, held_out: bool = False) -> Iterator[tuple[Shot, ...]]:
    """`count` clips of 2 to 4 shots, of training or of held-out combinations alone.

    A clip depends on the seed and on its number, not on `count`.
    """
    for number in range(count):
        rng = np.random.default_rng((seed, int(held_out), number))
        shots = rng.integers(SHOTS[0], SHOTS[1], endpoint=True)
        yield tuple(shot(rng, held_out) for _ in range(shots))


def shot(rng: np.random.Generator, held_out: bool = False) -> Shot:
    """A random shot, of held-out combinations only or of none."""
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    count = int(rng.integers(1, 2, endpoint=True))
    kinds = _kinds(background, held_out)
    chosen = [kinds[rng.integers(len(kinds))]]
    if count == 2:  # of other shape and colour, so that a caption names only one
        kinds = [k for k in kinds if k[0] != chosen[0][0] and k[1] != chosen[0][1]]
        chosen.append(kinds[rng.integers(len(kinds))])
    objects = tuple(_object(rng, kind, place, count) for place, kind in enumerate(chosen))
    frames = int(rng.integers(FRAMES[0], FRAMES[1], endpoint=True))
    ways = rng.integers(2, size=count)
    clauses = [f"{o.words} {MOTIONS[o.motion][way]}" for o, way in zip(objects, ways)]
    return Shot(background, objects, frames, _captions(clauses, background)[rng.integers(3)])


@functools.cache
def _kinds(background: Background, unseen: bool) -> list[tuple[str, str, str]]:
    """(shape, colour, motion) of all objects that stand out from the background."""
    return [
        (shape, colour, motion)
        for shape, colour, motion in itertools.product(SHAPES, COLOURS, MOTIONS)
        if not (motion == "spin" and shape in _ROUND)
        and held_out(shape, colour, motion) == unseen
        and stands_out(colour, background)
    ]


def stands_out(colour: str, background: Background) -> bool:
    """Whether the colour is far from both of the background's."""
    behind = np.asarray([GROUNDS[background.first], GROUNDS[background.second]])
    return bool(np.linalg.norm(behind - COLOURS[colour], axis=1).min() >= _CONTRAST)


def _object(rng: np.random.Generator, kind, place: int, count: int) -> Object:
    if count == 1:
        size, x, y = rng.uniform(0.36, 0.5), ASPECT / 2, 0.5
    else:  # one to the upper left and one to the lower right, so that they rarely overlap
        size, x, y = rng.uniform(0.34, 0.4), (0.25, 0.75)[place] * ASPECT, (0.27, 0.73)[place]
    x, y = x + rng.uniform(-0.06, 0.06), y + rng.uniform(-0.03, 0.03)
    phase, rate = rng.uniform(0, 1), rng.uniform(0.85, 1.2)
    return Object(*kind, *(round(float(v), 4) for v in (size, x, y, phase, rate)))


def _captions(clauses: list[str], background: Background) -> list[str]:
    """The possible captions of a shot."""
    both, there = " and ".join(clauses), background.words
    ways = (
        f"{both} over {there}.",
        f"over {there}, {' while '.join(clauses)}.",
        f"there is {there}. {both[0].upper()}{both[1:]}.",
    )
    return [way[0].upper() + way[1:] for way in ways]


# Frames.


def render(
    shot: Shot, start: int, stop: int, height: int = HEIGHT, width: int = WIDTH
) -> np.ndarray:
    """Frames start..stop-1 of a shot, uint8 [frame, height, width, 3]; antialiased."""
    behind = background_picture(shot.background, height, width)
    frames = np.empty((stop - start, height, width, 3), np.uint8)
    for i in range(stop - start):
        picture = behind.copy()
        for thing in reversed(shot.objects):
            seconds = (start + i) / FRAMES_PER_SECOND
            paint(picture, thing.shape, COLOURS[thing.colour], state(thing, seconds))
        frames[i] = picture + np.float32(0.5)
    return frames


def state(thing: Object, seconds: float) -> tuple[float, float, float, float]:
    """(x, y, diameter, angle in radians) of an object `seconds` after its shot began."""
    x, y, size, angle = thing.x, thing.y, thing.size, 0.0
    t, start = thing.rate * seconds, 2 * np.pi * thing.phase
    if thing.motion in ("left", "right"):
        x = _wrap(thing.phase, 0.45 * t, ASPECT, size, thing.motion == "left")
    elif thing.motion in ("up", "down"):
        y = _wrap(thing.phase, 0.36 * t, 1.0, size, thing.motion == "up")
    elif thing.motion == "bounce":  # a ball on a floor: a parabola, again and again
        u = (thing.phase + t / 1.2) % 1
        top, floor = y - 0.2, min(y + 0.2, 1 - size / 2)
        y = floor - (floor - top) * 4 * u * (1 - u)
    elif thing.motion == "orbit":
        radius = 0.4 * size
        x, y = x + radius * np.cos(start + 1.7 * t), y + radius * np.sin(start + 1.7 * t)
    elif thing.motion == "spin":
        angle = start + 1.9 * t
    elif thing.motion in ("grow", "shrink"):  # ever slower, so that it never ends
        small, large = 0.5 * size, 1.3 * size
        rest = np.exp(-t / 3)
        size = large + (small - large) * (rest if thing.motion == "grow" else 1 - rest)
    return float(x), float(y), float(size), float(angle)


def _wrap(phase: float, way: float, length: float, size: float, back: bool) -> float:
    """Position on a line that an object leaves at one end and enters again at the other."""
    whole = length + size
    first = (0.2 + 0.6 * phase) * whole  # inside: a shot begins with all that its caption names
    return (first + (-way if back else way)) % whole - size / 2


@functools.lru_cache(maxsize=16)
def background_picture(background: Background, height: int, width: int) -> np.ndarray:
    """float32 [height, width, 3] in 0..255; read-only."""
    first, second = (
        np.asarray(GROUNDS[name], np.float32) for name in (background.first, background.second)
    )
    if background.kind == "gradient":
        share = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    else:  # stripes a fifth of the height wide, with edges a pixel wide
        x = (np.arange(width, dtype=np.float32) + 0.5) / height
        edge = 0.2 * (np.abs((x / 0.4) % 1 - 0.5) - 0.25) * 2
        share = np.clip(edge * height + 0.5, 0, 1)[None, :, None]
    picture = np.broadcast_to(first + (second - first) * share, (height, width, 3)).copy()
    picture.setflags(write=False)
    return picture


def paint(
    picture: np.ndarray,
    shape: str,
    colour: tuple[int, int, int],
    state: tuple[float, float, float, float],
) -> None:
    """Paints a shape over float32 [height, width, 3], in place: (x, y, diameter, angle)."""
    height, width, _ = picture.shape
    x, y, size, angle = state
    reach = size / 2 + 1 / height
    top, bottom = (int(np.clip(round((y + r) * height), 0, height)) for r in (-reach, reach))
    left, right = (int(np.clip(round((x + r) * height), 0, width)) for r in (-reach, reach))
    if top >= bottom or left >= right:
        return
    # In the shape's own axes, in units of its radius.
    dy = ((np.arange(top, bottom, dtype=np.float32) + 0.5) / height - y)[:, None] * (2 / size)
    dx = ((np.arange(left, right, dtype=np.float32) + 0.5) / height - x)[None, :] * (2 / size)
    c, s = np.cos(angle), np.sin(angle)
    u, v = (c * dx + s * dy).astype(np.float32), (c * dy - s * dx).astype(np.float32)
    pixels = distance(shape, u, v) * np.float32(size / 2 * height)
    cover = np.clip(0.5 - pixels, 0, 1)[..., None]
    part = picture[top:bottom, left:right]
    part += (np.asarray(colour, np.float32) - part) * cover


def distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Distance from the edge of a shape of radius 1, below 0 inside; v points down.

    Near an edge it is exact, which is all that antialiasing needs.
    """
    if shape == "circle":
        return np.hypot(u, v) - 1
    if shape == "ring":
        return np.abs(np.hypot(u, v) - 0.74) - 0.26
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.78
    if shape == "cross":
        a, b = np.abs(u), np.abs(v)
        return np.minimum(np.maximum(a - 0.95, b - 0.3), np.maximum(a - 0.3, b - 0.95))
    if shape == "triangle":  # three edges, each half a radius from the centre
        return np.maximum(v, 0.866 * np.abs(u) - 0.5 * v) - 0.5
    if shape == "moon":  # a disc less another to its right
        return np.maximum(np.hypot(u, v) - 1, 0.85 - np.hypot(u - 0.5, v))
    # A star: folded to half of one of its five points, of which one edge is left.
    fifth = 2 * np.pi / 5
    around = np.arctan2(u, -v)
    around = np.abs(around - fifth * np.round(around / fifth))
    radius = np.hypot(u, v)
    along, across = radius * np.cos(around) - 1, radius * np.sin(around)
    # From the tip (radius 1) to the notch (radius 0.45, half a fifth on).
    notch = 0.45 * np.cos(fifth / 2) - 1, 0.45 * np.sin(fifth / 2)
    length = np.hypot(*notch)
    return (along * notch[1] - across * notch[0]) / np.float32(length)
