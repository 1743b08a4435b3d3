"""Doom as a world. The game runs: ViZDoom is among the packages of the tests."""

import dataclasses
import os
import pathlib
import sys

import numpy as np
import pytest

from longlive_jax.data.worlds import poses as poses_lib
from longlive_jax.data.worlds import walkers
from longlive_jax.data.worlds.doom import game as game_lib
from longlive_jax.data.worlds.doom import record
from longlive_jax.data.worlds.doom.game import UNIT, EpisodeEndedError, Game, Games, Size, Start
from longlive_jax.data.worlds.doom.places import PLACES
from longlive_jax.data.worlds.doom.record import Shot
from longlive_jax.data.worlds.poses import Pose
from longlive_jax.data.worlds.takes import actions_of
from longlive_jax.data.worlds.walkers import STILL, Held
from longlive_jax.errors import InputError

SMALL = Size(64, 96, 1)
W, S, A, D = (tuple(i == j for j in range(4)) for i in range(4))
HALL = Start("fortress", 1936, -960, 10)  # a wide court


@pytest.fixture(scope="module")
def games():
    with Games(SMALL) as made:
        yield made


def go(games, start, held):
    """(frames, rows of poses) of what is held, with the picture after the last."""
    held = [*held, STILL]
    return record.replay(
        games, start, actions_of(held, [Pose(0, 0)] * len(held), view=start.view, source="")
    )


@pytest.mark.parametrize("place", PLACES)
def test_the_same_actions_from_the_same_start_give_the_same_pictures(games, place):
    """To the bit: in an engine that did other things before, and in one that did nothing."""
    for view in ("first", "third"):
        take = record.film(games, Shot(place, view, "wander", 40, (3, 1)))
        start = Start.of_text(take.actions.source)
        assert start.place == place and take.actions.view == start.view == view
        frames, poses = record.replay(games, start, take.actions)
        np.testing.assert_array_equal(frames, take.frames)
        np.testing.assert_array_equal(poses, take.actions.pose)
    with Games(SMALL) as others:
        np.testing.assert_array_equal(record.replay(others, start, take.actions)[0], take.frames)


def test_a_take_is_what_its_seed_says(games):
    first, again = (record.film(games, Shot("maze", "first", "tour", 30, (5,))) for _ in range(2))
    np.testing.assert_array_equal(first.frames, again.frames)
    assert first.actions.source == again.actions.source and first.caption == again.caption
    other = record.film(games, Shot("maze", "first", "tour", 30, (6,)))
    assert other.actions.source != first.actions.source
    assert first.frames.shape == (30, 64, 96, 3) and len(first.actions) == 30


def test_turning_turns_by_the_degrees_that_the_mouse_was_moved(games):
    for degrees in (0.7, 5.0, -3.3, 19.0):
        held = [Held(yaw=degrees)] * 20
        _, poses = go(games, HALL, held)
        snapped = sum(game_lib.snap(one).yaw for one in held)
        assert abs(snapped - 20 * degrees) < 20 * UNIT
        assert abs(poses_lib.turned(poses).sum() - snapped) < 1e-2
        assert np.abs(poses[:, :3] - poses[0, :3]).max() == 0


def test_the_mouse_looks_up_and_down(games):
    frames, poses = go(games, HALL, [Held(pitch=2)] * 10 + [Held(pitch=-2)] * 10)
    pitch = poses_lib.yaw_pitch(poses)[1]
    assert abs(pitch[10] - 20) < 0.05 and abs(pitch[-1]) < 0.01
    np.testing.assert_array_equal(frames[0, :32], frames[-1, :32])  # looks as it did
    sky = frames[..., 0].astype(int) - frames[..., 1] > 60  # red, above the court
    assert sky[10].mean() > sky[0].mean() + 0.1


@pytest.mark.parametrize("keys, angle", [(W, 0), (S, 180), (A, -90), (D, 90)])
def test_keys_move_along_the_heading(games, keys, angle):
    _, poses = go(games, HALL, [Held(keys)] * 24)
    moved = poses_lib.moved(poses)
    way = moved.sum(axis=0)
    assert abs(poses_lib.wrap(np.degrees(np.arctan2(way[1], way[0])) - angle)) < 2
    assert 0.8 * game_lib.SPEED < np.hypot(*moved[-1]) <= game_lib.SPEED + 0.1
    assert 0 < np.hypot(*moved[0]) < 1  # the action of picture 0 drives picture 1


