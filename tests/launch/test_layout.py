"""launch.sample --layout: a benchmark's folder, begun, stopped, and gone on with."""

import json

import numpy as np
import pytest

from longlive_jax.data.video_reader import read_video
from tests.launch.commands import PROMPTS, TINY, run


@pytest.fixture(scope="module")
def sample(checkpoint, tmp_path_factory):
    root = tmp_path_factory.mktemp("layout")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))

    def call(*more, check=True, layout="vbench"):
        return run(
            "sample", *TINY, f"--checkpoint={checkpoint}", f"--prompts={root}/prompts.txt",
            f"--layout={layout}", "--samples=2", "--config.sample.chunks=1",
            f"--output={root}/videos", *more, check=check,
        )  # fmt: skip

    return root / "videos", call


FILES = [f"{prompt}-{i}.mp4" for prompt in PROMPTS for i in (0, 1)]


def lines(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def made(sample):
    return sample[1]()


@pytest.mark.slow
def test_every_prompt_has_its_samples_and_a_line_in_the_manifest(sample, made):
    folder, _ = sample
    assert "0 of 4 videos are there" in made.stdout
    assert sorted(p.name for p in folder.glob("*.mp4")) == sorted(FILES)
    assert [line["file"] for line in lines(folder)] == FILES
    for number, line in enumerate(lines(folder)):
        assert (line["prompt"], line["sample"]) == (PROMPTS[number // 2], number % 2)
        assert (line["seed"], line["number"], line["config"]) == (0, number, "settings.json")
        assert line["bytes"] == (folder / line["file"]).stat().st_size
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["config"]["sample"]["chunks"] == 1 and settings["layout"] == "vbench"
    a, b = (read_video(folder / name, 32, 64) for name in FILES[:2])
    assert not np.array_equal(a, b)


@pytest.mark.slow
def test_it_goes_on_where_it_stopped_with_the_same_videos(sample, made):
    """Killed inside the third file: its line is not whole, the file is a part; the last is absent."""
    folder, call = sample
    before = [read_video(folder / name, 32, 64) for name in FILES]
    text = (folder / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "manifest.jsonl").write_bytes(b"".join(text[:2]) + text[2][:20])
    (folder / FILES[2]).write_bytes(b"part")
    (folder / FILES[3]).unlink()
    kept = [(folder / name).stat().st_mtime_ns for name in FILES[:2]]
    assert "2 of 4 videos are there" in call().stdout
    assert kept == [(folder / name).stat().st_mtime_ns for name in FILES[:2]]
    assert [line["file"] for line in lines(folder)] == FILES
    for name, one in zip(FILES, before):
        np.testing.assert_array_equal(read_video(folder / name, 32, 64), one)
    assert "4 of 4 videos are there" in call().stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.sample.steps=3"], "was begun with config.sample.steps="),
        (["--seed=1"], "was begun with seed=0, now it is 1"),
        (["--image=a.png"], "--layout=vbench and --image exclude each other"),
        (["--output="], "--layout=vbench needs --output"),
    ],
)
def test_other_settings_are_refused(sample, made, flags, message):
    done = sample[1](*flags, check=False)
    assert done.code == 2 and message in done.stderr and "Traceback" not in done.stderr
