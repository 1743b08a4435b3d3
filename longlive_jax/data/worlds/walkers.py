"""Walkers: who sees only where they are and answers with keys and a mouse, from a seed.

A walker is a generator: it yields what is held, is sent the pose that came of it, and never ends.
All of it follows from its random generator and from the poses.
"""

import dataclasses
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from longlive_jax.data.worlds.poses import Pose, wrap

KEYS = ("KeyW", "KeyS", "KeyA", "KeyD")
MOUSE = (1.0, 10.0)  # degrees a picture, the slowest and the fastest turn
PITCH = 25.0  # degrees up or down that they look at most


class Held(NamedTuple):
    """What is held, and how far the mouse is moved, while a picture is shown.

    keys: whether each of KEYS is. pitch (up is positive), yaw (right is positive): degrees.
    """

    keys: tuple[bool, ...] = (False, False, False, False)
    pitch: float = 0.0
    yaw: float = 0.0


Steps = Generator[Held, Pose, Any]
STILL = Held()
W, S, A, D = (tuple(name == key for key in KEYS) for name in KEYS)
_OPPOSITE = {W: S, S: W, A: D, D: A}
_PATIENCE = 3  # pictures without moving, after which a walker knows of the wall
_COAST = 24  # pictures in which who runs has come to rest


@dataclasses.dataclass(frozen=True)
class World:
    """What a walker knows of the world.

    speed: length that a key moves it in a picture, at most.
    frames: pictures of the shot.
    pitch: whether one can look up and down.
    ways: places that one can walk between in a straight line, {place: its neighbours}.
    """

    speed: float
    frames: int
    pitch: bool = True
    ways: Mapping[tuple[float, float], Sequence[tuple[float, float]]] = dataclasses.field(
        default_factory=dict
    )


def walker(walk: str, pose: Pose, world: World, rng: np.random.Generator) -> Steps:
    """A walker of a kind of WALKS that begins at `pose`."""
    return WALKS[walk](_Walker(world, rng), pose)


class _Walker:
    """The steps that walks are made of: each yields, and returns the pose after its last."""

    def __init__(self, world: World, rng: np.random.Generator):
        self.world, self.rng = world, rng

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def count(self, least: int, most: int) -> int:
        return int(self.rng.integers(least, most, endpoint=True))

    def rate(self) -> float:
        """Degrees a picture of a turn: slow ones are as frequent as fast ones."""
        return float(np.exp(self.rng.uniform(*np.log(MOUSE))))

    def angle(self, least: float, most: float) -> float:
        """Degrees to the left or to the right."""
        return float(self.rng.uniform(least, most) * self.rng.choice((-1, 1)))

    def hold(self, pose: Pose, held: Held, count: int) -> Steps:
        for _ in range(count):
            pose = yield held
        return pose

    def turn(self, pose: Pose, degrees: float, keys=STILL.keys) -> Steps:
        """Turns by so much, at one speed, while it holds keys."""
        count = max(1, math.ceil(abs(degrees) / self.rate()))
        return (yield from self.hold(pose, Held(keys, yaw=degrees / count), count))

    def look(self, pose: Pose, pitch: float, keys=STILL.keys) -> Steps:
        """Looks up or down until its pitch is `pitch`."""
        count = max(1, math.ceil(abs(pitch - pose.pitch) / self.rate()))
        step = (pitch - pose.pitch) / count
        return (yield from self.hold(pose, Held(keys, pitch=step), count))

    def walk(self, pose: Pose, keys, count: int, yaw: float = 0.0) -> Steps:
        """Holds keys until a wall stops it; returns whether one did, too."""
        stuck = 0
        for _ in range(count):
            before, pose = pose, (yield Held(keys, yaw=yaw))
            gone = math.hypot(pose.x - before.x, pose.y - before.y)
            stuck = stuck + 1 if gone < 0.2 * self.world.speed else 0
            if stuck > _PATIENCE + 2:  # who starts from rest is slow at first
                return pose, True
        return pose, False

    def toward(self, pose: Pose, point, rate: float) -> Steps:
        """Walks to a point, turning at most `rate` a picture; gives up where it cannot."""
        stuck = 0
        near = 1.5 * self.world.speed
        while (left := math.hypot(point[0] - pose.x, point[1] - pose.y)) > near and stuck < 24:
            error = wrap(math.degrees(math.atan2(point[1] - pose.y, point[0] - pose.x)) - pose.yaw)
            ahead = abs(error) < 35
            yaw = float(np.clip(error, -rate, rate))
            pose = yield Held(W if ahead else STILL.keys, yaw=yaw)
            closer = left - math.hypot(point[0] - pose.x, point[1] - pose.y)
            stuck = stuck + 1 if ahead and closer < 0.1 * self.world.speed else 0
        return pose

    def glance(self, pose: Pose) -> Steps:
        """Looks up or down and back to level, where one can."""
        if self.world.pitch:
            pose = yield from self.look(pose, self.angle(5, PITCH))
            pose = yield from self.hold(pose, STILL, self.count(0, 18))
            pose = yield from self.look(pose, 0)
        return pose


