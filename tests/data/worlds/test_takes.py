import dataclasses

import numpy as np
import pytest

from longlive_jax.data.sidecars import Actions
from longlive_jax.data.worlds.poses import Pose
from longlive_jax.data.worlds.takes import actions_of, held_of
from longlive_jax.data.worlds.walkers import STILL, Held
from longlive_jax.errors import InputError

HELD = [Held((True, False, False, True), 1.5, -2.0), Held(yaw=3.0), STILL]
ACTIONS = actions_of(HELD, [Pose(0, 0)] * 3, view="first", source="here")


def test_what_was_held_comes_back():
    assert held_of(ACTIONS) == HELD
    assert (ACTIONS.pad, ACTIONS.fps, ACTIONS.view, ACTIONS.source) == (12, 24, "first", "here")
    np.testing.assert_array_equal(ACTIONS.mouse, [[1.5, -2], [0, 3], [0, 0]])


@pytest.mark.parametrize("pad", [11, 8])
def test_rows_that_make_their_own_picture_are_held_one_before(pad):
    assert held_of(dataclasses.replace(ACTIONS, pad=pad)) == [*HELD[1:], STILL]


def test_keys_are_read_by_name():
    keyboard = np.asarray([[1, 0.4, 0.6]])
    actions = Actions(
        keyboard=keyboard, mouse=np.zeros((1, 2)), fps=24, keys=("Space", "KeyW", "KeyD")
    )
    assert held_of(actions) == [Held((False, False, False, True))]


def test_another_rate_is_refused():
    with pytest.raises(InputError, match="fps=20, the video has 24"):
        held_of(dataclasses.replace(ACTIONS, fps=20))
