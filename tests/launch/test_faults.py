"""What commands do when numbers, disks, streams and signals go wrong: no traceback, no lost video."""

import errno
import functools
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from longlive_jax.checkpoints import store
from longlive_jax.data.video import VideoWriter
from longlive_jax.data.video_reader import probe
from longlive_jax.models import dit, vae
from tests.launch.commands import PROMPTS, ROOT, TINY, run, save_tiny, tiny_config, write

NOISE = np.random.default_rng(0).standard_normal((1, 16, 4, 2, 4))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return write(tmp_path_factory.mktemp("one") / "one.txt", PROMPTS[0])


def spoiled(folder, part, path, value=np.nan):
    """A tiny checkpoint, one of whose weights has one such value."""
    save_tiny(folder, {"dit", "vae", "umt5"} - {part})
    cfg = tiny_config()
    section, model = {"dit": (cfg.model, dit), "vae": (cfg.vae, vae)}[part]
    spec = model.spec(section)
    draw = np.random.default_rng(0)
    tree = jax.tree.map(
        lambda s: 0.1 * draw.standard_normal(s.shape, np.float32), spec,
        is_leaf=lambda s: hasattr(s, "axes"),
    )  # fmt: skip
    leaf = functools.reduce(lambda t, k: t[k], path.split("/"), tree)
    leaf.flat[0] = value
    store.save(
        folder, part, store.tree_pieces(tree, spec), spec, section=section, sources=[f"{part}.pt"]
    )
    return folder


