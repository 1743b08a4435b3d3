import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlive_jax.data.worlds import shapes
from longlive_jax.grading import cuts, segment
from longlive_jax.grading.caption import parse
from tests.grading.clips import BLACK, STRIPES, grade, pair, render, script, shot, thing

OLD = shot(BLACK, thing("star", "yellow", "orbit"))
NEW = {
    "background": shot(STRIPES, thing("star", "blue", "left")),
    "colour": shot(BLACK, thing("star", "green", "bounce")),
    "one more": shot(BLACK, *pair()),
    "shape": shot(BLACK, thing("ring", "yellow", "orbit")),
}


@functools.cache
def frames(one):
    return segment.tell_apart(segment.to_height(shapes.render(one, 0, 32)))


@pytest.mark.parametrize("what", NEW)
@settings(max_examples=12, deadline=None)
@given(late=st.integers(0, 29))
def test_a_late_cut_is_measured(what, late):
    """`late` frames of the old shot, then the new one: whatever the two have in common."""
    old, new = parse(OLD.caption), parse(NEW[what].caption)
    assert cuts.is_measured(old, new)
    before, after = shown(OLD, what), shown(NEW[what], what)
    assert cuts.latency(np.concatenate([before[:late], after[late:]])) == late


@functools.cache
def shown(one, what):
    return cuts.shows(frames(one), parse(OLD.caption), parse(NEW[what].caption))


def test_a_flicker_is_no_cut_and_one_that_never_comes_is_none():
    assert cuts.latency(np.asarray([0, 1, 0, 0, 1, 1, 1, 0], bool)) == 4
    assert cuts.latency(np.asarray([0, 1, 0, 1, 1, 0], bool)) is None


def test_a_cut_between_shots_that_look_the_same_is_not_measured():
    still, spins = shot(BLACK, thing()), shot(BLACK, thing(motion="spin"))
    assert not cuts.is_measured(parse(still.caption), parse(spins.caption))


@pytest.mark.parametrize(("late", "right"), [(7, True), (64, False)])
def test_the_record_of_a_late_cut(late, right):
    shots = [shot(BLACK, thing("star", "yellow")), shot(STRIPES, thing("ring", "blue"))]
    whole = render(shots, (1, 2))
    whole[29 : 29 + late] = shapes.render(shots[0], 29, 29 + late)
    (cut,) = grade(whole, script(shots, (1, 2)))["cuts"]
    frames = late if late < 64 else None
    assert cut == {
        "chunk": 1, "measured": True, "frames": frames, "chunks": None if frames is None else 0,
        "right_within_a_chunk": right,
    }  # fmt: skip
