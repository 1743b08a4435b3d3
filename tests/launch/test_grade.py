"""launch.grade on small mp4s of the world."""

import json

import pytest
from PIL import Image

from longlive_jax.data.video import VideoWriter
from tests.grading.clips import BLACK, STRIPES, render, shot, thing
from tests.launch.commands import run

SHOTS = [shot(BLACK, thing("star", "yellow")), shot(STRIPES, thing("ring", "blue", "left"))]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of two videos: one as its prompts say, one that shows the first shot throughout."""
    root = tmp_path_factory.mktemp("grade")
    for name, shots in (("right", SHOTS), ("stays", [SHOTS[0]] * 2)):
        with VideoWriter(root / "videos" / f"{name}.mp4", 128, 192) as writer:
            writer.write(render(shots, (1, 1)))
    entries = [{"prompt": one.caption, "chunks": 1} for one in SHOTS]
    (root / "shots.json").write_text(json.dumps(entries))
    return root


def test_a_folder_is_graded(made, tmp_path):
    done = run(
        "grade", f"--videos={made}/videos", f"--prompts={made}/shots.json", f"--output={tmp_path}"
    )
    graded = json.loads((tmp_path / "grade.json").read_text())
    right, stays = graded["videos"]
    assert [chunk["all_right"] for chunk in right["chunks"]] == [True, True]
    assert [chunk["all_right"] for chunk in stays["chunks"]] == [True, False]
    assert [video["cuts"][0]["frames"] for video in (right, stays)] == [0, None]
    total = graded["summary"]
    assert (total["videos"], total["chunks"], total["all_right"]) == (2, 4, 0.75)
    assert total["cuts_without_effect"] == 1 and total["right_within_a_chunk_after_a_cut"] == 0.5
    assert total["by_minute"][0]["objects"] == total["objects"] == 0.75
    assert 0.5 < total["sharpness"] < 1  # the codec halves the resolution of colours
    table = done.stdout.splitlines()
    assert table[0].split()[:3] == ["grade", "objects", "colours"]
    assert "75.0%" in table[1] and "right: 2 of 2 right" in done.stdout
    with Image.open(tmp_path / "grade.png") as plot:
        assert plot.size == (960, 480) and len(plot.getcolors(1 << 20)) > 100


def test_the_worlds_own_clips_are_right(tmp_path):
    run("grade", "--clips=1", "--seed=3", f"--output={tmp_path}")
    total = json.loads((tmp_path / "grade.json").read_text())["summary"]
    assert total["all_right"] == 1 and total["cut_latency_frames"] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--videos is missing"),
        (["--videos={made}/videos"], "--prompts is missing"),
        (["--videos={made}", "--prompts={made}/none.txt"], "does not exist"),
        (["--videos={made}/none", "--prompts={made}/shots.json"], "is no folder"),
        (["--videos={tmp}", "--prompts={made}/shots.json"], "has no .mp4"),
        (["--videos={made}/videos", "--prompts={tmp}/boat.txt"], "is not of the world of shapes"),
        (
            ["--videos={made}/videos", "--prompts={tmp}/long.json"],
            "its script of 3 chunks needs 93",
        ),
        (["--clips=1", "--videos={made}/videos"], "leave out --videos"),
        (["--videos={made}/videos", "--prompts={made}/shots.json", "--blur=2"], "--blur is for"),
        (["--clips=1", "--checkpoint={tmp}"], "--config is missing"),
    ],
)
def test_bad_input_ends_with_its_name(made, tmp_path, flags, message):
    (tmp_path / "boat.txt").write_text("a boat\n")
    entries = [{"prompt": one.caption, "chunks": n} for one, n in zip(SHOTS, (1, 2))]
    (tmp_path / "long.json").write_text(json.dumps(entries))
    done = run("grade", *(f.format(made=made, tmp=tmp_path) for f in flags), check=False)
    assert done.code == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_cuts_of_any_footage(made, tmp_path):
    prompts = tmp_path / "shots.json"
    prompts.write_text(json.dumps([{"prompt": text, "chunks": 1} for text in ("Rain.", "Sun.")]))
    call = ("grade", "--cuts=scenedetect", f"--videos={made}/videos", f"--output={tmp_path}")
    done = run(*call, f"--prompts={prompts}")
    assert done.stdout.startswith("2 videos: cuts 50.0 % of 2, after 0.0 frames in the mean; 0 ")
    found = json.loads((tmp_path / "cuts.json").read_text())["videos"]
    assert [video["cuts"][0]["latency"] for video in found] == [0, None]
    done = run(*call, check=False)
    assert done.code == 2 and "--cuts takes --videos=DIR --prompts=FILE" in done.stderr
