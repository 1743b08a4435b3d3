"""Prompts to chunks: every form, the original's worked examples, and everything wrong with them."""

import json
import logging
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlive_jax.errors import InputError
from longlive_jax.prompts import shots

PREFIX = "The scene transitions. "


def read(path, chunks=12, prefix=PREFIX, **kwargs):
    return shots.read(path, chunks=chunks, chunk_frames=8, scene_cut_prefix=prefix, **kwargs)


def short(video):
    """Prompts of a video in one string: "0 0 p1 1", with p where the prefix stands."""
    for i, chunk in enumerate(video.chunks):
        assert chunk.cut == (i > 0 and chunk.prompt.startswith(PREFIX))
    return " ".join(c.prompt.replace(PREFIX, "p") for c in video.chunks)


def captions(root, prompts, durations=None, names=None):
    root.mkdir(parents=True)
    for name, prompt in zip(names or range(len(prompts)), prompts):
        (root / f"{name}.json").write_text(json.dumps({"caption": prompt, "fps": 24}))
    if durations is not None:
        (root / "shot_durations.txt").write_text(durations)
    return root


def shot_list(tmp_path, value):
    path = tmp_path / "list.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


# Lines of text.


def test_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa cat  \n\n   \n  a \u2028dog\r\n", encoding="utf-8")
    videos = read(path, chunks=3)
    assert [v.name for v in videos] == ["prompts-001", "prompts-002"]
    assert videos[0].chunks == (shots.Chunk("a cat", False),) * 3
    assert videos[1].chunks == (shots.Chunk("a \u2028dog", False),) * 3
    assert all(v.image is None for v in videos)


def test_prefix_in_a_text_file_is_a_cut(tmp_path):
    path = tmp_path / "prompts"
    path.write_text(f"{PREFIX}a cat")
    (video,) = read(path, chunks=3)
    assert [c.cut for c in video.chunks] == [False, True, True]
    assert {c.prompt for c in video.chunks} == {f"{PREFIX}a cat"}
    (video,) = read(path, chunks=3, prefix="")
    assert not any(c.cut for c in video.chunks)


# Folders of captions.


@pytest.mark.parametrize(
    ("number", "per_shot", "durations", "chunks", "want"),
    [  # the first six are the original's own
        (3, 4, None, 12, "0 0 0 0 p1 1 1 1 p2 2 2 2"),
        (2, 4, None, 12, "0 0 0 0 p1 1 1 1 1 1 1 1"),
        (3, 0, "2, 6, 4", 12, "0 0 p1 1 1 1 1 1 p2 2 2 2"),
        (5, 4, None, 12, "0 0 0 0 p1 1 1 1 p2 2 2 2"),
        (5, 0, None, 4, "0 p1 p2 p3"),
        (2, 2, None, 4, "0 0 p1 1"),
        (3, 0, None, 8, "0 0 0 p1 1 1 p2 2"),
        (3, 4, "1\n1\n1", 5, "0 p1 p2 2 2"),
        (3, 0, "9,9", 12, "0 0 0 0 0 0 0 0 0 p1 1 1"),
        (2, 0, "1 2 30", 4, "0 p1 1 1"),
        (2, 0, "99", 3, "0 0 0"),
        (1, 0, None, 1, "0"),
    ],
)
def test_captions(tmp_path, number, per_shot, durations, chunks, want):
    captions(tmp_path / "a", [str(i) for i in range(number)], durations)
    (video,) = read(tmp_path, chunks=chunks, chunks_per_shot=per_shot)
    assert (video.name, short(video), video.image) == ("a", want, None)


def test_order_of_captions_and_videos(tmp_path):
    names = ["10", "9", "b", "a", "007"]
    captions(tmp_path / "caption" / "z", names, names=names)
    captions(tmp_path / "caption" / "y", ["only"])
    (tmp_path / "caption" / "z" / "global.json").write_text("not read")
    (tmp_path / "caption" / ".git").mkdir()
    (tmp_path / "caption" / "README.md").write_text("not read")
    (tmp_path / "video").mkdir()
    y, z = read(tmp_path, chunks=5)
    assert (y.name, z.name) == ("y", "z")
    assert short(z) == "a pb p007 p9 p10"
    assert [y, z] == read(tmp_path / "caption", chunks=5)


