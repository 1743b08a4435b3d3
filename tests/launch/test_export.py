"""A text encoder to begin with, a run that trains it, and a checkpoint that stands alone."""

import json

import numpy as np
import pytest

from longlive_jax.checkpoints import store
from longlive_jax.files.arrays import load_npz
from tests.launch import commands
from tests.training import tiny_run

CONFIG = "--config=configs/tiny.py"


def write_captions(folder):
    for i, text in enumerate(("a boat", "a cat")):
        file = folder / f"clip-{i}" / "000000.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"caption": text}))
    return folder


@pytest.mark.slow
def test_a_run_with_its_text_encoder_becomes_a_checkpoint(tmp_path):
    captions, parts = write_captions(tmp_path / "captions"), tmp_path / "parts"
    made = commands.run("make_text_encoder", CONFIG, f"--captions={captions}", f"--output={parts}")
    assert "random parameters" in made.stdout and "model.text_len=32" in made.stdout
    data = tiny_run.write_cached(tmp_path / "data")
    flags = tiny_run.flags(
        data, tmp_path / "run", train__text_encoder=True, train__steps=2, train__ema_start=1
    )
    commands.run("train", *flags, f"--checkpoint={parts}")

    sizes = [word for word in flags if word.startswith(("--config.model", "--config.sample"))]
    export = [CONFIG, *sizes, f"--checkpoint={tmp_path / 'run'}"]
    commands.run("export", *export, f"--output={tmp_path / 'average'}")
    commands.run("export", *export, f"--output={tmp_path / 'latest'}", "--weights=latest")
    assert sorted(store.parts(tmp_path / "average")) == ["dit", "tokenizer", "umt5"]
    # It samples without the run's folder, and the two kinds of weights are not the same.
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    (tmp_path / "prompts.txt").write_text("a boat\n")
    noise = tmp_path / "noise.npz"
    np.savez(noise, noise=np.random.default_rng(0).standard_normal((1, 2, 4, 2, 4), np.float32))
    latents = {}
    for name in ("average", "latest"):
        out = tmp_path / f"{name}.npz"
        window = ["--config.sample.window_frames=8", "--config.sample.sink_frames=2"]
        commands.run(
            "sample", CONFIG, *sizes, *window, f"--checkpoint={tmp_path / name}",
            f"--prompts={tmp_path / 'prompts.txt'}", f"--noise={noise}", f"--save_latents={out}",
        )  # fmt: skip
        latents[name] = load_npz(out, required=("latents",))["latents"]
    assert np.isfinite(latents["average"]).all()
    assert np.abs(latents["average"] - latents["latest"]).max() > 0


def test_bad_input(tmp_path):
    captions = write_captions(tmp_path / "captions")
    done = commands.run("export", CONFIG, f"--checkpoint={tmp_path}", check=False)
    assert done.code == 2 and "is not the folder of a training run" in done.stderr
    (captions / "clip-0" / "000000.json").write_text("[]")
    for where, message in ((captions, "has no caption"), (tmp_path / "none", "no .json files")):
        done = commands.run(
            "make_text_encoder", CONFIG, f"--captions={where}", f"--output={tmp_path / 'c'}",
            check=False,
        )  # fmt: skip
        assert done.code == 2 and message in done.stderr
    assert not (tmp_path / "c").exists()
