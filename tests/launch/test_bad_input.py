"""Whatever is wrong with the input: exit code 2, a message to act on, and nothing written."""

import errno
import os
import types

import numpy as np
import pytest

from longlive_jax.data.video import VideoWriter
from tests.launch.commands import PROMPTS, TINY, run, save_tiny, write

CONFIG, GUIDED = "--config=configs/tiny.py", "--config.sample.guidance_scale=2.0"


@pytest.fixture(scope="module")
def f(checkpoint, tmp_path_factory):
    """Files by name: good ones and bad ones."""
    folder = tmp_path_factory.mktemp("files")

    def noise(*shape, dtype=np.float32):
        return {"noise": np.zeros(shape, dtype)}

    good = {"ctx": np.zeros((2, 4, 32), np.float32)}
    files = {
        "prompts.txt": "\n".join(PROMPTS),
        "empty.txt": " \n\n",
        "clean.txt": "&nbsp;",  # nothing is left of it when it is cleaned
        "one.json": [{"prompt": PROMPTS[0], "chunks": 1}],
        "empty.json": [{"prompt": " "}],
        "picture.png": "this is text",
        "video.mp4": "this is text, too",
        "noise.npz": noise(1, 8, 4, 2, 4),
        "noise2.npz": noise(1, 16, 4, 2, 4),
        "noise3.npz": noise(3, 8, 4, 2, 4),
        "channels.npz": noise(1, 8, 5, 2, 4),
        "frames.npz": noise(1, 12, 4, 2, 4),
        "odd.npz": noise(1, 8, 4, 3, 4),
        "narrow.npz": noise(1, 8, 4, 2, 6),
        "texts.npz": {"noise": np.full((1, 8, 4, 2, 4), "a")},
        "inf.npz": {"noise": np.full((1, 8, 4, 2, 4), np.inf, np.float32)},
        "init.npz": noise(1, 8, 4, 2, 4) | {"init": np.zeros((1, 2, 4, 2, 4), np.float32)},
        "text.npz": good,
        "text1.npz": {"ctx": good["ctx"][:1]},
        "wide.npz": {"ctx": np.zeros((2, 4, 33), np.float32)},
        "nan.npz": {"ctx": np.full((2, 4, 32), np.nan, np.float32)},
        "cut.npz": good | {"cut": np.zeros(3, bool)},
        "latents.npz": {"latents": np.zeros((1, 2, 5, 2, 4), np.float32)},
        "latents4.npz": {"latents": np.zeros((1, 2, 4, 2, 4), np.float32)},
        "pixels.npz": {"video": np.zeros((1, 3, 4, 32, 64), np.float32)},
        "sizes.npz": {"video": np.zeros((1, 3, 5, 40, 64), np.float32)},
        "ids.npz": {"ids": np.full((1, 4), 600), "mask": np.ones((1, 4), np.int32)},
    }
    paths = {name: write(folder / name, value) for name, value in files.items()}
    paths["cut-off.npz"] = folder / "cut-off.npz"
    paths["cut-off.npz"].write_bytes(paths["noise.npz"].read_bytes()[:-300])
    paths["short.mp4"] = folder / "short.mp4"
    with VideoWriter(paths["short.mp4"], 32, 64) as writer:
        writer.write(np.zeros((40, 32, 64, 3), np.uint8))
    paths |= {"ckpt": checkpoint, "folder": folder, "none": folder / "none"}
    paths["dit"] = save_tiny(folder / "dit", ["dit"])
    paths["no-encoder"] = save_tiny(folder / "no-encoder", ["dit", "vae", "umt5"], ["dec", "conv2", "blocks", "norm", "token", "patch", "text", "time", "head"])  # fmt: skip
    return types.SimpleNamespace(**{"path": lambda name: paths[name]})


