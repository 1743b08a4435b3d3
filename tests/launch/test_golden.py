"""The original's own outputs, through the importer and the commands."""

import json

import numpy as np
import pytest

from tests.launch.commands import GOLDEN, golden, run, write


def _sample(name, checkpoint, folder, *args, devices=1):
    file = golden("dit_tiny")
    meta = json.loads(str(file[f"{name}_meta"]))
    text = {key: file[f"{name}_{key}"] for key in ("ctx", "neg", "cut")}
    run(
        "sample", *GOLDEN, f"--checkpoint={checkpoint}",
        f"--noise={write(folder / 'noise.npz', {'noise': file[f'{name}_noise']})}",
        f"--prompt_embeds={write(folder / 'text.npz', text)}",
        f"--save_latents={folder / 'latents.npz'}",
        f"--config.sample.guidance_scale={meta['guidance_scale']}", *args, devices=devices,
    )  # fmt: skip
    return np.load(folder / "latents.npz")["latents"], file[f"{name}_out"]


@pytest.mark.parametrize("name", ["single4", "multi4", "cfg4"])
def test_sample(name, golden_checkpoint, tmp_path):
    latents, expected = _sample(name, golden_checkpoint, tmp_path)
    assert latents.shape == expected.shape
    assert latents.dtype == np.float32
    assert np.abs(latents - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.slow
def test_sample_on_two_devices(golden_checkpoint, tmp_path):
    latents, expected = _sample(
        "multi4", golden_checkpoint, tmp_path, "--config.mesh.seq=2", devices=2
    )
    assert np.abs(latents - expected).max() <= 1e-5 * np.abs(expected).max()


def test_encode(golden_checkpoint, tmp_path):
    file = golden("vae_tiny")
    run(
        "encode", *GOLDEN, f"--checkpoint={golden_checkpoint}", f"--output={tmp_path / 'l.npz'}",
        f"--video={write(tmp_path / 'v.npz', {'video': file['video']})}",
    )  # fmt: skip
    latents = np.load(tmp_path / "l.npz")["latents"]
    np.testing.assert_allclose(latents, np.moveaxis(file["encoded"], 1, 2), rtol=0, atol=1e-4)


def test_decode(golden_checkpoint, tmp_path):
    file = golden("vae_tiny")
    latents = np.moveaxis(file["latents"], 1, 2)
    run(
        "decode", *GOLDEN, f"--checkpoint={golden_checkpoint}", f"--output={tmp_path / 'v.npz'}",
        f"--latents={write(tmp_path / 'l.npz', {'latents': latents})}",
    )  # fmt: skip
    video = np.load(tmp_path / "v.npz")["video"]
    np.testing.assert_allclose(video, file["decoded"], rtol=0, atol=1e-4)


def test_embed(golden_checkpoint, tmp_path):
    file = golden("umt5_tiny")
    ids = write(tmp_path / "ids.npz", {"ids": file["ids"], "mask": file["mask"]})
    run(
        "embed", *GOLDEN, f"--checkpoint={golden_checkpoint}", f"--prompts={ids}",
        f"--output={tmp_path / 'e.npz'}",
    )  # fmt: skip
    text = np.load(tmp_path / "e.npz")["ctx"]
    np.testing.assert_allclose(text, file["prompt_embeds"], rtol=0, atol=1e-4)
    assert not text[file["mask"] == 0].any()
