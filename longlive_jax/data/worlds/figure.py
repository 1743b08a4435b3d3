"""A figure that keys and a mouse drive over the backgrounds of the shapes world.

The smallest world with actions: W and S move it ahead and back, A and D to its sides, the mouse
turns it; a dark dot is where its face is, and the edges of the picture are walls. Lengths are in
heights of the frame, x points right and y down; a pose with yaw 0 faces right. Everything follows
from a seed.
"""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterator, Sequence

import numpy as np

from longlive_jax.data import sidecars
from longlive_jax.data.worlds import poses as poses_lib
from longlive_jax.data.worlds import shapes, walkers
from longlive_jax.data.worlds.poses import Pose, wrap
from longlive_jax.data.worlds.shapes import ASPECT, BACKGROUNDS, COLOURS, HEIGHT, WIDTH, Background
from longlive_jax.data.worlds.takes import Take, actions_of, held_of
from longlive_jax.data.worlds.walkers import Held

SHAPES = tuple(shape for shape in shapes.SHAPES if shape != "moon")  # a moon has a face of its own
FRAMES = (125, 189)  # of a shot, least and most: one gives a sample of four chunks
SPEED = 0.02  # a picture
CUTS = 0.25  # share of clips that have two shots
_FACE = shapes.GROUNDS["black"]
_WALKS = tuple(walk for walk in walkers.WALKS if walk != "tour")


@dataclasses.dataclass(frozen=True)
class Figure:
    """What walks, over what, and where it begins. `size` is its diameter."""

    background: Background
    shape: str
    colour: str
    size: float
    start: Pose

    @property
    def caption(self) -> str:
        article = "an" if self.colour[0] in "aeiou" else "a"
        return (
            f"Third person view, {article} {self.colour} {self.shape} walks over "
            f"{self.background.words}."
        )


@dataclasses.dataclass(frozen=True)
class Shot:
    """`frames` frames of a figure's walk; all of it follows from `seed`."""

    figure: Figure
    walk: str
    frames: int
    seed: tuple[int, ...]


def held_out(shape: str, colour: str) -> bool:
    """Whether such a figure is for evaluation only; about one in eight is."""
    return shapes.held_out(shape, colour, "walk")


def clips(seed: int, count: int, held_out: bool = False) -> Iterator[tuple[Shot, ...]]:
    """`count` clips of one shot or two, of figures for training or of held-out ones alone.

    A clip depends on the seed and on its number, not on `count`. Held-out clips have each walk in
    turn.
    """
    shares = np.asarray([walkers.SHARES[walk] for walk in _WALKS])
    for number in range(count):
        key = (seed, int(held_out), number)
        rng = np.random.default_rng(key)
        walk = str(rng.choice(_WALKS, p=shares / shares.sum()))
        if held_out:
            walk = _WALKS[number % len(_WALKS)]
        shots = [_shot(rng, walk, held_out, (*key, 0))]
        if rng.random() < CUTS:
            shots.append(_shot(rng, str(rng.choice(_WALKS)), held_out, (*key, 1)))
        yield tuple(shots)


def _shot(rng: np.random.Generator, walk: str, held_out: bool, seed: tuple[int, ...]) -> Shot:
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    kinds = _kinds(background, held_out)
    shape, colour = kinds[rng.integers(len(kinds))]
    size = round(float(rng.uniform(0.2, 0.32)), 4)
    x, y = rng.uniform(size / 2, ASPECT - size / 2), rng.uniform(size / 2, 1 - size / 2)
    start = Pose(
        round(float(x), 4), round(float(y), 4), yaw=round(float(rng.uniform(-180, 180)), 2)
    )
    frames = int(rng.integers(FRAMES[0], FRAMES[1], endpoint=True))
    return Shot(Figure(background, shape, colour, size, start), walk, frames, seed)


@functools.cache
def _kinds(background: Background, unseen: bool) -> list[tuple[str, str]]:
    """(shape, colour) of all figures that stand out from the background."""
    return [
        (shape, colour)
        for shape, colour in itertools.product(SHAPES, COLOURS)
        if held_out(shape, colour) == unseen and shapes.stands_out(colour, background)
    ]


def film(shot: Shot, height: int = HEIGHT, width: int = WIDTH) -> Take:
    """The frames of a walk, with what was held."""
    figure, rng = shot.figure, np.random.default_rng(shot.seed)
    poses = [figure.start]
    world = walkers.World(SPEED, shot.frames, pitch=False)
    steps = walkers.walker(shot.walk, figure.start, world, rng)
    held = [_float32(next(steps))]
    for _ in range(shot.frames - 1):
        poses.append(step(figure, poses[-1], held[-1]))
        held.append(_float32(steps.send(poses[-1])))
    source = f"figure {json.dumps(dataclasses.asdict(figure))}"
    actions = actions_of(held, poses, view="third", source=source)
    return Take(render(figure, poses, height, width), actions, figure.caption)


def replay(
    figure: Figure, actions: sidecars.Actions, height: int = HEIGHT, width: int = WIDTH
) -> tuple[np.ndarray, np.ndarray]:
    """The true frames and poses of actions: uint8 [frame, height, width, 3], float32 [frame, 7].

    Raises:
      InputError: they are of another rate.
    """
    poses = [figure.start]
    for held in held_of(actions)[:-1]:
        poses.append(step(figure, poses[-1], held))
    return render(figure, poses, height, width), poses_lib.rows(poses)


def step(figure: Figure, pose: Pose, held: Held) -> Pose:
    """Where the figure is a frame later: it turns first, then goes, as far as the walls let it."""
    yaw = wrap(pose.yaw + held.yaw)
    w, s, a, d = held.keys
    ahead, right = SPEED * (w - s), SPEED * (d - a)
    c, sine = math.cos(math.radians(yaw)), math.sin(math.radians(yaw))
    radius = figure.size / 2
    x = min(max(pose.x + c * ahead - sine * right, radius), ASPECT - radius)
    y = min(max(pose.y + sine * ahead + c * right, radius), 1 - radius)
    return Pose(x, y, yaw=yaw)


def render(figure: Figure, poses: Sequence[Pose], height: int, width: int) -> np.ndarray:
    """uint8 [frame, height, width, 3]: the figure at each pose, with a dot where it faces."""
    behind = shapes.background_picture(figure.background, height, width)
    frames = np.empty((len(poses), height, width, 3), np.uint8)
    for frame, pose in zip(frames, poses):
        angle = math.radians(pose.yaw)
        picture = behind.copy()
        state = pose.x, pose.y, figure.size, angle
        shapes.paint(picture, figure.shape, COLOURS[figure.colour], state)
        reach = 0.28 * figure.size  # from the centre to the face
        face = pose.x + reach * math.cos(angle), pose.y + reach * math.sin(angle)
        shapes.paint(picture, "circle", _FACE, (*face, 0.24 * figure.size, 0.0))
        frame[:] = picture + np.float32(0.5)
    return frames


def _float32(held: Held) -> Held:
    """Moves of the mouse as a sidecar keeps them, so that a replay is the same to the bit."""
    return held._replace(pitch=float(np.float32(held.pitch)), yaw=float(np.float32(held.yaw)))
