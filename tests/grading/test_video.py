"""The grader on clips whose truth is known: what is right is, and each wrong is named."""

import json
import re

import numpy as np
import pytest
from scipy import ndimage

from longlive_jax.data.worlds import shapes
from longlive_jax.errors import InputError
from longlive_jax.grading import segment, summary
from longlive_jax.grading.caption import parse
from longlive_jax.grading.look import look
from longlive_jax.grading.verdict import ATTRIBUTES, judge
from tests.grading.clips import BLACK, STRIPES, grade, pair, render, script, shot, thing


def wrong(record, chunk=0):
    right = record["chunks"][chunk]["right"]
    return {name for name in ATTRIBUTES if not right[name]}


def test_real_clips_are_right():
    """`launch.grade --clips=60` measures it: docs/grading.md."""
    for clip in shapes.clips(11, 2, held_out=True):
        shots = clip[:2]
        record = grade(render(shots, (2, 1)), script(shots, (2, 1)))
        assert all(chunk["all_right"] for chunk in record["chunks"]), record["chunks"]
        assert [cut["frames"] for cut in record["cuts"]] == [0]
        sharp = [c["sharpness"] for c in record["chunks"] if c["sharpness"] is not None]
        assert all(0.97 < value < 1.03 for value in sharp)


@pytest.mark.parametrize(
    ("drawn", "names", "line"),
    [
        ((BLACK, *pair(shape="moon")), {"objects"}, "yellow star: is a moon"),
        ((BLACK, *pair(colour="cyan")), {"colours"}, "yellow star: is cyan"),
        ((BLACK, *pair(size=0.2)), {"sizes"}, "yellow star: is 0.20 heights across"),
        ((BLACK, *pair(x=0.75)), {"places"}, r"yellow star: is at \(0.75, 0.27\)"),
        ((BLACK, *pair(motion="spin")), {"motions"}, "yellow star: does: spin, not: still"),
        ((STRIPES, *pair()), {"backgrounds"}, "background of white and grey stripes, not a black"),
        ((BLACK, pair()[0]), set(ATTRIBUTES) - {"backgrounds"}, "red square: is not there"),
        (
            (BLACK, *pair(), thing("ring", "green", size=0.3, x=1.2, y=0.25)),
            {"objects"}, "green ring: not asked for",
        ),
        (
            (BLACK, *pair(), thing("star", "yellow", size=0.3, x=1.2, y=0.25)),
            {"objects"}, "a second yellow star: not asked for",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(drawn, names, line):
    lines = script([shot(BLACK, *pair())], (1,))
    record = grade(render([shot(*drawn)], (1,)), lines)
    assert wrong(record) == names
    assert any(re.search(line, text) for text in record["chunks"][0]["wrong"])


@pytest.mark.parametrize("motion", [m for m in shapes.MOTIONS if m != "still"])
def test_every_motion_is_known_and_not_taken_for_another(motion):
    drawn = shot(BLACK, thing(motion=motion))
    others = [m for m in shapes.MOTIONS if m != motion]
    asked = shot(BLACK, thing(motion=others[len(motion) % len(others)]))
    frames = render([drawn], (1,))
    assert not wrong(grade(frames, script([drawn], (1,))))
    assert "motions" in wrong(grade(frames, script([asked], (1,))))


def test_blur_lowers_sharpness_and_little_else():
    one = shot(BLACK, *pair(motion="orbit"))
    frames = render([one], (1,))
    sharpness = []
    for sigma in (0.0, 1.5, 3.0):
        blurred = ndimage.gaussian_filter(frames, (0, sigma, sigma, 0)) if sigma else frames
        record = grade(blurred, script([one], (1,)))
        assert not wrong(record), (sigma, record["chunks"][0]["wrong"])
        sharpness.append(record["chunks"][0]["sharpness"])
    assert sharpness == sorted(sharpness, reverse=True)
    assert sharpness[0] > 0.97 and sharpness[-1] < 0.5


def test_what_grew_long_ago_has_grown():
    """The world's growth ends; a shot of a minute is not wrong for that."""
    grows = shot(BLACK, thing("moon", motion="grow"))

    def motion_is_right(one, start, seconds):
        frames = shapes.render(one, start, start + 29)
        seen = look(segment.tell_apart(segment.to_height(frames)), frames)
        return judge(seen, parse(grows.caption), seconds).right["motions"]

    assert motion_is_right(grows, 500, seconds=20.8)
    assert not motion_is_right(grows, 500, seconds=0)  # it stands still from the beginning on
    assert not motion_is_right(shot(BLACK, thing("moon", size=0.19)), 0, seconds=20.8)


@pytest.mark.parametrize("size", [0.42, 0.3])
def test_what_returns_is_compared(size):
    a, b = shot(STRIPES, thing("moon", "red", size=0.42)), shot(BLACK, thing("ring", "green"))
    back = shot(STRIPES, thing("moon", "red", size=size))
    record = grade(render([a, b, back], (1, 1, 1)), script([a, b, a], (1, 1, 1)))
    (found,) = record["returns"]
    assert (found["chunk"], found["of_chunk"]) == (2, 0)
    assert found["same"] == {
        "objects": 1.0, "colours": 1.0, "backgrounds": 1.0, "sizes": float(size == 0.42), "places": 1.0,
    }  # fmt: skip
    assert found["identity"] == (1.0 if size == 0.42 else 0.8) and found["colour_distance"] < 2
    total = summary.summarise([record])
    assert total["returns"] == 1 and total["return_identity"] == found["identity"]


def test_smaller_frames_are_graded_too():
    one = shot(BLACK, *pair(motion="left"))
    frames = shapes.render(one, 0, 29, 64, 96)
    assert not wrong(grade(frames, script([one], (1,))))


def test_a_video_shorter_than_its_script_is_refused():
    one = shot(BLACK, thing())
    with pytest.raises(InputError, match="has 29 frames, its script of 2 chunks needs 61"):
        grade(render([one], (1,)), script([one], (2,)))


@pytest.mark.parametrize("what", ["pink", "noise", "flicker"])
def test_frames_of_nothing_are_wrong_and_no_error(what):
    frames = np.zeros((29, 128, 192, 3), np.uint8)
    if what == "pink":
        frames[:] = shapes.COLOURS["pink"]
    elif what == "noise":
        frames = np.random.default_rng(0).integers(0, 256, frames.shape, np.uint8)
    else:  # every other frame is another's background
        frames[::2] = render([shot(STRIPES, *pair())], (1,))[::2]
    record = grade(frames, script([shot(BLACK, *pair())], (1,)))
    assert wrong(record) == ({"backgrounds"} if what == "flicker" else set(ATTRIBUTES))
    json.dumps(record, allow_nan=False)
