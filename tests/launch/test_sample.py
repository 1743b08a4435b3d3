"""launch.sample, and the commands beside it, on random weights: every input, every output."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from longlive_jax.data.images import read_image, to_float
from longlive_jax.data.video import VideoWriter
from longlive_jax.data.video_reader import probe, read_video
from longlive_jax.models.vae import to_uint8
from tests.launch.commands import PROMPTS, ROOT, TINY, run, write

FRAMES = 61  # of two chunks
SIZE = 32, 64


def frames(path):
    return read_video(path, *SIZE)


def latents(path):
    return np.load(path)["latents"]


def near(a, b):
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write(tmp_path_factory.mktemp("prompts") / "prompts.txt", "\n".join(PROMPTS) + "\n")


@pytest.fixture(scope="module")
def sample(checkpoint, prompts):
    """launch.sample of the prompts of two videos, or of what the arguments say."""

    def call(*args, prompts=prompts, **kwargs):
        text = [f"--prompts={prompts}"] if prompts else []
        return run("sample", *TINY, f"--checkpoint={checkpoint}", *text, *args, **kwargs)

    return call


@pytest.fixture(scope="module")
def two(sample, tmp_path_factory):
    """Two videos, one after the other, and what was printed."""
    folder = tmp_path_factory.mktemp("two")
    done = sample(
        f"--output={folder}/out.mp4", f"--save_latents={folder}/l.npz",
        f"--contact_sheet={folder}/sheet.png",
    )  # fmt: skip
    return folder, done


def test_two_prompts_make_two_numbered_videos(two):
    folder, done = two
    assert sorted(os.listdir(folder)) == [
        "l-000.npz", "l-001.npz", "out-000.mp4", "out-001.mp4", "sheet-000.png", "sheet-001.png",
    ]  # fmt: skip
    for i in (0, 1):
        info = probe(folder / f"out-00{i}.mp4")
        assert (info.frames, info.fps, info.height, info.width) == (FRAMES, 24, *SIZE)
        assert latents(folder / f"l-00{i}.npz").shape == (1, 16, 4, 2, 4)
        with Image.open(folder / f"sheet-00{i}.png") as sheet:
            assert sheet.width == 3 * 194 - 2  # 0, 1 and 2 seconds
    assert frames(folder / "out-000.mp4").std() > 5
    assert not np.array_equal(latents(folder / "l-000.npz"), latents(folder / "l-001.npz"))
    lines = done.stdout.splitlines()
    pattern = rf"2 videos, {2 * FRAMES} frames, [\d.]+ s, [\d.]+ frames/s: (.*)"
    assert len(lines) == 1
    assert re.fullmatch(pattern, lines[0])[1] == f"{folder}/out-000.mp4 to {folder}/out-001.mp4"


def test_a_seed_gives_the_same_bits(two, sample, tmp_path):
    sample(f"--output={tmp_path}/out.mp4", f"--save_latents={tmp_path}/l.npz")
    for name in ("l-000.npz", "l-001.npz", "out-000.mp4"):
        one, other = two[0] / name, tmp_path / name
        read = latents if name.endswith("npz") else frames
        np.testing.assert_array_equal(read(one), read(other))


@pytest.mark.slow
def test_another_seed_gives_another_video(two, sample, tmp_path):
    sample("--seed=1", f"--save_latents={tmp_path}/l.npz")
    assert not np.allclose(latents(two[0] / "l-000.npz"), latents(tmp_path / "l-000.npz"), atol=0.1)


@pytest.mark.slow
def test_a_batch_is_the_same_videos(two, sample, tmp_path):
    sample("--batch=2", f"--output={tmp_path}/out.mp4", f"--save_latents={tmp_path}/l.npz")
    assert sorted(os.listdir(tmp_path)) == ["l-000.npz", "l-001.npz", "out-000.mp4", "out-001.mp4"]
    for i in (0, 1):
        near(latents(tmp_path / f"l-00{i}.npz"), latents(two[0] / f"l-00{i}.npz"))
        one, other = (frames(folder / f"out-00{i}.mp4") for folder in (tmp_path, two[0]))
        assert np.abs(one.astype(int) - other).mean() < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--config.mesh.seq=2", "--config.mesh.data=2"])
def test_a_mesh_makes_the_same_videos(two, sample, flag, tmp_path):
    sample(
        flag, "--batch=2", f"--output={tmp_path}/out.mp4", f"--save_latents={tmp_path}/l.npz",
        devices=2,
    )  # fmt: skip
    for i in (0, 1):
        near(latents(tmp_path / f"l-00{i}.npz"), latents(two[0] / f"l-00{i}.npz"))
        one, other = (frames(folder / f"out-00{i}.mp4") for folder in (tmp_path, two[0]))
        assert np.abs(one.astype(int) - other).mean() < 0.5


@pytest.mark.slow
def test_a_device_for_the_vae_makes_the_same_video(two, sample, tmp_path):
    sample("--vae_device=1", f"--output={tmp_path}/out.mp4", devices=2)
    for name in ("out-000.mp4", "out-001.mp4"):
        np.testing.assert_array_equal(frames(tmp_path / name), frames(two[0] / name))


@pytest.mark.slow
def test_saved_latents_decode_to_the_video(two, checkpoint, tmp_path):
    folder, _ = two
    args = *TINY, f"--checkpoint={checkpoint}", f"--latents={folder}/l-000.npz"
    run("decode", *args, f"--output={tmp_path}/v.mp4")
    np.testing.assert_array_equal(frames(tmp_path / "v.mp4"), frames(folder / "out-000.mp4"))
    run("decode", *args, f"--output={tmp_path}/v.npz")
    video = np.load(tmp_path / "v.npz")["video"]
    assert video.shape == (1, 3, FRAMES, *SIZE)
    assert video.dtype == np.float32
    with VideoWriter(tmp_path / "again.mp4", *SIZE) as writer:
        writer.write(np.asarray(to_uint8(np.moveaxis(video[0], 0, -1))))
    np.testing.assert_array_equal(frames(tmp_path / "again.mp4"), frames(tmp_path / "v.mp4"))


@pytest.mark.slow
def test_embedded_prompts_are_the_prompts(sample, checkpoint, prompts, tmp_path):
    guided = "--config.sample.guidance_scale=2.0", "--config.sample.negative_prompt=a red boat"
    args = *TINY, *guided, f"--checkpoint={checkpoint}", f"--prompts={prompts}"
    run("embed", *args, f"--output={tmp_path}/e.npz")
    assert sorted(os.listdir(tmp_path)) == ["e-000.npz", "e-001.npz"]
    arrays = np.load(tmp_path / "e-000.npz")
    assert {k: arrays[k].shape for k in arrays} == {
        "ctx": (2, 32, 32), "neg": (1, 32, 32), "cut": (2,),
    }  # fmt: skip
    sample(*guided, f"--save_latents={tmp_path}/p.npz")
    sample(
        *guided, f"--prompt_embeds={tmp_path}/e-000.npz", f"--save_latents={tmp_path}/q.npz",
        prompts=None,
    )  # fmt: skip
    np.testing.assert_array_equal(latents(tmp_path / "p-000.npz"), latents(tmp_path / "q.npz"))


@pytest.mark.slow
def test_shot_list(sample, tmp_path):
    shots = [
        {"prompt": PROMPTS[0], "chunks": 1},
        {"prompt": PROMPTS[1], "seconds": 1.3},
        {"prompt": PROMPTS[0], "seconds": 1, "cut": False},
    ]
    done = sample(
        "--config.sample.recache=True", f"--output={tmp_path}/out.mp4",
        prompts=write(tmp_path / "shots.json", shots),
    )  # fmt: skip
    assert probe(tmp_path / "out.mp4").frames == FRAMES + 32
    assert done.stdout.startswith(f"1 video, {FRAMES + 32} frames, ")


def test_image_is_the_first_frame(sample, checkpoint, tmp_path):
    photo = ROOT / "assets/photo.jpg"
    one = write(tmp_path / "one.txt", PROMPTS[0])
    sample(
        f"--image={photo}", f"--output={tmp_path}/out.mp4", f"--save_latents={tmp_path}/l.npz",
        prompts=one,
    )  # fmt: skip
    video = np.moveaxis(to_float(read_image(photo, *SIZE)), -1, 0)[None, :, None]
    run(
        "encode", *TINY, f"--checkpoint={checkpoint}", f"--output={tmp_path}/first.npz",
        f"--video={write(tmp_path / 'first-frame.npz', {'video': video})}",
    )  # fmt: skip
    first = latents(tmp_path / "first.npz")
    np.testing.assert_array_equal(latents(tmp_path / "l.npz")[:, :1], first)
    # The same latent, given as such.
    noise = np.random.default_rng(0).standard_normal((1, 8, *first.shape[2:]), np.float32)
    init = write(tmp_path / "noise.npz", {"noise": noise, "init": first})
    sample(f"--noise={init}", f"--save_latents={tmp_path}/i.npz", prompts=one)
    assert latents(tmp_path / "i.npz").shape == noise.shape
    np.testing.assert_array_equal(latents(tmp_path / "i.npz")[:, :1], first)


def test_continues_a_video(sample, checkpoint, tmp_path):
    pictures = read_video(ROOT / "assets/clip.mp4", *SIZE)[:29]
    with VideoWriter(tmp_path / "clip.mp4", *SIZE) as writer:
        writer.write(pictures)
    sample(
        f"--continue_from={tmp_path}/clip.mp4", f"--output={tmp_path}/out.mp4",
        f"--save_latents={tmp_path}/l.npz", prompts=write(tmp_path / "one.txt", PROMPTS[0]),
    )  # fmt: skip
    args = *TINY, f"--checkpoint={checkpoint}"
    run("encode", *args, f"--video={tmp_path}/clip.mp4", f"--output={tmp_path}/clip.npz")
    assert probe(tmp_path / "out.mp4").frames == 32 + FRAMES
    both = latents(tmp_path / "l.npz")
    assert both.shape[1] == 24
    np.testing.assert_array_equal(both[:, :8], latents(tmp_path / "clip.npz"))


@pytest.mark.parametrize(
    "number, code",
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_interrupted_video_plays(checkpoint, tmp_path, number, code):
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "launch.sample", *TINY, "--config.sample.chunks=100000",
        f"--checkpoint={checkpoint}", f"--output={out}/v.mp4",
        f"--prompts={write(tmp_path / 'one.txt', PROMPTS[0])}",
    ]  # fmt: skip
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    # Blocks: the file begins with a hole, which its index will fill.
    while not any(path.stat().st_blocks > 4 for path in out.glob(".v.partial*")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert ("interrupted" if code == 130 else "terminated") in stderr
    assert "Traceback" not in stderr
    assert os.listdir(out) == ["v.mp4"]
    assert len(frames(out / "v.mp4")) >= 1
