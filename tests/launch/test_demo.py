"""The demo, from the trained weights in assets to mp4s and contact sheets."""

import os

import pytest
from PIL import Image

from longlive_jax.data.video_reader import probe
from tests.launch.commands import run


@pytest.mark.slow
def test_demo(tmp_path):
    done = run("demo", f"--output={tmp_path}/demo", devices=1)
    assert "Look at:" in done.stdout
    files = os.listdir(tmp_path / "demo")
    assert {"shots.mp4", "shots.png", "continued.mp4", "continued.png"} <= set(files)
    assert probe(tmp_path / "demo/shots.mp4").frames == 5 * 32 - 3
    assert probe(tmp_path / "demo/continued.mp4").frames > 5 * 32
    for name in ("shots.png", "continued.png"):
        with Image.open(tmp_path / "demo" / name) as sheet:
            assert sheet.width > 192
