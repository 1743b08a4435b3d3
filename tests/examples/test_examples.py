"""The scripts for people who write Python."""

import json

import pytest

from examples import direct_live, generate, train_toy
from longlive_jax.data.video_reader import probe
from tests.launch.commands import ROOT

# The networks are those of the script; the pictures are small.
QUICK = {"sample.steps": 1, "video.height": 32, "video.width": 64, "dtype": "float32"}


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_generate(tmp_path):
    generate.main(tmp_path / "out.mp4", **QUICK)
    assert probe(tmp_path / "out.mp4").frames == 3 * 32 - 3


def test_direct_live(tmp_path, capsys):
    direct_live.main(tmp_path, **QUICK)
    assert probe(tmp_path / "live.mp4").frames == 3 * 32 - 3
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[2].endswith(
        "The scene transitions. A blue star falls over a black background."
    )


def test_train_toy(tmp_path, capsys):
    assert train_toy.main(tmp_path, steps=4).step == 4
    assert train_toy.main(tmp_path, steps=12).step == 12
    out = capsys.readouterr().out
    assert "on from step 4" in out and "student distance" in out
    losses = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[-3]["student_loss"] < losses[0]["student_loss"]
