import dataclasses
import json
import os
import pathlib
import pickle
import re
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longlive_jax import config as config_lib
from longlive_jax.data import clips as clips_lib
from longlive_jax.data.clips import Clip, Rules, VideoFolder, fill, plan, starts
from longlive_jax.data.video import VideoWriter
from longlive_jax.data.video_reader import VideoFile, frame_indices
from longlive_jax.errors import InputError

PREFIX = "The scene transitions. "
NTSC = Fraction(30000, 1001)


def clip(frames, fps=24):
    return Clip(pathlib.Path("a.mp4"), "a", frames, Fraction(fps))


def layout(segments):
    """Clip numbers, with + before a chunk that begins a shot."""
    return " ".join("+" * s.cut + str(s.clip) for s in segments)


# What a sample is made of.

rules = st.builds(
    Rules,
    chunks=st.integers(1, 6),
    chunk_frames=st.integers(1, 8),
    min_chunks=st.just(1),
    max_chunks_per_shot=st.integers(0, 3),
    single_shot=st.booleans(),
).flatmap(
    lambda r: st.integers(1, r.chunks).map(lambda least: dataclasses.replace(r, min_chunks=least))
)
some_clips = st.lists(
    st.builds(clip, st.integers(1, 300), st.sampled_from([12, 16, NTSC, 24, 25, 48, 60])),
    min_size=1,
    max_size=5,
)


@settings(max_examples=300, deadline=None)
@given(some_clips, rules, st.integers(0, 2**64 - 1))
@example([clip(300)], Rules(1, 8, 1), 0)
def test_a_plan_keeps_the_rules(clips, rules, key):
    segments = plan(clips, rules, np.random.default_rng(key))
    assert segments == plan(clips, rules, np.random.default_rng(key))
    assert not segments or rules.min_chunks <= len(segments) <= rules.chunks
    in_shot = 0
    for k, s in enumerate(segments):
        source = clips[s.clip]
        indices = frame_indices(source.frames, source.fps, s.frames, 24, s.start)
        assert s.frames == (1 if k == 0 else 4) + 4 * (rules.chunk_frames - 1)
        # Every frame is there: none had to be moved back to the last one.
        free = np.round(s.start + np.arange(s.frames) * source.interval)
        np.testing.assert_array_equal(indices, free)
        assert free[0] == s.start and free[-1] < source.frames
        if k == 0:
            assert not s.cut
        elif s.clip != segments[k - 1].clip:
            assert s.cut and s.start == 0 and s.clip > segments[k - 1].clip
        else:
            before = segments[k - 1]
            follows = round(before.start + before.frames * source.interval)
            assert s.start == follows + (round(float(source.fps)) if s.cut else 0)
        in_shot = 1 if s.cut else in_shot + 1
        assert not rules.max_chunks_per_shot or in_shot <= rules.max_chunks_per_shot
        forced = k and s.cut and s.clip == segments[k - 1].clip
        assert not forced or rules.max_chunks_per_shot
    if rules.single_shot:
        assert len({s.clip for s in segments}) <= 1


@settings(max_examples=300, deadline=None)
@given(some_clips, rules, st.integers(0, 2**64 - 1))
def test_a_plan_is_full_where_any_start_fills_it(clips, rules, key):
    places = starts(clips, rules, range(len(clips)))
    full = [p for p in places if len(fill(clips, rules, *p)) == rules.chunks]
    segments = plan(clips, rules, np.random.default_rng(key))
    if full:
        assert len(segments) == rules.chunks
        assert (segments[0].clip, segments[0].start) in full
    else:
        heads = range(len(clips)) if rules.single_shot else [0]
        longest = max(len(fill(clips, rules, head, 0)) for head in heads)
        assert bool(segments) == (longest >= rules.min_chunks)


def test_every_start_that_fills_is_as_likely():
    clips, rules = [clip(35), clip(64)], Rules(3, 8, 3)
    rng = np.random.default_rng(0)
    found = [(s[0].clip, s[0].start) for s in (plan(clips, rules, rng) for _ in range(2000))]
    counts = {place: found.count(place) for place in set(found)}
    assert set(counts) == {(0, start) for start in range(7)}
    assert min(counts.values()) > 2000 / 7 * 0.75


def test_starts_are_spaced_in_a_long_clip():
    places = [start for _, start in starts([clip(29 + 1000)], Rules(2, 8, 2), [0])]
    assert places == list(range(0, 1001, 20))
    assert starts([clip(28)], Rules(2, 8, 2), [0]) == []