S = "--checkpoint={ckpt} --prompts={prompts.txt} --output={out}/v.mp4"
N = "--checkpoint={ckpt} --prompts={prompts.txt} --save_latents={out}/l.npz"
E = "--checkpoint={ckpt} --prompt_embeds={%s} --save_latents={out}/l.npz"
# command, arguments ({name}: a file), what the message must have in it
CASES = {
    "no config": ("sample !" + S, "--config is missing", "configs/"),
    "override without config": ("sample !--config.dtype=float32", "--config is missing"),
    "config file": ("sample !--config=nowhere.py", "nowhere.py", "no such file"),
    "unknown key": ("sample --config.model.dims=3", "config.model.dims", "known keys: dim, ffn_dim"),
    "wrong type": ("sample --config.model.dim=wide", "config.model.dim", "wide"),
    "unknown flag": ("sample --promts=x", "promts"),
    "stray word": ("sample " + S + " cat.png", "'cat.png' is not a flag"),
    "value of a flag": ("sample " + S + " --batch=0", "batch", "0"),
    "heads": ("sample " + S + " --config.mesh.seq=3", "model.num_heads=8", "mesh.seq=3", "[6, 9]"),
    "sink": ("sample --config.sample.sink_frames=5", "sample.sink_frames=5", "=8", "nearest: [8]"),
    "window": ("sample --config.sample.window_frames=30", "window_frames=30", "[24, 32]"),
    "steps": ("sample --config.sample.steps=0", "sample.steps=0", "at least 1"),
    "dtype": ("sample --config.dtype=float16", "'float16'", "bfloat16"),
    "devices": ("sample " + S + " --config.mesh.seq=8", "needs 8 devices, 2 found", "JAX_NUM_CPU"),
    "vae_device": ("sample " + S + " --vae_device=2", "--vae_device=2", "0 to 1"),
    "vae width": (
        "sample --checkpoint={ckpt} --prompts={one.json} --noise={narrow.npz} --output={out}/v.mp4"
        " --config.mesh.seq=4", "latent width 6", "mesh seq=4", "--vae_device=0",
    ),
    "batch of a mesh": ("sample " + N + " --config.mesh.data=2", "1 video(s)", "= 2", "--batch"),
    "no output": ("sample --checkpoint={ckpt} --prompts={prompts.txt}", "--output is missing"),
    "output is a folder": ("sample " + S + " --output={out.mp4}", "is a folder"),
    "output in a file": ("sample " + S + " --output={prompts.txt}/v.mp4", "cannot be written"),
    "output's kind": ("sample " + S + " --output={out}/v.gif", "v.gif", ".mp4"),
    "latents' kind": ("sample " + N + " --save_latents={out}/v.mp4", "--save_latents", ".npz"),
    "sheet without video": ("sample " + N + " --contact_sheet={out}/s.png", "--output"),
    "no prompts": ("sample --checkpoint={ckpt} --output={out}/v.mp4", "--prompts", "--prompt_embeds"),
    "prompts twice": ("sample " + S + " --prompt_embeds={text.npz}", "--prompts", "--prompt_embeds"),
    "prompts missing": ("sample " + S + " --prompts={none}", "does not exist"),
    "prompts empty": ("sample " + S + " --prompts={empty.txt}", "is empty", "write a prompt"),
    "prompt empty": ("sample " + S + " --prompts={empty.json}", "entry 1", '"prompt" is empty'),
    "prompt empties": ("sample " + S + " --prompts={clean.txt}", "prompt 1", "is empty"),
    "prompts of a picture": ("sample " + S + " --prompts={picture.png}", ".png", ".txt"),
    "no checkpoint": ("sample --prompts={prompts.txt} --output={out}/v.mp4", "--checkpoint", "convert"),
    "no such checkpoint": ("sample " + S + " --checkpoint={none}", "is no checkpoint", "convert"),
    "no vae": (
        "sample --checkpoint={dit} --prompt_embeds={text.npz} --output={out}/v.mp4",
        "holds no vae", "--vae=FILE",
    ),
    "no text encoder": ("sample " + N + " --checkpoint={dit}", "holds no umt5", "--umt5=FILE"),
    "no encoder": (
        "sample " + S + " --image=assets/photo.jpg --checkpoint={no-encoder}",
        "no conv1, encoder", "--vae=FILE",
    ),
    "other sizes": (
        "sample " + N + " --config.model.dim=128", "128", "64", "It fits with --config.model.dim=64",
    ),
    "latent channels": (
        "sample " + S + " --config.vae.z_dim=3 --config.vae.latent_mean=0,0,0"
        " --config.vae.latent_std=1,1,1", "vae", "z_dim=4",
    ),
    "text width": ("sample " + N + " --config.umt5.dim=64", "umt5.dim=64", "model.text_dim=32"),
    "noise cut off": ("sample " + N + " --noise={cut-off.npz}", "cut-off.npz"),
    "noise missing": ("sample " + N + " --noise={none}", "no such file"),
    "not noise": ("sample " + N + " --noise={text.npz}", "'noise' is missing", "found: ctx"),
    "noise channels": ("sample " + N + " --noise={channels.npz}", "[1, 8, 5, 2, 4]", "in_dim=4"),
    "noise frames": ("sample " + N + " --noise={frames.npz}", "12 latent frames", "chunk_frames=8"),
    "noise height": ("sample " + N + " --noise={odd.npz}", "3 x 4", "multiples of 2"),
    "noise of texts": ("sample " + N + " --noise={texts.npz}", "<U1", "numbers"),
    "noise infinite": ("sample " + N + " --noise={inf.npz}", "256 of 256", "finite"),
    "noise of more videos": ("sample " + N + " --noise={noise3.npz}", "2 videos", "noise of 3"),
    "init": ("sample " + N + " --noise={init.npz}", "init of shape (1, 2, 4, 2, 4)", "single frame"),
    "fewer shots": (
        "sample " + N + " --prompts={one.json} --noise={noise2.npz}", "has 1 chunks", "has 2",
    ),
    "fewer embeddings": ("sample " + E % "text1.npz" + " --noise={noise2.npz}", "1 rows", "2 chunks"),
    "embeddings not finite": ("sample " + E % "nan.npz", "256 of 256", "not finite"),
    "embeddings' width": ("sample " + E % "wide.npz", "[2, 4, 33]", "text_dim=32"),
    "embeddings' cuts": ("sample " + E % "cut.npz", "cut of shape (3,)", "2 rows"),
    "guidance": ("sample " + E % "text.npz" + " " + GUIDED, "neg is missing", "=2.0", "to 1.0"),
    "image missing": ("sample " + S + " --image={none}", "no such file"),
    "image is text": ("sample " + S + " --image={picture.png}", "not an image"),
    "no image": ("sample " + S + " --config.video.image_to_video=True", "has no image", "--image"),
    "image and video": (
        "sample " + S + " --image=assets/photo.jpg --continue_from={short.mp4}", "exclude",
    ),
    "video is text": ("sample " + S + " --continue_from={video.mp4}", "cannot be read as a video"),
    "video's length": (
        "sample " + S + " --continue_from={short.mp4}", "40 frames", "32 k - 3",
        "--continue_frames=29",
    ),
    "video too short": (
        "sample " + S + " --continue_from={short.mp4} --continue_frames=61", "61", "40",
    ),
    "frames of no video": ("sample " + S + " --continue_frames=29", "needs --continue_from"),
    "encode nothing": ("encode --checkpoint={ckpt} --output={out}/l.npz", "--video is missing"),
    "encode text": (
        "encode --checkpoint={ckpt} --video={video.mp4} --output={out}/l.npz", "as a video",
    ),
    "encode frames": (
        "encode --checkpoint={ckpt} --video={pixels.npz} --output={out}/l.npz", "4 frames", "[1, 5]",
    ),
    "encode sizes": (
        "encode --checkpoint={ckpt} --video={sizes.npz} --output={out}/l.npz", "40", "of 16",
    ),
    "encode to a video": (
        "encode --checkpoint={ckpt} --video={short.mp4} --output={out}/l.mp4", ".npz",
    ),
    "decode channels": (
        "decode --checkpoint={ckpt} --latents={latents.npz} --output={out}/v.mp4", "z_dim=4",
    ),
    "decode nothing": ("decode --checkpoint={ckpt} --output={out}/v.mp4", "--latents is missing"),
    "decode without a vae": (
        "decode --checkpoint={dit} --latents={latents4.npz} --output={out}/v.mp4", "holds no vae",
    ),
    "embed ids": (
        "embed --checkpoint={ckpt} --prompts={ids.npz} --output={out}/e.npz", "600", "511",
    ),
    "embed no ids": (
        "embed --checkpoint={ckpt} --prompts={noise.npz} --output={out}/e.npz", "'ids' is missing",
    ),
}  # fmt: skip


