"""launch.sample with reference images and landmarks, as a command."""

import numpy as np
import pytest
from PIL import Image

from longlive_jax.data import sidecars
from tests.launch.commands import PROMPTS, TINY, run, save_tiny, write

ACTIONS = {"actions.kind": "token"}
MEMORY = ["--config.model.chunk_frames=2", "--config.sample.window_frames=8",
          "--config.sample.sink_frames=2", "--config.sample.multi_shot_sink=False",
          "--config.sample.chunks=7", "--config.memory.speed=1", "--config.memory.glide=0",
          "--config.memory.distance=6"]  # fmt: skip
PICTURES = 7 * 8 - 3


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    save_tiny(folder / "checkpoint", overrides=ACTIONS | {"model.chunk_frames": 2})
    write(folder / "one.txt", PROMPTS[0])
    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        pixels = draw.integers(0, 255, (24, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / "text.png").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def sample(files):
    def call(*args, **kwargs):
        return run(
            "sample", *TINY, *MEMORY, "--config.actions.kind=token", f"--checkpoint={files}/checkpoint",
            f"--prompts={files}/one.txt", *args, **kwargs,
        )  # fmt: skip

    return call


def latents(path):
    return np.load(path)["latents"]


@pytest.mark.slow
def test_out_and_back_with_landmarks(sample, tmp_path):
    """They change the video once the player is back, and the record makes it again to the bit."""
    line = f"--actions=w*24, s*{PICTURES - 24}"
    sample(line, f"--save_latents={tmp_path}/without.npz")
    with_one = "--config.memory.landmarks=1"
    done = sample(line, with_one, f"--output={tmp_path}/w.mp4", f"--save_latents={tmp_path}/w.npz")
    assert "error" not in done.stderr
    record = sidecars.read(tmp_path / "w.actions.npz", PICTURES, 24)
    assert record.pose is None
    sample(f"--actions={tmp_path}/w.actions.npz", with_one, f"--save_latents={tmp_path}/again.npz")
    made, without = latents(tmp_path / "w.npz"), latents(tmp_path / "without.npz")
    np.testing.assert_array_equal(latents(tmp_path / "again.npz"), made)
    np.testing.assert_array_equal(made[:, :6], without[:, :6])  # before anything leaves the window
    assert np.abs(made - without)[:, -2:].max() > 1e-3


@pytest.mark.slow
def test_references_are_seen_from_the_first_chunk_on(sample, files, tmp_path):
    made = []
    for name in ("a", "b"):
        given = [f"--references={files}/{name}.png", "--config.memory.references=1"]
        sample("--actions=still", *given, f"--save_latents={tmp_path}/{name}.npz")
        made.append(latents(tmp_path / f"{name}.npz"))
    assert np.abs(made[0] - made[1])[:, 0].max() > 1e-3


CASES = {
    "too many": ("--references={a},{b} --config.memory.references=1", "2 images", "references=2"),
    "no slot": ("--references={a}", "1 images for memory.references=0", "memory.references=1"),
    "no image": ("--references={text} --config.memory.references=1", "text.png"),
    "missing": ("--references={none} --config.memory.references=1", "none.png: no such file"),
    "window": (
        "--config.memory.references=2 --config.memory.landmarks=1",
        "sample.window_frames=8", "memory.references=2, memory.landmarks=1", "at least 12",
        "2 reference(s), 1 landmark(s)",
    ),
    "no actions": (
        "--config.actions.kind=none --config.memory.landmarks=1", "memory.landmarks=1",
        "action path",
    ),
    "angle": ("--config.memory.angle=0", "memory.angle=0", "above 0 and at most 180"),
    "glide": ("--config.memory.glide=1", "memory.glide=1", "below 1"),
    "layout": (
        "--layout=vbench --references={a} --output={none}", "--layout=vbench and --references",
    ),
    "over an input": ("--references={a} --config.memory.references=1 --contact_sheet={a}", "is read"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_is_refused(case, sample, files, tmp_path):
    words, *fragments = CASES[case]
    words = words.format(**{name: files / f"{name}.png" for name in ("a", "b", "text", "none")})
    still = [] if "kind=none" in words else ["--actions=still"]
    output = [] if "--output" in words else [f"--output={tmp_path}/v.mp4"]
    done = sample(*still, *output, *words.split(), check=False)
    assert done.code == 2, done.stderr
    for fragment in fragments:
        assert fragment in done.stderr, done.stderr