def test_the_documented_examples():
    """Seven chunks of two files; with three chunks a shot at most, one second is skipped."""
    two = [clip(29 + 2 * 32), clip(4 * 32 + 24)]
    assert layout(fill(two, Rules(7, 8, 7), 0, 0)) == "0 0 0 +1 1 1 1"
    one = [clip(29 + 6 * 32 + 2 * 24)]
    segments = fill(one, Rules(7, 8, 7, max_chunks_per_shot=3), 0, 0)
    assert layout(segments) == "0 0 0 +0 0 0 +0"
    assert [s.start for s in segments] == [0, 29, 61, 117, 149, 181, 237]
    short = [clip(29 + 6 * 32 + 2 * 24 - 1)]  # the last one lacks a frame
    assert len(fill(short, Rules(7, 8, 7, max_chunks_per_shot=3), 0, 0)) == 6


def test_skipped_seconds_count_when_a_start_is_chosen():
    """The original chose starts from which, with the skip, its sample did not fit."""
    clips, rules = [clip(29 + 3 * 32 + 24 + 5)], Rules(4, 8, 4, max_chunks_per_shot=2)
    found = {plan(clips, rules, np.random.default_rng(i))[0].start for i in range(100)}
    assert found == {0, 2, 4}  # every second frame is a candidate, and 6 is too late


def test_a_shot_that_is_too_short_for_a_chunk_is_left_out():
    assert layout(fill([clip(29), clip(31), clip(64)], Rules(3, 8, 3), 0, 0)) == "0 +2 2"
    assert layout(fill([clip(28), clip(64)], Rules(2, 8, 1), 0, 0)) == "1 1"


def test_a_single_shot_stays_in_its_file():
    clips = [clip(61), clip(93), clip(40), clip(100)]
    rules = Rules(3, 8, 3, single_shot=True)
    found = {plan(clips, rules, np.random.default_rng(i))[0].clip for i in range(60)}
    assert found == {1, 3}
    padded = dataclasses.replace(rules, chunks=4, min_chunks=2)
    found = {plan(clips, padded, np.random.default_rng(i))[0].clip for i in range(60)}
    assert found == {0, 1, 3}
    assert plan(clips, dataclasses.replace(padded, min_chunks=4), np.random.default_rng(0)) == []


# Files. The brightness of a frame is its number.

SIZE = 32, 64


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "data")


class World:
    """A training folder, written file by file."""

    def __init__(self, path):
        self.path = path

    def add(self, name, *lengths, fps=24, size=SIZE):
        for i, length in enumerate(lengths):
            self.video(f"{name}/{i:06d}.mp4", length, fps, size)
            self.caption(f"{name}/{i:06d}", f"{name} shot {i}")
        return self

    def video(self, name, length, fps=24, size=SIZE):
        frames = np.empty((length, *size, 3), np.uint8)
        frames[:] = (20 + 3 * np.arange(length))[:, None, None, None]
        with VideoWriter(self.path / "video" / name, *size, fps) as writer:
            writer.write(frames)

    def caption(self, name, text):
        path = self.path / "caption" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if text.startswith("{") else json.dumps({"caption": text}))
        return path

    def open(self, latents=4, size=SIZE, **data):
        """Two latent frames a chunk, so chunks of 5, 8, 8, ... frames."""
        return VideoFolder(
            config_lib.Config(
                model=config_lib.Model(chunk_frames=2),
                video=config_lib.Video(height=size[0], width=size[1]),
                sample=config_lib.Sample(window_frames=8, sink_frames=2),
                data=config_lib.Data(path=str(self.path), **data),
                train=config_lib.Train(latent_frames=latents),
            )
        )


def numbers(frames):
    return np.round((frames.astype(float).mean((1, 2, 3)) - 20) / 3).astype(int).tolist()


def test_a_sample_of_several_shots(world):
    sample = world.add("a", 13, 8).open(latents=6).sample(0, 0)
    assert sample.name == "a" and sample.chunks == 3 and not sample.failures
    assert sample.prompts == ("a shot 0", "a shot 0", f"{PREFIX}a shot 1")
    assert sample.frames.shape == (21, *SIZE, 3) and sample.frames.dtype == np.uint8
    assert numbers(sample.frames) == [*range(13), *range(8)]
    assert sample.latents is None and sample.text is None


def test_samples_depend_on_their_key_alone(world):
    source = world.add("a", 60).open()
    found = [numbers(source.sample(0, key).frames) for key in range(8)]
    assert found == [
        numbers(pickle.loads(pickle.dumps(source)).sample(0, k).frames) for k in range(8)
    ]
    assert all(f == list(range(f[0], f[0] + 13)) for f in found)
    assert len({f[0] for f in found}) > 4


