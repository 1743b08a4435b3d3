"""launch.train_vae end to end, and its bad input."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from tests.launch import commands
from tests.training.objectives.test_autoencoder import write

SETTINGS = {
    "vae.dim": 4, "vae.dec_dim": 4, "video.height": 32, "video.width": 32, "dtype": "float32",
    "train_vae.steps": 6, "train_vae.warmup_steps": 1, "train_vae.batch_size": 2,
    "train_vae.frames": 5, "train_vae.held_out": 1, "train_vae.log_every": 2,
    "train_vae.save_every": 4,
}  # fmt: skip
CONFIG = [
    "--config=configs/train_vae_tiny_world.py",
    *(f"--config.{name}={value}" for name, value in SETTINGS.items()),
]


@pytest.mark.slow
def test_a_checkpoint_that_encodes_and_decodes(tmp_path):
    write(tmp_path / "data", (6, 7), (5,), (8, 9))
    train = [*CONFIG, f"--config.data.path={tmp_path}/data", f"--workdir={tmp_path}/run"]
    first = commands.run("train_vae", *train)
    assert "held out: 2 clips of 5 frames, PSNR" in first.stdout
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in lines] == [2, 4, 6]
    with Image.open(tmp_path / "run/reconstructions.png") as sheet:
        assert sheet.width == 6 * 34 - 2
    again = commands.run("train_vae", *train)  # done: measures once more
    assert again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]

    given = [*CONFIG, f"--checkpoint={tmp_path}/run/checkpoint"]
    data, still = f"--config.data.path={tmp_path}/data", "--config.train_vae.learning_rate=1e-12"
    from_it = commands.run("train_vae", *given, data, still, f"--workdir={tmp_path}/next")
    assert psnr(from_it) == psnr(first)
    video, latents, out = tmp_path / "data/video/clip-2/000001.mp4", "latents.npz", "video.npz"
    commands.run("encode", *given, f"--video={video}", f"--output={tmp_path / latents}")
    commands.run("decode", *given, f"--latents={tmp_path / latents}", f"--output={tmp_path / out}")
    with np.load(tmp_path / latents) as file:
        assert file["latents"].shape == (1, 3, 16, 2, 2)
        assert 0.2 < file["latents"].std() < 5  # normalised
    with np.load(tmp_path / out) as file:
        assert file["video"].shape == (1, 3, 9, 32, 32)


def psnr(done):
    return re.search(r"PSNR .*?;", done.stdout)[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--workdir is missing"),
        (["--workdir=DIR", "--config.data.path=DIR"], "make_tiny_world"),
        (["--workdir=DIR", "--checkpoint=DIR"], "is no checkpoint"),
        (["--workdir=DIR", "--config.train_vae.frames=6"], "train_vae.frames=6 must be"),
        (["--workdir=DIR", "--config.train_vae.nothing=6"], "unknown config key"),
    ],
)
def test_bad_input(tmp_path, flags, message):
    done = commands.run(
        "train_vae", *CONFIG, *(f.replace("DIR", str(tmp_path)) for f in flags), check=False
    )
    assert done.code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