def ended(done, code, *fragments):
    assert done.code == code, (done.code, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    for fragment in fragments:
        assert fragment in done.stderr
    return done


# Numbers that are not finite.


@pytest.mark.parametrize(
    "part, path, name",
    [
        ("dit", "head/head/bias", "the transformer"),
        pytest.param("vae", "decoder/head/2/bias", "the VAE", marks=pytest.mark.slow),
        pytest.param("vae", "conv2/weight", "the VAE", marks=pytest.mark.slow),
    ],
)
def test_weights_that_are_not_finite_make_no_video(tmp_path, one, part, path, name):
    checkpoint = spoiled(tmp_path / "ckpt", part, path)
    done = run(
        "sample", *TINY, f"--checkpoint={checkpoint}", f"--prompts={one}",
        f"--output={tmp_path}/out/v.mp4", check=False,
    )  # fmt: skip
    ended(done, 1, "chunk 0 is not finite", f"weights of {name} are not finite", path)
    assert not os.listdir(tmp_path / "out")


def _spoil_the_second_chunk():
    from longlive_jax.sampling import draws

    real = draws.noise
    draws.noise = lambda cfg, start, index: real(cfg, start, index) * (np.nan if index == 1 else 1)


def test_the_good_part_stays(tmp_path, checkpoint, one):
    done = run(
        "sample", *TINY, f"--checkpoint={checkpoint}", f"--prompts={one}", "--config.sample.chunks=4",
        f"--output={tmp_path}/v.mp4", patch=_spoil_the_second_chunk, check=False,
    )  # fmt: skip
    ended(done, 1, "chunk 1 is not finite", "guidance_scale=1.0")
    assert os.listdir(tmp_path) == ["v.mp4"]
    assert probe(tmp_path / "v.mp4").frames == 29


@pytest.mark.parametrize("name", ["noise", "init"])
def test_noise_that_overflows_is_refused(tmp_path, checkpoint, one, name):
    arrays = {"noise": NOISE.copy(), "init": NOISE[:, :1].copy()}
    arrays[name][0, 0, 0, 0, 0] = 1e300
    done = run(
        "sample", *TINY, f"--checkpoint={checkpoint}", f"--prompts={one}",
        f"--noise={write(tmp_path / 'n.npz', arrays)}", f"--output={tmp_path}/v.mp4", check=False,
    )  # fmt: skip
    ended(done, 2, f"{name}: 1e+300 is infinite in float32", "3.403e+38", "1 of")


@pytest.mark.parametrize(
    "name, dtype, value, kind",
    [
        ("ctx", np.float64, 1e300, "float32"),
        ("neg", np.float64, -1e39, "float32"),
        ("ctx", np.float32, 3.4e38, "bfloat16"),
    ],
)
def test_embeddings_that_overflow_are_refused(tmp_path, checkpoint, name, dtype, value, kind):
    arrays = {"ctx": np.zeros((2, 4, 32), dtype), "neg": np.zeros((1, 4, 32), dtype)}
    arrays[name][0, 0, 0] = value
    done = run(
        "sample", *TINY, f"--checkpoint={checkpoint}", f"--config.dtype={kind}",
        "--config.sample.guidance_scale=2", f"--output={tmp_path}/v.mp4",
        f"--prompt_embeds={write(tmp_path / 'e.npz', arrays)}", check=False,
    )  # fmt: skip
    ended(done, 2, f"prompt embeddings: {name}: ", f"is infinite in {kind}")


@pytest.mark.parametrize("suffix", ["mp4", "npz"])
def test_latents_that_cannot_be_decoded(tmp_path, checkpoint, suffix):
    latents = NOISE.astype(np.float32)
    latents[0, 9:] = 3e38  # of the first such latent a norm makes zeros
    done = run(
        "decode", *TINY, f"--checkpoint={checkpoint}", f"--output={tmp_path}/v.{suffix}",
        f"--latents={write(tmp_path / 'l.npz', {'latents': latents})}", check=False,
    )  # fmt: skip
    ended(
        done, 1, "l.npz: chunk 1, latent frames 10 to 10: frames are not", "latents up to 3e+38 are"
    )
    if suffix == "mp4":
        assert probe(tmp_path / "v.mp4").frames == 1 + 9 * 4
    else:
        assert os.listdir(tmp_path) == ["l.npz"]
    latents = write(tmp_path / "d.npz", {"latents": np.full((1, 2, 4, 2, 4), -1e39)})
    done = run(
        "decode", *TINY, f"--checkpoint={checkpoint}", f"--latents={latents}",
        f"--output={tmp_path}/w.{suffix}", check=False,
    )  # fmt: skip
    ended(done, 2, "d.npz: latents: -1e+39 is infinite in float32")


@pytest.mark.slow
def test_senseless_values_are_a_warning(tmp_path, checkpoint, one):
    done = run(
        "sample", *TINY, f"--checkpoint={checkpoint}", f"--prompts={one}",
        "--config.sample.guidance_scale=1e4", f"--output={tmp_path}/v.mp4",
    )  # fmt: skip
    assert done.stderr.count("sample.guidance_scale=10000: past 100") == 1
    assert done.stderr.count("where a video's stay below 100") == 1
    assert probe(tmp_path / "v.mp4").frames == 61


# Outputs that are inputs.


def test_an_output_that_is_read_is_refused(tmp_path, one):
    checkpoint = save_tiny(tmp_path / "ckpt")
    before = sorted(p for p in checkpoint.rglob("*"))
    with VideoWriter(tmp_path / "out-001.mp4", 32, 64) as writer:
        writer.write(np.zeros((29, 32, 64, 3), np.uint8))
    (tmp_path / "link.mp4").symlink_to(tmp_path / "out-001.mp4")
    noise = write(tmp_path / "n.npz", {"noise": NOISE})
    latents = write(tmp_path / "l.npz", {"latents": NOISE})
    two = write(tmp_path / "two.txt", "\n".join(PROMPTS))
    clip = f"--continue_from={tmp_path}/link.mp4"
    base = f"--checkpoint={checkpoint}"
    for command, flags, message in [
        ("sample", [f"--prompts={two}", clip, f"--output={tmp_path}/out.mp4"], "is read as"),
        ("sample", [f"--prompts={one}", f"--noise={noise}", f"--save_latents={noise}"], "is read as"),
        ("sample", [f"--prompts={one}", f"--output={checkpoint}/dit/v.mp4"], "which is read"),
        ("decode", [f"--latents={latents}", f"--output={latents}"], "is read as"),
        ("decode", [f"--latents={latents}", f"--output={checkpoint}/v.mp4"], "which is read"),
        ("embed", [f"--prompts={one}", f"--output={checkpoint}/v.npz"], "which is read"),
        ("encode", [f"--video={tmp_path}/out-001.mp4", f"--output={checkpoint}/new/v.npz"], "which"),
        ("convert", [f"--to_safetensors={checkpoint}/dit"], "which is read"),
        ("convert", ["--recipe=fp8", f"--output={checkpoint}/fp8"], "which is read"),
        ("encode_dataset", [f"--output={checkpoint}/cached"], "which is read"),
    ]:  # fmt: skip
        done = run(command, *TINY, base, *flags, check=False)
        ended(done, 2, message)
    assert probe(tmp_path / "out-001.mp4").frames == 29
    files = {p for p in checkpoint.rglob("*") if p.is_file()}
    assert files == {p for p in before if p.is_file()}


# Disks, streams and signals, with a command of a few lines.

HEAD = """
import os, sys, errno, time
from launch import command
from absl import flags
flags.DEFINE_string("output", None, "")
"""


def script(tmp_path, body, *args, **kwargs):
    path = tmp_path / "script.py"
    path.write_text(HEAD + body + "\ncommand.run(main)\n")
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, str(path), *args]
    return subprocess.Popen(words, env=env, text=True, cwd=tmp_path, **kwargs)