def test_frames_keep_their_time(world):
    """30 frames a second become 24: rounded, halves to even."""
    picked = numbers(world.add("a", 20, fps=30).open().sample(0, 0).frames)
    start = picked[0]
    second = round(start + 5 * 1.25)
    expected = [round(start + 1.25 * k) for k in range(5)] + [
        round(second + 1.25 * k) for k in range(8)
    ]
    assert picked == expected


def test_a_forced_cut_skips_a_second(world):
    sample = world.add("a", 5 + 8 + 24 + 8).open(latents=6, max_chunks_per_shot=2).sample(0, 0)
    assert sample.prompts == ("a shot 0", "a shot 0", f"{PREFIX}a shot 0")
    assert numbers(sample.frames) == [*range(13), *range(37, 45)]


def test_padding_repeats_the_last_frame_and_the_plain_prompt(world):
    source = world.add("a", 5, 8).open(latents=8, allow_padding=True, min_chunks=2)
    sample = source.sample(0, 0)
    assert sample.chunks == 2
    assert sample.prompts == ("a shot 0", f"{PREFIX}a shot 1", "a shot 1", "a shot 1")
    assert numbers(sample.frames) == [*range(5), *range(8), *[7] * 16]
    with pytest.raises(InputError, match=r"too short: 2 usable .* 3 chunks"):
        world.open(latents=8, allow_padding=True, min_chunks=3).sample(0, 0)


def test_folders_by_name_and_files_by_number(world):
    world.add("b", 5).add("a", 5)
    for number in (10, 9, 1):
        world.video(f"c/{number}.mp4", 8)
        world.caption(f"c/{number}", f"number {number}")
    world.video("c/intro.mp4", 8)
    world.caption("c/intro", "not a number")
    (world.path / "video" / ".hidden").mkdir()
    (world.path / "video" / "c" / ".0.partial-7.mp4").write_bytes(b"")
    (world.path / "video" / "c" / "notes.txt").write_text("ignored")
    source = world.open(latents=8)
    assert len(source) == 3
    sample = source.sample(0, 0)  # a and b are too short
    assert sample.name == "c"
    assert [p.removeprefix(PREFIX) for p in sample.prompts] == [
        "number 1", "number 9", "number 10", "not a number",
    ]  # fmt: skip
    reasons = dict(sample.failures)
    assert list(reasons) == [str(world.path / "video" / name) for name in "ab"]
    assert all("too short" in reason for reason in reasons.values())


def test_a_prefix_in_a_caption_is_there_once(world):
    world.add("a", 5, 8)
    world.caption("a/000001", f"{PREFIX}a dog")
    assert world.open().sample(0, 0).prompts == ("a shot 0", f"{PREFIX}a dog")


def test_pictures_are_stretched(world):
    world.add("a", 13, size=(48, 48))
    assert world.open().sample(0, 0).frames.shape == (13, *SIZE, 3)


def test_only_the_frames_of_a_sample_are_converted(world, monkeypatch):
    world.add("a", 60, 60)
    asked = []
    pick = VideoFile.pick

    def counted(self, indices):
        asked.extend(indices)
        return pick(self, indices)

    monkeypatch.setattr(VideoFile, "pick", counted)
    world.open().sample(0, 1)
    assert len(asked) == 13


# What can be wrong with a file.


def damage(path, kind):
    data = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this is no video")
    elif kind == "truncated":
        path.write_bytes(data[: len(data) * 2 // 3])
    elif kind == "missing frames":  # the index is whole, what it points to is not
        start = data.index(b"mdat") + 8
        path.write_bytes(data[:start] + b"\0" * 4000 + data[start + 4000 :])
    elif kind == "fps":  # the time scale of the movie's frames: 13 of them in a nanosecond
        path.write_bytes(scale(data, b"mdhd", 2**31 - 1))
    elif kind == "folder":
        path.unlink()
        path.mkdir()


def scale(data, box, value):
    at = data.index(box) + 4 + 4 + 8
    return data[:at] + struct.pack(">I", value) + data[at + 4 :]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("empty", "the file is empty"),
        ("text", "cannot be read as a video"),
        ("truncated", "cannot be read as a video|truncated"),
        ("missing frames", "cannot be read as a video|ends after|without frames"),
        ("fps", "frames a second; must be"),
        ("folder", "is a folder"),
    ],
)
def test_a_bad_video_is_passed_over(world, kind, reason):
    world.add("a", 13).add("b", 13)
    path = world.path / "video" / "a" / "000000.mp4"
    damage(path, kind)
    sample = world.open().sample(0, 0)
    assert sample.name == "b"
    (where, why), (folder, nothing) = sample.failures
    assert where == str(path) and where not in why
    assert re.search(reason, why), why
    assert (folder, nothing) == (str(path.parent), "holds no video that can be used")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "no such file, so the video has no caption"),
        ("{not json", "not JSON"),
        ("{}", 'must be an object with a text under "caption"'),
        ('{"caption": 5}', 'must be an object with a text under "caption"'),
        ('{"caption": "  "}', "the caption is empty"),
        ('{"caption": "&nbsp;"}', "the caption is empty"),
    ],
)
def test_a_bad_caption_is_passed_over(world, text, reason):
    world.add("a", 13).add("b", 13)
    path = world.path / "caption" / "a" / "000000.json"
    path.unlink()
    if text is not None:
        world.caption("a/000000", text)
    sample = world.open().sample(0, 0)
    assert sample.name == "b"
    assert sample.failures[0][0] == str(path) and sample.failures[0][1].startswith(reason)