def test_an_action_drives_the_next_picture_and_none_before(games):
    one, other = (
        go(games, HALL, [STILL] * 5 + [held] + [STILL] * 3)[0] for held in (STILL, Held(yaw=9))
    )
    np.testing.assert_array_equal(one[:6], other[:6])
    assert (one[6] != other[6]).mean() > 0.1


def test_walls_stop_who_walks(games):
    _, poses = go(games, Start("maze", 240, 176, 180), [Held(W)] * 60)
    x = poses[:, 0]
    assert (
        x[0] - x[-1] > 40 and x[-1] == x[-2] and x.min() >= 160 + 16 - 1
    )  # half the player's width


def test_the_third_person_is_seen_and_the_first_has_nothing_before_it(games):
    """Of who walks, and of a HUD, a weapon or a crosshair, something would stay where it is."""
    same = {}
    for view in ("first", "third"):
        pictures = []
        for place in ("maze", "lava", "canyon"):
            for point in PLACES[place].starts[:3]:
                for yaw in (0, 120):
                    start = Start(place, *map(int, point), yaw, view=view)
                    pictures.append(games.of(place).begin(start)[0])
        pictures = np.stack(pictures).astype(int)
        middle = np.median(pictures, axis=0)
        # Of each pixel, the share of pictures in which it is as in most of them.
        same[view] = (np.abs(pictures - middle).max(axis=-1) < 12).mean(axis=0)
    assert same["first"].max() < 0.7
    assert (same["third"] > 0.7).mean() > 0.01  # a figure, below the centre
    rows, columns = np.nonzero(same["third"] > 0.7)
    assert rows.min() > 20 and abs(columns.mean() - 48) < 6


def test_both_views_are_of_the_same_walk(games):
    held = [Held(W, yaw=1)] * 20
    (first, poses), (third, same) = (
        go(games, dataclasses.replace(HALL, view=view), held) for view in ("first", "third")
    )
    np.testing.assert_array_equal(poses, same)
    assert all((a != b).mean() > 0.05 for a, b in zip(first, third))
    again, _ = go(games, HALL, held)
    np.testing.assert_array_equal(again, first)  # the engine is back in the first person


def test_nothing_lives_there(games):
    """Who stands for four seconds sees the same picture and stays where it is."""
    frames, poses = go(games, HALL, [STILL] * 96)
    assert (poses == poses[0]).all() and (frames == frames[0]).mean() > 0.99


def test_what_lies_about_is_not_taken_and_ends_nothing(games):
    """The vest of my_way_home is its goal, at 1040, 352: one walks over it, and on."""
    start = Start("maze", 1040, 260, 90)
    before, _ = go(games, start, [])
    _, poses = go(games, start, [Held(W)] * 60)
    assert poses[-1, 1] > 380
    after, _ = go(games, start, [])
    np.testing.assert_array_equal(before, after)


class Ends:
    """An engine whose first `endings` episodes end at their tenth picture."""

    size = SMALL

    def __init__(self, endings):
        self.endings, self.begun = endings, 0

    def of(self, place):
        return self

    def begin(self, start):
        self.begun, self.shown = self.begun + 1, 1
        return self.seen()

    def step(self, held):
        self.shown += 1
        if self.begun <= self.endings and self.shown > 10:
            raise EpisodeEndedError
        return self.seen()

    def seen(self):
        return np.full((64, 96, 3), self.begun, np.uint8), Pose(20.0 * self.shown, 0)


def test_a_finished_episode_is_in_no_take():
    games = Ends(2)
    take = record.film(games, Shot("canyon", "first", "explore", 30, (0,)))
    assert games.begun == 3 and (take.frames == 3).all() and len(take.frames) == 30
    with pytest.raises(InputError, match="canyon: none of 20 starts gives a shot of 30 pictures"):
        record.film(Ends(99), Shot("canyon", "first", "explore", 30, (0,)))
    with pytest.raises(InputError, match="episode ends after picture 9 of 30; give the actions"):
        record.replay(Ends(99), HALL, take.actions)


