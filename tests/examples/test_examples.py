"""The scripts for people who write Python."""

import pytest

from examples import direct_live, generate
from longlive_jax.data.video import probe
from tests.launch.commands import ROOT


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_generate(tmp_path):
    generate.main(tmp_path / "out.mp4", steps=1)
    assert probe(tmp_path / "out.mp4").frames == 3 * 32 - 3


def test_direct_live(tmp_path, capsys):
    direct_live.main(tmp_path, steps=1)
    assert probe(tmp_path / "live.mp4").frames == 3 * 32 - 3
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[2].endswith(
        "The scene transitions. A blue star falls over a black background."
    )