def test_prefix_is_not_doubled_in_captions(tmp_path):
    captions(tmp_path / "a", [f"{PREFIX}0", f"{PREFIX}1", "2"])
    (video,) = read(tmp_path, chunks=6)
    # At the start of a video it stays as written and is no cut.
    assert short(video) == "p0 0 p1 1 p2 2"


def test_left_out_shots_are_told(tmp_path, caplog):
    captions(tmp_path / "a", ["0", "1", "2"])
    with caplog.at_level(logging.WARNING, logger="absl"):
        read(tmp_path, chunks=3)
        assert not caplog.records
        read(tmp_path, chunks=2)
    assert "1 of 3 shots" in caplog.text


# Images with prompts.


@pytest.mark.parametrize("flat", [False, True])
def test_images(tmp_path, flat):
    images, prompts = (tmp_path, tmp_path) if flat else (tmp_path / "images", tmp_path / "prompts")
    images.mkdir(exist_ok=True)
    prompts.mkdir(exist_ok=True)
    for name in ("b.JPG", "a.png", "notes.pdf"):
        (images / name).write_bytes(b"")
    (prompts / "a.txt").write_text("0\n\n1\n")
    (prompts / "b.txt").write_text("only\n")
    (tmp_path / "results").mkdir()
    a, b = read(tmp_path, chunks=3, chunks_per_shot=1)
    assert (a.name, a.image, short(a)) == ("a", images / "a.png", "0 0 p1")
    assert (b.name, b.image, short(b)) == ("b", images / "b.JPG", "only only only")


def test_bad_images(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match=r"no image in .*images; .*\.webp"):
        read(tmp_path)
    (tmp_path / "images" / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"a\.png has no prompt; write it to .*prompts/a\.txt"):
        read(tmp_path)
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "a.txt").write_text("\n \n")
    with pytest.raises(InputError, match=r"a\.txt is empty"):
        read(tmp_path)
    (tmp_path / "prompts" / "a.txt").write_text("0")
    (tmp_path / "images" / "a.webp").write_bytes(b"")
    with pytest.raises(InputError, match=r"a\.png and .*a\.webp"):
        read(tmp_path)


# Our shot list.


def test_shot_list(tmp_path):
    (tmp_path / "first.png").write_bytes(b"")
    entries = [
        {"prompt": " 0 ", "chunks": 2, "image": "first.png"},
        {"prompt": "1", "chunks": 2, "cut": False},
        {"prompt": "2", "chunks": 2},
        {"prompt": f"{PREFIX}3", "chunks": 2, "cut": True},
        {"prompt": "4"},
    ]
    (video,) = read(shot_list(tmp_path, entries), chunks=3)
    assert short(video) == "0 0 1 1 p2 2 p3 3 p4 4 4"
    assert (video.name, video.image) == ("list", tmp_path / "first.png")


def test_the_flag_decides_in_a_shot_list(tmp_path):
    entries = [
        {"prompt": "0", "chunks": 1, "cut": True},  # a video cannot begin with a cut
        {"prompt": f"{PREFIX}1", "chunks": 1, "cut": False},
        {"prompt": "2", "chunks": 2},
    ]
    (video,) = read(shot_list(tmp_path, entries))
    assert short(video) == "0 1 p2 2"
    (video,) = read(shot_list(tmp_path, entries), prefix="")
    assert [c.cut for c in video.chunks] == [False, False, True, False]


