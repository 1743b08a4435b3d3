import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longlive_jax.data.video import VideoWriter
from longlive_jax.data.worlds import shapes
from longlive_jax.errors import InputError
from longlive_jax.grading import scenes


def test_cuts_of_a_film_are_detected(tmp_path):
    clip = next(shapes.clips(3, 1))[:2]
    lengths = [45, 40]
    with VideoWriter(tmp_path / "a.mp4", 128, 192) as writer:
        for shot, n in zip(clip, lengths):
            writer.write(shapes.render(shot, 0, n))
    assert scenes.detected(tmp_path / "a.mp4") == [45]


def test_a_film_without_cuts_has_none(tmp_path):
    shot = next(shapes.clips(3, 1))[0]
    with VideoWriter(tmp_path / "a.mp4", 128, 192) as writer:
        writer.write(shapes.render(shot, 0, 60))
    assert scenes.detected(tmp_path / "a.mp4") == []


def test_what_was_asked_is_told_from_what_was_not():
    record = scenes.compare([61, 125, 189], [20, 63, 130, 189], within=32)
    assert record["cuts"] == [
        {"asked": 61, "latency": 2},
        {"asked": 125, "latency": 5},
        {"asked": 189, "latency": 0},
    ]
    assert record["others"] == [20]
    late = scenes.compare([61], [93], within=32)
    assert late == {"cuts": [{"asked": 61, "latency": None}], "others": [93]}
    assert scenes.summarise([record, late]) == {
        "videos": 2, "asked": 4, "confirmed": 0.75, "mean_latency": 7 / 3, "others": 2
    }  # fmt: skip


@given(
    st.lists(st.integers(0, 500), unique=True), st.lists(st.integers(0, 500), unique=True),
    st.integers(1, 64),
)  # fmt: skip
def test_every_found_cut_is_counted_once(asked, found, within):
    record = scenes.compare(sorted(asked), sorted(found), within)
    there = [c["asked"] + c["latency"] for c in record["cuts"] if c["latency"] is not None]
    assert sorted(there + record["others"]) == sorted(found)
    assert all(c["latency"] is None or 0 <= c["latency"] < within for c in record["cuts"])
    assert [c["asked"] for c in record["cuts"]] == sorted(asked)


def test_nothing_asked_is_no_share():
    assert scenes.summarise([])["confirmed"] is None


def test_without_the_library_it_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    with pytest.raises(InputError, match="pip install scenedetect-headless"):
        scenes.detected(tmp_path / "a.mp4")