def arguments(words, f, tmp_path):
    command, *words = words.split()
    (tmp_path / "folder.mp4").mkdir(exist_ok=True)
    own = {"out": tmp_path / "out", "out.mp4": tmp_path / "folder.mp4"}

    def fill(word):
        before, brace, rest = word.partition("{")
        name, _, after = rest.partition("}")
        return f"{before}{own.get(name) or f.path(name)}{after}" if brace else word

    words = [fill(word) for word in words]
    bare = bool(words) and words[0].startswith("!")
    return command, [words[0][1:], *words[1:]] if bare else [*TINY, *words]


def written(folder):
    return sorted(str(path) for path in folder.rglob("*") if path.is_file())


def refused(done, *fragments):
    assert done.code == 2, (done.code, done.stderr)
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert len(done.stderr.splitlines()) <= 3, done.stderr
    for fragment in fragments:
        assert fragment in done.stderr


@pytest.mark.parametrize("case", CASES)
def test_is_refused(case, f, tmp_path):
    words, *fragments = CASES[case]
    command, args = arguments(words, f, tmp_path)
    before = written(f.path("folder"))
    refused(run(command, *args, devices=4 if "seq=4" in words else 2, check=False), *fragments)
    assert written(tmp_path) == []
    assert written(f.path("folder")) == before


def _full_disk():
    from longlive_jax.data import video
    from longlive_jax.files import arrays

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    written = []

    def write(self, data, real=video._File.write):
        written.append(len(data))
        if sum(written) > 1000:
            self.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise self.error
        return real(self, data)

    video._File.write = write
    arrays.np.savez = refuse


@pytest.mark.parametrize(
    "words", [pytest.param(S, marks=pytest.mark.slow), N], ids=["video", "latents"]
)
def test_full_disk(words, f, tmp_path):
    command, args = arguments("sample " + words, f, tmp_path)
    done = run(command, *args, patch=_full_disk, check=False)
    assert done.code == 2, done.stderr
    assert "no space left on the disk of" in done.stderr
    assert "Traceback" not in done.stderr
    assert written(tmp_path) == []