@pytest.mark.parametrize(
    ("seconds", "first", "later"),
    [
        (0.01, 1, 1),
        (1, 1, 1),
        (29 / 24, 1, 1),  # 29 frames: the first chunk
        (29.5 / 24, 2, 1),
        (4 / 3, 2, 1),  # 32 frames: a chunk
        (1.34, 2, 2),
        (4.0, 4, 3),
        (61 / 24, 2, 2),
        (60, 46, 45),
    ],
)
def test_seconds(tmp_path, seconds, first, later):
    entries = [{"prompt": "a", "seconds": seconds}, {"prompt": "b", "seconds": seconds}]
    (video,) = read(shot_list(tmp_path, entries))
    cut = [c.cut for c in video.chunks].index(True)
    assert (cut, len(video.chunks) - cut) == (first, later)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "line 1, column 1: not JSON"),
        ('[\n{"prompt": "a",}\n]', r"line 2, column \d+: not JSON"),
        ("[" * 100_000, "not JSON that can be read"),
        ("[" + "9" * 5000 + "]", "not JSON that can be read"),
        ([], "a list without items"),
        ({"prompt": "a"}, "must be a list.* found an object"),
        ([{"prompt": "a"}, "b"], "entry 2 of 2 must be an object.* found a text"),
        ([{}], 'entry 1 of 1 has no "prompt"'),
        ([{"prompt": " \n"}], '"prompt" is empty'),
        ([{"prompt": 3}], '"prompt": 3 must be text'),
        ([{"prompt": "a", "chunk": 3}], "unknown key 'chunk'; known keys: prompt, chunks, seconds"),
        ([{"prompt": "a", "chunks": 3, "seconds": 4}], "give one of them"),
        ([{"prompt": "a", "chunks": 0}], '"chunks": 0 must be 1 to'),
        ([{"prompt": "a", "chunks": -2}], '"chunks": -2 must be 1 to'),
        ([{"prompt": "a", "chunks": 10**12}], "must be 1 to 1000000"),
        ([{"prompt": "a", "chunks": 600_000}] * 2, "1200000 chunks, the limit is 1000000"),
        ([{"prompt": "a", "chunks": 1.5}], '"chunks": 1.5 must be a whole number'),
        ([{"prompt": "a", "chunks": True}], '"chunks": True must be a whole number'),
        ([{"prompt": "a", "chunks": None}], '"chunks": None must be a whole number'),
        ([{"prompt": "a", "seconds": 0}], '"seconds": 0 must be above 0'),
        ([{"prompt": "a", "seconds": -1.5}], '"seconds": -1.5 must be above 0'),
        ([{"prompt": "a", "seconds": math.nan}], '"seconds": nan must be above 0'),
        ([{"prompt": "a", "seconds": math.inf}], '"seconds": inf must be above 0'),
        ([{"prompt": "a", "seconds": "4"}], "must be a number"),
        ([{"prompt": "a", "cut": 1}], '"cut": 1 must be true or false'),
        ([{"prompt": "a", "image": "none.png"}], "'none.png' must be an image file"),
        ([{"prompt": "a", "image": "list.json"}], "'list.json' must be an image file"),
        ([{"prompt": "a"}, {"prompt": "b", "image": "x.png"}], "entry 2 of 2: .*entry 1 only"),
    ],
)
def test_bad_shot_lists(tmp_path, value, message):
    with pytest.raises(InputError, match=message) as error:
        read(shot_list(tmp_path, value))
    assert "list.json" in str(error.value)


# Other bad input.


def test_bad_paths(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read(tmp_path / "none.txt")
    with pytest.raises(InputError):
        read(str(tmp_path / ("x" * 5000)))
    with pytest.raises(InputError, match="no captions found"):
        read(tmp_path)
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n\n")
    with pytest.raises(InputError, match=r"empty\.txt is empty"):
        read(empty)
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"a cat \xff")
    with pytest.raises(InputError, match=r"not UTF-8 text \(byte 6\)"):
        read(binary)
    other = tmp_path / "prompts.csv"
    other.write_text("a cat")
    with pytest.raises(InputError, match=r"ends with '\.csv'; it must be a \.txt file"):
        read(other)