@pytest.mark.parametrize(
    "error, message",
    [
        ("OSError(errno.ENOSPC, 'x', '/a/v.mp4')", "no space left on the disk of /a/v.mp4"),
        ("OSError(errno.EDQUOT, 'x', '/a/v.mp4')", "quota is used up for /a/v.mp4"),
        ("OSError(errno.EFBIG, 'x', '/a/v.mp4')", "/a/v.mp4 gets larger than"),
        ("OSError(errno.EROFS, 'x', '/a/v.mp4')", "the disk of /a/v.mp4 cannot be written"),
        ("PermissionError(errno.EACCES, 'x', '/a/v.mp4')", "no permission for /a/v.mp4"),
        ("Exception('Orbax: No space left on device [/a/b/d]')", "left on the disk of /a/b/d;"),
        ("RuntimeError('write: Disk quota exceeded')", "used up for the output"),
    ],
)
def test_what_a_disk_refuses(tmp_path, error, message):
    from launch import command

    made = eval(error, {"errno": errno})
    assert message in command.refused_by_disk(made)


def test_other_errors_are_not_the_disk():
    from launch import command

    for error in (OSError("x"), FileNotFoundError(errno.ENOENT, "x", "/a"), ValueError("/a: no")):
        assert command.refused_by_disk(error) is None


def test_a_limit_of_file_size_names_the_output(tmp_path):
    body = """
def main():
    import resource, numpy as np
    from longlive_jax.data.video import VideoWriter
    from longlive_jax.files.arrays import save_npz
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    path = flags.FLAGS.output
    if path.endswith("npz"):
        save_npz(path, x=np.random.default_rng(0).random((100, 100)))
    with VideoWriter(path, 64, 96) as writer:
        for _ in range(20):
            writer.write(np.random.default_rng(0).integers(0, 256, (9, 64, 96, 3), np.uint8))
"""
    for name in ("v.mp4", "v.npz"):
        process = script(tmp_path, body, f"--output={tmp_path}/{name}", stderr=subprocess.PIPE)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 2, stderr
        assert f"error: {tmp_path}/{name} gets larger than its disk" in stderr
        assert "Traceback" not in stderr
        assert sorted(os.listdir(tmp_path)) == ["script.py"]


PRINTS = """
def main():
    for i in range(20_000):
        print("a line that somebody may read", i)
        print("and one of warnings", file=sys.stderr)
    with open("done", "w") as file:
        file.write(str(file.fileno()))
"""


@pytest.mark.parametrize("streams", ["| head -1", "2>&- | head -1", ">&- 2>&-", "<&- >&-", "2>/dev/full >/dev/full"])  # fmt: skip
def test_printing_ends_no_run(tmp_path, streams):
    path = tmp_path / "script.py"
    path.write_text(HEAD + PRINTS + "\ncommand.run(main)\n")
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    words = f"set -o pipefail; {sys.executable} {path} {streams}"
    done = subprocess.run(
        ["bash", "-c", words], env=env, cwd=tmp_path, timeout=100, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert int((tmp_path / "done").read_text()) > 2  # its file is no stream of libraries


VIDEO = """
def main():
    import numpy as np
    from longlive_jax.data.video import VideoWriter
    with VideoWriter("v.mp4", 64, 96) as writer:
        writer.write(np.zeros((9, 64, 96, 3), np.uint8))
        print("ready", flush=True)
        for _ in range(600):  # Python sees no signal that comes just before a call waits
            time.sleep(0.1)
"""


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_leave_a_playable_video(tmp_path, number, code):
    process = script(tmp_path, VIDEO, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in stderr
    assert probe(tmp_path / "v.mp4").frames == 9
    assert sorted(os.listdir(tmp_path)) == ["script.py", "v.mp4"]


@pytest.mark.slow
def test_the_next_run_removes_what_a_killed_one_left(tmp_path):
    process = script(tmp_path, VIDEO, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    body = 'def main():\n    command.check_output("output", ".mp4")\n'
    left = set(os.listdir(tmp_path)) - {"script.py"}
    assert len(left) == 1
    assert script(tmp_path, body, "--output=v.mp4").wait(60) == 0
    assert left < set(os.listdir(tmp_path))  # it is being written
    process.kill()
    process.wait()
    assert script(tmp_path, body, "--output=w.mp4").wait(60) == 0
    assert left < set(os.listdir(tmp_path))  # it is another output's
    assert script(tmp_path, body, "--output=v.mp4").wait(60) == 0
    assert os.listdir(tmp_path) == ["script.py"]


def _without_a_bar():
    """As TQDM_DISABLE=1, which is read when tqdm is imported."""
    import tqdm

    tqdm.tqdm = functools.partial(tqdm.tqdm, disable=True)


@pytest.mark.slow
def test_first_frames_are_told_once(tmp_path, checkpoint, one):
    for patch in (None, _without_a_bar):
        done = run(
            "sample", *TINY, f"--checkpoint={checkpoint}", f"--prompts={one}",
            f"--output={tmp_path}/v.mp4", patch=patch,
        )  # fmt: skip
        assert done.stderr.count("first frames after") == 1
