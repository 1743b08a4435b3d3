"""Walkers in a room without anything but walls."""

import math

import numpy as np
import pytest

from longlive_jax.data.worlds import walkers
from longlive_jax.data.worlds.poses import Pose, wrap
from longlive_jax.data.worlds.walkers import WALKS, Held, World

FRAMES, SPEED, ROOM = 400, 8.0, 500.0
START = Pose(0, 0, 0, 30, 0)
WAYS = {(0, 0): [(300, 0)], (300, 0): [(0, 0), (300, 300)], (300, 300): [(300, 0)]}


def step(pose, held):
    """A room of 2 ROOM by 2 ROOM, in which one stops at once."""
    yaw = pose.yaw + held.yaw
    c, s = math.cos(math.radians(yaw)), math.sin(math.radians(yaw))
    ahead, right = held.keys[0] - held.keys[1], held.keys[3] - held.keys[2]
    x = np.clip(pose.x + SPEED * (c * ahead - s * right), -ROOM, ROOM)
    y = np.clip(pose.y + SPEED * (s * ahead + c * right), -ROOM, ROOM)
    return Pose(float(x), float(y), 0, wrap(yaw), pose.pitch + held.pitch)


def walk(kind, seed=0, frames=FRAMES, pitch=True):
    world = World(SPEED, frames, pitch, WAYS)
    steps = walkers.walker(kind, START, world, np.random.default_rng(seed))
    held, poses = [next(steps)], [START]
    for _ in range(frames - 1):
        poses.append(step(poses[-1], held[-1]))
        held.append(steps.send(poses[-1]))
    return held, poses


def way(poses):
    return np.hypot(*np.diff([(pose.x, pose.y) for pose in poses], axis=0).T)


@pytest.mark.parametrize("kind", WALKS)
def test_a_walk_follows_from_its_seed_and_stays_within_its_limits(kind):
    for seed in range(6):
        held, poses = walk(kind, seed)
        assert held == walk(kind, seed)[0] and held != walk(kind, seed + 6)[0]
        assert all(isinstance(one, Held) and len(one.keys) == 4 for one in held)
        assert max(abs(one.yaw) for one in held) <= walkers.MOUSE[1] + 1e-9
        assert max(abs(pose.pitch) for pose in poses) <= walkers.PITCH + 1e-6
        level, _ = walk(kind, seed, pitch=False)
        assert not any(one.pitch for one in level)


def test_explorers_and_wanderers_get_about():
    for kind in ("explore", "wander"):
        far = [max(math.hypot(p.x, p.y) for p in walk(kind, seed)[1]) for seed in range(10)]
        assert np.median(far) > 300
    used = np.mean([one.keys for seed in range(20) for one in walk("wander", seed)[0]], axis=0)
    assert (used > 0.1).all() and used[0] > 0.4  # every key, W most


def test_who_turns_round_stays_and_sees_all_sides():
    for seed in range(5):
        held, poses = walk("turn_round", seed)
        assert not any(any(one.keys) for one in held)
        assert len({round(pose.yaw / 30) for pose in poses}) >= 12


def test_who_stands_is_mostly_still():
    still = [one == walkers.STILL for seed in range(10) for one in walk("stand", seed)[0]]
    assert np.mean(still) > 0.7


def test_who_bumps_pushes_against_walls():
    for seed in range(5):
        held, poses = walk("bump", seed)
        pushed = [one.keys[0] and gone < 0.1 * SPEED for one, gone in zip(held, way(poses))]
        assert sum(pushed) > 20


def test_who_goes_out_comes_back_and_looks_as_at_first():
    """At some time after it was furthest off, it is where it began, to a step and two degrees."""
    legs = 0
    for seed in range(12):
        _, poses = walk("out_and_back", seed, 600)
        off = np.asarray([math.hypot(p.x - START.x, p.y - START.y) for p in poses])
        turned = np.abs([wrap(p.yaw - START.yaw) for p in poses])
        furthest = int((off + turned).argmax())
        if furthest > 400:  # it has not had the time
            continue
        back = (off[furthest:] < 2 * SPEED) & (turned[furthest:] < 2)
        assert back.any(), seed
        legs += off.max() > 100
    assert legs >= 3


def test_a_tour_leads_to_every_place():
    _, poses = walk("tour", 1, 600)
    for x, y in WAYS:
        assert min(math.hypot(pose.x - x, pose.y - y) for pose in poses) < 2 * SPEED