@pytest.mark.parametrize(
    ("name", "value"), [("chunks", 0), ("chunks", -1), ("chunk_frames", 0), ("chunks_per_shot", -1)]
)
def test_bad_arguments(tmp_path, name, value):
    path = tmp_path / "a.txt"
    path.write_text("a cat")
    arguments = {"chunks": 3, "chunk_frames": 8, "chunks_per_shot": 0} | {name: value}
    with pytest.raises(InputError, match=f"{name}={value} must be"):
        shots.read(path, scene_cut_prefix=PREFIX, **arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1, column 2: not JSON"),
        ('{"text": "a"}', "under .caption.*found an object"),
        ("[]", "found a list without items"),
        ('{"caption": 3}', "found a number"),
        ('{"caption": " "}', r"caption in .*1\.json is empty"),
    ],
)
def test_bad_captions(tmp_path, content, message):
    root = captions(tmp_path / "a", ["0"])
    (root / "1.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("content", ["", "two", "2 0", "2,-1", "1.5", "1" * 5000, "9999999"])
def test_bad_durations(tmp_path, content):
    captions(tmp_path / "a", ["0", "1"], content)
    with pytest.raises(InputError, match=r"shot_durations\.txt holds .* whole numbers of 1 to"):
        read(tmp_path)


def test_folder_without_captions(tmp_path):
    captions(tmp_path / "a", ["0"])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "global.json").write_text("{}")
    with pytest.raises(InputError, match=r"no captions found in .*b; .*remove the folder"):
        read(tmp_path)


# Properties.


@settings(max_examples=60, deadline=None)
@given(
    number=st.integers(1, 8),
    chunks=st.integers(1, 20),
    per_shot=st.integers(0, 6),
    durations=st.none() | st.lists(st.integers(1, 30), min_size=1, max_size=10),
)
def test_captions_fill_the_video(tmp_path_factory, number, chunks, per_shot, durations):
    root = tmp_path_factory.mktemp("captions")
    text = None if durations is None else ", ".join(map(str, durations))
    captions(root / "a", [str(i) for i in range(number)], text)
    (video,) = read(root, chunks=chunks, chunks_per_shot=per_shot)
    assert len(video.chunks) == chunks >= 1
    assert sum(c.cut for c in video.chunks) <= number - 1 and not video.chunks[0].cut
    # Shots come in their order, none twice; a cut is where the number changes.
    numbers = [int(c.prompt.removeprefix(PREFIX)) for c in video.chunks]
    assert numbers[0] == 0 and all(b - a == cut for a, b, cut in zip(
        numbers, numbers[1:], [c.cut for c in video.chunks[1:]]
    ))  # fmt: skip
    short(video)


_lengths = st.one_of(
    st.fixed_dictionaries({}),
    st.fixed_dictionaries({"chunks": st.integers(1, 9)}),
    st.fixed_dictionaries({"seconds": st.floats(0.01, 20)}),
)
_entries = st.builds(
    lambda prompt, prefix, length, cut: {"prompt": prefix + prompt, **length, **cut},
    st.text("abc ", min_size=1).filter(str.strip),
    st.sampled_from(["", PREFIX]),
    _lengths,
    st.fixed_dictionaries({}) | st.fixed_dictionaries({"cut": st.booleans()}),
)


@settings(max_examples=60, deadline=None)
@given(entries=st.lists(_entries, min_size=1, max_size=6), chunks=st.integers(1, 5))
def test_shot_lists_last_as_long_as_asked(tmp_path_factory, entries, chunks):
    path = shot_list(tmp_path_factory.mktemp("list"), entries)
    (video,) = read(path, chunks=chunks)
    least = sum(
        e.get("chunks", chunks) if "seconds" not in e else e["seconds"] * 24 / 32 for e in entries
    )
    # Each entry of seconds is rounded up by less than a chunk, the first by less than one and 3/32.
    assert least - 1e-6 <= len(video.chunks) <= least + len(entries) + 3 / 32
    cuts = sum(c.cut for c in video.chunks)
    assert cuts == sum(e.get("cut", True) for e in entries[1:]) <= len(entries) - 1
    short(video)