def explore(w: _Walker, pose: Pose) -> Steps:
    """Walks ahead, turns where a wall is, and now and then for no reason."""
    side = w.angle(1, 1)
    while True:
        bend = w.angle(0.3, 1.5) if w.chance(0.3) else 0.0
        pose, wall = yield from w.walk(pose, W, w.count(18, 90), bend)
        if wall:
            side = -side if w.chance(0.25) else side  # mostly the same way, to leave corners
            pose = yield from w.turn(pose, side * w.rng.uniform(40, 150))
            continue
        what = w.rng.random()
        if what < 0.35:
            pose = yield from w.turn(pose, w.angle(15, 100), W if w.chance(0.6) else STILL.keys)
        elif what < 0.5:
            pose, _ = yield from w.walk(pose, A if w.chance(0.5) else D, w.count(8, 24))
        elif what < 0.6:
            pose = yield from w.glance(pose)
        elif what < 0.7:
            pose = yield from w.hold(pose, STILL, w.count(6, 24))


def wander(w: _Walker, pose: Pose) -> Steps:
    """Any keys and moves of the mouse, each for a while: all that a hand can do."""
    while True:
        keys = tuple(bool(x) for x in w.rng.random(4) < (0.55, 0.15, 0.2, 0.2))
        yaw = w.angle(0, w.rate()) if w.chance(0.6) else 0.0
        pitch = w.angle(0, 3) if w.world.pitch and w.chance(0.25) else 0.0
        begun = pose
        for _ in range(w.count(4, 30)):
            if abs(pose.pitch + pitch) > PITCH:
                pitch = -pitch
            pose = yield Held(keys, pitch, yaw)
        gone = math.hypot(pose.x - begun.x, pose.y - begun.y)
        if any(keys) and gone < w.world.speed:  # it has seen enough of this wall
            pose = yield from w.turn(pose, w.angle(60, 180), keys)
        if w.world.pitch and abs(pose.pitch) > 8 and w.chance(0.5):
            pose = yield from w.look(pose, 0, keys)


def turn_round(w: _Walker, pose: Pose) -> Steps:
    """Stands and turns, often once round, and back again."""
    while True:
        pose = yield from w.hold(pose, STILL, w.count(4, 18))
        degrees = w.angle(90, 360) if w.chance(0.6) else 360.0 * w.rng.choice((-1, 1))
        pose = yield from w.turn(pose, degrees)
        if w.chance(0.5):
            pose = yield from w.hold(pose, STILL, w.count(4, 18))
            pose = yield from w.turn(pose, -degrees)


def stand(w: _Walker, pose: Pose) -> Steps:
    """Stands still for seconds; between, a glance or a small turn."""
    while True:
        pose = yield from w.hold(pose, STILL, w.count(24, 96))
        pose = yield from w.glance(pose) if w.chance(0.5) else w.turn(pose, w.angle(10, 60))