def test_who_roams_gets_somewhere():
    """A start from which there is no way is given up for another."""

    class Pit(Ends):
        def seen(self):
            return np.zeros((64, 96, 3), np.uint8), Pose(
                0 if self.begun < 4 else 20.0 * self.shown, 0
            )

    for walk, begun in (("explore", 4), ("stand", 1)):
        games = Pit(0)
        record.film(games, Shot("canyon", "first", walk, 30, (0,)))
        assert games.begun == begun


def test_clips_are_those_of_the_seed():
    few, many = (list(record.clips(5, count, frames=241)) for count in (4, 9))
    assert few == many[:4] != list(record.clips(6, 4, frames=241))
    assert all(sum(shot.frames for shot in shots) == 241 for shots in many)
    assert all(len(shots) == 1 for shots in record.clips(5, 9, frames=241, cuts=0))
    for first, second in record.clips(5, 40, frames=241, cuts=1):
        assert first.place != second.place or first.view != second.view


def test_held_out_are_routes_and_a_map():
    train, routes, a_map = (
        [shot for clip in record.clips(5, 60, frames=99, split=split) for shot in clip]
        for split in record.SPLITS
    )
    assert {shot.place for shot in train} == {shot.place for shot in routes} | {"maze"}
    assert {shot.place for shot in a_map} == {"village"}
    maps = {(PLACES[shot.place].scenario, PLACES[shot.place].map) for shot in train}
    assert len(maps) >= 4 and not maps & {("", PLACES["village"].map)}
    assert not {shot.seed for shot in train} & {shot.seed for shot in routes}
    assert {shot.walk for shot in routes} == set(walkers.WALKS)
    assert {shot.view for shot in routes} == {shot.view for shot in train} == {"first", "third"}


def test_captions_say_view_place_and_rooms():
    maze = PLACES["maze"]
    along = np.asarray([(240, 176)] * 3 + [(350, 176)] * 5 + [(464, 176)] * 9)
    caption = maze.caption("third", along)
    assert caption == (
        "Third person view, a maze of brown brick with grey steel doors, then a dark blue wall."
    )
    assert maze.caption("first", along[3:8]) == "First person view, a maze of brown brick."
    everywhere = np.asarray([point for point in maze.ways for _ in range(3)])
    assert maze.caption("first", everywhere).count("wall") <= 3
    hell = PLACES["lava"]
    at_the_keep = ["keep" in hell.caption("first", np.asarray([point])) for point in hell.starts]
    assert at_the_keep == [False] * 8 + [True] * 3
    words = [place.words for place in PLACES.values()]
    assert len(set(words)) == len(words)


def test_the_rooms_of_the_maze_look_as_their_words(games):
    """By the most frequent colour of the walls, in the corner of each room."""
    seen = {}
    for room in PLACES["maze"].rooms:
        x, y = int(room.left + room.right) // 2, int(room.top + room.bottom) // 2
        frame, _ = games.of("maze").begin(Start("maze", x, y, 45))
        seen[room.words] = np.median(frame[22:42, 32:64].reshape(-1, 3), axis=0)
    for name, channel in (("red wall", 0), ("green vine wall", 1), ("dark blue wall", 2)):
        colour = seen[f"a {name}"]
        assert colour.argmax() == channel and colour[channel] > 1.3 * np.median(colour)
    assert seen["a white panel wall"].min() > 1.5 * seen["grey steel doors"].max()
    assert np.ptp(seen["a wall of grey crates"]) < 20


@pytest.mark.parametrize(
    ("size", "drawn"),
    [
        ((160, 256, 1), (256, 160)),
        ((160, 256, 2), (512, 320)),
        ((192, 320, 2), (640, 400)),
        ((480, 832, 1), (1024, 576)),
    ],
)
def test_sizes_are_cut_from_the_next_that_the_game_draws(size, drawn):
    assert Size(*size).drawn(game_lib.sizes()) == drawn


