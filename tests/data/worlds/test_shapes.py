import itertools
import re
import time

import numpy as np
import pytest

from longlive_jax.data.worlds import shapes as world
from longlive_jax.data.worlds.shapes import COLOURS, MOTIONS, SHAPES, Background, Object, Shot

BLACK = Background("plain", "black", "black")
TRAINING = list(itertools.chain(*world.clips(0, 400)))
HELD_OUT = list(itertools.chain(*world.clips(0, 100, held_out=True)))


def single(motion, shape="triangle", size=0.45, phase=0.5, frames=120, colour="yellow"):
    thing = Object(shape, colour, motion, size, world.ASPECT / 2, 0.5, phase, 1.0)
    return Shot(BLACK, (thing,), frames, "")


def covered(frames, shot):
    """Share of each pixel that the object covers, [frame, y, x]: 0 to 1."""
    black = np.asarray(world.GROUNDS["black"], float)
    colour = np.asarray(COLOURS[shot.objects[0].colour], float) - black
    return (frames - black) @ colour / (colour @ colour)


def kinds(shots):
    return {(o.shape, o.colour, o.motion) for shot in shots for o in shot.objects}


def test_a_clip_depends_on_the_seed_and_its_number():
    few, many = list(world.clips(5, 3)), list(world.clips(5, 6))
    assert few == many[:3] and len({shots[0].caption for shots in many}) > 3
    assert few != list(world.clips(6, 3)) and few != list(world.clips(5, 3, held_out=True))
    assert all(2 <= len(shots) <= 4 for shots in many)
    assert all(64 <= shot.frames <= 125 for shots in many for shot in shots)


def test_held_out_combinations_are_never_trained_on():
    training, held_out = kinds(TRAINING), kinds(HELD_OUT)
    assert not training & held_out
    assert not any(world.held_out(*kind) for kind in training)
    assert all(world.held_out(*kind) for kind in held_out)
    for place, values in enumerate((SHAPES, COLOURS, MOTIONS)):  # but all their parts are
        assert {kind[place] for kind in training} == set(values)
    combinations = list(itertools.product(SHAPES, COLOURS, MOTIONS))
    assert 0.05 < sum(world.held_out(*c) for c in combinations) / len(combinations) < 0.2


def test_captions_say_what_is_seen():
    for shot in TRAINING:
        caption = shot.caption.lower()
        assert all(o.words in caption for o in shot.objects)
        assert all(any(way in caption for way in MOTIONS[o.motion]) for o in shot.objects)
        assert shot.background.words in caption
        assert shot.caption[0].isupper() and shot.caption.endswith(".")
        named = {name for name in SHAPES if name in re.findall("[a-z]+", caption)}
        assert named == {o.shape for o in shot.objects}
        assert len({o.colour for o in shot.objects}) == len(shot.objects) == len(named)


def test_captions_vary_in_wording_and_grammar_holds():
    captions = {shot.caption for shot in TRAINING}
    starts = {caption.split()[0] for caption in captions}
    assert starts == {"A", "An", "Over", "There"}
    assert not any(f" a {vowel}" in c or f"A {vowel}" in c for c in captions for vowel in "aeiou")
    example = Shot(BLACK, (), 1, "")
    assert world._captions(["a red circle moves left"], example.background) == [
        "A red circle moves left over a black background.",
        "Over a black background, a red circle moves left.",
        "There is a black background. A red circle moves left.",
    ]


def test_what_is_invisible_is_not_said():
    assert not any(
        o.motion == "spin" and o.shape in ("circle", "ring")
        for s in TRAINING + HELD_OUT
        for o in s.objects
    )


def test_colours_are_distinct():
    for a, b in itertools.combinations(COLOURS.values(), 2):
        assert np.linalg.norm(np.subtract(a, b)) > 80, (a, b)
    for shot in TRAINING:
        for thing in shot.objects:
            for name in (shot.background.first, shot.background.second):
                away = np.subtract(COLOURS[thing.colour], world.GROUNDS[name])
                assert np.linalg.norm(away) >= 100


def test_objects_are_large():
    sizes = [o.size for shot in TRAINING for o in shot.objects]
    assert min(sizes) > 1 / 3 and max(sizes) <= 0.5


