"""Actions in a line of text, and at another rate."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlive_jax.data import sidecars
from longlive_jax.data.sidecars import keys
from longlive_jax.errors import InputError

WORDS = {"w": "KeyW", "D": "KeyD", "up": "ArrowUp", "Space": "Space", "shift": "ShiftLeft",
         "7": "Digit7", "keyq": "KeyQ", "Mouse0": "Mouse0"}  # fmt: skip


def test_the_line_of_the_manual():
    actions = sidecars.parse("w*48, a*12, w+d*6, yaw+3*24, w+pitch-1.5*8, still*10")
    assert actions.keys == ("KeyW", "KeyA", "KeyD") and len(actions) == 108 and actions.fps == 24
    held = [(48, [1, 0, 0]), (12, [0, 1, 0]), (6, [1, 0, 1]), (24, [0, 0, 0]), (8, [1, 0, 0]),
            (10, [0, 0, 0])]  # fmt: skip
    np.testing.assert_array_equal(actions.keyboard, [row for n, row in held for _ in range(n)])
    moved = np.zeros((108, 2))
    moved[66:90, 1], moved[90:98, 0] = 3, -1.5
    np.testing.assert_array_equal(actions.mouse, moved)


def test_the_last_piece_lasts_to_the_end():
    actions = sidecars.parse(" W + Shift + yaw+.5 + pitch- 2 * 3,Still", 9)
    assert actions.keys == ("KeyW", "ShiftLeft")
    assert actions.keyboard.sum(1).tolist() == [2] * 3 + [0] * 6
    assert actions.mouse[2].tolist() == [-2, 0.5] and not actions.mouse[3:].any()
    assert sidecars.parse("w", 5).keyboard.tolist() == [[1]] * 5
    assert sidecars.parse("still", 2).keyboard.shape == (2, 0)


piece = st.tuples(
    st.lists(st.sampled_from(list(WORDS)), unique=True, max_size=3),
    st.none() | st.floats(-20, 20, width=32).map(lambda x: round(x, 3)),
    st.none() | st.floats(-20, 20, width=32).map(lambda x: round(x, 3)),
    st.integers(1, 5),
)


@settings(deadline=None)
@given(st.lists(piece, min_size=1, max_size=5), st.sampled_from(["", " "]))
def test_whatever_is_written_is_read(pieces, space):
    """Against a table that is filled by hand."""
    texts, keyboard, mouse = [], [], []
    for words, yaw, pitch, count in pieces:
        parts = list(words)
        parts += [] if yaw is None else [f"yaw{yaw:+f}"]
        parts += [] if pitch is None else [f"PITCH{pitch:+f}"]
        texts.append(f"{space}+{space}".join(parts or ["still"]) + f"{space}*{count}")
        keyboard += [{WORDS[word] for word in words}] * count
        mouse += [(pitch or 0, yaw or 0)] * count
    actions = sidecars.parse(f",{space}".join(texts), len(keyboard), 30)
    held = [{k for k, x in zip(actions.keys, row) if x} for row in actions.keyboard]
    assert held == keyboard and actions.fps == 30
    np.testing.assert_allclose(actions.mouse, mouse, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "frames", "message"),
    [
        ("", 9, "piece 1 of 1, '': is empty"),
        ("w*3,,a*2", None, "piece 2 of 3, '': is empty"),
        ("w*0", None, "piece 1 of 1, 'w\\*0': lasts 0 pictures; it must be 1 to 10000000"),
        ("w*99999999999999999999", None, "lasts 99999999999999999999 pictures"),
        ("w*10000000,w*1", None, "10000001 pictures, the limit is 10000000"),
        ("w*3, q q*3", None, "piece 2 of 2, 'q q\\*3': 'q q' is unknown; a piece is keys"),
        ("yaw*3", None, "yaw needs degrees a picture with a sign, such as yaw\\+3"),
        ("yaw3*3", None, "'yaw3' is unknown"),
        ("yaw+1e5*3", None, "'yaw\\+1e5' is unknown"),
        ("yaw+1+yaw-1*2", None, "yaw is in it twice"),
        ("w+KeyW*2", None, "KeyW is in it twice"),
        ("still+w*2", None, "still stands alone"),
        ("w*2x", None, "'w\\*2x' is unknown"),
        ("*5", None, "'' is unknown"),
        ("w+*5", None, "'' is unknown"),
        ("w**3", None, "'w\\*' is unknown"),
        ("w", None, "piece 1 of 1, 'w': needs a number of pictures.*no video that ends it"),
        ("w, a*3", 9, "piece 1 of 2, 'w': needs a number of pictures.*only the last piece"),
        ("w*5", 9, "5 pictures for a video of 9: shorter than the video; end with ', still'"),
        ("w*12", 9, "12 rows for a video of 9 pictures: longer than the video"),
        ("w*9, still", 9, "9 pictures before the last piece 'still'.*video of 9: longer than"),
        ("w*1," * 300_000, None, "a line of 1200000 characters; write a sidecar instead"),
    ],
)
def test_the_bad_piece_is_named(text, frames, message):
    with pytest.raises(InputError, match=f"^actions: .*{message}"):
        sidecars.parse(text, frames)


@settings(deadline=None)
@given(st.text("wad+-*,. 019yawpitchstl", max_size=30), st.none() | st.integers(1, 40))
def test_any_line_is_read_or_refused(text, frames):
    try:
        actions = sidecars.parse(text, frames)
    except InputError:
        return
    assert frames in (None, len(actions)) and set(actions.keys) <= set(keys.CODES)


def test_looking_too_far_is_cut_and_counted(caplog):
    with caplog.at_level("WARNING"):
        actions = sidecars.parse("yaw+30*2, yaw-20*1, pitch+20.5*3")
    assert actions.clipped == 5 and actions.mouse[:, 1].tolist() == [20, 20, -20, 0, 0, 0]
    assert "in 5 of 6 pictures" in caplog.text


rates = st.sampled_from([8, 10, 16, 20, 24, 25, 30, 60, 29.97])


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 40), rates, rates, st.integers(0, 2**32 - 1))
def test_another_rate_keeps_degrees_and_touched_keys(count, fps, other, seed):
    draw = np.random.default_rng(seed)
    actions = sidecars.Actions(
        keyboard=draw.random((count, 3)) * (draw.random((count, 3)) < 0.2),
        mouse=draw.uniform(-2, 2, (count, 2)), fps=fps, keys=("KeyW", "KeyA", "KeyD"),
        pose=np.arange(count * 7).reshape(count, 7),
    )  # fmt: skip
    made = sidecars.to_rate(actions, other)
    assert len(made) == max(1, round(count * other / fps)) and made.fps == other
    np.testing.assert_allclose(made.mouse.sum(0), actions.mouse.sum(0), atol=1e-4)
    np.testing.assert_array_equal(made.keyboard.max(0), actions.keyboard.max(0))
    for picture in range(len(made)):
        begin, end = picture * fps / other, (picture + 1) * fps / other
        end = count if picture == len(made) - 1 else end  # what is left belongs to the last
        shown = [f for f in range(count) if f < end - 1e-6 and f + 1 > begin + 1e-6] or [count - 1]
        np.testing.assert_array_equal(made.keyboard[picture], actions.keyboard[shown].max(0))
        assert made.pose[picture, 0] == 7 * shown[0]


def test_the_same_rate_changes_nothing():
    actions = sidecars.parse("w*3, yaw+2*4")
    made = sidecars.to_rate(actions, 24)
    np.testing.assert_array_equal(made.keyboard, actions.keyboard)
    np.testing.assert_allclose(made.mouse, actions.mouse, atol=1e-6)
    assert len(sidecars.to_rate(actions, 24, 5)) == 5
    assert not sidecars.to_rate(actions, 24, 9).mouse[7:].any()