def test_the_other_files_of_a_folder_are_used(world):
    """Also where damage shows only when the frames are decoded."""
    world.add("a", 13, 13, 13)
    damage(world.path / "video" / "a" / "000001.mp4", "text")
    path = world.path / "video" / "a" / "000000.mp4"
    real, bad = clips_lib.VideoFile, str(path)

    class Fails(real):
        def pick(self, indices):
            if str(self.path) == bad:
                raise InputError(f"{self.path}: damaged in the middle")
            return super().pick(indices)

    clips_lib.VideoFile = Fails
    try:
        sample = world.open(latents=4).sample(0, 0)
    finally:
        clips_lib.VideoFile = real
    assert sample.name == "a" and set(sample.prompts) == {"a shot 2"}
    assert [where[-10:] for where, _ in sample.failures] in (
        ["000001.mp4", "000000.mp4"],
        ["000001.mp4"],
    )


def test_the_search_wraps(world):
    world.add("a", 13).add("b", 5).add("c", 5)
    source = world.open()
    assert [source.sample(i, 0).name for i in range(3)] == ["a", "a", "a"]
    assert [len(source.sample(i, 0).failures) for i in range(3)] == [0, 2, 1]


def test_no_usable_sample_at_all(world):
    source = world.add("a", 5).add("b", 5).open()
    with pytest.raises(
        InputError,
        match=r"none of the 2 folders .*The first 2 of 2: .*/a: too short.*allow_padding",
    ):
        source.sample(1, 0)


@pytest.mark.parametrize("missing", ["all", "video", "caption", "samples"])
def test_a_path_without_data(world, missing):
    if missing != "all":
        for part in {"video", "caption"} - {missing}:
            (world.path / part).mkdir(parents=True)
    with pytest.raises(InputError, match=r"data\.path='.*' must be a folder with video/"):
        world.open()


def test_no_path():
    with pytest.raises(InputError, match=r"data\.path='' must be"):
        VideoFolder(config_lib.Config())


@pytest.mark.parametrize("name", [b"caf\xe9", b"a\xe2\x80\xa8b", b"a\nb", b"[x]*?"])
def test_any_name_of_a_folder(tmp_path, name):
    name = os.fsdecode(name)
    world = World(tmp_path).add(name, 30)
    for stray in ("._000000.mp4", "Thumbs.db"):
        (tmp_path / "video" / name / stray).write_bytes(b"no video")
    for stray in (".DS_Store", "__MACOSX"):
        (tmp_path / "video" / stray).mkdir()
    source = world.open()
    sample = source.sample(0, 0)
    assert len(source) == 1 and sample.name == name and not sample.failures


def test_suffixes_in_any_case(tmp_path):
    world = World(tmp_path).add("a", 30)
    os.rename(tmp_path / "video/a/000000.mp4", tmp_path / "video/a/000000.M4V")
    os.rename(tmp_path / "caption/a/000000.json", tmp_path / "caption/a/000000.JSON")
    assert not world.open().sample(0, 0).failures


def test_a_variable_rate_is_sampled_by_time(tmp_path):
    """Twelve pictures a second at first, then 48: each frame of a sample has its moment's."""
    world = World(tmp_path).add("a", 2)
    times = [*(Fraction(k, 12) for k in range(12)), *(1 + Fraction(k, 48) for k in range(48))]
    with av.open(str(tmp_path / "video/a/000000.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": "2", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 48)
        for k, time in enumerate(times):
            picture = np.full((*SIZE, 3), 20 + 3 * k, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(format="yuv420p")
            frame.pts, frame.time_base = round(time * 48), Fraction(1, 48)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    want = [max(i for i, t in enumerate(times) if t <= Fraction(k, 24)) for k in range(48)]
    source = world.open()
    for key in range(8):
        got = np.round((source.sample(0, key).frames[:, 8:-8, 8:-8].mean((1, 2, 3)) - 20) / 3)
        assert any(np.abs(got - want[s : s + len(got)]).max() <= 1 for s in range(49 - len(got)))