def test_frames_do_not_depend_on_the_range_asked_for():
    shot = TRAINING[7]
    whole = world.render(shot, 0, 20)
    assert whole.shape == (20, 128, 192, 3) and whole.dtype == np.uint8
    np.testing.assert_array_equal(world.render(shot, 12, 15), whole[12:15])
    assert world.render(shot, 3, 5, 64, 96).shape == (2, 64, 96, 3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("motion", ["still", "spin"])
def test_edges_are_antialiased(shape, motion):
    """As if drawn at eight times the size, without antialiasing, and averaged."""
    shot = single(motion, shape, phase=0.13)
    small = covered(world.render(shot, 9, 10), shot)[0]
    large = covered(world.render(shot, 9, 10, 8 * 128, 8 * 192), shot)[0] > 0.5
    exact = large.reshape(128, 8, 192, 8).mean((1, 3))
    assert np.abs(small - exact).max() < 0.35  # at the tips; along edges it is nearly exact
    assert np.abs(small - exact).mean() < 0.002
    assert abs(small.sum() / exact.sum() - 1) < 0.02
    assert ((small > 0.1) & (small < 0.9)).sum() > 20


def test_shapes_are_centred_and_as_large_as_they_say():
    for shape in SHAPES:
        shot = single("still", shape)
        y, x = np.nonzero(covered(world.render(shot, 0, 1), shot)[0] > 0.5)
        radii = np.hypot(y + 0.5 - 64, x + 0.5 - 96) / 128
        assert 0.2 < radii.max() < 0.24, shape


def path(motion, **kwargs):
    """Of the pictures of a motion: (x, y) of the centre and area by frame, the area above 0."""
    shot = single(motion, **kwargs)
    cover = covered(world.render(shot, 0, shot.frames), shot)
    area = cover.sum((1, 2))
    y, x = np.mgrid[0:128, 0:192] + 0.5
    safe = np.maximum(area, 1)
    return (cover * x).sum((1, 2)) / safe, (cover * y).sum((1, 2)) / safe, area


def test_each_motion_does_what_it_says():
    x, y, area = path("left", frames=24)
    assert (np.diff(x) < -0.5).all() and np.ptp(y) < 0.5 and np.ptp(area) < 0.02 * area[0]
    x, y, _ = path("right", frames=24)
    assert (np.diff(x) > 0.5).all() and np.ptp(y) < 0.5
    x, y, _ = path("up", frames=16)
    assert (np.diff(y) < -0.5).all() and np.ptp(x) < 0.5
    x, y, _ = path("down", frames=16)
    assert (np.diff(y) > 0.5).all() and np.ptp(x) < 0.5
    x, y, _ = path("bounce")
    assert np.ptp(x) < 0.5 and np.ptp(y) > 20
    assert np.count_nonzero(np.diff(np.sign(np.diff(y)))) >= 4
    x, y, area = path("orbit")
    radius = np.hypot(x - x.mean(), y - y.mean())
    assert np.ptp(x) > 35 and np.ptp(y) > 35 and radius.min() > 15
    x, y, area = path("spin", shape="square")
    assert max(np.ptp(x), np.ptp(y)) < 0.5 and np.ptp(area) < 0.01 * area[0]
    x, y, area = path("grow")
    assert (np.diff(area) > 0).all() and area[-1] > 3 * area[0]
    x, y, area = path("shrink")
    assert (np.diff(area) < 0).all() and area[-1] < area[0] / 3
    x, y, area = path("still")
    assert np.ptp(x) == np.ptp(y) == np.ptp(area) == 0


def test_spinning_is_seen():
    shot = single("spin", "square")
    frames = world.render(shot, 0, 10).astype(float)
    assert np.abs(frames[9] - frames[0]).mean() > 1


@pytest.mark.parametrize("motion", MOTIONS)
def test_objects_are_there_at_the_cut_and_never_leave_for_long(motion):
    for phase, size in ((0.0, 0.36), (0.99, 0.5)):
        shot = single(motion, "star", size, phase, frames=125)
        area = covered(world.render(shot, 0, 125, 64, 96), shot).sum((1, 2))
        assert area[0] > 40
        gone, longest = 0, 0
        for visible in area > 5:
            gone = 0 if visible else gone + 1
            longest = max(longest, gone)
        assert longest <= 12


@pytest.mark.parametrize("motion", MOTIONS)
def test_motion_is_smooth(motion):
    """Nothing jumps, but for what is out of sight."""
    shot = single(motion, "square", phase=0.1)
    places = np.array([world.state(shot.objects[0], t / 24) for t in range(120)])
    steps = np.abs(np.diff(places[:, :3], axis=0)).max(1)
    jumps = (steps > 0.06).sum()  # from one side to the other
    assert jumps <= (2 if motion in ("left", "right", "up", "down") else 0)


def test_the_first_object_is_in_front():
    yellow, red = (
        Object(shape, colour, "still", 0.45, 0.75, 0.5, 0.0, 1.0)
        for shape, colour in (("circle", "yellow"), ("square", "red"))
    )
    middle = world.render(Shot(BLACK, (yellow, red), 1, ""), 0, 1)[0, 64, 96]
    assert tuple(middle) == COLOURS["yellow"]


@pytest.mark.parametrize("background", world.BACKGROUNDS, ids=lambda b: b.words)
def test_backgrounds(background):
    frame = world.render(Shot(background, (), 1, ""), 0, 1)[0].astype(int)
    first, second = (np.array(world.GROUNDS[n]) for n in (background.first, background.second))
    if background.kind == "gradient":
        assert abs(frame[0, 9] - first).max() <= 1 and abs(frame[-1, 9] - second).max() <= 1
        assert (frame == frame[:, :1]).all()
    else:
        near = [np.abs(frame - colour).max(-1) <= 1 for colour in (first, second)]
        assert (near[0] | near[1]).mean() > 0.9 and near[0].mean() > 0.3 and near[1].mean() > 0.3
        assert (frame == frame[:1]).all()


def test_drawing_is_fast():
    shot = max(TRAINING, key=lambda s: len(s.objects))
    world.render(shot, 0, 1)

    def measure():
        start = time.process_time()
        world.render(shot, 0, 20)
        return (time.process_time() - start) / 20

    assert min(measure() for _ in range(5)) < 4e-3  # measured: 1.2 ms; room for a busy machine
