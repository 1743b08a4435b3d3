"""launch.grade --world=doom on small mp4s, without the game but where it is asked for."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from longlive_jax.data import sidecars
from longlive_jax.data.sidecars import strings
from longlive_jax.data.video import VideoWriter
from tests.grading.walk.test_motion import views
from tests.launch.commands import run


def write(path, frames, actions):
    with VideoWriter(path, *frames.shape[1:3]) as writer:
        writer.write(frames)
    if actions is not None:
        sidecars.write(sidecars.path_for(path), actions)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders: `good`, a turn and the other one; `bare`, `long`, `fast`, `short`, `odd`: bad."""
    root = tmp_path_factory.mktemp("walks")
    luma = views(3.0 * np.arange(25)).astype(np.uint8)
    frames = np.repeat(luma[..., None], 3, axis=-1)
    right, left = (strings.parse(f"yaw{sign}3*25") for sign in "+-")
    write(root / "good" / "right.mp4", frames, right)
    write(root / "good" / "left.mp4", frames, left)
    write(root / "bare" / "one.mp4", frames, None)
    write(root / "long" / "one.mp4", frames, strings.parse("w*26"))
    write(root / "fast" / "one.mp4", frames, dataclasses.replace(right, fps=30))
    write(root / "short" / "one.mp4", frames[:9], right.cut(0, 9))
    start = 'doom {"place": "maze", "x": 464, "y": 176}'
    write(root / "odd" / "one.mp4", frames[:, :150], dataclasses.replace(right, source=start))
    return root


def test_a_folder_is_graded(made, tmp_path):
    done = run("grade", "--world=doom", f"--videos={made}/good", f"--output={tmp_path}")
    graded = json.loads((tmp_path / "grade.json").read_text())
    left, right = graded["videos"]
    assert (left["name"], right["name"]) == ("left", "right")
    assert left["seconds"][0]["right"]["turn"] is False
    assert right["seconds"][0]["right"]["turn"] is True
    assert abs(right["seconds"][0]["yaw"] - 72) < 4
    total = graded["summary"]
    assert (total["videos"], total["seconds"], total["turn"], total["psnr"]) == (2, 2, 0.5, None)
    table = done.stdout.splitlines()
    assert table[0].split()[:3] == ["seconds", "grade", "turn"] and "50.0%" in table[1]
    with Image.open(tmp_path / "grade.png") as plot:
        assert plot.size == (960, 480)


def test_two_folders_are_compared(made, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(made / "good", other)
    shutil.copy(other / "right.mp4", other / "left.mp4")
    sidecars.write(other / "left.actions.npz", strings.parse("yaw+3*25"))
    done = run(
        "grade", "--world=doom", f"--videos={other}", f"--against={made}/good", "--window=2.5",
        f"--output={tmp_path}",
    )  # fmt: skip
    graded = json.loads((tmp_path / "grade.json").read_text())
    assert (graded["summary"]["turn"], graded["against"]["summary"]["turn"]) == (1.0, 0.5)
    assert graded["summary"]["by_window"]["seconds"] == 2.5
    lines = done.stdout.splitlines()
    assert f"{other} against {made}/good:" in lines
    assert any(line.split() == ["returns", "the", "same", "-", "-", "-"] for line in lines)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--videos={made}/good", "--against={made}/bare"], "bare has no video of that name"),
        (["--videos={made}/good", "--against={made}/none"], "is no folder"),
        (["--videos={made}/good", "--window=0"], "--window=0 must be above 0"),
        (["--clips=1", "--against={made}/good"], "leave out --against"),
        ([], "--videos is missing"),
        (["--videos={made}/none"], "is no folder"),
        (["--videos={made}/bare"], "has no sidecar (one.actions.npz)"),
        (["--videos={made}/long"], "26 rows for a video of 25 pictures: longer"),
        (["--videos={made}/fast"], "fps=30, the video has 24"),
        (["--videos={made}/short"], "has 9 frames; give 14 or more"),
        (["--videos={made}/good", "--simulator"], "is no start in Doom"),
        (["--videos={made}/odd", "--simulator"], "one.mp4: height=150 must be a multiple of 32"),
        (["--videos={made}/good", "--prompts=x.txt"], "--prompts is for --world=shapes"),
        (["--videos={made}/good", "--blur=2"], "--blur is for --clips"),
        (["--videos={made}/good", "--focal=0"], "--focal=0 must be 0.1 to 10"),
        (["--clips=1", "--videos={made}/good"], "leave out --videos"),
        (["--clips=1", "--checkpoint={made}"], "--config is missing"),
        (["--world=shapes", "--clips=1", "--simulator"], "--simulator is for --world=doom"),
        (["--world=mars"], "--world=mars"),
    ],
)
def test_bad_input_ends_with_its_name(made, flags, message):
    done = run("grade", "--world=doom", *(f.format(made=made) for f in flags), check=False)
    assert done.code == 2 and message in done.stderr and "Traceback" not in done.stderr


def without_the_game():
    sys.modules["vizdoom"] = None  # type: ignore[assignment]  # an import of it fails


def test_the_game_is_needed_only_where_it_is_asked_for(made, tmp_path):
    run(
        "grade", "--world=doom", f"--videos={made}/good", f"--output={tmp_path}",
        patch=without_the_game,
    )  # fmt: skip
    done = run("grade", "--world=doom", "--clips=1", patch=without_the_game, check=False)
    assert done.code == 2 and "pip install vizdoom" in done.stderr
