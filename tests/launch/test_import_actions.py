"""launch.import_actions: recordings beside videos and in folders, other rates, what is refused."""

import json

import numpy as np
import pytest

from longlive_jax.data import sidecars
from longlive_jax.data.video import VideoWriter
from tests.launch.commands import run


def video(path, frames, fps=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, 32, 32, fps) as writer:
        writer.write(np.zeros((frames, 32, 32, 3), np.uint8))


def entries(count):
    return {"actions": {str(i): {"ws": 1, "yaw_delta": 0.1} for i in range(count)}}


@pytest.fixture
def data(tmp_path):
    """GF-Minecraft's layout: two good clips, and one whose video is shorter."""
    root = tmp_path / "data_2003"
    (root / "metadata").mkdir(parents=True)
    for name, count, frames in (("a", 12, 12), ("b", 8, 8), ("c", 9, 8)):
        (root / "metadata" / f"{name}.json").write_text(json.dumps(entries(count)))
        video(root / "video" / f"{name}.mp4", frames)
    return root


def convert(*args, check=True):
    return run("import_actions", *args, check=check)


def test_sidecars_are_beside_the_videos(data):
    done = convert("--format=gamefactory", f"--input={data}", "--skip_bad")
    assert done.stdout == f"2 of 3 recordings, 20 pictures, the mouse cut in 0 of them: {data}\n"
    assert "left out: " in done.stderr and "9 rows for a video of 8 pictures" in done.stderr
    found = sorted(path.name for path in (data / "video").glob("*.npz"))
    assert found == ["a.actions.npz", "b.actions.npz"]
    actions = sidecars.read(sidecars.beside(data / "video" / "a.mp4"), 12, 16)
    assert actions.keyboard[:, 0].tolist() == [0] + [1] * 11
    np.testing.assert_allclose(actions.mouse[1:, 1], 1.5)


def test_another_rate_goes_to_another_folder(data, tmp_path):
    (data / "metadata" / "c.json").unlink()
    convert("--format=gamefactory", f"--input={data}")
    out = tmp_path / "out"
    done = convert("--format=canonical", f"--input={data}", f"--output={out}", "--fps=24")
    assert done.stdout.startswith("2 of 2 recordings, 30 pictures")
    actions = sidecars.read(out / "video" / "a.actions.npz", 18, 24)
    np.testing.assert_allclose(actions.mouse[:, 1].sum(), 11 * 1.5, rtol=1e-5)


CASES = {
    "no format": ("--input={data}", "--format is missing"),
    "no input": ("--format=vpt", "--input is missing"),
    "unknown format": ("--format=oasis --input={data}", "oasis"),
    "nothing there": ("--format=vpt --input={data}/none", "no such file or folder"),
    "none of this format": ("--format=vpt --input={data}", "no recording of this format"),
    "other number": ("--format=gamefactory --input={data}", "c.json: 9 rows for a video of 8"),
    "none can be taken": (
        "--format=gamefactory --input={data}/metadata/c.json --skip_bad", "none of 1 recordings",
    ),
    "other rate": ("--format=canonical --input={data}/rate --output={data}/o", "fps=24, the video has 16 pictures"),
    "fps": ("--format=canonical --input={data}/rate --fps=24", "--fps needs --output"),
    "fps of zero": ("--format=canonical --input={data}/rate --output={data}/o --fps=0", "fps"),
    "over itself": ("--format=canonical --input={data}/good", "is read as"),
    "keys": ("--format=fastvideo --input={data}/k.npy --source_fps=24 --keys=w,a", "unknown key 'w'"),
    "pickle": ("--format=fastvideo --input={data}/p.npy --source_fps=24", "pickled objects"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_is_refused(case, data):
    video(data / "rate" / "w.mp4", 3)
    video(data / "good" / "w.mp4", 3, 24)
    for name in ("rate", "good"):
        sidecars.write(data / name / "w.actions.npz", sidecars.parse("w*3"))
    np.save(data / "k.npy", np.zeros((3, 2)))
    np.save(data / "p.npy", np.asarray({"keyboard": np.zeros((3, 2))}, object), allow_pickle=True)
    words, message = CASES[case]
    done = convert(*words.replace("{data}", str(data)).split(), check=False)
    assert done.code == 2, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert message in line
