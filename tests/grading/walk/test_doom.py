"""Walks in the game, and what must be graded down. ViZDoom is among the packages of the tests."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from longlive_jax.data.sidecars import strings
from longlive_jax.data.worlds.doom import record
from longlive_jax.data.worlds.doom.game import Games, Size, Start
from longlive_jax.errors import InputError
from longlive_jax.grading.walk import pictures, places, summary, truth, video

HALL = Start("fortress", 1936, -960, 10)  # a wide court
LINE = "yaw+3*24, w*24, w*24"


@pytest.fixture(scope="module")
def walk():
    """(frames, actions) of a turn and a walk ahead."""
    actions = dataclasses.replace(
        strings.parse(f"{LINE}, still*1"), source=HALL.text(), where="walk.actions.npz"
    )
    with Games(Size(160, 256)) as games:
        frames, poses = record.replay(games, HALL, actions)
        return frames, dataclasses.replace(actions, pose=poses)


def graded(frames, actions, **given):
    found = video.grade("walk", lambda a, b: frames[a:b], actions, **given)
    return summary.summarise([found]), found["seconds"]


def test_a_true_walk_is_right(walk):
    total, seconds = graded(*walk)
    assert [total[name] for name in ("turn", "straight", "move")] == [1, 1, 1]
    assert abs(total["yaw_ratio"] - 1) < 0.1 and total["seconds"] == len(seconds) == 3
    assert 0.6 < total["sharpness"] < 1.6
    assert "100.0%" in summary.table(total)


def test_a_frozen_one_is_not(walk):
    frames, actions = walk
    total, seconds = graded(np.repeat(frames[:1], len(frames), axis=0), actions)
    assert total["turn"] == 0
    assert [second["right"]["move"] for second in seconds[1:]] == [False, False]


def test_one_that_turns_the_other_way_is_not(walk):
    frames, actions = walk
    total, _ = graded(frames[:, :, ::-1], actions)
    assert total["turn"] == 0


def test_one_that_comes_late_or_runs_backwards_is_not(walk):
    frames, actions = walk
    late = np.concatenate([np.repeat(frames[:1], 12, axis=0), frames[:-12]])
    assert graded(late, actions)[0]["turn"] == 0
    seconds = graded(frames[::-1], actions)[1]
    assert seconds[0]["right"]["turn"] in (False, None) and seconds[2]["velocity"][0] < 1


def test_a_blurred_one_is_less_sharp(walk):
    frames, actions = walk
    blurred = ndimage.gaussian_filter(frames[:25], (0, 3, 3, 0))
    assert graded(blurred, actions.cut(0, 25))[0]["sharpness"] < 0.5


def test_the_game_is_the_truth(walk):
    frames, actions = walk
    frames, actions = frames[:25, ::2, ::2], actions.cut(0, 25)
    with Games(Size(64, 96, 1)) as games:
        true = record.replay(games, HALL, actions)[0]
        found = places.references(games, ("maze", "fortress"), shots=2)
        take = record.film(games, record.Shot("maze", "third", "explore", 49, (5, 5)))
        small = pictures.small(take.frames[::6])
        assert np.mean([name == "maze" for name in found.places(small)]) > 0.6
        assert np.mean([view == "third" for view in found.views(small)]) > 0.6
        simulator = truth.Simulator(games, found)
        same = graded(true, actions, simulator=simulator)[0]
        assert (same["psnr"], same["ssim"]) == (100, 1) and same["place"] in (1, None)
        other = graded(np.repeat(true[:1], 25, axis=0), actions, simulator=simulator)[0]
        assert other["psnr"] < 30 and other["ssim"] < 0.9
        nowhere = dataclasses.replace(actions, source="a line of text")
        with pytest.raises(InputError, match=r"no start in Doom.*--simulator"):
            graded(true, nowhere, simulator=simulator)