def bump(w: _Walker, pose: Pose) -> Steps:
    """Walks into a wall, keeps pushing, slides along it, steps back, turns to the next."""
    while True:
        pose, _ = yield from w.walk(pose, W, 200)
        pose = yield from w.hold(pose, Held(W), w.count(8, 30))
        if w.chance(0.5):
            side = A if w.chance(0.5) else D
            keys = tuple(a or b for a, b in zip(W, side))
            pose = yield from w.hold(pose, Held(keys), w.count(8, 30))
        if w.chance(0.7):
            pose, _ = yield from w.walk(pose, S, w.count(6, 30))
        pose = yield from w.turn(pose, w.angle(60, 180))


def out_and_back(w: _Walker, pose: Pose) -> Steps:
    """Goes out and comes back the same way, and looks as it did at first."""
    while True:
        pose = yield from w.hold(pose, STILL, w.count(6, 18))
        way = (_there_and_back, _backwards, _look_back)[w.rng.integers(3)]
        pose = yield from way(w, pose)


def _there_and_back(w: _Walker, pose: Pose) -> Steps:
    """Out ahead, round, and back along the trail, to face as at first."""
    first, trail = pose, [pose]
    left = w.count(w.world.frames // 5, w.world.frames // 3)
    while left > 0:
        keys = W
        yaw = w.angle(0.5, 4) if w.chance(0.4) else 0.0
        for _ in range(min(left, w.count(10, 30))):
            pose = yield Held(keys, yaw=yaw)
            left -= 1
            if math.hypot(pose.x - trail[-1].x, pose.y - trail[-1].y) > 4 * w.world.speed:
                trail.append(pose)
        if math.hypot(pose.x - trail[-1].x, pose.y - trail[-1].y) < w.world.speed:
            break  # at a wall
    pose = yield from w.turn(pose, w.angle(180, 180))
    rate = max(3.0, w.rate())
    for point in reversed(trail):
        pose = yield from w.toward(pose, point, rate)
    return (yield from w.turn(pose, wrap(first.yaw - pose.yaw)))


def _backwards(w: _Walker, pose: Pose) -> Steps:
    """Legs by one key each, then the same legs in reverse, without turning."""
    total = w.count(w.world.frames // 5, w.world.frames // 3)
    legs = []
    while total > 0:
        legs.append(((W, S, A, D)[w.rng.choice(4, p=(0.55, 0.15, 0.15, 0.15))], w.count(8, 36)))
        total -= legs[-1][1] + _COAST
    for keys, count in (*legs, *((_OPPOSITE[keys], count) for keys, count in reversed(legs))):
        pose = yield from w.hold(pose, Held(keys), count)
        # Two legs are each other's opposite if both begin at rest.
        pose = yield from w.hold(pose, STILL, _COAST)
    return pose


def _look_back(w: _Walker, pose: Pose) -> Steps:
    """Turns away, stands, and turns back."""
    degrees = w.angle(60, 200)
    pose = yield from w.turn(pose, degrees)
    pose = yield from w.hold(pose, STILL, w.count(6, 36))
    return (yield from w.turn(pose, -degrees))


def tour(w: _Walker, pose: Pose) -> Steps:
    """Along the ways of the world from place to place, back only at their ends."""
    ways = w.world.ways
    here = min(ways, key=lambda point: math.hypot(point[0] - pose.x, point[1] - pose.y))
    last = None
    while True:
        pose = yield from w.toward(pose, here, max(2.5, w.rate()))
        if w.chance(0.15):
            pose = yield from w.glance(pose)
        if w.chance(0.1):
            pose = yield from w.turn(pose, w.angle(40, 360))
        onward = [point for point in ways[here] if point != last] or list(ways[here])
        last, here = here, onward[w.rng.integers(len(onward))]


WALKS: dict[str, Callable[[_Walker, Pose], Steps]] = {
    "explore": explore,
    "wander": wander,
    "turn_round": turn_round,
    "out_and_back": out_and_back,
    "stand": stand,
    "bump": bump,
    "tour": tour,
}
# How often a shot is of each kind; where the world has no ways, tours are left out.
SHARES = {
    "explore": 0.3,
    "wander": 0.22,
    "turn_round": 0.08,
    "out_and_back": 0.18,
    "stand": 0.03,
    "bump": 0.06,
    "tour": 0.13,
}
