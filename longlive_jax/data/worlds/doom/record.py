"""Shots in Doom: drawn from a seed, filmed by walkers, and played again from what was held."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from longlive_jax.data import sidecars
from longlive_jax.data.worlds import poses as poses_lib
from longlive_jax.data.worlds import walkers
from longlive_jax.data.worlds.doom.game import (
    SPEED,
    VIEWS,
    BlockedError,
    EpisodeEndedError,
    Games,
    Start,
    snap,
)
from longlive_jax.data.worlds.doom.places import PLACES, Place
from longlive_jax.data.worlds.poses import Pose
from longlive_jax.data.worlds.takes import Take, actions_of, held_of
from longlive_jax.data.worlds.walkers import Held
from longlive_jax.errors import InputError

SPLITS = ("train", "routes", "map")  # routes and a map that are for evaluation alone
_ATTEMPTS = 20  # starts that are tried for a shot
_ROAMS = ("explore", "wander", "tour")  # walks that have to get somewhere
_FAR = 100.0  # units of the map: this far at least


@dataclasses.dataclass(frozen=True)
class Shot:
    """`frames` pictures of a walk in a place, without a cut; all of it follows from `seed`."""

    place: str
    view: str
    walk: str
    frames: int
    seed: tuple[int, ...]


def places_of(split: str, names: Sequence[str] = ()) -> tuple[str, ...]:
    """The places of a split: of `names`, or of all.

    Raises:
      InputError: an unknown name.
    """
    for name in names:
        if name not in PLACES:
            raise InputError(f"place {name!r:.60} must be one of {', '.join(PLACES)}")
    known = [place for place in PLACES.values() if place.held_out == (split == "map")]
    return tuple(place.name for place in known if not names or place.name in names)


def clips(
    seed: int,
    count: int,
    *,
    frames: int,
    split: str = "train",
    places: Sequence[str] = (),
    cuts: float = 0.25,
) -> Iterator[tuple[Shot, ...]]:
    """`count` clips of `frames` pictures: one shot, or (with chance `cuts`) two.

    The second shot is of another place or from the other view. A clip depends on the seed, the
    split and its number, not on `count`. Held-out clips have each view and each walk in turn.
    """
    names = places_of(split, places)
    often = np.asarray([PLACES[name].share for name in names])
    for number in range(count if names else 0):
        key = (seed, SPLITS.index(split), number)
        rng = np.random.default_rng(key)
        name = names[rng.choice(len(names), p=often / often.sum())]
        view = VIEWS[rng.integers(2)]
        known = walks_of(PLACES[name])
        shares = np.asarray([walkers.SHARES[walk] for walk in known])
        walk = known[rng.choice(len(known), p=shares / shares.sum())]
        if split != "train":
            view, walk = VIEWS[number % 2], known[number // 2 % len(known)]
        if rng.random() >= cuts:
            yield (Shot(name, view, walk, frames, (*key, 0)),)
            continue
        first = round(frames * rng.uniform(0.35, 0.65))
        others = [other for other in names if other != name]
        if others and rng.random() < 0.6:
            then, seen = others[rng.integers(len(others))], VIEWS[rng.integers(2)]
        else:
            then, seen = name, VIEWS[1 - VIEWS.index(view)]
        second = walks_of(PLACES[then])[rng.integers(len(walks_of(PLACES[then])))]
        yield (
            Shot(name, view, walk, first, (*key, 0)),
            Shot(then, seen, second, frames - first, (*key, 1)),
        )


def walks_of(place: Place) -> tuple[str, ...]:
    """The walks that one can go in a place."""
    return tuple(walk for walk in walkers.WALKS if walk != "tour" or place.ways)


def film(games: Games, shot: Shot) -> Take:
    """Films a shot: the first of its starts from which there is one to the end.

    Raises:
      InputError: there is none among the first few.
    """
    stayed: Take | None = None
    for attempt in range(_ATTEMPTS):
        rng = np.random.default_rng((*shot.seed, attempt))
        try:
            take, far = _film(games, shot, _start(shot, rng), rng)
        except (BlockedError, EpisodeEndedError):
            continue  # a picture of a finished episode is none of the world
        if far >= _FAR or shot.walk not in _ROAMS:
            return take
        stayed = stayed or take
    if stayed is None:
        raise InputError(
            f"{shot.place}: none of {_ATTEMPTS} starts gives a shot of {shot.frames} pictures "
            f"(seed {shot.seed}); give fewer seconds"
        )
    return stayed


def replay(games: Games, start: Start, actions: sidecars.Actions) -> tuple[np.ndarray, np.ndarray]:
    """The true pictures and poses of actions: uint8 [picture, height, width, 3], float32 [., 7].

    The same actions from the same start give the same ones, bit for bit.

    Raises:
      InputError: nobody can stand at the start; the episode ends before the actions do; they are
        of another rate.
    """
    frames, poses = [], []
    try:
        for frame, pose in play(games, start, held_of(actions)):
            frames.append(frame)
            poses.append(pose)
    except EpisodeEndedError:
        raise InputError(
            f"{actions.where}: the game's episode ends after picture {len(frames) - 1} of "
            f"{len(actions)}; give the actions before it"
        ) from None
    return np.stack(frames), poses_lib.rows(poses)


def play(games: Games, start: Start, held: Iterable[Held]) -> Iterator[tuple[np.ndarray, Pose]]:
    """Picture and pose while each is held, one by one.

    Raises:
      BlockedError, EpisodeEndedError: as `Game`'s.
    """
    game = games.of(start.place)
    frame, pose = game.begin(start)
    before: Held | None = None
    for one in held:
        if before is not None:
            frame, pose = game.step(before)
        yield frame, pose
        before = one


def _start(shot: Shot, rng: np.random.Generator) -> Start:
    place = PLACES[shot.place]
    x, y = place.starts[rng.integers(len(place.starts))]
    dx, dy = rng.integers(-place.spread, place.spread, size=2, endpoint=True)
    return Start(
        shot.place, int(x + dx), int(y + dy), round(float(rng.uniform(-180, 180)), 2),
        int(rng.integers(2**31)), shot.view,
    )  # fmt: skip


def _film(games: Games, shot: Shot, start: Start, rng) -> tuple[Take, float]:
    """The film of a walk from a start, and how far it gets from there."""
    place, game = PLACES[shot.place], games.of(shot.place)
    size = game.size
    frames = np.empty((shot.frames, size.height, size.width, 3), np.uint8)
    frames[0], pose = game.begin(start)
    world = walkers.World(SPEED, shot.frames, ways=place.ways)
    steps = walkers.walker(shot.walk, pose, world, rng)
    held, poses = [snap(next(steps))], [pose]
    for frame in range(1, shot.frames):
        frames[frame], pose = game.step(held[-1])
        poses.append(pose)
        held.append(snap(steps.send(pose)))
    track = np.asarray([(pose.x, pose.y) for pose in poses])
    actions = actions_of(held, poses, view=shot.view, source=start.text())
    far = math.sqrt(((track - track[0]) ** 2).sum(axis=1).max())
    return Take(frames, actions, place.caption(shot.view, track)), far
