import itertools
import math

import numpy as np
import pytest

from longlive_jax.data.worlds import figure as world
from longlive_jax.data.worlds import poses as poses_lib
from longlive_jax.data.worlds.poses import Pose
from longlive_jax.data.worlds.shapes import ASPECT, COLOURS, Background
from longlive_jax.data.worlds.takes import actions_of
from longlive_jax.data.worlds.walkers import Held

WHITE = Background("plain", "white", "white")
TRAINING = list(itertools.chain(*world.clips(0, 200)))
HELD_OUT = list(itertools.chain(*world.clips(0, 50, held_out=True)))
W, S, A, D = (tuple(i == j for j in range(4)) for i in range(4))


def figure(x=0.75, y=0.5, yaw=0.0):
    return world.Figure(WHITE, "circle", "blue", 0.25, Pose(x, y, yaw=yaw))


def drive(one, held):
    poses = [one.start]
    for h in held:
        poses.append(world.step(one, poses[-1], h))
    return poses


def test_a_clip_depends_on_the_seed_and_its_number():
    few, many = list(world.clips(5, 3)), list(world.clips(5, 6))
    assert few == many[:3] and few != list(world.clips(6, 3))
    assert {len(shots) for shots in world.clips(0, 50)} == {1, 2}
    first, again = (world.film(many[0][0], 32, 64) for _ in range(2))
    np.testing.assert_array_equal(first.frames, again.frames)
    assert first.actions.source == again.actions.source


def test_held_out_figures_are_never_trained_on():
    training, held_out = (
        {(s.figure.shape, s.figure.colour) for s in shots} for shots in (TRAINING, HELD_OUT)
    )
    assert training and held_out and not training & held_out
    assert {shot.walk for shot in HELD_OUT} == {shot.walk for shot in TRAINING}


@pytest.mark.parametrize("yaw", [0, 30, 90, -135])
@pytest.mark.parametrize("keys, angle", [(W, 0), (S, 180), (A, -90), (D, 90)])
def test_keys_move_it_along_its_heading(yaw, keys, angle):
    poses = drive(figure(yaw=yaw), [Held(keys)] * 5)
    way = np.subtract(poses[-1][:2], poses[0][:2])
    heading = math.radians(yaw + angle)
    np.testing.assert_allclose(
        way, 5 * world.SPEED * np.asarray([math.cos(heading), math.sin(heading)]), atol=1e-9
    )


def test_the_mouse_turns_it_to_the_right_and_it_goes_where_it_then_looks():
    poses = drive(figure(), [Held(yaw=30), Held(yaw=60), Held(W)])
    assert poses[2].yaw == 90 and poses[3].y > poses[2].y and abs(poses[3].x - poses[2].x) < 1e-9


def test_the_edges_are_walls():
    for yaw in (0, 90, 180, 270):
        last = drive(figure(yaw=yaw), [Held(W)] * 100)[-1]
        assert 0.125 <= last.x <= ASPECT - 0.125 and 0.125 <= last.y <= 1 - 0.125


def test_it_is_drawn_where_it_is_with_its_face_ahead():
    one = figure()
    poses = drive(one, [Held(W, yaw=8)] * 30)
    for frame, pose in zip(world.render(one, poses, 64, 96).astype(float), poses):
        y, x = (np.mgrid[:64, :96] + 0.5) / 64
        blue = np.linalg.norm(frame - COLOURS["blue"], axis=-1) < 60
        dark = np.linalg.norm(frame, axis=-1) < 60
        body, face = (np.asarray([x[m].mean(), y[m].mean()]) for m in (blue | dark, dark))
        assert np.abs(body - pose[:2]).max() < 0.02
        heading = math.degrees(math.atan2(*(face - pose[:2])[::-1]))
        assert abs(poses_lib.wrap(heading - pose.yaw)) < 8


def test_what_was_held_gives_the_same_frames_again_to_the_bit():
    for shot in TRAINING[:6]:
        take = world.film(shot, 32, 64)
        assert take.frames.shape == (shot.frames, 32, 64, 3) and len(take.actions) == shot.frames
        frames, poses = world.replay(shot.figure, take.actions, 32, 64)
        np.testing.assert_array_equal(frames, take.frames)
        np.testing.assert_array_equal(poses, take.actions.pose)
        assert take.actions.view == "third" and take.actions.keys == (
            "KeyW",
            "KeyS",
            "KeyA",
            "KeyD",
        )


def test_an_action_drives_the_next_frame():
    one = figure()
    held = [Held(), Held(W), Held(), Held()]
    poses = drive(one, held[:-1])
    actions = actions_of(held, poses, view="third", source="")
    moved = poses_lib.moved(actions.pose)
    np.testing.assert_allclose(moved[:, 0], [0, world.SPEED, 0], atol=1e-6)
    assert actions.pad == 12 and actions.keyboard[1].tolist() == [1, 0, 0, 0]


def test_captions_say_what_walks():
    for shot in TRAINING[:40]:
        one = shot.figure
        for words in ("Third person view", one.colour, one.shape, one.background.words):
            assert words in one.caption
