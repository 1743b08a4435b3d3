"""How who films moves from each picture to the next, from the pictures alone.

Each block of a picture (`flow`) moves by what the camera turns and by what it goes, over its
distance. Distances are not known; how far away things are at each height of the picture, in the
middle, is calibrated on the game's pictures. Turns and ways are then those that fit most blocks.
"""

import dataclasses

import numpy as np
from scipy import ndimage

from longlive_jax.grading.walk.flow import Flow, Lens


@dataclasses.dataclass(frozen=True)
class View:
    """What is calibrated for a view; lengths in units of the map.

    near: the inverse of the distance, in the middle, of walls and of what is above.
    floor: the same of the floor, a slope of 1 below the horizon.
    behind: how far the camera is behind who walks: it swings when they turn.
    swing: a turn is so much more than what most of the picture moves by.
    """

    near: float
    floor: float
    behind: float = 0.0
    swing: float = 1.0


VIEWS = {"first": View(0.0050, 0.0240), "third": View(0.0055, 0.0180, 90.0, 1.8)}
_FIGURE = (0.24, -0.12)  # bearing within which, and slope below which, who walks is seen
_TALL = 1.2  # a pixel of the game's is so much taller than wide
_NEIGHBOURS = 5  # pairs
_ROUNDS = 12
_WAYS = np.arange(24) * (np.pi / 12)  # directions that are tried, radians to the right of ahead
_SCATTER = 0.004  # radians: blocks that fit worse count less
_LOOSE = 0.7  # spread of distances, as a part
_FASTEST = 0.15  # radians that a block moves for its distance, at most
_QUICK = 9.0  # units a picture: who walks goes no faster
_UNUSUAL, _SIDEWAYS = 0.1, 0.1  # what distances, and going to a side, cost


@dataclasses.dataclass(frozen=True)
class Motion:
    """From each picture to the next, float32 [pair].

    yaw, pitch: degrees, right and up are positive. ahead, right: units of the map.
    clear: how much of the picture says so, 0 to 1.
    """

    yaw: np.ndarray
    pitch: np.ndarray
    ahead: np.ndarray
    right: np.ndarray
    clear: np.ndarray

    def __len__(self) -> int:
        return len(self.yaw)


def join(parts) -> Motion:
    """Motions of pairs that follow each other."""
    return Motion(*(np.concatenate(columns) for columns in zip(*map(_fields, parts))))


def measure(lens: Lens, unrolled: np.ndarray, pitch: np.ndarray, view: str) -> Motion:
    """The motion from each picture to the next.

    Where most of the picture moves by something else than a turn, as near a wall, one start
    misleads. So there are several: what moves most, nothing, and what the neighbours in time do.
    The motion that fits more of the picture is taken.

    Args:
      unrolled: pictures on the lens's cylinder.
      pitch: degrees, [picture], about: where the horizon is.
    """
    whole = lens.whole(unrolled)
    best = solve(lens, lens.flow(unrolled, whole), pitch[:-1], VIEWS[view])
    steady = [_middle(x) for x in (best.pitch * _TALL, -best.yaw)]
    near = np.round(np.radians(np.stack(steady, axis=1)) * lens.focal).astype(int)
    for shift in (near, np.zeros_like(near)):
        other = solve(lens, lens.flow(unrolled, shift), pitch[:-1], VIEWS[view])
        better = other.clear > best.clear
        best = Motion(*(np.where(better, o, b) for o, b in zip(_fields(other), _fields(best))))
    return dataclasses.replace(best, yaw=_middle(best.yaw), pitch=_middle(best.pitch))


def _middle(values: np.ndarray) -> np.ndarray:
    """The median of each value and its neighbours: who turns does so for some pictures."""
    return ndimage.median_filter(values, _NEIGHBOURS, mode="nearest")


def _fields(motion: Motion) -> list[np.ndarray]:
    return [getattr(motion, field.name) for field in dataclasses.fields(Motion)]


def solve(lens: Lens, flow: Flow, pitch: np.ndarray, view: View) -> Motion:
    """The motion that fits most blocks.

    Of each of some directions in which the camera may go: turn, pitch and each block's motion for
    its distance are fitted in turn, distances freely but about as calibrated; blocks that fit badly
    count less. The direction that fits best is taken.
    """
    bearing, slope = (x.astype(np.float64) for x in (lens.blocks.bearing, lens.blocks.slope))
    # A camera of the game looks up by moving its picture down.
    below = (slope - _TALL * np.tan(np.radians(pitch))[:, None] * np.cos(bearing))[:, None]
    inverse = np.maximum(view.near, view.floor * below)  # [pair, 1, block]
    base = flow.weight
    if view.behind:
        figure = (np.abs(bearing) < _FIGURE[0]) & (slope > _FIGURE[1])
        base = np.where(figure, 0, base)
    base = base[:, None].astype(np.float64)
    total = base.sum(axis=-1) + 1e-6
    away = bearing - _WAYS[:, None]  # [way, block]
    # What going a unit in a direction makes of a block at distance 1.
    along, down = np.sin(away)[None], below * np.cos(away)
    across_seen, down_seen = flow.across[:, None], flow.down[:, None]
    shape = (len(base), len(_WAYS))
    turn = np.broadcast_to(-view.swing * flow.shift[:, 1:], shape).astype(np.float64)
    up = np.broadcast_to(flow.shift[:, :1], shape).astype(np.float64)
    speed = np.full(shape, 3.0)
    fits, cosine = base + np.zeros((1, len(_WAYS), 1)), np.cos(bearing)
    error = moved = expected = loose = np.zeros_like(fits)
    for i in range(_ROUNDS):
        width = _SCATTER * max(1.0, 4.0 * 0.6**i)
        left = across_seen + turn[..., None]
        fall = down_seen - up[..., None] * cosine
        expected = speed[..., None] * inverse
        loose = _LOOSE * expected + 0.004
        trust = (width / loose) ** 2
        moved = (along * left + down * fall + trust * expected) / (along**2 + down**2 + trust)
        moved = np.clip(moved, 0, _FASTEST)
        error = (left - along * moved) ** 2 + (fall - down * moved) ** 2
        fits = base / (1 + error / width**2)
        share = fits.sum(axis=-1) + 1e-9
        turn = (fits * (along * moved - across_seen)).sum(axis=-1) / share
        up = (fits * cosine * (down_seen - down * moved)).sum(axis=-1) / (
            (fits * cosine**2).sum(axis=-1) + 1e-9
        )
        speed = (fits * moved).sum(axis=-1) / ((fits * inverse).sum(axis=-1) + 1e-9)
        speed = np.minimum(speed, _QUICK + view.behind * np.abs(turn))
    cost = (base * np.log1p(error / _SCATTER**2)).sum(axis=-1) / total
    odd = np.log1p(((moved - expected) / loose) ** 2)
    cost = cost + _UNUSUAL * (base * odd).sum(axis=-1) / total
    ahead, side = speed * np.cos(_WAYS), speed * np.sin(_WAYS) + view.behind * turn
    cost = cost + _SIDEWAYS * (side / _QUICK) ** 2 + 0.02 * (ahead / _QUICK) ** 2
    best = cost.argmin(axis=1)
    pairs = np.arange(len(best))
    yaw, up, ahead, side, clear = (
        x[pairs, best].astype(np.float32) for x in (turn, up, ahead, side, fits.mean(axis=-1))
    )
    return Motion(np.degrees(yaw), np.degrees(up) / _TALL, ahead, side, clear)