@pytest.mark.parametrize("size", [SMALL, Size(160, 256, 2), Size(192, 320, 1)])
def test_the_focal_length_is_two_thirds_of_the_height(size):
    """A picture, seen from three degrees to the right, is the next one, by that focal length best."""
    start, degrees = Start("lava", 2728, -560, 100), 3.0
    with Game(size=size) as game:
        rows = slice(size.height // 3, -size.height // 3)
        (before, _), (after, _) = game.begin(start), game.step(Held(yaw=degrees))
        before, after = (frame[rows].astype(float).mean(axis=2) for frame in (before, after))
    columns = np.arange(size.width // 4, 3 * size.width // 4)
    ahead = columns - (size.width - 1) / 2

    def error(focal):
        there = focal * np.tan(np.arctan(ahead / focal) + np.radians(degrees))
        x = there + (size.width - 1) / 2
        left, share = np.floor(x).astype(int), x % 1
        seen = before[:, left] * (1 - share) + before[:, left + 1] * share
        return np.abs(seen - after[:, columns]).mean()

    tried = size.focal * np.linspace(0.6, 1.6, 101)
    assert 0.93 < min(tried, key=error) / size.focal < 1.07


def test_a_pixel_is_a_mean_of_what_is_drawn():
    drawn = np.random.default_rng(0).integers(0, 256, (150, 200, 3), np.uint8)
    fine = game_lib._middle(drawn, Size(64, 96, 2))
    inner = drawn[11:-11, 4:-4].astype(float).reshape(64, 2, 96, 2, 3).mean(axis=(1, 3))
    assert np.abs(fine - inner).max() <= 0.5
    np.testing.assert_array_equal(game_lib._middle(drawn, SMALL), drawn[43:-43, 52:-52])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Size(161, 256), "height=161 must be a multiple of 32"),
        (lambda: Size(160, 0), "width=0 must be a multiple of 32"),
        (lambda: Size(160, 256, 5), "supersample=5 must be 1 to 4"),
        (lambda: Size(1088, 1920).drawn(game_lib.sizes()), "would draw 3840x2176 pixels"),
        (lambda: Start("mars", 0, 0), "place='mars' must be one of maze, lava"),
        (lambda: Start("maze", 0, 0, view="top"), "view='top' must be one of first, third"),
        (lambda: Start("maze", 0.5, 0), "x=0.5 must be a whole number, -32768 to 32767"),
        (lambda: Start("maze", 0, 0, seed=-1), "seed=-1 must be a whole number, 0 to"),
        (lambda: Start("maze", 0, 0, float("nan")), "yaw=nan must be a number of degrees"),
        (lambda: Start.of_text("Minecraft"), "no start in Doom: it does not begin with"),
        (lambda: Start.of_text("doom {"), "no start in Doom"),
        (lambda: Start.of_text('doom {"place": "maze", "height": 3}'), "no start in Doom"),
        (lambda: record.places_of("train", ["mars"]), "place 'mars' must be one of"),
    ],
)
def test_bad_input_is_refused_by_name(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("place, x, y", [("maze", 160, 176), ("canyon", 896, -1888)])
def test_in_a_wall_or_a_tree_nobody_can_stand(games, place, x, y):
    with pytest.raises(InputError, match=f"x={x}, y={y}: nobody can stand there in {place}"):
        games.of(place).begin(Start(place, x, y))


@pytest.mark.parametrize("place", PLACES)
def test_one_can_stand_at_every_start(games, place):
    for x, y in PLACES[place].starts:
        games.of(place).begin(Start(place, int(x), int(y)))


def test_places_are_in_their_scenario(games):
    with pytest.raises(
        InputError, match=r"place=maze is in my_way_home\.wad, this game has freedoom2"
    ):
        games.of("canyon").begin(Start("maze", 240, 176))


def test_a_start_comes_back_from_its_text():
    start = Start("lava", 3, -4, 12.5, 7, "third")
    assert Start.of_text(start.text()) == start


def test_the_missing_game_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vizdoom", None)
    with pytest.raises(
        InputError, match=r"needs ViZDoom, which is not installed.*pip install vizdoom"
    ):
        Game()


def test_a_package_without_its_maps_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(game_lib.module(), "__path__", [str(tmp_path)])
    with pytest.raises(InputError, match=r"freedoom2\.wad: no such file, which ViZDoom comes with"):
        Game()


def test_an_engine_leaves_no_files(monkeypatch, tmp_path):
    here = tmp_path / "a folder"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr("tempfile.tempdir", str(here))
    with Game(size=SMALL) as game:
        game.begin(HALL)
        assert pathlib.Path.cwd() == here
    assert os.listdir(here) == []
